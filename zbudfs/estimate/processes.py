# SPDX-License-Identifier: MIT
"""Samples of what processes keep in memory and the kernel would swap out: their private writable pages.

    /proc/PID/maps       where writable private mappings are
    /proc/PID/pagemap    8 bytes a page: which pages are in RAM, anonymous, and whose
    /proc/PID/mem        what is in them

Only what is in RAM is read, and whether it still is so is asked again just before: reading must not bring back what was
swapped out, nor make pages that were never touched. Pages of files (a program's data as long as nothing has been written
to it) are dropped by the kernel and not swapped, so they do not count.

A page that several processes share after a fork counts once where the kernel says which page it is (to root). Elsewhere
what is not a process's alone is left out; most of it is the kernel's one page of zeros.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.estimate.sample import Progress, Sample, SampleError, draw

_PRESENT: Final = 1 << 63
_SWAPPED: Final = 1 << 62
_OF_A_FILE: Final = 1 << 61
"""A page of a file, or of memory shared on purpose."""
_EXCLUSIVE: Final = 1 << 56
_FRAME_MASK: Final = (1 << 55) - 1
"""The number of the page in RAM; 0 for those who are not root."""

_READ_ENTRIES: Final = 1 << 16
"""Entries of pagemap read at once: 512 KiB."""
_NOTHING: Final = bytes(4096)
"""What 2 MiB of addresses without pages look like in a pagemap."""


def writable_private(maps: str) -> list[tuple[int, int]]:
    """Return (first page, pages) of each writable private mapping in the text of /proc/PID/maps."""
    found = []
    for line in maps.splitlines():
        # address perms offset dev inode path
        words = line.split(None, 2)
        if len(words) == 3 and words[1][1] == "w" and words[1][3] == "p":
            start, end = (int(word, 16) >> PAGE_SHIFT for word in words[0].split("-"))
            found.append((start, end - start))
    return found


def all_pids() -> list[int]:
    """Return the processes there are, without this one."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid())  # noqa: PTH208


def sample_processes(
    pids: Sequence[int], wanted: int, seed: int, progress: Progress, *, strict: bool, source: str
) -> Sample:
    """Return up to `wanted` pages of these processes.

    Counted by cause: "processes" that were looked at, "denied" (permission), "ended" meanwhile, "without_memory" (the
    kernel's own threads), "swapped_pages" and "shared_pages" that were left out, and of the pages drawn those that were
    "gone_pages" or "unreadable_pages" when their turn came. With `strict` SampleError names a process that is not there or
    may not be read.
    """
    sample = Sample(source)
    seen = bytearray()
    drawn_from: list[tuple[int, array[int]]] = []
    for number, pid in enumerate(pids):
        progress(number, len(pids))
        try:
            pages = _present_pages(pid, seen, sample)
        except OSError as error:
            _count_failure(sample, pid, error, strict=strict)
            continue
        if pages is None:
            if strict:
                raise SampleError(f"process {pid} has no memory of its own: it is a thread of the kernel, or has ended")
            sample.count("without_memory")
            continue
        sample.count("processes")
        if pages:
            drawn_from.append((pid, pages))
            sample.population_pages += len(pages)
    if not sample.population_pages:
        raise SampleError(_nothing_found(sample))
    numbers = draw(sample.population_pages, wanted, seed)
    start = at = 0
    for pid, pages in drawn_from:
        end = start + len(pages)
        mine = at
        while at < len(numbers) and numbers[at] < end:
            at += 1
        try:
            _read_pages(pid, [pages[number - start] for number in numbers[mine:at]], sample)
        except OSError as error:
            sample.count("gone_pages", at - mine)
            _count_failure(sample, pid, error, strict=False)
        progress(at, len(numbers))
        start = end
    if not sample.pages:
        raise SampleError(f"none of the pages of {source} could be read: {_nothing_found(sample)}")
    return sample


def _count_failure(sample: Sample, pid: int, error: OSError, *, strict: bool) -> None:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        if strict:
            raise SampleError(f"there is no process {pid}")
        sample.count("ended")
    elif error.errno in (errno.EACCES, errno.EPERM):
        if strict:
            raise SampleError(f"the memory of process {pid} may not be read: run this as root, or as its user")
        sample.count("denied")
    else:
        raise error


def _nothing_found(sample: Sample) -> str:
    denied = sample.counts.get("denied", 0)
    if denied:
        return f"no memory may be read, {denied:,} processes are of other users: run this as root"
    return "no private writable memory is in RAM"


def _present_pages(pid: int, seen: bytearray, sample: Sample) -> array[int] | None:
    """Return the pages of a process that are in RAM and would be swapped out; None if it has no memory at all.

    `seen` has a byte for each page of RAM that is counted already.
    """
    text = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    if not text:
        return None
    found = array("Q")
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, count in writable_private(text):
            for start in range(first, first + count, _READ_ENTRIES):
                data = os.pread(fd, 8 * min(_READ_ENTRIES, first + count - start), 8 * start)
                for page, entry in _entries(data, start):
                    if not entry & _PRESENT:
                        if entry & _SWAPPED:
                            sample.count("swapped_pages")
                    elif not entry & _OF_A_FILE:
                        if _is_new(entry, seen):
                            found.append(page)
                        else:
                            sample.count("shared_pages")
    finally:
        os.close(fd)
    return found


def _entries(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield (page, entry) of each entry of a piece of a pagemap, which begins with page `start`, that is not 0.

    Programs reserve gigabytes that they never touch: stretches of nothing are skipped without a look at each.
    """
    for at in range(0, len(data) & ~7, len(_NOTHING)):
        stretch = data[at : min(at + len(_NOTHING), len(data) & ~7)]
        if stretch != _NOTHING[: len(stretch)]:
            for number, entry in enumerate(array("Q", stretch), start + at // 8):
                if entry:
                    yield number, entry


def _is_new(entry: int, seen: bytearray) -> bool:
    """Whether the page in RAM has not been counted yet."""
    if entry & _EXCLUSIVE:
        return True
    frame = entry & _FRAME_MASK
    if not frame:
        return False
    if frame >= len(seen):
        seen.extend(bytes(frame + (1 << 20) - len(seen)))
    if seen[frame]:
        return False
    seen[frame] = 1
    return True


def _read_pages(pid: int, pages: Sequence[int], sample: Sample) -> None:
    """Add the contents of these pages to the sample, those that are still in RAM."""
    if not pages:
        return
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for page in pages:
                entry = int.from_bytes(os.pread(pagemap, 8, 8 * page), "little")
                if not entry & _PRESENT:
                    sample.count("gone_pages")
                    continue
                try:
                    content = os.pread(memory, PAGE_SIZE, page << PAGE_SHIFT)
                except OSError:  # a device's memory, or the mapping has gone
                    sample.count("unreadable_pages")
                    continue
                if len(content) == PAGE_SIZE:
                    sample.pages.append(content)
                else:
                    sample.count("gone_pages")
        finally:
            os.close(memory)
    finally:
        os.close(pagemap)
