# SPDX-License-Identifier: MIT
"""Real-time scheduling of the serving thread while memory is short, and ordinary scheduling otherwise.

Real-time scheduling helps a daemon in the swap path only when free memory is near the kernel's min watermark. Then allocations
for it may use the reserve below the watermark, and a crowd of programs that wait for memory cannot keep the daemon from
running. At every other moment it costs time. A real-time thread wakes on the processor where it slept, and a random page-in
takes 60 to 90 us (measured, two cores). An ordinary thread wakes beside the program that waits for it, and a page-in takes 27
to 35 us.

So the serving thread is an ordinary one. The thread of this module is real-time itself. It checks the free memory several
times a second, and raises the serving thread when memory is short. It must do that from outside: a thread that waits for
memory cannot raise itself, and the kernel reads the priority of the waiting thread each time it tries again. The threads that
write back are always real-time.
"""

import contextlib
import os
import threading
from typing import Final

from zbudfs.service.hardening import PRIORITY
from zbudfs.store.files import below, read_text

NICE: Final = -5
"""Nice value of the serving thread while it is an ordinary one: before the programs that wait for it. Guessed."""

LOOK_SECONDS: Final = 0.1
"""Time between two checks of the free memory while it is nearly short. A check takes some 30 us. Guessed."""

LONGEST_LOOK_SECONDS: Final = 1.0
FASTEST_KIB_PER_SECOND: Final = 2 << 20
"""Rate at which one processor can use up memory. If more is free, the next check is later. Guessed."""

HOLD_SECONDS: Final = 5.0
"""Time for which the thread stays real-time after free memory was last short. Guessed."""

SHORT_NUMERATOR: Final = 3
SHORT_DENOMINATOR: Final = 2
"""Free memory is short below 3/2 of min_free_kbytes: the low watermark, at which reclaim begins, is 5/4 of it."""


def free_kib(meminfo: bytes) -> int:
    """Return MemFree from the text of /proc/meminfo, in KiB; 0 if it is missing."""
    _, found, rest = meminfo.partition(b"MemFree:")
    return int(rest.split(None, 1)[0]) if found else 0


def is_short(free: int, min_free: int) -> bool:
    """Return whether `free` KiB are close to the reserve of a kernel that keeps `min_free` KiB."""
    return free * SHORT_DENOMINATOR < min_free * SHORT_NUMERATOR


def until_next_look(free: int, min_free: int, processors: int) -> float:
    """Return the seconds in which `free` KiB cannot become short, but at least LOOK_SECONDS."""
    spare = free - min_free * SHORT_NUMERATOR // SHORT_DENOMINATOR
    return min(max(LOOK_SECONDS, spare / (FASTEST_KIB_PER_SECOND * processors)), LONGEST_LOOK_SECONDS)


class PriorityBoost:
    """Watches the free memory for one thread, `serving_tid`, from `begin` on. OSError if it cannot.

    Its own thread exists from the start, since a new thread needs memory. The serving thread is real-time until `begin`.
    `root` holds `proc/`.
    """

    def __init__(self, serving_tid: int, root: str = "/") -> None:
        self._serving_tid = serving_tid
        self._min_free_kib = int(read_text("proc/sys/vm/min_free_kbytes", root))
        self._meminfo = os.open(below(root, "proc/meminfo"), os.O_RDONLY | os.O_CLOEXEC)
        os.pread(self._meminfo, 4096, 0)  # the first read makes the kernel allocate; later there may be no memory
        self._begun = threading.Event()
        self._ended = threading.Event()
        self._processors = os.cpu_count() or 1
        self._looks_left = 0
        self.raised = True
        """Whether the thread is real-time now."""
        self._thread = threading.Thread(target=self._watch, name="priority-boost", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Start the watch: the thread serves from now on."""
        self._begun.set()

    def close(self) -> None:
        """Stop the watch."""
        self._ended.set()
        self._begun.set()
        self._thread.join()
        os.close(self._meminfo)

    def _watch(self) -> None:
        self._begun.wait()
        seconds = LOOK_SECONDS
        while not self._ended.wait(seconds):
            seconds = self.look()

    def look(self) -> float:
        """Check the free memory once, and schedule the thread. Return the seconds until the next check."""
        free = free_kib(os.pread(self._meminfo, 4096, 0))
        if is_short(free, self._min_free_kib):
            self._looks_left = int(HOLD_SECONDS / LOOK_SECONDS)
        elif self._looks_left:
            self._looks_left -= 1
        self._schedule(real_time=self._looks_left > 0)
        return LOOK_SECONDS if self.raised else until_next_look(free, self._min_free_kib, self._processors)

    def _schedule(self, *, real_time: bool) -> None:
        if real_time == self.raised:
            return
        self.raised = real_time
        with contextlib.suppress(OSError):  # it was refused before, and reported then (hardening)
            if real_time:
                os.sched_setscheduler(self._serving_tid, os.SCHED_RR, os.sched_param(PRIORITY))
            else:
                os.sched_setscheduler(self._serving_tid, os.SCHED_OTHER, os.sched_param(0))
                os.setpriority(os.PRIO_PROCESS, self._serving_tid, NICE)
