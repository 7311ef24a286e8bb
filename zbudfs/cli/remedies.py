# SPDX-License-Identifier: MIT
"""The problems of a mount that its numbers show, and the remedy of each: one sentence for each problem, the worst first.

The daemon's own warnings name present faults, and the protections that the system refused. The sentences here come from
the statistics. Most counters never return to 0, so a problem that is over is still reported: nothing else keeps a record
of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import shown_path

THRASH_PERCENT: Final = 20
"""Share of the written blocks, in percent, that is read back too soon when the pool thrashes. Guessed."""
THRASH_BLOCKS: Final = 256
"""Least number of blocks read back too soon: a share of fewer blocks says nothing."""
BATCH_BYTES: Final = 64 * 4096

_REFUSED: Final = {
    "no_backing": "the pool was full, without a backing file: mount with --backing FILE, or with a larger --pool",
    "backing_full": "pool and backing were full: make room on its disk, or mount with a larger --backing or --pool",
    "backing_failing": "the pool was full, and writes to the backing file failed: look at its disk (dmesg)",
    "backing_stalled": "the pool was full, and the backing file did not answer for half a minute: look at its disk (dmesg)",
    "writeback_off": "the pool was full, and writeback was off: zbudfs set writeback_enabled=1 {mountpoint}",
    "budget": "the pool was full, and the writeback budget was used up: raise writeback_budget_bytes_per_day",
    "no_memory": "the system had no memory for the pool: lower its limit with zbudfs set pool_limit_bytes=",
    "busy": "all frames of the pool were busy at the same time: mount with a larger --pool",
}
"""Cause of refused writes, and the remedy, by the name of the cause."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a mount: one sentence that says what is wrong, then what to do."""

    text: str
    needs_action: bool = True
    """Whether the user must do something; False if the daemon ends the problem by itself."""


def remedies(report: Mapping[str, Any]) -> list[str]:
    """Return the sentences for the numbers of one mount; an empty list if all is well."""
    return [problem.text for problem in _problems(report)]


def problems(report: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of one mount: those that need action first, and of these the worst first."""
    return sorted(_problems(report), key=lambda problem: not problem.needs_action)


def _problems(report: Mapping[str, Any]) -> list[Problem]:
    found = list(_found(report, shown_path(str(report.get("mountpoint", "")))))
    return [*found, *(Problem(str(warning)) for warning in report.get("warnings") or ())]


def is_thrashing(written_frames: int, refault_blocks: int) -> bool:
    """Return whether so many written blocks were read back soon that the pool should have kept their pages."""
    return refault_blocks >= THRASH_BLOCKS and refault_blocks * 100 >= written_frames * THRASH_PERCENT


def _found(report: Mapping[str, Any], mountpoint: str) -> Iterator[Problem]:
    def number(name: str) -> int:
        return int(report.get(name) or 0)

    if off := [str(device) for device in report.get("swap_off") or ()]:
        yield Problem(
            f"the swap on {', '.join(off)} was turned off by another program: zbudfs swapon {mountpoint} turns it on again,"
            f" zbudfs swapoff {mountpoint} detaches it"
        )
    if lost := number("lost_in_recovery"):
        yield Problem(
            f"{lost:,} pages were lost when a worker died: their programs get read errors (SIGBUS); see stats/log"
        )
    if lost := number("lost_pages") - number("lost_in_recovery"):
        yield Problem(
            f"{lost:,} reads failed because the page was damaged or lost: check the memory and the backing file's disk; the"
            " kernel ends the programs that need these pages"
        )
    # The daemon's own warning about the backing file has more details.
    is_in_warnings = any("backing file" in str(warning) for warning in report.get("warnings") or ())
    if number("writeback_failing") and not is_in_warnings:
        yield Problem(
            "writes to the backing file fail, so pages stay in RAM: look at its disk (dmesg); the daemon tries the writes"
            " again"
        )
    elif failures := number("writeback_failures"):
        yield Problem(f"{failures:,} batches of writes to the backing file failed: look at its disk (dmesg)")
    if failures := number("pagein_failures"):
        yield Problem(f"{failures:,} reads from the backing file failed: look at its disk (dmesg)")
    if number("backing_full") and not is_in_warnings:
        yield Problem(
            "the backing is full, so pages stay in RAM until the pool is full: make room on its disk, or use a larger"
            " disk"
        )
    if number("writeback_budget_bytes_per_day") and number("writeback_budget_left_bytes") < BATCH_BYTES:
        hours = number("writeback_budget_full_in_seconds") / 3600
        yield Problem(
            f"the writeback budget is used up, so writeback has stopped; the budget is full again in {hours:.1f} hours: to"
            f" raise it, run zbudfs set writeback_budget_bytes_per_day=SIZE {mountpoint}"
        )
    if is_thrashing(number("cumul_writeback_frames"), number("cumul_refault_blocks")):
        yield Problem(
            f"the pool is thrashing: of {number('cumul_writeback_frames'):,} written blocks,"
            f" {number('cumul_refault_blocks'):,} were read back within half a minute; raise its limit (zbudfs set"
            f" pool_limit_bytes=SIZE {mountpoint}), mount with a larger --pool, or run fewer programs"
        )
    if number("pool_limit_bytes") < number("pool_limit_set_bytes"):
        yield Problem(
            f"memory is short, so the pool's limit is now {format_size(number('pool_limit_bytes'))} instead of"
            f" {format_size(number('pool_limit_set_bytes'))}; the daemon raises it again when memory is free",
            needs_action=False,
        )
    for cause, remedy in _REFUSED.items():
        if refused := number(f"refused_{cause}"):
            yield Problem(f"{refused:,} writes were refused: {remedy.format(mountpoint=mountpoint)}")
