# SPDX-License-Identifier: MIT
"""A program that makes the same random calls to a zbudfs and to a plain file, and compares each byte that it reads.

    python -m tests.fuse.exercise same TARGET PLAIN START LENGTH UNIT SEED STEPS
    python -m tests.fuse.exercise race TARGET WRITER PAGES SEED STEPS

`same` keeps to its range, so several can run at once, and their ranges may share pages. Offsets and lengths are
multiples of UNIT: 1 for a file, the sector size for a block device, which is then opened with O_DIRECT. At the first
wrong byte it prints the history of that page and ends with status 1.

`race` has several writers in the same pages, of whole pages and of parts. Each sector contains its writer and number.
So a reader sees that a sector is whole, and that an overwritten one does not come back. It ends with status 1 at an
error, and prints its last write to each sector.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import struct
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from tests.fuse.calls import KEEP_SIZE, MIB, PAGE, PUNCH, ZERO_RANGE, fallocate

SECTOR: Final = 512
_POOL_BYTES: Final = 2 * MIB
_MARK: Final = struct.Struct("<III")
_NOISE: Final = random.Random(20).randbytes(_POOL_BYTES)
_TEXT: Final = b"".join(b"%d bottles of beer on the wall, %x\n" % (n, n * n) for n in range(60000))[:_POOL_BYTES]
_HALF: Final = b"".join(_NOISE[at : at + 24] + bytes(40) for at in range(0, _POOL_BYTES, 64))


def content(source: random.Random, length: int) -> bytes:
    """Return bytes like those of memory: zeros, words, text, half-full pages and noise, in stretches."""
    pieces = []
    left = length
    while left:
        part = min(left, source.choice((100, 512, 2000, PAGE, PAGE, 2 * PAGE, 16 * PAGE, 64 * PAGE)))
        kind = source.randrange(6)
        if kind < 2:
            word = bytes(8) if kind else source.choice((b"\xff" * 8, source.randbytes(8), bytes(7) + b"\1"))
            pieces.append((word * (part // 8 + 1))[:part])
        else:
            pool = (_TEXT, _TEXT, _HALF, _NOISE)[kind - 2]
            at = source.randrange(_POOL_BYTES - part)
            pieces.append(pool[at : at + part])
        left -= part
    return b"".join(pieces)


class Same:
    """One range of the target and of the plain file, which always have the same content."""

    def __init__(self, target: str, plain: str, start: int, length: int, unit: int, seed: int) -> None:
        self._target = os.open(target, os.O_RDWR | (os.O_DIRECT if unit > 1 else 0))
        self._plain = os.open(plain, os.O_RDWR)
        self._start, self._end, self._unit, self._seed = start, start + length, unit, seed
        self._source = random.Random(seed)
        self._buffer = mmap.mmap(-1, MIB)
        self._done: list[tuple[str, int, int]] = []

    def run(self, steps: int) -> None:
        """Make `steps` random calls, then compare all of the range."""
        calls: list[Callable[[int, int], None]] = [self.write, self.read, self.punch, self.zero, self.zero_keep]
        for _ in range(steps):
            call = self._source.choices(calls, (45, 30, 12, 7, 6))[0]
            offset, length = self._range(longest=MIB if call in (self.write, self.read) else 4 * MIB)
            self._done.append((call.__name__, offset, length))
            try:
                call(offset, length)
            except OSError as error:
                self._fail(f"{error}", offset)
            if not self._source.randrange(400):
                os.fsync(self._target)
        for at in range(self._start, self._end, MIB):
            self.read(at, min(MIB, self._end - at))

    def _range(self, longest: int) -> tuple[int, int]:
        """Choose an offset and a length: most are short, many begin or end on a page, some are as long as possible."""
        source, unit = self._source, self._unit
        length = source.choice((100, 1000, PAGE, PAGE, 5000, 4 * PAGE, 16 * PAGE, 64 << 10, 200_000, longest))
        if source.randrange(3) == 0:
            length = source.randrange(1, length + 1)
        offset = source.randrange(self._start, self._end)
        if source.randrange(3) == 0:
            offset = offset // PAGE * PAGE
        offset = max(offset // unit * unit, self._start)
        length = max(length // unit * unit, unit)
        return offset, min(length, self._end - offset)

    def write(self, offset: int, length: int) -> None:
        """Write the same bytes to both."""
        view = memoryview(self._buffer)[:length]
        view[:] = content(self._source, length)
        for fd in (self._target, self._plain):
            done = os.pwritev(fd, [view], offset)
            if done != length:
                self._fail(f"a write of {length} bytes took {done}", offset)

    def read(self, offset: int, length: int) -> None:
        """Read from both, and compare."""
        view = memoryview(self._buffer)[:length]
        done = os.preadv(self._target, [view], offset)
        wanted = os.pread(self._plain, length, offset)
        if done != len(wanted):
            self._fail(f"a read of {len(wanted)} bytes gave {done}", offset)
        if bytes(view) != wanted:  # a comparison of views goes byte by byte and is slow
            first = next(at for at in range(length) if view[at] != wanted[at])
            end = min(first + 16, length)
            self._fail(f"{view[first:end].hex()} instead of {wanted[first:end].hex()}", offset + first)

    def punch(self, offset: int, length: int) -> None:
        """Punch a hole in both."""
        self._fallocate(PUNCH, offset, length)

    def zero(self, offset: int, length: int) -> None:
        """Zero a range of both."""
        self._fallocate(ZERO_RANGE, offset, length)

    def zero_keep(self, offset: int, length: int) -> None:
        """Zero a range of both with another mode."""
        self._fallocate(ZERO_RANGE | KEEP_SIZE, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        for fd in (self._target, self._plain):
            fallocate(fd, mode, offset, length)

    def _fail(self, what: str, offset: int) -> NoReturn:
        page = offset // PAGE
        print(f"seed {self._seed}, call {len(self._done)}, byte {offset} (page {page}): {what}; so far there:")
        for number, (name, at, length) in enumerate(self._done):
            if at < (page + 1) * PAGE and at + length > page * PAGE:
                print(f"  {number}: {name} {at} .. {at + length}")
        sys.exit(1)


Mark = tuple[int, int]
"""The writer of a sector, and the number of the write."""


def marked_sector(writer: int, number: int, sector: int) -> bytes:
    """Return the content of `sector` in write `number` of `writer`: each byte follows from these three."""
    mark = _MARK.pack(writer + 1, number, sector)
    at = (writer * 7919 + number * 104729 + sector % 8 * SECTOR) % (_POOL_BYTES - PAGE)
    pool = _NOISE if number % 3 else _TEXT
    return mark + pool[at : at + SECTOR - 2 * _MARK.size] + mark


def whose_sector(sector: int, found: bytes) -> Mark | None:
    """Return (writer, number) for a sector, or None for zeros. Any other content is a ValueError."""
    if not any(found):
        return None
    writer, number, of_sector = _MARK.unpack_from(found)
    if of_sector != sector or found != marked_sector(writer - 1, number, sector):
        raise ValueError(f"sector {sector} holds a mix: {found[:12].hex()} .. {found[-12:].hex()}")
    return writer - 1, number


WINDOW_SECTORS: Final = 4 * PAGE // SECTOR
STEPS_A_WINDOW: Final = 2


class Race:
    """One of several writers of the same sectors."""

    def __init__(self, target: str, writer: int, pages: int, seed: int) -> None:
        self._fd = os.open(target, os.O_RDWR | os.O_DIRECT)
        self._writer, self._sectors, self._seed = writer, pages * (PAGE // SECTOR), seed
        self._source = random.Random(seed)
        self._buffer = mmap.mmap(-1, 16 * PAGE)
        self._seen: dict[int, Mark | None] = {}
        """The last content that this writer knows of, by sector."""
        self._gone: dict[int, set[Mark]] = {}
        """The overwritten contents, by sector, which must never be seen again."""
        self.last: dict[int, int] = {}
        """The number of this writer's last write by sector, 0 for a hole."""

    def run(self, steps: int) -> None:
        """Write or punch, and read, `steps` times. Some steps read first, which reads old content from the disk."""
        for number in range(1, steps + 1):
            first, count = self._range(number)
            kind = self._source.randrange(10)
            try:
                if not self._source.randrange(4):
                    self._read(first, count)
                if kind < 8:
                    self._write(first, count, number)
                elif kind == 8:
                    fallocate(self._fd, PUNCH, first * SECTOR, count * SECTOR)
                    self._overwritten(first, count, 0)
                self._read(first, count)
            except (ValueError, OSError) as error:
                print(f"seed {self._seed}, writer {self._writer}, step {number}, {count} sectors from {first}: {error}")
                sys.exit(1)

    def _range(self, number: int) -> tuple[int, int]:
        """Choose sectors: whole pages or parts of them, from a window that moves on.

        All writers are at about the same step, so they meet, in pages that were written back since the last time.
        """
        whole = PAGE // SECTOR
        start = number // STEPS_A_WINDOW * WINDOW_SECTORS % (self._sectors - WINDOW_SECTORS + 1)
        if self._source.randrange(2):
            count = self._source.choice((1, 1, 2, 4)) * whole
            return start + self._source.randrange((WINDOW_SECTORS - count) // whole + 1) * whole, count
        count = self._source.choice((1, 1, 2, 3, 7, 9, 20))
        return start + self._source.randrange(WINDOW_SECTORS - count + 1), count

    def _read(self, first: int, count: int) -> None:
        view = memoryview(self._buffer)[: count * SECTOR]
        if os.preadv(self._fd, [view], first * SECTOR) != len(view):
            raise ValueError("short read")
        for at in range(count):
            sector = first + at
            found = whose_sector(sector, bytes(view[at * SECTOR : (at + 1) * SECTOR]))
            if found is not None and found in self._gone.get(sector, ()):
                raise ValueError(f"sector {sector} holds {found} again, which was overwritten")
            self._replaced(sector, found)

    def _write(self, first: int, count: int, number: int) -> None:
        view = memoryview(self._buffer)[: count * SECTOR]
        view[:] = b"".join(marked_sector(self._writer, number, first + at) for at in range(count))
        if os.pwritev(self._fd, [view], first * SECTOR) != len(view):
            raise ValueError("short write")
        self._overwritten(first, count, number)

    def _overwritten(self, first: int, count: int, number: int) -> None:
        for sector in range(first, first + count):
            # Another writer may have overwritten it. The earlier content is gone in any case.
            self._replaced(sector, None)
            self.last[sector] = number

    def _replaced(self, sector: int, found: Mark | None) -> None:
        before = self._seen.get(sector)
        if before is not None and before != found:
            self._gone.setdefault(sector, set()).add(before)
        self._seen[sector] = found


if __name__ == "__main__":
    how, where, *rest = sys.argv[1:]
    if how == "same":
        start, length, unit, seed, steps = map(int, rest[1:])
        Same(where, rest[0], start, length, unit, seed).run(steps)
    else:
        writer, pages, seed, steps = map(int, rest)
        racer = Race(where, writer, pages, seed)
        racer.run(steps)
        print(json.dumps(racer.last))
