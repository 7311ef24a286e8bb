# SPDX-License-Identifier: MIT
"""The child processes of the keeper, with the signs that one of them has ended or hangs.

    it has ended     its pidfd is readable: all threads are gone
    it is stopped    the kernel reports that to the parent (SIGCHLD, waitid with WSTOPPED), without polling
    it is silent     a number in the status area stands still (`Pulse`)

No function here waits. A pause of the whole machine does not count as silence: it stops the keeper too, and the keeper counts
only the time in which it checked.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Final, NoReturn

LONGEST_LOOK_SECONDS: Final = 1.0
"""Longest part of the time between two checks that counts as silence. A keeper that did not run itself, because the machine
stood still or gave it no processor time, knows nothing of its children. Guessed."""
HANG_SECONDS: Final = 5.0
"""A worker or standby whose heartbeat stands still for so long is killed. Guessed: a machine without processor time for it
causes the longest silence that is not a fault."""
START_LIMIT_SECONDS: Final = 45.0
"""A worker or standby that gets ready and gives no sign of life for so long is killed. It may take any time. Arbitrary."""
STOPPED_SECONDS: Final = 0.6
"""A child that was stopped (SIGSTOP) for so long is killed. Guessed: the fg of a shell continues all processes within
milliseconds."""
_LONGEST_STOPPED_LOOK_SECONDS: Final = 0.2


class Process:
    """A child process of any kind: a worker, a standby, or a keeper of another version."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.is_stopped = False
        """Whether a signal has stopped it, at the last check."""
        self.is_killed = False
        """Whether `kill` was called."""
        self._stopped_seconds = 0.0
        self._looked_at = 0.0
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # it was forked a moment ago, so nothing in the kernel delays its end
            raise

    def has_ended(self) -> bool:
        """Return whether the process, with all its threads, is gone."""
        return is_readable(self.pidfd)

    def is_stopped_for_good(self) -> bool:
        """Return whether it has been stopped for longer than STOPPED_SECONDS. Call this repeatedly."""
        with contextlib.suppress(ChildProcessError):
            options = os.WSTOPPED | os.WCONTINUED | os.WNOHANG
            while (found := os.waitid(os.P_PID, self.pid, options)) is not None:
                self.is_stopped = found.si_code == os.CLD_STOPPED
                self._stopped_seconds = 0.0
                self._looked_at = time.monotonic()
        if not self.is_stopped:
            return False
        now = time.monotonic()
        self._stopped_seconds += min(now - self._looked_at, _LONGEST_STOPPED_LOOK_SECONDS)
        self._looked_at = now
        return self._stopped_seconds > STOPPED_SECONDS

    def tell(self, number: int) -> None:
        """Send it a signal, if it has not been reaped."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """End it, without waiting for its end."""
        self.is_killed = True
        self.tell(signal.SIGKILL)

    def reap(self) -> int | None:
        """Return its exit status (negative: the signal) and close its descriptors; None while it lives."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self._close()
        return os.waitstatus_to_exitcode(status)

    def _close(self) -> None:
        os.close(self.pidfd)


class Child(Process):
    """A worker or standby. The keeper orders it through one eventfd; through another the child reports that it is ready."""

    def __init__(self, pid: int, order_fd: int, ready_fd: int, *, is_standby: bool) -> None:
        super().__init__(pid)
        self.is_standby = is_standby
        """Whether it gets ready before it serves. If not, it was forked to serve at once."""
        self.ready_fd = ready_fd
        self._order_fd = order_fd
        self._is_ready = False

    @classmethod
    def fork(cls, work: Callable[[int, int], NoReturn], *, is_standby: bool) -> "Child":
        """Fork a process that runs `work(order_fd, ready_fd)`. OSError, and then nothing is left of it."""
        order_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            ready_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                pid = os.fork()
                if not pid:
                    work(order_fd, ready_fd)
                return cls(pid, order_fd, ready_fd, is_standby=is_standby)
            except OSError:
                os.close(ready_fd)
                raise
        except OSError:
            os.close(order_fd)
            raise

    @property
    def is_ready(self) -> bool:
        """Whether it has reported that it can take over at once."""
        self._is_ready = self._is_ready or is_readable(self.ready_fd)
        return self._is_ready

    def order(self) -> None:
        """Order it to take over."""
        os.eventfd_write(self._order_fd, 1)

    def _close(self) -> None:
        super()._close()
        os.close(self._order_fd)
        os.close(self.ready_fd)


class Pulse:
    """The time for which a number that another process counts up has stood still, as far as this process checked."""

    def __init__(self) -> None:
        self.beat = 0
        """The number at the last check."""
        self.silent_seconds = 0.0
        self._looked_at = time.monotonic()

    def look(self, beat: int) -> float:
        """Compare with the number now, and return the seconds of silence."""
        now = time.monotonic()
        passed = min(now - self._looked_at, LONGEST_LOOK_SECONDS)
        self.silent_seconds = self.silent_seconds + passed if beat == self.beat else 0.0
        self.beat, self._looked_at = beat, now
        return self.silent_seconds

    def restart(self, beat: int) -> None:
        """Start the time again, since the number now has another meaning or another writer."""
        self.beat, self.silent_seconds, self._looked_at = beat, 0.0, time.monotonic()


def is_readable(fd: int) -> bool:
    """Return whether a read of the descriptor would not wait."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
