# SPDX-License-Identifier: MIT
"""File systems for tests of the backing file: small ones, and ones that lack functions. They need root, and are removed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.programs import find_program, run_tool
from tests.support import detach


@contextlib.contextmanager
def looped(image: Path, *options: str) -> Iterator[Path]:
    """Attach a loop device to a file for the block, with `options` of losetup."""
    device = run_tool("losetup", "--find", "--show", *options, image)
    try:
        yield Path(device)
    finally:
        detach(device)


@contextlib.contextmanager
def small_ext4(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount an ext4 file system of `size_bytes` for the block. Skip the test without mkfs.ext4."""
    if find_program("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4 (apt-get install e2fsprogs)")
    image, where = folder / "image", folder / "small"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run_tool("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", image)
    with looped(image) as device:
        run_tool("mount", device, where)
        try:
            yield where
        finally:
            run_tool("umount", where)


@contextlib.contextmanager
def ramfs(folder: Path) -> Iterator[Path]:
    """Mount a ramfs for the block: it refuses O_DIRECT, fallocate and holes."""
    where = folder / "ramfs"
    where.mkdir()
    run_tool("mount", "-t", "ramfs", "-o", "mode=0700", "none", where)
    try:
        yield where
    finally:
        run_tool("umount", where)


@contextlib.contextmanager
def tmpfs(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of `size_bytes`, a whole number of pages, for the block."""
    where = folder / "tmpfs"
    where.mkdir()
    run_tool("mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", where)
    try:
        yield where
    finally:
        run_tool("umount", where)
