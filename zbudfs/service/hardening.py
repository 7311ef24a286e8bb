# SPDX-License-Identifier: MIT
"""The protections that keep a daemon that serves swap from waiting for itself.

Under global memory pressure the daemon may start reclaim by the first access to any page, or by any allocation that the
kernel makes for it. Reclaim swaps out, and swapping out waits for the daemon. One such wait hangs the machine. Each step
here prevents one cause. A run without one of the steps may survive by chance.

    before_threads()        the whole process: IO flusher, OOM score, malloc, scheduling, sizes of stacks.
                            Before any thread exists: threads inherit these when they start, not later.
    ... everything is allocated, threads are started, each code path runs once ...
    lock_memory()           no collector, every page present, every page locked, future pages too.

Python's objects come from malloc too, and its heap is reserved and locked here: that is the shim's part (fuse/shim.c).

No step is fatal. A system may refuse any of them (containers do). Each step returns a refusal as one plain sentence, for the
log and for `status`: what was refused, what that means, and the remedy. A step that succeeds returns nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Final

from zbudfs.core.maps import Mapping, parse_maps
from zbudfs.store.files import read_bytes, read_text, write_text

PROCESS_NAME: Final = "zbudfs"
"""The name of the process in ps and in the kernel's log; 15 bytes at most."""

THREAD_STACK_BYTES: Final = 64 << 10
"""Stack of every thread that starts later, in bytes; all of it is locked, and so would be the default of 8 MiB a thread.

Measured: the threads of 250 daemons used 16 KiB at most (Rss of their stacks in smaps, without the lock). The daemons had
encrypted, written and read blocks, on faulty disks too. With Python 3.12 a thread that logs an error with its traceback uses
28 KiB. Some machines, such as arm64, have a larger minimum of 128 KiB.
"""

MAIN_STACK_BYTES: Final = 256 << 10
"""Stack of the main thread when memory is locked, in bytes. It runs the event loop. Measured: the imports, which go deepest,
use 132 KiB."""

TOP_PAD_BYTES: Final = 128 << 10
"""Bytes that malloc takes beyond its need each time the heap must still grow: fewer, larger steps."""

PRIORITY: Final = 1
"""Real-time priority, the lowest: above every ordinary program, and below all other real-time programs."""

RUN_IN_PART: Final = ("libcrypto.", "_rust.abi3.")
"""Libraries of which little ever runs: 5 and 11 MiB, with all of OpenSSL in them. The parts that `store/cipher.py` has used
once are present and locked; of the rest only writable pages are."""

NEVER_RUN: Final = ("libssl", "_ssl.", "_hashlib.", "unicodedata.", "liblzma", "_lzma.", "libbz2", "_bz2.")
"""Libraries that trio and the standard library load and the daemon never calls: 6 MiB that need not be in RAM."""

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_THP_DISABLE: Final = 41
_PR_SET_IO_FLUSHER: Final = 57

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_MAX: Final = -4
_M_ARENA_MAX: Final = -8

_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4

_MADV_DONTNEED: Final = 4
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23

_PAGE_BYTES: Final = resource.getpagesize()
_ABSENT: Final = 0b000
_OF_FILE: Final = 0b101
"""The upper bits of a page's entry in pagemap: present, swapped, of a file."""
_OOM_KNOB: Final = "proc/self/oom_score_adj"
_OOM_NEVER: Final = -1000


def before_threads(heap_bytes: int) -> list[str]:
    """Prepare the process. Call this once, early, while it has one thread. Return the refusals.

    `heap_bytes` is the most that all requests in work may need at one time beyond the frames. malloc's heap grows by that
    much once and never shrinks again.
    """
    steps = (
        _set_name(),
        _set_undumpable(),
        _disable_huge_pages(),
        set_io_flusher(),
        protect_from_oom_killer(),
        pin_heap(heap_bytes),
        schedule_realtime(),
    )
    threading.stack_size(max(THREAD_STACK_BYTES, os.sysconf("SC_THREAD_STACK_MIN")))
    return [refusal for refusal in steps if refusal]


def before_exec() -> None:
    """Prepare a process that will execute the daemon: the settings that exec keeps. `before_threads` reports refusals."""
    set_io_flusher()
    schedule_realtime()


def lock_memory(skip: Iterable[tuple[int, int]] = ()) -> list[str]:
    """Make every page of the process present and locked, and stop the cyclic collector. Return the refusals.

    Call this once, when everything is allocated and all threads run. `skip` has (address, length in bytes) of ranges that
    other code populates, step by step. They are locked as their pages appear, but not populated here. Shared mappings are
    left to their owner too, except the text and data of programs and libraries.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    refusals = [_grow_main_stack(MAIN_STACK_BYTES), _populate(tuple(skip)), lock_all()]
    return [refusal for refusal in refusals if refusal]


def drop_unused_code() -> None:
    """Take the libraries that run in part, or never, out of this process, but for pages of its own.

    To load them has touched more pages than their use will. The caller then uses once what is needed. A process that is forked
    has none of these pages anyway.
    """
    madvise = _libc().madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with contextlib.suppress(OSError):
        for mapping in _own_mappings():
            name = mapping.name.rpartition("/")[2]
            if any(part in name for part in RUN_IN_PART + NEVER_RUN) and _is_unchanged(mapping):
                madvise(mapping.start, mapping.end - mapping.start, _MADV_DONTNEED)


def _is_unchanged(mapping: Mapping) -> bool:
    """Return whether all present pages of a mapping are those of its file. The linker has changed some. OSError."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(
            pagemap.fileno(), (mapping.end - mapping.start) // _PAGE_BYTES * 8, mapping.start // _PAGE_BYTES * 8
        )
    return all(entry >> 61 in (_ABSENT, _OF_FILE) for entry in memoryview(entries).cast("Q"))


# ---- the whole process -------------------------------------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int | ctypes.Array[ctypes.c_char]) -> int:
    """Call prctl(2); return 0 or the errno."""
    argument = ctypes.c_ulong(value) if isinstance(value, int) else value
    zero = ctypes.c_ulong(0)
    return 0 if _libc().prctl(option, argument, zero, zero, zero) == 0 else ctypes.get_errno()


def _set_name() -> str | None:
    code = _prctl(_PR_SET_NAME, ctypes.create_string_buffer(PROCESS_NAME.encode()))
    return (
        f"the process could not be named {PROCESS_NAME} ({os.strerror(code)}): its name in ps and in logs is wrong"
        if code
        else None
    )


def _set_undumpable() -> str | None:
    """Forbid core dumps, and ptrace by the same user: the process has memory of other programs."""
    code = _prctl(_PR_SET_DUMPABLE, 0)
    return (
        f"core dumps could not be turned off ({os.strerror(code)}): a crash may write memory of other programs to disk;"
        " set the core limit to 0 (ulimit -c 0)"
        if code
        else None
    )


def _disable_huge_pages() -> str | None:
    """Turn huge pages off: a huge page in the heap would lock 2 MiB for a few kilobytes."""
    code = _prctl(_PR_SET_THP_DISABLE, 1)
    return (
        f"huge pages could not be turned off ({os.strerror(code)}): the daemon may lock more RAM; write never to"
        " /sys/kernel/mm/transparent_hugepage/enabled"
        if code
        else None
    )


def set_io_flusher() -> str | None:
    """Make reclaim that the daemon's own allocations start do no I/O (Linux 5.6)."""
    code = _prctl(_PR_SET_IO_FLUSHER, 1)
    if not code:
        return None
    cause, remedy = {
        errno.EPERM: ("it needs CAP_SYS_RESOURCE, which this process lacks", "start zbudfs with that capability"),
        errno.EINVAL: ("the kernel does not support it", "use Linux 5.6 or later"),
    }.get(code, (os.strerror(code), "see the kernel's log"))
    return (
        f"IO flusher mode was refused ({cause}): when all memory is short the daemon may have to wait for the swap that it"
        f" serves, and the machine may hang; {remedy}"
    )


def protect_from_oom_killer(root: str = "/") -> str | None:
    """Set the lowest OOM score that the system allows. `root` holds `proc/`."""
    try:
        high = int(read_text(_OOM_KNOB, root))
        if _write_oom_score(_OOM_NEVER, root):
            return None
        # The process lacks CAP_SYS_RESOURCE: find the lowest permitted value. `low` is refused, `high` is in force.
        low = _OOM_NEVER
        while high - low > 1:
            middle = (low + high) // 2
            if _write_oom_score(middle, root):
                high = middle
            else:
                low = middle
    except (OSError, ValueError) as error:
        return f"the daemon's OOM score could not be set ({error}): the kernel may kill the daemon, and swap with it"
    return (
        f"the OOM score could not be set to {_OOM_NEVER}, only to {high} (it needs CAP_SYS_RESOURCE): when memory runs"
        " out the kernel may kill the daemon, and swap with it; start zbudfs with that capability, or set"
        f" OOMScoreAdjust={_OOM_NEVER} in its service"
    )


def _write_oom_score(score: int, root: str) -> bool:
    try:
        write_text(_OOM_KNOB, str(score), root)
    except PermissionError:
        return False
    return True


def pin_heap(heap_bytes: int) -> str | None:
    """Make malloc use one heap that never shrinks, and grow that heap by `heap_bytes` now."""
    libc = _libc()
    try:
        mallopt, malloc, free = libc.mallopt, libc.malloc, libc.free
    except AttributeError:
        mallopt = None
    if mallopt is None:
        return (
            "malloc cannot be pinned (this C library has no mallopt): the daemon may have to ask for memory when there"
            " is none, and the machine may hang; use a system with the GNU C library"
        )
    malloc.restype = ctypes.c_void_p
    malloc.argtypes = [ctypes.c_size_t]
    free.argtypes = [ctypes.c_void_p]
    # -1 becomes the largest size_t: malloc never gives the top of the heap back.
    wanted = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 0))
    refused = [option for option, value in wanted if mallopt(option, value) != 1]
    block = malloc(heap_bytes)
    free(block)
    mallopt(_M_TOP_PAD, TOP_PAD_BYTES)  # not before: it would be added to the reserve
    if block is None:
        return (
            f"{heap_bytes} bytes of heap could not be reserved: the daemon may have to ask for memory when there is none; free"
            " memory, and mount again"
        )
    if refused:
        return (
            f"malloc refused options {refused}: the daemon may have to ask for memory when there is none; use a system with the"
            " GNU C library"
        )
    return None


def schedule_realtime() -> str | None:
    """Become real-time, so that the daemon runs beside a storm and may use the kernel's reserve of free pages.

    SCHED_RESET_ON_FORK is not set. It would give every later thread ordinary scheduling (a thread is a fork to the
    kernel), and the threads that write back must run. The daemon starts no programs that could inherit the priority. The
    policy is round robin, so that no thread of the daemon delays the others.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    except OSError as error:
        cause = "it needs CAP_SYS_NICE, or the cgroup has no real-time budget" if error.errno == errno.EPERM else ""
        return (
            f"real-time scheduling was refused ({cause or error.strerror}): under heavy load the daemon may starve"
            " behind the programs that wait for it, and writeback may hang when all memory is short; start zbudfs with"
            " that capability, outside of limited cgroups"
        )
    return None


# ---- locking -----------------------------------------------------------------------------------------------------


def ranges_to_fill(mappings: Iterable[Mapping], skip: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, for writing?) of the ranges that must be present in memory, in the order of `mappings`.

    Private memory that may be written is made present for writing: a copy-on-write page that is only present must still be
    copied later. Memory that may only be read (text and constants of libraries) is made present for reading. Left out are
    pages without access, the kernel's own ([vvar], [vsyscall]), shared memory, devices, and `skip`.
    """
    for mapping in mappings:
        readable, writable, private = mapping.access[0] == "r", mapping.access[1] == "w", mapping.access[3] == "p"
        special = mapping.name.startswith(("[v", "[uprobes", "/dev/")) or any(
            part in mapping.name.rpartition("/")[2] for part in NEVER_RUN
        )
        if not writable and any(part in mapping.name for part in RUN_IN_PART):
            continue
        if readable and private and not special:
            for start, end in _without(mapping.start, mapping.end, skip):
                yield start, end, writable


def _without(start: int, end: int, skip: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int]]:
    """Yield the parts of [start, end) that no range (address, length) of `skip` touches."""
    for address, length in sorted(skip):
        if length > 0 and address < end and address + length > start:
            if start < address:
                yield start, address
            start = min(address + length, end)
    if start < end:
        yield start, end


def _whole_pages(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return `ranges`, each (address, length in bytes), extended to whole pages."""
    whole = []
    for address, length in ranges:
        start = address // _PAGE_BYTES * _PAGE_BYTES
        whole.append((start, -(-(address + length - start) // _PAGE_BYTES) * _PAGE_BYTES if length > 0 else 0))
    return tuple(whole)


def _populate(skip: Iterable[tuple[int, int]]) -> str | None:
    """Make the ranges of `ranges_to_fill` in this process present. Return a refusal."""
    libc = _libc()
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    failed_bytes = 0
    reason = 0
    for start, end, writing in ranges_to_fill(_own_mappings(), _whole_pages(skip)):
        advice = _MADV_POPULATE_WRITE if writing else _MADV_POPULATE_READ
        if libc.madvise(start, end - start, advice) == 0:
            continue
        # Linux before 5.14 lacks this advice. mlock(2) makes pages present too, but needs the right to lock.
        if ctypes.get_errno() == errno.EINVAL and libc.mlock(start, end - start) == 0:
            continue
        reason = ctypes.get_errno()
        failed_bytes += end - start
    if failed_bytes:
        return (
            f"{failed_bytes} bytes of the daemon's memory could not be populated in advance ({os.strerror(reason)}):"
            " it may have to wait for memory later; free memory, and mount again"
        )
    return None


def _grow_main_stack(wanted_bytes: int) -> str | None:
    """Use `wanted_bytes` of the main thread's stack once, so that its pages exist when memory is locked.

    The kernel extends that stack as it is used. A Python function that calls itself through C takes some of it at every
    level; a plain recursion in Python takes none. Other threads have their whole stack from the start.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    callback_type = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def descend(levels: int) -> None:
        if levels > 0:
            callback(levels - 1)

    callback = callback_type(descend)
    # A third of the interpreter's limit, which counts each of these levels twice.
    most = sys.getrecursionlimit() // 3
    for levels in range(most // 8, most, most // 8):
        if _main_stack_bytes() >= wanted_bytes:
            return None
        callback(levels)
    return None


def _main_stack_bytes() -> int:
    """Return the size of the main thread's stack, in bytes."""
    return sum(mapping.end - mapping.start for mapping in _own_mappings() if mapping.name == "[stack]")


def _own_mappings() -> list[Mapping]:
    """Return the mappings of this process."""
    return list(parse_maps(read_bytes("/proc/self/maps").split(b"\n")))


def lock_all() -> str | None:
    """Lock all present memory, and all memory that becomes present later. Return a refusal."""
    # With CAP_IPC_LOCK the limit does not count; without it mlockall() reports whether the limit was enough.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if _libc().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0:
        return None
    code = ctypes.get_errno()
    cause = {
        errno.EPERM: "it needs CAP_IPC_LOCK",
        errno.ENOMEM: "the limit on locked memory is too low (ulimit -l), and it lacks CAP_IPC_LOCK",
    }.get(code, os.strerror(code))
    return (
        f"the daemon's memory could not be locked ({cause}): its own pages may be swapped out to itself, and the"
        " machine may hang; start zbudfs with that capability, or with LimitMEMLOCK=infinity in its service"
    )
