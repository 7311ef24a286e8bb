# SPDX-License-Identifier: MIT
"""The distance of reading ahead, for readers in order, other readers, and several at once."""

from __future__ import annotations

from zbudfs.core.readahead import FIRST_BLOCKS, MOST_BLOCKS, STREAMS, ReadAhead


def read(ahead: ReadAhead, first: int, count: int, *, kept: float = 1.0) -> int:
    """Read some blocks and the proposed ones, of which a part is useful. Return how many were read ahead."""
    window = ahead.window(first, first + count - 1, count)
    ahead.done(first + count - 1 + window, window, int(kept * window))
    return window


def test_a_reader_in_order_gets_more_and_more() -> None:
    """The first read gets nothing, and each later one twice as much, up to the limit."""
    ahead = ReadAhead()
    at, windows = 100, []
    for _ in range(6):
        windows.append(read(ahead, at, 4))
        at += 4 + windows[-1]
    assert windows == [0, FIRST_BLOCKS, 2 * FIRST_BLOCKS, MOST_BLOCKS, MOST_BLOCKS, MOST_BLOCKS]
    assert read(ahead, at - 1, 4) == MOST_BLOCKS, "a page of the last block was wanted as well"


def test_readers_out_of_order_get_nothing() -> None:
    """Single blocks, distant blocks, a backward reader and a reader with gaps get nothing."""
    ahead = ReadAhead()
    assert [read(ahead, at, 1) for at in range(10, 30)] == [0] * 20
    assert read(ahead, 100, 4) == 0
    assert ahead.window(104, 140, 4) == 0
    for first in (96, 92, 88, 120, 140, 160, 200, 103):
        assert read(ahead, first, 4) == 0


def test_useless_blocks() -> None:
    """If the blocks were there already, the distance starts again."""
    ahead = ReadAhead()
    assert [read(ahead, 0, 4), read(ahead, 4, 4), read(ahead, 16, 4, kept=0.4)] == [0, FIRST_BLOCKS, 2 * FIRST_BLOCKS]
    assert read(ahead, 36, 4) == FIRST_BLOCKS


def test_several_readers() -> None:
    """Each reader is followed. Of too many readers, the one with the oldest read is forgotten."""
    ahead = ReadAhead()
    starts = [1000 * number for number in range(STREAMS)]
    assert [read(ahead, start, 4) for start in starts] == [0] * STREAMS
    assert [read(ahead, start + 4, 4) for start in starts] == [FIRST_BLOCKS] * STREAMS
    assert read(ahead, 50_000, 4) == 0
    assert [read(ahead, start + 16, 4) for start in starts[1:]] == [2 * FIRST_BLOCKS] * (STREAMS - 1)
    assert read(ahead, 16, 4) == 0
