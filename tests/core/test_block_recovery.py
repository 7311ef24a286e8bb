# SPDX-License-Identifier: MIT
"""What a new process makes of the block map of a dead one: which segments are ready, and which blocks somebody claims."""

from __future__ import annotations

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
    """Then all counts are what they were, and the rest is free; a hole stays one."""
    buffer, before, used = filled()
    after = BlockMap(buffer, SEGMENTS, attach=True)
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


def test_what_cannot_be_is_not_claimed() -> None:
    """The header, a block of a hole, one beyond the file, a zpage that is claimed already; and nothing has changed."""
    buffer, _, used = filled()
    after = BlockMap(buffer, SEGMENTS)
    for block in (HEADER_BLOCK, -1, 2 * SEGMENT_BLOCKS, SEGMENTS * SEGMENT_BLOCKS - 1, SEGMENTS * SEGMENT_BLOCKS):
        assert after.restore(block, 0) is False
    assert after.used_blocks == 0
    assert after.restore(used[0], 1) is True
    assert after.restore(used[0], 1) is False
    assert after.used_blocks == 1
    after.check()


def test_a_table_is_as_large_as_it_says() -> None:
    """One byte less is refused; attaching writes nothing."""
    size = BlockMap.table_size(SEGMENTS)
    with pytest.raises(ValueError, match="is too small for 4 segments"):
        BlockMap(memoryview(bytearray(size - 1)), SEGMENTS)
    buffer = bytearray(b"\xa5" * size)
    BlockMap(memoryview(buffer), SEGMENTS, attach=True)
    assert buffer == b"\xa5" * size
