# SPDX-License-Identifier: MIT
"""A table of measurements. It keeps every value of every round; medians and ratios are computed when it is printed.

    row     a measured thing: a target, a path, a size         column    a figure, with its unit
    cell    the median of the rounds, its ratio to the same column of the base row, and the range (least .. most)

A ratio compares medians of one run, in which the rounds of all rows take turns. So a slow or busy machine affects all rows
in the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Sample = Mapping[str, float | None]
"""The values of one round of one row, by column; None for a column without a value."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: a figure."""

    key: str
    title: str
    """Title, with the unit."""
    ratio: bool = True
    """Whether the ratio to the base row is shown."""


@dataclass(slots=True)
class Table:
    """One table. Its rows are in the order of their first sample."""

    title: str
    columns: list[Column]
    base: str | None = None
    """Row with which the others are compared; None: no ratios."""
    rows: dict[str, list[dict[str, float | None]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, row: str, sample: Sample) -> None:
        """Add one round of one row."""
        self.rows.setdefault(row, []).append(dict(sample))

    def values(self, row: str, key: str) -> list[float]:
        """Return the values of one cell, one for each round."""
        return [value for sample in self.rows.get(row, []) if (value := sample.get(key)) is not None]

    def median(self, row: str, key: str) -> float | None:
        """Return the median of one cell; None if it has no value."""
        values = self.values(row, key)
        return statistics.median(values) if values else None

    def cell(self, row: str, column: Column) -> str:
        """Return the text of one cell: median, ratio and range."""
        values = self.values(row, column.key)
        if not values:
            return "-"
        median = statistics.median(values)
        text = shown(median)
        if self.base is not None and column.ratio and (base := self.median(self.base, column.key)):
            text += f" ({median / base:.2f} x)"
        if len(values) > 1 and shown(min(values)) != shown(max(values)):
            text += f" {shown(min(values))}..{shown(max(values))}"
        return text

    @property
    def rounds(self) -> int:
        """The number of rounds of the row that has most."""
        return max((len(samples) for samples in self.rows.values()), default=0)

    def _lines(self) -> list[list[str]]:
        head = ["", *(column.title for column in self.columns)]
        return [head, *([row, *(self.cell(row, column) for column in self.columns)] for row in self.rows)]

    def _caption(self) -> str:
        ratios = f"; x: ratio to {self.base}" if self.base is not None else ""
        how = f"median of {self.rounds} rounds, least..most" if self.rounds > 1 else "one round"
        return f"{self.title} ({how}{ratios})"

    def as_text(self) -> str:
        """Return the table as text for a terminal."""
        lines = self._lines()
        widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
        found = [self._caption()]
        if self.rows:
            found += [
                "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in lines
            ]
        return "\n".join([*found, *(f"  {note}" for note in self.notes)])

    def as_markdown(self) -> str:
        """Return the table as Markdown for a document."""
        found = [f"**{self._caption()}**", ""]
        if self.rows:
            head, *lines = self._lines()
            found += [_bar(head), _bar(["---"] * len(head)), *(_bar(line) for line in lines)]
        return "\n".join([*found, *(f"\n{note}" for note in self.notes)])

    def as_object(self) -> dict[str, Any]:
        """Return the table as an object for JSON."""
        return asdict(self)

    @classmethod
    def of_object(cls, found: Mapping[str, Any]) -> Table:
        """Return the table that an object of `as_object` describes."""
        columns = [Column(**column) for column in found["columns"]]
        return cls(found["title"], columns, found["base"], dict(found["rows"]), list(found["notes"]))


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown(value: float) -> str:
    """Return a number with about three significant digits, and commas between thousands."""
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    return f"{value:,.{digits}f}"
