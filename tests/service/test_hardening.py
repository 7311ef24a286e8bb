# SPDX-License-Identifier: MIT
"""Hardening: the choice of memory to make present, and the real thing in its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbudfs.core.maps import Mapping, parse_maps
from zbudfs.service.hardening import MAIN_STACK_BYTES, THREAD_STACK_BYTES, protect_from_oom_killer, ranges_to_fill

MAPS = b"""\
00400000-00401000 r-xp 00001000 fd:00 100   /usr/bin/python3.11
00601000-00603000 rw-p 00000000 fd:00 100   /usr/bin/python3.11
01000000-01100000 rw-p 00000000 00:00 0     [heap]
7f0000000000-7f0000100000 rw-s 00000000 00:01 55 /memfd:zbudfs-frames (deleted)
7f0000200000-7f0000300000 rw-p 00000000 00:00 0
7f0000300000-7f0000301000 ---p 00000000 00:00 0
7f0000400000-7f0000401000 rw-p 00000000 00:05 7  /dev/zero
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0     [stack]
7ffc00100000-7ffc00104000 r--p 00000000 00:00 0     [vvar]
7ffc00104000-7ffc00106000 r-xp 00000000 00:00 0     [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0     [vsyscall]
"""


def test_the_right_mappings_are_made_present() -> None:
    """Private memory is made present for writing, and text for reading. Shared, forbidden and special memory is left out."""
    ranges = list(ranges_to_fill(parse_maps(MAPS.split(b"\n")), ()))
    assert ranges == [
        (0x400000, 0x401000, False),
        (0x601000, 0x603000, True),
        (0x1000000, 0x1100000, True),
        (0x7F0000200000, 0x7F0000300000, True),
        (0x7FFC00000000, 0x7FFC00021000, True),
    ]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=5))
def test_skipped_ranges_are_left_out(skip: list[tuple[int, int]]) -> None:
    """The result is the mapping without the skipped ranges, in order and without overlap."""
    mapping = Mapping(10, 50, "rw-p", "")
    ranges = list(ranges_to_fill([mapping], tuple(skip)))
    left = [address for start, end, _ in ranges for address in range(start, end)]
    skipped = {address for start, length in skip for address in range(start, start + length)}
    assert left == [address for address in range(10, 50) if address not in skipped]


def test_the_lowest_oom_score_that_is_allowed(tmp_path: Path) -> None:
    """If each value may be written, -1000 is written and there is no message."""
    (tmp_path / "proc/self").mkdir(parents=True)
    knob = tmp_path / "proc/self/oom_score_adj"
    knob.write_text("0")
    assert protect_from_oom_killer(str(tmp_path)) is None
    assert knob.read_text() == "-1000"
    knob.unlink()
    assert "OOM score could not be set" in str(protect_from_oom_killer(str(tmp_path)))


HARDENED = """
import ctypes, json, mmap, os, sys, threading
from zbudfs.service import hardening

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Vm")}

def smaps_missing(skip):
    # bytes of private memory for writing that are not present
    missing, name, private = 0, "", False
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start = int(words[0].split("-")[0], 16)
            private = words[1].startswith("rw") and words[1][3] == "p" and start != skip
            size = 0
        elif words[0] == "Size:":
            size = int(words[1])
        elif words[0] == "Rss:" and private:
            missing += size - int(words[1])
    return missing

out = {"refused": hardening.before_threads(4 << 20)}
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
pool = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pool.madvise(mmap.MADV_NOHUGEPAGE)
address = ctypes.addressof(ctypes.c_char.from_buffer(pool))
out["refused"] += hardening.lock_memory([(address, len(pool))])
out["memory"] = memory()
out["missing_kib"] = smaps_missing(0)
out["comm"] = open("/proc/self/comm").read().strip()
out["scheduler"] = [os.sched_getscheduler(0), os.sched_getscheduler(thread.native_id)]
out["stack_kib"] = hardening._main_stack_bytes() // 1024
before = memory()["VmData"]
big = bytearray(3 << 20)
out["grown_kib"] = memory()["VmData"] - before
stop.set()
thread.join()
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def hardened() -> dict[str, Any]:
    """Return the output of a process that went through all steps."""
    run = subprocess.run([sys.executable, "-c", HARDENED], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.needs("root")
def test_a_process_goes_through_all_of_it(hardened: dict[str, Any]) -> None:
    """The process has its name and a stack, and each refusal is one sentence with a reason."""
    assert hardened["comm"] == "zbudfs"
    assert hardened["stack_kib"] >= MAIN_STACK_BYTES >> 10
    for refusal in hardened["refused"]:
        assert refusal[0].islower() or refusal.startswith("IO")
        assert "\n" not in refusal


@pytest.mark.needs("root")
def test_all_memory_is_present_but_the_pool(hardened: dict[str, Any]) -> None:
    """Only the skipped range may still fault after locking. It is locked as it becomes present."""
    if any("locked" in refusal for refusal in hardened["refused"]):
        pytest.skip("this machine does not allow locking")
    assert hardened["missing_kib"] <= 32 << 10
    assert hardened["memory"]["VmLck"] >= hardened["memory"]["VmRSS"] // 2


@pytest.mark.needs("root")
def test_malloc_takes_from_the_heap_that_was_set_aside(hardened: dict[str, Any]) -> None:
    """A large block comes from the heap, so the process does not grow."""
    assert hardened["grown_kib"] == 0


@pytest.mark.needs("root")
def test_threads_inherit_the_scheduling(hardened: dict[str, Any]) -> None:
    """The main thread and later threads have the same scheduling."""
    first, later = hardened["scheduler"]
    assert first == later


STACK: Final = """
import json, logging, re, threading, traceback
from zbudfs.core.maps import parse_maps
from zbudfs.service import hardening

def fail(depth):
    try:
        if depth:
            fail(depth - 1)
        raise OSError(5, "made up")
    except OSError as error:
        raise ValueError("made up") from error

def work():
    try:
        fail(20)
    except ValueError:
        logging.exception("an error with %d causes", 20)
    re.compile(r"(?P<a>(a|b(c|(d|e(f|g)))))+[^x]*(?:x{1,3}|y?)$").match("abcdefg" * 100)
    list(parse_maps(open("/proc/self/maps", "rb")))
    json.loads(json.dumps([[[[{"a": {"b": [1, 2, {"c": []}]}}]]]]))
    # The identity of a thread is an address at the top of its stack.
    address = threading.get_ident()
    with open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            if any(each.start <= address < each.end for each in parse_maps([line])):
                print(json.dumps([int(next(lines).split()[1]) for _ in range(4)]))

hardening.before_threads(0)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.needs("root")
def test_the_stack_of_a_thread_is_large_enough() -> None:
    """A thread that does more than those of the daemon uses half of its stack at most."""
    run = subprocess.run([sys.executable, "-c", STACK], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    size, page, _, used = json.loads(run.stdout)
    assert size == max(THREAD_STACK_BYTES, os.sysconf("SC_THREAD_STACK_MIN")) >> 10
    assert page <= used <= size // 2


PARTS: Final = """
import json
from zbudfs.core.maps import parse_maps
from zbudfs.service import hardening
from zbudfs.store.cipher import KEY_BYTES, BlockCipher

def present():
    # KiB of the libraries that run in part: pages of files, and pages that this process has changed
    found = {"Rss": 0, "Anonymous": 0}
    ours = False
    for line in open("/proc/self/smaps", "rb"):
        for mapping in parse_maps([line]):
            ours = any(part in mapping.name for part in hardening.RUN_IN_PART)
        name = line.split(b":")[0].decode()
        if ours and name in found:
            found[name] += int(line.split()[1])
    return [found["Rss"] - found["Anonymous"], found["Anonymous"]]

cipher = BlockCipher(bytes(range(KEY_BYTES)))
out = [present()]
hardening.drop_unused_code()
out.append(present())
cipher.warm_up()
out.append(present())
print(json.dumps(out))
"""


def test_libraries_are_left_but_for_the_parts_in_use() -> None:
    """Unchanged pages go, and come back as they are used. Pages that the linker has changed stay."""
    run = subprocess.run([sys.executable, "-c", PARTS], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    loaded, dropped, used = json.loads(run.stdout)
    assert dropped[0] < used[0] < loaded[0]
    assert 0 < loaded[1] == dropped[1] == used[1]
