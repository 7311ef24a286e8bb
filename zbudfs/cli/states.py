# SPDX-License-Identifier: MIT
"""The state of each figure of `zbudfs top`: normal, near the limit, or failing.

    pool        near: free frames are below the low watermark, or memory is short; failing: it refuses writes
    disk        near: nearly full; failing: full, or its disk fails
    writeback   near: turned off, or the budget nearly spent; failing: the budget is spent, or writes fail
    hits        near: blocks are read back soon after they were written
    standby     near: no process can take over at once
    refused     near: writes were refused since the mount; failing: in the last looks
    lost        failing: pages were lost

This module decides from the statistics alone. It draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Final

from zbudfs.cli.remedies import BATCH_BYTES, is_thrashing
from zbudfs.core.units import PAGE_SIZE

NEAR_PERCENT: Final = 90
"""Share of a room, in percent, from which it is nearly full. Arbitrary."""


class State(IntEnum):
    """The state of a figure; the larger, the worse."""

    NORMAL = 0
    NEAR = 1
    FAILING = 2

    @property
    def word(self) -> str:
        """The name that is shown."""
        return ("normal", "near the limit", "failing")[self]

    @property
    def mark(self) -> str:
        """The characters beside a figure that has this state, for terminals without colour."""
        return "!" * self


def states(numbers: Mapping[str, Any], recent: Callable[[str], float]) -> dict[str, State]:
    """Return the states of the figures of a mount, by name.

    `numbers` are its newest statistics, and `recent` returns the growth of a counter over the last looks.
    """

    def number(name: str) -> int:
        return int(numbers.get(name) or 0)

    has_backing = bool(numbers.get("backing_path"))
    writes_fail = has_backing and bool(number("writeback_failing") or recent("writeback_failures"))
    refuses = recent("refused_pool_full") > 0
    return {
        "pool": _pool(number, has_backing=has_backing, refuses=refuses),
        "disk": _worst(
            failing=has_backing and bool(writes_fail or number("backing_full") or recent("pagein_failures")),
            near=has_backing and _is_nearly_full(number("backing_used_bytes"), number("backing_size_bytes")),
        ),
        "writeback": _writeback(number, has_backing=has_backing, writes_fail=writes_fail),
        "hits": _worst(
            near=is_thrashing(int(recent("cumul_writeback_frames")), int(recent("cumul_refault_blocks"))), failing=False
        ),
        "standby": _worst(near=not numbers.get("standby_ready"), failing=False),
        "refused": _worst(failing=refuses, near=number("refused_pool_full") > 0),
        "lost": _worst(failing=number("lost_pages") > 0, near=False),
    }


def _pool(number: Callable[[str], int], *, has_backing: bool, refuses: bool) -> State:
    used, limit = number("pool_used_bytes"), number("pool_limit_bytes")
    if has_backing:
        near = limit - used < number("low_watermark_frames") * PAGE_SIZE
        full = False  # writeback makes room
    else:
        near = _is_nearly_full(used, limit)
        full = 0 < limit <= used
    return _worst(failing=refuses or full, near=near or limit < number("pool_limit_set_bytes"))


def _writeback(number: Callable[[str], int], *, has_backing: bool, writes_fail: bool) -> State:
    budget = number("writeback_budget_bytes_per_day")
    left = number("writeback_budget_left_bytes")
    return _worst(
        failing=writes_fail or (has_backing and budget > 0 and left < BATCH_BYTES),
        near=has_backing and (not number("writeback_enabled") or _is_nearly_full(budget - left, budget)),
    )


def _is_nearly_full(used: int, whole: int) -> bool:
    return whole > 0 and used * 100 >= whole * NEAR_PERCENT


def _worst(*, failing: bool, near: bool) -> State:
    return State.FAILING if failing else State.NEAR if near else State.NORMAL
