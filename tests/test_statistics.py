# SPDX-License-Identifier: MIT
"""docs/use/reference.md has one row for each number and each key, and docs/use/tools.md names metrics that exist."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fuse.calls import PUNCH, all_stats, fallocate
from tests.support import LIMIT_SECONDS, ROOT, mounted, wait_until
from zbudfs.cli.metrics import HISTOGRAMS, METRICS, PREFIX
from zbudfs.core.public import EXACT, NAMES
from zbudfs.core.statistics import COUNTED, declared
from zbudfs.core.tunables import TUNABLES

_STATISTICS: Final = ROOT / "docs/use/reference.md"
_TOOLS: Final = ROOT / "docs/use/tools.md"


def rows(part: str) -> list[list[str]]:
    """Return the cells of each row in the tables below a first-level heading."""
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
    assert names > {name for name, _ in declared()}
    table = rows("Statistics in stats/")
    written = [row[0].strip("`") for row in table]
    assert sorted(written) == sorted(set(written))
    assert set(written) - names == set()
    assert names - set(written) == set()
    assert [row for row in table if len(row) != 4 or not row[1] or not row[2]] == []
    assert keys == {row[0].strip("`") for row in rows("Settings in control/")}


def test_every_declared_statistic_is_explained_and_exported() -> None:
    """Each statistic has a row that repeats its declaration, and a metric, either its own or one value of a label."""
    table = {row[0].strip("`"): row[1:] for row in rows("Statistics in stats/")}
    assert {name: table.get(name) for name, _ in declared()} == {
        name: [stat.unit, stat.meaning, stat.kernel] for name, stat in declared()
    }
    numbers = {name: number for number, (name, _) in enumerate(declared(), 1000)}
    others = {"mounted_at": 0, "version": "", "backing_path": "", "warnings": [], "chunk_histogram": [0, 0]}
    snapshot: dict[str, Any] = defaultdict(int, {**numbers, **others, "unbuddied_lists": [0, 0]})
    exported = {value for metric in METRICS for _, value in metric.samples(snapshot)}
    assert [
        name
        for name, stat in declared()
        if numbers[name] * stat.scale not in exported and name not in ("refused_pool_full", "lost_pages")  # sums
    ] == []


@pytest.mark.needs("root", "fuse")
def test_a_kill_loses_no_count(tmp_path: Path) -> None:
    """Each counter of the store continues from its exact value after a kill of the worker."""

    def counters(mountpoint: Path) -> dict[str, int]:
        found = all_stats(mountpoint)
        return {name: found[name] for name in found if name in COUNTED or "_cumul_" in name or "evicted" in name}

    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing", "--pool", "1M", "--size", "8M") as mountpoint:
        text = b"".join(b"%09d" % number for number in range(1 << 20))
        with (mountpoint / "swapfile").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), text[: 6 << 20], 0)
            os.pread(file.fileno(), 1 << 20, 0)
            fallocate(file.fileno(), PUNCH, 4096, 3 * 4096)
            wait_until(lambda: counters(mountpoint) == counters(mountpoint), "writeback is over")
            before, worker = counters(mountpoint), all_stats(mountpoint)["worker_pid"]
            assert min(before["cumul_written_pages"], before["cumul_writeback_frames"], before["cumul_read_pages"]) > 0
            assert before["cumul_discarded_pages"] == 3
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: all_stats(mountpoint)["worker_pid"] != worker, "the standby serves")
            assert counters(mountpoint) == before
            os.pwrite(file.fileno(), text[:8192], 0)
            assert counters(mountpoint)["cumul_written_pages"] == before["cumul_written_pages"] + 2


def test_the_keys_are_explained_as_the_command_does() -> None:
    """The rows of the keys have the unit and the meaning of the source."""
    assert rows("Settings in control/") == [[f"`{each.name}`", each.unit, each.meaning] for each in TUNABLES]


def test_public_statistics_are_in_their_table() -> None:
    """A public statistic is in one row of the table, which says whether it is exact, and no other statistic is in one."""
    names = {row[0].strip("`") for row in rows("Statistics in stats/")}
    found: list[tuple[str, str]] = []
    for cell, public_as, reason in rows("Public statistics"):
        assert public_as and reason
        for pattern in re.findall(r"`([a-z_*]+)`", cell):
            matching = fnmatch.filter(names, pattern)
            assert matching, pattern
            found += [(name, public_as) for name in matching]
    assert sorted(name for name, _ in found) == sorted(NAMES)
    assert {name for name, public_as in found if public_as == "exact"} == set(EXACT)


def test_tools_name_metrics_that_exist() -> None:
    """The metrics in tools.md exist. In the table a * stands for any text; the alerts have none."""
    known = {f"{PREFIX}_up", f"{PREFIX}_exact"}
    known |= {f"{PREFIX}_{each.name}{'_total' if each.kind == 'counter' else ''}" for each in METRICS}
    known |= {f"{PREFIX}_{each.name}" for each in HISTOGRAMS}
    used = set(re.findall(rf"\b{PREFIX}_[a-z_*]+", _TOOLS.read_text()))
    assert len(used) > 15
    for name in used:
        pattern = re.compile(name.replace("*", "[a-z_]+"))
        assert any(pattern.fullmatch(each) for each in known), name


def test_the_alerts_are_right(tmp_path: Path) -> None:
    """promtool accepts the alerts."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool (apt-get install prometheus)")
    block = _TOOLS.read_text().split("## Alerts\n", 1)[1].split("\n## ", 1)[0]
    rules = tmp_path / "rules.yml"
    rules.write_text("".join(f"{line[4:]}\n" for line in block.splitlines() if line.startswith("    ")))
    run = subprocess.run(
        ["promtool", "check", "rules", rules], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "6 rules found" in run.stdout
