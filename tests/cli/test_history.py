# SPDX-License-Identifier: MIT
"""Rates, ratios and percentiles are computed from snapshots."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from zbudfs.cli.history import LONGEST, History


def history_of(*snapshots: Mapping[str, object]) -> History:
    """Return a history with a snapshot for every two seconds."""
    history = History()
    for number, numbers in enumerate(snapshots):
        history.add(100.0 + 2 * number, numbers)
    return history


def test_rates() -> None:
    """A rate is between neighbours, for a second. A number that falls has no rate."""
    history = history_of({"a": 10}, {"a": 30}, {"a": 30}, {"a": 5}, {"a": 6})
    assert history.rates("a") == [10.0, 0.0, 0.0, 0.5]
    assert history.rates("a", 2) == [0.0, 0.5]
    assert history.rates("a", 0) == history.values("a", 0) == []
    assert history.rate("a") == 0.5
    assert history.values("a") == [10.0, 30.0, 30.0, 5.0, 6.0]
    assert history.rates("unknown") == [0.0] * 4


def test_nothing_yet() -> None:
    """With one snapshot or none there is no rate."""
    empty, one = history_of(), history_of({"cumul_read_pages": 9, "read_latency_us": [1, 2]})
    assert empty.last is None
    for history in (empty, one):
        assert history.rate("cumul_read_pages") == 0.0
        assert history.hit_ratio() is None
        assert history.latencies_us("read", [50]) is None


def test_another_mount_in_the_same_place() -> None:
    """The history starts again for another mount, and continues through a takeover."""
    history = history_of(
        {"keeper_pid": 1, "worker_pid": 5, "a": 50},
        {"keeper_pid": 1, "worker_pid": 6, "a": 60},
        {"keeper_pid": 2, "a": 3},
    )
    assert history.values("a") == [3.0]


def test_the_history_is_bounded() -> None:
    """The oldest snapshots are dropped."""
    history = history_of(*({"a": number} for number in range(LONGEST + 50)))
    assert history.values("a") == [float(number) for number in range(50, LONGEST + 50)]


def test_hit_ratio() -> None:
    """The ratio is that of the last few snapshots alone."""
    snapshots = [{"cumul_read_pages": 0, "cumul_pagein_pages": 0}] + [
        {"cumul_read_pages": 1000, "cumul_pagein_pages": 1000}
    ] * 20
    assert history_of(*snapshots).hit_ratio() is None
    assert history_of(*snapshots, {"cumul_read_pages": 1100, "cumul_pagein_pages": 1025}).hit_ratio() == 0.75


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([0, 0, 0, 100, 0], [8, 8, 8]),
        ([50, 0, 0, 49, 1], [1, 8, 16]),
        ([0, 0, 0, 0, 1], [16, 16, 16]),
        ([1, 0, 0, 0, 1], [1, 16, 16]),
        ([0, 0, 0, 0, 0], None),
    ],
)
def test_latencies(counts: list[int], expected: list[int] | None) -> None:
    """A percentile is the upper bound of its bucket."""
    before = [7, 0, 3, 0, 9]
    after = [old + new for old, new in zip(before, counts, strict=True)]
    history = history_of({"read_latency_us": before}, {"read_latency_us": after})
    assert history.latencies_us("read", [50, 99, 100]) == expected


def test_public_numbers_have_a_time_of_their_own() -> None:
    """Equal public numbers are one snapshot, and rates are between two renewals."""
    history = History()
    for at, renewed_at, read in ((1.0, 10.0, 0), (1.5, 10.0, 0), (2.1, 11.0, 160)):
        history.add(at, {"keeper_pid": 1, "renewed_at": renewed_at, "cumul_read_pages": read})
    assert history.rates("cumul_read_pages") == [160.0]
