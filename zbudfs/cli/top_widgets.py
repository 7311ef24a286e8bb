# SPDX-License-Identifier: MIT
"""Pieces of the screen of `zbudfs top`: gauges, and charts with labelled axes above one common horizontal axis.

written   16 MiB/s┤    ▂▅█▇▃         name and largest value of the vertical axis
3.1 MiB/s         │  ▁▃█████▅▂       the present value
                 0┤▂▅█████████▄
                  └-30 s──-15 s──now
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.text import Text
from textual.widgets import Static

from zbudfs.cli.states import State

_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_PLAIN: Final = str.maketrans(f"{_EIGHTHS}░▏▎▍▌▋▊▉┤│└─", " .:-=+*#@.-------||+-")
"""The ASCII character for each block and line, for terminals that show ASCII alone."""
STYLES: Final = {State.NORMAL: "", State.NEAR: "bold black on yellow", State.FAILING: "bold bright_white on red"}
"""The style of a text by the state of its figure: foreground and background, so that it suits light and dark terminals."""
BAR_STYLES: Final = {State.NORMAL: "green", State.NEAR: "", State.FAILING: "red"}
"""The style of bars by the state of their figure; yellow bars would not be visible on a light terminal."""
MARGIN: Final = 19
"""Columns on the left of a chart's vertical axis."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Values as bars, with a vertical axis from 0."""

    name: str
    values: Sequence[float]
    label: Callable[[float], str]
    """Function that writes a value of the vertical axis with its unit."""
    now: str
    """The present value, with its unit."""
    most: float | None = None
    """Value at the top of the vertical axis; None: a round number above the values."""
    state: State = State.NORMAL


@dataclass(frozen=True, slots=True)
class Axis:
    """A horizontal axis, which several charts share."""

    labels: Callable[[int], Sequence[str]]
    """Function that gets the number of columns, and returns the labels from the left end to the right end."""
    is_time: bool
    """Whether a column is one value, with the newest at the right; else the values are spread over the columns."""


def spread(values: Sequence[float], width: int) -> list[float]:
    """Return `width` columns or a few less for the values: sums of neighbours, or several columns for each value."""
    if width <= 0 or not values:
        return []
    if len(values) > width:
        each = math.ceil(len(values) / width)
        return [sum(values[at : at + each]) for at in range(0, len(values), each)]
    return [value for value in values for _ in range(width // len(values))]


def bar_lines(columns: Sequence[float], height: int, most: float) -> list[str]:
    """Return `height` lines with a bar for each column; a bar of full height is `most`. A value that is not 0 is visible."""
    eighths = [
        min(height * 8, max(round(value / most * height * 8), 1)) if most > 0 and value > 0 else 0 for value in columns
    ]
    return [
        "".join(_EIGHTHS[min(8, max(0, tall - line * 8))] for tall in eighths) for line in range(height - 1, -1, -1)
    ]


def round_bytes(value: float) -> float:
    """Return the smallest power of two, from 1024, that is not below `value`."""
    return float(1 << max(10, math.ceil(math.log2(value)))) if value > 0 else 1024.0


def round_count(value: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, 50 and so on that is not below `value`."""
    power = 10.0 ** max(0, math.floor(math.log10(value))) if value > 0 else 1.0
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value)


def axis_line(labels: Sequence[str], width: int) -> str:
    """Return a line of `width` columns with labels at its left end, between, and at its right end, as far as there is room."""
    line = ["─"] * width
    last = len(labels) - 1
    for number in dict.fromkeys([0, last, *range(1, last)]):
        label = labels[number]
        at = (
            round(number * width / last - (0, len(label) / 2, len(label))[(number > 0) + (number == last)])
            if last
            else 0
        )
        near = line[max(at - 1, 0) : at + len(label) + 1]
        if 0 <= at <= width - len(label) and set(near) <= {"─"}:
            line[at : at + len(label)] = label
    return "".join(line)


def chart_text(charts: Sequence[Chart], axis: Axis, width: int, height: int) -> Text:
    """Return `height` lines of `width` columns: the charts, one above the other, and below them the horizontal axis."""
    text = Text(no_wrap=True)
    plot = width - MARGIN - 1
    if plot < 1 or height <= len(charts):
        return text
    used = plot
    for number, chart in enumerate(charts):
        rows = (height - 1) // len(charts) + (number < (height - 1) % len(charts))
        if axis.is_time:
            columns = [float(value) for value in chart.values[-plot:]]
            columns = [0.0] * (plot - len(columns)) + columns
        else:
            columns = spread(chart.values, plot)
            used = len(columns) or plot
        most = chart.most or (round_bytes if axis.is_time else round_count)(max(columns, default=0.0))
        bars = bar_lines(columns, rows, most) or [""] * rows
        for row, bar in enumerate(bars):
            tick = chart.label(most) if row == 0 else chart.label(0) if row == rows - 1 else ""
            left = f"{chart.name}{chart.state.mark}" if row == 0 else chart.now if row == 1 else ""
            if rows == 1:
                left = f"{left} {chart.now}"[: max(MARGIN - len(tick) - 1, 0)]
            style = STYLES[chart.state] if left else ""
            text.append(left, style)
            text.append(f"{tick:>{max(MARGIN - len(left), 0)}}{'┤' if tick else '│'}")
            text.append(f"{bar}\n", BAR_STYLES[chart.state])
    text.append(" " * MARGIN + "└" + axis_line(axis.labels(used), used))
    return text


def gauge(part: float, whole: float, width: int) -> str:
    """Return `part` of `whole` as a line of `width` characters."""
    filled = 0 if whole <= 0 else min(width * 8, max(0, round(part / whole * width * 8)))
    full, rest = divmod(filled, 8)
    partial = "▏▎▍▌▋▊▉"[rest - 1] if rest else ""
    return ("█" * full + partial).ljust(width, "░")


def plain(text: Text) -> Text:
    """Return a text with its blocks and lines as ASCII, in the same styles."""
    result = text.copy()
    result.plain = text.plain.translate(_PLAIN)
    return result


def shown_time(us: float) -> str:
    """Return a time for users, with about three digits."""
    if us < 1000:
        return f"{us:.0f} us"
    return f"{us / 1000:.3g} ms" if us < 1_000_000 else f"{us / 1e6:.3g} s"


class Charts(Static):
    """Charts that fill the widget."""

    def __init__(self, *, id: str, classes: str) -> None:  # noqa: A002  textual's name
        super().__init__(id=id, classes=classes)
        self._charts: Sequence[Chart] = ()
        self._axis = Axis(lambda width: (), is_time=True)
        self.unicode = True
        """Whether the terminal shows blocks."""

    def show(self, charts: Sequence[Chart], axis: Axis) -> None:
        """Draw other charts."""
        self._charts, self._axis = charts, axis
        self.refresh()

    def render(self) -> Text:
        """Draw the charts in the present size of the widget."""
        text = chart_text(self._charts, self._axis, self.size.width, self.size.height) if self._charts else Text()
        return text if self.unicode else plain(text)
