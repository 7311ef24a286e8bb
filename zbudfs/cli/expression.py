# SPDX-License-Identifier: MIT
"""The parser of sizes that depend on the machine: "25%", "ram / 2", "min(ram / 2, 4G)".

    amount    = size | percent | sum
    sum       = product { ("+" | "-") product }
    product   = factor { ("*" | "/") factor }
    factor    = number [ suffix ] | "ram" | "-" factor | "(" sum ")" | ("min" | "max") "(" sum { "," sum } ")"

`ram` is the machine's RAM in bytes. Every number is in bytes too: "4G" is 4294967296. zram-generator counts in megabytes:
its `min(ram / 2, 4096)` is `min(ram / 2, 4096M)` here, since only the suffix gives the unit.

Arithmetic is exact (fractions, no floats), and the result is rounded down to whole pages. A plain size is not rounded, so
that the caller can refuse a size that is not whole pages. Numbers are replaced by names, then Python's parser reads the
expression, and only the few nodes of this grammar are evaluated.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Final

from zbudfs.core.sizes import SUFFIXES, parse_size, parse_size_or_percent
from zbudfs.core.units import PAGE_SIZE

EXPRESSION_GRAMMAR: Final = "a size such as 4G, a percentage of RAM such as 25%, or an expression: min(ram / 2, 4G)"
"""Description of an amount, for messages and help."""

LONGEST_NR: Final = 128
"""Longest expression, in characters. It also bounds the depth of the expression and the length of its numbers."""

_LARGEST_BYTES: Final = 1 << 60
"""Largest result that can be meant on any machine: 1 EiB."""

_NUMBER: Final = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?)([kmgt]?)(?![\w.])", re.ASCII)
_KNOWN: Final = re.compile(r"N[0-9]+|[a-z]+|[-+*/(), \t]", re.ASCII)
"""Pattern of one token of an expression whose numbers have become names."""
_OPERATIONS: Final[Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def parse_amount(text: str, ram: int) -> int:
    """Return the bytes that `text` names on a machine with `ram` bytes: a size, a percentage of RAM or an expression.

    Percentages and expressions are rounded down to whole pages. Raises ValueError with a sentence that says what is
    wrong and what is right.
    """
    if re.fullmatch(r"(?:[\d.][\w.]*)?", text):
        return parse_size(text)
    if text.endswith("%"):
        return parse_size_or_percent(text, ram) // PAGE_SIZE * PAGE_SIZE
    if len(text) > LONGEST_NR:
        raise ValueError(f"an expression of {len(text)} characters is too long: write at most {LONGEST_NR} characters")
    result = _evaluate(text, ram)
    if result < 0:
        why = f" on this machine, whose RAM is {ram} bytes" if "ram" in text.lower() else ""
        raise ValueError(f"{text!r} is less than zero{why}: write a positive size")
    if result > _LARGEST_BYTES:
        raise ValueError(f"{text!r} is more than any machine has: write less; numbers without K, M, G or T are bytes")
    size_bytes = int(result) // PAGE_SIZE * PAGE_SIZE
    if size_bytes < 1 << 20:
        raise ValueError(
            f"{text!r} is {size_bytes} bytes, less than 1M: numbers without K, M, G or T are bytes,"
            " so write 4096M or 4G rather than 4096"
        )
    return size_bytes


def _evaluate(text: str, ram: int) -> Fraction:
    """Return the exact value of an expression. Raises ValueError."""

    def wrong(why: str) -> ValueError:
        return ValueError(f"{text!r} cannot be read: {why}; write {EXPRESSION_GRAMMAR}")

    known = {"ram": Fraction(ram)}

    def as_name(number: re.Match[str]) -> str:
        name = f"N{len(known)}"
        known[name] = Fraction(number[1]) * SUFFIXES[number[2].upper()]
        return name

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Name(name) if name in known:
                return known[name]
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](value(left), value(right))
            case ast.Call(ast.Name("min"), [_, *_] as arguments, []):
                return min(map(value, arguments))
            case ast.Call(ast.Name("max"), [_, *_] as arguments, []):
                return max(map(value, arguments))
            case ast.Name(name) | ast.Call(ast.Name(name)):
                raise wrong(f"{name!r} is unknown: known are ram, min(...), max(...) and numbers")
        raise wrong("it contains more than numbers, ram, + - * /, min(...) and max(...)")

    source = _NUMBER.sub(as_name, text.lower().strip())
    if rest := _KNOWN.sub("", source):
        raise wrong(f"{rest[:16]!r} is not allowed")
    try:
        return value(ast.parse(source, mode="eval").body)
    except ZeroDivisionError:
        raise wrong("it divides by zero") from None
    except (SyntaxError, MemoryError, RecursionError):
        raise wrong("a part of the expression is missing, or there is one too many") from None
