# SPDX-License-Identifier: MIT
"""The budget of writes to the backing file: full at first, refilled all the time, and never more than a day's worth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zbudfs.core.budget import DAY_SECONDS, Budget

MIB = 1 << 20


def budget_of(bytes_per_day: int, now: float = 0.0) -> Budget:
    """Return a budget that has just been set."""
    budget = Budget()
    budget.set(bytes_per_day, now)
    return budget


def test_without_a_budget_everything_is_allowed() -> None:
    """A budget of 0 is no limit: nothing is counted, used or left."""
    budget = Budget()
    budget.spend(1 << 50, 5.0)
    assert budget.allows(1 << 60, 5.0)
    assert (budget.left_bytes(6.0), budget.used_bytes(6.0), budget.seconds_until_full(6.0)) == (0, 0, 0)


def test_a_new_budget_is_full() -> None:
    """A whole day's worth may be written at once, and then no more."""
    budget = budget_of(10 * MIB, 1000.0)
    assert budget.left_bytes(1000.0) == 10 * MIB
    assert budget.allows(10 * MIB, 1000.0)
    budget.spend(10 * MIB, 1000.0)
    assert (budget.left_bytes(1000.0), budget.used_bytes(1000.0)) == (0, 10 * MIB)
    assert not budget.allows(1, 1000.0)
    assert budget.seconds_until_full(1000.0) == DAY_SECONDS


def test_a_budget_is_refilled_all_the_time() -> None:
    """Half a day refills half of the budget, and ten days no more than all of it."""
    budget = budget_of(10 * MIB)
    budget.spend(10 * MIB, 0.0)
    assert budget.left_bytes(DAY_SECONDS / 2) == 5 * MIB
    assert budget.seconds_until_full(DAY_SECONDS / 2) == DAY_SECONDS / 2
    assert budget.left_bytes(10.0 * DAY_SECONDS) == 10 * MIB


def test_a_new_budget_keeps_the_spent_bytes() -> None:
    """A new budget does not give back the bytes that the old one has spent, and keeps the bytes that are left."""
    budget = budget_of(10 * MIB)
    budget.spend(4 * MIB, 0.0)
    budget.set(20 * MIB, 0.0)
    assert budget.left_bytes(0.0) == 16 * MIB
    budget.set(MIB, 0.0)
    assert budget.left_bytes(0.0) == 0
    budget.set(0, 0.0)
    assert budget.allows(1 << 60, 0.0)


def test_a_taken_over_budget_has_what_was_left() -> None:
    """A takeover keeps the rest of the budget, which is never more than the whole."""
    budget = Budget()
    budget.set(MIB, 7.0, 1000)
    assert budget.left_bytes(7.0) == 1000
    budget.set(MIB, 7.0, 5 * MIB)
    assert budget.left_bytes(7.0) == MIB


def test_more_than_the_allowance_goes_when_it_is_whole() -> None:
    """A batch larger than a day's worth is written when the budget is whole, since it would never be written otherwise."""
    budget = budget_of(4096)
    assert budget.allows(MIB, 0.0)
    budget.spend(MIB, 0.0)
    assert not budget.allows(1, 0.0)
    assert budget.allows(MIB, float(DAY_SECONDS))


def test_a_clock_that_stands_still_or_jumps_back_gives_nothing() -> None:
    """A moment counts only once, even if the clock stands still or jumps back."""
    budget = budget_of(DAY_SECONDS)  # a byte a second
    budget.spend(DAY_SECONDS, 100.0)
    assert [budget.left_bytes(now) for now in (100.0, 90.0, 100.0, 101.0, 90.0, 102.0)] == [0, 0, 0, 1, 1, 2]


@given(
    st.integers(1, 1 << 50),
    st.lists(st.tuples(st.floats(0, 3.0 * DAY_SECONDS), st.integers(1, 1 << 50)), max_size=30),
)
def test_in_the_long_run_there_is_one_allowance_a_day(bytes_per_day: int, wishes: list[tuple[float, int]]) -> None:
    """A caller that asks before each write never writes more than a whole day's worth and the refill of the time since."""
    budget = budget_of(bytes_per_day)
    now, written = 0.0, 0
    for pause, wish in wishes:
        now += pause
        if wish <= bytes_per_day and budget.allows(wish, now):
            budget.spend(wish, now)
            written += wish
        given_so_far = bytes_per_day + now * bytes_per_day / DAY_SECONDS
        assert written <= given_so_far * (1 + 1e-9) + 1
        assert 0 <= budget.left_bytes(now) <= bytes_per_day


def test_unwritten_bytes_are_given_back() -> None:
    """Unwritten bytes can be spent again, up to the whole budget. Without a budget nothing happens."""
    budget = Budget()
    budget.give_back(100, 0.0)
    assert budget.left_bytes(0.0) == 0
    budget.set(1000, 0.0)
    budget.spend(600, 0.0)
    budget.give_back(500, 0.0)
    assert budget.left_bytes(0.0) == 900
    budget.give_back(500, 0.0)
    assert budget.left_bytes(0.0) == 1000
