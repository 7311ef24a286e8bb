# SPDX-License-Identifier: MIT
"""How many blocks to read along with those that are asked for. Pure: told which blocks are read, and what became of them.

Pages that went out together lie in neighbouring blocks, and who reads one of a stretch in order will want the next: a
program that goes through its memory, swapoff. One read of 64 KiB takes hardly longer than one of 4 KiB, while a read of its own
for each request is a wait for the disk each time. So a reader that goes on where its last read ended gets more and more
along. Everybody else gets nothing along, and pays nothing; and so does who asks for a single page, since the kernel asks for
more where it thinks that somebody reads in order.
"""

from typing import Final

STREAMS: Final = 4
"""Readers that are told apart; the one that was heard of least recently goes. Guessed."""

FEWEST_BLOCKS: Final = 2
"""Asked for at once by whoever reads in order."""

FIRST_BLOCKS: Final = 8
"""Read along when a reader goes on for the first time: 32 KiB."""

MOST_BLOCKS: Final = 32
"""Read along at most: 128 KiB. Measured on a virtual disk: 4 KiB take 60 us, 64 KiB 119, 128 KiB 181, 256 KiB 339."""


class ReadAhead:
    """The readers of one backing file."""

    def __init__(self) -> None:
        self._streams: dict[int, int] = {}
        """By the block at which a reader is expected next: how many were read along last. The oldest first."""

    def window(self, first: int, last: int, count: int) -> int:
        """How many blocks behind `last` to read along when `count` blocks from `first` to `last` are asked for."""
        if count < FEWEST_BLOCKS or last - first >= 2 * count:
            return 0  # one, or here and there
        for expected in (first, first + 1):  # the last block of the read before may have had a page of this one
            before = self._streams.pop(expected, None)
            if before is not None:
                return min(max(2 * before, FIRST_BLOCKS), MOST_BLOCKS)
        return 0

    def done(self, last: int, ahead: int, kept: int) -> None:
        """A read ended at `last`, what was read along included: `ahead` blocks, of which `kept` were of use."""
        self._streams[last + 1] = ahead if 2 * kept >= ahead else 0
        if len(self._streams) > STREAMS:
            del self._streams[next(iter(self._streams))]
