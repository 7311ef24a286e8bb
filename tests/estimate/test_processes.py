# SPDX-License-Identifier: MIT
"""Samples of real processes: what they wrote is found, what they never touched is not, and nothing in them changes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS
from zbudfs.estimate.processes import all_pids, sample_processes, writable_private
from zbudfs.estimate.sample import Sample, SampleError, draw

WRITTEN_PAGES: Final = 300
UNTOUCHED_PAGES: Final = 5000

PROGRAM: Final = f"""
import mmap, sys
memory = mmap.mmap(-1, ({WRITTEN_PAGES} + {UNTOUCHED_PAGES}) * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range({WRITTEN_PAGES}):
    memory[page * 4096 : (page + 1) * 4096] = (b"sample %8d " % page * 300)[:4096]
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[int]:
    """A process that has written WRITTEN_PAGES pages of a mapping, and not the rest of it."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.communicate(timeout=LIMIT_SECONDS)


def quiet(done: int, total: int) -> None:
    """Take a word about progress."""
    assert 0 <= done <= total


def resident_pages(pid: int) -> int:
    """Return the pages of a process that are in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def sample_of(*pids: int, wanted: int = 1 << 20, strict: bool = True) -> Sample:
    """Take a sample of processes."""
    return sample_processes(pids, wanted, 1, quiet, strict=strict, source="the test")


def test_what_was_written_is_found_once(child: int) -> None:
    """Every written page is there, the untouched ones are not, and reading has made none of them."""
    before = resident_pages(child)
    sample = sample_of(child, child)
    assert resident_pages(child) == before
    mine = [page for page in sample.pages if page.startswith(b"sample ")]
    assert {int(page[7:15]) for page in mine} == set(range(WRITTEN_PAGES))
    assert WRITTEN_PAGES <= len(sample.pages) < UNTOUCHED_PAGES
    assert {len(page) for page in sample.pages} == {4096}


def test_a_sample_is_a_part(child: int) -> None:
    """As many pages as wanted, of more that there are."""
    sample = sample_of(child, wanted=100)
    assert len(sample.pages) == 100
    assert sample.population_pages > WRITTEN_PAGES


def test_draw() -> None:
    """All of a small population; else different ones in order."""
    assert draw(5, 9, 1) == draw(5, 5, 1) == [0, 1, 2, 3, 4]
    some = draw(1 << 40, 1000, 7)
    assert some == sorted(set(some))
    assert len(some) == 1000


def test_processes_that_are_gone(child: int) -> None:
    """Asked for by number: an error. Among others: counted."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(timeout=LIMIT_SECONDS)
    with pytest.raises(SampleError, match=f"there is no process {ended.pid}"):
        sample_of(child, ended.pid)
    sample = sample_of(ended.pid, child, strict=False)
    assert sample.counts["ended"] == 1
    assert sample.counts["processes"] == 1


def test_a_process_without_memory() -> None:
    """A thread of the kernel, or one that has ended and was not waited for."""
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SampleError, match="has no memory of its own"):
            sample_of(zombie.pid)
        with pytest.raises(SampleError, match="no private writable memory is in RAM"):
            sample_of(zombie.pid, strict=False)


@pytest.mark.needs("root")
def test_what_may_not_be_read(child: int) -> None:
    """Somebody else's process is an error when asked for, and counted among others; one's own can be read."""
    program = (
        "import os, sys\n"
        "from zbudfs.estimate.processes import sample_processes\n"
        "from zbudfs.estimate.sample import SampleError\n"
        "os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
        f"pids = [{child}]\n"
        "for strict in (True, False):\n"
        "    try:\n"
        "        sample_processes(pids, 9, 1, print, strict=strict, source='it')\n"
        "    except SampleError as error:\n"
        "        print(error, file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True
    )
    assert run.stderr.splitlines() == [
        f"the memory of process {child} may not be read: run this as root, or as its user",
        "no memory may be read, 1 processes are of other users: run this as root",
    ]


def test_this_process_is_not_among_all() -> None:
    """Its memory is the sample itself."""
    assert os.getpid() not in all_pids()
    assert os.getppid() in all_pids()


def test_which_mappings_count() -> None:
    """Private and writable ones, whatever is mapped."""
    maps = """\
00400000-00401000 r-xp 00000000 08:01 1 /bin/a b
00601000-00603000 rw-p 00001000 08:01 1 /bin/a b
01000000-01021000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000001000 rw-s 00000000 00:01 9 /dev/shm/x
7f0000002000-7f0000003000 ---p 00000000 00:00 0
7f0000004000-7f0000009000 rw-p 00000000 00:00 0
"""
    assert writable_private(maps) == [(0x601, 2), (0x1000, 0x21), (0x7F0000004, 5)]
