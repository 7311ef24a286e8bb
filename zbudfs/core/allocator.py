# SPDX-License-Identifier: MIT
"""The base class of all allocators of zpages in frames, and the only interface of one that the other packages use.

An allocator packs zpages into 4 KiB frames of RAM: `zbud` two to a frame, `dense` up to seven.
docs/understand/packing.md states the rules that an allocator keeps. A ref names the place of a zpage:

    ref = number of the frame << REF_BITS | index of the zpage in it

A block of the backing file is a copy of a frame, so a place in a block is a ref with the block's number. Each zpage in a
frame, and so in a block, has a handle beside it, which names its page and its size. A raw frame (a page that did not
compress) has no room for a handle: the table has a column for the owner of a raw frame.

All packings share the states of a frame, the LRU lists, the unbuddied lists, the counters and reclaim:

    Matching is best fit without a scan. Unbuddied list n holds the frames that have room for another zpage and use n
    chunks; a 64-bit mask says which lists are not empty. The fullest frame with enough room is on the list of the highest
    bit of the mask below a bound. The LRU is approximate: a frame becomes recent when a zpage is added to it, and keeps
    its place when one is read or freed. Persistent frames (RAM holds the only copy) and ephemeral frames (clean copies
    of blocks) have lists of their own and are never matched with each other.

An allocator allocates and frees no frames: its caller hands them in, takes them back, and can count them. All state is
typed columns over one buffer of the caller, and every operation is O(1).

This module, zbud.py and dense.py are the specification. hot.c, hot_disk.c, hot_zbud.c and hot_dense.c do the common
cases over the same columns, with the same steps in the same order; tests compare every byte. The counters have the names
that the kernel's zbud gives them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple

from zbudfs.core._hot import Hot
from zbudfs.core.lists import IndexLists
from zbudfs.core.page_table import PageTable
from zbudfs.core.units import CHUNK_SIZE, NCHUNKS, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, WORD_SIZE

REF_BITS: Final = 3
"""Bits of a ref below the number of the frame or block: the index of a zpage. The page table has 36 bits for a ref, so
frames and blocks have 33, twice what the largest device (16 TiB) needs."""

INDEX_MASK: Final = (1 << REF_BITS) - 1

MOST_ZPAGES: Final = INDEX_MASK
"""Zpages that a frame may hold in any packing: one fewer than there are indices. A block has one byte for its live
zpages, and its last bit says that the block is being read."""

NO_REF: Final = -1
"""The ref that stands for "none" in return values."""

HANDLE_SIZE: Final = 8
"""Bytes of a handle. It counts towards the chunks of its zpage."""

SIZE_BITS: Final = 12
SIZE_MASK: Final = (1 << SIZE_BITS) - 1
MAX_PAGE_NUMBER: Final = (1 << 32) - 1
"""Largest page number. Page numbers are 32 bits wide (16 TiB of device): the owner of a raw frame is a 4-byte column."""

MAX_CHUNKS: Final = NCHUNKS - 1
"""Most chunks of a zpage. As in the kernel, one chunk of a frame is never used: a page that needs it is better kept raw."""

PERSISTENT_KIND: Final = 0
EPHEMERAL_KIND: Final = 1
KINDS: Final = ("pers", "eph")

FULL: Final = 0
"""The number that replaces an unbuddied list for a frame without room, which is on none: list 0 would be empty frames."""

NO_LIST: Final = -1
"""The number that replaces an unbuddied list for a raw frame or a zombie, which is on none."""

FITS: Final = tuple((1 << (NCHUNKS - chunks + 1)) - 2 for chunks in range(NCHUNKS))
"""The mask of the unbuddied lists whose frames have enough room, for each number of chunks wanted."""

_ENDS: Final = (2, 2, 2 * NCHUNKS, 2 * NCHUNKS)
"""Entries of each of the first columns that belong to no frame: the ends of the lists."""

_PAIRS: Final = 11
_COUNTERS: Final = 2 * _PAIRS + 4 * NCHUNKS
"""Numbers of all counters: pairs (persistent, ephemeral), then two rows of NCHUNKS, and again two rows of NCHUNKS."""


class FrameState(IntEnum):
    """The state of a frame. NEXT has the transitions."""

    FREE = 0
    """Not the allocator's: the caller owns it."""
    PERSISTENT = 1
    """RAM holds the only copy of its zpages."""
    EPHEMERAL = 2
    """A clean copy of a block: it can be dropped without any I/O."""
    ZOMBIE = 3
    """A persistent frame being written back: readable, never matched, and any of its zpages may be freed at any moment."""
    DYING = 4
    """An ephemeral frame being dropped: frees of its zpages are ignored."""


class Event(IntEnum):
    """An event that changes the state of a frame."""

    PERSISTENT_CREATED = 0
    EPHEMERAL_CREATED = 1
    WRITEBACK_BEGUN = 2
    WRITEBACK_FAILED = 3
    WRITEBACK_DONE = 4
    DROP_BEGUN = 5
    DROP_DONE = 6
    EMPTIED = 7


NEXT: Final[Mapping[tuple[FrameState, Event], FrameState]] = {
    (FrameState.FREE, Event.PERSISTENT_CREATED): FrameState.PERSISTENT,
    (FrameState.FREE, Event.EPHEMERAL_CREATED): FrameState.EPHEMERAL,
    (FrameState.PERSISTENT, Event.EMPTIED): FrameState.FREE,
    (FrameState.PERSISTENT, Event.WRITEBACK_BEGUN): FrameState.ZOMBIE,
    (FrameState.ZOMBIE, Event.WRITEBACK_FAILED): FrameState.PERSISTENT,  # the frame still has the data
    (FrameState.ZOMBIE, Event.WRITEBACK_DONE): FrameState.FREE,
    (FrameState.EPHEMERAL, Event.EMPTIED): FrameState.FREE,
    (FrameState.EPHEMERAL, Event.DROP_BEGUN): FrameState.DYING,
    (FrameState.DYING, Event.DROP_DONE): FrameState.FREE,
}
"""The transitions. An event in a state that has none here is a bug of the caller: AssertionError."""

FREE, PERSISTENT, EPHEMERAL, ZOMBIE, DYING = (int(state) for state in FrameState)


class Resident(NamedTuple):
    """One zpage in a frame."""

    ref: int
    """Its place: frame and index."""
    page: int
    """The page that its handle names."""


def max_zpage_size() -> int:
    """Return the size of the largest zpage that can be stored, in bytes."""
    return MAX_CHUNKS * CHUNK_SIZE - HANDLE_SIZE


MAX_ZPAGE_SIZE: Final = max_zpage_size()


def chunks_for(zpage_size: int) -> int:
    """Return the chunks that a zpage of `zpage_size` bytes takes with its handle; a one-byte zpage takes a whole chunk."""
    return -(-(HANDLE_SIZE + zpage_size) // CHUNK_SIZE)


class Allocator(ABC):
    """The allocator over `nr_frames` frames.

    frames: a writable memoryview of bytes. Frame n is the 4096 bytes from n * 4096 on. It may be longer than the frames
        that the allocator manages: `zpage` can read the rest, where the bounce frames are.
    table: a zeroed writable memoryview of `table_size(nr_frames)` bytes.

    Columns of the table, by frame (`check` checks the invariants below):

        lru next/prev               on an LRU list iff PERSISTENT or EPHEMERAL
        bud next/prev               on an unbuddied list iff on an LRU list, not raw, not empty, and with room (`_list_of`)
        owner                       1 + the page of a raw frame, 0 for any other
        state                       FrameState
        pins                        fills and reads under way: the kernel's `unevictable`
        and the packing's own       OWN_WIDTHS has the bytes of an entry of each

    The counters follow the columns, then OWN_BYTES of the packing. The counters that only grow outlive the process: `reset`
    keeps them.

    I1: the zpages of a frame never overlap.
    I2: a FREE frame has no zpage, no pin, and is on no list.
    I3: bit n of the mask is set iff unbuddied list n is not empty.
    I4: each counter equals a recount of the frames.

    With `attach` the constructor writes nothing, and `reset` must come before any other call: another process may still use
    the memory.
    """

    LAYOUT: ClassVar[int]
    """A byte that identifies the layout of a frame, changed whenever that changes. No two packings have the same."""
    OWN_WIDTHS: ClassVar[tuple[int, ...]]
    """Bytes of an entry of each column that only this packing has."""
    OWN_BYTES: ClassVar[int] = 0
    """Bytes at the end of the table that belong to no frame, a multiple of 8."""
    most_zpages: int
    """Zpages that a frame can hold. As many fills of one frame can be under way at once."""

    def __init__(self, frames: memoryview, table: memoryview, nr_frames: int, *, attach: bool) -> None:
        if len(table) < self.table_size(nr_frames):
            raise ValueError(f"a table of {len(table)} bytes is too small for {nr_frames} frames")
        self.nr_frames = nr_frames
        self._frames = frames
        self._words = frames.cast("Q")
        columns = [table[offset : offset + length] for offset, length in self._columns(nr_frames)]
        lru_next, lru_prev, bud_next, bud_prev, owner, state, pins, *self._own_columns = columns
        self._owner = owner.cast("I")
        self._state = state
        self._pins = pins
        counters_start, counters_length = self._counters_span(nr_frames)
        own_start = counters_start + counters_length
        self._own_bytes = table[own_start : own_start + self.OWN_BYTES]
        self._lru = IndexLists(lru_next.cast("I"), lru_prev.cast("I"), nr_frames, 2, attach=True)
        self._budlists = IndexLists(bud_next.cast("I"), bud_prev.cast("I"), nr_frames, 2 * NCHUNKS, attach=True)
        self._map_counters(table[counters_start:own_start].cast("q"))
        if not attach:
            self.reset()

    def _map_counters(self, numbers: memoryview) -> None:
        """Give the counters their names, each by kind: [persistent, ephemeral]. C counts here too, in the same order."""
        self._counters = numbers
        self._masks = numbers[:2].cast("B").cast("Q")
        (
            self._pageframes,
            self._zpages,
            self._zbytes,
            self._cumul_zpages,
            self._cumul_zbytes,
            self._buddied,
            self._unbuddied_count,
            self._evicted_pageframes,
            self._zombie_count,
            self._raw_count,
        ) = (numbers[at : at + 2] for at in range(2, 2 * _PAIRS, 2))
        rows = [numbers[at : at + NCHUNKS] for at in range(2 * _PAIRS, _COUNTERS, NCHUNKS)]
        self._unbuddied = rows[:2]
        self._histogram = rows[2:]

    def _zero_counters(self) -> None:
        """Set the counters of the present contents to zero. The counters that only grow keep their values."""
        grown = (self._cumul_zpages, self._cumul_zbytes, self._evicted_pageframes)
        kept = [pair.tolist() for pair in grown]
        self._counters.cast("B")[:] = bytes(WORD_SIZE * _COUNTERS)
        for pair, values in zip(grown, kept, strict=True):
            pair[PERSISTENT_KIND], pair[EPHEMERAL_KIND] = values

    def hot_path(self, table: PageTable, stored_at: memoryview) -> Hot:
        """Return the hot path (hot.c) over this allocator's tables, the page table, and the pool's column by frame."""
        lists = (self._lru.nexts, self._lru.prevs, self._budlists.nexts, self._budlists.prevs)
        columns = (self._owner, self._state, self._pins, self._counters, stored_at, table.touched)
        own = (*self._own_columns, self._own_bytes)
        shared = (table.entries, table.numbers, self._frames, *lists, *columns)
        return Hot(self.LAYOUT, self.most_zpages, self.nr_frames, *shared, *own)

    # ---- the table's layout ----------------------------------------------------------------------------------

    @classmethod
    def _widths(cls) -> tuple[int, ...]:
        """Return the bytes of an entry of each column."""
        return (4, 4, 4, 4, 4, 1, 1, *cls.OWN_WIDTHS)

    @classmethod
    def _columns(cls, nr_frames: int) -> list[tuple[int, int]]:
        """Return (offset, length) of each column, in bytes."""
        columns = []
        offset = 0
        for number, width in enumerate(cls._widths()):
            length = width * (nr_frames + (_ENDS[number] if number < len(_ENDS) else 0))
            columns.append((offset, length))
            offset += -(-length // 8) * 8
        return columns

    @classmethod
    def table_size(cls, nr_frames: int) -> int:
        """Return the bytes of the table for `nr_frames` frames: 24 (zbud) or 27 (dense) a frame, and up to 8 KiB."""
        return sum(cls._counters_span(nr_frames)) + cls.OWN_BYTES

    @classmethod
    def _counters_span(cls, nr_frames: int) -> tuple[int, int]:
        """Return (offset, length) of the counters, which follow the columns, in bytes."""
        offset, length = cls._columns(nr_frames)[-1]
        return offset + -(-length // WORD_SIZE) * WORD_SIZE, WORD_SIZE * _COUNTERS

    @classmethod
    def table_spans(cls, nr_frames: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return (offset, length) of the parts of the table that frames `first` .. `first + count - 1` use, in bytes.

        A caller needs them to give the table memory only where the frames have memory.
        """
        spans = zip(cls._columns(nr_frames), cls._widths(), strict=True)
        return [(offset + first * width, count * width) for (offset, _), width in spans]

    @classmethod
    def fixed_spans(cls, nr_frames: int) -> list[tuple[int, int]]:
        """Return (offset, length) of the parts that belong to no frame: list ends, counters, and the packing's own bytes."""
        lists = zip(cls._columns(nr_frames), _ENDS, strict=False)
        ends = [(offset + 4 * nr_frames, 4 * count) for (offset, _), count in lists]
        offset, length = cls._counters_span(nr_frames)
        return [*ends, (offset, length + cls.OWN_BYTES)]

    # ---- decisions of a packing --------------------------------------------------------------------------------

    @abstractmethod
    def zpage(self, ref: int, page: int) -> memoryview | None:
        """Return the bytes of the zpage at `ref`. None if its handle does not name `page`, or has an impossible size.

        The bytes are a view of the frame, valid until the next operation that changes the frame.
        """

    @abstractmethod
    def handle_at(self, ref: int) -> int:
        """Return the page that the handle at `ref` names, which need not be the page that is there."""

    @abstractmethod
    def _chunks_wanted(self, zpage_size: int) -> int:
        """Return the chunks that must be free in a frame for another zpage of this size."""

    @abstractmethod
    def _reserve(self, frame: int, size: int) -> int:
        """Take a place for a zpage in a frame that has room for it, and return its index. Its handle names no page yet."""

    @abstractmethod
    def _fill(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        """Copy a zpage to the place that `_reserve` took, then write its handle."""

    @abstractmethod
    def _remove(self, ref: int) -> int:
        """Forget the zpage at `ref` and return its size. AssertionError, without a change, if there is none."""

    @abstractmethod
    def _overlaps(self, ref: int, size: int) -> bool:
        """Return whether the zpage that the handle at `ref` describes overlaps another zpage of its frame."""

    @abstractmethod
    def _claim(self, ref: int) -> int:
        """Count the zpage at `ref`, which is in the frame with its handle already, as stored; return its size."""

    @abstractmethod
    def _zpages_of(self, frame: int) -> Iterable[tuple[int, int]]:
        """Yield (ref, size in bytes) of each zpage in a frame that is not raw and not being filled."""

    @abstractmethod
    def _is_empty(self, frame: int) -> bool:
        """Return whether a frame that is not raw has no zpage."""

    @abstractmethod
    def _list_of(self, frame: int) -> int:
        """Return the unbuddied list of a frame with zpages: the number of chunks that it uses; FULL if it has no room."""

    @abstractmethod
    def _clear(self, frame: int) -> None:
        """Forget all zpages of a frame that is not raw."""

    @abstractmethod
    def _check_frame(self, frame: int) -> None:
        """Raise AssertionError if the packing's own columns do not agree with the frame, which must not be being filled."""

    # ---- start and recovery ------------------------------------------------------------------------------------

    def reset(self, populated: Iterable[tuple[int, int]] = ()) -> None:
        """Forget all frames. `populated` has the frames, as (first, count), whose part of the table may not be zeros."""
        for first, count in populated:
            for column in (self._state, self._pins):
                column[first : first + count] = bytes(count)
            self._owner[first : first + count] = memoryview(bytes(4 * count)).cast("I")
            for column, width in zip(self._own_columns, self.OWN_WIDTHS, strict=True):
                column[width * first : width * (first + count)] = bytes(width * count)
        self._lru.clear()
        self._budlists.clear()
        self._zero_counters()

    def restore(self, ref: int, page: int) -> bool:
        """Claim the zpage at `ref` for `page`, after `reset`. False if its handle names another, or its place is taken.

        The caller must call `restore_done` for the frame when it has claimed all zpages.
        """
        frame = ref >> REF_BITS
        if frame >= self.nr_frames or ref & INDEX_MASK >= self.most_zpages or self._owner[frame]:
            return False
        zpage = self.zpage(ref, page)
        if zpage is None or self._overlaps(ref, len(zpage)):
            return False
        self._count(PERSISTENT_KIND, self._claim(ref), 1)
        return True

    def restore_raw(self, ref: int, page: int) -> bool:
        """Claim the whole frame of `ref` for the raw page `page`, after `reset`. False if it is taken."""
        frame = ref >> REF_BITS
        if frame >= self.nr_frames or ref & INDEX_MASK or self._owner[frame] or not self._is_empty(frame):
            return False
        self._owner[frame] = page + 1
        self._raw_count[PERSISTENT_KIND] += 1
        return True

    def restore_done(self, frame: int) -> bool:
        """Make a frame, of which the caller has claimed all zpages, a persistent frame. False if none was claimed."""
        raw = self._owner[frame]
        if not raw and self._is_empty(frame):
            return False
        self._state[frame] = PERSISTENT
        self._pageframes[PERSISTENT_KIND] += 1
        if raw:
            self._lru.prepend(PERSISTENT_KIND, frame)
            return True
        self._lru.append(PERSISTENT_KIND, frame)
        self._enlist(frame, PERSISTENT_KIND)
        return True

    # ---- storing a zpage ---------------------------------------------------------------------------------------

    def match(self, page: int, zpage: bytes | memoryview) -> int:
        """Store a zpage beside others in a persistent frame, and return its ref; NO_REF if no frame has room."""
        ref = self.match_prep(len(zpage))
        if ref != NO_REF:
            self.match_finish(ref, page, zpage)
        return ref

    def match_prep(self, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """Take the place for a zpage in the fullest frame with room for it, and return the ref; NO_REF if there is none.

        The frame is unevictable until `match_finish`. Raises ValueError for a size over `max_zpage_size()`.
        """
        self._check_size(zpage_size)
        fitting = self._masks[kind] & FITS[self._chunks_wanted(zpage_size)]
        if not fitting:
            return NO_REF
        used = fitting.bit_length() - 1
        frame = self._budlists.oldest(kind * NCHUNKS + used)
        self._delist(frame, kind, used)
        self._lru.remove(frame)
        self._lru.append(kind, frame)
        return self._take_place(frame, kind, zpage_size)

    def create_prep(self, frame: int, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """Take over a free frame from the caller, take the place of its first zpage, and return the ref.

        The frame is unevictable until `create_finish`. `match_prep` may already find it.
        """
        self._check_size(zpage_size)
        self._begin(frame, kind)
        self._lru.append(kind, frame)
        return self._take_place(frame, kind, zpage_size)

    def match_finish(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        """Fill the place that `match_prep` took: copy the zpage, write its handle, and let the frame be evicted again.

        `zpage` must be as long as the size that the prep was given.
        """
        frame = ref >> REF_BITS
        kind = self._kind_of(frame)
        self._fill(ref, page, zpage)
        before = self._list_of(frame)
        self._pins[frame] -= 1
        self._relist(frame, kind, before)
        self._count_stored(kind, len(zpage))

    create_finish = match_finish

    def _check_size(self, zpage_size: int) -> None:
        if zpage_size > MAX_ZPAGE_SIZE:
            raise ValueError(f"a zpage of {zpage_size} bytes is larger than the {MAX_ZPAGE_SIZE} that a frame can hold")

    def _begin(self, frame: int, kind: int) -> None:
        """Take over a frame from the caller as one of this kind."""
        self._fire(frame, Event.EPHEMERAL_CREATED if kind == EPHEMERAL_KIND else Event.PERSISTENT_CREATED)
        self._pageframes[kind] += 1

    def _take_place(self, frame: int, kind: int, zpage_size: int) -> int:
        """Take a place in a frame that is on no unbuddied list, make the frame unevictable, and return the ref."""
        index = self._reserve(frame, zpage_size)
        self._pins[frame] += 1
        self._enlist(frame, kind)
        return frame << REF_BITS | index

    # ---- freeing a zpage ---------------------------------------------------------------------------------------

    def free(self, ref: int) -> int:
        """Forget the zpage at `ref`. Return its frame if that is empty now and so the caller's again, else NO_FRAME.

        `writeback_done` or `writeback_failed` hands a zombie back. A free of a zpage in a dying frame is ignored.
        """
        frame = ref >> REF_BITS
        state = self._state[frame]
        if state == DYING:
            return NO_FRAME
        kind = self._kind_of(frame)
        before = NO_LIST if self._owner[frame] or state == ZOMBIE else self._list_of(frame)
        if self._owner[frame]:
            self._forget_raw(frame, kind)
        else:
            self._count(kind, self._remove(ref), -1)
        if state == ZOMBIE:
            return NO_FRAME
        if not self._is_empty(frame):
            self._relist(frame, kind, before)
            return NO_FRAME
        if before != NO_LIST:
            self._delist(frame, kind, before)
        self._lru.remove(frame)
        return self._leave(frame, kind, Event.EMPTIED)

    # ---- raw pages, and frames filled from a block -------------------------------------------------------------

    def create_raw(self, frame: int, page: int, content: bytes | memoryview) -> int:
        """Take over a free frame, store a whole page in it uncompressed, and return the ref.

        Raw frames are the first to be written back: they hold one page where others hold several.
        """
        self._begin(frame, PERSISTENT_KIND)
        self.frame_bytes(frame)[:] = content
        self._owner[frame] = page + 1
        self._raw_count[PERSISTENT_KIND] += 1
        self._lru.prepend(PERSISTENT_KIND, frame)
        return frame << REF_BITS

    def fill_prep(self, frame: int) -> None:
        """Take over a free frame for a copy of a block; it is unevictable and empty until one of the finish functions."""
        self._begin(frame, EPHEMERAL_KIND)
        self._pins[frame] = 1
        self._lru.append(EPHEMERAL_KIND, frame)

    def fill_cancel(self, frame: int) -> None:
        """Hand back a frame of `fill_prep` that was not filled."""
        self._pins[frame] -= 1
        self._lru.remove(frame)
        self._leave(frame, EPHEMERAL_KIND, Event.EMPTIED)

    def fill_finish(self, frame: int, refs: Sequence[int]) -> None:
        """Count the zpages at `refs` (refs in this frame) as stored; the frame now holds the copy of the block."""
        for ref in refs:
            self._count_stored(EPHEMERAL_KIND, self._claim(ref))
        self._pins[frame] -= 1
        self._enlist(frame, EPHEMERAL_KIND)

    def fill_finish_raw(self, frame: int, page: int) -> int:
        """Count the raw page `page` as stored; the frame now holds its copy. Return the ref."""
        self._owner[frame] = page + 1
        self._raw_count[EPHEMERAL_KIND] += 1
        self._pins[frame] -= 1
        return frame << REF_BITS

    # ---- reading a frame ---------------------------------------------------------------------------------------

    def residents(self, frame: int) -> list[Resident]:
        """Return the zpages of a frame, read from the frame itself. The frame must not be one that is being filled."""
        owner = self._owner[frame]
        if owner:
            return [Resident(frame << REF_BITS, owner - 1)]
        return [Resident(ref, self.handle_at(ref)) for ref, _ in self._zpages_of(frame)]

    def frame_bytes(self, frame: int) -> memoryview:
        """Return the 4096 bytes of a frame, as a view."""
        start = frame << PAGE_SHIFT
        return self._frames[start : start + PAGE_SIZE]

    def is_raw(self, frame: int) -> bool:
        """Return whether the frame holds a raw page."""
        return self._owner[frame] != 0

    def is_ephemeral(self, frame: int) -> bool:
        """Return whether the frame is a clean copy of a block."""
        return self._state[frame] == EPHEMERAL

    def state(self, frame: int) -> FrameState:
        """Return the state of the frame."""
        return FrameState(self._state[frame])

    # ---- reclaim -------------------------------------------------------------------------------------------------

    def oldest(self, kind: int) -> int:
        """Return the least recently used frame of a kind that is not unevictable, or NO_FRAME.

        It skips the unevictable frames. There are never more of them than fills and reads under way.
        """
        return next(self.evictable(kind), NO_FRAME)

    def evictable(self, kind: int) -> Iterator[int]:
        """Yield the frames of a kind that are not unevictable, oldest first. The caller may remove the one just yielded."""
        pins = self._pins
        return (frame for frame in self._lru.members(kind) if not pins[frame])

    def writeback_begin(self, frame: int) -> None:
        """Make a persistent frame a zombie: on no list and readable; any of its zpages may be freed at any moment."""
        if self._pins[frame]:
            raise AssertionError(f"frame {frame} is unevictable")
        self._fire(frame, Event.WRITEBACK_BEGUN)
        self._lru.remove(frame)
        self._leave_unbuddied(frame, PERSISTENT_KIND)
        self._zombie_count[PERSISTENT_KIND] += 1

    def writeback_failed(self, frame: int) -> int:
        """Make a zombie, whose write failed, the oldest persistent frame; return it if it is empty, else NO_FRAME."""
        self._zombie_count[PERSISTENT_KIND] -= 1
        self._fire(frame, Event.WRITEBACK_FAILED)
        raw = self._owner[frame]
        if not raw and self._is_empty(frame):
            return self._leave(frame, PERSISTENT_KIND, Event.EMPTIED)
        self._lru.prepend(PERSISTENT_KIND, frame)
        if not raw:
            self._enlist(frame, PERSISTENT_KIND)
        return NO_FRAME

    def writeback_done(self, frame: int) -> int:
        """Hand back a zombie that is written, after the entries of its pages name its block; return the frame."""
        self._zombie_count[PERSISTENT_KIND] -= 1
        self._forget_residents(frame, PERSISTENT_KIND)
        self._evicted_pageframes[PERSISTENT_KIND] += 1
        return self._leave(frame, PERSISTENT_KIND, Event.WRITEBACK_DONE)

    def drop_begin(self, frame: int) -> None:
        """Make an ephemeral frame a dying frame: on no list; frees of its zpages are ignored."""
        if self._pins[frame]:
            raise AssertionError(f"frame {frame} is unevictable")
        self._fire(frame, Event.DROP_BEGUN)
        self._lru.remove(frame)
        self._leave_unbuddied(frame, EPHEMERAL_KIND)

    def drop_done(self, frame: int) -> int:
        """Hand back a dying frame, to which no entry refers any more; return the frame."""
        self._forget_residents(frame, EPHEMERAL_KIND)
        self._evicted_pageframes[EPHEMERAL_KIND] += 1
        return self._leave(frame, EPHEMERAL_KIND, Event.DROP_DONE)

    # ---- shared steps --------------------------------------------------------------------------------------------

    def _fire(self, frame: int, event: Event) -> None:
        state = FrameState(self._state[frame])
        following = NEXT.get((state, event))
        if following is None:
            raise AssertionError(f"frame {frame} is {state.name}: {event.name} cannot happen to it")
        self._state[frame] = following

    def _leave(self, frame: int, kind: int, event: Event) -> int:
        """Hand a frame back to the caller; return the frame."""
        self._fire(frame, event)
        self._pageframes[kind] -= 1
        return frame

    def _kind_of(self, frame: int) -> int:
        """Return the kind of a frame that is not free."""
        return EPHEMERAL_KIND if self._state[frame] in (EPHEMERAL, DYING) else PERSISTENT_KIND

    def _enlist(self, frame: int, kind: int) -> None:
        """Put a frame with zpages on its unbuddied list, or count it as buddied if it has no room."""
        used = self._list_of(frame)
        if used == FULL:
            self._buddied[kind] += 1
            return
        self._budlists.append(kind * NCHUNKS + used, frame)
        self._unbuddied[kind][used] += 1
        self._masks[kind] |= 1 << used
        self._unbuddied_count[kind] += 1

    def _delist(self, frame: int, kind: int, used: int) -> None:
        """Take a frame off unbuddied list `used`; if that is FULL, stop counting the frame as buddied."""
        if used == FULL:
            self._buddied[kind] -= 1
            return
        self._budlists.remove(frame)
        self._unbuddied[kind][used] -= 1
        if not self._unbuddied[kind][used]:
            self._masks[kind] &= ~(1 << used)
        self._unbuddied_count[kind] -= 1

    def _relist(self, frame: int, kind: int, before: int) -> None:
        """Move a frame from list `before` to the list where it belongs now. If that is the same, it keeps its place."""
        if self._list_of(frame) != before:
            self._delist(frame, kind, before)
            self._enlist(frame, kind)

    def _leave_unbuddied(self, frame: int, kind: int) -> None:
        """Take a frame off its unbuddied list; a raw frame is on none."""
        if not self._owner[frame]:
            self._delist(frame, kind, self._list_of(frame))

    def _forget_raw(self, frame: int, kind: int) -> None:
        self._owner[frame] = 0
        self._raw_count[kind] -= 1

    def _forget_residents(self, frame: int, kind: int) -> None:
        if self._owner[frame]:
            self._forget_raw(frame, kind)
            return
        for _, size in self._zpages_of(frame):
            self._count(kind, size, -1)
        self._clear(frame)

    def _count(self, kind: int, size: int, change: int) -> None:
        """Count one zpage more (1) or one fewer (-1)."""
        self._zpages[kind] += change
        self._zbytes[kind] += change * size
        self._histogram[kind][chunks_for(size)] += change

    def _count_stored(self, kind: int, size: int) -> None:
        """Count a zpage that was stored just now."""
        self._count(kind, size, 1)
        self._cumul_zpages[kind] += 1
        self._cumul_zbytes[kind] += size

    # ---- statistics and checks ---------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Return the kernel's debugfs counters by name, sizes in bytes. Zombies are pageframes; raw pages are no zpages."""
        found: dict[str, int] = {}
        for kind, prefix in enumerate(KINDS):
            found[f"{prefix}_pageframes"] = self._pageframes[kind]
            found[f"{prefix}_zpages"] = self._zpages[kind]
            found[f"{prefix}_zbytes"] = self._zbytes[kind]
            found[f"{prefix}_cumul_zpages"] = self._cumul_zpages[kind]
            found[f"{prefix}_cumul_zbytes"] = self._cumul_zbytes[kind]
            found[f"{prefix}_buddied_count"] = self._buddied[kind]
            found[f"{prefix}_unbuddied_count"] = self._unbuddied_count[kind]
            found[f"{prefix}_evicted_pageframes"] = self._evicted_pageframes[kind]
            found[f"{prefix}_zombie_count"] = self._zombie_count[kind]
            found[f"{prefix}_raw_count"] = self._raw_count[kind]
        return found

    def unbuddied_lists(self) -> list[int]:
        """Return the number of frames on each unbuddied list: entry n counts those with room that use n chunks."""
        return [a + b for a, b in zip(*self._unbuddied, strict=True)]

    def chunk_histogram(self) -> list[int]:
        """Return the number of zpages of each size: entry n counts those of n chunks."""
        return [a + b for a, b in zip(*self._histogram, strict=True)]

    def nr_frames_of(self, kind: int) -> int:
        """Return the number of frames of a kind."""
        return self._pageframes[kind]

    def check(self) -> None:
        """Recount everything from the frames; AssertionError where a list, a mask or a counter differs. O(frames)."""
        seen: dict[str, list[int]] = {
            name: [0, 0]
            for name in ("pageframes", "zpages", "zbytes", "buddied", "unbuddied_count", "zombie_count", "raw_count")
        }
        histogram = [[0] * NCHUNKS, [0] * NCHUNKS]
        expected_lists: list[set[int]] = [set() for _ in range(2 * NCHUNKS)]
        expected_lru: list[set[int]] = [set(), set()]
        for frame in range(self.nr_frames):
            state = FrameState(self._state[frame])
            raw, empty, pins = self._owner[frame], self._is_empty(frame), self._pins[frame]
            assert pins <= self.most_zpages, f"frame {frame} has {pins} pins"
            if state is FrameState.FREE:
                assert not raw and empty and not pins, f"I2: free frame {frame} is not empty"
                continue
            kind = EPHEMERAL_KIND if state in (FrameState.EPHEMERAL, FrameState.DYING) else PERSISTENT_KIND
            seen["pageframes"][kind] += 1
            listed = state in (FrameState.PERSISTENT, FrameState.EPHEMERAL)
            seen["zombie_count"][kind] += state is FrameState.ZOMBIE
            if listed:
                expected_lru[kind].add(frame)
            if raw:
                assert empty, f"frame {frame} is raw and holds zpages"
                seen["raw_count"][kind] += 1
                continue
            if listed and not empty:
                used = self._list_of(frame)
                if used == FULL:
                    seen["buddied"][kind] += 1
                else:
                    seen["unbuddied_count"][kind] += 1
                    expected_lists[kind * NCHUNKS + used].add(frame)
            assert not listed or not empty or pins, f"frame {frame} is {state.name} and empty"
            if pins:
                continue  # handles and counters follow at the finish
            self._check_frame(frame)
            for _, size in self._zpages_of(frame):
                seen["zpages"][kind] += 1
                seen["zbytes"][kind] += size
                histogram[kind][chunks_for(size)] += 1
        for kind in (PERSISTENT_KIND, EPHEMERAL_KIND):
            self._lru.check(kind)
            on_lru = list(self._lru.members(kind))
            assert len(on_lru) == len(set(on_lru)), "a frame is on an LRU list twice"
            assert set(on_lru) == expected_lru[kind], f"LRU list {kind} has other frames than it should"
            for used in range(NCHUNKS):
                self._budlists.check(kind * NCHUNKS + used)
                members = list(self._budlists.members(kind * NCHUNKS + used))
                assert set(members) == expected_lists[kind * NCHUNKS + used], f"unbuddied list {kind}/{used} is wrong"
                assert len(members) == self._unbuddied[kind][used], f"length of unbuddied list {kind}/{used} is wrong"
                assert bool(members) == bool(self._masks[kind] >> used & 1), f"I3: mask bit {kind}/{used} is wrong"
        for name, value in seen.items():
            if name in ("zpages", "zbytes") and any(self._pins):
                continue
            mine = list(getattr(self, f"_{name}"))
            assert mine == value, f"I4: {name} is {mine}, a recount gives {value}"
        if not any(self._pins):
            assert histogram == [row.tolist() for row in self._histogram], "I4: the chunk histogram is wrong"
