# SPDX-License-Identifier: MIT
"""The block map is compared with sets of numbers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zbudfs.core.block_map import BEAT_SEGMENTS, HEADER_BLOCK, NO_SEGMENT, SEGMENT_BLOCKS, BlockMap

SEGMENTS = 5


def make(nr_segments: int = SEGMENTS, *, ready: int = 0) -> BlockMap:
    """Return a map whose first `ready` segments are ready."""
    blocks = BlockMap(memoryview(bytearray(BlockMap.table_size(nr_segments))), nr_segments)
    if ready:
        assert blocks.take_holes(ready) == (0, ready)
        blocks.add_ready(0, ready)
    return blocks


def blocks_of(segments: Iterable[int]) -> set[int]:
    """Return the blocks of segments, without the header."""
    found = {segment * SEGMENT_BLOCKS + bit for segment in segments for bit in range(SEGMENT_BLOCKS)}
    return found - {HEADER_BLOCK}


class BlockMapMachine(RuleBasedStateMachine):
    """The model has sets: holes, free blocks, and the live zpages of each used block. It has no lists and no masks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = make()
        self.holes = set(range(SEGMENTS))
        self.taken: list[set[int]] = []
        self.free: set[int] = set()
        self.allocated: set[int] = set()
        self.live: dict[int, int] = {}

    def free_of(self, segment: int) -> int:
        """Return how many free blocks a segment has."""
        return len(self.free & blocks_of([segment]))

    @rule(most=st.integers(0, SEGMENTS))
    def take_holes(self, most: int) -> None:
        """Take holes: they are neighbours, at most as many as requested, and at least one if there is one."""
        first, count = self.blocks.take_holes(most)
        assert count <= most
        assert (count > 0) == (most > 0 and bool(self.holes))
        if count:
            run = set(range(first, first + count))
            assert run <= self.holes
            self.holes -= run
            self.taken.append(run)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def add_ready(self, data: st.DataObject) -> None:
        """Make the taken segments ready: their blocks are free."""
        run = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.blocks.add_ready(min(run), len(run))
        self.free |= blocks_of(run)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def return_holes(self, data: st.DataObject) -> None:
        """Return the taken segments: they are holes again."""
        run = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.blocks.return_holes(min(run), len(run))
        self.holes |= run

    @rule(keep=st.integers(0, SEGMENTS * SEGMENT_BLOCKS))
    def take_free(self, keep: int) -> None:
        """Take a free segment. It is available as long as enough other blocks remain."""
        whole = {segment for segment in range(SEGMENTS) if self.free_of(segment) == SEGMENT_BLOCKS}
        possible = bool(whole) and len(self.free) - SEGMENT_BLOCKS >= keep
        segment = self.blocks.take_free(keep)
        assert (segment != NO_SEGMENT) == possible
        if possible:
            assert segment in whole
            self.free -= blocks_of([segment])
            self.taken.append({segment})

    @rule(most=st.integers(1, 70))
    def alloc(self, most: int) -> None:
        """Allocate neighbours of the emptiest segment. There are none only if no block is free."""
        first, count = self.blocks.alloc(most)
        assert count <= most
        assert (count > 0) == bool(self.free)
        if count:
            run = set(range(first, first + count))
            assert run <= self.free
            segment = first // SEGMENT_BLOCKS
            assert (first + count - 1) // SEGMENT_BLOCKS == segment
            assert self.free_of(segment) == max(self.free_of(number) for number in range(SEGMENTS))
            assert count == most or first + count not in self.free or (first + count) % SEGMENT_BLOCKS == 0
            self.free -= run
            self.allocated |= run

    @precondition(lambda self: self.allocated)
    @rule(data=st.data(), live=st.integers(0, 255))
    def set_live(self, data: st.DataObject, live: int) -> None:
        """Set the zpages of an allocated block. Without any it is free again."""
        block = data.draw(st.sampled_from(sorted(self.allocated)))
        self.allocated.remove(block)
        self.blocks.set_live(block, live)
        if live:
            self.live[block] = live
        else:
            self.free.add(block)

    @precondition(lambda self: self.allocated)
    @rule(live=st.integers(0, 3))
    def set_all_live(self, live: int) -> None:
        """Set all blocks of one allocation, so that segments fill and empty within few steps."""
        for block in sorted(self.allocated):
            self.blocks.set_live(block, live)
            if live:
                self.live[block] = live
            else:
                self.free.add(block)
        self.allocated.clear()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_one(self, data: st.DataObject) -> None:
        """Free a zpage. The last one frees the block."""
        block = data.draw(st.sampled_from(sorted(self.live)))
        index = data.draw(st.sampled_from([bit for bit in range(8) if self.live[block] >> bit & 1]))
        last = self.live[block] == 1 << index
        assert self.blocks.free(block, index) == last
        self.live[block] ^= 1 << index
        if last:
            del self.live[block]
            self.free.add(block)

    @rule(segment=st.integers(0, SEGMENTS - 1))
    def free_a_segment(self, segment: int) -> None:
        """Free all blocks of one segment."""
        for block in sorted(blocks_of([segment]) & self.live.keys()):
            for index in range(8):
                if self.live[block] >> index & 1:
                    self.blocks.free(block, index)
            del self.live[block]
            self.free.add(block)

    @invariant()
    def agrees(self) -> None:
        """All counters and lists equal the model's."""
        blocks = self.blocks
        blocks.check()
        assert blocks.free_blocks == len(self.free)
        assert blocks.used_blocks == len(self.allocated) + len(self.live)
        assert blocks.holes == len(self.holes)
        assert blocks.ready_segments == SEGMENTS - len(self.holes) - sum(len(run) for run in self.taken)
        for block, live in self.live.items():
            assert blocks.live(block) == live
        assert HEADER_BLOCK not in self.free | self.allocated | self.live.keys()


TestBlockMapMachine = BlockMapMachine.TestCase
TestBlockMapMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_header_is_never_given_away() -> None:
    """The first segment has one block less, and is never completely free."""
    blocks = make(1, ready=1)
    assert blocks.free_blocks == SEGMENT_BLOCKS - 1
    assert blocks.alloc(100) == (HEADER_BLOCK + 1, SEGMENT_BLOCKS - 1)
    assert blocks.alloc(1) == (0, 0)
    for block in range(1, SEGMENT_BLOCKS):
        blocks.set_live(block, 0)
    assert blocks.take_free(0) == NO_SEGMENT
    blocks.check()


def test_the_emptiest_segment_is_first() -> None:
    """Blocks come from the segment with room for the longest run, so that batches are neighbours."""
    blocks = make(3, ready=3)
    first, count = blocks.alloc(SEGMENT_BLOCKS)
    assert count == SEGMENT_BLOCKS
    for block in range(first, first + 10):
        blocks.set_live(block, 0)
    assert blocks.alloc(SEGMENT_BLOCKS)[1] == SEGMENT_BLOCKS
    assert blocks.alloc(SEGMENT_BLOCKS) == (1, SEGMENT_BLOCKS - 1)
    assert blocks.alloc(SEGMENT_BLOCKS) == (first, 10)


def test_freed_blocks_are_used_before_a_hole() -> None:
    """A freed block is allocated again before the file grows."""
    blocks = make(2, ready=1)
    first, count = blocks.alloc(SEGMENT_BLOCKS)
    for block in range(first, first + count):
        blocks.set_live(block, 0b11)
    assert blocks.alloc(1) == (0, 0)
    assert not blocks.free(first + 7, 0)
    assert blocks.alloc(1) == (0, 0)
    assert blocks.free(first + 7, 1)
    assert blocks.alloc(5) == (first + 7, 1)
    assert blocks.holes == 1


def test_a_zpage_is_freed_once() -> None:
    """A second free of a zpage is an error and raises."""
    blocks = make(1, ready=1)
    block, _ = blocks.alloc(1)
    blocks.set_live(block, 0b01)
    with pytest.raises(AssertionError, match="is not live"):
        blocks.free(block, 1)
    assert blocks.free(block, 0)
    with pytest.raises(AssertionError):
        blocks.free(block, 0)
    with pytest.raises(AssertionError, match="is free already"):
        blocks.set_live(block, 0)


def test_the_table_is_small() -> None:
    """The table takes less than one and a half bytes a block, and a table that is too short is refused."""
    assert make(1000).nr_blocks == 1000 * SEGMENT_BLOCKS
    assert BlockMap.table_size(1000) <= 1000 * SEGMENT_BLOCKS * 1.5
    with pytest.raises(ValueError, match="too small"):
        BlockMap(memoryview(bytearray(BlockMap.table_size(4) - 1)), 4)


@pytest.mark.parametrize("damage", ["free_blocks", "ready_segments"])
def test_check_sees_a_wrong_counter(damage: str) -> None:
    """The recount finds a counter that is off by one."""
    blocks = make(2, ready=1)
    setattr(blocks, damage, getattr(blocks, damage) + 1)
    with pytest.raises(AssertionError, match="a recount gives"):
        blocks.check()


def test_a_long_reset_gives_signs_of_life() -> None:
    """The reset gives a sign of life for each BEAT_SEGMENTS segments that were ever ready."""
    blocks = BlockMap(memoryview(bytearray(BlockMap.table_size(2 * BEAT_SEGMENTS + 1))), 2 * BEAT_SEGMENTS + 1)
    blocks.add_ready(*blocks.take_holes(2 * BEAT_SEGMENTS + 1))
    beats: list[int] = []
    blocks.reset(lambda: beats.append(1))
    assert len(beats) == 3


def test_a_disk_with_fewer_segments() -> None:
    """Segments beyond the end of the disk are no holes: they are never made ready, not even after a rebuild."""
    buffer = memoryview(bytearray(BlockMap.table_size(10)))
    blocks = BlockMap(buffer, 10, limit=3)
    assert blocks.holes == 3
    assert blocks.take_holes(16) == (0, 3)
    assert blocks.take_holes(16)[1] == 0
    blocks.add_ready(0, 3)
    blocks.reset()
    assert (blocks.holes, blocks.ready_segments) == (0, 3)
    blocks.check()


def test_a_free_segment_is_taken_down_to_the_last_block_to_keep() -> None:
    """A segment is available if exactly as many blocks remain as are to be kept, and not if one fewer remains."""
    blocks = make(ready=3)
    remaining = blocks.free_blocks - SEGMENT_BLOCKS
    assert blocks.take_free(remaining + 1) == NO_SEGMENT
    assert blocks.take_free(remaining) != NO_SEGMENT


def test_a_full_segment_is_no_hole() -> None:
    """A segment without a free block is not a hole."""
    blocks = make(ready=2)
    while blocks.alloc(SEGMENT_BLOCKS)[1]:
        pass
    assert blocks.free_blocks == 0
    assert not blocks.are_holes(1, 1)


def test_neighbours_that_are_holes() -> None:
    """A taken segment that will be returned counts as a hole, and a ready one does not."""
    blocks = BlockMap(memoryview(bytearray(BlockMap.table_size(8))), 8)
    first, count = blocks.take_holes(4)
    blocks.add_ready(first, count)
    assert blocks.are_holes(4, 4)
    assert not blocks.are_holes(0, 4)
    assert not blocks.are_holes(3, 1)
    assert {blocks.take_free(0) for _ in range(3)} == {1, 2, 3}
    assert blocks.are_holes(1, 3)
    assert not blocks.are_holes(0, 4)
    for segment in (1, 2, 3):
        blocks.return_holes(segment, 1)
    blocks.check()
