# SPDX-License-Identifier: MIT
"""Histograms of time have the right buckets, and the shim has the same layout."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import ROOT
from zbudfs.core.latency import BUCKETS, ROW_WORDS, WORDS, Latencies, Timed


def made() -> Latencies:
    """Return empty histograms."""
    return Latencies(memoryview(bytearray(8 * WORDS)).cast("Q"))


@pytest.mark.parametrize(
    ("nanoseconds", "bucket"),
    [
        *((0, 0), (999, 0), (1000, 1), (1999, 1), (2000, 2), (3999, 2), (4000, 3), (1_000_000, 10), (1_023_999, 10)),
        *((1_024_000, 11), (1 << 62, BUCKETS - 1)),
    ],
)
def test_bounds(nanoseconds: int, bucket: int) -> None:
    """Bucket n counts times below 2**n microseconds."""
    latencies = made()
    latencies.record(Timed.WRITE, nanoseconds)
    numbers = latencies.numbers()
    assert numbers["write_latency_us"] == [int(number == bucket) for number in range(BUCKETS)]
    assert numbers["write_latency_sum_us"] == numbers["write_latency_max_us"] == nanoseconds // 1000


@given(st.lists(st.tuples(st.sampled_from(Timed), st.integers(0, 10**13))))
def test_every_time_is_in_one_bucket(times: list[tuple[Timed, int]]) -> None:
    """Each time is in one bucket of its kind, and sums and longest times are exact."""
    latencies = made()
    for kind, nanoseconds in times:
        latencies.record(kind, nanoseconds)
    numbers = latencies.numbers()
    for kind in Timed:
        mine = [nanoseconds for other, nanoseconds in times if other is kind]
        name = kind.name.lower()
        counts = numbers[f"{name}_latency_us"]
        assert isinstance(counts, list)
        assert sum(counts) == len(mine)
        for bucket in range(1, BUCKETS - 1):
            assert counts[bucket] == sum(1000 << bucket - 1 <= nanoseconds < 1000 << bucket for nanoseconds in mine)
        assert numbers[f"{name}_latency_sum_us"] == sum(mine) // 1000
        assert numbers[f"{name}_latency_max_us"] == max(mine, default=0) // 1000


def test_the_shim_has_the_same_layout() -> None:
    """The C code repeats the numbers of the layout."""
    header, source = (ROOT / "zbudfs/core/latency.h").read_text(), (ROOT / "zbudfs/fuse/shim.c").read_text()
    assert int(re.search(r"\bBUCKETS = (\d+)", header)[1]) == BUCKETS  # type: ignore[index]
    assert int(re.search(r"\bROWS = (\d+)", source)[1]) == len(Timed)  # type: ignore[index]
    assert "SUM_NS = BUCKETS,\n    MAX_NS,\n    ROW_WORDS,\n" in header
    assert BUCKETS + 2 == ROW_WORDS
    assert "enum { READ, WRITE, FALLOCATE, FSYNC," in source
    assert [Timed.READ, Timed.WRITE, Timed.DISCARD, Timed.SYNC] == [0, 1, 2, 3]
