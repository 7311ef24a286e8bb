# SPDX-License-Identifier: MIT
"""Public statistics: the list of numbers, and the information that their rounding gives away."""

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
    """The public number is a multiple of the step, and less than two steps off, for any walk of the number."""
    source = random.Random(1)
    blur = Blur(STEP, source.randrange)
    value = 0
    for _ in range(20_000):
        value = max(0, value + source.randrange(-300, 301))
        told = blur.tell(value)
        assert told % STEP == 0
        assert abs(told - value) < 2 * STEP


def test_a_public_counter_never_falls() -> None:
    """The public counter never goes back, and stands still while the number does."""
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
    """A number that is only rounded down, which is not good enough."""

    def __init__(self, step: int) -> None:
        self._step = step

    def tell(self, value: int) -> int:
        """Return the public number."""
        return value // self._step * self._step


def found_by_moving(told: Blur | Rounded, secret: int) -> int:
    """Return the guess of an attacker who moves the number one by one until another one is published."""
    first = told.tell(secret)
    moved = 0
    while told.tell(secret + moved) == first:
        moved += 1
    return first + STEP - moved


def test_an_attacker_who_moves_the_number() -> None:
    """An attacker finds a number that is only rounded exactly. A blur leaves an error of half a step."""
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
    """Return a snapshot of stats/, with all public numbers and one that is not public."""
    found: dict[str, Value] = {
        "compressed_bytes": 77,
        **dict.fromkeys((*EXACT, *PAGES, *BLURRED), 0),
        **{f"{kind}_latency_us": [0] * BUCKETS for kind in HISTOGRAMS},
        **{f"{kind}_latency_sum_us": 0 for kind in HISTOGRAMS},
    }
    return {**found, **changed}


def test_the_list_of_public_numbers() -> None:
    """The public numbers are exactly those of the list, and numbers that follow from others agree with them."""
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
