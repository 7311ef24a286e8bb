# SPDX-License-Identifier: MIT
"""The monitor of memory pressure, which uses PSI (pressure stall information) of the kernel.

A trigger on /proc/pressure/memory wakes a thread when all programs together stalled for memory for 0.2 s within 2 s. That
alone is not enough: a program that thrashes in a small cgroup of its own gives the same figures while the machine has
gigabytes to spare. So MemAvailable must be low as well.
"""

import os
import select
import threading
from collections.abc import Callable
from typing import Final

import trio

PSI_PATH: Final = "/proc/pressure/memory"
MEMINFO_PATH: Final = "/proc/meminfo"
TRIGGER: Final = b"full 200000 2000000\0"
"""Stall and window in microseconds. Two seconds is the shortest window that needs no CAP_SYS_RESOURCE. Guessed."""

SHORT_DIVISOR: Final = 8
"""The system is short of memory when less than this part of RAM is available. Guessed."""


def is_short(meminfo: bytes) -> bool:
    """Return whether less than an eighth of RAM is available, by the text of /proc/meminfo."""
    values = {}
    for line in meminfo.splitlines():
        name, _, value = line.partition(b":")
        if name in (b"MemTotal", b"MemAvailable"):
            values[name] = int(value.split()[0])
    return values.get(b"MemAvailable", 0) * SHORT_DIVISOR < values.get(b"MemTotal", 0)


class PressureMonitor:
    """Calls `report` on the trio thread each time the system is short of memory; at most once in two seconds.

    Make it on the trio thread. OSError if the kernel has no PSI, or does not let this process set a trigger.
    """

    def __init__(self, report: Callable[[], None], psi_path: str = PSI_PATH, meminfo_path: str = MEMINFO_PATH) -> None:
        self._report = report
        self._trigger = os.open(psi_path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(self._trigger, TRIGGER)
            self._meminfo = os.open(meminfo_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._trigger)
            raise
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC)
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._listen, name="pressure", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._trigger, select.POLLPRI)
        poll.register(self._wake, select.POLLIN)
        while True:
            events = dict(poll.poll())
            if self._wake in events or events.get(self._trigger, 0) & select.POLLERR:
                return
            if is_short(os.pread(self._meminfo, 4096, 0)):
                try:
                    self._token.run_sync_soon(self._report)
                except trio.RunFinishedError:
                    return

    def close(self) -> None:
        """End the thread, and close the files."""
        os.write(self._waker, b"x")
        self._thread.join()
        for fd in (self._trigger, self._meminfo, self._wake, self._waker):
            os.close(fd)
