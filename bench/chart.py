# SPDX-License-Identifier: MIT
"""Charts as SVG: groups of horizontal bars on one axis, readable on a light and on a dark page.

The length of a bar is the median. A thin line runs from the least to the most value, and a text follows. Lengths are in the
unit of the axis, which begins at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

_WIDTH: Final = 860
_LEFT: Final = 90
"""Start of the axis, in pixels. The names of the groups are on its left."""
_RIGHT: Final = 130
"""Room for the text of the longest bar, in pixels."""
_TOP: Final = 78
_BAR: Final = 18
_GAP: Final = 16
"""Room between two groups, in pixels."""
_TICKS: Final = 8
"""Most ticks on the axis."""
_LIGHT: Final = ("#ffffff", "#1f2328", "#d1d9e0", ("#818b98", "#c8a15a", "#54aeff", "#1a7f37"))
_DARK: Final = ("#0d1117", "#e6edf3", "#3d444d", ("#9198a1", "#b58a3c", "#1f6feb", "#3fb950"))
"""Background, text, lines, and a colour for each series."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its values, and the text beside it."""

    median: float
    least: float
    most: float
    text: str


@dataclass(frozen=True, slots=True)
class Series:
    """Bars of one colour, one for each group; None for a group without a measurement."""

    name: str
    bars: Sequence[Bar | None]


def draw(title: str, axis: str, groups: Sequence[str], series: Sequence[Series]) -> str:
    """Draw the bars, and return the SVG. Raises ValueError if there are more series than colours."""
    if len(series) > len(_LIGHT[3]):
        raise ValueError(f"{len(series)} series need as many colours, but there are {len(_LIGHT[3])}")
    most = max((bar.most for each in series for bar in each.bars if bar is not None), default=0.0) or 1.0
    ticks = ticks_for(most)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(most, ticks[-1])
    group_height = _BAR * len(series) + _GAP
    bottom = _TOP + group_height * len(groups)
    parts = [
        f'<text class="title" x="{_LEFT}" y="26">{escape(title)}</text>',
        *_legend([each.name for each in series]),
        *_axis(axis, ticks, scale, bottom),
    ]
    for place, group in enumerate(groups):
        top = _TOP + group_height * place + _GAP // 2
        middle = top + _BAR * len(series) / 2 + 5
        parts.append(f'<text x="{_LEFT - 10}" y="{middle:g}" text-anchor="end">{escape(group)}</text>')
        for number, each in enumerate(series):
            parts += _bar(each.bars[place], number, top + _BAR * number, scale)
    return "\n".join([*_head(title, bottom + 48), *parts, "</svg>", ""])


def ticks_for(most: float) -> list[float]:
    """Return the ticks of an axis from zero to `most`, in steps of 1, 2 or 5 times a power of ten."""
    step = 1e-6
    while most / step > _TICKS:
        for factor in (2.0, 2.5, 2.0):
            step *= factor
            if most / step <= _TICKS:
                break
    return [number * step for number in range(int(most / step + 1e-9) + 1)]


def _head(title: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        "<style>",
        "text { font: 13px sans-serif } .title { font-size: 16px; font-weight: bold }",
        *_rules(*_LIGHT),
        "@media (prefers-color-scheme: dark) {",
        *_rules(*_DARK),
        "}",
        "</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}"/>',
    ]


def _rules(page: str, ink: str, line: str, colours: Sequence[str]) -> list[str]:
    named = [f".s{number} {{ fill: {colour} }}" for number, colour in enumerate(colours)]
    return [
        f".page {{ fill: {page} }} text {{ fill: {ink} }}",
        f".grid {{ stroke: {line} }} .range {{ stroke: {ink} }}",
        *named,
    ]


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], _LEFT
    for number, name in enumerate(names):
        parts.append(f'<rect class="s{number}" x="{x}" y="42" width="14" height="14"/>')
        parts.append(f'<text x="{x + 20}" y="54">{escape(name)}</text>')
        x += 44 + 7 * len(name)
    return parts


def _axis(name: str, ticks: Sequence[float], scale: float, bottom: int) -> list[str]:
    parts = []
    for tick in ticks:
        x = _LEFT + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) // 2
    return [*parts, f'<text x="{middle}" y="{bottom + 37}" text-anchor="middle">{escape(name)}</text>']


def _bar(bar: Bar | None, number: int, y: int, scale: float) -> list[str]:
    if bar is None:
        return [f'<text x="{_LEFT + 6}" y="{y + 13}">not measured</text>']
    start, end, middle = _LEFT + bar.least * scale, _LEFT + bar.most * scale, y + _BAR / 2 - 1
    return [
        f'<rect class="s{number}" x="{_LEFT}" y="{y}" width="{bar.median * scale:.1f}" height="{_BAR - 2}"/>',
        f'<line class="range" x1="{start:.1f}" x2="{end:.1f}" y1="{middle:g}" y2="{middle:g}"/>',
        f'<text x="{end + 6:.1f}" y="{y + 13}">{escape(bar.text)}</text>',
    ]
