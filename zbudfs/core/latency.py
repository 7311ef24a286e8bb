# SPDX-License-Identifier: MIT
"""Histograms of durations, in power-of-two microseconds, in memory that outlives the process.

    row of a kind    BUCKETS counts, then the sum of all in nanoseconds, then the longest in nanoseconds

Bucket n counts durations of less than 2**n us and, for n > 0, at least 2**(n - 1) us. The last bucket counts all longer ones
too. The shim enters requests, and hot_reads.c page-ins of one page (latency.h has the same layout). A request counts from the
moment in which the shim received it to the answer, waiting included. The time that the kernel kept the request before is not
included. A few more numbers of the shim follow the rows.
"""

from enum import IntEnum
from typing import Final

BUCKETS: Final = 32
_SUM: Final = BUCKETS
_MAX: Final = BUCKETS + 1
ROW_WORDS: Final = BUCKETS + 2


class Timed(IntEnum):
    """The kinds of durations: each is the number of its row."""

    READ = 0
    WRITE = 1
    DISCARD = 2
    SYNC = 3
    WRITEBACK = 4
    """One batch of frames, from its start to its end in the backing file."""
    PAGEIN = 5
    """One read of blocks from the backing file."""


SERVED: Final = len(Timed) * ROW_WORDS
"""Index of the number of requests for the swapfile that were received."""
WAKEUPS: Final = SERVED + 1
"""Index of the number of wake-ups that served at least one request."""
MOST_IN_WORK: Final = SERVED + 2
"""Index of the largest number of requests that were received and not yet answered at one time."""
WORDS: Final = SERVED + 3


class Latencies:
    """The histograms in `words`, a writable memoryview of format "Q" with WORDS entries."""

    def __init__(self, words: memoryview) -> None:
        self.words = words

    def record(self, kind: Timed, nanoseconds: int) -> None:
        """Enter a duration of this kind."""
        words = self.words
        row = kind * ROW_WORDS
        words[row + min((nanoseconds // 1000).bit_length(), BUCKETS - 1)] += 1
        words[row + _SUM] += nanoseconds
        if nanoseconds > words[row + _MAX]:
            words[row + _MAX] = nanoseconds

    def row(self, kind: Timed) -> memoryview:
        """Return the row of a kind."""
        return self.words[kind * ROW_WORDS : (kind + 1) * ROW_WORDS]

    @property
    def served_requests(self) -> int:
        """Requests for the swapfile that were received."""
        return self.words[SERVED]

    def numbers(self) -> dict[str, int | list[int]]:
        """Return the numbers by name: `KIND_latency_us` has the counts of the buckets; sum and longest are in microseconds."""
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
