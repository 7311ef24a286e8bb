# SPDX-License-Identifier: MIT
"""Each measurement in its short form, started as a user starts it, has each promised row, with real figures."""

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
from kit import needs
from tests.fuse.calls import require_tools
from tests.support import LIMIT_SECONDS, ROOT


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m bench` to its end."""
    command = [sys.executable, "-m", "bench", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, check=False)


def short(folder: Path, name: str, *options: str) -> list[dict[str, Any]]:
    """Run one measurement, and return its tables."""
    run = bench(name, "--short", "--json", "--dir", str(folder), *options)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert "cores" in results["machine"]
    tables = results["benchmarks"][name]
    assert isinstance(tables, list)
    return tables


def figures(table: dict[str, Any], row: str, *columns: str) -> list[float]:
    """Return the values of one row of one round. Each must exist and be above zero."""
    (sample,) = table["rows"][row]
    found = [sample[column] for column in columns]
    assert all(value is not None and value > 0 for value in found), f"{row}: {sample}"
    return found


@pytest.mark.needs("root", "fuse", "loop", "swap", "cell")
def test_storm(tmp_path: Path) -> None:
    """With room in RAM nothing is written. With a pool of a quarter, fewer bytes are written than were swapped out."""
    speeds = ("fill_mib_s", "scan_mib_s", "random_s", "random_p50_us", "random_p99_us")
    in_ram, on_disk = short(tmp_path, "storm")
    for name in ("floor-zstd", "zbudfs"):
        if not why_not(name):
            figures(in_ram, name, *speeds)
    for name in ("zbudfs", "swapfile"):
        figures(on_disk, name, *speeds, "written_mib")
    assert in_ram["rows"]["zbudfs"][0]["written_mib"] == 0


@pytest.mark.needs("root", "fuse", "loop", "swap", "cell")
def test_real(tmp_path: Path) -> None:
    """A program with much of its memory on swap finds every value, on the machine's disk and on a slow one."""
    for table in short(tmp_path, "real"):
        if table["notes"]:
            assert table["notes"] == [f"Skipped: {needs.why_not('nbd')}."]
            continue
        seconds, base, speed = figures(table, "python", "zbudfs", "swapfile", "zbudfs_speed")
        assert speed == pytest.approx(base / seconds)
        figures(table, "python", "zbudfs_written_mib", "swapfile_written_mib")
        assert figures(table, "python", "compression")[0] > 2


@pytest.mark.needs("root", "fuse")
def test_strangers(tmp_path: Path) -> None:
    """Each attack runs, on a tmpfs and on the mount, and pages are read meanwhile."""
    require_tools("gcc")
    tables = short(tmp_path, "strangers")
    assert len(tables) == len(ATTACKS)
    for table in tables:
        for row in (ON_TMPFS, ON_ZBUDFS):
            figures(table, row, "p50_us", "p99_us", "max_us", "reads")


@pytest.mark.needs("root", "fuse")
def test_fio(tmp_path: Path) -> None:
    """Both servers answer small requests and large ones."""
    require_tools("fio")
    (table,) = short(tmp_path, "fio")
    assert list(table["rows"]) == list(SHORT_JOBS)
    for job in SHORT_JOBS:
        figures(table, job, "zbudfs", "zbudfs_us")
        if not why_not("floor"):
            floor, own, ratio = figures(table, job, "floor", "zbudfs", "zbudfs_ratio")
            assert ratio == pytest.approx(own / floor)


def test_store(tmp_path: Path) -> None:
    """The table has each path, and the parts and the rest add up to the whole."""
    table, dense, from_disk = short(tmp_path, "store", "--packings", "zbud,dense")
    assert list(dense["rows"]) == list(table["rows"])
    paths = [
        *("same-filled", "discard of same-filled pages", "write", "overwrite", "read 4 KiB", "read 32 KiB", "discard"),
        *("writeback, the file grows", "writeback", "page-in 32 KiB, threads", "page-in 4 KiB, threads"),
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
        ("page-in 4 KiB, threads", "disk"),
    ):
        figures(table, path, f"{part}_us")
    for depth in ("depth 1", "depth 16"):
        store, disk, times = figures(from_disk, depth, "store_us", "disk_us", "times")
        assert times == pytest.approx(store / disk)


@pytest.mark.needs("root", "fuse")
def test_memory(tmp_path: Path) -> None:
    """The three processes add up to the whole, and a full pool has frames."""
    empty, full = short(tmp_path, "memory")
    whole, *parts = figures(empty, "32 MiB device", "pss_mib", "keeper_mib", "worker_mib", "standby_mib")
    assert whole == pytest.approx(sum(parts))
    stored, frames, _ = figures(full, "32 MiB device", "stored_mib", "frames_mib", "pss_mib")
    assert stored > frames


def test_size(tmp_path: Path) -> None:
    """The table has a row for each size, filled to the same part."""
    (table,) = short(tmp_path, "size")
    assert list(table["rows"]) == ["16 MiB", "64 MiB"]
    stored = [figures(table, row, "stored_mib", "read_us", "overwrite_us", "discard_us")[0] for row in table["rows"]]
    assert stored[1] == pytest.approx(4 * stored[0], rel=0.1)


def test_packing(tmp_path: Path) -> None:
    """On the memory of a real program, dense packs at least 3.5 pages to a frame, also after many overwrites."""
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
    """All stored pages are there after the recovery, in a store alone and in a mount."""
    tables = list(short(tmp_path, "recovery"))
    assert tables
    for table in tables:
        pages, _ = figures(table, "8 MiB stored", "pages", "ms")
        assert pages == 2048


def test_wrong_arguments(tmp_path: Path) -> None:
    """An unknown name, zero rounds and a file without results are errors."""
    assert bench("speed").returncode == 2
    assert bench("store", "--rounds", "0").returncode == 2
    (tmp_path / "results").write_text("{}")
    run = bench("show", str(tmp_path / "results"))
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "is not a file of results" in run.stderr


@pytest.mark.parametrize(
    ("word", "said"), [("old", "no name or no command"), ("=x", "no name"), ("old=/", "not a program")]
)
def test_a_wrong_other_version(word: str, said: str) -> None:
    """A version that cannot be run is refused before anything is measured."""
    run = bench("storm", "--also", word)
    assert run.returncode == 2 and said in run.stderr and "Traceback" not in run.stderr
