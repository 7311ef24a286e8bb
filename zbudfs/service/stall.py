# SPDX-License-Identifier: MIT
"""The detection of a worker that waits for a disk that does not answer.

Such a worker does not end when it is killed, and its successor must wait for it: the mount is dead until the disk answers. The
worker itself still serves the pages in RAM. So a keeper checks here before it replaces a healthy worker.

    writes, fallocate     a thread of the worker stays in one uninterruptible sleep (state D): the count of its context
                          switches in /proc/PID/task/TID/status does not change
    reads by the kernel   the worker reports their age in the status area (store/aio_page_in.py)

A disk that stops just before the kill is not noticed. Then the mount is dead until the disk answers, and nothing is lost.
"""

import contextlib
import os
import time
from typing import Final

from zbudfs.store.status_area import Field

STALL_SECONDS: Final = 1.0
"""Time after which a disk request counts as stalled. Guessed: a slow flash card takes a fraction of that for a write."""


class Stall:
    """Watches the disk requests of one process, a worker that serves. `fields` are those of the status area."""

    def __init__(self, pid: int, fields: memoryview, root: str = "/") -> None:
        self.pid = pid
        self._fields = fields
        self._folder = f"{root}proc/{pid}/task"
        self._sleeps: dict[tuple[int, int], float] = {}
        """Uninterruptible sleeps: thread and count of context switches, with the time at which the sleep was first seen."""
        self._first = self._find()
        """Sleeps of unknown age: those at the first check that have lasted since."""

    def look(self) -> bool:
        """Return whether a disk request of the process may be stalled. Call this repeatedly."""
        now = time.monotonic()
        found = self._find()
        self._first &= found
        self._sleeps = {sleep: self._sleeps.get(sleep, now) for sleep in found}
        oldest = now - min(self._sleeps.values(), default=now)
        return bool(self._first) or max(oldest, self._fields[Field.OLDEST_READ_SECONDS]) >= STALL_SECONDS

    def _find(self) -> set[tuple[int, int]]:
        found: set[tuple[int, int]] = set()
        with contextlib.suppress(OSError):  # the process has ended
            for thread in os.listdir(self._folder):
                with contextlib.suppress(OSError), open(f"{self._folder}/{thread}/status", "rb") as status:
                    lines = dict(line.split(b":", 1) for line in status.read().splitlines() if b":" in line)
                    if lines.get(b"State", b"?").split()[0] == b"D":
                        found.add((int(thread), int(lines.get(b"voluntary_ctxt_switches", b"0"))))
        return found
