# SPDX-License-Identifier: MIT
"""What other users are told: which numbers, and what can be learned from how they are rounded."""

from __future__ import annotations

import random
from statistics import mean, pstdev
from typing import Final

from zbudfs.core.latency import BUCKETS
from zbudfs.core.public import (
    BLURRED,
    EXACT,
    FIRST_READ_BUCKET,
    HISTOGRAMS,
    NAMES,
    PAGES,
    Blur,
    Discretion,
    Value,
)

STEP: Final = 256
ATTACKS_NR: Final = 400


def test_a_blur_is_near() -> None:
    """What is told is a multiple of the step, and less than two steps off, wherever the number goes."""
    source = random.Random(1)
    blur = Blur(STEP, source.randrange)
    value = 0
    for _ in range(20_000):
        value = max(0, value + source.randrange(-300, 301))
        told = blur.tell(value)
        assert told % STEP == 0
        assert abs(told - value) < 2 * STEP


def test_a_counter_is_told_as_a_counter() -> None:
    """It never goes back, and stands still while the number does."""
    source = random.Random(2)
    blur = Blur(STEP, source.randrange)
    value = told = 0
    for _ in range(20_000):
        value += source.randrange(100)
        now = blur.tell(value)
        assert now >= told
        assert blur.tell(value) == now
        told = now


class Rounded:
    """What is not good enough: a number rounded down."""

    def __init__(self, step: int) -> None:
        self._step = step

    def tell(self, value: int) -> int:
        """Return what is told."""
        return value // self._step * self._step


def found_by_moving(told: Blur | Rounded, secret: int) -> int:
    """The attack of a user who moves the number himself, one by one, until another one is told: what he takes it for."""
    first = told.tell(secret)
    moved = 0
    while told.tell(secret + moved) == first:
        moved += 1
    return first + STEP - moved


def test_a_user_who_moves_the_number_himself() -> None:
    """He finds a number that is only rounded, exactly; from a blur he learns no more than within half a step."""
    source = random.Random(3)
    errors = {"rounded": [], "blurred": []}  # type: dict[str, list[int]]
    for _ in range(ATTACKS_NR):
        secret = source.randrange(STEP, 20 * STEP)
        errors["rounded"].append(found_by_moving(Rounded(STEP), secret) - secret)
        errors["blurred"].append(found_by_moving(Blur(STEP, source.randrange), secret) - secret)
    assert set(errors["rounded"]) == {0}
    spread = pstdev(errors["blurred"])
    assert spread > STEP / 4
    assert abs(mean(errors["blurred"])) < 3 * STEP


def numbers(**changed: Value) -> dict[str, Value]:
    """A snapshot of stats/, with everything that is told of it, and one number that is not."""
    found: dict[str, Value] = {
        "compressed_bytes": 77,
        **dict.fromkeys((*EXACT, *PAGES, *BLURRED), 0),
        **{f"{kind}_latency_us": [0] * BUCKETS for kind in HISTOGRAMS},
        **{f"{kind}_latency_sum_us": 0 for kind in HISTOGRAMS},
    }
    return {**found, **changed}


def test_what_is_told_is_the_list() -> None:
    """No name more, none less; what follows from another number agrees with it."""
    discretion = Discretion(random.Random(4).randrange)
    counts = [100] * BUCKETS
    budget = 1 << 30
    told = discretion.public(
        numbers(
            stored_pages=1000,
            level=3,
            cumul_writeback_frames=100_000,
            refused_budget=1000,
            writeback_budget_bytes_per_day=budget,
            writeback_budget_used_bytes=budget // 2,
            read_latency_us=counts,
            pagein_latency_us=counts,
        )
    )
    assert told.keys() == NAMES
    assert (told["stored_pages"], told["level"]) == (992, 3)
    assert told["refused_pool_full"] == told["refused_budget"] != 0
    assert told["cumul_writeback_bytes"] == told["cumul_writeback_frames"] * 4096  # type: ignore[operator]
    left, used = told["writeback_budget_left_bytes"], told["writeback_budget_used_bytes"]
    assert left + used == budget  # type: ignore[operator]
    reads = told["read_latency_us"]
    assert isinstance(reads, list)
    assert reads[:FIRST_READ_BUCKET] == [0] * FIRST_READ_BUCKET
    assert int(reads[FIRST_READ_BUCKET]) > 600
    assert all(abs(int(count) - 100) < 32 for count in told["pagein_latency_us"])  # type: ignore[union-attr]
