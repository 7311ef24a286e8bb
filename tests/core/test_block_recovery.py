# SPDX-License-Identifier: MIT
"""A new process rebuilds the block map of a dead one: the ready segments, and the blocks that are claimed."""

from __future__ import annotations

import sys

import pytest

from zbudfs.core.block_map import HEADER_BLOCK, SEGMENT_BLOCKS, BlockMap

SEGMENTS = 4


def filled() -> tuple[memoryview, BlockMap, list[int]]:
    """Return a map with two ready segments of four, and blocks of which two zpages each are live."""
    buffer = memoryview(bytearray(BlockMap.table_size(SEGMENTS)))
    blocks = BlockMap(buffer, SEGMENTS)
    first, count = blocks.take_holes(2)
    blocks.add_ready(first, count)
    used: list[int] = []
    while len(used) < 70:
        block, run = blocks.alloc(70 - len(used))
        used += range(block, block + run)
    for block in used:
        blocks.set_live(block, 0b101)
    blocks.check()
    return buffer, blocks, used


def test_everything_is_claimed_again() -> None:
    """All counts are as before after the claims, and the other blocks are free. A hole stays a hole."""
    buffer, before, used = filled()
    after = BlockMap(buffer, SEGMENTS, attach=True)
    assert (after.used_blocks, after.free_blocks, after.ready_segments) == (
        0,
        0,
        0,
    )  # a standby gets this question before it takes over
    after.reset()
    after.check()
    assert (after.used_blocks, after.free_blocks) == (0, 2 * SEGMENT_BLOCKS - 1)
    assert (after.ready_segments, after.holes) == (2, 2)
    for index in (0, 2):
        for block in used:
            assert after.restore(block, index) is True
            after.check()
    assert (after.used_blocks, after.free_blocks) == (before.used_blocks, before.free_blocks)
    assert [after.live(block) for block in used] == [0b101] * len(used)
    for block in used:
        assert not after.free(block, 0)
        assert after.free(block, 2)
        after.check()
    assert after.used_blocks == 0


def test_wrong_claims_are_refused() -> None:
    """A claim in the header, a hole, beyond the file or of a claimed zpage is refused, and nothing changes."""
    buffer, _, used = filled()
    after = BlockMap(buffer, SEGMENTS)
    for block in (HEADER_BLOCK, -1, 2 * SEGMENT_BLOCKS, SEGMENTS * SEGMENT_BLOCKS - 1, SEGMENTS * SEGMENT_BLOCKS):
        assert after.restore(block, 0) is False
    assert after.used_blocks == 0
    assert after.restore(used[0], 1) is True
    assert after.restore(used[0], 1) is False
    assert after.used_blocks == 1
    after.check()


def test_a_segment_that_was_being_punched_is_a_hole() -> None:
    """A process that dies between taking a segment and returning it leaves a hole."""
    buffer = memoryview(bytearray(BlockMap.table_size(SEGMENTS)))
    before = BlockMap(buffer, SEGMENTS)
    before.add_ready(*before.take_holes(2))
    assert before.take_free(0) == 1
    buffer.cast("Q")[1] = 1  # it died before it changed the mask of free blocks
    after = BlockMap(buffer, SEGMENTS, attach=True)
    after.reset()
    after.check()
    assert (after.ready_segments, after.holes) == (1, 3)
    assert after.restore(SEGMENT_BLOCKS, 0) is False
    assert after.are_holes(1, 1)


def test_a_table_is_as_large_as_it_says() -> None:
    """A table that is one byte too short is refused, and attaching writes nothing."""
    size = BlockMap.table_size(SEGMENTS)
    used = bytearray(size)
    blocks = BlockMap(memoryview(used), SEGMENTS)
    blocks.add_ready(*blocks.take_holes(SEGMENTS))
    assert int.from_bytes(used[-8:], sys.byteorder) == SEGMENTS
    with pytest.raises(ValueError, match="is too small for 4 segments"):
        BlockMap(memoryview(bytearray(size - 1)), SEGMENTS)
    buffer = bytearray(b"\xa5" * size)
    BlockMap(memoryview(buffer), SEGMENTS, attach=True)
    assert buffer == b"\xa5" * size


def test_a_reset_map_counts_again() -> None:
    """A reset of a map in use gives the map that another process would find."""
    buffer, blocks, _ = filled()
    blocks.reset()
    blocks.check()
    heir = BlockMap(buffer, SEGMENTS)
    assert (
        (blocks.used_blocks, blocks.free_blocks) == (heir.used_blocks, heir.free_blocks) == (0, 2 * SEGMENT_BLOCKS - 1)
    )


def test_a_reset_clears_a_large_map_to_its_end() -> None:
    """Zpages in the last blocks of a large map are no longer live. The buffer may be larger than the table."""
    segments = 2 * 1024 + 1
    blocks = BlockMap(memoryview(bytearray(BlockMap.table_size(segments) + 64)), segments)
    assert blocks.take_holes(segments) == (0, segments)
    blocks.add_ready(0, segments)
    places = [1, 1024 * SEGMENT_BLOCKS - 1, 1024 * SEGMENT_BLOCKS, segments * SEGMENT_BLOCKS - 1]
    for block in places:
        assert blocks.restore(block, 1)
    blocks.reset()
    assert [blocks.live(block) for block in places] == [0] * len(places)
    blocks.check()


def test_segments_that_were_never_ready_cost_nothing() -> None:
    """A reset neither reads nor writes the table of segments that were never ready, however many there are."""
    segments = 1000
    buffer = bytearray(BlockMap.table_size(segments))
    before = BlockMap(memoryview(buffer), segments)
    before.add_ready(*before.take_holes(3))
    masks, live = slice(8 * 3, 8 * segments), slice(-8 - segments - 64 * (segments - 3), -8 - segments)
    assert not any(buffer[masks])
    assert not any(buffer[live])
    buffer[masks] = b"\xa5" * len(buffer[masks])
    buffer[live] = b"\xa5" * len(buffer[live])
    kept = bytes(buffer[masks]), bytes(buffer[live])
    after = BlockMap(memoryview(buffer), segments, attach=True)
    after.reset()
    assert (bytes(buffer[masks]), bytes(buffer[live])) == kept
    assert (after.ready_segments, after.holes, after.free_blocks) == (3, segments - 3, 3 * SEGMENT_BLOCKS - 1)
    assert after.take_holes(2) == (3, 2)
    assert after.take_holes(segments) == (5, segments - 5)
    assert after.take_holes(1) == (-1, 0)


def test_a_hole_that_was_taken_and_lost() -> None:
    """A process that dies between taking segments and making them ready leaves holes, which are taken first."""
    buffer = memoryview(bytearray(BlockMap.table_size(SEGMENTS)))
    before = BlockMap(buffer, SEGMENTS)
    before.add_ready(*before.take_holes(1))
    assert before.take_holes(2) == (1, 2)
    after = BlockMap(buffer, SEGMENTS, attach=True)
    after.reset()
    after.check()
    assert after.holes == 3
    assert after.take_holes(9) == (1, 2)
    assert after.take_holes(9) == (3, 1)


def test_no_segment_beyond_the_disk_is_taken() -> None:
    """A disk with fewer segments than the table ends the range that was never ready."""
    blocks = BlockMap(memoryview(bytearray(BlockMap.table_size(SEGMENTS))), SEGMENTS, limit=3)
    assert blocks.holes == 3
    assert blocks.take_holes(2) == (0, 2)
    assert (blocks.take_holes(9), blocks.holes) == ((2, 1), 0)
    assert blocks.take_holes(1) == (-1, 0)


def test_no_hole_beyond_a_smaller_disk() -> None:
    """Holes beyond the end of a disk that is smaller after a restart are not taken."""
    buffer = memoryview(bytearray(BlockMap.table_size(SEGMENTS)))
    assert BlockMap(buffer, SEGMENTS).take_holes(SEGMENTS) == (0, SEGMENTS)
    after = BlockMap(buffer, SEGMENTS, limit=2, attach=True)
    after.reset()
    after.check()
    assert after.take_holes(9) == (0, 2)
    assert after.take_holes(9) == (-1, 0)
