# SPDX-License-Identifier: MIT
"""The zbud packing: at most two zpages ("compression buddies") in each 4 KiB frame of RAM.

    |<--------- first --------->|                |<---------- last --------->|
    | handle | zpage ...  | pad |      free      | zpage ...   | pad | handle |
    0        8                  ^ 64 B           ^ 64 B                    4096

The first buddy (index 0) starts at the left edge, the last (index 1) ends at the right edge, both on a boundary of 64
bytes (a chunk). When either is freed, its room joins the free space: a frame's free space is always one piece and is never
compacted. The price is that a frame holds two zpages at most.

Each zpage lies with its handle, one word of `page << 12 | size`, at a fixed place of the frame. So a frame, or a block
of the backing file that is a copy of one, says by itself whose data it holds.

hot_zbud.c does the same in C, step by step. Zbud is Dan Magenheimer's design, from Linux's zcache
(drivers/staging/zcache/zbud.c); this is a new implementation from its description (docs/understand/packing.md).
"""

from collections.abc import Iterator
from typing import ClassVar, Final

from zbudfs.core.allocator import (
    FULL,
    HANDLE_SIZE,
    INDEX_MASK,
    MAX_ZPAGE_SIZE,
    REF_BITS,
    SIZE_BITS,
    SIZE_MASK,
    Allocator,
    chunks_for,
)
from zbudfs.core.units import CHUNK_SIZE, NCHUNKS, PAGE_SHIFT, PAGE_WORDS

_FIRST: Final = 0
_LAST: Final = 1
"""The indices of the two buddies."""


class Zbud(Allocator):
    """The allocator with two zpages to a frame. Its own columns, by frame: the chunks of the first and of the last buddy.

    0 chunks stand for no buddy. I1 is: first + last <= NCHUNKS. A frame is unbuddied iff it has exactly one buddy.
    """

    LAYOUT: ClassVar[int] = 0xB1
    OWN_WIDTHS: ClassVar[tuple[int, ...]] = (1, 1)
    most_zpages = 2

    def __init__(self, frames: memoryview, table: memoryview, nr_frames: int, *, attach: bool) -> None:
        super().__init__(frames, table, nr_frames, attach=attach)
        self._chunks = self._own_columns

    # ---- places in a frame ---------------------------------------------------------------------------------------

    def _handle_word(self, ref: int) -> int:
        """Return the index in `_words` of the handle of a buddy: the first or the last word of its frame."""
        frame = ref >> REF_BITS
        return frame * PAGE_WORDS + (PAGE_WORDS - 1 if ref & INDEX_MASK else 0)

    def _start_of(self, ref: int, size: int) -> int:
        """Return the offset in `_frames` of the zpage of a buddy of `size` bytes."""
        frame = ref >> REF_BITS
        if ref & INDEX_MASK:
            return ((frame + 1) << PAGE_SHIFT) - chunks_for(size) * CHUNK_SIZE
        return (frame << PAGE_SHIFT) + HANDLE_SIZE

    def _size_at(self, ref: int) -> int:
        return self._words[self._handle_word(ref)] & SIZE_MASK

    def handle_at(self, ref: int) -> int:
        """Return the page that the handle at `ref` names; see Allocator."""
        return self._words[self._handle_word(ref)] >> SIZE_BITS

    def zpage(self, ref: int, page: int) -> memoryview | None:
        """Return the bytes of the zpage at `ref` if it is `page`'s, else None; see Allocator."""
        size = self._size_at(ref)
        if self.handle_at(ref) != page or not 0 < size <= MAX_ZPAGE_SIZE:
            return None
        start = self._start_of(ref, size)
        return self._frames[start : start + size]

    # ---- adding and removing -------------------------------------------------------------------------------------

    def _chunks_wanted(self, zpage_size: int) -> int:
        return chunks_for(zpage_size)

    def _reserve(self, frame: int, size: int) -> int:
        index = _LAST if self._chunks[_FIRST][frame] else _FIRST
        self._chunks[index][frame] = chunks_for(size)
        return index

    def _fill(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        size = len(zpage)
        start = self._start_of(ref, size)
        self._frames[start : start + size] = zpage
        self._words[self._handle_word(ref)] = page << SIZE_BITS | size

    def _remove(self, ref: int) -> int:
        column, frame = self._chunks[ref & INDEX_MASK], ref >> REF_BITS
        if not column[frame]:
            raise AssertionError(f"no zpage at ref {ref}")
        column[frame] = 0
        return self._size_at(ref)

    def _overlaps(self, ref: int, size: int) -> bool:
        frame, index = ref >> REF_BITS, ref & INDEX_MASK
        mine, other = self._chunks[index][frame], self._chunks[_LAST - index][frame]
        return mine != 0 or chunks_for(size) + other > NCHUNKS

    def _claim(self, ref: int) -> int:
        size = self._size_at(ref)
        self._chunks[ref & INDEX_MASK][ref >> REF_BITS] = chunks_for(size)
        return size

    # ---- queries of the base class ---------------------------------------------------------------------------------

    def _zpages_of(self, frame: int) -> Iterator[tuple[int, int]]:
        for index in (_FIRST, _LAST):
            if self._chunks[index][frame]:
                ref = frame << REF_BITS | index
                yield ref, self._size_at(ref)

    def _is_empty(self, frame: int) -> bool:
        return not self._chunks[_FIRST][frame] and not self._chunks[_LAST][frame]

    def _list_of(self, frame: int) -> int:
        first, last = self._chunks[_FIRST][frame], self._chunks[_LAST][frame]
        return FULL if first and last else first + last

    def _clear(self, frame: int) -> None:
        self._chunks[_FIRST][frame] = self._chunks[_LAST][frame] = 0

    def _check_frame(self, frame: int) -> None:
        columns = [column[frame] for column in self._chunks]
        assert sum(columns) <= NCHUNKS, f"I1: the buddies of frame {frame} overlap"
        for ref, size in self._zpages_of(frame):
            chunks = columns[ref & INDEX_MASK]
            assert chunks_for(size) == chunks, f"ref {ref}: {size} bytes do not take {chunks} chunks"
