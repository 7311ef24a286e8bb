# SPDX-License-Identifier: MIT
"""Pieces of the screen of `zbudfs top`: bars that fill whatever room they are given, and lines of small bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rich.text import Text
from textual.widgets import Static

_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_PLAIN: Final = str.maketrans(f"{_EIGHTHS}░▏▎▍▌▋▊▉", " .:-=+*#@.-------")
"""What stands for each block where the terminal shows ASCII alone."""


def bar_lines(values: Sequence[float], width: int, height: int) -> list[str]:
    """Return `height` lines of `width` characters: the values as bars, neighbours summed up where there are too many.

    Whatever is not 0 is seen. Fewer values than columns get several columns each.
    """
    if width <= 0 or height <= 0 or not values:
        return []
    if len(values) > width:
        each = math.ceil(len(values) / width)
        columns = [sum(values[at : at + each]) for at in range(0, len(values), each)]
    else:
        columns = [value for value in values for _ in range(width // len(values))]
    most = max(columns)
    eighths = [
        min(height * 8, max(round(value / most * height * 8), 1)) if most > 0 and value > 0 else 0 for value in columns
    ]
    return [
        "".join(_EIGHTHS[min(8, max(0, tall - line * 8))] for tall in eighths) for line in range(height - 1, -1, -1)
    ]


def gauge(part: float, whole: float, width: int) -> str:
    """Return `part` of `whole` as a line of `width` characters."""
    filled = 0 if whole <= 0 else min(width * 8, max(0, round(part / whole * width * 8)))
    full, rest = divmod(filled, 8)
    partial = "▏▎▍▌▋▊▉"[rest - 1] if rest else ""
    return ("█" * full + partial).ljust(width, "░")


def plain(text: str) -> str:
    """Return text with its blocks as ASCII."""
    return text.translate(_PLAIN)


def shown_time(us: float) -> str:
    """Return a time for people, in three digits or so."""
    if us < 1000:
        return f"{us:.0f} us"
    return f"{us / 1000:.3g} ms" if us < 1_000_000 else f"{us / 1e6:.3g} s"


class Bars(Static):
    """Values as bars over all of the widget, above a line that says what they are."""

    def __init__(self, *, id: str, classes: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id, classes=classes)
        self._values: Sequence[float] = ()
        self._caption = ""
        self.unicode = True
        """Whether the terminal shows blocks."""

    def show(self, values: Sequence[float], caption: str) -> None:
        """Draw other values."""
        self._values, self._caption = values, caption
        self.refresh()

    def render(self) -> Text:
        """Draw them in the room there is now."""
        width, height = self.size
        lines = bar_lines(self._values, width, height - 1)
        text = "\n".join([*lines, self._caption[:width]])
        return Text(text if self.unicode else plain(text), no_wrap=True)
