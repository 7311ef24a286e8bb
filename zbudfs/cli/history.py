# SPDX-License-Identifier: MIT
"""Snapshots of a mount's numbers over time, and the rates, hit ratio and percentiles of latency between two of them.

A new mount starts its counters at 0. A rate across that would be wrong, so the history is cleared: there is no rate until
the second snapshot of the new mount.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

LONGEST: Final = 600
"""Snapshots that are kept: ten minutes, if one is taken each second."""

_RECENT: Final = 10
"""Snapshots over which latencies and growth are summed: a single second may have no page-in."""

Numbers = Mapping[str, Any]


class History:
    """The last LONGEST snapshots of one mount."""

    def __init__(self) -> None:
        self._snapshots: deque[tuple[float, Numbers]] = deque(maxlen=LONGEST)

    def add(self, at_seconds: float, numbers: Numbers) -> None:
        """Add a snapshot. `at_seconds` is the present time of any monotonic clock."""
        if self._snapshots and self._snapshots[-1][1].get("keeper_pid") != numbers.get("keeper_pid"):
            self._snapshots.clear()  # another mount on the same mountpoint
        if "renewed_at" in numbers:  # public statistics are up to a second old, and say when they were taken
            at_seconds = float(numbers["renewed_at"])
            if self._snapshots and self._snapshots[-1][0] == at_seconds:
                return
        self._snapshots.append((at_seconds, numbers))

    @property
    def last(self) -> Numbers | None:
        """The newest snapshot."""
        return self._snapshots[-1][1] if self._snapshots else None

    def values(self, name: str, most: int = LONGEST) -> list[float]:
        """Return the newest values of a number, at most `most`, the newest last."""
        found = [float(numbers.get(name) or 0) for _, numbers in self._snapshots]
        return found[-most:] if most > 0 else []

    def rates(self, name: str, most: int = LONGEST) -> list[float]:
        """Return the rates of a counter per second, one for each pair of neighbouring snapshots; the newest last."""
        found = []
        for (before_at, before), (at, after) in pairwise(self._snapshots):
            grown = (after.get(name) or 0) - (before.get(name) or 0)
            found.append(max(grown, 0) / (at - before_at) if at > before_at else 0.0)
        return found[-most:] if most > 0 else []

    def rate(self, name: str) -> float:
        """Return the newest rate of a counter; 0 before there are two snapshots."""
        return (self.rates(name, 1) or [0.0])[-1]

    def interval_seconds(self, most: int = LONGEST) -> float | None:
        """Return the mean time between the newest snapshots, at most `most` of them; None before there are two."""
        times = [at for at, _ in self._snapshots][-most:]
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def hit_ratio(self) -> float | None:
        """Return the share of recently read pages that needed no read of the backing; None if no page was read."""
        read = self.recent("cumul_read_pages")
        return max(0.0, 1 - self.recent("cumul_pagein_pages") / read) if read else None

    def latencies_us(self, kind: str, percents: Sequence[float]) -> list[int] | None:
        """Return upper bounds of recent latencies in microseconds, one for each percentile; None without any request."""
        if not self._snapshots:
            return None
        name = f"{kind}_latency_us"
        after = self._snapshots[-1][1].get(name) or []
        before = self._snapshots[max(0, len(self._snapshots) - 1 - _RECENT)][1].get(name) or []
        counts = [max(new - old, 0) for new, old in zip(after, before, strict=False)]
        total = sum(counts)
        if not total:
            return None
        return [1 << _bucket_of(counts, total * percent / 100) for percent in percents]

    def recent(self, name: str) -> float:
        """Return the growth of a counter over the last _RECENT snapshots."""
        snapshots = self._snapshots
        if len(snapshots) < 2:
            return 0.0
        before = snapshots[max(0, len(snapshots) - 1 - _RECENT)][1]
        return float(max((snapshots[-1][1].get(name) or 0) - (before.get(name) or 0), 0))


def _bucket_of(counts: Sequence[int], rank: float) -> int:
    """Return the first bucket at which the running sum of the counts reaches `rank`."""
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            return bucket
    return len(counts) - 1
