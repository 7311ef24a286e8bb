# SPDX-License-Identifier: MIT
"""Samples of a file: of a core dump the writable memory that it holds, of any other file all its pages.

A core dump is an ELF file of type CORE. Its program headers say which parts of it are memory (PT_LOAD) and which of those
were writable. The file is not trusted: what its headers say is bounded by what the file has.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import Final

from zbudfs.core.units import PAGE_SIZE, pages_in
from zbudfs.estimate.sample import Progress, Sample, SampleError, draw

_ET_CORE: Final = 4
_PT_LOAD: Final = 1
_PF_W: Final = 2
_PN_XNUM: Final = 0xFFFF
"""Stands for "more headers than this field can count: see the first section header"."""
_MOST_HEADERS: Final = 1 << 20
_EVERY_PAGES: Final = 256
"""Pages between two words about progress."""


def sample_file(path: str, shown: str, wanted: int, seed: int, progress: Progress) -> Sample:
    """Return up to `wanted` pages of a file, which is `shown` in messages. Counted: "segments" of a core dump.

    SampleError, OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise SampleError(f"{shown} is neither a file nor a block device: name a file of pages, or a core dump")
        size = os.lseek(fd, 0, os.SEEK_END)
        if not size:
            raise SampleError(f"{shown} is empty: there are no pages to look at")
        parts = _writable_segments(shown, fd, size)
        sample = Sample(shown)
        if parts is None:
            parts = [(0, size)]
        else:
            sample.source = f"core dump {shown}"
            sample.count("segments", len(parts))
        return _read(fd, parts, wanted, seed, progress, sample)
    finally:
        os.close(fd)


def _read(fd: int, parts: list[tuple[int, int]], wanted: int, seed: int, progress: Progress, sample: Sample) -> Sample:
    """Draw from the pages of the parts (offset, bytes); a page that a part fills in part ends in zeros."""
    sample.population_pages = sum(pages_in(length) for _, length in parts)
    numbers = draw(sample.population_pages, wanted, seed)
    start = at = 0
    for offset, length in parts:
        end = start + pages_in(length)
        while at < len(numbers) and numbers[at] < end:
            skip = (numbers[at] - start) * PAGE_SIZE
            content = os.pread(fd, min(PAGE_SIZE, length - skip), offset + skip)
            sample.pages.append(content.ljust(PAGE_SIZE, b"\0"))
            at += 1
            if not at % _EVERY_PAGES:
                progress(at, len(numbers))
        start = end
    return sample


def _writable_segments(shown: str, fd: int, size: int) -> list[tuple[int, int]] | None:
    """Return (offset, bytes) of the writable memory in a core dump; None if the file is none. SampleError."""
    ident = os.pread(fd, 16, 0)
    if len(ident) < 16 or ident[:4] != b"\x7fELF" or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        return None
    order = "<>"[ident[5] - 1]
    wide = ident[4] == 2
    # After the ident: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, ...
    header_form = order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH")
    head = os.pread(fd, struct.calcsize(header_form), 16)
    if len(head) < struct.calcsize(header_form):
        return None
    kind, _, _, _, headers_at, sections_at, _, _, header_size, header_nr, *_ = struct.unpack(header_form, head)
    if kind != _ET_CORE:
        return None
    if header_nr == _PN_XNUM:
        info = os.pread(fd, 4, sections_at + (44 if wide else 28)) if sections_at < size else b""
        header_nr = struct.unpack(f"{order}I", info)[0] if len(info) == 4 else 0
    form = order + ("IIQQQQQQ" if wide else "IIIIIIII")
    if header_size < struct.calcsize(form) or header_nr > _MOST_HEADERS or headers_at + header_nr * header_size > size:
        raise SampleError(f"{shown} is a core dump whose headers are damaged or cut off")
    table = os.pread(fd, header_nr * header_size, headers_at)
    found = []
    for number in range(len(table) // header_size):
        fields = struct.unpack_from(form, table, number * header_size)
        if wide:
            segment, flags, offset, _, _, length, _, _ = fields
        else:
            segment, offset, _, _, length, _, flags, _ = fields
        if segment == _PT_LOAD and flags & _PF_W and offset < size and length:
            found.append((offset, min(length, size - offset)))
    if not found:
        raise SampleError(f"{shown} is a core dump without writable memory: dump it with its private anonymous memory")
    return found
