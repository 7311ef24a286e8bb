# SPDX-License-Identifier: MIT
"""The number of blocks to read ahead. Callers report which blocks are read, and how many of them were of use.

Pages that were written back together lie in neighbouring blocks. A program that reads one stretch of them in order will want
the next stretch too: examples are a program that goes through its memory, and swapoff. One read of 64 KiB takes hardly
longer than one of 4 KiB, while a read for each request waits for the disk each time. So the read-ahead of a reader that
continues where its last read ended grows with each read. All other reads have no read-ahead and no cost. A request for a
single page has none either: the kernel asks for more pages where it expects a reader in order.
"""

from typing import Final

STREAMS: Final = 4
"""Number of readers that are distinguished; a new one replaces the one that read least recently. Guessed."""

FEWEST_BLOCKS: Final = 2
"""Fewest blocks that a reader in order requests at once."""

FIRST_BLOCKS: Final = 8
"""Blocks of the read-ahead when a reader continues for the first time: 32 KiB."""

MOST_BLOCKS: Final = 32
"""Most blocks of a read-ahead: 128 KiB. Measured on a virtual disk: 4 KiB take 60 us, 64 KiB 119, 128 KiB 181, 256 KiB 339."""


class ReadAhead:
    """The readers of one backing file."""

    def __init__(self) -> None:
        self._streams: dict[int, int] = {}
        """The last read-ahead of each reader in blocks, by the block where its next read is expected. The oldest first."""

    def window(self, first: int, last: int, count: int) -> int:
        """Return the number of blocks behind `last` to read ahead, for a request of `count` blocks from `first` to `last`."""
        if count < FEWEST_BLOCKS or last - first >= 2 * count:
            return 0  # a single block, or blocks far apart
        for expected in (first, first + 1):  # a page of this read may have been in the last block of the read before
            before = self._streams.pop(expected, None)
            if before is not None:
                return min(max(2 * before, FIRST_BLOCKS), MOST_BLOCKS)
        return 0

    def done(self, last: int, ahead: int, kept: int) -> None:
        """Record a read that ended at `last`, with `ahead` blocks of read-ahead, of which `kept` were of use."""
        self._streams[last + 1] = ahead if 2 * kept >= ahead else 0
        if len(self._streams) > STREAMS:
            del self._streams[next(iter(self._streams))]
