# SPDX-License-Identifier: MIT
"""Threads wake trio through an eventfd: not through the sockets, without a lost wake-up, and signals arrive as before."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest
import trio
from trio._core._run import GLOBAL_RUN_CONTEXT

from tests.store.rig import LIMIT_SECONDS
from zbudfs.store.iothread import IoThread
from zbudfs.store.wakeup import use_eventfd


def test_threads_wake_it_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of calls in several threads come back, the socket has nothing to read, and signals still arrive."""

    async def main() -> None:
        sockets = GLOBAL_RUN_CONTEXT.runner.entry_queue.wakeup
        assert use_eventfd()
        await trio.sleep(0.01)
        monkeypatch.setattr(type(sockets), "wakeup_thread_and_signal_safe", None)
        threads = [IoThread[int]("test") for _ in range(3)]

        async def use(thread: IoThread[int]) -> None:
            for number in range(200):
                assert await thread.run(lambda number=number: number + 1) == number + 1  # type: ignore[misc]

        with trio.fail_after(LIMIT_SECONDS):
            async with trio.open_nursery() as nursery:
                for thread in threads:
                    nursery.start_soon(use, thread)
            poll = select.poll()
            poll.register(sockets.wakeup_sock, select.POLLIN)
            assert not poll.poll(0)
            with trio.open_signal_receiver(signal.SIGUSR1) as signals:
                other = IoThread[None]("signal")
                other_done = trio.Event()

                async def send() -> None:
                    await other.run(os.kill, os.getpid(), signal.SIGUSR1)
                    other_done.set()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    async for number in signals:
                        assert number == signal.SIGUSR1
                        break
                    await other_done.wait()
                other.close()
        for thread in threads:
            thread.close()

    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        trio.run(main)
        monkeypatch.undo()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_trio(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the internals of trio are not the known ones, nothing is changed."""

    class Other:
        runner = None

    monkeypatch.setattr("trio._core._run.GLOBAL_RUN_CONTEXT", Other)
    assert not use_eventfd()
