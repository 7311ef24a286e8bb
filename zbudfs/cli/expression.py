# SPDX-License-Identifier: MIT
"""Sizes that depend on the machine: "25%", "ram / 2", "min(ram / 2, 4G)".

    amount    = size | percent | sum
    sum       = product { ("+" | "-") product }
    product   = factor { ("*" | "/") factor }
    factor    = number [ suffix ] | "ram" | "-" factor | "(" sum ")" | ("min" | "max") "(" sum { "," sum } ")"

`ram` is the machine's RAM in bytes, and so is every number: "4G" is 4294967296. What zram-generator calls
`min(ram / 2, 4096)`, in megabytes, is `min(ram / 2, 4096M)` here: the suffix says the unit, and only the suffix.

Arithmetic is exact (fractions, no floats), and the result is rounded down to whole pages; a plain size is taken as it
is, so that one that is not whole pages can be refused by whoever asked. Nothing is ever evaluated as a program: the
text is read token by token by the four functions that the grammar has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Final

from zbudfs.core.sizes import SUFFIXES, parse_size, parse_size_or_percent
from zbudfs.core.units import PAGE_SIZE

EXPRESSION_GRAMMAR: Final = "a size such as 4G, a percentage of RAM such as 25%, or an expression: min(ram / 2, 4G)"
"""What an amount looks like, for error messages and for help texts."""

LONGEST_NR: Final = 128
"""Longest text that is looked at, in characters; also what bounds the depth and the length of the numbers."""

_DEEPEST_NR: Final = 16
"""Most parentheses inside one another."""

_LARGEST_BYTES: Final = 1 << 60
"""Above this a result is a mistake, on any machine: 1 EiB."""

_TOKEN: Final = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)([KMGT]?)(?![\w.])|([a-z]+)|([-+*/(),]))", re.ASCII | re.I)


def parse_amount(text: str, ram: int) -> int:
    """Return the bytes that `text` names on a machine with `ram` bytes: a size, a percentage of RAM or an expression.

    Percentages and expressions are rounded down to whole pages. Raises ValueError with a sentence that says what was
    wrong and what would be right.
    """
    if re.fullmatch(r"[0-9.]+[KMGT]?", text, re.ASCII | re.I):
        return parse_size(text)
    if text.endswith("%"):
        return parse_size_or_percent(text, ram) // PAGE_SIZE * PAGE_SIZE
    if len(text) > LONGEST_NR:
        raise ValueError(f"an expression of {len(text)} characters is too long: the most is {LONGEST_NR}")
    result = _Reader(text, ram).whole()
    if result < 0:
        raise ValueError(f"{text!r} comes to less than nothing on this machine: RAM is {ram} bytes")
    if result > _LARGEST_BYTES:
        raise ValueError(f"{text!r} comes to more than any machine has: numbers without K, M, G or T are bytes")
    size_bytes = int(result) // PAGE_SIZE * PAGE_SIZE
    if size_bytes < 1 << 20:
        raise ValueError(
            f"{text!r} comes to {size_bytes} bytes, less than 1M: numbers without K, M, G or T are bytes,"
            " so write 4096M or 4G rather than 4096"
        )
    return size_bytes


class _Reader:
    """One pass over the tokens of an expression; each method reads one rule of the grammar and returns its value."""

    def __init__(self, text: str, ram: int) -> None:
        self._text = text
        self._ram = ram
        self._depth = 0
        self._tokens = self._split()
        self._next = next(self._tokens)

    def whole(self) -> Fraction:
        """Return the value of the whole text."""
        result = self._sum()
        if self._next:
            raise self._wrong(f"{self._next!r} is not expected there")
        return result

    def _split(self) -> Iterator[str]:
        """Yield the tokens, and "" for ever behind the last."""
        at = 0
        end = len(self._text.rstrip())
        while at < end:
            match = _TOKEN.match(self._text, at)
            if match is None:
                raise self._wrong(f"{self._text[at:].strip()[:16]!r} makes no sense")
            yield match[0].strip().lower()
            at = match.end()
        while True:
            yield ""

    def _take(self) -> str:
        token, self._next = self._next, next(self._tokens)
        return token

    def _expect(self, token: str) -> None:
        if self._next != token:
            raise self._wrong(f"{token!r} is missing" + (f" before {self._next!r}" if self._next else " at the end"))
        self._take()

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self._next in ("*", "/"):
            if self._take() == "*":
                value *= self._factor()
                continue
            divisor = self._factor()
            if divisor == 0:
                raise self._wrong("it divides by zero")
            value /= divisor
        return value

    def _factor(self) -> Fraction:
        token = self._take()
        if token == "":
            raise self._wrong("it ends too early")
        if token == "ram":
            return Fraction(self._ram)
        if token[0].isdigit():
            suffix = token[-1].upper() if token[-1].isalpha() else ""
            return Fraction(token.removesuffix(suffix.lower())) * SUFFIXES[suffix]
        self._depth += 1
        if self._depth > _DEEPEST_NR:
            raise self._wrong(f"it is more than {_DEEPEST_NR} levels deep")
        value = self._inner(token)
        self._depth -= 1
        return value

    def _inner(self, token: str) -> Fraction:
        """What holds other expressions."""
        if token == "-":
            return -self._factor()
        if token == "(":
            value = self._sum()
        elif token in ("min", "max"):
            self._expect("(")
            values = [self._sum()]
            while self._next == ",":
                self._take()
                values.append(self._sum())
            value = min(values) if token == "min" else max(values)
        else:
            raise self._wrong(f"{token!r} is unknown there: known are ram, min(...), max(...) and numbers")
        self._expect(")")
        return value

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self._text!r} cannot be read: {what}; write {EXPRESSION_GRAMMAR}")
