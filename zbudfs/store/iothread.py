# SPDX-License-Identifier: MIT
"""Threads for blocking calls, which exist from the start and are never abandoned.

trio starts and ends its own worker threads as needed. A new thread needs memory (a stack, and the whole of it where memory
is locked) at the moment when there is none. These threads are started once. A call cannot be cancelled either: an abandoned
write would later reach a block that has a new owner by then.
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
        """Call the function in the thread; return its result or raise its exception. A checkpoint that is never cancelled."""
        task = trio.lowlevel.current_task()
        token = trio.lowlevel.current_trio_token()

        def job() -> None:
            # The outcome has no name here: an error refers to this frame, and a name would make the frame refer to the error.
            token.run_sync_soon(trio.lowlevel.reschedule, task, outcome.capture(function, *args, **kwargs))

        def abort(_: object) -> trio.lowlevel.Abort:
            return trio.lowlevel.Abort.FAILED

        self._jobs.put(job)
        value: T = await trio.lowlevel.wait_task_rescheduled(abort)
        return value

    def put(self, function: Callable[[], T]) -> None:
        """Call the function in the thread, after all earlier calls, without a wait. Its result and its errors are lost."""
        self._jobs.put(lambda: _forget(outcome.capture(function)))

    def close(self) -> None:
        """End the thread after its last call, and wait for that."""
        self._jobs.put(None)
        self._thread.join()


def _forget(_: object) -> None:
    """Drop a result that no caller needs."""
