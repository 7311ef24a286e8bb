# SPDX-License-Identifier: MIT
"""The dense packing: up to N zpages in each 4 KiB frame of RAM.

    | h0 | h1 | ... | h(N-1) |  zpage  |   zpage   | hole | zpage |          tail            |
    0                        8 N                                  ^ end of what was given away

A frame begins with its directory: N handles of 8 bytes at fixed places. A handle is one word,

    63      56 55           24 23      12 11       0
    | layout  | page          | offset   | size     |

so a ref, frame and index, finds its zpage through the handle at that index, wherever in the frame it lies. Zpages lie
from left to right, byte to byte, and a new one goes to the start of the tail. One that is freed leaves a hole (or joins
the tail, if it was the last). When the tail is too short for a zpage and holes and tail together are not, the frame is
compacted: its zpages are moved together, so that the room is one piece. That moves the bytes of one frame at most, and
no frame that is unevictable or a zombie, since others may be reading or writing its bytes: an unevictable frame offers
its tail alone.

Who is killed in the middle of a compaction must leave every zpage whole. A zpage often overlaps its new place, so there is
an undo copy of the frame: (1) the frame is copied to the end of the table, (2) one 8-byte store says whose copy that is,
(3) zpages are moved and handles rewritten, (4) one 8-byte store says that it is done. `reset`, which begins every
recovery, puts the copy back if there is one. Index and frame of a zpage never change, so the page table is not concerned.

The common case of a page's write and read runs in C (hot_dense.c, see core/hot.py), step by step what stands here, compaction
included and with its stores in the same order.

The unbuddied list of a frame is that of the bytes that it uses, directory included, rounded up to chunks; a frame that
has N zpages, or less than a chunk of room, is on none.
"""

from collections.abc import Iterable, Iterator
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
    MAX_PAGE_NUMBER,
    MAX_ZPAGE_SIZE,
    MOST_ZPAGES,
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
    too_large,
)
from zbudfs.core.units import CHUNK_SHIFT, CHUNK_SIZE, NCHUNKS, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, WORD_SIZE

DEFAULT_ZPAGES: Final = 7
"""Measured (bench/packing.py): 7 is 2 to 8 % denser than 6 where pages are small, and as dense within 0.5 % elsewhere."""
FEWEST_ZPAGES: Final = 2

_LAYOUT: Final = 0xD1
"""Of a frame: stands in each handle, so that a frame of another layout holds nothing that is taken for a zpage."""

_OFFSET_SHIFT: Final = SIZE_BITS
_PAGE_SHIFT: Final = 2 * SIZE_BITS
_MARK: Final = _LAYOUT << 32
"""What stands above the offset in a handle, but for its page."""

_UNDO: Final = 0x756E646F << 32
"""Added to the number of the frame of which there is an undo copy, so that hardly anything else is taken for one."""

_INDICES: Final = tuple(tuple(index for index in range(8) if live >> index & 1) for live in range(256))
"""By the mask of the indices in use: these indices."""

_FREE_INDEX: Final = bytes((~live & (live + 1)).bit_length() - 1 for live in range(256))
"""By the mask of the indices in use: the lowest free one."""


class Dense(Allocator):
    """Up to `most_zpages` zpages to a frame. Columns of its own, by frame:

        used    bytes of its zpages
        tail    where the tail starts
        live    mask of the indices in use

    I1 is: the zpages of the live indices lie apart, between the directory and `tail`; used is the sum of their sizes.
    """

    LAYOUT: ClassVar[int] = _LAYOUT
    OWN_WIDTHS: ClassVar[tuple[int, ...]] = (2, 2, 1)
    OWN_BYTES: ClassVar[int] = WORD_SIZE + PAGE_SIZE
    """_UNDO + the number of the frame of which there is an undo copy, 0 for none; and the copy."""

    def __init__(
        self, frames: memoryview, table: memoryview, nr_frames: int, *, attach: bool, most_zpages: int
    ) -> None:
        if not FEWEST_ZPAGES <= most_zpages <= MOST_ZPAGES:
            raise ValueError(f"{most_zpages} zpages to a frame: it must be {FEWEST_ZPAGES} to {MOST_ZPAGES}")
        self.most_zpages = most_zpages
        self._start = HANDLE_SIZE * most_zpages
        self._all_live = (1 << most_zpages) - 1
        super().__init__(frames, table, nr_frames, attach=True)
        used, tail, self._live = self._own_columns
        self._used = used.cast("H")
        self._tail = tail.cast("H")
        self._undo_of = self._own_bytes[:WORD_SIZE].cast("Q")
        self._undo_copy = self._own_bytes[WORD_SIZE:]
        if not attach:
            self.reset()

    # ---- after a crash -------------------------------------------------------------------------------------------

    def reset(self, populated: Iterable[tuple[int, int]] = ()) -> None:
        """See Allocator. A compaction in whose middle somebody was killed is undone first."""
        frame = self._undo_of[0] - _UNDO
        if 0 <= frame < self.nr_frames:
            self.frame_bytes(frame)[:] = self._undo_copy
        self._undo_of[0] = 0
        super().reset(populated)

    def restore(self, ref: int, page: int) -> bool:
        """See Allocator."""
        frame, index = ref >> REF_BITS, ref & INDEX_MASK
        if frame >= self.nr_frames or index >= self.most_zpages or self._owner[frame]:
            return False
        handle = self._words[frame * PAGE_WORDS + index]
        size = handle & SIZE_MASK
        offset = handle >> _OFFSET_SHIFT & SIZE_MASK
        if handle >> _PAGE_SHIFT != _MARK | page or not 0 < size <= MAX_ZPAGE_SIZE:
            return False
        live = self._live[frame]
        if offset < self._start or offset + size > PAGE_SIZE:
            return False
        for _, other, other_size in self._places(frame, live):  # the index itself among them, if it is taken
            if offset < other + other_size and other < offset + size:
                return False
        self._add(frame, index, offset, size)
        self._account(PERSISTENT_KIND, (size + ROUND_UP) >> CHUNK_SHIFT, size)
        return True

    def _add(self, frame: int, index: int, offset: int, size: int) -> None:
        """A zpage that is in the frame counts as there."""
        self._tail[frame] = max(self._tail[frame], offset + size) if self._live[frame] else offset + size
        self._used[frame] += size
        self._live[frame] |= 1 << index

    # ---- adding a zpage ----------------------------------------------------------------------------------------

    def match_prep(self, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """See Allocator."""
        if zpage_size > MAX_ZPAGE_SIZE:
            raise too_large(zpage_size)
        fitting = self._masks[kind] & FITS[(zpage_size + CHUNK_SIZE - 1) >> CHUNK_SHIFT]
        if not fitting:
            return NO_REF
        used = fitting.bit_length() - 1
        frame = self._bud_next[self.nr_frames + kind * NCHUNKS + used]
        self._unlink_unbuddied(frame, used, kind)
        self._lru.remove(frame)
        self._lru.append(kind, frame)
        if self._tail[frame] + zpage_size > PAGE_SIZE:
            self._compact(frame)
        return self._take(frame, zpage_size, kind)

    def create_prep(self, frame: int, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """See Allocator."""
        if zpage_size > MAX_ZPAGE_SIZE:
            raise too_large(zpage_size)
        if self._state[frame] != FREE:
            raise AssertionError(f"frame {frame} was handed in while {FrameState(self._state[frame]).name}")
        self._state[frame] = PERSISTENT if kind == PERSISTENT_KIND else EPHEMERAL
        self._pageframes[kind] += 1
        self._lru.append(kind, frame)
        self._tail[frame] = self._start
        return self._take(frame, zpage_size, kind)

    def _take(self, frame: int, size: int, kind: int) -> int:
        """Take a place at the tail of a frame that is on no unbuddied list, for a zpage to come: its ref.

        The handle has no layout, so it names no page; nothing names the index yet either.
        """
        live = self._live[frame]
        index = _FREE_INDEX[live]
        offset = self._tail[frame]
        self._words[frame * PAGE_WORDS + index] = offset << SIZE_BITS | size
        self._live[frame] = live | 1 << index
        self._tail[frame] = offset + size
        self._used[frame] += size
        self._pins[frame] += 1
        self._enlist(frame, kind)
        return frame << REF_BITS | index

    def match_finish(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        """See Allocator."""
        size = len(zpage)
        frame = ref >> REF_BITS
        place = frame * PAGE_WORDS + (ref & INDEX_MASK)
        offset = self._words[place] >> _OFFSET_SHIFT & SIZE_MASK
        start = (frame << PAGE_SHIFT) + offset
        self._frames[start : start + size] = zpage
        self._words[place] = (_MARK | page) << _PAGE_SHIFT | offset << SIZE_BITS | size
        kind = self._state[frame] - 1  # PERSISTENT or EPHEMERAL: an unevictable frame becomes nothing else
        if self._pins[frame] == 1 and self._tail[frame] != self._start + self._used[frame]:
            self._delist(frame, kind)  # its holes count again
            self._pins[frame] = 0
            self._enlist(frame, kind)
        else:
            self._pins[frame] -= 1
        self._account(kind, (size + ROUND_UP) >> CHUNK_SHIFT, size)

    create_finish = match_finish

    def match(self, page: int, zpage: bytes | memoryview) -> int:
        """`match_prep` and `match_finish` in one, for who has the zpage at hand: the ref, or NO_REF.

        It is on the path of every page that is written, so the list operations stand here in line: calls and pins cost
        a third of the time.
        """
        size = len(zpage)
        if size > MAX_ZPAGE_SIZE:
            raise too_large(size)
        fitting = self._masks[PERSISTENT_KIND] & FITS[(size + CHUNK_SIZE - 1) >> CHUNK_SHIFT]
        if not fitting:
            return NO_REF
        before_used = fitting.bit_length() - 1
        nr_frames = self.nr_frames
        nexts, prevs = self._bud_next, self._bud_prev
        sentinel = nr_frames + before_used
        frame = nexts[sentinel]
        tail = self._tail[frame]
        if tail + size > PAGE_SIZE:
            self._compact(frame)
            tail = self._tail[frame]
        live = self._live[frame]
        index = _FREE_INDEX[live]
        start = (frame << PAGE_SHIFT) + tail
        self._frames[start : start + size] = zpage
        self._words[frame * PAGE_WORDS + index] = (_MARK | page) << _PAGE_SHIFT | tail << SIZE_BITS | size
        live |= 1 << index
        self._live[frame] = live
        self._tail[frame] = tail = tail + size
        self._used[frame] = used = self._used[frame] + size
        if live == self._all_live:
            now_used = FULL
        else:
            now_used = ((tail if self._pins[frame] else self._start + used) + CHUNK_SIZE - 1) >> CHUNK_SHIFT
            if now_used == NCHUNKS:
                now_used = FULL
        after = nexts[frame]
        nexts[sentinel] = after
        prevs[after] = sentinel
        lengths = self._unbuddied[PERSISTENT_KIND]
        lengths[before_used] -= 1
        mask = self._masks[PERSISTENT_KIND]
        if after == sentinel:
            mask &= ~(1 << before_used)
        if now_used == FULL:
            self._unbuddied_count[PERSISTENT_KIND] -= 1
            self._buddied[PERSISTENT_KIND] += 1
        else:
            sentinel = nr_frames + now_used
            last = prevs[sentinel]
            nexts[last] = frame
            prevs[frame] = last
            nexts[frame] = sentinel
            prevs[sentinel] = frame
            lengths[now_used] += 1
            mask |= 1 << now_used
        self._masks[PERSISTENT_KIND] = mask
        nexts, prevs = self._lru_next, self._lru_prev
        after = nexts[frame]
        if after != nr_frames:  # not the most recent already
            before = prevs[frame]
            nexts[before] = after
            prevs[after] = before
            last = prevs[nr_frames]
            nexts[last] = frame
            prevs[frame] = last
            nexts[frame] = nr_frames
            prevs[nr_frames] = frame
        self._account(PERSISTENT_KIND, (size + ROUND_UP) >> CHUNK_SHIFT, size)
        return frame << REF_BITS | index

    def _compact(self, frame: int) -> None:
        """Make the room of a frame one piece, at its tail. Who is killed here leaves it to `reset` to undo what was begun."""
        if self._pins[frame] or self._state[frame] not in (PERSISTENT, EPHEMERAL):
            raise AssertionError(f"frame {frame} must not be compacted: others use its bytes")
        frames, words, copy = self._frames, self._words, self._undo_copy
        base = frame << PAGE_SHIFT
        copy[:] = frames[base : base + PAGE_SIZE]
        self._undo_of[0] = _UNDO + frame
        tail = self._start
        first = frame * PAGE_WORDS
        for index in _INDICES[self._live[frame]]:
            handle = words[first + index]
            size = handle & SIZE_MASK
            offset = handle >> _OFFSET_SHIFT & SIZE_MASK
            if offset != tail:  # else it lies there already, and what was moved before lies in front of it
                frames[base + tail : base + tail + size] = copy[offset : offset + size]
                words[first + index] = handle + ((tail - offset) << _OFFSET_SHIFT)
            tail += size
        self._undo_of[0] = 0
        self._tail[frame] = tail

    # ---- reading ---------------------------------------------------------------------------------------------------

    def zpage(self, ref: int, page: int) -> memoryview | None:
        """See Allocator."""
        frame = ref >> REF_BITS
        handle = self._words[frame * PAGE_WORDS + (ref & INDEX_MASK)]
        size = handle & SIZE_MASK
        offset = handle >> _OFFSET_SHIFT & SIZE_MASK
        if (
            handle >> _PAGE_SHIFT != _MARK | page
            or not 0 < size <= MAX_ZPAGE_SIZE
            or not self._start <= offset <= PAGE_SIZE - size
        ):
            return None
        start = (frame << PAGE_SHIFT) + offset
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
        index = ref & INDEX_MASK
        live = self._live[frame]
        if not live >> index & 1:
            raise AssertionError(f"no zpage at ref {ref}")
        handle = self._words[frame * PAGE_WORDS + index]
        size = handle & SIZE_MASK
        offset = handle >> _OFFSET_SHIFT & SIZE_MASK
        self._zpages[kind] -= 1
        self._zbytes[kind] -= size
        self._histogram[kind][(size + ROUND_UP) >> CHUNK_SHIFT] -= 1
        used = self._used[frame]
        tail = self._tail[frame]
        self._used[frame] = now_used = used - size
        now_tail = tail
        if offset + size == tail:
            self._tail[frame] = now_tail = offset
        was_all = live == self._all_live
        live ^= 1 << index
        self._live[frame] = live
        if state == ZOMBIE:
            return NO_FRAME
        if self._pins[frame]:
            end, now_end = tail, now_tail
        else:
            end, now_end = self._start + used, self._start + now_used
        before, now = (end + CHUNK_SIZE - 1) >> CHUNK_SHIFT, (now_end + CHUNK_SIZE - 1) >> CHUNK_SHIFT
        if was_all or before == NCHUNKS:
            if live and now == NCHUNKS:
                return NO_FRAME
            self._buddied[kind] -= 1
            if live:
                self._link_unbuddied(frame, now, kind)
                return NO_FRAME
        elif now != before or not live:
            self._unlink_unbuddied(frame, before, kind)
            if live:
                self._link_unbuddied(frame, now, kind)
                return NO_FRAME
        else:
            return NO_FRAME
        self._lru.remove(frame)
        return self._leave(frame, kind, Event.EMPTIED)

    # ---- what the rest of the allocator asks ---------------------------------------------------------------------

    def handle_at(self, ref: int) -> int:
        """See Allocator."""
        return self._words[(ref >> REF_BITS) * PAGE_WORDS + (ref & INDEX_MASK)] >> _PAGE_SHIFT & MAX_PAGE_NUMBER

    def _places(self, frame: int, live: int) -> Iterator[tuple[int, int, int]]:
        """(index, offset, size) of each zpage of a mask."""
        first = frame * PAGE_WORDS
        for index in _INDICES[live]:
            handle = self._words[first + index]
            yield index, handle >> _OFFSET_SHIFT & SIZE_MASK, handle & SIZE_MASK

    def _zpages_of(self, frame: int) -> Iterator[tuple[int, int]]:
        for index, _, size in self._places(frame, self._live[frame]):
            yield frame << REF_BITS | index, size

    def _is_empty(self, frame: int) -> bool:
        return not self._live[frame]

    def _list_of(self, frame: int) -> int:
        if self._live[frame] == self._all_live:
            return FULL
        end = self._tail[frame] if self._pins[frame] else self._start + self._used[frame]
        used = (end + CHUNK_SIZE - 1) >> CHUNK_SHIFT
        return used if used < NCHUNKS else FULL

    def _claim(self, frame: int, ref: int) -> int:
        handle = self._words[frame * PAGE_WORDS + (ref & INDEX_MASK)]
        size = handle & SIZE_MASK
        self._add(frame, ref & INDEX_MASK, handle >> _OFFSET_SHIFT & SIZE_MASK, size)
        return size

    def _clear(self, frame: int) -> None:
        self._live[frame] = self._used[frame] = 0

    def _check_frame(self, frame: int) -> None:
        if not self._live[frame]:
            assert not self._used[frame], f"frame {frame} is empty and uses {self._used[frame]} bytes"
            return
        places = sorted((offset, size) for _, offset, size in self._places(frame, self._live[frame]))
        end = self._start
        for offset, size in places:
            assert offset >= end, f"I1: the zpages of frame {frame} overlap"
            end = offset + size
        assert end <= self._tail[frame] <= PAGE_SIZE, (
            f"I1: frame {frame} ends at {end}, its tail is {self._tail[frame]}"
        )
        assert sum(size for _, size in places) == self._used[frame], f"frame {frame}: its bytes do not add up"
