# SPDX-License-Identifier: MIT
"""The summary of a trace equals results by hand and a simple count without intervals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.tracing.samples import Record, trace_of
from zbudfs.core.trace import UNKNOWN_CLASS, Kind
from zbudfs.tracing.summary import summarize

SECOND = 1_000_000


def test_the_working_set_over_time() -> None:
    """The working set has the different pages of each interval, without discards."""
    trace = trace_of(
        [
            (0, Kind.WRITE, 5, 10, 4),
            (1, Kind.READ, 5, 12, 4),
            (SECOND + 9, Kind.DISCARD, UNKNOWN_CLASS, 0, 100),
            (2 * SECOND + 9, Kind.PAGEIN, UNKNOWN_CLASS, 10, 1),
            (3 * SECOND + 9, Kind.GAP, 0, 0, 77),
            (4 * SECOND, Kind.WRITE, 0, 50, 1),
        ]
    )
    found = summarize(trace, 4)
    assert [interval.distinct for interval in found.intervals] == [6, 0, 1, 1]
    assert [interval.written for interval in found.intervals] == [4, 0, 0, 1]
    assert [interval.read for interval in found.intervals] == [4, 0, 1, 0]
    assert [interval.paged_in for interval in found.intervals] == [0, 0, 1, 0]
    assert [interval.discarded for interval in found.intervals] == [0, 100, 0, 0]
    assert found.distinct_pages == 7
    assert found.hit_ratio == 4 / 5
    assert dict(found.written_classes) == {5: 4, 0: 1}


def test_nothing_read() -> None:
    """Without reads there is no hit ratio."""
    assert summarize(trace_of([(0, Kind.WRITE, 1, 0, 1)]), 10).hit_ratio is None


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10 * SECOND),
            st.sampled_from([int(kind) for kind in Kind if kind != Kind.GAP]),
            st.just(3),
            st.integers(0, 500),
            st.integers(1, 20),
        ),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 70),
)
def test_the_intervals_add_up(records: list[Record], nr_intervals: int) -> None:
    """Each page is in one interval, for any number of intervals."""
    records.sort()
    found = summarize(trace_of(records), nr_intervals)
    counts = {kind: sum(count for _, of, _, _, count in records if of == kind) for kind in Kind}
    assert sum(interval.written for interval in found.intervals) == counts[Kind.WRITE] + counts[Kind.REFUSED]
    reads = counts[Kind.READ] + counts[Kind.PAGEIN] + counts[Kind.LOST]
    assert sum(interval.read for interval in found.intervals) == reads
    assert sum(interval.discarded for interval in found.intervals) == counts[Kind.DISCARD]
    touched = {
        page for _, kind, _, first, count in records if kind != Kind.DISCARD for page in range(first, first + count)
    }
    assert found.distinct_pages == len(touched)
    assert max(interval.distinct for interval in found.intervals) <= len(touched)
    assert sum(interval.distinct for interval in found.intervals) >= len(touched)
