# SPDX-License-Identifier: MIT
"""The threads for blocking calls: one each, from the start; calls in order, never given up in the middle."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import trio
import trio.testing

from tests.store.rig import run, until
from zbudfs.store.iothread import IoThread


def test_a_call_gives_its_result() -> None:
    """Arguments of both sorts get there, and what the function returns comes back; it is always a checkpoint."""

    def function(left: int, *, right: int) -> int:
        return left - right

    async def main() -> None:
        thread = IoThread[int]("test")
        with trio.testing.assert_checkpoints():
            assert await thread.run(function, 7, right=3) == 4
        thread.close()

    run(main)


def test_an_error_passes_through() -> None:
    """What the function raises is raised by the call, and the thread goes on."""
    error = ValueError("as it was")

    def function() -> int:
        raise error

    async def main() -> None:
        thread = IoThread[int]("test")
        for _ in range(2):
            with pytest.raises(ValueError, match="as it was") as caught:
                await thread.run(function)
            assert caught.value is error
        assert await thread.run(lambda: 5) == 5
        thread.close()

    run(main)


def test_one_thread_with_a_name_from_the_start() -> None:
    """Every call runs in the same thread, which was there before the first one and is gone after close."""

    async def main() -> None:
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

    run(main)


def test_calls_run_in_the_order_in_which_they_were_made() -> None:
    """One after the other, never two at once, whoever made them."""
    gate, order = threading.Event(), list[int]()

    def function(number: int) -> None:
        assert gate.wait(30)
        order.append(number)

    async def main() -> None:
        thread = IoThread[None]("test")
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(thread.run, function, number)
                await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert order == list(range(20))
        thread.close()

    run(main)


def test_the_event_loop_goes_on_meanwhile() -> None:
    """A call that takes its time keeps no other task from running."""
    gate = threading.Event()

    async def main() -> None:
        thread = IoThread[bool]("test")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.run, gate.wait, 30)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            gate.set()
        thread.close()

    run(main)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_is_not_cancelled_in_the_middle(fails: bool) -> None:
    """Cancelling waits for the end of the call, whose result or error is not lost; the next checkpoint is cancelled."""
    started, gate, done = threading.Event(), threading.Event(), list[object]()

    def function() -> int:
        started.set()
        assert gate.wait(30)
        done.append("in the thread")
        if fails:
            raise ValueError
        return 5

    async def main() -> None:
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

    run(main)


def test_a_call_that_is_queued_is_not_cancelled_either() -> None:
    """A call that was made is carried out, even if it was cancelled before the thread came to it."""
    gate, done = threading.Event(), list[int]()

    async def main() -> None:
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

    run(main)


def test_close_does_what_was_asked_first() -> None:
    """Closing ends the thread behind the calls that were made before."""
    done = list[int]()

    async def main() -> None:
        thread = IoThread[None]("test")
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(thread.run, done.append, number)
            await trio.testing.wait_all_tasks_blocked()
            thread.close()
            assert sorted(done) == list(range(5))

    run(main)


def test_an_error_leaves_no_cycle() -> None:
    """The daemon has no cyclic collector that would find it: a disk that fails for days must not fill its memory."""

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
