# SPDX-License-Identifier: MIT
"""The short form of `make fsx`, and tests that it notices errors."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

import pytest

from scripts.fsx import Layout, Mismatch, Player, main, play_all

SIZE: Final = 1 << 20


def files(folder: Path) -> tuple[Path, Path]:
    """Return two plain files: one to exercise, and one to compare with."""
    paths = folder / "file", folder / "shadow"
    for path in paths:
        with path.open("wb") as file:
            file.truncate(SIZE)
    return paths


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize(("packing", "size"), [("zbud", "8"), ("dense", "16")])
def test_the_mount_does_what_a_plain_file_does(packing: str, size: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Some hundred requests of each kind from several processes agree, with two thirds of the pages on the disk."""
    options = ["--seeds", "8", "--processes", "4", "--size", size, "--pool", "1M", "--packing", packing]
    assert main([*options, "--kill-seconds", "1.5"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "wrong            0" in out
    assert "written back     0 pages" not in out


def test_a_plain_file_does_what_a_plain_file_does(tmp_path: Path) -> None:
    """Several processes on an ordinary file find nothing wrong, so the program itself is right."""
    said = list(play_all(*files(tmp_path), SIZE, 3, range(4)))
    assert [each["wrong"] for each in said] == [None] * 3
    assert all(int(str(each["operations"])) > 100 for each in said)


@pytest.mark.parametrize("where", ["part", "stripe"])
def test_a_wrong_byte_is_seen(where: str, tmp_path: Path) -> None:
    """The program sees a single byte that was changed behind its back, in its own part or in a stripe."""
    path, shadow = files(tmp_path)
    layout = Layout(SIZE, 2)
    player = Player(path, shadow, layout, 1)
    player.play(1)
    player.compare_all()
    start, end = player.spans[0] if where == "part" else player.spans[-1]
    with path.open("r+b") as file:
        file.seek((start + end) // 2)
        byte = file.read(1)[0]
        file.seek((start + end) // 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(Mismatch, match=f"1 of the bytes .* the first at {(start + end) // 2} "):
        player.compare_all()


def test_a_word_in_the_wrong_place_is_seen(tmp_path: Path) -> None:
    """In the shared part, each word contains its own place."""
    path, shadow = files(tmp_path)
    layout = Layout(SIZE, 2)
    player = Player(path, shadow, layout, 0)
    low, high = layout.shared
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"".join(struct.pack("<HHI", 1, 0, at) for at in range(-(-low // 8) * 8, high, 8)), -(-low // 8) * 8)
    for _ in range(20):
        player._shared_read()
    os.pwrite(
        fd, b"".join(struct.pack("<HHI", 1, 0, at + 8) for at in range(-(-low // 8) * 8, high, 8)), -(-low // 8) * 8
    )
    os.close(fd)
    with pytest.raises(Mismatch, match="was written to"):
        player._shared_read()


def test_the_processes_share_everything(tmp_path: Path) -> None:
    """No byte belongs to two processes, and most pages of the stripes belong to more than one."""
    layout = Layout(SIZE, 3)
    owners: dict[int, int] = {}
    for process in range(3):
        for start, end in layout.spans(process):
            for byte in range(start, end, 4):
                assert owners.setdefault(byte, process) == process
    pages: dict[int, set[int]] = {}
    for byte, process in owners.items():
        pages.setdefault(byte // 4096, set()).add(process)
    assert sum(len(each) > 1 for each in pages.values()) > len(pages) // 4
