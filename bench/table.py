# SPDX-License-Identifier: MIT
"""A table of measurements: every value of every round is kept, and what is shown is worked out when it is shown.

    row     what was measured: a target, a path, a size        column    a figure, with its unit
    cell    the median of the rounds, its ratio to the same column of the base row, and the range (least .. most)

Ratios are of medians of one run, in which rounds of all rows took turns: the machine may be slow or busy, but it is that
for all rows alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Sample = Mapping[str, float | None]
"""One round of one row: the value of each column; None where there is none."""


@dataclass(frozen=True, slots=True)
class Column:
    """A figure."""

    key: str
    title: str
    """With its unit."""
    ratio: bool = True
    """Whether its ratio to the base row means anything."""


@dataclass(slots=True)
class Table:
    """One table; rows in the order in which they came."""

    title: str
    columns: list[Column]
    base: str | None = None
    """The row to which the others are compared."""
    rows: dict[str, list[dict[str, float | None]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, row: str, sample: Sample) -> None:
        """Add one round of one row."""
        self.rows.setdefault(row, []).append(dict(sample))

    def values(self, row: str, key: str) -> list[float]:
        """The values of one cell, round by round."""
        return [value for sample in self.rows.get(row, []) if (value := sample.get(key)) is not None]

    def median(self, row: str, key: str) -> float | None:
        """The median of one cell; None if it has no value."""
        values = self.values(row, key)
        return statistics.median(values) if values else None

    def cell(self, row: str, column: Column) -> str:
        """One cell, for people."""
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
        """Of the row that has most."""
        return max((len(samples) for samples in self.rows.values()), default=0)

    def _lines(self) -> list[list[str]]:
        head = ["", *(column.title for column in self.columns)]
        return [head, *([row, *(self.cell(row, column) for column in self.columns)] for row in self.rows)]

    def _caption(self) -> str:
        ratios = f"; x: ratio to {self.base}" if self.base is not None else ""
        how = f"median of {self.rounds} rounds, least..most" if self.rounds > 1 else "one round"
        return f"{self.title} ({how}{ratios})"

    def as_text(self) -> str:
        """For a terminal."""
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
        """For a document."""
        found = [f"**{self._caption()}**", ""]
        if self.rows:
            head, *lines = self._lines()
            found += [_bar(head), _bar(["---"] * len(head)), *(_bar(line) for line in lines)]
        return "\n".join([*found, *(f"\n{note}" for note in self.notes)])

    def as_object(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def of_object(cls, found: Mapping[str, Any]) -> Table:
        """From what `as_object` gave."""
        columns = [Column(**column) for column in found["columns"]]
        return cls(found["title"], columns, found["base"], dict(found["rows"]), list(found["notes"]))


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown(value: float) -> str:
    """Three digits that count, with thousands set apart."""
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    return f"{value:,.{digits}f}"
