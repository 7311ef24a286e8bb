# SPDX-License-Identifier: MIT
"""Threads for blocking calls, which exist from the start and are never abandoned.

trio's own worker threads come and go, and a new thread needs memory (a stack, and all of it where memory is
locked) at the very moment when there is none. These are started once. A call cannot be cancelled either: a
write that was given up would land later, in a block that has a new owner by then.
"""

import queue
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import outcome
import trio

P = ParamSpec("P")
T = TypeVar("T")


class IoThread(Generic[T]):
    """One thread, for calls that return a T, and its queue. Calls run in the order in which they were made."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it in the thread and wait for what it returns or raises. Always a checkpoint; not cancelled meanwhile."""
        task = trio.lowlevel.current_task()
        token = trio.lowlevel.current_trio_token()

        def job() -> None:
            # The outcome has no name here: an error would refer to this frame, and this frame to the error.
            token.run_sync_soon(trio.lowlevel.reschedule, task, outcome.capture(function, *args, **kwargs))

        def abort(_: object) -> trio.lowlevel.Abort:
            return trio.lowlevel.Abort.FAILED

        self._jobs.put(job)
        value: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return value

    def put(self, function: Callable[[], T]) -> None:
        """Call it in the thread, after what was asked before. Nobody waits for it, and nobody is told of an error."""
        self._jobs.put(lambda: _forget(outcome.capture(function)))

    def close(self) -> None:
        """End the thread once it has done what was asked of it, and wait for that."""
        self._jobs.put(None)
        self._thread.join()


def _forget(_: object) -> None:
    """Take a result that nobody wants."""
