# SPDX-License-Identifier: MIT
"""File systems to try a backing file on: small ones, and ones that cannot do everything. For root, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_LIMIT_SECONDS: Final = 60


def run_tool(*command: str | Path) -> str:
    """Run a program to its end, which must be a good one; return what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=_LIMIT_SECONDS,
        check=False,
        env={**os.environ, "PATH": _PATH},
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


@contextlib.contextmanager
def small_ext4(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Have an ext4 file system of `size_bytes` mounted; skip the test where there is no mkfs.ext4."""
    if shutil.which("mkfs.ext4", path=_PATH) is None:
        pytest.skip("needs mkfs.ext4 (apt-get install e2fsprogs)")
    image, where = folder / "image", folder / "small"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run_tool("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", image)
    device = run_tool("losetup", "--find", "--show", image)
    try:
        run_tool("mount", device, where)
        try:
            yield where
        finally:
            run_tool("umount", where)
    finally:
        run_tool("losetup", "--detach", device)


@contextlib.contextmanager
def ramfs(folder: Path) -> Iterator[Path]:
    """Have a ramfs mounted: it refuses O_DIRECT, fallocate and holes."""
    where = folder / "ramfs"
    where.mkdir()
    run_tool("mount", "-t", "ramfs", "-o", "mode=0700", "none", where)
    try:
        yield where
    finally:
        run_tool("umount", where)


@contextlib.contextmanager
def tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Have a tmpfs of `size_bytes` mounted, a whole number of pages."""
    where = folder / "tmpfs"
    where.mkdir()
    run_tool("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", where)
    try:
        yield where
    finally:
        run_tool("umount", where)
