# SPDX-License-Identifier: MIT
"""Each measurement in its short form, as a user would start it: every row that is promised comes, with real figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.fio import SHORT_JOBS
from bench.store import PARTS
from bench.strangers import ATTACKS, ON_TMPFS, ON_ZBUDFS
from bench.targets import why_not
from tests.fuse.calls import require_tools
from tests.support import LIMIT_SECONDS, ROOT


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m bench` to its end."""
    command = [sys.executable, "-m", "bench", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, check=False)


def short(folder: Path, name: str, *options: str) -> list[dict[str, Any]]:
    """Run one measurement and return its tables."""
    run = bench(name, "--short", "--json", "--dir", str(folder), *options)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert "cores" in results["machine"]
    tables = results["benchmarks"][name]
    assert isinstance(tables, list)
    return tables


def figures(table: dict[str, Any], row: str, *columns: str) -> list[float]:
    """The values of one row of one round; all of them must be there and more than nothing."""
    (sample,) = table["rows"][row]
    found = [sample[column] for column in columns]
    assert all(value is not None and value > 0 for value in found), f"{row}: {sample}"
    return found


@pytest.mark.needs("root", "fuse", "loop", "swap", "cell")
def test_storm(tmp_path: Path) -> None:
    """With room in RAM nothing is written; with a pool of a quarter it is, in fewer bytes than pages swapped out."""
    speeds = ("fill_mib_s", "scan_mib_s", "random_s", "random_p50_us", "random_p99_us")
    in_ram, on_disk = short(tmp_path, "storm")
    for name in ("floor-zstd", "zbudfs"):
        if not why_not(name):
            figures(in_ram, name, *speeds)
    for name in ("zbudfs", "swapfile"):
        figures(on_disk, name, *speeds, "written_mib")
    assert in_ram["rows"]["zbudfs"][0]["written_mib"] == 0


@pytest.mark.needs("root", "fuse")
def test_strangers(tmp_path: Path) -> None:
    """Each attack goes round, on a tmpfs and on the mount, and pages are read meanwhile."""
    require_tools("gcc")
    tables = short(tmp_path, "strangers")
    assert len(tables) == len(ATTACKS)
    for table in tables:
        for row in (ON_TMPFS, ON_ZBUDFS):
            figures(table, row, "p50_us", "p99_us", "max_us", "reads")


@pytest.mark.needs("root", "fuse")
def test_fio(tmp_path: Path) -> None:
    """Both servers answer, small requests and large ones."""
    require_tools("fio")
    (table,) = short(tmp_path, "fio")
    assert list(table["rows"]) == list(SHORT_JOBS)
    for job in SHORT_JOBS:
        figures(table, job, "zbudfs", "zbudfs_us")
        if not why_not("floor"):
            floor, own, ratio = figures(table, job, "floor", "zbudfs", "zbudfs_ratio")
            assert ratio == pytest.approx(own / floor)


def test_store(tmp_path: Path) -> None:
    """Every path is there; the parts and the rest make up the whole."""
    (table, dense) = short(tmp_path, "store", "--packings", "zbud,dense")
    assert list(dense["rows"]) == list(table["rows"])
    paths = [
        *("same-filled", "discard of same-filled pages", "write", "overwrite", "read 4 KiB", "read 32 KiB", "discard"),
        *("writeback, the file grows", "writeback", "page-in 32 KiB", "page-in 4 KiB"),
    ]
    assert list(table["rows"]) == paths
    for path in paths:
        rate, whole = figures(table, path, "pages_s", "whole_us")
        assert rate == pytest.approx(1e6 / whole)
        (sample,) = table["rows"][path]
        parts = [sample[f"{part}_us"] or 0.0 for part in PARTS]
        assert sum(parts) + sample["request_us"] == pytest.approx(whole)
    for path, part in (
        ("write", "codec"),
        ("overwrite", "allocator"),
        ("writeback", "disk"),
        ("page-in 4 KiB", "disk"),
    ):
        figures(table, path, f"{part}_us")


@pytest.mark.needs("root", "fuse")
def test_memory(tmp_path: Path) -> None:
    """Three processes make up the whole, and a pool that is filled has frames."""
    empty, full = short(tmp_path, "memory")
    whole, *parts = figures(empty, "32 MiB device", "pss_mib", "keeper_mib", "worker_mib", "standby_mib")
    assert whole == pytest.approx(sum(parts))
    stored, frames, _ = figures(full, "32 MiB device", "stored_mib", "frames_mib", "pss_mib")
    assert stored > frames


def test_size(tmp_path: Path) -> None:
    """A row for each size, filled to the same part."""
    (table,) = short(tmp_path, "size")
    assert list(table["rows"]) == ["16 MiB", "64 MiB"]
    stored = [figures(table, row, "stored_mib", "read_us", "overwrite_us", "discard_us")[0] for row in table["rows"]]
    assert stored[1] == pytest.approx(4 * stored[0], rel=0.1)


def test_packing(tmp_path: Path) -> None:
    """On the memory of a real program: dense packs at least 3.5 pages to a frame, also after twice as many overwrites."""
    (table,) = short(tmp_path, "packing")
    assert list(table["rows"]) == ["zbud", "dense:7"]
    filled, churned, written = figures(table, "zbud", "filled", "churned", "written")
    assert 1.5 < min(filled, churned) <= max(filled, churned) <= 2
    assert written >= 0.5
    filled, churned, written = figures(table, "dense:7", "filled", "churned", "written")
    assert 3.5 <= min(filled, churned) <= max(filled, churned) <= 7
    assert written <= 0.3
    figures(table, "dense:7", "fill_us", "churn_us")


@pytest.mark.needs("root", "fuse")
def test_recovery(tmp_path: Path) -> None:
    """All that was stored is there afterwards, alone and in a mount."""
    tables = list(short(tmp_path, "recovery"))
    assert tables
    for table in tables:
        pages, _ = figures(table, "8 MiB stored", "pages", "ms")
        assert pages == 2048


def test_what_is_asked_for_wrongly(tmp_path: Path) -> None:
    """A name that does not exist, no rounds, and a file that holds no results."""
    assert bench("speed").returncode == 2
    assert bench("store", "--rounds", "0").returncode == 2
    (tmp_path / "results").write_text("{}")
    run = bench("show", str(tmp_path / "results"))
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "is not what --json prints" in run.stderr
