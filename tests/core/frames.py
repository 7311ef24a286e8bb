# SPDX-License-Identifier: MIT
"""An allocator with its memory, and a caller that counts the frames that it hands in and gets back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar, Final

from zbudfs.core.allocator import HANDLE_SIZE, NO_REF, PERSISTENT_KIND, Allocator
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.core.units import CHUNK_SIZE, NO_FRAME, PAGE_SIZE

FILLER: Final = b"\xa5"
"""The content of each frame before anything is stored."""


def size_of(chunks: int) -> int:
    """Return the size of the largest zpage that takes `chunks` chunks."""
    return chunks * CHUNK_SIZE - HANDLE_SIZE


def content(page: int, size: int) -> bytes:
    """Return `size` bytes that only this page's zpage has."""
    return (b"<%d:%d>" % (page, size) * (size // 4 + 1))[:size]


@contextlib.contextmanager
def packed_by(packing: Packing) -> Iterator[Packing]:
    """Set the packing for callers that name none."""
    before = Caller.packing
    Caller.packing = packing
    try:
        yield packing
    finally:
        Caller.packing = before


class Caller:
    """A caller that hands in the lowest free frame and takes frames back. `allocator` has the packing in force."""

    packing: ClassVar[Packing] = ZBUD

    def __init__(self, nr_frames: int) -> None:
        self.buffer = bytearray(FILLER * (nr_frames * PAGE_SIZE))
        self.table = bytearray(self.packing.kind.table_size(nr_frames))
        self.allocator = self.packing.allocator(memoryview(self.buffer), memoryview(self.table), nr_frames)
        self.free_frames = list(range(nr_frames))

    def take(self) -> int:
        """Return a free frame."""
        return self.free_frames.pop(0)

    def give(self, frame: int) -> bool:
        """Take a frame back, if there is one. It must be in use."""
        if frame == NO_FRAME:
            return False
        assert frame not in self.free_frames
        self.free_frames = sorted([*self.free_frames, frame])
        return True

    def create(self, page: int, size: int, kind: int = PERSISTENT_KIND) -> int:
        """Store a zpage in a frame of its own."""
        ref = self.allocator.create_prep(self.take(), size, kind)
        self.allocator.create_finish(ref, page, content(page, size))
        return ref

    def match(self, page: int, size: int, kind: int = PERSISTENT_KIND, *, halves: bool = False) -> int:
        """Store a zpage beside another, or return NO_REF. If `halves`, prepare and finish are separate calls."""
        if kind == PERSISTENT_KIND and not halves:
            return self.allocator.match(page, content(page, size))
        ref = self.allocator.match_prep(size, kind)
        if ref != NO_REF:
            self.allocator.match_finish(ref, page, content(page, size))
        return ref

    def store(self, page: int, size: int, kind: int = PERSISTENT_KIND) -> int:
        """Store a zpage beside another if possible, and in its own frame otherwise."""
        ref = self.match(page, size, kind)
        return ref if ref != NO_REF else self.create(page, size, kind)

    def raw(self, page: int) -> int:
        """Store a raw page."""
        return self.allocator.create_raw(self.take(), page, content(page, PAGE_SIZE))

    def free(self, ref: int) -> bool:
        """Free a zpage, and return whether its frame came back."""
        return self.give(self.allocator.free(ref))

    def zpage(self, ref: int, page: int) -> bytes | None:
        """Return the bytes of a zpage."""
        view = self.allocator.zpage(ref, page)
        return None if view is None else bytes(view)

    def lru(self, kind: int = PERSISTENT_KIND) -> list[int]:
        """Return the frames on an LRU list, oldest first."""
        return lru_of(self.allocator, kind)


def lru_of(allocator: Allocator, kind: int) -> list[int]:
    """Return the frames on the LRU list of a kind, oldest first."""
    return list(allocator._lru.members(kind))
