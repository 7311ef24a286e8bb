# SPDX-License-Identifier: MIT
"""A trace, counted: requests by kind, size classes, and the working set over time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from zbudfs.core.trace import UNKNOWN_CLASS, Kind
from zbudfs.tracing.file import Trace

READS: Final = frozenset({Kind.READ, Kind.PAGEIN, Kind.LOST})
WRITES: Final = frozenset({Kind.WRITE, Kind.REFUSED})


@dataclass
class Interval:
    """A stretch of the trace. Pages."""

    written: int = 0
    read: int = 0
    paged_in: int = 0
    """Pages that were read and came from the backing file."""
    discarded: int = 0
    distinct: int = 0
    """The working set: different pages that were read or written."""


@dataclass
class Summary:
    """All of the trace."""

    seconds: float
    interval_seconds: float
    intervals: list[Interval]
    requests: Counter[int] = field(default_factory=Counter)
    """Records by kind. A request whose pages are of several size classes is several records."""
    pages: Counter[int] = field(default_factory=Counter)
    """Pages by kind."""
    written_classes: Counter[int] = field(default_factory=Counter)
    """Pages that were written, by size class."""
    distinct_pages: int = 0
    """Different pages that were read or written."""

    @property
    def hit_ratio(self) -> float | None:
        """Share of the pages read that were in RAM; None if nothing was read."""
        read = sum(self.pages[kind] for kind in READS)
        return self.pages[Kind.READ] / read if read else None


def summarize(trace: Trace, nr_intervals: int) -> Summary:
    """Return the summary, with the time cut into so many intervals."""
    records = trace.records
    start = records.times_us[0] if len(records) else 0
    width_us = max(round(trace.seconds * 1e6) // nr_intervals + 1, 1)
    intervals = [Interval() for _ in range(nr_intervals)]
    summary = Summary(trace.seconds, width_us / 1e6, intervals)
    everything: set[int] = set()
    now: set[int] = set()
    current = 0
    for time_us, kind, size_class, page, count in zip(
        records.times_us, records.kinds, records.classes, records.pages, records.counts, strict=True
    ):
        number = min(max((time_us - start) // width_us, current), nr_intervals - 1)
        if number != current:
            intervals[current].distinct = len(now)
            everything |= now
            now.clear()
            current = number
        summary.requests[kind] += 1
        summary.pages[kind] += count
        interval = intervals[current]
        if kind == Kind.DISCARD:
            interval.discarded += count
        elif kind in WRITES:
            interval.written += count
            now.update(range(page, page + count))
            if kind == Kind.WRITE and size_class != UNKNOWN_CLASS:
                summary.written_classes[size_class] += count
        elif kind in READS:
            interval.read += count
            interval.paged_in += count if kind == Kind.PAGEIN else 0
            now.update(range(page, page + count))
    intervals[current].distinct = len(now)
    summary.distinct_pages = len(everything | now)
    return summary
