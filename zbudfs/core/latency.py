# SPDX-License-Identifier: MIT
"""How long things took: histograms in power-of-two microseconds, in memory that outlives the process.

    row of a kind    BUCKETS counts, then the sum of all in nanoseconds, then the longest in nanoseconds

Bucket n counts what took less than 2**n us and, for n > 0, at least 2**(n - 1) us; the last one what took longer as well.
Requests are entered by the shim (fuse/shim.c, which has the same layout): from when it was received to when it was answered,
waiting included; the time that the kernel kept it before is not seen here. Behind the rows stand a few more of the shim's
numbers.
"""

from enum import IntEnum
from typing import Final

BUCKETS: Final = 32
_SUM: Final = BUCKETS
_MAX: Final = BUCKETS + 1
ROW_WORDS: Final = BUCKETS + 2


class Timed(IntEnum):
    """What is timed: the number of its row."""

    READ = 0
    WRITE = 1
    DISCARD = 2
    SYNC = 3
    WRITEBACK = 4
    """One batch of frames on its way to the backing file."""
    PAGEIN = 5
    """One read of blocks from the backing file."""


SERVED: Final = len(Timed) * ROW_WORDS
"""Requests for the swapfile that were received."""
WAKEUPS: Final = SERVED + 1
"""Wake-ups that served one or more."""
MOST_IN_WORK: Final = SERVED + 2
"""Most requests that were received and not yet answered at any time."""
WORDS: Final = SERVED + 3


class Latencies:
    """The histograms in `words`, a writable memoryview of format "Q" with WORDS entries."""

    def __init__(self, words: memoryview) -> None:
        self.words = words

    def record(self, kind: Timed, nanoseconds: int) -> None:
        """Something took so long."""
        words = self.words
        row = kind * ROW_WORDS
        words[row + min((nanoseconds // 1000).bit_length(), BUCKETS - 1)] += 1
        words[row + _SUM] += nanoseconds
        if nanoseconds > words[row + _MAX]:
            words[row + _MAX] = nanoseconds

    @property
    def served_requests(self) -> int:
        """Requests for the swapfile that were received."""
        return self.words[SERVED]

    def numbers(self) -> dict[str, int | list[int]]:
        """By name: `KIND_latency_us`, counts by bucket; the sum and the longest in microseconds."""
        found: dict[str, int | list[int]] = {}
        for kind in Timed:
            row = kind * ROW_WORDS
            name = f"{kind.name.lower()}_latency"
            found[f"{name}_us"] = self.words[row : row + BUCKETS].tolist()
            found[f"{name}_sum_us"] = self.words[row + _SUM] // 1000
            found[f"{name}_max_us"] = self.words[row + _MAX] // 1000
        found["served_requests"] = self.words[SERVED]
        found["wakeups"] = self.words[WAKEUPS]
        found["requests_in_work_max"] = self.words[MOST_IN_WORK]
        return found
