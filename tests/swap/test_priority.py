# SPDX-License-Identifier: MIT
"""The default priority is below zram and above every disk, and messages name the order of the swaps."""

import pytest

from zbudfs.swap.loop import Swap
from zbudfs.swap.priority import choose_priority, filling_order


def made_up(*priorities: tuple[str, int]) -> list[Swap]:
    """Return swaps by their names and priorities."""
    return [Swap(f"/dev/{name}", 1 << 30, 0, priority) for name, priority in priorities]


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([], 50),
        ([("sda2", -2)], 50),
        ([("sda2", -2), ("zram0", 100)], 50),
        ([("zram0", 100)], 50),
        ([("sda2", 10)], 50),
        ([("sda2", 50)], 51),
        ([("sda2", 90), ("zram0", 100)], 91),
        ([("sda2", 5), ("zram0", 20)], 19),
        ([("sda2", 5), ("zram0", 7), ("zram1", 20)], 6),
        ([("sda2", 99), ("zram0", 100)], 100),  # no number between them: above the disk
        ([("sda2", 200), ("zram0", 100)], 201),
        ([("zram0", 0)], None),
        ([("zram0", -2)], None),
        ([("zram0", -3), ("sda2", -2)], 0),
        ([("sda2", 32767)], 32767),
    ],
)
def test_the_default(others: list[tuple[str, int]], chosen: int | None) -> None:
    """The default is between zram and the disks if there is room, and otherwise above the disks."""
    assert choose_priority(made_up(*others)) == chosen


def test_the_order_in_words() -> None:
    """The swap with the highest priority comes first, equal ones share a place, and a lone swap needs no word."""
    swaps = made_up(("sda2", -2), ("loop0", 50), ("zram0", 100), ("loop1", 50))
    ours = ["/dev/loop0", "/dev/loop1"]
    assert filling_order(swaps, ours, "zbudfs") == "/dev/zram0 (100) first, then zbudfs (50), then /dev/sda2 (-2)"
    assert (
        filling_order(swaps[1:], ours[:1], "zbudfs")
        == "/dev/zram0 (100) first, then zbudfs and /dev/loop1 (50, in turns)"
    )
    assert filling_order(swaps[1:2], ours, "zbudfs") == ""
    assert filling_order([], [], "zbudfs") == ""
