# SPDX-License-Identifier: MIT
"""The sample of a real process has the pages that it wrote and no others, and changes nothing in the process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS
from zbudfs.estimate.pagemap import Frames, Proc, look
from zbudfs.estimate.processes import sample_processes
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
    """Start a process that has written WRITTEN_PAGES pages of a mapping, and not the rest of it."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.communicate(timeout=LIMIT_SECONDS)


def quiet(done: int, total: int) -> None:
    """Ignore a message of progress."""
    assert 0 <= done <= total


def resident_pages(pid: int) -> int:
    """Return the pages of a process that are in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def sample_of(*pids: int, wanted: int = 1 << 20, strict: bool = True, proc: Proc | None = None) -> Sample:
    """Take a sample of processes."""
    return sample_processes(pids, wanted, 1, quiet, strict=strict, source="the test", proc=proc)


def test_written_pages_are_found_once(child: int) -> None:
    """The sample has each written page and no untouched one, and reading makes no page resident."""
    before = resident_pages(child)
    sample = sample_of(child, child)
    assert resident_pages(child) == before
    mine = [page for page in sample.pages if page.startswith(b"sample ")]
    assert {int(page[7:15]) for page in mine} == set(range(WRITTEN_PAGES))
    assert WRITTEN_PAGES <= len(sample.pages) < UNTOUCHED_PAGES
    assert {len(page) for page in sample.pages} == {4096}


def test_a_sample_is_a_part(child: int) -> None:
    """The sample has as many pages as wanted, of a larger number."""
    sample = sample_of(child, wanted=100)
    assert len(sample.pages) == 100
    assert sample.population_pages > WRITTEN_PAGES


def test_draw() -> None:
    """A draw has all of a small population, or different members of a larger one in order."""
    assert draw(5, 9, 1) == draw(5, 5, 1) == [0, 1, 2, 3, 4]
    some = draw(1 << 40, 1000, 7)
    assert some == sorted(set(some))
    assert len(some) == 1000


def test_processes_that_are_gone(child: int) -> None:
    """A process that has ended is an error if it was named, and is counted if it is one of all."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(timeout=LIMIT_SECONDS)
    with pytest.raises(SampleError, match=f"there is no process {ended.pid}"):
        sample_of(child, ended.pid)
    sample = sample_of(ended.pid, child, strict=False)
    assert sample.counts["ended"] == 1
    assert sample.counts["processes"] == 1


def test_a_process_without_memory() -> None:
    """A thread of the kernel and a zombie have no memory to read."""
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SampleError, match="has no memory of its own"):
            sample_of(zombie.pid)
        with pytest.raises(SampleError, match="no private writable memory is in RAM"):
            sample_of(zombie.pid, strict=False)


@pytest.mark.needs("root")
def test_processes_of_other_users(child: int) -> None:
    """Another user's process is an error if it was named, and is counted otherwise. The user's own can be read."""
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
    """The measuring process is not one of all, since its memory holds the sample."""
    assert os.getpid() not in Proc().pids()
    assert os.getppid() in Proc().pids()


ODD_PROGRAM: Final = """
import ctypes, mmap, os, sys
name, reserve = os.fsencode(sys.argv[1]), int(sys.argv[2])
fd = os.open(name, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, mmap.PAGESIZE)
memory = mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
memory[:] = b"sample        1 ".ljust(mmap.PAGESIZE, b".")
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
if reserve:
    private_noreserve = 0x4022
    start = libc.mmap(None, reserve, mmap.PROT_READ | mmap.PROT_WRITE, private_noreserve, -1, 0)
    assert start != ctypes.c_void_p(-1).value
    ctypes.memset(start + reserve // 2, ord("R"), mmap.PAGESIZE)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def odd_process(folder: Path, name: bytes = b"file", reserve: int = 0) -> Iterator[int]:
    """Start a process that maps a file of that name, writable and private, and reserves so many bytes of addresses."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", ODD_PROGRAM, name, str(reserve)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=folder,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.communicate(timeout=LIMIT_SECONDS)


@pytest.mark.parametrize(
    "name",
    [
        b"a\x0bb c d",
        b"a\x0b0-7ffffffffffff000 rw-p x",
        b"\x0c\x1c\x1d\x1e",
        "\x85\u2028".encode(),
        b"\xff\xfe\x00".rstrip(b"\0"),
        b"a\n00000000-7ffffffff000 rw-p 00000000 00:00 0 ",
        b"\x1b]0;title\x07",
    ],
)
def test_odd_names_of_mapped_files(tmp_path: Path, name: bytes) -> None:
    """A file name may contain any line break that Python knows: the sample has this mapping and no other."""
    with odd_process(tmp_path, name) as pid:
        sample = sample_of(pid)
    assert any(page.startswith(b"sample        1") for page in sample.pages)
    assert "cut_off" not in sample.counts


def test_terabytes_that_are_not_there(tmp_path: Path) -> None:
    """The kernel skips holes if it can. Otherwise the limit of time holds, and small mappings come first."""
    with odd_process(tmp_path, reserve=32 << 40) as pid:
        scanned = sample_of(pid, proc=Proc(process_limit_seconds=60))
        limited = sample_of(pid, proc=Proc(process_limit_seconds=0.5, scan=False))
    assert limited.counts["cut_off"] == 1
    assert any(page.startswith(b"sample ") for page in limited.pages)
    if "cut_off" not in scanned.counts:  # Linux 6.7
        assert any(page == b"R" * 4096 for page in scanned.pages)
        assert abs(scanned.population_pages - limited.population_pages) <= 16


def test_scan_and_pagemap_agree(child: int) -> None:
    """The scan with PAGEMAP_SCAN and the scan without it find the same pages, unless the kernel moves some meanwhile."""
    for _ in range(10):
        before, without, after = (sample_of(child, proc=Proc(scan=scan)).pages for scan in (True, False, True))
        if before == after:
            break
    assert before == without == after


def made_up(proc: Path, pid: int, maps: bytes, entries: dict[int, int], page_bytes: int) -> None:
    """Write maps, pagemap and mem of a process. `entries` are those of pagemap, by the number of the kernel's page."""
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "maps").write_bytes(maps)
    with (folder / "pagemap").open("wb") as pagemap, (folder / "mem").open("wb") as mem:
        for page, entry in entries.items():
            pagemap.seek(8 * page)
            pagemap.write(entry.to_bytes(8, sys.byteorder))
            mem.seek(page_bytes * page)
            mem.write(b"".join(b"%8d %2d" % (page, part) + bytes(4085) for part in range(page_bytes // 4096)))


OWN, SHARED, SWAPPED, FILE = 1 << 63 | 1 << 56, 1 << 63, 1 << 62, 1 << 63 | 1 << 61


@pytest.mark.parametrize("page_bytes", [4096, 16384, 65536])
def test_pages_of_the_kernel(tmp_path: Path, page_bytes: int) -> None:
    """Pagemap has an entry for each page of the kernel, and each large page is several samples of 4096 bytes."""
    parts = page_bytes // 4096
    first = 0x10000000 // page_bytes
    maps = b"10000000-%x rw-p 00000000 00:00 0 \n" % (0x10000000 + 8 * page_bytes)
    maps += b"20000000-%x rw-p 00000000 00:00 0 [heap]\n" % (0x20000000 + 2 * page_bytes)
    heap = 0x20000000 // page_bytes
    entries = {first: OWN | 5, first + 1: OWN | 6, first + 3: SHARED | 7, first + 4: SWAPPED, first + 5: FILE | 8}
    made_up(tmp_path, 77, maps, {**entries, heap + 1: OWN | 9}, page_bytes)
    made_up(tmp_path, 78, maps, {first + 3: SHARED | 7}, page_bytes)
    proc = Proc(str(tmp_path), page_bytes)
    sample = sample_of(*proc.pids(), proc=proc)
    expected = [b"%8d %2d" % (page, part) for page in (first, first + 1, first + 3, heap + 1) for part in range(parts)]
    assert [page[:11] for page in sample.pages] == expected
    assert sample.population_pages == 4 * parts
    assert sample.counts == {"processes": 2, "swapped_pages": parts, "shared_pages": parts}
    some = sample_of(77, wanted=3, proc=proc)
    assert {page[:11] for page in some.pages} < set(expected)
    assert len(some.pages) == 3


@pytest.mark.parametrize(
    "line",
    [
        b"zz-yy rw-p 00000000 00:00 0\n",
        b"10000000\n",
        b"\n",
        b"20000000-10000000 rw-p 00000000 00:00 0\n",
        b"10000000-ffffffffffffffff rw-p 00000000 00:00 0\n",
        b"1000000000000000000000-2000000000000000000000 rw-p 00000000 00:00 0\n",
        b"10000000-20000000 rw\n",
        b"\xff" * 9 + b"\n",
    ],
)
def test_lines_that_make_no_sense(tmp_path: Path, line: bytes) -> None:
    """Lines that make no sense are skipped, and the lines beside them count."""
    made_up(tmp_path, 77, line + b"30000000-30001000 rw-p 00000000 00:00 0 \n", {0x30000: OWN}, 4096)
    assert sample_of(77, proc=Proc(str(tmp_path), 4096)).population_pages == 1


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_a_line_in_the_name_of_a_file(tmp_path: Path, end: str) -> None:
    """A name with a line break that only Python knows, and a whole line behind it, is a name."""
    line = (
        b"10000000-10001000 rw-p 00000000 08:01 5    /tmp/a%b20000000-20001000 rw-p 00000000 00:00 0 \n" % end.encode()
    )
    made_up(tmp_path, 77, line, {0x10000: OWN, 0x20000: OWN}, 4096)
    assert sample_of(77, proc=Proc(str(tmp_path), 4096)).population_pages == 1


def test_high_numbers_of_pages(tmp_path: Path) -> None:
    """RAM at high addresses, as on arm64 servers, needs no memory for the addresses below."""
    maps = b"10000000-10004000 rw-p 00000000 00:00 0 \n"
    numbers = (1, 1 << 30, 1 << 40, 1 << 54)
    made_up(tmp_path, 77, maps, {0x10000 + at: SHARED | frame for at, frame in enumerate(numbers)}, 4096)
    tracemalloc.start()
    try:
        assert sample_of(77, proc=Proc(str(tmp_path), 4096)).population_pages == 4
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_frames_are_a_set() -> None:
    """Each frame number is new once, and the pieces of the set stay small."""
    frames = Frames()
    numbers = [0, 1, 7, 8, (1 << 15) - 1, 1 << 15, 1 << 54]
    assert [frames.add(number) for number in numbers] == [True] * len(numbers)
    assert [frames.add(number) for number in numbers] == [False] * len(numbers)
    assert frames.size_bytes == 3 << 12


@pytest.mark.parametrize("name", ["maps", "pagemap", "mem"])
def test_a_process_that_keeps_the_kernel_waiting(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose open hangs (a FIFO stands in) costs the limit of time, and the other processes are read."""
    monkeypatch.setattr("zbudfs.estimate.processes._GRACE_SECONDS", 0.1)
    maps = b"10000000-10001000 rw-p 00000000 00:00 0 \n"
    for pid in (77, 78):
        made_up(tmp_path, pid, maps, {0x10000: OWN}, 4096)
    (tmp_path / "77" / name).unlink()
    os.mkfifo(tmp_path / "77" / name)
    proc = Proc(str(tmp_path), 4096, process_limit_seconds=0.2)
    sample = sample_of(77, 78, strict=False, proc=proc)
    assert len(sample.pages) == 1
    assert sample.counts["stuck"] == 1
    if name != "mem":
        with pytest.raises(SampleError, match="does not let the memory of process 77 be read in time"):
            sample_of(77, proc=proc)


def test_no_time_for_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes whose turn does not come are counted, and the results before them are kept."""
    monkeypatch.setattr("zbudfs.estimate.processes._GRACE_SECONDS", 0.1)
    maps = b"10000000-10001000 rw-p 00000000 00:00 0 \n"
    for pid in (76, 77, 78, 79):
        made_up(tmp_path, pid, maps, {0x10000: OWN}, 4096)
    (tmp_path / "77/maps").unlink()
    os.mkfifo(tmp_path / "77/maps")
    proc = Proc(str(tmp_path), 4096, look_limit_seconds=0.3)
    sample = sample_of(76, 77, 78, 79, strict=False, proc=proc)
    assert sample.counts == {"processes": 1, "stuck": 1, "not_reached": 2}
    assert len(sample.pages) == 1


def test_errors_of_one_process(tmp_path: Path) -> None:
    """An unexpected error of one process is counted and ends nothing. For a named process it is reported."""
    made_up(tmp_path, 78, b"10000000-10001000 rw-p 00000000 00:00 0 \n", {0x10000: OWN}, 4096)
    (tmp_path / "77/maps").mkdir(parents=True)
    proc = Proc(str(tmp_path), 4096)
    assert sample_of(77, 78, strict=False, proc=proc).counts == {"failed": 1, "processes": 1}
    with pytest.raises(SampleError, match="the memory of process 77 cannot be read: Is a directory"):
        sample_of(77, 78, proc=proc)


def test_which_mappings_count(tmp_path: Path) -> None:
    """The private and writable mappings count, for any mapped file."""
    maps = b"""\
00400000-00401000 r-xp 00000000 08:01 1 /bin/a b
00601000-00603000 rw-p 00001000 08:01 1 /bin/a b
01000000-01021000 rw-p 00000000 00:00 0 [heap]
7000000000-7000001000 rw-s 00000000 00:01 9 /dev/shm/x
7000002000-7000003000 ---p 00000000 00:00 0
7000004000-7000009000 rw-p 00000000 00:00 0
"""
    numbers = {0x400, *range(0x601, 0x603), *range(0x1000, 0x1021), 0x7000000, 0x7000002, *range(0x7000004, 0x7000009)}
    made_up(tmp_path, 77, maps, dict.fromkeys(numbers, OWN), 4096)
    looked = look(Proc(str(tmp_path), 4096), 77, Frames(), time.monotonic() + LIMIT_SECONDS)
    assert list(zip(looked.starts, looked.lengths, strict=True)) == [(0x601, 2), (0x1000, 0x21), (0x7000004, 5)]
