# SPDX-License-Identifier: MIT
"""A program with Python objects in a dictionary.

objects.py MIB
"""

from __future__ import annotations

import sys
from typing import Final

from bench.programs.records import count_wrong, cut, mixed, report, uses

RECORD_BYTES: Final = 1040
"""Memory of a record and its entry in the dictionary. Measured."""
USES_PER_MIB: Final = 16


class Record:
    """The record of one customer."""

    __slots__ = ("mail", "name", "orders", "score", "tags", "used")

    def __init__(self, number: int) -> None:
        self.name = cut(number, 24)
        self.mail = f"{number}@{cut(~number & 0xFFFFFFFF, 16).replace(' ', '.')}"
        self.orders = cut(number << 1, 240)
        self.tags = [cut(number + at, 12) for at in range(4)]
        self.score = mixed(number) / 3.0
        self.used = 0

    def same(self, other: Record) -> bool:
        """Return whether two records have the same values."""
        mine = (self.name, self.mail, self.orders, self.tags, self.score)
        return mine == (other.name, other.mail, other.orders, other.tags, other.score)


def main(argv: list[str]) -> int:
    """Build, use and check the objects, and return the exit status."""
    mib = int(argv[1])
    count = mib * (1 << 20) // RECORD_BYTES
    records = {f"customer {number}": Record(number) for number in range(count)}
    used = [0] * count
    bad = 0
    for number in uses(mib * USES_PER_MIB, count):
        record = records[f"customer {number}"]
        bad += record.used != used[number] or record.orders != cut(number << 1, 240)
        record.used += 1
        used[number] += 1

    def is_right(number: int) -> bool:
        record = records[f"customer {number}"]
        return record.used == used[number] and record.same(Record(number))

    return report(count, bad + count_wrong(count, is_right))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
