# SPDX-License-Identifier: MIT
"""The zbud allocator: at most two zpages ("compression buddies") in each 4 KiB frame of RAM.

    |<--------- first --------->|                |<---------- last --------->|
    | handle | zpage ...  | pad |      free      | zpage ...   | pad | handle |
    0        8                  ^ 64 B           ^ 64 B                    4096

The first buddy starts at the left edge, the last ends at the right edge, both on a boundary of 64 bytes (a
chunk). Whichever is freed, the hole joins the slack: a frame's free space is always one piece and is never
compacted. Two is the price of that, and of being able to reclaim a whole frame at once, which is what a
compressed store in front of a disk needs: a denser packing must empty several frames to get one back.

Each zpage lies with its handle, one word of `page << 12 | size`, at a fixed place of the frame. So a frame,
or a block of the backing file that is a copy of one, says by itself whose data it holds. A raw frame (a page
that did not compress) has no room for a handle; its owner stands in the table.

Matching is best fit without a scan: unbuddied list n holds the frames with one buddy that uses n chunks, and
a 64-bit mask says which lists are not empty. The fullest frame that still has room is the highest bit of the
mask below a bound. The LRU is approximate: a frame becomes recent when a zpage is added to it, and keeps its
place when one is read or freed. Persistent frames (RAM holds the only copy) and ephemeral ones (clean copies
of what the backing file holds) have lists of their own and are never matched with each other.

The allocator neither allocates nor frees memory: it is handed a free frame and hands one back, so that its
caller can count. All its state is typed columns over one buffer of the caller, and every operation is O(1).

Zbud is Dan Magenheimer's design, from Linux's zcache (drivers/staging/zcache/zbud.c); this is written anew
from its description. The names of the counters are the kernel's.
"""

from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Final, NamedTuple

from zbudfs.core.lists import IndexLists
from zbudfs.core.units import CHUNK_SHIFT, CHUNK_SIZE, NCHUNKS, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS

HANDLE_SIZE: Final = 8
"""Bytes of the handle. It counts towards the chunks of its zpage."""

SIZE_BITS: Final = 12
SIZE_MASK: Final = (1 << SIZE_BITS) - 1
MAX_PAGE_NUMBER: Final = (1 << 32) - 1
"""Page numbers are 32 bits wide (16 TiB of device): the owner of a raw frame is a 4-byte column."""

MAX_CHUNKS: Final = NCHUNKS - 1
"""One chunk of a frame is never given away, as in the kernel: a zpage that needs all of it is better kept raw."""

RAW_CHUNKS: Final = NCHUNKS
"""What stands in a frame's first_chunks when it holds a raw page."""

NO_REF: Final = -1
"""The zbudref that stands for "none" in return values."""

REF_BITS: Final = 1
"""Bits of a zbudref below the frame number."""

PERSISTENT_KIND: Final = 0
EPHEMERAL_KIND: Final = 1
KINDS: Final = ("pers", "eph")

_ROUND_UP: Final = HANDLE_SIZE + CHUNK_SIZE - 1
_FITS: Final = tuple((1 << (NCHUNKS - chunks + 1)) - 2 if chunks else 0 for chunks in range(NCHUNKS + 1))
"""By chunks wanted: the unbuddied lists whose frames have that much room."""


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

_FREE, _PERSISTENT, _EPHEMERAL, _ZOMBIE, _DYING = (int(state) for state in FrameState)


class Resident(NamedTuple):
    """One zpage in a frame."""

    ref: int
    """Its zbudref."""
    page: int
    """The page whose data it is, from its handle."""


def max_zpage_size() -> int:
    """Bytes of the largest zpage that can be stored."""
    return MAX_CHUNKS * CHUNK_SIZE - HANDLE_SIZE


def chunks_for(zpage_size: int) -> int:
    """Chunks that a zpage of `zpage_size` bytes takes with its handle: a one-byte zpage still owns a whole chunk."""
    return (zpage_size + _ROUND_UP) >> CHUNK_SHIFT


class Zbud:
    """The allocator over `nr_frames` frames.

    frames: a writable memoryview of bytes. Frame n is its bytes n * 4096 and on; it may be longer than the frames
        that the allocator manages (the rest can be read with `zpage`, which is how bounce frames are looked into).
    table: a zeroed writable memoryview of `table_size(nr_frames)` bytes.

    Columns of the table, by frame (invariants are checked by `check`):
        first_chunks, last_chunks   chunks of the buddy, 0 = none; RAW_CHUNKS in first_chunks = a raw page
        state                       FrameState
        pins                        fills and reads under way: the kernel's `unevictable`, at most 2
        owner                       the page of a raw frame
        lru next/prev               on an LRU list iff PERSISTENT or EPHEMERAL
        bud next/prev               on an unbuddied list iff that and exactly one buddy, not raw

    I1: the buddies of a frame never overlap: first_chunks + last_chunks <= NCHUNKS.
    I2: a FREE frame has no buddy, no pin, and is on no list.
    I3: bit n of the mask is set iff unbuddied list n is not empty.
    I4: each counter is what a recount of the frames gives.

    With `attach` nothing is written, and nothing may be asked, before `reset`: the memory may be another process's still.
    """

    def __init__(self, frames: memoryview, table: memoryview, nr_frames: int, *, attach: bool = False) -> None:
        if len(table) < self.table_size(nr_frames):
            raise ValueError(f"a table of {len(table)} bytes is too small for {nr_frames} frames")
        self.nr_frames = nr_frames
        self._frames = frames
        self._words = frames.cast("Q")
        columns = [table[offset : offset + length] for offset, length in self._columns(nr_frames)]
        lru_next, lru_prev, bud_next, bud_prev, owner, first, last, state, pins = columns
        self._owner = owner.cast("I")
        self._first_chunks = first
        self._last_chunks = last
        self._state = state
        self._pins = pins
        self._lru = IndexLists(lru_next.cast("I"), lru_prev.cast("I"), nr_frames, 2, attach=True)
        self._budlists = IndexLists(bud_next.cast("I"), bud_prev.cast("I"), nr_frames, 2 * NCHUNKS, attach=True)
        self._lru_next, self._lru_prev = self._lru.nexts, self._lru.prevs
        self._bud_next, self._bud_prev = self._budlists.nexts, self._budlists.prevs
        self._zero_counters()
        if not attach:
            self.reset()

    def _zero_counters(self) -> None:
        # Each by kind: [persistent, ephemeral].
        self._masks = [0, 0]
        self._unbuddied = [[0] * NCHUNKS, [0] * NCHUNKS]
        self._histogram = [[0] * NCHUNKS, [0] * NCHUNKS]
        self._pageframes = [0, 0]
        self._zpages = [0, 0]
        self._zbytes = [0, 0]
        self._cumul_zpages = [0, 0]
        self._cumul_zbytes = [0, 0]
        self._buddied = [0, 0]
        self._unbuddied_count = [0, 0]
        self._evicted_pageframes = [0, 0]
        self._zombie_count = [0, 0]
        self._raw_count = [0, 0]

    # ---- the table's layout ----------------------------------------------------------------------------------

    @staticmethod
    def _columns(nr_frames: int) -> list[tuple[int, int]]:
        """(offset, length) in bytes of each column."""
        lists = [4 * (nr_frames + 2)] * 2 + [4 * (nr_frames + 2 * NCHUNKS)] * 2
        lengths = [*lists, 4 * nr_frames, *[nr_frames] * 4]
        columns = []
        offset = 0
        for length in lengths:
            columns.append((offset, length))
            offset += -(-length // 8) * 8
        return columns

    @classmethod
    def table_size(cls, nr_frames: int) -> int:
        """Bytes of the table for `nr_frames` frames: 24 a frame, and 1 KiB."""
        offset, length = cls._columns(nr_frames)[-1]
        return offset + -(-length // 8) * 8

    @classmethod
    def table_spans(cls, nr_frames: int, first: int, count: int) -> list[tuple[int, int]]:
        """(offset, length) of the parts of the table that frames `first` .. `first + count - 1` use.

        For a caller that has the memory of the table follow the memory of the frames.
        """
        widths = [4] * 5 + [1] * 4
        spans = zip(cls._columns(nr_frames), widths, strict=True)
        return [(offset + first * width, count * width) for (offset, _), width in spans]

    @classmethod
    def sentinel_spans(cls, nr_frames: int) -> list[tuple[int, int]]:
        """(offset, length) of the parts of the table that belong to no frame: the ends of the lists."""
        return [(offset + 4 * nr_frames, 8 * NCHUNKS) for offset, _ in cls._columns(nr_frames)[:4]]

    # ---- beginning ---------------------------------------------------------------------------------------------

    def reset(self, populated: Iterable[tuple[int, int]] = ()) -> None:
        """No frame is the allocator's. `populated` are the frames (first, count) whose part of the table is not zeros."""
        for first, count in populated:
            for column in (self._first_chunks, self._last_chunks, self._state, self._pins):
                column[first : first + count] = bytes(count)
        self._lru.clear()
        self._budlists.clear()
        self._zero_counters()

    def restore(self, ref: int, page: int) -> bool:
        """After `reset`: claim the zpage at `ref`, found by its handle, for `page`. False if it is not that or is taken.

        `restore_done` must follow for its frame when all are claimed.
        """
        frame = ref >> 1
        if frame >= self.nr_frames:
            return False
        handle = self._words[(frame + 1) * PAGE_WORDS - 1] if ref & 1 else self._words[frame * PAGE_WORDS]
        size = handle & SIZE_MASK
        chunks = (size + _ROUND_UP) >> CHUNK_SHIFT
        mine, other = (self._last_chunks, self._first_chunks) if ref & 1 else (self._first_chunks, self._last_chunks)
        if handle >> SIZE_BITS != page or not size or chunks > MAX_CHUNKS:
            return False
        if mine[frame] or chunks + other[frame] > NCHUNKS:
            return False
        mine[frame] = chunks
        self._account(PERSISTENT_KIND, chunks, size)
        return True

    def restore_raw(self, ref: int, page: int) -> bool:
        """After `reset`: claim the whole frame of `ref` for the raw page `page`. False if it is taken."""
        frame = ref >> 1
        if frame >= self.nr_frames or ref & 1 or self._first_chunks[frame] or self._last_chunks[frame]:
            return False
        self._first_chunks[frame] = RAW_CHUNKS
        self._owner[frame] = page
        self._raw_count[PERSISTENT_KIND] += 1
        return True

    def restore_done(self, frame: int) -> bool:
        """All that is in the frame was claimed: let it be a persistent frame. False if nothing was."""
        first, last = self._first_chunks[frame], self._last_chunks[frame]
        if not first and not last:
            return False
        self._state[frame] = _PERSISTENT
        self._pageframes[PERSISTENT_KIND] += 1
        if first == RAW_CHUNKS:
            self._lru.prepend(PERSISTENT_KIND, frame)
            return True
        self._lru.append(PERSISTENT_KIND, frame)
        if first and last:
            self._buddied[PERSISTENT_KIND] += 1
        else:
            self._link_unbuddied(frame, first + last, PERSISTENT_KIND)
        return True

    # ---- adding a zpage ----------------------------------------------------------------------------------------

    def match_prep(self, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """Take the place for a zpage in the fullest unbuddied frame with room for it: its zbudref, or NO_REF.

        The frame is unevictable until `match_finish`. Raises ValueError for a size over `max_zpage_size()`.
        """
        chunks = (zpage_size + _ROUND_UP) >> CHUNK_SHIFT
        if chunks > MAX_CHUNKS:
            raise ValueError(
                f"a zpage of {zpage_size} bytes is larger than the {max_zpage_size()} that a buddy can hold"
            )
        fitting = self._masks[kind] & _FITS[chunks]
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
            return frame << 1 | 1
        self._first_chunks[frame] = chunks
        return frame << 1

    def create_prep(self, frame: int, zpage_size: int, kind: int = PERSISTENT_KIND) -> int:
        """Take a free frame over from the caller and the place of its first buddy: the zbudref.

        The frame is unevictable until `create_finish`; meanwhile it can already be matched, which makes two pins.
        """
        chunks = (zpage_size + _ROUND_UP) >> CHUNK_SHIFT
        if chunks > MAX_CHUNKS:
            raise ValueError(
                f"a zpage of {zpage_size} bytes is larger than the {max_zpage_size()} that a buddy can hold"
            )
        if self._state[frame] != _FREE:
            raise AssertionError(f"frame {frame} was handed in while {FrameState(self._state[frame]).name}")
        self._state[frame] = _PERSISTENT if kind == PERSISTENT_KIND else _EPHEMERAL
        self._pageframes[kind] += 1
        self._pins[frame] = 1
        self._first_chunks[frame] = chunks
        self._lru.append(kind, frame)
        self._link_unbuddied(frame, chunks, kind)
        return frame << 1

    def match_finish(self, ref: int, page: int, zpage: bytes | memoryview) -> None:
        """Fill the place that `match_prep` took: copy the zpage, write its handle, and let the frame be evicted again.

        `zpage` must be as long as was said to the prep.
        """
        size = len(zpage)
        frame = ref >> 1
        chunks = (size + _ROUND_UP) >> CHUNK_SHIFT
        if ref & 1:
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
    """Fill the place that `create_prep` took."""

    def match(self, page: int, zpage: bytes | memoryview) -> int:
        """`match_prep` and `match_finish` in one, for who has the zpage at hand: the zbudref, or NO_REF.

        It is on the path of every page that is written, so the list operations stand here in line: calls and pins cost
        a third of the time.
        """
        size = len(zpage)
        chunks = (size + _ROUND_UP) >> CHUNK_SHIFT
        if chunks > MAX_CHUNKS:
            raise ValueError(f"a zpage of {size} bytes is larger than the {max_zpage_size()} that a buddy can hold")
        fitting = self._masks[PERSISTENT_KIND] & _FITS[chunks]
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
            ref = frame << 1 | 1
        else:
            self._first_chunks[frame] = chunks
            start = (frame << PAGE_SHIFT) + HANDLE_SIZE
            self._frames[start : start + size] = zpage
            self._words[frame * PAGE_WORDS] = page << SIZE_BITS | size
            ref = frame << 1
        self._account(PERSISTENT_KIND, chunks, size)
        return ref

    def create_raw(self, frame: int, page: int, content: bytes | memoryview) -> int:
        """Take a free frame over and keep a whole page in it uncompressed: the zbudref.

        Raw frames are the first to be written back: they hold one page where others hold two.
        """
        if self._state[frame] != _FREE:
            raise AssertionError(f"frame {frame} was handed in while {FrameState(self._state[frame]).name}")
        start = frame << PAGE_SHIFT
        self._frames[start : start + PAGE_SIZE] = content
        self._owner[frame] = page
        self._first_chunks[frame] = RAW_CHUNKS
        self._state[frame] = _PERSISTENT
        self._pageframes[PERSISTENT_KIND] += 1
        self._raw_count[PERSISTENT_KIND] += 1
        self._lru.prepend(PERSISTENT_KIND, frame)
        return frame << 1

    # ---- a frame filled from a block -------------------------------------------------------------------------

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

    def fill_finish(self, frame: int, refs: list[int]) -> None:
        """The frame now holds the copy; the zpages at `refs` (zbudrefs in this frame) count as stored."""
        for ref in refs:
            size = self._handle_word(ref) & SIZE_MASK
            chunks = (size + _ROUND_UP) >> CHUNK_SHIFT
            if ref & 1:
                self._last_chunks[frame] = chunks
            else:
                self._first_chunks[frame] = chunks
            self._account(EPHEMERAL_KIND, chunks, size)
        self._unpin_filled(frame, len(refs))

    def fill_finish_raw(self, frame: int, page: int) -> int:
        """The frame now holds a copy of the raw page `page`: the zbudref."""
        self._owner[frame] = page
        self._first_chunks[frame] = RAW_CHUNKS
        self._raw_count[EPHEMERAL_KIND] += 1
        self._pins[frame] -= 1
        return frame << 1

    def _unpin_filled(self, frame: int, nr_zpages: int) -> None:
        self._pins[frame] -= 1
        if nr_zpages == 2:
            self._buddied[EPHEMERAL_KIND] += 1
        else:
            self._link_unbuddied(frame, self._first_chunks[frame] + self._last_chunks[frame], EPHEMERAL_KIND)

    # ---- looking into a frame --------------------------------------------------------------------------------

    def _handle_word(self, ref: int) -> int:
        place = ((ref >> 1) + 1) * PAGE_WORDS - 1 if ref & 1 else (ref >> 1) * PAGE_WORDS
        return self._words[place]

    def zpage(self, ref: int, page: int) -> memoryview | None:
        """The bytes of the zpage at `ref` if its handle says that it is `page`'s and has a possible size, else None.

        A view of the frame: it is good until the next operation that changes the frame.
        """
        frame = ref >> 1
        if ref & 1:
            handle = self._words[(frame + 1) * PAGE_WORDS - 1]
            size = handle & SIZE_MASK
            start = ((frame + 1) << PAGE_SHIFT) - ((size + _ROUND_UP) >> CHUNK_SHIFT << CHUNK_SHIFT)
        else:
            handle = self._words[frame * PAGE_WORDS]
            size = handle & SIZE_MASK
            start = (frame << PAGE_SHIFT) + HANDLE_SIZE
        if handle >> SIZE_BITS != page or not 0 < size <= MAX_CHUNKS * CHUNK_SIZE - HANDLE_SIZE:
            return None
        return self._frames[start : start + size]

    def raw(self, ref: int) -> memoryview:
        """The 4096 bytes of the frame of `ref`."""
        start = ref >> 1 << PAGE_SHIFT
        return self._frames[start : start + PAGE_SIZE]

    def residents(self, frame: int) -> list[Resident]:
        """The zpages of a frame, read from the frame itself. Not for a frame that is being filled."""
        if self._first_chunks[frame] == RAW_CHUNKS:
            return [Resident(frame << 1, self._owner[frame])]
        found = []
        if self._first_chunks[frame]:
            found.append(Resident(frame << 1, self._words[frame * PAGE_WORDS] >> SIZE_BITS))
        if self._last_chunks[frame]:
            found.append(Resident(frame << 1 | 1, self._words[(frame + 1) * PAGE_WORDS - 1] >> SIZE_BITS))
        return found

    def frame_bytes(self, frame: int) -> memoryview:
        """The 4096 bytes of a frame."""
        start = frame << PAGE_SHIFT
        return self._frames[start : start + PAGE_SIZE]

    def is_raw(self, frame: int) -> bool:
        """Whether the frame holds a raw page."""
        return self._first_chunks[frame] == RAW_CHUNKS

    def is_ephemeral(self, frame: int) -> bool:
        """Whether the frame is a clean copy of a block."""
        return self._state[frame] == _EPHEMERAL

    def handle_at(self, ref: int) -> int:
        """The page that the handle at `ref` names; nothing says that it is right."""
        return self._handle_word(ref) >> SIZE_BITS

    def state(self, frame: int) -> FrameState:
        """What the frame is."""
        return FrameState(self._state[frame])

    # ---- taking a zpage out ------------------------------------------------------------------------------------

    def free(self, ref: int) -> int:
        """Forget the zpage at `ref`: the number of its frame if that is empty now and the caller's again, else NO_FRAME.

        A zombie is handed back only when its write is done, and a free of a zpage in a dying frame is ignored.
        """
        frame = ref >> 1
        state = self._state[frame]
        if state == _DYING:
            return NO_FRAME
        kind = EPHEMERAL_KIND if state == _EPHEMERAL else PERSISTENT_KIND
        if self._first_chunks[frame] == RAW_CHUNKS:
            self._first_chunks[frame] = 0
            self._raw_count[kind] -= 1
            if state == _ZOMBIE:
                return NO_FRAME
            self._lru.remove(frame)
            return self._leave(frame, kind, Event.EMPTIED)
        if ref & 1:
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
            raise AssertionError(f"no zpage at zbudref {ref}")
        self._zpages[kind] -= 1
        self._zbytes[kind] -= size
        self._histogram[kind][chunks] -= 1
        if state == _ZOMBIE:
            return NO_FRAME
        if other:
            self._buddied[kind] -= 1
            self._link_unbuddied(frame, other, kind)
            return NO_FRAME
        self._unlink_unbuddied(frame, chunks, kind)
        self._lru.remove(frame)
        return self._leave(frame, kind, Event.EMPTIED)

    # ---- reclaim -------------------------------------------------------------------------------------------------

    def oldest(self, kind: int) -> int:
        """The least recently used frame of a kind that is not unevictable, or NO_FRAME.

        Steps over the unevictable ones, of which there are never more than fills and reads under way.
        """
        pins = self._pins
        for frame in self._lru.members(kind):
            if not pins[frame]:
                return frame
        return NO_FRAME

    def writeback_begin(self, frame: int) -> None:
        """Make a persistent frame a zombie: off all lists, readable, its zpages may be freed at any moment."""
        if self._pins[frame]:
            raise AssertionError(f"frame {frame} is unevictable")
        self._fire(frame, Event.WRITEBACK_BEGUN)
        self._lru.remove(frame)
        self._leave_budlists(frame, PERSISTENT_KIND)
        self._zombie_count[PERSISTENT_KIND] += 1

    def writeback_failed(self, frame: int) -> int:
        """The write of a zombie failed. It goes back to the old end of the LRU; an emptied one to the caller (its number)."""
        self._zombie_count[PERSISTENT_KIND] -= 1
        self._fire(frame, Event.WRITEBACK_FAILED)
        first, last = self._first_chunks[frame], self._last_chunks[frame]
        if not first and not last:
            return self._leave(frame, PERSISTENT_KIND, Event.EMPTIED)
        self._lru.prepend(PERSISTENT_KIND, frame)
        if first != RAW_CHUNKS:
            if first and last:
                self._buddied[PERSISTENT_KIND] += 1
            else:
                self._link_unbuddied(frame, first + last, PERSISTENT_KIND)
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
        self._leave_budlists(frame, EPHEMERAL_KIND)

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

    def _account(self, kind: int, chunks: int, size: int) -> None:
        self._histogram[kind][chunks] += 1
        self._zpages[kind] += 1
        self._zbytes[kind] += size
        self._cumul_zpages[kind] += 1
        self._cumul_zbytes[kind] += size

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

    def _leave_budlists(self, frame: int, kind: int) -> None:
        first, last = self._first_chunks[frame], self._last_chunks[frame]
        if first == RAW_CHUNKS:
            return
        if first and last:
            self._buddied[kind] -= 1
        else:
            self._unlink_unbuddied(frame, first + last, kind)

    def _forget_residents(self, frame: int, kind: int) -> None:
        if self._first_chunks[frame] == RAW_CHUNKS:
            self._raw_count[kind] -= 1
        else:
            for ref, chunks in ((frame << 1, self._first_chunks[frame]), (frame << 1 | 1, self._last_chunks[frame])):
                if chunks:
                    self._zpages[kind] -= 1
                    self._zbytes[kind] -= self._handle_word(ref) & SIZE_MASK
                    self._histogram[kind][chunks] -= 1
        self._first_chunks[frame] = self._last_chunks[frame] = 0

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
        self._cumul_zpages = [0, 0]
        self._cumul_zbytes = [0, 0]

    def unbuddied_lists(self) -> list[int]:
        """How many frames are on each unbuddied list: entry n counts those whose one buddy uses n chunks."""
        return [a + b for a, b in zip(*self._unbuddied, strict=True)]

    def chunk_histogram(self) -> list[int]:
        """How many zpages there are of each size: entry n counts those of n chunks."""
        return [a + b for a, b in zip(*self._histogram, strict=True)]

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
            first, last, pins = self._first_chunks[frame], self._last_chunks[frame], self._pins[frame]
            assert pins <= 2, f"frame {frame} has {pins} pins"
            if state is FrameState.FREE:
                assert not first and not last and not pins, f"I2: free frame {frame} is not empty"
                continue
            kind = EPHEMERAL_KIND if state in (FrameState.EPHEMERAL, FrameState.DYING) else PERSISTENT_KIND
            assert first + last <= NCHUNKS, f"I1: the buddies of frame {frame} overlap"
            seen["pageframes"][kind] += 1
            listed = state in (FrameState.PERSISTENT, FrameState.EPHEMERAL)
            seen["zombie_count"][kind] += state is FrameState.ZOMBIE
            if listed:
                expected_lru[kind].add(frame)
            if first == RAW_CHUNKS:
                seen["raw_count"][kind] += 1
                continue
            if listed and first and last:
                seen["buddied"][kind] += 1
            elif listed and (first or last):
                seen["unbuddied_count"][kind] += 1
                expected_lists[kind * NCHUNKS + first + last].add(frame)
            assert not listed or first or last or pins, f"frame {frame} is {state.name} and empty"
            if pins:
                continue  # handles and counters follow at the finish
            for ref, chunks in ((frame << 1, first), (frame << 1 | 1, last)):
                if chunks:
                    size = self._handle_word(ref) & SIZE_MASK
                    assert chunks_for(size) == chunks, f"zbudref {ref}: {size} bytes do not take {chunks} chunks"
                    seen["zpages"][kind] += 1
                    seen["zbytes"][kind] += size
                    histogram[kind][chunks] += 1
        for kind in (PERSISTENT_KIND, EPHEMERAL_KIND):
            on_lru = list(self._lru.members(kind))
            assert len(on_lru) == len(set(on_lru)), "a frame is on an LRU list twice"
            assert set(on_lru) == expected_lru[kind], f"LRU list {kind} has other frames than it should"
            for used in range(NCHUNKS):
                members = list(self._budlists.members(kind * NCHUNKS + used))
                assert set(members) == expected_lists[kind * NCHUNKS + used], f"unbuddied list {kind}/{used} is wrong"
                assert len(members) == self._unbuddied[kind][used], f"length of unbuddied list {kind}/{used} is wrong"
                assert bool(members) == bool(self._masks[kind] >> used & 1), f"I3: mask bit {kind}/{used} is wrong"
        for name, value in seen.items():
            if name in ("zpages", "zbytes") and any(self._pins):
                continue
            mine = self._buddied if name == "buddied" else getattr(self, f"_{name}")
            assert mine == value, f"I4: {name} is {mine}, a recount gives {value}"
        if not any(self._pins):
            assert histogram == self._histogram, "I4: the chunk histogram is wrong"
