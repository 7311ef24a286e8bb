# SPDX-License-Identifier: MIT
"""Each allocator is compared with a model: a dict of the stored pages, and lists of frames by age, without columns.

The steps store and free zpages in every way, asynchronous ones in halves, in any order. After each step the allocator
recounts itself, and contents, ages, matches and counters are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.core.frames import Caller, content, packed_by
from zbudfs.core.allocator import (
    EPHEMERAL_KIND,
    FULL,
    HANDLE_SIZE,
    KINDS,
    NO_REF,
    PERSISTENT_KIND,
    REF_BITS,
    FrameState,
    chunks_for,
    max_zpage_size,
)
from zbudfs.core.packing import DENSE, ZBUD, Packing
from zbudfs.core.units import CHUNK_SIZE, NCHUNKS, NO_FRAME, PAGE_SIZE

FRAMES = 8
KIND = st.sampled_from([PERSISTENT_KIND, EPHEMERAL_KIND])
SIZE = st.one_of(
    st.integers(1, max_zpage_size()), st.integers(1, 130), st.sampled_from([1984, 2040, 2041, 3900, max_zpage_size()])
)
PERSISTENT, EPHEMERAL, ZOMBIE, DYING = FrameState.PERSISTENT, FrameState.EPHEMERAL, FrameState.ZOMBIE, FrameState.DYING


@dataclass
class Frame:
    """The model's knowledge of a frame that the allocator has."""

    state: FrameState
    zpages: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Page and content by ref."""
    pending: dict[int, int] = field(default_factory=dict)
    """The size of each zpage by ref whose place is taken and not filled yet."""
    raw: tuple[int, bytes] | None = None
    filling: bool = False
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Offset and size by ref, for dense frames alone."""
    tail: int = 0

    @property
    def kind(self) -> int:
        """Return whether the frame is persistent or ephemeral."""
        return EPHEMERAL_KIND if self.state in (EPHEMERAL, DYING) else PERSISTENT_KIND

    @property
    def pinned(self) -> bool:
        """Return whether the frame is unevictable."""
        return self.filling or bool(self.pending)

    @property
    def listed(self) -> bool:
        """Return whether the frame is on the LRU list of its kind."""
        return self.state in (PERSISTENT, EPHEMERAL)

    @property
    def sizes(self) -> list[int]:
        """Return the size of each zpage, stored or pending."""
        return [*(len(data) for _, data in self.zpages.values()), *self.pending.values()]

    def used(self, packing: Packing) -> int:
        """Return the unbuddied list on which the frame must be, or FULL."""
        if self.raw is not None or not self.sizes or len(self.sizes) == packing.zpages:
            return FULL
        if packing.name == "zbud":
            return chunks_for(self.sizes[0])
        end = self.tail if self.pinned else HANDLE_SIZE * packing.zpages + sum(self.sizes)
        used = -(-end // CHUNK_SIZE)
        return used if used < NCHUNKS else FULL

    def add(self, ref: int, size: int, packing: Packing) -> None:
        """Add a zpage. A dense frame lays zpages from left to right, and compacts when its tail is too short."""
        if packing.name == "zbud":
            return
        start = HANDLE_SIZE * packing.zpages
        self.tail = max(self.tail, start) if self.places else start
        if self.tail + size > PAGE_SIZE:
            assert not self.pinned
            self.tail = start
            for other in sorted(self.places):
                length = self.places[other][1]
                self.places[other] = (self.tail, length)
                self.tail += length
        self.places[ref] = (self.tail, size)
        self.tail += size

    def remove(self, ref: int) -> None:
        """Remove a zpage. The last zpage before the tail joins the tail."""
        if ref in self.places:
            offset, size = self.places.pop(ref)
            if offset + size == self.tail:
                self.tail = offset

    @property
    def empty(self) -> bool:
        """Return whether the frame has no zpage."""
        return not self.zpages and not self.pending and self.raw is None


class Machine(RuleBasedStateMachine):
    """Steps of a caller that does all that the page store does, and more."""

    packing: ClassVar[Packing]

    def __init__(self) -> None:
        super().__init__()
        with packed_by(self.packing):
            self.caller = Caller(FRAMES)
        self.allocator = self.caller.allocator
        self.frames: dict[int, Frame] = {}
        self.ages: list[list[int]] = [[], []]
        self.page = 0
        self.cumul = [[0, 0], [0, 0]]
        self.evicted = [0, 0]

    # ---- the model ---------------------------------------------------------------------------------------------------

    def next_page(self) -> int:
        """Return a page number that was not used yet."""
        self.page += 1
        return self.page

    def recent(self, frame: int) -> None:
        """Note that a zpage was added to a frame."""
        ages = self.ages[self.frames[frame].kind]
        if frame in ages:
            ages.remove(frame)
        ages.append(frame)

    def count(self, kind: int, size: int) -> None:
        """Count a stored zpage."""
        self.cumul[kind][0] += 1
        self.cumul[kind][1] += size

    def handed_back(self, frame: int) -> None:
        """Note that the allocator gave a frame back."""
        known = self.frames.pop(frame)
        if frame in self.ages[known.kind]:
            self.ages[known.kind].remove(frame)
        assert self.caller.give(frame)

    def best_match(self, size: int, kind: int) -> int | None:
        """Return the number of used chunks in the fullest frame that has room, or None."""
        zbud = self.packing.name == "zbud"
        chunks = chunks_for(size) if zbud else -(-size // CHUNK_SIZE)
        fitting = [
            used
            for frame in self.frames.values()
            if frame.listed and frame.kind == kind and not frame.filling
            if (used := frame.used(self.packing)) != FULL and used + chunks <= NCHUNKS
        ]
        return max(fitting, default=None)

    def of_state(self, *states: FrameState, pinned: bool = False) -> list[int]:
        """Return the frames in one of these states. Pinned frames are included only on request."""
        return [
            number for number, frame in self.frames.items() if frame.state in states and (pinned or not frame.pinned)
        ]

    # ---- storing ---------------------------------------------------------------------------------------------------

    def prepare(self, size: int, kind: int) -> int:
        """Take a place, matched if possible, or return NO_REF if there is no frame."""
        expected = self.best_match(size, kind)
        ref = self.allocator.match_prep(size, kind)
        assert (ref == NO_REF) == (expected is None)
        if ref == NO_REF:
            if not self.caller.free_frames:
                return NO_REF
            frame = self.caller.take()
            ref = self.allocator.create_prep(frame, size, kind)
            self.frames[frame] = Frame(PERSISTENT if kind == PERSISTENT_KIND else EPHEMERAL)
        else:
            assert self.frames[ref >> REF_BITS].used(self.packing) == expected
        frame = ref >> REF_BITS
        assert ref not in self.frames[frame].zpages
        assert ref not in self.frames[frame].pending
        self.frames[frame].add(ref, size, self.packing)
        self.frames[frame].pending[ref] = size
        self.recent(frame)
        return ref

    def finish(self, ref: int) -> None:
        """Fill a place."""
        frame = self.frames[ref >> REF_BITS]
        size = frame.pending.pop(ref)
        page = self.next_page()
        self.allocator.match_finish(ref, page, content(page, size))
        frame.zpages[ref] = (page, content(page, size))
        self.count(frame.kind, size)

    @rule(size=SIZE, kind=KIND)
    def store(self, size: int, kind: int) -> None:
        """Do both halves at once, like the page store."""
        ref = self.prepare(size, kind)
        if ref != NO_REF:
            self.finish(ref)

    @rule(size=SIZE)
    def match(self, size: int) -> None:
        """Match in one step."""
        expected, page = self.best_match(size, PERSISTENT_KIND), self.next_page()
        ref = self.allocator.match(page, content(page, size))
        assert (ref == NO_REF) == (expected is None)
        if ref != NO_REF:
            frame = self.frames[ref >> REF_BITS]
            assert frame.used(self.packing) == expected
            assert ref not in frame.zpages
            assert ref not in frame.pending
            frame.add(ref, size, self.packing)
            frame.zpages[ref] = (page, content(page, size))
            self.recent(ref >> REF_BITS)
            self.count(PERSISTENT_KIND, size)

    @rule(size=SIZE, kind=KIND)
    def prep(self, size: int, kind: int) -> None:
        """Do the first half alone."""
        self.prepare(size, kind)

    @precondition(lambda self: any(frame.pending for frame in self.frames.values()))
    @rule(data=st.data())
    def finish_one(self, data: st.DataObject) -> None:
        """Do the second half, some time later."""
        self.finish(data.draw(st.sampled_from(sorted(ref for frame in self.frames.values() for ref in frame.pending))))

    @precondition(lambda self: self.caller.free_frames)
    @rule()
    def store_raw(self) -> None:
        """Store a raw page, whose frame goes to the old end: it is written back first."""
        frame, page = self.caller.take(), self.next_page()
        assert self.allocator.create_raw(frame, page, content(page, PAGE_SIZE)) >> REF_BITS == frame
        self.frames[frame] = Frame(PERSISTENT, raw=(page, content(page, PAGE_SIZE)))
        self.ages[PERSISTENT_KIND].insert(0, frame)

    # ---- a copy of a block -----------------------------------------------------------------------------------------

    @precondition(lambda self: self.caller.free_frames)
    @rule()
    def fill_prep(self) -> None:
        """Begin to read a block into a free frame."""
        frame = self.caller.take()
        self.allocator.fill_prep(frame)
        self.frames[frame] = Frame(EPHEMERAL, filling=True)
        self.recent(frame)

    def filling(self) -> list[int]:
        """Return the frames that are being filled from a block."""
        return [number for number, frame in self.frames.items() if frame.filling]

    @precondition(lambda self: self.filling())
    @rule(data=st.data())
    def fill_cancel(self, data: st.DataObject) -> None:
        """Cancel the fill, since the read failed or its result is not wanted any more."""
        frame = data.draw(st.sampled_from(self.filling()))
        self.allocator.fill_cancel(frame)
        self.handed_back(frame)

    @precondition(lambda self: self.filling() and any(frame.zpages for frame in self.frames.values()))
    @rule(data=st.data(), which=st.integers(1, 127))
    def fill_finish(self, data: st.DataObject, which: int) -> None:
        """Finish the fill: the block is a copy of some frame, and some of its zpages are still wanted."""
        number = data.draw(st.sampled_from(self.filling()))
        source = data.draw(st.sampled_from([number for number, frame in self.frames.items() if frame.zpages]))
        self.allocator.frame_bytes(number)[:] = self.allocator.frame_bytes(source)
        there = sorted(self.frames[source].zpages)
        wanted = [ref for index, ref in enumerate(there) if which >> index & 1] or there[:1]
        offset = (number - source) << REF_BITS
        self.allocator.fill_finish(number, [ref + offset for ref in wanted])
        frame = self.frames[number]
        frame.filling = False
        for ref in wanted:
            page, data_of_it = self.frames[source].zpages[ref]
            frame.zpages[ref + offset] = (page, data_of_it)
            place = self.frames[source].places.get(ref)
            if place is not None:
                frame.places[ref + offset] = place
                frame.tail = max(frame.tail, sum(place))
            self.count(EPHEMERAL_KIND, len(data_of_it))

    @precondition(lambda self: self.filling())
    @rule(data=st.data())
    def fill_finish_raw(self, data: st.DataObject) -> None:
        """Finish the fill with a raw page."""
        number, page = data.draw(st.sampled_from(self.filling())), self.next_page()
        self.allocator.frame_bytes(number)[:] = content(page, PAGE_SIZE)
        assert self.allocator.fill_finish_raw(number, page) >> REF_BITS == number
        self.frames[number].filling = False
        self.frames[number].raw = (page, content(page, PAGE_SIZE))

    # ---- taking out ------------------------------------------------------------------------------------------------

    def refs(self) -> list[int]:
        """Return all refs that can be freed."""
        found = [ref for frame in self.frames.values() for ref in frame.zpages]
        return sorted(found + [number << REF_BITS for number, frame in self.frames.items() if frame.raw is not None])

    @precondition(lambda self: self.refs())
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """Free any zpage, in any state of its frame."""
        ref = data.draw(st.sampled_from(self.refs()))
        number = ref >> REF_BITS
        frame = self.frames[number]
        freed = self.allocator.free(ref)
        if frame.state is DYING:
            assert freed == NO_FRAME
            return
        frame.remove(ref)
        if frame.zpages.pop(ref, None) is None:
            frame.raw = None
        if frame.empty and frame.listed:
            assert freed == number
            self.handed_back(number)
        else:
            assert freed == NO_FRAME

    # ---- reclaim ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.of_state(PERSISTENT))
    @rule(data=st.data())
    def writeback_begin(self, data: st.DataObject) -> None:
        """Make any evictable persistent frame a zombie, in most cases the oldest."""
        number = data.draw(st.sampled_from([self.allocator.oldest(PERSISTENT_KIND), *self.of_state(PERSISTENT)]))
        self.allocator.writeback_begin(number)
        self.frames[number].state = ZOMBIE
        self.ages[PERSISTENT_KIND].remove(number)

    @precondition(lambda self: self.of_state(ZOMBIE))
    @rule(data=st.data())
    def writeback_done(self, data: st.DataObject) -> None:
        """Finish the writeback: the zpages of the zombie are in its block now."""
        number = data.draw(st.sampled_from(self.of_state(ZOMBIE)))
        assert self.allocator.writeback_done(number) == number
        self.evicted[PERSISTENT_KIND] += 1
        self.handed_back(number)

    @precondition(lambda self: self.of_state(ZOMBIE))
    @rule(data=st.data())
    def writeback_failed(self, data: st.DataObject) -> None:
        """Fail the writeback: the zombie goes back to the old end with the zpages that are left."""
        number = data.draw(st.sampled_from(self.of_state(ZOMBIE)))
        empty = self.frames[number].empty
        assert self.allocator.writeback_failed(number) == (number if empty else NO_FRAME)
        self.frames[number].state = PERSISTENT
        if empty:
            self.handed_back(number)
        else:
            self.ages[PERSISTENT_KIND].insert(0, number)

    @precondition(lambda self: self.of_state(EPHEMERAL))
    @rule()
    def drop_begin(self) -> None:
        """Begin to drop the oldest evictable ephemeral frame."""
        number = self.allocator.oldest(EPHEMERAL_KIND)
        self.allocator.drop_begin(number)
        self.frames[number].state = DYING
        self.ages[EPHEMERAL_KIND].remove(number)

    @precondition(lambda self: self.of_state(DYING))
    @rule(data=st.data())
    def drop_done(self, data: st.DataObject) -> None:
        """Finish the drop: nothing refers to a dying frame any more."""
        number = data.draw(st.sampled_from(self.of_state(DYING)))
        assert self.allocator.drop_done(number) == number
        self.evicted[EPHEMERAL_KIND] += 1
        self.handed_back(number)

    # ---- comparing -------------------------------------------------------------------------------------------------

    @invariant()
    def recount(self) -> None:
        """The allocator finds no fault in itself."""
        self.allocator.check()

    @invariant()
    def contents(self) -> None:
        """Each zpage is there, under its own page, and each frame agrees with the model."""
        for number in range(FRAMES):
            frame = self.frames.get(number)
            assert self.allocator.state(number) is (frame.state if frame else FrameState.FREE)
            if frame is None:
                continue
            assert self.allocator.is_ephemeral(number) == (frame.state is EPHEMERAL)
            assert self.allocator.is_raw(number) == (frame.raw is not None)
            for ref, (page, data) in frame.zpages.items():
                assert self.caller.zpage(ref, page) == data
                assert self.caller.zpage(ref, page + 1) is None
                assert self.allocator.handle_at(ref) == page
            if frame.raw is not None:
                assert self.allocator.frame_bytes(number) == frame.raw[1]
            if not frame.pinned:
                there = {ref: page for ref, (page, _) in frame.zpages.items()}
                if frame.raw is not None:
                    there[number << REF_BITS] = frame.raw[0]
                assert dict(self.allocator.residents(number)) == there

    @invariant()
    def order(self) -> None:
        """Both LRU lists have the model's order, and the oldest frame is the first that may be evicted."""
        for kind in (PERSISTENT_KIND, EPHEMERAL_KIND):
            assert self.caller.lru(kind) == self.ages[kind]
            evictable = [number for number in self.ages[kind] if not self.frames[number].pinned]
            assert self.allocator.oldest(kind) == (evictable[0] if evictable else NO_FRAME)

    @invariant()
    def counters(self) -> None:
        """Each counter, list length and histogram equals the model's count."""
        counters = self.allocator.counters()
        histogram, unbuddied = [0] * NCHUNKS, [0] * NCHUNKS
        for kind, prefix in enumerate(KINDS):
            mine = [frame for frame in self.frames.values() if frame.kind == kind]
            sizes = [len(data) for frame in mine for _, data in frame.zpages.values()]
            listed = [frame.used(self.packing) for frame in mine if frame.listed and frame.sizes]
            expected = {
                "pageframes": len(mine),
                "zpages": len(sizes),
                "zbytes": sum(sizes),
                "cumul_zpages": self.cumul[kind][0],
                "cumul_zbytes": self.cumul[kind][1],
                "buddied_count": listed.count(FULL),
                "unbuddied_count": len(listed) - listed.count(FULL),
                "evicted_pageframes": self.evicted[kind],
                "zombie_count": sum(frame.state is ZOMBIE for frame in mine),
                "raw_count": sum(frame.raw is not None for frame in mine),
            }
            assert {name: counters[f"{prefix}_{name}"] for name in expected} == expected
            for size in sizes:
                histogram[chunks_for(size)] += 1
            for used in listed:
                unbuddied[used] += used != FULL
        assert self.allocator.chunk_histogram() == histogram
        assert self.allocator.unbuddied_lists() == unbuddied


def tried(packing: Packing, examples: int) -> Any:
    """Return the test of one packing."""
    machine: Any = type(f"Machine_{packing.name}_{packing.zpages}", (Machine,), {"packing": packing})
    case: Any = machine.TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=50, deadline=None)
    return case


TestZbud = tried(ZBUD, 75)
TestDenseOfTwo = tried(Packing("dense", 2), 25)
TestDenseOfThree = tried(Packing("dense", 3), 40)
TestDense = tried(DENSE, 75)
