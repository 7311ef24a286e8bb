# SPDX-License-Identifier: MIT
"""The records of the Python programs: parts of a long text, chosen by the record's number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Final

_TEXT_CHARACTERS: Final = 1 << 20
_LETTERS: Final = "eeeeeetttttaaaaooooiiiinnnnssshhhrrrddlluucmwfgypbvk"
_STATES: Final = ("new", "paid", "packed", "shipped", "delivered", "returned")
HOT_PART: Final = 5
"""Four of five uses go to one record in HOT_PART."""


def _text() -> str:
    """Return a text of orders as JSON."""
    source = random.Random(1)
    words = ["".join(source.choices(_LETTERS, k=source.randrange(2, 11))) for _ in range(4000)]
    length, orders = 0, []
    while length < _TEXT_CHARACTERS:
        item, state, day = " ".join(source.choices(words, k=3)), source.choice(_STATES), source.randrange(10, 31)
        number, price = source.randrange(10**6), source.randrange(10**4) / 100
        order = {"order": number, "at": f"2026-11-{day}", "item": item, "state": state, "price": price}
        orders.append(json.dumps(order))
        length += len(orders[-1])
    return "".join(orders)[:_TEXT_CHARACTERS]


TEXT: Final = _text()


def cut(number: int, length: int) -> str:
    """Return `length` characters of the text, at a place that follows from `number`."""
    start = mixed(number) % (_TEXT_CHARACTERS - length)
    return TEXT[start : start + length]


def mixed(number: int) -> int:
    """Return a pseudo-random number below 2 ** 32 that follows from `number`."""
    number = (number * 0x9E3779B1) & 0xFFFFFFFF
    return ((number ^ number >> 15) * 0x85EBCA77) & 0xFFFFFFFF


def uses(count: int, records: int) -> Iterator[int]:
    """Yield the numbers of `count` records to use. Four of five are in a fifth of the records, every HOT_PARTth one."""
    for use in range(count):
        chance = mixed(use ^ 0x5EED)
        number = (chance >> 8) % records
        yield number - number % HOT_PART if chance % 5 else number


def report(records: int, bad: int) -> int:
    """Print the line of JSON, and return the exit status."""
    print(json.dumps({"records": records, "bad": bad}), flush=True)
    return 1 if bad else 0


def count_wrong(records: int, is_right: Callable[[int], bool]) -> int:
    """Check every record in order, and return the number of wrong ones."""
    return sum(not is_right(number) for number in range(records))
