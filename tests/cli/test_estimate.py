# SPDX-License-Identifier: MIT
"""The output, pictures and errors of `zbudfs estimate`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kit.storm import make_page
from tests.support import run_zbudfs, zbudfs
from zbudfs.cli.installation import Installation
from zbudfs.cli.main import main


@pytest.fixture
def pages_file(tmp_path: Path) -> Path:
    """Return a file of 400 pages like those of programs."""
    path = tmp_path / "pages"
    path.write_bytes(b"".join(make_page(number, 0, 1) for number in range(400)))
    return path


def test_a_page_for_people(pages_file: Path) -> None:
    """The page has shares, packing, histogram and the content of a pool, from the real command."""
    lines = zbudfs("estimate", "--file", pages_file, "--pool", "1G").splitlines()
    assert lines[0] == f"{pages_file}: 1.6 MiB, of which 1.6 MiB were sampled (--seed 1)"
    text = "\n".join(lines)
    assert "  same-filled   37.5 %" in text
    assert "  raw           12.5 %  too large when compressed: one frame for each page" in text
    assert "zpages by size" in text
    assert "pool of 1 GiB, zbud: holds 2." in text
    assert len([line for line in lines if line.startswith("    to ")]) == 16


def test_json_and_levels(pages_file: Path) -> None:
    """JSON has the figures of each level, and the shares add up."""
    found = json.loads(zbudfs("estimate", "--file", pages_file, "--levels", "-3,-1,1,3", "--json", "--sample", "1M"))
    assert found["sample_bytes"] == 1 << 20
    assert found["population_bytes"] == 400 * 4096
    assert [entry["level"] for entry in found["levels"]] == [-3, -1, 1, 3]
    for entry in found["levels"]:
        assert entry["pages"] == 256
        # A page of one odd word is same-filled, and is a zpage too.
        compressed = 256 - entry["same_filled_pages"] - entry["raw_pages"]
        assert compressed <= sum(entry["chunk_histogram"]) == entry["zpages"] <= 256 - entry["raw_pages"]
        zbud = entry["packings"]["zbud"]
        assert 1 <= zbud["zpages_per_frame"] <= 2
        assert zbud["pool_saves_bytes"] == zbud["pool_holds_bytes"] - found["pool_bytes"]


def test_levels_side_by_side(pages_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has a line for each level."""
    assert main(["estimate", "--file", str(pages_file), "--levels=1,-1,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("level   ratio"))
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["1", "-1"]
    assert lines[start + 3] == ""


def test_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """The command measures this process, and counts it once if it is named twice."""
    pid = str(os.getpid())
    assert main(["estimate", "--json", "--sample", "1M", pid, pid]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source"] == f"process {pid}"
    assert found["counts"]["processes"] == 1
    assert found["levels"][0]["pages"] == 256


@pytest.mark.parametrize("name", ["it.svg", "it.png"])
def test_a_picture(name: str, pages_file: Path) -> None:
    """The name of the picture chooses its format. An SVG has its words as text."""
    path = pages_file.parent / name
    zbudfs("estimate", "--file", pages_file, "--levels", "-1,3", "--plot", path)
    content = path.read_bytes()
    if name.endswith("png"):
        assert content.startswith(b"\x89PNG")
    else:
        text = "".join(ElementTree.fromstring(content).itertext())
        assert "zpage with its handle, bytes" in text
        assert "same-filled" in text
    assert sorted(found.name for found in pages_file.parent.iterdir()) == sorted([name, "pages"])


def test_no_matplotlib(pages_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line gives the remedy, before any work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["estimate", "--file", str(pages_file), "--plot", str(pages_file.parent / "it.svg")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"zbudfs: --plot needs matplotlib: {Installation().command_for('plot')}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ([], 2, "one of the arguments --all --file PID is required"),
        (["--all", "1"], 2, "not allowed with argument --all"),
        (["--all", "--file", "x"], 2, "not allowed with argument --all"),
        (["x"], 2, "'x' is not a process id"),
        (["0"], 2, "'0' is not a process id"),
        (["--levels", "-1,0", "1"], 2, "there is no level 0"),
        (["--levels", "-1,99", "1"], 2, "'99' is not a level"),
        (["--levels", "", "1"], 2, "'' is not a level"),
        (["--sample", "0", "1"], 2, "'0' is a size of zero bytes"),
        (["--plot", "it.gif", "1"], 2, "write one that ends in .svg or .png"),
        (["--plot", "none/it.svg", "1"], 1, "the folder 'none' for the picture does not exist"),
        (["--file", "none"], 1, "No such file"),
        (["--file", "."], 1, "neither a file nor a block device"),
        (["2147483647"], 1, "there is no process 2147483647"),
    ],
)
def test_refusals(arguments: list[str], status: int, reason: str, tmp_path: Path) -> None:
    """Each refusal is one line."""
    run = run_zbudfs("estimate", *arguments, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (status, "", 1)
    assert reason in run.stderr


@pytest.mark.needs("root")
def test_all_processes() -> None:
    """Root sees this process among all."""
    found = json.loads(zbudfs("estimate", "--all", "--json", "--sample", "4M"))
    assert found["counts"]["processes"] >= 1
    assert 0 < found["levels"][0]["pages"] <= 1024
