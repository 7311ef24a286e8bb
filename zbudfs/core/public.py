# SPDX-License-Identifier: MIT
"""The statistics that users other than root may read, and the rounding of each.

A number that follows from the content of one page helps an attack on the program that the page belongs to. For example, its
compressed size shows whether a guess stands beside a secret in the same page. So there are four groups:

    EXACT        facts of the mount, settings, and counts of failures: they do not follow from the content of pages
    PAGES        counts of pages and requests, rounded down: every user can read the kernel's own counts of them
    BLURRED      room, blocks and writes to the disk, which follow from the sizes of pages: rounded at random (`Blur`)
    HISTOGRAMS   as BLURRED; reads below 64 us are one bucket: the time to decompress a page follows from its content

Root alone may read the rest: sizes of zpages, their histogram, the counts of same-filled and of raw pages, the allocator's
counters, and the times of writes.
"""

from collections.abc import Callable, Mapping
from typing import Final

from zbudfs.core.budget import DAY_SECONDS
from zbudfs.core.errors import Loss, Refusal
from zbudfs.core.latency import BUCKETS

Value = int | str | list[int] | list[str] | None

EXACT: Final = (
    *("mountpoint", "version", "packing", "mounted_at", "size_bytes", "level", "encrypted", "backing_path"),
    *("pid", "keeper_pid", "worker_pid", "standby_pid", "standby_ready", "recoveries", "last_recovery_us"),
    *("survives_crash", "open_swapfiles", "warnings", "log_dropped", "pressure_reports", "age_seconds"),
    *("pool_limit_bytes", "pool_limit_set_bytes", "pool_configured_bytes", "backing_size_bytes", "backing_full"),
    *("low_watermark_frames", "high_watermark_frames", "writeback_enabled", "writeback_failing"),
    *("writeback_budget_bytes_per_day", "writeback_failures", "pagein_failures"),
    *("lost_pages", "lost_in_recovery", *(f"lost_{cause}" for cause in Loss)),
)

PAGES: Final = ("stored_pages", "cumul_read_pages", "cumul_written_pages", "cumul_discarded_pages", "served_requests")
PAGES_STEP: Final = 16

_FRAME_BYTES: Final = 4096
_BYTES_STEP: Final = 1 << 20
_FRAMES_STEP: Final = 256
_REFUSED_STEP: Final = 64
_BUCKET_STEP: Final = 16
_SUM_STEP_US: Final = 1 << 16

_REFUSED: Final = tuple(f"refused_{cause}" for cause in Refusal)
BLURRED: Final[Mapping[str, int]] = {
    **dict.fromkeys(("pool_used_bytes", "pool_ready_bytes", "backing_used_bytes", "backing_ready_bytes"), _BYTES_STEP),
    **dict.fromkeys(("cumul_grown_bytes", "writeback_budget_used_bytes"), _BYTES_STEP),
    **dict.fromkeys(("written_back_pages", "cumul_writeback_frames", "cumul_writeback_pages"), _FRAMES_STEP),
    **dict.fromkeys(("cumul_aged_frames", "cumul_dropped_frames", "cumul_pagein_blocks"), _FRAMES_STEP),
    **dict.fromkeys(("cumul_pagein_pages", "cumul_readahead_blocks", "cumul_refault_blocks"), _FRAMES_STEP),
    **dict.fromkeys(_REFUSED, _REFUSED_STEP),
}
"""The step of the rounding, by name."""

DERIVED: Final = (
    *("refused_pool_full", "cumul_writeback_bytes", "writeback_budget_left_bytes", "writeback_budget_full_in_seconds"),
)
"""Statistics that are computed from the blurred ones: a second blur of the same number would reveal more of it."""

HISTOGRAMS: Final = ("read", "discard", "sync", "writeback", "pagein")
"""Kinds whose KIND_latency_us and KIND_latency_sum_us are public. The times of writes show how long compression took."""
FIRST_READ_BUCKET: Final = 6
"""The bucket that counts all reads faster than 2**6 us."""

NAMES: Final = frozenset(
    (
        *(*EXACT, *PAGES, *BLURRED, *DERIVED),
        *(f"{kind}_latency_us" for kind in HISTOGRAMS),
        *(f"{kind}_latency_sum_us" for kind in HISTOGRAMS),
    )
)
"""The names of all public statistics."""


class Blur:
    """One number, rounded at random, whose public value changes only when the number has moved far enough.

    The public value is a multiple of `step`, off by less than two steps. Chance decides whether it is rounded up or down,
    and how far the number must move before the public value changes again: between one step and two. So neither the value
    nor the moment of its change shows where the number is within a step. A user who moves the number himself gets one
    random sample each time. If the number only grows, its public value only grows. `below` returns a random number from 0
    to its argument less one.
    """

    __slots__ = ("_below", "_far", "_shown", "_step")

    def __init__(self, step: int, below: Callable[[int], int]) -> None:
        self._step = step
        self._below = below
        self._shown = 0
        self._far = step + below(step)

    def tell(self, value: int) -> int:
        """Return the public value of `value`, which is 0 or more."""
        if abs(value - self._shown) >= self._far:
            self._shown = (value + self._below(self._step)) // self._step * self._step
            self._far = self._step + self._below(self._step)
        return self._shown


class Discretion:
    """The filter that makes the public statistics of a mount from its statistics."""

    def __init__(self, below: Callable[[int], int]) -> None:
        self._blurs = {name: Blur(step, below) for name, step in BLURRED.items()}
        self._sums = {kind: Blur(_SUM_STEP_US, below) for kind in HISTOGRAMS}
        self._buckets = {kind: [Blur(_BUCKET_STEP, below) for _ in range(BUCKETS)] for kind in HISTOGRAMS}

    def public(self, numbers: Mapping[str, Value]) -> dict[str, Value]:
        """Return the public statistics of `numbers`, a snapshot of stats/."""
        found: dict[str, Value] = {name: numbers[name] for name in EXACT}
        for name in PAGES:
            found[name] = _count(numbers[name]) // PAGES_STEP * PAGES_STEP
        for name, blur in self._blurs.items():
            found[name] = blur.tell(_count(numbers[name]))
        found["refused_pool_full"] = sum(_count(found[name]) for name in _REFUSED)
        found["cumul_writeback_bytes"] = _count(found["cumul_writeback_frames"]) * _FRAME_BYTES
        budget, used = _count(numbers["writeback_budget_bytes_per_day"]), _count(found["writeback_budget_used_bytes"])
        found["writeback_budget_used_bytes"] = used = min(used, budget)
        found["writeback_budget_left_bytes"] = budget - used
        found["writeback_budget_full_in_seconds"] = -(-used * DAY_SECONDS // budget) if budget else 0
        for kind in HISTOGRAMS:
            counts = numbers[f"{kind}_latency_us"]
            assert isinstance(counts, list)
            buckets = [int(count) for count in counts]
            if kind == "read":
                fast = sum(buckets[: FIRST_READ_BUCKET + 1])
                buckets[: FIRST_READ_BUCKET + 1] = [*([0] * FIRST_READ_BUCKET), fast]
            found[f"{kind}_latency_us"] = [
                blur.tell(count) if count else 0 for blur, count in zip(self._buckets[kind], buckets, strict=False)
            ]
            found[f"{kind}_latency_sum_us"] = self._sums[kind].tell(_count(numbers[f"{kind}_latency_sum_us"]))
        return found


def _count(value: Value) -> int:
    assert isinstance(value, int)
    return value
