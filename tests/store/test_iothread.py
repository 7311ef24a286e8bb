# SPDX-License-Identifier: MIT
"""The threads for blocking calls: one each, from the start. Calls run in order, and none is given up."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import trio
import trio.testing

from tests.store.rig import trio_test, until
from zbudfs.store.iothread import IoThread


@trio_test
async def test_a_call_gives_its_result() -> None:
    """Arguments of both sorts arrive, the result comes back, and each call is a checkpoint."""

    def function(left: int, *, right: int) -> int:
        return left - right

    thread = IoThread[int]("test")
    with trio.testing.assert_checkpoints():
        assert await thread.run(function, 7, right=3) == 4
    thread.close()


@trio_test
async def test_an_error_passes_through() -> None:
    """The call raises the error of the function, and the thread continues."""
    error = ValueError("as it was")

    def function() -> int:
        raise error

    thread = IoThread[int]("test")
    for _ in range(2):
        with pytest.raises(ValueError, match="as it was") as caught:
            await thread.run(function)
        assert caught.value is error
    assert await thread.run(lambda: 5) == 5
    thread.close()


@trio_test
async def test_one_thread_with_a_name_from_the_start() -> None:
    """Each call runs in the same thread, which exists before the first call and ends with close."""
    before = threading.active_count()
    thread = IoThread[tuple[str, int]]("my name")
    assert threading.active_count() == before + 1
    found = {await thread.run(lambda: (threading.current_thread().name, threading.get_ident())) for _ in range(5)}
    assert len(found) == 1
    ((name, ident),) = found
    assert name == "my name"
    assert ident != threading.get_ident()
    thread.close()
    assert threading.active_count() == before


@trio_test
async def test_calls_run_in_the_order_in_which_they_were_made() -> None:
    """The calls of all tasks run one after the other, never two at once."""
    gate, order = threading.Event(), list[int]()

    def function(number: int) -> None:
        assert gate.wait(30)
        order.append(number)

    thread = IoThread[None]("test")
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(thread.run, function, number)
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert order == list(range(20))
    thread.close()


@trio_test
async def test_the_event_loop_goes_on_meanwhile() -> None:
    """Other tasks run during a long call."""
    gate = threading.Event()

    thread = IoThread[bool]("test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, gate.wait, 30)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        gate.set()
    thread.close()


@pytest.mark.parametrize("fails", [False, True])
@trio_test
async def test_a_call_is_not_cancelled_in_the_middle(fails: bool) -> None:
    """A cancelled call runs to its end, and its result or error is not lost. The next checkpoint is cancelled."""
    started, gate, done = threading.Event(), threading.Event(), list[object]()

    def function() -> int:
        started.set()
        assert gate.wait(30)
        done.append("in the thread")
        if fails:
            raise ValueError
        return 5

    thread = IoThread[int]("test")
    scope = trio.CancelScope()

    async def caller() -> None:
        with scope:
            try:
                done.append(await thread.run(function))
            except ValueError:
                done.append("failed")
            await trio.lowlevel.checkpoint()
            done.append("not reached")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await until(started.is_set, "the call has begun")
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        gate.set()
    assert done == ["in the thread", "failed" if fails else 5]
    assert scope.cancelled_caught
    thread.close()


@trio_test
async def test_a_call_that_is_queued_is_not_cancelled_either() -> None:
    """A queued call is carried out, even if it is cancelled before the thread reaches it."""
    gate, done = threading.Event(), list[int]()

    thread = IoThread[object]("test")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, gate.wait, 30)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(thread.run, done.append, 1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        gate.set()
    assert done == [1]
    thread.close()


@trio_test
async def test_close_does_what_was_asked_first() -> None:
    """The thread ends after the calls that were made before close."""
    done = list[int]()

    thread = IoThread[None]("test")
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(thread.run, done.append, number)
        await trio.testing.wait_all_tasks_blocked()
        thread.close()
        assert sorted(done) == list(range(5))


def test_an_error_leaves_no_cycle() -> None:
    """The daemon has no cyclic collector: a disk that fails for days must not fill its memory."""

    class Disaster(Exception):
        pass

    def fail() -> None:
        raise Disaster

    async def main() -> None:
        thread = IoThread[None]("test")
        for _ in range(10):
            with contextlib.suppress(Disaster):
                await thread.run(fail)
        thread.close()

    gc.collect()
    gc.disable()
    try:
        trio.run(main)
        assert not [each for each in gc.get_objects() if isinstance(each, Disaster)]
    finally:
        gc.enable()
