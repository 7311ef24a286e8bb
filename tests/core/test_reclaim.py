# SPDX-License-Identifier: MIT
"""The start and the end of writeback, and how the pool's limit follows memory pressure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbudfs.core.reclaim import BATCH_FRAMES, LARGE_BATCH_FRAMES, PressureGovernor, Watermarks

# ---- watermarks ---------------------------------------------------------------------------------------------------


def test_watermarks_are_in_order() -> None:
    """Low is below high if the pool allows, and at most half of the pool is kept free."""
    for limit in [*range(1, 600), 8192, 1 << 20]:
        marks = Watermarks.of(limit)
        assert 0 <= marks.low_frames <= marks.high_frames <= max(1, limit // 2), limit
        assert limit < 4 or marks.low_frames < marks.high_frames, limit


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 100, 1 << 20])
def test_a_pool_without_a_free_frame_is_always_written_back(limit: int) -> None:
    """With any pool size, no free frame means writeback, since a write would wait for nothing otherwise."""
    assert Watermarks.of(limit).frames_to_free(0, under_way=False) > 0


def test_watermarks_of_a_large_pool() -> None:
    """The watermarks are parts of a large pool, and whole batches in a middle-sized one."""
    assert Watermarks.of(1 << 20) == Watermarks((1 << 20) // 64, (1 << 20) // 24)
    assert Watermarks.of(1024) == Watermarks(BATCH_FRAMES, 2 * BATCH_FRAMES)


@given(st.integers(0, 300), st.integers(-50, 600), st.integers(0, 300))
def test_hysteresis(low: int, free: int, more: int) -> None:
    """Writeback starts only below low, continues until high, and never asks for more than high."""
    marks = Watermarks(low, low + more)
    assert marks.frames_to_free(free, under_way=True) == max(0, low + more - free)
    starts = marks.frames_to_free(free, under_way=False)
    assert starts == (max(0, low + more - free) if free < low else 0)


def test_a_whole_cycle() -> None:
    """Filling a pool frame by frame starts a writeback once, and it stops at high and not at low."""
    marks = Watermarks(10, 30)
    free, under_way, events = 40, False, []
    for _ in range(64):
        need = marks.frames_to_free(free, under_way=under_way)
        if bool(need) != under_way:
            events.append(("on" if need else "off", free))
        under_way = bool(need)
        free += 5 if under_way else -1
    assert events == [("on", 9), ("off", 34), ("on", 9)]


# ---- the governor -------------------------------------------------------------------------------------------------


def test_pressure_lowers_the_limit_step_by_step() -> None:
    """Each report takes an eighth off the present limit."""
    governor = PressureGovernor(8000)
    assert [governor.pressure(now) for now in (1.0, 3.0, 5.0)] == [7000, 6125, 5360]
    assert governor.limit_frames == 5360


@pytest.mark.parametrize("configured", [1, 3, 100, 8000])
def test_the_limit_has_a_floor(configured: int) -> None:
    """A quarter of the pool stays under any pressure, and never less than a frame."""
    governor = PressureGovernor(configured)
    limits = [governor.pressure(float(now)) for now in range(100)]
    assert min(limits) >= max(1, configured // PressureGovernor.FLOOR)
    assert limits == sorted(limits, reverse=True)
    if configured == 8000:
        assert limits[-1] == 2000


def test_the_limit_comes_back_when_it_is_calm() -> None:
    """An eighth of the pool comes back after ten calm seconds, and so on each ten seconds, up to all of it."""
    governor = PressureGovernor(8000)
    for _ in range(20):
        governor.pressure(100.0)
    assert governor.tick(100.0 + PressureGovernor.CALM_SECONDS - 0.1) == 2000
    assert governor.tick(110.0) == 3000
    assert governor.tick(110.1) == 3000
    assert governor.tick(119.9) == 3000
    limits = [governor.tick(now) for now in (120.0, 130.0, 140.0, 150.0, 160.0, 170.0, 500.0)]
    assert limits == [4000, 5000, 6000, 7000, 8000, 8000, 8000]


def test_new_pressure_stops_the_recovery() -> None:
    """A report while the limit comes back lowers it again, and the calm time starts again."""
    governor = PressureGovernor(8000)
    for _ in range(20):
        governor.pressure(0.0)
    assert governor.tick(10.0) == 3000
    assert governor.pressure(15.0) == 2625
    assert governor.tick(20.0) == 2625
    assert governor.tick(25.0) == 3625


def test_without_pressure_nothing_changes() -> None:
    """A governor without reports keeps the configured limit."""
    governor = PressureGovernor(77)
    assert [governor.tick(now) for now in (0.0, 11.0, 1000.0)] == [77, 77, 77]


def test_a_large_pool_is_written_back_in_large_batches() -> None:
    """A batch is at most half of the low watermark, so that writers have room meanwhile."""
    for frames in (1, 64, 1024, 4096):
        assert Watermarks.of(frames).batch_frames == BATCH_FRAMES
    assert Watermarks.of(12288).batch_frames == 96
    for frames in (32768, 1 << 22):
        assert Watermarks.of(frames).batch_frames == LARGE_BATCH_FRAMES
    assert Watermarks.of(32768, 10, 20).batch_frames == BATCH_FRAMES
