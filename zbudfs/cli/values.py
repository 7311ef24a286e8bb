# SPDX-License-Identifier: MIT
"""What may be typed for a value, as argparse wants it: a function from the text to the value.

A text that is none raises ArgumentTypeError with what was wrong and what would be right, so that it is a usage error.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path, PurePath
from typing import Final

from zbudfs.core.packing import Packing
from zbudfs.core.sizes import parse_size, parse_size_or_percent
from zbudfs.service.settings import MAX_LEVEL, MIN_LEVEL

MAX_SECONDS: Final = 1e9
MAX_SEED: Final = (1 << 63) - 1
_NUMBER: Final = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")
_WHOLE: Final = re.compile(r"-?[0-9]{1,20}")
PLOT_ENDS: Final = (".svg", ".png")
"""What the name of a picture may end in, and what it then is."""


def size(text: str) -> int:
    """A size, in bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def some_size(text: str) -> int:
    """A size that is not zero, in bytes."""
    found = size(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is a size of zero bytes: write a size above 0, such as 64M")
    return found


def size_or_percent(text: str) -> str:
    """A size or a percentage, as it was typed: of what is not known here."""
    try:
        parse_size_or_percent(text, 0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def level(text: str) -> int:
    """A zstd level; 0 passes, and the check of the settings tells why it is refused."""
    return whole_number(text, "a level", MIN_LEVEL, MAX_LEVEL)


def levels(text: str) -> list[int]:
    """Levels with commas between them."""
    found = [level(part.strip()) for part in text.split(",")]
    if 0 in found:
        raise argparse.ArgumentTypeError(
            f"there is no level 0: write levels from {MIN_LEVEL} to -1 and from 1 to {MAX_LEVEL}, such as -3,-1,1"
        )
    return list(dict.fromkeys(found))


def pools(text: str) -> list[str]:
    """Sizes or percentages with commas between them, as they were typed."""
    return list(dict.fromkeys(size_or_percent(part.strip()) for part in text.split(",")))


def packings(text: str) -> list[str]:
    """Packings with commas between them."""
    try:
        return list(dict.fromkeys(str(Packing.parse(part.strip())) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def watermarks(text: str) -> list[str]:
    """Pairs LOW:HIGH of sizes or percentages with commas between them, as they were typed."""
    found = [part.strip() for part in text.split(",")]
    for pair in found:
        parts = pair.split(":")
        if len(parts) != 2:
            raise argparse.ArgumentTypeError(
                f"{pair!r} is not a pair of watermarks: write LOW:HIGH, such as 2%:5% or 8M:16M"
            )
        for part in parts:
            size_or_percent(part)
    return list(dict.fromkeys(found))


def seconds(text: str) -> float:
    """A time that is not zero."""
    try:
        found = number(text)
    except ValueError:
        found = 0.0
    if not 0 < found < MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds: write one above 0 and below {MAX_SECONDS:,.0f}, such as 60 or 0.5"
        )
    return found


def number(text: str) -> float:
    """A number in ordinary digits: Python's float() takes "1_0", "nan", and digits of all scripts. ValueError."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def seed(text: str) -> int:
    """What random numbers start from."""
    return whole_number(text, "a seed", 0, MAX_SEED)


def pid(text: str) -> int:
    """The number of a process."""
    return whole_number(text, "the number of a process", 1, (1 << 31) - 1)


def file_name(text: str) -> str:
    """The path of a file, which need not be there."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name: write the path of a file")
    return text


def folder(text: str) -> str:
    """A directory that is there."""
    if not text or "\0" in text or not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory: write the path of one that exists")
    return text


def plot_file(text: str) -> str:
    """The name of a picture."""
    if PurePath(text).suffix.lower() not in PLOT_ENDS or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a picture: write one that ends in .svg or .png")
    return text


def svg_file(text: str) -> str:
    """The name of a picture that can only be an SVG."""
    if PurePath(text).suffix.lower() != ".svg" or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of an SVG: write one that ends in .svg")
    return text


def whole_number(text: str, what: str, low: int, high: int) -> int:
    """A whole number of what `what` says, from `low` to `high`."""
    found = int(text) if _WHOLE.fullmatch(text) else low - 1
    if not low <= found <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}: write a whole number from {low} to {high}")
    return found
