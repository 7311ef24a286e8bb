# SPDX-License-Identifier: MIT
"""How threads wake trio's: with an eventfd, which needs no memory.

trio sends a byte through a pair of sockets, and the kernel allocates a buffer for each. That is memory in the middle of the
swap path: measured, in a memory cgroup that the daemon shared with the program that swapped and where the IO flusher mode had
been refused, a thread that had finished a write waited in there for swap, and so for itself, and outlived its process in it.
"""

import contextlib
import os
import select
from typing import Any

import trio


class _Wakeup:
    """Stands in for trio's WakeupSocketpair `old`, which goes on to be what signals wake."""

    def __init__(self, old: Any) -> None:
        self._old = old
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._either = select.epoll()
        self._either.register(self._fd, select.EPOLLIN)
        self._either.register(old.wakeup_sock.fileno(), select.EPOLLIN)

    def wakeup_thread_and_signal_safe(self) -> None:
        """Have `wait_woken` return, now or at once the next time."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._fd, 1)

    async def wait_woken(self) -> None:
        """Until somebody has called that, or a signal has come."""
        await trio.lowlevel.wait_readable(self._either.fileno())
        self.drain()

    def drain(self) -> None:
        """Forget all wake-ups."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._old.drain()

    def close(self) -> None:
        """End it, and the old one."""
        self._either.close()
        os.close(self._fd)
        self._old.close()


def use_eventfd() -> bool:
    """Have the trio that runs here be woken so from now on. False if it is not the trio that is known here: nothing changed.

    trio has no public name for it.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        queue: Any = GLOBAL_RUN_CONTEXT.runner.entry_queue
        old = queue.wakeup
        queue.wakeup = _Wakeup(old)
    except (ImportError, AttributeError):
        return False
    old.wakeup_thread_and_signal_safe()  # who waits for the old one goes on to wait for the new one
    return True
