# SPDX-License-Identifier: MIT
"""The writer of the tables in docs/evidence/performance.md. It replaces the text between markers; people write the rest.

<!-- bench: NAME -->
(tables)
<!-- bench end -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.table import Table
from kit.programs import ROOT, KitError

PAGE: Final = ROOT / "docs/evidence/performance.md"
MACHINE: Final = "machine"
_PLACE: Final = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench end -->)", re.DOTALL)


def rewrite(machine: str, tables: Mapping[str, Sequence[Table]], page: Path = PAGE) -> list[str]:
    """Put the tables of each measurement between its markers, and return the names of the found markers. Raises KitError."""
    content = {name: "\n\n".join(table.as_markdown() for table in found) for name, found in tables.items()} | {
        MACHINE: machine
    }
    text = page.read_text()
    places = [match[2] for match in _PLACE.finditer(text)]
    if missing := content.keys() - set(places):
        raise KitError(
            f"{page.name} has no place for {', '.join(sorted(missing))}: write <!-- bench: NAME --> and <!-- bench end -->"
        )

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n{content[match[2]]}\n\n{match[3]}" if match[2] in content else match[0]

    page.write_text(_PLACE.sub(filled, text))
    return [name for name in places if name in content]
