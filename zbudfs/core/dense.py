# SPDX-License-Identifier: MIT
"""The dense packing: up to N zpages in each 4 KiB frame of RAM.

    | h0 | h1 | ... | h(N-1) |  zpage  |   zpage   | hole | zpage |          tail            |
    0                        8 N                                  ^ end of the used part

A frame begins with its directory: N handles of 8 bytes at fixed places. A handle is one word,

    63      56 55           24 23      12 11       0
    | layout  | page          | offset   | size     |

so a ref, frame and index, finds its zpage through the handle at that index, wherever in the frame it lies. Zpages lie
from left to right, byte to byte, and a new one goes to the start of the tail. A freed zpage leaves a hole, or joins the
tail if it was the last. When the tail is too short for a zpage and holes and tail together are not, the frame is
compacted: its zpages are moved together. Then the room is one piece. A compaction moves the bytes of one frame at most. It
never moves those of an unevictable frame or a zombie, since other code may be reading or writing them. So an unevictable
frame offers its tail alone.

A process that is killed in the middle of a compaction must leave every zpage whole. A zpage often overlaps its new place,
so there is an undo copy of the frame:

    1. The frame is copied to the end of the table.
    2. One 8-byte store records whose copy that is.
    3. The zpages are moved and the handles rewritten.
    4. One 8-byte store records that the compaction is complete.

`reset`, which begins every recovery, puts the copy back if there is one. Index and frame of a zpage never change, so the
page table stays as it is.

hot_dense.c does the same in C, step by step, compaction included and with the stores in the same order.

The unbuddied list of a frame follows from the bytes that it uses, directory included, rounded up to chunks. A frame that
has N zpages, or less than a chunk of room, is on none.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Final

from zbudfs.core.allocator import (
    EPHEMERAL,
    FULL,
    HANDLE_SIZE,
    INDEX_MASK,
    MAX_PAGE_NUMBER,
    MAX_ZPAGE_SIZE,
    MOST_ZPAGES,
    PERSISTENT,
    REF_BITS,
    SIZE_BITS,
    SIZE_MASK,
    Allocator,
)
from zbudfs.core.units import CHUNK_SIZE, NCHUNKS, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, WORD_SIZE

DEFAULT_ZPAGES: Final = 7
"""Measured (bench/packing.py): 7 is 2 to 8 % denser than 6 where pages are small, and as dense within 0.5 % elsewhere."""
FEWEST_ZPAGES: Final = 2

_LAYOUT: Final = 0xD1
"""The layout byte of a frame. Each handle contains it, so that handles of another layout are never valid here."""

_OFFSET_SHIFT: Final = SIZE_BITS
_PAGE_SHIFT: Final = 2 * SIZE_BITS
_MARK: Final = _LAYOUT << 32
"""The bits above the page number in a handle."""

_UNDO: Final = 0x756E646F << 32
"""Added to the number of the frame that has an undo copy. Hardly any other value looks like such a number."""


def _chunks_up_to(size_bytes: int) -> int:
    """Return the number of chunks that the first `size_bytes` bytes of a frame reach into."""
    return -(-size_bytes // CHUNK_SIZE)


def _lowest_free(live: int) -> int:
    """Return the lowest index that is not in a mask."""
    return (~live & (live + 1)).bit_length() - 1


class Dense(Allocator):
    """The allocator with up to `most_zpages` zpages to a frame. Its own columns, by frame:

        used    bytes of its zpages
        tail    where the tail starts
        live    mask of the indices in use

    I1 is: the zpages of the live indices do not overlap, and lie between the directory and `tail`. `used` is the sum of
    their sizes.
    """

    LAYOUT: ClassVar[int] = _LAYOUT
    OWN_WIDTHS: ClassVar[tuple[int, ...]] = (2, 2, 1)
    OWN_BYTES: ClassVar[int] = WORD_SIZE + PAGE_SIZE
    """The bytes of _UNDO + the number of the frame that has an undo copy (0: none), and of the copy."""

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
        """Forget all frames; see Allocator. A compaction that a kill has interrupted is undone first."""
        frame = self._undo_of[0] - _UNDO
        if 0 <= frame < self.nr_frames:
            self.frame_bytes(frame)[:] = self._undo_copy
        self._undo_of[0] = 0
        super().reset(populated)

    # ---- places in a frame ---------------------------------------------------------------------------------------

    def _handle(self, ref: int) -> tuple[int, int]:
        """Return (offset, size) from the handle at `ref`, in bytes."""
        handle = self._words[(ref >> REF_BITS) * PAGE_WORDS + (ref & INDEX_MASK)]
        return handle >> _OFFSET_SHIFT & SIZE_MASK, handle & SIZE_MASK

    def handle_at(self, ref: int) -> int:
        """Return the page that the handle at `ref` names; see Allocator."""
        return self._words[(ref >> REF_BITS) * PAGE_WORDS + (ref & INDEX_MASK)] >> _PAGE_SHIFT & MAX_PAGE_NUMBER

    def zpage(self, ref: int, page: int) -> memoryview | None:
        """Return the bytes of the zpage at `ref` if it is `page`'s, else None; see Allocator."""
        frame = ref >> REF_BITS
        handle = self._words[frame * PAGE_WORDS + (ref & INDEX_MASK)]
        offset, size = self._handle(ref)
        if handle >> _PAGE_SHIFT != _MARK | page or not 0 < size <= MAX_ZPAGE_SIZE:
            return None
        if not self._start <= offset <= PAGE_SIZE - size:
            return None
        start = (frame << PAGE_SHIFT) + offset
        return self._frames[start : start + size]

    def _places(self, frame: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index, offset, size) of each zpage of a frame."""
        live = self._live[frame]
        for index in range(self.most_zpages):
            if live >> index & 1:
                yield index, *self._handle(frame << REF_BITS | index)

    # ---- adding and removing -------------------------------------------------------------------------------------

    def _chunks_wanted(self, zpage_size: int) -> int:
        return _chunks_up_to(zpage_size)

    def _reserve(self, frame: int, size: int) -> int:
        if not self._live[frame]:
            self._tail[frame] = self._start
        elif self._tail[frame] + size > PAGE_SIZE:
            self._compact(frame)
        index, offset = _lowest_free(self._live[frame]), self._tail[frame]
        self._words[frame * PAGE_WORDS + index] = offset << _OFFSET_SHIFT | size  # without the layout it names no page
        self._add(frame, index, offset, size)
        return index

    def _fill(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        offset, size = self._handle(ref)
        frame = ref >> REF_BITS
        start = (frame << PAGE_SHIFT) + offset
        self._frames[start : start + size] = zpage
        handle = (_MARK | page) << _PAGE_SHIFT | offset << _OFFSET_SHIFT | size
        self._words[frame * PAGE_WORDS + (ref & INDEX_MASK)] = handle

    def _add(self, frame: int, index: int, offset: int, size: int) -> None:
        """Count a zpage with this index, offset and size as stored in the frame."""
        self._tail[frame] = max(self._tail[frame], offset + size) if self._live[frame] else offset + size
        self._used[frame] += size
        self._live[frame] |= 1 << index

    def _remove(self, ref: int) -> int:
        frame, index = ref >> REF_BITS, ref & INDEX_MASK
        if not self._live[frame] >> index & 1:
            raise AssertionError(f"no zpage at ref {ref}")
        offset, size = self._handle(ref)
        self._used[frame] -= size
        if offset + size == self._tail[frame]:
            self._tail[frame] = offset
        self._live[frame] ^= 1 << index
        return size

    def _overlaps(self, ref: int, size: int) -> bool:
        offset, _ = self._handle(ref)
        places = self._places(ref >> REF_BITS)  # they include the place of the ref itself, if it is taken
        return any(offset < other + other_size and other < offset + size for _, other, other_size in places)

    def _claim(self, ref: int) -> int:
        offset, size = self._handle(ref)
        self._add(ref >> REF_BITS, ref & INDEX_MASK, offset, size)
        return size

    def _compact(self, frame: int) -> None:
        """Move the room of a frame together, to its tail. If a kill interrupts the move, `reset` undoes it."""
        if self._pins[frame] or self._state[frame] not in (PERSISTENT, EPHEMERAL):
            raise AssertionError(f"frame {frame} must not be compacted: others use its bytes")
        frames, words, copy = self._frames, self._words, self._undo_copy
        base = frame << PAGE_SHIFT
        copy[:] = frames[base : base + PAGE_SIZE]
        self._undo_of[0] = _UNDO + frame
        tail = self._start
        first = frame * PAGE_WORDS
        for index, offset, size in list(self._places(frame)):
            if offset != tail:  # otherwise it is in place already, and all zpages moved before lie in front of it
                frames[base + tail : base + tail + size] = copy[offset : offset + size]
                words[first + index] += (tail - offset) << _OFFSET_SHIFT
            tail += size
        self._undo_of[0] = 0
        self._tail[frame] = tail

    # ---- queries of the base class ---------------------------------------------------------------------------------

    def _zpages_of(self, frame: int) -> Iterator[tuple[int, int]]:
        for index, _, size in self._places(frame):
            yield frame << REF_BITS | index, size

    def _is_empty(self, frame: int) -> bool:
        return not self._live[frame]

    def _list_of(self, frame: int) -> int:
        """Return the unbuddied list of a frame; see Allocator. An unevictable frame is not compacted: only its tail is room."""
        if self._live[frame] == self._all_live:
            return FULL
        end = self._tail[frame] if self._pins[frame] else self._start + self._used[frame]
        used = _chunks_up_to(end)
        return used if used < NCHUNKS else FULL

    def _clear(self, frame: int) -> None:
        self._live[frame] = self._used[frame] = 0

    def _check_frame(self, frame: int) -> None:
        if not self._live[frame]:
            assert not self._used[frame], f"frame {frame} is empty and uses {self._used[frame]} bytes"
            return
        places = sorted((offset, size) for _, offset, size in self._places(frame))
        end = self._start
        for offset, size in places:
            assert offset >= end, f"I1: the zpages of frame {frame} overlap"
            end = offset + size
        assert end <= self._tail[frame] <= PAGE_SIZE, (
            f"I1: frame {frame} ends at {end}, its tail is {self._tail[frame]}"
        )
        assert sum(size for _, size in places) == self._used[frame], f"frame {frame}: its bytes do not add up"
