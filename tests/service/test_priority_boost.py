# SPDX-License-Identifier: MIT
"""The serving thread is real-time while memory is short, and an ordinary thread otherwise."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import mounted, status_of, wait_until
from zbudfs.service.priority_boost import HOLD_SECONDS, LOOK_SECONDS, NICE, PriorityBoost, free_kib, is_short

MEMINFO = "MemTotal:       8000 kB\nMemFree:        %d kB\nMemAvailable:   7000 kB\n"
LOOKS = int(HOLD_SECONDS / LOOK_SECONDS)


def test_free_memory_is_found() -> None:
    """The text has MemFree and not MemAvailable. A text without it gives none."""
    assert free_kib((MEMINFO % 123).encode()) == 123
    assert free_kib(b"MemTotal: 5 kB\n") == 0
    assert free_kib(Path("/proc/meminfo").read_bytes()) > 0


@pytest.mark.parametrize(("free", "short"), [(0, True), (149, True), (150, False), (1000, False)])
def test_short_is_near_the_min_watermark(free: int, short: bool) -> None:
    """Memory is short below one and a half times the kernel's reserve."""
    assert is_short(free, 100) == short


class Sleeper:
    """A thread that sleeps, and whose scheduling is changed."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._end.wait)
        self._thread.start()
        assert self._thread.native_id is not None
        self.tid = self._thread.native_id

    def end(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Return a thread whose scheduling can be changed."""
    made = Sleeper()
    yield made
    made.end()


def set_free(root: Path, kib: int) -> None:
    """Write this number to the text of meminfo."""
    (root / "proc/sys/vm").mkdir(parents=True, exist_ok=True)
    (root / "proc/sys/vm/min_free_kbytes").write_text("100\n")
    (root / "proc/meminfo").write_text(MEMINFO % kib)


@pytest.mark.needs("root")
def test_the_priority_is_raised_and_lowered(tmp_path: Path, sleeper: Sleeper) -> None:
    """Short memory raises the priority at once. Plenty of memory lowers it, after a while."""
    os.sched_setscheduler(sleeper.tid, os.SCHED_RR, os.sched_param(1))
    set_free(tmp_path, 1000)
    boost = PriorityBoost(sleeper.tid, str(tmp_path))
    try:
        boost.look()
        assert os.sched_getscheduler(sleeper.tid) == os.SCHED_OTHER
        assert os.getpriority(os.PRIO_PROCESS, sleeper.tid) == NICE
        set_free(tmp_path, 10)
        boost.look()
        assert os.sched_getscheduler(sleeper.tid) == os.SCHED_RR
        set_free(tmp_path, 1000)
        for _ in range(LOOKS - 1):
            boost.look()
            assert os.sched_getscheduler(sleeper.tid) == os.SCHED_RR
        boost.look()
        assert os.sched_getscheduler(sleeper.tid) == os.SCHED_OTHER
    finally:
        boost.close()


def test_nothing_before_the_beginning(tmp_path: Path, sleeper: Sleeper) -> None:
    """A worker that does not serve yet keeps its scheduling."""
    before = os.sched_getscheduler(sleeper.tid)
    set_free(tmp_path, 10)
    boost = PriorityBoost(sleeper.tid, str(tmp_path))
    boost.close()
    assert boost.raised
    assert os.sched_getscheduler(sleeper.tid) == before


@pytest.mark.needs("root", "fuse")
def test_a_worker_that_serves_is_an_ordinary_thread(tmp_path: Path) -> None:
    """With free memory the thread is ordinary, and the worker's other threads stay real-time."""
    if is_short(free_kib(Path("/proc/meminfo").read_bytes()), int(Path("/proc/sys/vm/min_free_kbytes").read_text())):
        pytest.skip("this machine is short of memory")
    with mounted(tmp_path / "mnt") as mountpoint:
        worker = int(status_of(mountpoint)["worker_pid"])
        wait_until(lambda: os.sched_getscheduler(worker) == os.SCHED_OTHER, "the worker being lowered")
        others = [int(task.name) for task in Path(f"/proc/{worker}/task").iterdir() if task.name != str(worker)]
        assert {os.sched_getscheduler(tid) for tid in others} == {os.SCHED_RR}
