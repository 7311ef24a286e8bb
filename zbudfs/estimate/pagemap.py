# SPDX-License-Identifier: MIT
"""The pages of a process that the kernel could swap out: what /proc/PID/maps and /proc/PID/pagemap say.

pagemap has 8 bytes for each page of the kernel, which may be larger than the 4096 bytes of a page here. Page numbers in
this module are the kernel's: an address divided by `Proc.page_bytes`.

A process is not trusted: it may map terabytes and give its files any name. Holes are skipped where the kernel can find
them (PAGEMAP_SCAN), and every look has a limit of time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import struct
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final

from zbudfs.core.maps import Mapping, parse_maps
from zbudfs.core.units import PAGE_SHIFT

PROCESS_LIMIT_SECONDS: Final = 5.0
"""Longest look at one process. Chosen: at 10 ns an entry of pagemap it is enough for 2 TiB in RAM."""
LOOK_LIMIT_SECONDS: Final = 60.0
"""Longest look at all processes together. Chosen: 12 processes that use up their limit."""

PRESENT: Final = 1 << 63
_SWAPPED: Final = 1 << 62
_OF_A_FILE: Final = 1 << 61
"""A page of a file, or of memory shared on purpose."""
_EXCLUSIVE: Final = 1 << 56
_FRAME_MASK: Final = (1 << 55) - 1
"""The number of the page in RAM; 0 for those who are not root."""

ENTRY_BYTES: Final = 8
_READ_ENTRIES: Final = 1 << 16
"""Entries of pagemap read at once: 512 KiB."""
_NOTHING: Final = bytes(ENTRY_BYTES * _READ_ENTRIES)
_LARGE_BYTES: Final = 1 << 34
"""Mappings of this size are looked at after all others: what the limit of time cuts off is theirs."""
_JOIN_ENTRIES: Final = 512
"""Entries that are read although nothing is there, instead of one more system call."""

_TOP_BYTE: Final = slice(7, None, 8) if sys.byteorder == "little" else slice(0, None, 8)
"""The bytes of a piece of pagemap that hold all flags but the number of the page."""


def _kind(top: int) -> bytes:
    entry = top << 56
    if entry & PRESENT:
        if entry & _OF_A_FILE:
            return b"."
        return b"e" if entry & _EXCLUSIVE else b"s"
    return b"w" if entry & _SWAPPED else b"."


_KINDS: Final = b"".join(map(_kind, range(256)))
"""Kind of a page, by the top byte of its entry: e a process's own, s shared or unknown, w swapped out, "." not counted."""
_RUNS: Final = re.compile(rb"e+|s+|w+")

# ioctl(PAGEMAP_SCAN) of Linux 6.7: struct pm_scan_arg, struct page_region.
_SCAN: Final = 0xC0606610
_SCAN_FORM: Final = "=12Q"
_SCAN_REGIONS: Final = 512
_SCAN_FILE: Final = 1 << 2
_SCAN_PRESENT: Final = 1 << 3
_SCAN_SWAPPED: Final = 1 << 4
_SCAN_ZERO: Final = 1 << 5
_SCAN_STEP_BYTES: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Proc:
    """The place of the processes, and the limits of time for a look at them."""

    folder: str = "/proc"
    page_bytes: int = field(default_factory=resource.getpagesize)
    """The kernel's page: 4096, 16384 or 65536."""
    scan: bool = True
    """Whether to try PAGEMAP_SCAN, which skips what is not there."""
    process_limit_seconds: float = PROCESS_LIMIT_SECONDS
    look_limit_seconds: float = LOOK_LIMIT_SECONDS

    def pids(self) -> list[int]:
        """Return the processes there are, without this one."""
        names = os.listdir(self.folder)  # noqa: PTH208
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and int(name) != os.getpid())

    @property
    def parts(self) -> int:
        """Return how many pages of 4096 bytes a page of the kernel has."""
        return max(self.page_bytes >> PAGE_SHIFT, 1)

    def path(self, pid: int, name: str) -> Path:
        """Return the path of a file of a process."""
        return Path(self.folder, str(pid), name)


class Frames:
    """A set of pages in RAM by number: a bitmap in pieces, since RAM may lie at high addresses with holes between."""

    _PIECE_SHIFT: Final = 15

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}

    def add(self, frame: int) -> bool:
        """Add a number; return whether it is new."""
        key = frame >> self._PIECE_SHIFT
        piece = self._pieces.get(key)
        if piece is None:
            piece = self._pieces[key] = bytearray(1 << (self._PIECE_SHIFT - 3))
        at, bit = frame >> 3 & len(piece) - 1, 1 << (frame & 7)
        if piece[at] & bit:
            return False
        piece[at] |= bit
        return True

    @property
    def size_bytes(self) -> int:
        """Memory of the bitmap."""
        return sum(map(len, self._pieces.values()))


@dataclass(slots=True)
class Looked:
    """The result of a look at one process; all numbers are of the kernel's pages."""

    starts: array[int] = field(default_factory=lambda: array("Q"))
    """Runs of pages that count: the first page of each ..."""
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    """... and its number of pages."""
    pages: int = 0
    swapped: int = 0
    shared: int = 0
    has_memory: bool = False
    """The kernel's own threads, and processes that have ended, have no mapping at all."""
    cut_off: bool = False
    """The limit of time was over first."""

    def add(self, start: int, count: int) -> None:
        """Add pages that count."""
        if self.starts and self.starts[-1] + self.lengths[-1] == start:
            self.lengths[-1] += count
        else:
            self.starts.append(start)
            self.lengths.append(count)
        self.pages += count

    def pick(self, numbers: Sequence[int], parts: int) -> Iterator[int]:
        """Yield the page of 4096 bytes for each of the ascending numbers; a page of the kernel has `parts`."""
        at = first = 0
        for start, count in zip(self.starts, self.lengths, strict=True):
            behind = first + count * parts
            while at < len(numbers) and numbers[at] < behind:
                yield start * parts + numbers[at] - first
                at += 1
            first = behind


class _OverTime(Exception):
    """The limit of time for a process is over."""


def look(proc: Proc, pid: int, frames: Frames, deadline: float) -> Looked:
    """Return the pages of a process that are in RAM and would be swapped out. `frames` has what is counted already."""
    looked = Looked()
    with proc.path(pid, "maps").open("rb") as maps:
        mappings = parse_maps(maps)
        first = next(mappings, None)
        if first is None:  # a process without memory may have no pagemap either
            return looked
        looked.has_memory = True
        with proc.path(pid, "pagemap").open("rb", buffering=0) as pagemap:
            try:
                for mapping in _large_ones_last(chain((first,), mappings)):
                    for start, end in _populated(proc, pagemap.fileno(), mapping, deadline):
                        _take(proc, pagemap.fileno(), start, end, frames, looked, deadline)
            except _OverTime:
                looked.cut_off = True
    return looked


def _large_ones_last(mappings: Iterable[Mapping]) -> Iterator[Mapping]:
    """Yield the mappings that are private and writable."""
    large = []
    for mapping in mappings:
        if mapping.access[1] == "w" and mapping.access[3] == "p":
            if mapping.end - mapping.start < _LARGE_BYTES:
                yield mapping
            else:
                large.append(mapping)
    yield from large


def _populated(proc: Proc, pagemap: int, mapping: Mapping, deadline: float) -> Iterator[tuple[int, int]]:
    """Yield the parts (first address, address behind) of a mapping that may have pages that count. _OverTime.

    Where the kernel can scan, holes are skipped, terabytes of them in milliseconds. Elsewhere it is the whole mapping.
    """
    at = mapping.start
    if proc.scan:
        regions = array("Q", bytes(3 * 8 * _SCAN_REGIONS))
        first = behind = at
        while at < mapping.end:
            if time.monotonic() > deadline:
                raise _OverTime
            try:
                count, walked = _scan(pagemap, at, min(mapping.end, at + _SCAN_STEP_BYTES), regions)
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
                break  # before Linux 6.7
            for start, end in zip(regions[0 : 3 * count : 3], regions[1 : 3 * count : 3], strict=True):
                if start - behind > _JOIN_ENTRIES * proc.page_bytes:
                    if behind > first:
                        yield first, behind
                    first = start
                behind = end
            at = max(walked, at + proc.page_bytes)
        if behind > first:
            yield first, behind
    if at < mapping.end:
        yield at, mapping.end


def _scan(pagemap: int, start: int, end: int, regions: array[int]) -> tuple[int, int]:
    """Have the kernel fill in (start, end, flags) of each region with pages; return their number, and how far it went.

    OSError: ENOTTY before Linux 6.7.
    """
    wanted, unwanted = _SCAN_PRESENT | _SCAN_SWAPPED, _SCAN_FILE | _SCAN_ZERO
    size = struct.calcsize(_SCAN_FORM)
    address, room = regions.buffer_info()[0], len(regions) // 3
    # size, flags, start, end, walk_end, vec, vec_len, max_pages, category: inverted, mask, anyof_mask, return_mask
    argument = bytearray(
        struct.pack(_SCAN_FORM, size, 0, start, end, 0, address, room, 0, unwanted, unwanted, wanted, wanted)
    )
    count = fcntl.ioctl(pagemap, _SCAN, argument)
    return count, struct.unpack(_SCAN_FORM, argument)[4]


def _take(proc: Proc, pagemap: int, start: int, end: int, frames: Frames, looked: Looked, deadline: float) -> None:
    """Add what pagemap says of the addresses from `start` to `end`. _OverTime."""
    first, behind = start // proc.page_bytes, end // proc.page_bytes
    for at in range(first, behind, _READ_ENTRIES):
        data = os.pread(pagemap, ENTRY_BYTES * min(_READ_ENTRIES, behind - at), ENTRY_BYTES * at)
        if time.monotonic() > deadline:
            raise _OverTime
        data = data[: len(data) // ENTRY_BYTES * ENTRY_BYTES]
        if not data:  # the process has ended
            return
        if data == _NOTHING[: len(data)]:
            continue
        for run in _RUNS.finditer(data[_TOP_BYTE].translate(_KINDS)):
            count, kind = run.end() - run.start(), run.group()[:1]
            if kind == b"e":
                looked.add(at + run.start(), count)
            elif kind == b"w":
                looked.swapped += count
            else:
                entries = array("Q", data[ENTRY_BYTES * run.start() : ENTRY_BYTES * run.end()])
                for page, entry in enumerate(entries, at + run.start()):
                    frame = entry & _FRAME_MASK
                    if frame and frames.add(frame):
                        looked.add(page, 1)
                    else:
                        looked.shared += 1
