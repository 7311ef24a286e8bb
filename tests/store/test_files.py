# SPDX-License-Identifier: MIT
"""Small files are read and written below the folder that stands for the system."""

from __future__ import annotations

from pathlib import Path

import pytest

from zbudfs.store.files import below, read_bytes, read_text, write_text


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("/", "proc/meminfo", "/proc/meminfo"),
        ("/", "/proc/meminfo", "/proc/meminfo"),
        ("/", "/", "/"),
        ("/", "", "/"),
        ("/there", "/etc/fstab", "/there/etc/fstab"),
        ("/there", "", "/there"),
        ("/there/", "/etc/", "/there/etc"),
    ],
)
def test_paths_below_a_folder(root: str, path: str, found: str) -> None:
    """A path is below the folder with a slash at its start and without, and has none at its end."""
    assert below(root, path) == found


def test_files_are_read_and_replaced(tmp_path: Path) -> None:
    """Text may hold any bytes: they are the same after they were read and written."""
    strange = b"caf\xe9\r\n"
    (tmp_path / "one").write_bytes(strange)
    assert read_bytes("/one", str(tmp_path)) == strange
    write_text("two", read_text("one", str(tmp_path)), str(tmp_path))
    assert (tmp_path / "two").read_bytes() == strange
    write_text("two", "5", str(tmp_path))
    assert read_text(str(tmp_path / "two")) == "5"
    with pytest.raises(FileNotFoundError):
        read_bytes("three", str(tmp_path))
