# SPDX-License-Identifier: MIT
"""The priority of swap: the kernel fills the highest first, and devices of the same priority in turns.

Without `--priority` zbudfs goes below zram, which is faster, and above all other swap, which is a disk. A swap that is turned
on without a priority gets a negative one from the kernel, below all that are there; it would be the last to be used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from zbudfs.swap.loop import Swap

MAX_PRIORITY: Final = 32767
"""Highest priority that swapon takes; the lowest is 0 (negative ones are the kernel's own)."""

DEFAULT_PRIORITY: Final = 50
"""Used if no other swap is in the way. zram-generator gives zram 100, and a distribution's disk swap has a negative one."""

_ZRAM: Final = "/dev/zram"


def is_zram(swap: Swap) -> bool:
    """Whether it is memory that the kernel compresses."""
    return swap.path.startswith(_ZRAM)


def choose_priority(others: Sequence[Swap]) -> int | None:
    """Return the priority between zram and the other swap among `others`; None: the kernel's choice.

    Where the two leave no number between them, being above the disk counts for more. Without a disk, and with zram that has a
    negative priority, only the kernel's choice is below zram.
    """
    disks = [swap.priority for swap in others if not is_zram(swap)]
    lowest = max([-1, *disks]) + 1
    highest = min([MAX_PRIORITY + 1, *(swap.priority for swap in others if is_zram(swap))]) - 1
    if highest < lowest and not disks:
        return None
    return min(max(min(max(DEFAULT_PRIORITY, lowest), highest), lowest), MAX_PRIORITY)


def filling_order(active: Sequence[Swap], ours: Collection[str], name: str) -> str:
    """Return which swap is filled first: "/dev/zram0 (100) first, then zbudfs (50), then /dev/sda2 (-2)".

    `ours` are the devices that are called `name`. Empty if there is no other swap.
    """
    if all(swap.path in ours for swap in active):
        return ""
    levels: dict[int, list[str]] = {}
    for swap in sorted(active, key=lambda swap: -swap.priority):
        shown = name if swap.path in ours else swap.path
        if shown not in (names := levels.setdefault(swap.priority, [])):
            names.append(shown)
    parts = [
        f"{' and '.join(names)} ({priority}{', in turns' * (len(names) > 1)})" for priority, names in levels.items()
    ]
    return ", then ".join([f"{parts[0]} first", *parts[1:]])
