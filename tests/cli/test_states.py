# SPDX-License-Identifier: MIT
"""The states of the figures of `zbudfs top`: made-up statistics in, normal, near or failing out."""

from __future__ import annotations

from typing import Any, Final

import pytest

from zbudfs.cli.states import State, states

WELL: Final[dict[str, Any]] = {
    "standby_ready": True,
    "pool_used_bytes": 50 << 20,
    "pool_limit_bytes": 100 << 20,
    "pool_limit_set_bytes": 100 << 20,
    "low_watermark_frames": 256,
    "backing_path": "/backing",
    "backing_used_bytes": 10 << 20,
    "backing_size_bytes": 100 << 20,
    "writeback_enabled": 1,
}
BUDGET: Final = {"writeback_budget_bytes_per_day": 1 << 30}
NO_BACKING: Final = {"backing_path": None, "backing_size_bytes": 0}
NEAR, FAILING = State.NEAR, State.FAILING


@pytest.mark.parametrize("numbers", [WELL, {**WELL, **NO_BACKING, "writeback_enabled": 0}])
def test_all_is_normal(numbers: dict[str, Any]) -> None:
    """A mount that is well has no figure in another state, with a backing or without one."""
    assert set(states(numbers, lambda name: 0.0).values()) == {State.NORMAL}


@pytest.mark.parametrize(
    ("numbers", "grown", "expected"),
    [
        ({"pool_used_bytes": (99 << 20) + 1}, {}, {"pool": NEAR}),
        ({"pool_used_bytes": 99 << 20}, {}, {}),
        ({"pool_used_bytes": 100 << 20}, {}, {"pool": NEAR}),
        ({"pool_used_bytes": 90 << 20, **NO_BACKING}, {}, {"pool": NEAR}),
        ({"pool_used_bytes": 100 << 20, **NO_BACKING}, {}, {"pool": FAILING}),
        ({"pool_limit_bytes": 99 << 20}, {}, {"pool": NEAR}),
        ({"refused_pool_full": 5}, {"refused_pool_full": 5}, {"pool": FAILING, "refused": FAILING}),
        ({"refused_pool_full": 5}, {}, {"refused": NEAR}),
        ({"backing_used_bytes": 90 << 20}, {}, {"disk": NEAR}),
        ({"backing_used_bytes": 89 << 20}, {}, {}),
        ({"backing_full": 1}, {}, {"disk": FAILING}),
        ({"writeback_failing": 1}, {}, {"disk": FAILING, "writeback": FAILING}),
        ({"writeback_failures": 9}, {"writeback_failures": 9}, {"disk": FAILING, "writeback": FAILING}),
        ({"writeback_failures": 9}, {}, {}),
        ({"pagein_failures": 1}, {"pagein_failures": 1}, {"disk": FAILING}),
        ({"writeback_enabled": 0}, {}, {"writeback": NEAR}),
        ({**BUDGET, "writeback_budget_left_bytes": 1 << 30}, {}, {}),
        ({**BUDGET, "writeback_budget_left_bytes": 100 << 20}, {}, {"writeback": NEAR}),
        ({**BUDGET, "writeback_budget_left_bytes": 4096}, {}, {"writeback": FAILING}),
        ({}, {"cumul_writeback_frames": 1000, "cumul_refault_blocks": 900}, {"hits": NEAR}),
        ({}, {"cumul_writeback_frames": 9000, "cumul_refault_blocks": 900}, {}),
        ({"standby_ready": False}, {}, {"standby": NEAR}),
        ({"lost_pages": 1}, {}, {"lost": FAILING}),
    ],
)
def test_each_state(numbers: dict[str, Any], grown: dict[str, int], expected: dict[str, State]) -> None:
    """Exactly these figures are not normal."""
    found = states({**WELL, **numbers}, lambda name: float(grown.get(name, 0)))
    assert {name: state for name, state in found.items() if state} == expected


def test_a_state_without_colour() -> None:
    """Each state has a word and a mark of its own."""
    assert [state.word for state in State] == ["normal", "near the limit", "failing"]
    assert [state.mark for state in State] == ["", "!", "!!"]
