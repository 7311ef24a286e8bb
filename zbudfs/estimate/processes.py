# SPDX-License-Identifier: MIT
"""Samples of what processes keep in memory and the kernel would swap out: their private writable pages.

    /proc/PID/maps       where writable private mappings are
    /proc/PID/pagemap    8 bytes for each page of the kernel: which pages are in RAM, anonymous, and whose
    /proc/PID/mem        what is in them

Only pages in RAM are read. A second look at pagemap, just before the read, makes sure of it. A read must neither
bring back a page that was swapped out nor make one that was never touched. Pages of files (a program's data until the program
writes to it) do not count: the kernel drops them and does not swap them out.

A page that several processes share after a fork counts once, where the kernel shows the number of the page (to root).
Elsewhere a page that is not a process's alone is left out. Most of those are the kernel's one page of zeros.

The processes are not trusted. A process may map terabytes, give its files odd names, end at any time, or keep the kernel
waiting (for a FUSE file system of its own, for example). So a thread looks at each process, with a limit of time, and
nothing that a process does ends the command.

The kernel's page may be larger than the 4096 bytes of a page here: it is that many samples then.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.estimate.pagemap import ENTRY_BYTES, PRESENT, Frames, Looked, Proc, look
from zbudfs.estimate.sample import Progress, Sample, SampleError, draw

T = TypeVar("T")

_GRACE_SECONDS: Final = 1.0
"""Time for the thread to see that its limit is over; one that needs longer waits in the kernel."""


class _Stuck(Exception):
    """The thread that looks at a process waits in the kernel."""


def sample_processes(
    pids: Sequence[int],
    wanted: int,
    seed: int,
    progress: Progress,
    *,
    strict: bool,
    source: str,
    proc: Proc | None = None,
) -> Sample:
    """Return up to `wanted` pages of these processes.

    The counts by cause are:

    - "processes" that were looked at, "denied" (permission), "ended" meanwhile, "failed" (other errors)
    - "stuck" (the kernel did not answer), "cut_off" (more memory than the limit of time allows)
    - "not_reached" (the time for all of them was over), "without_memory" (the kernel's own threads)
    - "swapped_pages" and "shared_pages", which are left out
    - "gone_pages" and "unreadable_pages": pages of the sample that could not be read when their turn came

    With `strict`, SampleError names a process that does not exist or may not be read.
    """
    proc = Proc() if proc is None else proc
    sample = Sample(source)
    drawn_from = _look_at_all(proc, pids, sample, progress, strict=strict)
    sample.population_pages = sum(looked.pages for _, looked in drawn_from) * proc.parts
    if not sample.population_pages:
        raise SampleError(_nothing_found(sample))
    numbers = draw(sample.population_pages, wanted, seed)
    limit = time.monotonic() + proc.look_limit_seconds
    start = at = 0
    for pid, looked in drawn_from:
        end = start + looked.pages * proc.parts
        mine = at
        while at < len(numbers) and numbers[at] < end:
            at += 1
        chosen = list(looked.pick([number - start for number in numbers[mine:at]], proc.parts))
        start = end
        progress(at, len(numbers))
        if not chosen:
            continue
        seconds = min(proc.process_limit_seconds, limit - time.monotonic())
        try:
            pages, counts = _within(seconds, partial(_read_pages, proc, pid, chosen))
        except (OSError, _Stuck) as error:
            sample.count("gone_pages", len(chosen))
            _count_failure(sample, pid, error, strict=False)
            continue
        sample.pages += pages
        for cause, number in counts.items():
            sample.count(cause, number)
    if not sample.pages:
        raise SampleError(f"none of the pages of {source} could be read: {_nothing_found(sample)}")
    return sample


def _look_at_all(
    proc: Proc, pids: Sequence[int], sample: Sample, progress: Progress, *, strict: bool
) -> list[tuple[int, Looked]]:
    """Look at each process within the limits, count what was left out, and return those with pages."""
    frames = Frames()
    found = []
    limit = time.monotonic() + proc.look_limit_seconds
    for number, pid in enumerate(pids):
        progress(number, len(pids))
        seconds = min(proc.process_limit_seconds, limit - time.monotonic())
        if seconds <= 0:
            sample.count("not_reached", len(pids) - number)
            break
        try:
            looked = _within(seconds, partial(look, proc, pid, frames))
        except (OSError, _Stuck) as error:
            _count_failure(sample, pid, error, strict=strict)
            continue
        if not looked.has_memory:
            if strict:
                raise SampleError(f"process {pid} has no memory of its own: it is a thread of the kernel, or has ended")
            sample.count("without_memory")
            continue
        sample.count("processes")
        for cause, count in (
            ("swapped_pages", looked.swapped * proc.parts),
            ("shared_pages", looked.shared * proc.parts),
            ("cut_off", int(looked.cut_off)),
        ):
            if count:
                sample.count(cause, count)
        if looked.pages:
            found.append((pid, looked))
    return found


def _within(seconds: float, function: Callable[[float], T]) -> T:
    """Return what `function(deadline)` returns or raise what it raises; _Stuck if the kernel keeps it waiting.

    A thread calls the function. One that waits in the kernel is left behind, and ends with this process.
    """
    answers: list[T] = []
    errors: list[Exception] = []
    deadline = time.monotonic() + seconds

    def call() -> None:
        try:
            answers.append(function(deadline))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(max(seconds, 0.0) + _GRACE_SECONDS)
    if errors:
        raise errors[0]
    if not answers:
        raise _Stuck
    return answers[0]


def _count_failure(sample: Sample, pid: int, error: OSError | _Stuck, *, strict: bool) -> None:
    """Count why a process could not be looked at; with `strict` raise SampleError."""
    if isinstance(error, _Stuck):
        cause, sentence = "stuck", f"the kernel does not let the memory of process {pid} be read in time: try it again"
    elif error.errno in (errno.ENOENT, errno.ESRCH):
        cause, sentence = "ended", f"there is no process {pid}"
    elif error.errno in (errno.EACCES, errno.EPERM):
        cause, sentence = "denied", f"the memory of process {pid} may not be read: run this as root, or as its user"
    else:
        cause, sentence = "failed", f"the memory of process {pid} cannot be read: {error.strerror}"
    if strict:
        raise SampleError(sentence)
    sample.count(cause)


def _nothing_found(sample: Sample) -> str:
    denied = sample.counts.get("denied", 0)
    if denied:
        return f"no memory may be read, {denied:,} processes are of other users: run this as root"
    return "no private writable memory is in RAM"


def _read_pages(proc: Proc, pid: int, pages: Sequence[int], deadline: float) -> tuple[list[bytes], dict[str, int]]:
    """Return the contents of these pages of 4096 bytes, of those that are still in RAM, and what became of the others."""
    contents: list[bytes] = []
    unreadable = 0
    with (
        proc.path(pid, "pagemap").open("rb", buffering=0) as pagemap,
        proc.path(pid, "mem").open("rb", buffering=0) as memory,
    ):
        for page in pages:
            if time.monotonic() > deadline:
                break
            at = page << PAGE_SHIFT
            try:
                entry = os.pread(pagemap.fileno(), ENTRY_BYTES, at // proc.page_bytes * ENTRY_BYTES)
                if int.from_bytes(entry, sys.byteorder) & PRESENT:
                    content = os.pread(memory.fileno(), PAGE_SIZE, at)
                    if len(content) == PAGE_SIZE:
                        contents.append(content)
            except OSError:  # memory of a device, or the mapping has gone
                unreadable += 1
    counts = {"unreadable_pages": unreadable, "gone_pages": len(pages) - len(contents) - unreadable}
    return contents, {cause: number for cause, number in counts.items() if number}
