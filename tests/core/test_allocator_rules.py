# SPDX-License-Identifier: MIT
"""The ten rules of the allocator, as docs/understand/packing.md numbers them. The tests carry the numbers."""

from __future__ import annotations

import ast
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zbudfs
from tests.core.frames import Caller, content, packed_by, size_of
from zbudfs.core.allocator import (
    EPHEMERAL_KIND,
    KINDS,
    MAX_CHUNKS,
    MAX_PAGE_NUMBER,
    MOST_ZPAGES,
    NEXT,
    NO_REF,
    PERSISTENT_KIND,
    REF_BITS,
    Allocator,
    Event,
    FrameState,
    Resident,
    max_zpage_size,
)
from zbudfs.core.dense import DEFAULT_ZPAGES
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.core.page_table import REF_WIDTH
from zbudfs.core.units import NCHUNKS, NO_FRAME, PAGE_SIZE, WORD_SIZE
from zbudfs.store.state import HOLD_INDEX

HALF = size_of(NCHUNKS // 2 - 1)
"""Size of a zpage. Two zpages of this size fit into a frame, with any packing."""
BOTH = [PERSISTENT_KIND, EPHEMERAL_KIND]


@pytest.fixture(scope="module", autouse=True, params=[ZBUD, Packing("dense", 2)], ids=str)
def packing(request: pytest.FixtureRequest) -> Iterator[Packing]:
    """Try each rule with each packing."""
    with packed_by(request.param) as packing:
        yield packing


def frame_of(ref: int) -> int:
    """Return the frame of a ref."""
    return ref >> REF_BITS


def fill(caller: Caller, page: int, zpages: dict[int, int] | None = None) -> tuple[int, list[int]]:
    """Fill an ephemeral frame with a copy of a block of page `page` and the next. Return its number and refs."""
    scratch = Caller(1)
    refs = [scratch.store(page, HALF), scratch.store(page + 1, HALF)]
    frame = caller.take()
    caller.allocator.fill_prep(frame)
    caller.allocator.frame_bytes(frame)[:] = scratch.allocator.frame_bytes(0)
    moved = [ref + (frame << REF_BITS) for ref in refs]
    caller.allocator.fill_finish(frame, moved)
    return frame, moved


# ---- rule 2: the handle, and the largest zpage --------------------------------------------------------------------


@pytest.mark.parametrize("page", [0, 1, 12345, MAX_PAGE_NUMBER])
def test_rule_2_a_frame_says_whose_data_it_holds(page: int) -> None:
    """The bytes of a frame alone, copied to another one, give the pages and the lengths of both zpages."""
    caller = Caller(2)
    refs = [caller.create(page, 700), caller.match(MAX_PAGE_NUMBER - page, 900)]
    caller.allocator.frame_bytes(1)[:] = caller.allocator.frame_bytes(0)
    for ref, owner, size in zip(refs, (page, MAX_PAGE_NUMBER - page), (700, 900), strict=True):
        copy = ref + (1 << REF_BITS)
        assert caller.allocator.handle_at(copy) == owner
        assert caller.zpage(copy, owner) == content(owner, size)
        assert caller.zpage(copy, owner ^ 1) is None
    assert caller.allocator.residents(0) == [Resident(refs[0], page), Resident(refs[1], MAX_PAGE_NUMBER - page)]


@pytest.mark.parametrize("size", [max_zpage_size() + 1, PAGE_SIZE, 2 * PAGE_SIZE])
@pytest.mark.parametrize("kind", BOTH)
def test_rule_2_a_larger_one_is_refused(size: int, kind: int) -> None:
    """A zpage that is too large is a ValueError, with and without a frame for it, and nothing changes."""
    caller = Caller(2)
    caller.create(1, 1, kind)
    before, counters = bytes(caller.buffer), caller.allocator.counters()
    with pytest.raises(ValueError, match="larger than the 4024"):
        caller.allocator.match_prep(size, kind)
    with pytest.raises(ValueError, match="larger than the 4024"):
        caller.allocator.create_prep(1, size, kind)
    with pytest.raises(ValueError, match="larger than the 4024"):
        caller.allocator.match(5, bytes(size))
    assert (bytes(caller.buffer), caller.allocator.counters()) == (before, counters)
    assert caller.allocator.state(1) is FrameState.FREE
    caller.allocator.check()


# ---- rule 3: best fit, without a scan ----------------------------------------------------------------------------


def test_rule_3_of_equals_the_oldest() -> None:
    """The match among equally full frames is the one that has waited longest, so that frames fill up in order."""
    caller = Caller(4)
    frames = [frame_of(caller.create(page, HALF)) for page in range(4)]
    assert [frame_of(caller.match(9, HALF)) for _ in range(4)] == frames


def test_rule_3_a_frame_waits_since_its_place_was_taken() -> None:
    """The older of two equally full frames is matched first, in whatever order they were filled."""
    caller = Caller(2)
    refs = [caller.allocator.create_prep(caller.take(), HALF) for _ in range(2)]
    for ref in reversed(refs):
        caller.allocator.create_finish(ref, 1, content(1, HALF))
    assert [frame_of(caller.match(9, HALF)) for _ in range(2)] == [frame_of(ref) for ref in refs]


def steps_of(call: Callable[[], Any]) -> int:
    """Return the number of Python lines that a call executes."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("wanted", [1, 31, MAX_CHUNKS])
@pytest.mark.parametrize("halves", [False, True])
def test_rule_3_never_a_scan(wanted: int, halves: bool) -> None:
    """A search for a match takes as many steps with 2000 frames on all lists as with two on one list."""

    def steps_with(chunks: list[int]) -> int:
        caller, data = Caller(len(chunks)), content(5, size_of(wanted))
        for page, used in enumerate(chunks):
            caller.create(page, size_of(used))
        if halves:
            return steps_of(lambda: caller.allocator.match_prep(len(data)))
        return steps_of(lambda: caller.allocator.match(5, data))

    few = steps_with([1, 1])
    # The most recent frame does not move, which saves a few steps.
    assert abs(steps_with([1 + page % MAX_CHUNKS for page in range(2000)]) - few) < 10
    assert steps_with([min(MAX_CHUNKS, NCHUNKS + 1 - wanted)] * 2000) <= few + 10
    assert steps_of(lambda: sum(1 for _ in range(100))) > 100


def test_rule_3_nothing_else_scans_either() -> None:
    """Storing, freeing and reclaiming take as many steps with 2000 frames as with ten."""

    def cycle(caller: Caller) -> int:
        allocator = caller.allocator
        spare = caller.take()

        def work() -> None:
            ref = allocator.create_prep(spare, HALF)
            allocator.create_finish(ref, 5, content(5, HALF))
            allocator.free(ref)
            oldest = allocator.oldest(PERSISTENT_KIND)
            allocator.writeback_begin(oldest)
            allocator.writeback_failed(oldest)
            allocator.fill_prep(spare)
            allocator.fill_cancel(spare)

        return steps_of(work)

    small, large = Caller(11), Caller(2001)
    for caller in (small, large):
        while len(caller.free_frames) > 1:
            caller.create(len(caller.free_frames), size_of(40))
    assert cycle(small) == cycle(large)


# ---- rule 4: the LRU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_rule_4_adding_promotes(kind: int) -> None:
    """A frame becomes the most recent one when its first zpage is added, and again with its second."""
    caller = Caller(3)
    frames = [frame_of(caller.create(page, HALF, kind)) for page in range(3)]
    assert caller.lru(kind) == frames
    assert frame_of(caller.match(9, HALF, kind)) == frames[0]
    assert caller.lru(kind) == [frames[1], frames[2], frames[0]]


@pytest.mark.parametrize("kind", BOTH)
def test_rule_4_reading_does_not_promote(kind: int) -> None:
    """A frame keeps its place when its zpages are read, with each kind of read."""
    caller = Caller(3)
    refs = [caller.create(page, HALF, kind) for page in range(3)]
    before = caller.lru(kind)
    assert caller.zpage(refs[0], 0) == content(0, HALF)
    caller.allocator.residents(frame_of(refs[0]))
    caller.allocator.frame_bytes(frame_of(refs[0]))
    assert caller.lru(kind) == before


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", BOTH)
def test_rule_4_freeing_does_not_promote(which: int, kind: int) -> None:
    """A frame keeps its place when one of its zpages is freed."""
    caller = Caller(3)
    caller.create(0, 1, kind)
    pair = [caller.create(1, size_of(40), kind), caller.match(2, size_of(20), kind)]
    caller.create(3, size_of(60), kind)
    before = caller.lru(kind)
    assert frame_of(pair[0]) == frame_of(pair[1]) == before[1]
    assert not caller.free(pair[which])
    assert caller.lru(kind) == before


def test_rule_4_reclaim_takes_whole_frames_from_the_old_end() -> None:
    """The oldest frame goes first, with both its zpages, and the next one follows."""
    caller = Caller(3)
    for page in range(6):
        caller.store(page, HALF)
    order = caller.lru()
    assert order == [0, 1, 2]
    for frame in order:
        assert caller.allocator.oldest(PERSISTENT_KIND) == frame
        caller.allocator.writeback_begin(frame)
        assert [resident.page for resident in caller.allocator.residents(frame)] == [2 * frame, 2 * frame + 1]
        assert caller.allocator.writeback_done(frame) == frame
    assert caller.allocator.oldest(PERSISTENT_KIND) == NO_FRAME


def test_rule_4_raw_pages_go_first() -> None:
    """The frame of a raw page holds one page, so it goes to the old end at once."""
    caller = Caller(3)
    caller.create(1, HALF)
    raw = frame_of(caller.raw(2))
    assert caller.allocator.oldest(PERSISTENT_KIND) == raw
    caller.create(3, max_zpage_size())
    assert caller.lru()[0] == raw
    assert caller.allocator.residents(raw) == [Resident(raw << REF_BITS, 2)]


# ---- rule 5: persistent and ephemeral frames apart ----------------------------------------------------------------


def test_rule_5_each_kind_has_its_own_lru() -> None:
    """A frame is on the list of its kind only."""
    caller = Caller(4)
    persistent = [frame_of(caller.create(page, HALF)) for page in range(2)]
    ephemeral, _ = fill(caller, 10)
    other = frame_of(caller.create(3, HALF, EPHEMERAL_KIND))
    assert caller.lru(PERSISTENT_KIND) == persistent
    assert caller.lru(EPHEMERAL_KIND) == [ephemeral, other]
    assert caller.allocator.oldest(EPHEMERAL_KIND) == ephemeral
    assert [caller.allocator.is_ephemeral(frame) for frame in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("kind", BOTH)
def test_rule_5_kinds_are_never_matched_with_each_other(kind: int) -> None:
    """A zpage of one kind never joins a frame of the other kind, even if it would fit."""
    caller = Caller(2)
    caller.create(1, HALF, 1 - kind)
    assert caller.match(2, HALF, kind) == NO_REF
    assert caller.match(2, HALF, 1 - kind) != NO_REF


def test_rule_5_a_copy_with_one_buddy_takes_no_persistent_zpage() -> None:
    """A clean copy of a block with one wanted zpage stays a clean copy."""
    caller = Caller(2)
    _, refs = fill(caller, 10)
    caller.free(refs[0])
    assert caller.match(2, 1) == NO_REF
    caller.allocator.check()


def test_rule_5_only_ephemeral_frames_are_dropped() -> None:
    """Dropping a persistent frame and writing back an ephemeral one are errors and raise."""
    caller = Caller(2)
    persistent = frame_of(caller.create(1, HALF))
    ephemeral, _ = fill(caller, 10)
    with pytest.raises(AssertionError, match="DROP_BEGUN cannot happen"):
        caller.allocator.drop_begin(persistent)
    with pytest.raises(AssertionError, match="WRITEBACK_BEGUN cannot happen"):
        caller.allocator.writeback_begin(ephemeral)
    caller.allocator.check()


# ---- rule 6: unevictable -------------------------------------------------------------------------------------------


def test_rule_6_a_frame_being_filled_is_unevictable() -> None:
    """Reclaim skips the frame from prep to finish, and a direct call refuses it."""
    caller = Caller(2)
    ref = caller.allocator.create_prep(caller.take(), HALF)
    assert caller.allocator.oldest(PERSISTENT_KIND) == NO_FRAME
    with pytest.raises(AssertionError, match="unevictable"):
        caller.allocator.writeback_begin(frame_of(ref))
    other = frame_of(caller.create(2, max_zpage_size()))
    assert caller.lru() == [frame_of(ref), other]
    assert caller.allocator.oldest(PERSISTENT_KIND) == other
    caller.allocator.create_finish(ref, 1, content(1, HALF))
    assert caller.allocator.oldest(PERSISTENT_KIND) == frame_of(ref)
    caller.allocator.writeback_begin(frame_of(ref))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("kind", BOTH)
def test_rule_6_at_most_two_and_both_must_finish(order: list[int], kind: int) -> None:
    """A frame can be matched while its first zpage is being filled. It is evictable when both are finished."""
    caller = Caller(1)
    refs = [caller.allocator.create_prep(caller.take(), HALF, kind), caller.allocator.match_prep(HALF, kind)]
    assert frame_of(refs[0]) == frame_of(refs[1])
    assert caller.allocator.match_prep(1, kind) == NO_REF
    for index in order:
        assert caller.allocator.oldest(kind) == NO_FRAME
        caller.allocator.check()
        caller.allocator.match_finish(refs[index], index, content(index, HALF))
    assert caller.allocator.oldest(kind) == 0
    assert [caller.zpage(refs[index], index) for index in (0, 1)] == [content(0, HALF), content(1, HALF)]
    caller.allocator.check()


def test_rule_6_a_matched_frame_is_unevictable_again() -> None:
    """An evictable frame is unevictable from match_prep to match_finish."""
    caller = Caller(1)
    caller.create(1, HALF)
    ref = caller.allocator.match_prep(HALF)
    assert caller.allocator.oldest(PERSISTENT_KIND) == NO_FRAME
    caller.allocator.match_finish(ref, 2, content(2, HALF))
    assert caller.allocator.oldest(PERSISTENT_KIND) == frame_of(ref)


def test_rule_6_a_frame_being_read_into_is_unevictable() -> None:
    """Reclaim does not take the frame from fill_prep to finish or cancel, and nothing is matched with it."""
    caller = Caller(3)
    frame = caller.take()
    caller.allocator.fill_prep(frame)
    assert caller.allocator.oldest(EPHEMERAL_KIND) == NO_FRAME
    assert caller.match(1, 1, EPHEMERAL_KIND) == NO_REF
    with pytest.raises(AssertionError, match="unevictable"):
        caller.allocator.drop_begin(frame)
    caller.allocator.check()
    caller.allocator.fill_finish_raw(frame, 3)
    assert caller.allocator.oldest(EPHEMERAL_KIND) == frame
    other = caller.take()
    caller.allocator.fill_prep(other)
    caller.allocator.fill_cancel(other)
    assert caller.allocator.state(other) is FrameState.FREE
    assert caller.lru(EPHEMERAL_KIND) == [frame]
    caller.allocator.check()


# ---- rule 7: zombies and dying frames ----------------------------------------------------------------------------


def zombie(caller: Caller) -> list[int]:
    """Begin to write back a frame with pages 1 and 2, and return its refs."""
    refs = [caller.create(1, size_of(20)), caller.match(2, size_of(20))]
    caller.allocator.writeback_begin(frame_of(refs[0]))
    return refs


def test_rule_7_a_zombie_is_off_all_lists_and_readable() -> None:
    """A frame that is being written back is not reclaimed again and not matched, and its zpages can be read."""
    caller = Caller(2)
    refs = zombie(caller)
    assert caller.allocator.state(0) is FrameState.ZOMBIE
    assert caller.lru() == []
    assert caller.allocator.counters()["pers_zombie_count"] == 1
    assert [caller.zpage(ref, page) for ref, page in zip(refs, (1, 2), strict=True)] == [
        content(1, size_of(20)),
        content(2, size_of(20)),
    ]
    assert [resident.page for resident in caller.allocator.residents(0)] == [1, 2]
    caller.free(refs[0])
    assert caller.match(3, 1) == NO_REF
    assert sum(caller.allocator.unbuddied_lists()) == 0
    with pytest.raises(AssertionError, match="cannot happen"):
        caller.allocator.writeback_begin(0)
    caller.allocator.check()


@pytest.mark.parametrize("freed", [[], [0], [1], [0, 1], [1, 0]])
@pytest.mark.parametrize("ends", ["done", "failed"])
def test_rule_7_pages_of_a_zombie_go_at_any_moment(freed: list[int], ends: str) -> None:
    """With any frees meanwhile, the frame comes back after the write. After a failure it comes back only if empty."""
    caller = Caller(1)
    refs = zombie(caller)
    for index in freed:
        assert not caller.free(refs[index])
        caller.allocator.check()
    left = [resident for index, resident in enumerate(map(Resident, refs, (1, 2))) if index not in freed]
    assert caller.allocator.residents(0) == left
    assert caller.allocator.counters()["pers_zpages"] == len(left)
    if ends == "done":
        assert caller.allocator.writeback_done(0) == 0
        assert caller.allocator.counters()["pers_evicted_pageframes"] == 1
    else:
        assert caller.allocator.writeback_failed(0) == (NO_FRAME if left else 0)
        assert caller.allocator.counters()["pers_evicted_pageframes"] == 0
    gone = ends == "done" or not left
    assert caller.allocator.state(0) is (FrameState.FREE if gone else FrameState.PERSISTENT)
    assert caller.allocator.counters()["pers_pageframes"] == (not gone)
    assert caller.allocator.counters()["pers_zombie_count"] == 0
    caller.allocator.check()


def test_rule_7_a_failed_writeback_goes_back_to_the_old_end() -> None:
    """Zombies whose write failed are the next candidates again, before all others, with their contents."""
    caller = Caller(3)
    for page in range(3):
        caller.create(page, max_zpage_size())
    for frame in (0, 1):
        caller.allocator.writeback_begin(frame)
    for frame in (1, 0):
        assert caller.allocator.writeback_failed(frame) == NO_FRAME
    assert caller.lru() == [0, 1, 2]
    assert caller.zpage(0, 0) == content(0, max_zpage_size())


@pytest.mark.parametrize("freed", [False, True])
def test_rule_7_a_raw_zombie(freed: bool) -> None:
    """A raw page may also be overwritten while it is being written back."""
    caller = Caller(1)
    ref = caller.raw(5)
    caller.allocator.writeback_begin(0)
    assert caller.allocator.frame_bytes(ref >> REF_BITS) == content(5, PAGE_SIZE)
    if freed:
        assert not caller.free(ref)
        assert caller.allocator.residents(0) == []
    caller.allocator.check()
    assert caller.allocator.writeback_failed(0) == (0 if freed else NO_FRAME)
    caller.allocator.check()
    assert caller.lru() == ([] if freed else [0])


def test_rule_7_frees_in_a_dying_frame_are_ignored() -> None:
    """A free of a zpage in a dying frame does nothing: the frame comes back once, at the end."""
    caller = Caller(1)
    frame, refs = fill(caller, 10)
    caller.allocator.drop_begin(frame)
    assert caller.allocator.state(frame) is FrameState.DYING
    assert caller.lru(EPHEMERAL_KIND) == []
    for ref in refs:
        assert not caller.free(ref)
    assert [resident.page for resident in caller.allocator.residents(frame)] == [10, 11]
    assert caller.match(1, 1, EPHEMERAL_KIND) == NO_REF
    caller.allocator.check()
    assert caller.allocator.drop_done(frame) == frame
    assert caller.allocator.counters()["eph_evicted_pageframes"] == 1
    assert caller.allocator.counters()["eph_zpages"] == 0
    caller.allocator.check()


CALLS: dict[Event, Callable[[Allocator, int], object]] = {
    Event.PERSISTENT_CREATED: lambda allocator, frame: allocator.create_prep(frame, HALF),
    Event.EPHEMERAL_CREATED: lambda allocator, frame: allocator.fill_prep(frame),
    Event.WRITEBACK_BEGUN: lambda allocator, frame: allocator.writeback_begin(frame),
    Event.WRITEBACK_FAILED: lambda allocator, frame: allocator.writeback_failed(frame),
    Event.WRITEBACK_DONE: lambda allocator, frame: allocator.writeback_done(frame),
    Event.DROP_BEGUN: lambda allocator, frame: allocator.drop_begin(frame),
    Event.DROP_DONE: lambda allocator, frame: allocator.drop_done(frame),
}


def in_state(state: FrameState) -> Caller:
    """Return a caller whose frame 0 is in this state."""
    caller = Caller(1)
    if state in (FrameState.EPHEMERAL, FrameState.DYING):
        fill(caller, 10)
    elif state is not FrameState.FREE:
        caller.create(1, HALF)
    if state is FrameState.ZOMBIE:
        caller.allocator.writeback_begin(0)
    elif state is FrameState.DYING:
        caller.allocator.drop_begin(0)
    assert caller.allocator.state(0) is state
    return caller


@pytest.mark.parametrize("state", list(FrameState), ids=lambda state: state.name)
@pytest.mark.parametrize("event", list(CALLS), ids=lambda event: event.name)
def test_rule_7_what_is_not_in_the_table_raises(state: FrameState, event: Event) -> None:
    """Each state and event gives the state after it, or an AssertionError if the table has none."""
    caller = in_state(state)
    if (state, event) in NEXT:
        CALLS[event](caller.allocator, 0)
        assert caller.allocator.state(0) is NEXT[state, event]
        caller.allocator.check()
    else:
        with pytest.raises(AssertionError):
            CALLS[event](caller.allocator, 0)


def test_rule_7_the_table_of_states() -> None:
    """Only its owner, or the end of its write, frees the only copy, and a zombie never becomes a clean copy."""
    assert {event for state, event in NEXT if state is FrameState.ZOMBIE} == {
        Event.WRITEBACK_DONE,
        Event.WRITEBACK_FAILED,
    }
    assert {event for state, event in NEXT if state is FrameState.PERSISTENT} == {Event.EMPTIED, Event.WRITEBACK_BEGUN}
    assert NEXT[FrameState.ZOMBIE, Event.WRITEBACK_FAILED] is FrameState.PERSISTENT


# ---- rule 8: frames are handed in and out --------------------------------------------------------------------------


@given(st.lists(st.integers(1, max_zpage_size()), max_size=40), st.randoms(use_true_random=False))
def test_rule_8_every_frame_comes_back(sizes: list[int], generator: Any) -> None:
    """Each frame that was handed in comes back exactly once, when its last zpage is freed."""
    caller = Caller(40)
    refs = [caller.store(page, size) for page, size in enumerate(sizes)]
    out = {frame_of(ref) for ref in refs}
    assert len(caller.free_frames) == 40 - len(out)
    left = [frame_of(ref) for ref in refs]
    generator.shuffle(refs)
    for ref in refs:
        left.remove(frame_of(ref))
        assert caller.free(ref) == (frame_of(ref) not in left)
    assert caller.free_frames == list(range(40))
    assert caller.allocator.counters()["pers_pageframes"] == 0
    caller.allocator.check()


def test_rule_8_a_frame_in_use_is_not_taken() -> None:
    """A frame that the allocator has already is refused by each call that takes one."""
    caller = Caller(1)
    caller.create(1, HALF)
    for call in (
        lambda: caller.allocator.create_prep(0, 1),
        lambda: caller.allocator.create_raw(0, 1, bytes(PAGE_SIZE)),
        lambda: caller.allocator.fill_prep(0),
    ):
        with pytest.raises(AssertionError):
            call()
    assert caller.zpage(0, 1) == content(1, HALF)
    caller.allocator.check()


@pytest.mark.parametrize("ref", [0, 1])
def test_rule_8_a_zpage_is_freed_once(ref: int) -> None:
    """A second free of a zpage is an error and raises."""
    caller = Caller(1)
    refs = [caller.create(1, HALF), caller.match(2, HALF)]
    caller.free(refs[ref])
    with pytest.raises(AssertionError, match="no zpage"):
        caller.free(refs[ref])


TABLE_BYTES = {"zbud": 24, "dense": 27}
"""Table bytes of a frame by packing. They are locked in RAM, whatever the pool holds."""
LIST_ENDS = 4 * 2 * (2 + 2 * NCHUNKS)
"""Bytes of the two ends of each list: an LRU and NCHUNKS unbuddied lists for each kind."""
COUNTERS = WORD_SIZE * 2 * (11 + 2 * NCHUNKS)
"""Bytes of the counters: 11 and two histograms for each kind."""


def test_rule_8_no_memory_of_its_own(packing: Packing) -> None:
    """Storing into 2000 frames takes no memory but the buffers, and the table has the right length."""
    caller = Caller(2000)
    allocator, data = caller.allocator, content(1, HALF)
    for ref in (allocator.create_prep(1999, HALF), allocator.match_prep(HALF)):
        allocator.match_finish(ref, 1, data)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for frame in range(1999):
            for ref in (allocator.create_prep(frame, HALF), allocator.match_prep(HALF)):
                allocator.match_finish(ref, frame, data)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert allocator.counters()["pers_zpages"] == 4000
    assert after - before < 4000
    size = packing.kind.table_size
    assert size(0) == LIST_ENDS + COUNTERS + {"zbud": 0, "dense": WORD_SIZE + PAGE_SIZE}[packing.name]
    assert size(2000) - size(0) == TABLE_BYTES[packing.name] * 2000


def test_rule_8_the_buffers_are_the_callers(packing: Packing) -> None:
    """A table that is too short is refused. The spans of the table lie within it and do not overlap."""
    kind = packing.kind
    with pytest.raises(ValueError, match="too small for 10 frames"):
        packing.allocator(memoryview(bytearray(10 * PAGE_SIZE)), memoryview(bytearray(kind.table_size(10) - 1)), 10)
    for frames in range(10, 26):
        halves = [(0, frames // 2), (frames // 2, frames - frames // 2)]
        spans = [*kind.fixed_spans(frames), *(span for half in halves for span in kind.table_spans(frames, *half))]
        covered = [byte for offset, length in spans for byte in range(offset, offset + length)]
        assert len(covered) == len(set(covered))
        assert max(covered) < kind.table_size(frames)
        bare = sorted(set(range(kind.table_size(frames))) - set(covered))
        assert not any(byte + 7 in bare for byte in bare), "more than what makes a column begin at a word"
        assert frames % 8 or not bare


# ---- rule 9: counters ----------------------------------------------------------------------------------------------

NAMES = ["pageframes", "zpages", "zbytes", "cumul_zpages", "cumul_zbytes", "buddied_count", "unbuddied_count"]
NAMES += ["evicted_pageframes", "zombie_count"]


def test_rule_9_the_kernels_names() -> None:
    """Each of the kernel's counters exists for both kinds and begins at 0."""
    counters = Caller(1).allocator.counters()
    assert KINDS == ("pers", "eph")
    assert {f"{kind}_{name}" for kind in KINDS for name in NAMES} <= counters.keys()
    assert set(counters.values()) == {0}


def test_rule_9_counters_follow() -> None:
    """Each counter of both kinds is right after each part of a short story."""
    caller = Caller(8)

    def numbers(kind: str) -> list[int]:
        counters = caller.allocator.counters()
        return [counters[f"{kind}_{name}"] for name in [*NAMES, "raw_count"]]

    first = caller.create(1, 100)
    second = caller.match(2, 200)
    caller.create(3, 3000)
    raw = caller.raw(4)
    assert numbers("pers") == [3, 3, 3300, 3, 3300, 1, 1, 0, 0, 1]
    frame, refs = fill(caller, 10)
    assert numbers("eph") == [1, 2, 2 * HALF, 2, 2 * HALF, 1, 0, 0, 0, 0]
    caller.free(second)
    assert numbers("pers") == [3, 2, 3100, 3, 3300, 0, 2, 0, 0, 1]
    caller.allocator.writeback_begin(frame_of(first))
    assert numbers("pers") == [3, 2, 3100, 3, 3300, 0, 1, 0, 1, 1]
    caller.give(caller.allocator.writeback_done(frame_of(first)))
    assert numbers("pers") == [2, 1, 3000, 3, 3300, 0, 1, 1, 0, 1]
    caller.free(raw)
    assert numbers("pers") == [1, 1, 3000, 3, 3300, 0, 1, 1, 0, 0]
    caller.free(refs[1])
    assert numbers("eph") == [1, 1, HALF, 2, 2 * HALF, 0, 1, 0, 0, 0]
    caller.allocator.drop_begin(frame)
    caller.give(caller.allocator.drop_done(frame))
    assert numbers("eph") == [0, 0, 0, 2, 2 * HALF, 0, 0, 1, 0, 0]
    caller.allocator.check()


# ---- rule 10: two, or possibly more ------------------------------------------------------------------------------

SOURCES = sorted(Path(zbudfs.__file__).parent.rglob("*.py"))
ALLOCATORS = [Path(zbudfs.__file__).parent / "core" / name for name in ("allocator.py", "zbud.py", "dense.py")]
INSIDE = {"CHUNK_SIZE", "CHUNK_SHIFT", "NCHUNKS", "MAX_CHUNKS", "HANDLE_SIZE", "SIZE_BITS", "SIZE_MASK"}
"""Names of things inside a frame."""


def about_refs(node: ast.expr) -> bool:
    """Return whether an expression is called a ref, or is computed from one."""
    return any(
        "ref" in (name.id if isinstance(name, ast.Name) else name.attr).split("_")
        for name in ast.walk(node)
        if isinstance(name, ast.Name | ast.Attribute)
    )


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in ALLOCATORS], ids=lambda path: path.stem)
def test_rule_10_no_other_code_knows_that_a_frame_holds_two(path: Path) -> None:
    """Only the allocator looks into a frame. Other code takes a ref apart with REF_BITS, never with a number."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and path.name != "units.py":
            inside = INSIDE & {alias.name for alias in node.names}
            assert not inside, f"line {node.lineno}: {inside} is for the allocator"
        if isinstance(node, ast.Attribute):
            assert node.attr.lstrip("_") not in ("first_chunks", "last_chunks"), f"line {node.lineno}"
        if isinstance(node, ast.BinOp) and isinstance(
            node.op, ast.RShift | ast.LShift | ast.Mod | ast.BitAnd | ast.BitXor
        ):
            sides = [(node.left, node.right)]
            if isinstance(node.op, ast.BitAnd | ast.BitXor):
                sides.append((node.right, node.left))
            for side, other in sides:
                number = isinstance(other, ast.Constant) and isinstance(other.value, int)
                assert not (number and about_refs(side)), f"line {node.lineno}: a ref is taken apart by a number"


def test_rule_10_blocks_have_room_for_more() -> None:
    """The mask of a block's live zpages has a bit for each index of a ref, and one for its reader."""
    assert DEFAULT_ZPAGES <= MOST_ZPAGES == HOLD_INDEX < 8 == 1 << REF_BITS
    blocks = 2 * MAX_PAGE_NUMBER  # more than the largest device needs
    assert blocks << REF_BITS < 1 << REF_WIDTH
