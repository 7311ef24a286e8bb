# SPDX-License-Identifier: MIT
"""docs/statistics.md has a row for each number and each key and for no other; docs/monitoring.md knows its metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT, mounted
from zbudfs.cli.metrics import HISTOGRAMS, METRICS, PREFIX
from zbudfs.core.tunables import TUNABLES

_STATISTICS: Final = ROOT / "docs/statistics.md"
_MONITORING: Final = ROOT / "docs/monitoring.md"


def rows(part: str) -> list[list[str]]:
    """Return the cells of each row of the tables below a heading of the first order."""
    text = _STATISTICS.read_text().split(f"# {part}\n", 1)[1].split("\n# ", 1)[0]
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    assert found
    return found


@pytest.mark.needs("root", "fuse")
def test_every_number_is_in_the_table(tmp_path: Path) -> None:
    """Each file of stats/ has one row, with unit and meaning."""
    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing") as mountpoint:
        names = {path.name for path in (mountpoint / "stats").iterdir()}
        everything = json.loads((mountpoint / "stats/all.json").read_bytes())
        keys = {path.name for path in (mountpoint / "control").iterdir()}
    assert names == {*everything, "all.json", "log"}
    table = rows("What stats/ tells")
    written = [row[0].strip("`") for row in table]
    assert sorted(written) == sorted(set(written))
    assert set(written) - names == set()
    assert names - set(written) == set()
    assert [row for row in table if len(row) != 4 or not row[1] or not row[2]] == []
    assert keys == {row[0].strip("`") for row in rows("What control/ takes")}


def test_the_keys_are_explained_as_the_command_does() -> None:
    """Unit and meaning are those of the source."""
    assert rows("What control/ takes") == [[f"`{each.name}`", each.unit, each.meaning] for each in TUNABLES]


def test_monitoring_names_metrics_that_exist() -> None:
    """In the table a * stands for anything; in alerts and elsewhere there is none."""
    known = {f"{PREFIX}_up", f"{PREFIX}_exact"}
    known |= {f"{PREFIX}_{each.name}{'_total' if each.kind == 'counter' else ''}" for each in METRICS}
    known |= {f"{PREFIX}_{each.name}" for each in HISTOGRAMS}
    used = set(re.findall(rf"\b{PREFIX}_[a-z_*]+", _MONITORING.read_text()))
    assert len(used) > 15
    for name in used:
        pattern = re.compile(name.replace("*", "[a-z_]+"))
        assert any(pattern.fullmatch(each) for each in known), name


def test_the_alerts_are_right(tmp_path: Path) -> None:
    """promtool reads them."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool (apt-get install prometheus)")
    block = _MONITORING.read_text().split("## Alerts worth having\n", 1)[1].split("\n## ", 1)[0]
    rules = tmp_path / "rules.yml"
    rules.write_text("".join(f"{line[4:]}\n" for line in block.splitlines() if line.startswith("    ")))
    run = subprocess.run(
        ["promtool", "check", "rules", rules], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "6 rules found" in run.stdout
