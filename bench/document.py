# SPDX-License-Identifier: MIT
"""docs/performance.md: the tables in it are written by this program, everything around them by people.

<!-- bench: NAME -->
(tables)
<!-- bench end -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.kit import ROOT, BenchError
from bench.table import Table

PAGE: Final = ROOT / "docs/performance.md"
MACHINE: Final = "machine"
_PLACE: Final = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench end -->)", re.DOTALL)


def rewrite(machine: str, tables: Mapping[str, Sequence[Table]], page: Path = PAGE) -> list[str]:
    """Put tables, by the name of their measurement, between their markers: the names found. Raises BenchError."""
    content = {name: "\n\n".join(table.as_markdown() for table in found) for name, found in tables.items()} | {
        MACHINE: machine
    }
    text = page.read_text()
    places = [match[2] for match in _PLACE.finditer(text)]
    if missing := content.keys() - set(places):
        raise BenchError(
            f"{page.name} has no place for {', '.join(sorted(missing))}: <!-- bench: NAME --> ... <!-- bench end -->"
        )

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{content[match[2]]}\n\n{match[3]}" if match[2] in content else match[0]

    page.write_text(_PLACE.sub(filled, text))
    return [name for name in places if name in content]
