# SPDX-License-Identifier: MIT
"""What every allocator of zpages in frames has in common, and all that the rest of the program may know of one.

An allocator packs zpages into 4 KiB frames of RAM: `zbud` two to a frame, `dense` up to seven. It says where a zpage
is with a ref, which nobody takes apart but by these names:

    ref = number of the frame << REF_BITS | index of the zpage in it

A block of the backing file is a copy of a frame, so a place in a block is the same with the block's number. A frame,
and so a block, says by itself whose data it holds: each zpage has a handle there, which names its page and its size.
A raw frame (a page that did not compress) has no room for a handle; its owner stands in the table.

Common are the states of a frame, the LRU lists, the unbuddied lists, the counters and all of reclaim:

    Matching is best fit without a scan: unbuddied list n holds the frames that have room for another zpage and use n
    chunks, and a 64-bit mask says which lists are not empty. The fullest frame that still has room is the highest bit
    of the mask below a bound. The LRU is approximate: a frame becomes recent when a zpage is added to it, and keeps its
    place when one is read or freed. Persistent frames (RAM holds the only copy) and ephemeral ones (clean copies of what
    the backing file holds) have lists of their own and are never matched with each other.

An allocator neither allocates nor frees memory: it is handed a free frame and hands one back, so that its caller can
count. All its state is typed columns over one buffer of the caller, and every operation is O(1).

The names of the counters are the kernel's.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple

from zbudfs.core import hot
from zbudfs.core.lists import IndexLists
from zbudfs.core.page_table import PageTable
from zbudfs.core.units import CHUNK_SHIFT, CHUNK_SIZE, NCHUNKS, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, WORD_SIZE

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
"""Page numbers are 32 bits wide (16 TiB of device): the owner of a raw frame is a 4-byte column."""

MAX_CHUNKS: Final = NCHUNKS - 1
"""One chunk of a frame is never given away, as in the kernel: a zpage that needs all of it is better kept raw."""

PERSISTENT_KIND: Final = 0
EPHEMERAL_KIND: Final = 1
KINDS: Final = ("pers", "eph")

CUMULATIVE_COUNTERS: Final = 6
"""How many numbers `Allocator.cumulative` gives."""

FULL: Final = 0
"""What stands for an unbuddied list where a frame is on none, since it has no room: list 0 would be empty frames."""

FITS: Final = tuple((1 << (NCHUNKS - chunks + 1)) - 2 for chunks in range(NCHUNKS))
"""By chunks wanted: the mask of the unbuddied lists whose frames have that much room."""

_ENDS: Final = (2, 2, 2 * NCHUNKS, 2 * NCHUNKS)
"""Entries of the first columns that belong to no frame: the ends of the lists."""

ROUND_UP: Final = HANDLE_SIZE + CHUNK_SIZE - 1

_PAIRS: Final = 11
_COUNTERS: Final = 2 * _PAIRS + 4 * NCHUNKS
"""Numbers that an allocator counts with: pairs (persistent, ephemeral), then a row of NCHUNKS for either, twice."""


class FrameState(IntEnum):
    """What a frame is; see NEXT for what can become what."""

    FREE = 0
    """Not the allocator's: its caller has it."""
    PERSISTENT = 1
    """RAM holds the only copy of its zpages."""
    EPHEMERAL = 2
    """A clean copy of a block: it can be dropped without any I/O."""
    ZOMBIE = 3
    """A persistent frame being written back: readable, matched with nothing, each zpage may be freed at any moment."""
    DYING = 4
    """An ephemeral frame being dropped: frees of its zpages are ignored."""


class Event(IntEnum):
    """What happens to a frame."""

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
"""A pair that is not here is a bug of the caller and raises."""

FREE, PERSISTENT, EPHEMERAL, ZOMBIE, DYING = (int(state) for state in FrameState)


class Resident(NamedTuple):
    """One zpage in a frame."""

    ref: int
    """Its ref."""
    page: int
    """The page whose data it is, from its handle."""


def max_zpage_size() -> int:
    """Bytes of the largest zpage that can be stored."""
    return MAX_CHUNKS * CHUNK_SIZE - HANDLE_SIZE


MAX_ZPAGE_SIZE: Final = max_zpage_size()


def chunks_for(zpage_size: int) -> int:
    """Chunks that a zpage of `zpage_size` bytes takes with its handle: a one-byte zpage still counts as a whole chunk."""
    return (zpage_size + ROUND_UP) >> CHUNK_SHIFT


def too_large(zpage_size: int) -> ValueError:
    """The error for a zpage that no frame can hold."""
    return ValueError(f"a zpage of {zpage_size} bytes is larger than the {MAX_ZPAGE_SIZE} that a frame can hold")


class Allocator(ABC):
    """The allocator over `nr_frames` frames.

    frames: a writable memoryview of bytes. Frame n is its bytes n * 4096 and on; it may be longer than the frames
        that the allocator manages (the rest can be read with `zpage`, which is how bounce frames are looked into).
    table: a zeroed writable memoryview of `table_size(nr_frames)` bytes.

    Columns of the table, by frame (invariants are checked by `check`):
        lru next/prev               on an LRU list iff PERSISTENT or EPHEMERAL
        bud next/prev               on an unbuddied list iff that, not raw, not empty, and with room (`_list_of`)
        owner                       1 + the page of a raw frame, 0 for any other
        state                       FrameState
        pins                        fills and reads under way: the kernel's `unevictable`
        and the packing's own       of OWN_WIDTHS bytes an entry

    I1: the zpages of a frame never overlap.
    I2: a FREE frame has no zpage, no pin, and is on no list.
    I3: bit n of the mask is set iff unbuddied list n is not empty.
    I4: each counter is what a recount of the frames gives.

    With `attach` nothing is written, and nothing may be asked, before `reset`: the memory may be another process's still.
    """

    LAYOUT: ClassVar[int]
    """A byte for the layout of a frame, changed whenever that changes. No two packings have the same."""
    OWN_WIDTHS: ClassVar[tuple[int, ...]]
    """Bytes of an entry of each column that only this packing has."""
    OWN_BYTES: ClassVar[int] = 0
    """Bytes at the end of the table that belong to no frame, a multiple of 8."""
    most_zpages: int
    """Zpages that a frame can hold, which is also how many fills of one can be under way at once."""

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
        own_start = self.table_size(nr_frames) - self.OWN_BYTES
        self._own_bytes = table[own_start : own_start + self.OWN_BYTES]
        self._lru = IndexLists(lru_next.cast("I"), lru_prev.cast("I"), nr_frames, 2, attach=True)
        self._budlists = IndexLists(bud_next.cast("I"), bud_prev.cast("I"), nr_frames, 2 * NCHUNKS, attach=True)
        self._lru_next, self._lru_prev = self._lru.nexts, self._lru.prevs
        self._bud_next, self._bud_prev = self._budlists.nexts, self._budlists.prevs
        self._map_counters()
        if not attach:
            self.reset()

    def _map_counters(self) -> None:
        # One buffer, so that the hot path in C counts in the same place (the order is known there); never rebound.
        # Each by kind: [persistent, ephemeral].
        self._counters = numbers = memoryview(bytearray(WORD_SIZE * _COUNTERS)).cast("q")
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
        for number in range(_COUNTERS):
            self._counters[number] = 0

    def hot(self, table: PageTable, stored_at: memoryview) -> "hot.Hot | None":
        """The hot path in C over this allocator's tables, the page table and `stored_at`, by frame: see core/hot.py.

        None if it was not built.
        """
        if not hot.BUILT:
            return None
        lists = (self._lru_next, self._lru_prev, self._bud_next, self._bud_prev)
        columns = (self._owner, self._state, self._pins, self._counters, stored_at, table.touched)
        own = (*self._own_columns, self._own_bytes)
        shared = (table.entries, table.numbers, self._frames, *lists, *columns)
        return hot.Hot(self.LAYOUT, self.most_zpages, self.nr_frames, *shared, *own)

    # ---- the table's layout ----------------------------------------------------------------------------------

    @classmethod
    def _widths(cls) -> tuple[int, ...]:
        """Bytes of an entry of each column."""
        return (4, 4, 4, 4, 4, 1, 1, *cls.OWN_WIDTHS)

    @classmethod
    def _columns(cls, nr_frames: int) -> list[tuple[int, int]]:
        """(offset, length) in bytes of each column."""
        columns = []
        offset = 0
        for number, width in enumerate(cls._widths()):
            length = width * (nr_frames + (_ENDS[number] if number < len(_ENDS) else 0))
            columns.append((offset, length))
            offset += -(-length // 8) * 8
        return columns

    @classmethod
    def table_size(cls, nr_frames: int) -> int:
        """Bytes of the table for `nr_frames` frames: 24 (zbud) or 27 (dense) a frame, and up to 5 KiB."""
        offset, length = cls._columns(nr_frames)[-1]
        return offset + -(-length // 8) * 8 + cls.OWN_BYTES

    @classmethod
    def table_spans(cls, nr_frames: int, first: int, count: int) -> list[tuple[int, int]]:
        """(offset, length) of the parts of the table that frames `first` .. `first + count - 1` use.

        For a caller that has the memory of the table follow the memory of the frames.
        """
        spans = zip(cls._columns(nr_frames), cls._widths(), strict=True)
        return [(offset + first * width, count * width) for (offset, _), width in spans]

    @classmethod
    def fixed_spans(cls, nr_frames: int) -> list[tuple[int, int]]:
        """(offset, length) of the parts of the table that belong to no frame: the ends of the lists, and the packing's."""
        lists = zip(cls._columns(nr_frames), _ENDS, strict=False)
        ends = [(offset + 4 * nr_frames, 4 * count) for (offset, _), count in lists]
        own_start = cls.table_size(nr_frames) - cls.OWN_BYTES
        return [*ends, (own_start, cls.OWN_BYTES)] if cls.OWN_BYTES else ends

    # ---- what a packing decides --------------------------------------------------------------------------------

    @abstractmethod
    def match_prep(self, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """Take the place for a zpage in the fullest frame with room for it: its ref, or NO_REF.

        The frame is unevictable until `match_finish`. Raises ValueError for a size over `max_zpage_size()`.
        """

    @abstractmethod
    def create_prep(self, frame: int, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """Take a free frame over from the caller and the place of its first zpage: the ref.

        The frame is unevictable until `create_finish`; meanwhile it can already be matched.
        """

    @abstractmethod
    def match_finish(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        """Fill the place that `match_prep` took: copy the zpage, write its handle, and let the frame be evicted again.

        `zpage` must be as long as was said to the prep.
        """

    @abstractmethod
    def create_finish(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        """Fill the place that `create_prep` took."""

    @abstractmethod
    def match(self, page: int, zpage: bytes | memoryview) -> int:
        """`match_prep` and `match_finish` in one, for who has the zpage at hand: the ref, or NO_REF."""

    @abstractmethod
    def zpage(self, ref: int, page: int) -> memoryview | None:
        """The bytes of the zpage at `ref` if its handle says that it is `page`'s and has a possible size, else None.

        A view of the frame: it is good until the next operation that changes the frame.
        """

    @abstractmethod
    def handle_at(self, ref: int) -> int:
        """The page that the handle at `ref` names; nothing says that it is right."""

    @abstractmethod
    def free(self, ref: int) -> int:
        """Forget the zpage at `ref`: the number of its frame if that is empty now and the caller's again, else NO_FRAME.

        A zombie is handed back only when its write is done, and a free of a zpage in a dying frame is ignored.
        """

    @abstractmethod
    def restore(self, ref: int, page: int) -> bool:
        """After `reset`: claim the zpage at `ref`, found by its handle, for `page`. False if it is not that or is taken.

        `restore_done` must follow for its frame when all are claimed.
        """

    @abstractmethod
    def _zpages_of(self, frame: int) -> Iterable[tuple[int, int]]:
        """(ref, size in bytes) of each zpage in a frame that is not raw and not being filled."""

    @abstractmethod
    def _is_empty(self, frame: int) -> bool:
        """Whether no zpage is in a frame that is not raw."""

    @abstractmethod
    def _list_of(self, frame: int) -> int:
        """The unbuddied list on which a frame with zpages belongs: the chunks that it uses; FULL if it has no room."""

    @abstractmethod
    def _claim(self, frame: int, ref: int) -> int:
        """The zpage at `ref`, in a frame filled from a block, counts as stored from now on: its size."""

    @abstractmethod
    def _clear(self, frame: int) -> None:
        """Forget all zpages of a frame that is not raw."""

    @abstractmethod
    def _check_frame(self, frame: int) -> None:
        """AssertionError if the packing's own columns do not agree with the frame. Not for one that is being filled."""

    # ---- beginning ---------------------------------------------------------------------------------------------

    def reset(self, populated: Iterable[tuple[int, int]] = ()) -> None:
        """No frame is the allocator's. `populated` are the frames (first, count) whose part of the table is not zeros."""
        for first, count in populated:
            for column in (self._state, self._pins):
                column[first : first + count] = bytes(count)
            self._owner[first : first + count] = memoryview(bytes(4 * count)).cast("I")
            for column, width in zip(self._own_columns, self.OWN_WIDTHS, strict=True):
                column[width * first : width * (first + count)] = bytes(width * count)
        self._lru.clear()
        self._budlists.clear()
        self._zero_counters()

    def restore_raw(self, ref: int, page: int) -> bool:
        """After `reset`: claim the whole frame of `ref` for the raw page `page`. False if it is taken."""
        frame = ref >> REF_BITS
        if frame >= self.nr_frames or ref & INDEX_MASK or self._owner[frame] or not self._is_empty(frame):
            return False
        self._owner[frame] = page + 1
        self._raw_count[PERSISTENT_KIND] += 1
        return True

    def restore_done(self, frame: int) -> bool:
        """All that is in the frame was claimed: let it be a persistent frame. False if nothing was."""
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

    # ---- raw pages, and frames filled from a block -------------------------------------------------------------

    def create_raw(self, frame: int, page: int, content: bytes | memoryview) -> int:
        """Take a free frame over and keep a whole page in it uncompressed: the ref.

        Raw frames are the first to be written back: they hold one page where others hold several.
        """
        if self._state[frame] != FREE:
            raise AssertionError(f"frame {frame} was handed in while {FrameState(self._state[frame]).name}")
        start = frame << PAGE_SHIFT
        self._frames[start : start + PAGE_SIZE] = content
        self._owner[frame] = page + 1
        self._state[frame] = PERSISTENT
        self._pageframes[PERSISTENT_KIND] += 1
        self._raw_count[PERSISTENT_KIND] += 1
        self._lru.prepend(PERSISTENT_KIND, frame)
        return frame << REF_BITS

    def fill_prep(self, frame: int) -> None:
        """Take a free frame over that is to be filled with a copy of a block; unevictable and empty until the finish."""
        self._fire(frame, Event.EPHEMERAL_CREATED)
        self._pageframes[EPHEMERAL_KIND] += 1
        self._pins[frame] = 1
        self._lru.append(EPHEMERAL_KIND, frame)

    def fill_cancel(self, frame: int) -> None:
        """Nothing was filled: hand the frame back."""
        self._pins[frame] -= 1
        self._lru.remove(frame)
        self._leave(frame, EPHEMERAL_KIND, Event.EMPTIED)

    def fill_finish(self, frame: int, refs: Sequence[int]) -> None:
        """The frame now holds the copy; the zpages at `refs` (refs in this frame) count as stored."""
        for ref in refs:
            size = self._claim(frame, ref)
            self._account(EPHEMERAL_KIND, (size + ROUND_UP) >> CHUNK_SHIFT, size)
        self._pins[frame] -= 1
        self._enlist(frame, EPHEMERAL_KIND)

    def fill_finish_raw(self, frame: int, page: int) -> int:
        """The frame now holds a copy of the raw page `page`: the ref."""
        self._owner[frame] = page + 1
        self._raw_count[EPHEMERAL_KIND] += 1
        self._pins[frame] -= 1
        return frame << REF_BITS

    # ---- looking into a frame --------------------------------------------------------------------------------

    def raw(self, ref: int) -> memoryview:
        """The 4096 bytes of the frame of `ref`."""
        start = ref >> REF_BITS << PAGE_SHIFT
        return self._frames[start : start + PAGE_SIZE]

    def residents(self, frame: int) -> list[Resident]:
        """The zpages of a frame, read from the frame itself. Not for a frame that is being filled."""
        owner = self._owner[frame]
        if owner:
            return [Resident(frame << REF_BITS, owner - 1)]
        return [Resident(ref, self.handle_at(ref)) for ref, _ in self._zpages_of(frame)]

    def frame_bytes(self, frame: int) -> memoryview:
        """The 4096 bytes of a frame."""
        start = frame << PAGE_SHIFT
        return self._frames[start : start + PAGE_SIZE]

    def is_raw(self, frame: int) -> bool:
        """Whether the frame holds a raw page."""
        return self._owner[frame] != 0

    def is_ephemeral(self, frame: int) -> bool:
        """Whether the frame is a clean copy of a block."""
        return self._state[frame] == EPHEMERAL

    def state(self, frame: int) -> FrameState:
        """What the frame is."""
        return FrameState(self._state[frame])

    # ---- reclaim -------------------------------------------------------------------------------------------------

    def oldest(self, kind: int) -> int:
        """The least recently used frame of a kind that is not unevictable, or NO_FRAME.

        Steps over the unevictable ones, of which there are never more than fills and reads under way.
        """
        return next(self.evictable(kind), NO_FRAME)

    def evictable(self, kind: int) -> Iterator[int]:
        """The frames of a kind that are not unevictable, oldest first. Only the one just given may leave meanwhile."""
        pins = self._pins
        return (frame for frame in self._lru.members(kind) if not pins[frame])

    def writeback_begin(self, frame: int) -> None:
        """Make a persistent frame a zombie: off all lists, readable, its zpages may be freed at any moment."""
        if self._pins[frame]:
            raise AssertionError(f"frame {frame} is unevictable")
        self._fire(frame, Event.WRITEBACK_BEGUN)
        self._lru.remove(frame)
        self._delist(frame, PERSISTENT_KIND)
        self._zombie_count[PERSISTENT_KIND] += 1

    def writeback_failed(self, frame: int) -> int:
        """The write of a zombie failed. It goes back to the old end of the LRU; an emptied one to the caller (its number)."""
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
        """A zombie is written and what was in it is referred to by its block: hand the frame back."""
        self._zombie_count[PERSISTENT_KIND] -= 1
        self._forget_residents(frame, PERSISTENT_KIND)
        self._evicted_pageframes[PERSISTENT_KIND] += 1
        return self._leave(frame, PERSISTENT_KIND, Event.WRITEBACK_DONE)

    def drop_begin(self, frame: int) -> None:
        """Make an ephemeral frame a dying one: off all lists; frees of its zpages are ignored."""
        if self._pins[frame]:
            raise AssertionError(f"frame {frame} is unevictable")
        self._fire(frame, Event.DROP_BEGUN)
        self._lru.remove(frame)
        self._delist(frame, EPHEMERAL_KIND)

    def drop_done(self, frame: int) -> int:
        """Nothing refers to the dying frame any more: hand it back."""
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
        self._fire(frame, event)
        self._pageframes[kind] -= 1
        return frame

    def _free_raw(self, frame: int, state: int, kind: int) -> int:
        """`free` of a raw page."""
        self._owner[frame] = 0
        self._raw_count[kind] -= 1
        if state == ZOMBIE:
            return NO_FRAME
        self._lru.remove(frame)
        return self._leave(frame, kind, Event.EMPTIED)

    def _account(self, kind: int, chunks: int, size: int) -> None:
        self._histogram[kind][chunks] += 1
        self._zpages[kind] += 1
        self._zbytes[kind] += size
        self._cumul_zpages[kind] += 1
        self._cumul_zbytes[kind] += size

    def _enlist(self, frame: int, kind: int) -> None:
        """Put a frame with zpages on the unbuddied list on which it belongs, or count it as buddied."""
        used = self._list_of(frame)
        if used == FULL:
            self._buddied[kind] += 1
        else:
            self._link_unbuddied(frame, used, kind)

    def _delist(self, frame: int, kind: int) -> None:
        """Take a frame off its unbuddied list."""
        if self._owner[frame]:
            return
        used = self._list_of(frame)
        if used == FULL:
            self._buddied[kind] -= 1
        else:
            self._unlink_unbuddied(frame, used, kind)

    def _link_unbuddied(self, frame: int, used: int, kind: int) -> None:
        self._budlists.append(kind * NCHUNKS + used, frame)
        lengths = self._unbuddied[kind]
        if not lengths[used]:
            self._masks[kind] |= 1 << used
        lengths[used] += 1
        self._unbuddied_count[kind] += 1

    def _unlink_unbuddied(self, frame: int, used: int, kind: int) -> None:
        self._budlists.remove(frame)
        lengths = self._unbuddied[kind]
        lengths[used] -= 1
        if not lengths[used]:
            self._masks[kind] &= ~(1 << used)
        self._unbuddied_count[kind] -= 1

    def _forget_residents(self, frame: int, kind: int) -> None:
        if self._owner[frame]:
            self._owner[frame] = 0
            self._raw_count[kind] -= 1
            return
        for _, size in self._zpages_of(frame):
            self._zpages[kind] -= 1
            self._zbytes[kind] -= size
            self._histogram[kind][(size + ROUND_UP) >> CHUNK_SHIFT] -= 1
        self._clear(frame)

    # ---- what it knows about itself ----------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The kernel's debugfs counters by name, sizes in bytes. Pageframes include zombies; raw pages are no zpages."""
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

    def forget_cumulative(self) -> None:
        """Set the cumulative counters to zero."""
        for kind in (PERSISTENT_KIND, EPHEMERAL_KIND):
            self._cumul_zpages[kind] = self._cumul_zbytes[kind] = 0

    def cumulative(self) -> list[int]:
        """The counters that only grow, for `go_on_from` of another process's allocator."""
        return [*self._cumul_zpages, *self._cumul_zbytes, *self._evicted_pageframes]

    def go_on_from(self, values: Sequence[int]) -> None:
        """Count on from what `cumulative` gave."""
        for number, pair in enumerate((self._cumul_zpages, self._cumul_zbytes, self._evicted_pageframes)):
            pair[PERSISTENT_KIND], pair[EPHEMERAL_KIND] = values[2 * number : 2 * number + 2]

    def unbuddied_lists(self) -> list[int]:
        """How many frames are on each unbuddied list: entry n counts those with room that use n chunks."""
        return [a + b for a, b in zip(*self._unbuddied, strict=True)]

    def chunk_histogram(self) -> list[int]:
        """How many zpages there are of each size: entry n counts those of n chunks."""
        return [a + b for a, b in zip(*self._histogram, strict=True)]

    def nr_frames_of(self, kind: int) -> int:
        """How many frames of a kind there are."""
        return self._pageframes[kind]

    def frames_of(self, kind: int) -> Iterator[int]:
        """The frames on the LRU list of a kind, oldest first."""
        return self._lru.members(kind)

    def check(self) -> None:
        """Recount everything from the frames; AssertionError where a list, a mask or a counter disagrees. O(frames)."""
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
