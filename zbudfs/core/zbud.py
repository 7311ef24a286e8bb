# SPDX-License-Identifier: MIT
"""The zbud packing: at most two zpages ("compression buddies") in each 4 KiB frame of RAM.

    |<--------- first --------->|                |<---------- last --------->|
    | handle | zpage ...  | pad |      free      | zpage ...   | pad | handle |
    0        8                  ^ 64 B           ^ 64 B                    4096

The first buddy (index 0) starts at the left edge, the last (index 1) ends at the right edge, both on a boundary of 64
bytes (a chunk). Whichever is freed, the hole joins the slack: a frame's free space is always one piece and is never
compacted. Two is the price of that.

Each zpage lies with its handle, one word of `page << 12 | size`, at a fixed place of the frame. So a frame,
or a block of the backing file that is a copy of one, says by itself whose data it holds.

The common case of a page's write and read runs in C (hot_zbud.c, see core/hot.py), step by step what stands here.

Zbud is Dan Magenheimer's design, from Linux's zcache (drivers/staging/zcache/zbud.c); this is written anew
from its description.
"""

from collections.abc import Iterator
from typing import ClassVar, Final

from zbudfs.core.allocator import (
    DYING,
    EPHEMERAL,
    EPHEMERAL_KIND,
    FITS,
    FREE,
    FULL,
    HANDLE_SIZE,
    INDEX_MASK,
    MAX_CHUNKS,
    MAX_ZPAGE_SIZE,
    NO_REF,
    PERSISTENT,
    PERSISTENT_KIND,
    REF_BITS,
    ROUND_UP,
    SIZE_BITS,
    SIZE_MASK,
    ZOMBIE,
    Allocator,
    Event,
    FrameState,
    chunks_for,
    too_large,
)
from zbudfs.core.units import CHUNK_SHIFT, NCHUNKS, NO_FRAME, PAGE_SHIFT, PAGE_WORDS

_LAST: Final = 1
"""The index of the last buddy; that of the first is 0."""


class Zbud(Allocator):
    """Two zpages to a frame. Columns of its own, by frame: first_chunks, last_chunks, of the buddies; 0 = none.

    I1 is: first_chunks + last_chunks <= NCHUNKS. A frame is unbuddied iff it has exactly one buddy.
    """

    LAYOUT: ClassVar[int] = 0xB1
    OWN_WIDTHS: ClassVar[tuple[int, ...]] = (1, 1)
    most_zpages = 2

    def __init__(self, frames: memoryview, table: memoryview, nr_frames: int, *, attach: bool) -> None:
        super().__init__(frames, table, nr_frames, attach=attach)
        self._first_chunks, self._last_chunks = self._own_columns

    # ---- after a crash -------------------------------------------------------------------------------------------

    def restore(self, ref: int, page: int) -> bool:
        """See Allocator."""
        frame = ref >> REF_BITS
        if frame >= self.nr_frames or ref & INDEX_MASK > _LAST or self._owner[frame]:
            return False
        handle = self._handle_word(ref)
        size = handle & SIZE_MASK
        chunks = (size + ROUND_UP) >> CHUNK_SHIFT
        mine, other = self._first_chunks, self._last_chunks
        if ref & INDEX_MASK:
            mine, other = other, mine
        if handle >> SIZE_BITS != page or not size or chunks > MAX_CHUNKS:
            return False
        if mine[frame] or chunks + other[frame] > NCHUNKS:
            return False
        mine[frame] = chunks
        self._account(PERSISTENT_KIND, chunks, size)
        return True

    # ---- adding a zpage ----------------------------------------------------------------------------------------

    def match_prep(self, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """See Allocator."""
        chunks = (zpage_size + ROUND_UP) >> CHUNK_SHIFT
        if chunks > MAX_CHUNKS:
            raise too_large(zpage_size)
        fitting = self._masks[kind] & FITS[chunks]
        if not fitting:
            return NO_REF
        used = fitting.bit_length() - 1
        budlists = self._budlists
        frame = budlists.nexts[self.nr_frames + kind * NCHUNKS + used]
        budlists.remove(frame)
        lengths = self._unbuddied[kind]
        lengths[used] -= 1
        if not lengths[used]:
            self._masks[kind] &= ~(1 << used)
        self._unbuddied_count[kind] -= 1
        self._buddied[kind] += 1
        self._pins[frame] += 1
        lru = self._lru
        lru.remove(frame)
        lru.append(kind, frame)
        if self._first_chunks[frame]:
            self._last_chunks[frame] = chunks
            return frame << REF_BITS | _LAST
        self._first_chunks[frame] = chunks
        return frame << REF_BITS

    def create_prep(self, frame: int, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """See Allocator."""
        chunks = (zpage_size + ROUND_UP) >> CHUNK_SHIFT
        if chunks > MAX_CHUNKS:
            raise too_large(zpage_size)
        if self._state[frame] != FREE:
            raise AssertionError(f"frame {frame} was handed in while {FrameState(self._state[frame]).name}")
        self._state[frame] = PERSISTENT if kind == PERSISTENT_KIND else EPHEMERAL
        self._pageframes[kind] += 1
        self._pins[frame] = 1
        self._first_chunks[frame] = chunks
        self._lru.append(kind, frame)
        self._link_unbuddied(frame, chunks, kind)
        return frame << REF_BITS

    def match_finish(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        """See Allocator."""
        size = len(zpage)
        frame = ref >> REF_BITS
        chunks = (size + ROUND_UP) >> CHUNK_SHIFT
        if ref & INDEX_MASK:
            start = ((frame + 1) << PAGE_SHIFT) - (chunks << CHUNK_SHIFT)
            self._frames[start : start + size] = zpage
            self._words[(frame + 1) * PAGE_WORDS - 1] = page << SIZE_BITS | size
        else:
            start = (frame << PAGE_SHIFT) + HANDLE_SIZE
            self._frames[start : start + size] = zpage
            self._words[frame * PAGE_WORDS] = page << SIZE_BITS | size
        kind = self._state[frame] - 1  # PERSISTENT or EPHEMERAL: an unevictable frame becomes nothing else
        self._pins[frame] -= 1
        self._account(kind, chunks, size)

    create_finish = match_finish

    def match(self, page: int, zpage: bytes | memoryview) -> int:
        """`match_prep` and `match_finish` in one, for who has the zpage at hand: the ref, or NO_REF.

        It is on the path of every page that is written, so the list operations stand here in line: calls and pins cost
        a third of the time.
        """
        size = len(zpage)
        chunks = (size + ROUND_UP) >> CHUNK_SHIFT
        if chunks > MAX_CHUNKS:
            raise too_large(size)
        fitting = self._masks[PERSISTENT_KIND] & FITS[chunks]
        if not fitting:
            return NO_REF
        used = fitting.bit_length() - 1
        nexts, prevs = self._bud_next, self._bud_prev
        sentinel = self.nr_frames + used
        frame = nexts[sentinel]
        after = nexts[frame]
        nexts[sentinel] = after
        prevs[after] = sentinel
        lengths = self._unbuddied[PERSISTENT_KIND]
        left = lengths[used] - 1
        lengths[used] = left
        if not left:
            self._masks[PERSISTENT_KIND] &= ~(1 << used)
        self._unbuddied_count[PERSISTENT_KIND] -= 1
        self._buddied[PERSISTENT_KIND] += 1
        nexts, prevs = self._lru_next, self._lru_prev
        sentinel = self.nr_frames
        after = nexts[frame]
        if after != sentinel:  # not the most recent already
            before = prevs[frame]
            nexts[before] = after
            prevs[after] = before
            last = prevs[sentinel]
            nexts[last] = frame
            prevs[frame] = last
            nexts[frame] = sentinel
            prevs[sentinel] = frame
        if self._first_chunks[frame]:
            self._last_chunks[frame] = chunks
            start = ((frame + 1) << PAGE_SHIFT) - (chunks << CHUNK_SHIFT)
            self._frames[start : start + size] = zpage
            self._words[(frame + 1) * PAGE_WORDS - 1] = page << SIZE_BITS | size
            ref = frame << REF_BITS | _LAST
        else:
            self._first_chunks[frame] = chunks
            start = (frame << PAGE_SHIFT) + HANDLE_SIZE
            self._frames[start : start + size] = zpage
            self._words[frame * PAGE_WORDS] = page << SIZE_BITS | size
            ref = frame << REF_BITS
        self._account(PERSISTENT_KIND, chunks, size)
        return ref

    # ---- reading ---------------------------------------------------------------------------------------------------

    def zpage(self, ref: int, page: int) -> memoryview | None:
        """See Allocator."""
        frame = ref >> REF_BITS
        if ref & INDEX_MASK:
            handle = self._words[(frame + 1) * PAGE_WORDS - 1]
            size = handle & SIZE_MASK
            start = ((frame + 1) << PAGE_SHIFT) - ((size + ROUND_UP) >> CHUNK_SHIFT << CHUNK_SHIFT)
        else:
            handle = self._words[frame * PAGE_WORDS]
            size = handle & SIZE_MASK
            start = (frame << PAGE_SHIFT) + HANDLE_SIZE
        if handle >> SIZE_BITS != page or not 0 < size <= MAX_ZPAGE_SIZE:
            return None
        return self._frames[start : start + size]

    # ---- taking a zpage out ------------------------------------------------------------------------------------

    def free(self, ref: int) -> int:
        """See Allocator."""
        frame = ref >> REF_BITS
        state = self._state[frame]
        if state == DYING:
            return NO_FRAME
        kind = EPHEMERAL_KIND if state == EPHEMERAL else PERSISTENT_KIND
        if self._owner[frame]:
            return self._free_raw(frame, state, kind)
        if ref & INDEX_MASK:
            chunks = self._last_chunks[frame]
            other = self._first_chunks[frame]
            size = self._words[(frame + 1) * PAGE_WORDS - 1] & SIZE_MASK
            self._last_chunks[frame] = 0
        else:
            chunks = self._first_chunks[frame]
            other = self._last_chunks[frame]
            size = self._words[frame * PAGE_WORDS] & SIZE_MASK
            self._first_chunks[frame] = 0
        if not chunks:
            raise AssertionError(f"no zpage at ref {ref}")
        self._zpages[kind] -= 1
        self._zbytes[kind] -= size
        self._histogram[kind][chunks] -= 1
        if state == ZOMBIE:
            return NO_FRAME
        if other:
            self._buddied[kind] -= 1
            self._link_unbuddied(frame, other, kind)
            return NO_FRAME
        self._unlink_unbuddied(frame, chunks, kind)
        self._lru.remove(frame)
        return self._leave(frame, kind, Event.EMPTIED)

    # ---- what the rest of the allocator asks ---------------------------------------------------------------------

    def handle_at(self, ref: int) -> int:
        """See Allocator."""
        return self._handle_word(ref) >> SIZE_BITS

    def _handle_word(self, ref: int) -> int:
        frame = ref >> REF_BITS
        return self._words[(frame + 1) * PAGE_WORDS - 1 if ref & INDEX_MASK else frame * PAGE_WORDS]

    def _zpages_of(self, frame: int) -> Iterator[tuple[int, int]]:
        if self._first_chunks[frame]:
            yield frame << REF_BITS, self._words[frame * PAGE_WORDS] & SIZE_MASK
        if self._last_chunks[frame]:
            yield frame << REF_BITS | _LAST, self._words[(frame + 1) * PAGE_WORDS - 1] & SIZE_MASK

    def _is_empty(self, frame: int) -> bool:
        return not self._first_chunks[frame] and not self._last_chunks[frame]

    def _list_of(self, frame: int) -> int:
        first, last = self._first_chunks[frame], self._last_chunks[frame]
        return FULL if first and last else first + last

    def _claim(self, frame: int, ref: int) -> int:
        size = self._handle_word(ref) & SIZE_MASK
        column = self._last_chunks if ref & INDEX_MASK else self._first_chunks
        column[frame] = (size + ROUND_UP) >> CHUNK_SHIFT
        return size

    def _clear(self, frame: int) -> None:
        self._first_chunks[frame] = self._last_chunks[frame] = 0

    def _check_frame(self, frame: int) -> None:
        columns = (self._first_chunks[frame], self._last_chunks[frame])
        assert sum(columns) <= NCHUNKS, f"I1: the buddies of frame {frame} overlap"
        for ref, size in self._zpages_of(frame):
            chunks = columns[ref & INDEX_MASK]
            assert chunks_for(size) == chunks, f"ref {ref}: {size} bytes do not take {chunks} chunks"
