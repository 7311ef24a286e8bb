# SPDX-License-Identifier: MIT
"""What is wrong with a mount, from its numbers, and what to do about it: one sentence each, the worst first.

The daemon's own warnings say what the system refused it; here is what its numbers show. What happened long ago and is over
is told as long as the count of it is all there is: nothing else remembers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import shown_path

THRASH_PERCENT: Final = 20
"""So many blocks read back too soon, of a hundred written, are thrashing. Guessed."""
THRASH_BLOCKS: Final = 256
"""Fewer are too few to tell."""
BATCH_BYTES: Final = 64 * 4096

_REFUSED: Final = {
    "no_backing": "the pool is full and there is no backing file: mount with --backing FILE, or with a larger --pool",
    "backing_full": "the pool and the backing are full: make room on its disk, or mount with a larger --backing or --pool",
    "backing_failing": "the pool is full and the backing file took nothing: look at its disk (dmesg)",
    "backing_stalled": "the pool is full and the backing file did not answer for half a minute: look at its disk (dmesg)",
    "writeback_off": "the pool is full and writeback is off: zbudfs set writeback_enabled=1 {mountpoint}",
    "budget": "the pool is full and the writeback budget was used up: raise writeback_budget_bytes_per_day",
    "no_memory": "the system had no memory for the pool: lower its limit with zbudfs set pool_limit_bytes=",
    "busy": "all frames of the pool were busy at once: a pool this small needs to be larger",
}
"""Why writes were refused, and what to do."""


def remedies(report: Mapping[str, Any]) -> list[str]:
    """Return the sentences for one mount's numbers; none if all is well."""
    return [*_found(report, shown_path(str(report.get("mountpoint", "")))), *map(str, report.get("warnings") or ())]


def is_thrashing(written_frames: int, refault_blocks: int) -> bool:
    """Whether so much of what was written back was read back soon after it that it should have stayed."""
    return refault_blocks >= THRASH_BLOCKS and refault_blocks * 100 >= written_frames * THRASH_PERCENT


def _found(report: Mapping[str, Any], mountpoint: str) -> Iterator[str]:
    def number(name: str) -> int:
        return int(report.get(name) or 0)

    if off := [str(device) for device in report.get("swap_off") or ()]:
        yield (
            f"the swap on {', '.join(off)} was turned off by another program: zbudfs swapon {mountpoint} turns it on again,"
            f" zbudfs swapoff {mountpoint} detaches it"
        )
    if lost := number("lost_in_recovery"):
        yield f"{lost:,} pages were lost when a worker died: their programs get read errors (SIGBUS); see stats/log"
    if lost := number("lost_pages") - number("lost_in_recovery"):
        yield (
            f"{lost:,} reads met pages that were damaged or lost: check memory and the backing file's disk; the programs"
            " that need them are ended by the kernel"
        )
    told = any("backing file" in str(warning) for warning in report.get("warnings") or ())  # by the daemon, in detail
    if number("writeback_failing") and not told:
        yield "the backing file does not take pages, which stay in RAM: look at its disk (dmesg); it is tried again"
    elif failures := number("writeback_failures"):
        yield f"the backing file did not take {failures:,} batches at some time: look at its disk (dmesg)"
    if failures := number("pagein_failures"):
        yield f"{failures:,} reads that the backing file refused: look at its disk (dmesg)"
    if number("backing_full") and not told:
        yield "the backing is full: make room on its disk or take a larger one, or pages stay in RAM and writes are refused"
    if number("writeback_budget_bytes_per_day") and number("writeback_budget_left_bytes") < BATCH_BYTES:
        hours = number("writeback_budget_full_in_seconds") / 3600
        yield (
            f"the writeback budget is used up, and whole again in {hours:.1f} hours: nothing more is written back; raise"
            f" it with zbudfs set writeback_budget_bytes_per_day=SIZE {mountpoint}"
        )
    if is_thrashing(number("cumul_writeback_frames"), number("cumul_refault_blocks")):
        yield (
            f"the pool is thrashing: {number('cumul_refault_blocks'):,} blocks were read back within half a minute of being"
            f" written, of {number('cumul_writeback_frames'):,} written: it is too small for what is in use; raise its limit"
            f" (zbudfs set pool_limit_bytes=SIZE {mountpoint}), mount with a larger --pool, or run less"
        )
    if number("pool_limit_bytes") < number("pool_limit_set_bytes"):
        yield (
            f"memory is short: the pool's limit is {format_size(number('pool_limit_bytes'))} instead of"
            f" {format_size(number('pool_limit_set_bytes'))} for now; it comes back by itself"
        )
    for cause, remedy in _REFUSED.items():
        if refused := number(f"refused_{cause}"):
            yield f"{refused:,} writes were refused: {remedy.format(mountpoint=mountpoint)}"
