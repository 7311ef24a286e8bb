# SPDX-License-Identifier: MIT
"""Tables have medians, ratios and ranges, and go through JSON into a document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.document import rewrite
from bench.kit import in_turns
from bench.table import Column, Table, shown
from kit.programs import KitError


@pytest.fixture
def table() -> Table:
    """Return a table with three rounds of two rows."""
    made = Table("Speed", [Column("speed", "MiB/s"), Column("size", "MiB", ratio=False), Column("odd", "odd")], "slow")
    for slow, fast in ((100.0, 150.0), (90.0, 210.0), (300.0, 200.0)):
        made.add("slow", {"speed": slow, "size": 7.0, "odd": None})
        made.add("fast", {"speed": fast, "size": 7.0, "odd": None})
    made.notes.append("A note.")
    return made


def test_a_cell_is_the_median_its_ratio_and_the_range(table: Table) -> None:
    """A ratio is that of the medians. A column whose ratio means nothing has none, nor has one without values."""
    speed, size, odd = table.columns
    assert table.cell("fast", speed) == "200 (2.00 x) 150..210"
    assert table.cell("slow", speed) == "100 (1.00 x) 90..300"
    assert table.cell("fast", size) == "7"
    assert table.cell("fast", odd) == "-"


def test_numbers_have_three_digits() -> None:
    """Numbers have as many digits as are significant."""
    assert [shown(value) for value in (0.1234, 1.234, 12.34, 123.4, 12345.6, 7.0)] == [
        *("0.12", "1.23", "12.3", "123", "12,346", "7"),
    ]


def test_json_keeps_each_value(table: Table) -> None:
    """JSON has each value of each round."""
    again = Table.of_object(json.loads(json.dumps(table.as_object())))
    assert again == table
    assert again.as_text() == table.as_text()
    assert "median of 3 rounds" in table.as_text()


def test_rounds_take_turns() -> None:
    """Each row is first once, so that no row always comes after the same one."""
    assert list(in_turns(["a", "b", "c"], 2)) == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]


def test_the_document_keeps_what_people_wrote(table: Table, tmp_path: Path) -> None:
    """Only the text between the markers of a measurement is replaced, and a second time changes nothing."""
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n<!-- bench: machine -->\nold\n<!-- bench end -->\n\nWords.\n\n"
        "<!-- bench: storm -->\nold\n<!-- bench end -->\n\n<!-- bench: fio -->\nkept\n<!-- bench end -->\n\nEnd.\n"
    )
    assert rewrite("A machine.", {"storm": [table]}, page) == ["machine", "storm"]
    once = page.read_text()
    assert once.startswith("# Page\n\n<!-- bench: machine -->\n\nA machine.\n\n<!-- bench end -->\n\nWords.\n\n")
    assert "| fast | 200 (2.00 x) 150..210 | 7 | - |" in once
    assert "kept" in once
    assert "old" not in once
    assert once.endswith("\nEnd.\n")
    rewrite("A machine.", {"storm": [table]}, page)
    assert page.read_text() == once


def test_a_table_without_a_place_is_an_error(table: Table, tmp_path: Path) -> None:
    """A table without a place in the document is an error, and is not dropped silently."""
    page = tmp_path / "page.md"
    page.write_text("<!-- bench: machine -->\n<!-- bench end -->\n")
    with pytest.raises(KitError, match="no place for storm"):
        rewrite("A machine.", {"storm": [table]}, page)
