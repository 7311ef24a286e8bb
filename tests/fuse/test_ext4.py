# SPDX-License-Identifier: MIT
"""An ext4 on the loop device, which is as demanding as swap: a file tree goes in and comes out unharmed."""

from __future__ import annotations

import filecmp
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import MIB, disk_mounted, looped, require_tools, stat_of, tool
from tests.support import mounted, wait_until

pytestmark = pytest.mark.needs("root", "fuse", "loop")

SIZE: Final = 192 * MIB
TREE_BYTES: Final = 64 * MIB
"""Bytes of the tree that are copied. Compressed, they take much less of the pool."""


def some_files(root: Path) -> Iterator[Path]:
    """Return files of a tree, shortest path first, up to a total size."""
    left = TREE_BYTES
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts:
            left -= path.stat().st_size
            if left < 0:
                return
            yield path


def test_a_file_tree_survives(tmp_path: Path) -> None:
    """The test makes an ext4, copies a tree, checks it, mounts again and compares, then deletes, and the room is free."""
    require_tools("mkfs.ext4", "e2fsck", "fstrim")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in some_files(root)]
    total = sum((root / name).stat().st_size for name in names)
    assert total > 8 * MIB, "the library of this Python is too small to tell anything"
    options = ("--size", str(SIZE), "--pool", "4M", "--backing", tmp_path / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint, looped(mountpoint / "swapfile") as device:
        tool("mkfs.ext4", "-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        fresh = stat_of(mountpoint, "stored_pages")
        with disk_mounted(device, tmp_path / "disk") as disk:
            for name in names:
                (disk / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, disk / name)
        tool("e2fsck", "-fn", device)
        full = stat_of(mountpoint, "stored_pages")
        assert full > fresh + total // 4096
        assert stat_of(mountpoint, "cumul_writeback_pages") > 0

        with disk_mounted(device, tmp_path / "disk") as disk:
            found = {path.relative_to(disk) for path in disk.rglob("*") if path.is_file()}
            assert found == set(names)
            differing = [name for name in names if not filecmp.cmp(root / name, disk / name, shallow=False)]
            assert differing == []
            for path in disk.iterdir():
                if path.name != "lost+found":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
            tool("fstrim", disk)
            wait_until(lambda: stat_of(mountpoint, "stored_pages") < fresh + 1000, "the trimmed pages to go")
        tool("e2fsck", "-fn", device)
        assert stat_of(mountpoint, "cumul_discarded_pages") > total // 4096
        assert stat_of(mountpoint, "lost_pages") == 0
        assert stat_of(mountpoint, "pagein_failures") == 0
