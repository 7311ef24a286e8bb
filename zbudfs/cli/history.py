# SPDX-License-Identifier: MIT
"""Snapshots of a mount's numbers over time, and what follows from two of them: rates, hit ratio, percentiles of latencies.

Counters start anew when somebody mounts again; then there is no rate until the next snapshot, rather than a wrong one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

LONGEST: Final = 600
"""Snapshots that are kept: ten minutes at one a second."""

_RECENT: Final = 10
"""Snapshots over which latencies are summed up: one second alone may have no page-in at all."""

Numbers = Mapping[str, Any]


class History:
    """The last LONGEST snapshots of one mount."""

    def __init__(self) -> None:
        self._snapshots: deque[tuple[float, Numbers]] = deque(maxlen=LONGEST)

    def add(self, at_seconds: float, numbers: Numbers) -> None:
        """Add a snapshot of this moment, on any clock that does not go back."""
        if self._snapshots and self._snapshots[-1][1].get("keeper_pid") != numbers.get("keeper_pid"):
            self._snapshots.clear()  # another mount in the same place
        if "renewed_at" in numbers:  # public numbers are those of a moment before
            at_seconds = float(numbers["renewed_at"])
            if self._snapshots and self._snapshots[-1][0] == at_seconds:
                return
        self._snapshots.append((at_seconds, numbers))

    @property
    def last(self) -> Numbers | None:
        """The newest snapshot."""
        return self._snapshots[-1][1] if self._snapshots else None

    def values(self, name: str, most: int = LONGEST) -> list[float]:
        """The newest values of a number, at most `most`, the newest last."""
        found = [float(numbers.get(name) or 0) for _, numbers in self._snapshots]
        return found[-most:] if most > 0 else []

    def rates(self, name: str, most: int = LONGEST) -> list[float]:
        """By how much a counter went up a second, between each two snapshots; the newest last."""
        found = []
        for (before_at, before), (at, after) in pairwise(self._snapshots):
            grown = (after.get(name) or 0) - (before.get(name) or 0)
            found.append(max(grown, 0) / (at - before_at) if at > before_at else 0.0)
        return found[-most:] if most > 0 else []

    def rate(self, name: str) -> float:
        """The newest rate; 0 before there are two snapshots."""
        return (self.rates(name, 1) or [0.0])[-1]

    def hit_ratio(self) -> float | None:
        """Share of the pages read of late that needed no backing file; None if none were read."""
        read = self._recent("cumul_read_pages")
        return max(0.0, 1 - self._recent("cumul_pagein_pages") / read) if read else None

    def latencies_us(self, kind: str, percents: Sequence[float]) -> list[int] | None:
        """Upper bounds of latencies of late, in microseconds: so many percent took no longer. None if there were none."""
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

    def _recent(self, name: str) -> float:
        """By how much a counter went up over the last few snapshots."""
        snapshots = self._snapshots
        if len(snapshots) < 2:
            return 0.0
        before = snapshots[max(0, len(snapshots) - 1 - _RECENT)][1]
        return float(max((snapshots[-1][1].get(name) or 0) - (before.get(name) or 0), 0))


def _bucket_of(counts: Sequence[int], rank: float) -> int:
    """Return the first bucket up to which there are `rank` counts."""
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            return bucket
    return len(counts) - 1
