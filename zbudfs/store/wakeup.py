# SPDX-License-Identifier: MIT
"""An eventfd, which needs no memory, with which threads wake trio's thread.

trio sends a byte through a pair of sockets, and the kernel allocates a buffer for each. That is memory in the middle of the
swap path. It was measured in a memory cgroup that the daemon shared with the swapping program, where the IO flusher mode had
been refused. A thread that had finished a write waited there for swap, and so for itself, and outlived its process.
"""

import contextlib
import os
import select
from typing import Any

import trio


class _Wakeup:
    """A replacement of trio's WakeupSocketpair `old`. Signals still wake the old one."""

    def __init__(self, old: Any) -> None:
        self._old = old
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._either = select.epoll()
        self._either.register(self._fd, select.EPOLLIN)
        self._either.register(old.wakeup_sock.fileno(), select.EPOLLIN)

    def wakeup_thread_and_signal_safe(self) -> None:
        """Make `wait_woken` return, now or at its next call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._fd, 1)

    async def wait_woken(self) -> None:
        """Wait until `wakeup_thread_and_signal_safe` is called, or a signal has come."""
        await trio.lowlevel.wait_readable(self._either.fileno())
        self.drain()

    def drain(self) -> None:
        """Forget all wake-ups."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._old.drain()

    def close(self) -> None:
        """Close this object and the old one."""
        self._either.close()
        os.close(self._fd)
        self._old.close()


def use_eventfd() -> bool:
    """Make threads wake the running trio with an eventfd. False, without a change, if its internals are not as expected.

    trio has no public name for this part.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        queue: Any = GLOBAL_RUN_CONTEXT.runner.entry_queue
        old = queue.wakeup
        queue.wakeup = _Wakeup(old)
    except (ImportError, AttributeError):
        return False
    old.wakeup_thread_and_signal_safe()  # a task that waits for the old one wakes, and waits for the new one next
    return True
