# SPDX-License-Identifier: MIT
"""Readers of values. Each turns a word of the command line into a value.

For a wrong word, a reader raises ValueError with a text that says what is wrong and what to write. If the text begins with
"it is", `OneLineParser` replaces "it" by the word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Final, TypeVar

from zbudfs.core.packing import Packing
from zbudfs.core.sizes import parse_size, parse_size_or_percent
from zbudfs.service.settings import MAX_LEVEL, MIN_LEVEL

T = TypeVar("T")

MAX_SECONDS: Final = 1e9
_NUMBER: Final = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")
_WHOLE: Final = re.compile(r"-?[0-9]{1,20}")


def error_about(word: str, error: ValueError) -> str:
    """Return the text of a reader's error. In a text that begins with "it is", the word replaces "it"."""
    text = str(error)
    return f"{word!r}{text[2:]}" if text.startswith("it is") else text


def each(read: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a reader of a list of values, separated by commas. A repeated value counts once."""

    def read_each(text: str) -> list[T]:
        found = []
        for part in map(str.strip, text.split(",")):
            try:
                found.append(read(part))
            except ValueError as error:
                raise ValueError(error_about(part, error)) from None
        return list(dict.fromkeys(found))

    return read_each


def whole_number(what: str, low: int, high: int) -> Callable[[object], int]:
    """Return a reader of whole numbers, given as text or int. `what` names such a number in the error."""

    def read(value: object) -> int:
        is_number = isinstance(value, str | int) and not isinstance(value, bool) and _WHOLE.fullmatch(str(value))
        if not (is_number and low <= int(str(value)) <= high):
            raise ValueError(f"it is not {what}: write a whole number from {low} to {high}")
        return int(str(value))

    return read


level: Final = whole_number("a level", MIN_LEVEL, MAX_LEVEL)
"""Reader of a zstd level. It accepts 0, which the check of the settings refuses with the reason."""
seed: Final = whole_number("a seed", 0, (1 << 63) - 1)
"""Reader of the seed of random numbers."""
pid: Final = whole_number("a process id", 1, (1 << 31) - 1)
"""Reader of a process id."""


def some_size(text: str) -> int:
    """Read a size above zero, in bytes."""
    found = parse_size(text)
    if not found:
        raise ValueError("it is a size of zero bytes: write a size above 0, such as 64M")
    return found


def size_or_percent(text: str) -> str:
    """Check a size or a percentage, and return the text. The caller knows the size of which it is a percentage."""
    parse_size_or_percent(text, 0)
    return text


def compared_level(text: str) -> int:
    """Read a zstd level, and refuse 0."""
    if found := level(text):
        return found
    raise ValueError(
        f"there is no level 0: write levels from {MIN_LEVEL} to -1 and from 1 to {MAX_LEVEL}, such as -3,-1,1"
    )


def packing(text: str) -> str:
    """Read a packing, and return its full name."""
    return str(Packing.parse(text))


def watermarks(text: str) -> str:
    """Check a pair LOW:HIGH of sizes or percentages, and return the text."""
    parts = text.split(":")
    if len(parts) != 2:
        raise ValueError(f"{text!r} is not a pair of watermarks: write LOW:HIGH, such as 2%:5% or 8M:16M")
    for part in parts:
        size_or_percent(part)
    return text


def seconds(text: str) -> float:
    """Read a number of seconds above zero."""
    found = _number(text)
    if not 0 < found < MAX_SECONDS:
        raise ValueError(
            f"it is not a number of seconds: write one above 0 and below {MAX_SECONDS:,.0f}, such as 60 or 0.5"
        )
    return found


def interval(text: str) -> float:
    """Read an interval in seconds, from 0.1 to a day."""
    found = _number(text)
    if not 0.1 <= found <= 86400:
        raise ValueError("it is not a number of seconds: write one from 0.1 to 86400")
    return found


def _number(text: str) -> float:
    """Return a number written in ASCII digits, 0 for any other text: float() accepts "1_0", "nan" and digits of all scripts."""
    return float(text) if _NUMBER.fullmatch(text) else 0.0


def file_name(text: str) -> str:
    """Check the path of a file, which need not exist."""
    if not text or "\0" in text:
        raise ValueError("it is not a file name: write the path of a file")
    return text


def folder(text: str) -> str:
    """Check the path of a directory that exists."""
    if not text or "\0" in text or not Path(text).is_dir():
        raise ValueError("it is not a directory: write the path of one that exists")
    return text


def picture(*ends: str) -> Callable[[str], str]:
    """Return a reader that checks the name of a picture: it must end in one of `ends`."""

    def check(text: str) -> str:
        if PurePath(text).suffix.lower() not in ends or "\0" in text:
            raise ValueError(f"it is not the name of a picture: write one that ends in {' or '.join(ends)}")
        return text

    return check


def listen_address(text: str) -> tuple[str, int]:
    """Return ADDR:PORT as address and port. ADDR may be empty (all addresses) or in brackets. Raises ValueError."""
    address, separator, port = text.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not ADDR:PORT: write an address and a port, such as localhost:9824 or [::]:9824")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    elif ":" in address:
        raise ValueError(f"{text!r} is not ADDR:PORT: write an IPv6 address in brackets")
    return address or "::", int(port)
