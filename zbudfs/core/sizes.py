# SPDX-License-Identifier: MIT
"""Sizes as users write and read them; inside the program a size is an int of bytes.

All options share one grammar, so that a suffix means the same everywhere:

    size     = number [ suffix ]
    number   = digits [ "." digits ]     a fraction only with a suffix, and only for whole bytes
    suffix   = K | M | G | T             powers of 1024, upper or lower case
    percent  = number "%"                only where the option says so

There is no "KB", "KiB" or "kB": two spellings that differ by 2.4 % are a trap in a tool that counts frames.
Arithmetic is exact (integers, no floats), so "1.1G" is refused instead of rounded. `format_size` is the opposite
direction. It rounds, and its result is for users alone and never parsed again.
"""

from __future__ import annotations

import re
from typing import Final

SUFFIXES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
"""Bytes by suffix in upper case."""

GRAMMAR: Final = "digits with an optional K, M, G or T (powers of 1024), such as 4G, 1.5G, 512M, 64K or 4096"
"""The syntax of a size, for error messages and help texts."""

_SIZE: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?([KMGT]?)", re.ASCII | re.IGNORECASE)
_PERCENT: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?%", re.ASCII)
_UNITS: Final = {10: "KiB", 20: "MiB", 30: "GiB", 40: "TiB"}
_LONGEST_NR: Final = 32
"""Longest text that the parser reads, in characters: a size needs 16 digits at most."""


def parse_size(text: str) -> int:
    """Return the size that `text` names, in bytes.

    Raises ValueError when the text is not in the grammar or does not come to a whole number of bytes. Its sentence says
    what is wrong and how to write it. Zero is a size; the caller decides whether it makes sense.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST_NR else None
    if match is None:
        raise ValueError(f"{_shown(text)} is not a size: write {GRAMMAR}")
    whole, fraction, suffix = match[1], match[2], match[3].upper()
    number, per = _ratio(whole, fraction)
    size_bytes, rest = divmod(number * SUFFIXES[suffix], per)
    if rest:
        raise ValueError(f"{_shown(text)} is not a whole number of bytes: write {size_bytes} or {size_bytes + 1}")
    return size_bytes


def parse_size_or_percent(text: str, whole_bytes: int) -> int:
    """Return the size that `text` names, in bytes; "25%" means that share of `whole_bytes`, rounded down.

    Raises ValueError as `parse_size` does, and for a share above 100 %.
    """
    match = _PERCENT.fullmatch(text) if len(text) <= _LONGEST_NR else None
    if match is None:
        if text.endswith("%"):
            raise ValueError(f"{_shown(text)} is not a percentage: write a number from 0% to 100%, such as 25%")
        try:
            return parse_size(text)
        except ValueError as error:
            raise ValueError(f"{error}; or a percentage, such as 25%") from None
    number, per = _ratio(match[1], match[2])
    if number > 100 * per:
        raise ValueError(f"{_shown(text)} is more than the whole: write a number from 0% to 100%, such as 25%")
    return number * whole_bytes // (100 * per)


def format_size(size_bytes: int) -> str:
    """Return `size_bytes` for users: "0 B", "4 KiB", "1.5 GiB"; one digit after the point, none if it is 0.

    Negative sizes (a difference) keep their sign.
    """
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if size < 1024:
        return f"{sign}{size} B"
    power = 0
    tenths = size * 10
    while tenths >= 10240 and power < 40:
        power += 10
        tenths = (size * 20 + (1 << power)) >> (power + 1)  # rounded to the nearest tenth
    return f"{sign}{tenths // 10}{f'.{tenths % 10}' if tenths % 10 else ''} {_UNITS[power]}"


def _ratio(whole: str, fraction: str | None) -> tuple[int, int]:
    """Return the exact value of digits before and after a point, as numerator and denominator."""
    digits = fraction or ""
    return int(whole + digits), 10 ** len(digits)


def _shown(text: str) -> str:
    """Return `text` quoted for a message, cut when it is longer than any size could be."""
    return repr(text if len(text) <= _LONGEST_NR else text[:_LONGEST_NR] + "...")
