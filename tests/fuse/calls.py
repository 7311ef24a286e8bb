# SPDX-License-Identifier: MIT
"""System calls that Python lacks, and helpers for tests with a mount.

None of these uses the product's wrappers of the same calls, so that no test relies on the code under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kit.programs import find_program
from tests.support import LIMIT_SECONDS
from zbudfs.swap.attach import release
from zbudfs.swap.loop import SwapError, run_tool

PAGE: Final = 4096
MIB: Final = 1 << 20

KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
COLLAPSE_RANGE: Final = 0x08
ZERO_RANGE: Final = 0x10
INSERT_RANGE: Final = 0x20
UNSHARE_RANGE: Final = 0x40
PUNCH: Final = PUNCH_HOLE | KEEP_SIZE

_CACHESTAT: Final = 451
"""The number of cachestat(2), which is the same on each architecture (Linux 6.5)."""

_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.syscall.restype = ctypes.c_long


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), or raise OSError. The C library would emulate it with writes, and is not used."""
    if _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def renameat2(old: Path, new: Path, flags: int) -> None:
    """Call renameat2(2) with absolute paths, or raise OSError."""
    if _libc.renameat2(-1, os.fsencode(old), -1, os.fsencode(new), ctypes.c_uint(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def cached_pages(fd: int) -> int:
    """Return the number of an open file's pages in the page cache. Skip the test if the kernel cannot say."""
    reach = (ctypes.c_uint64 * 2)(0, 0)  # to the end of the file
    found = (ctypes.c_uint64 * 5)()
    if _libc.syscall(ctypes.c_long(_CACHESTAT), fd, ctypes.byref(reach), ctypes.byref(found), 0) != 0:
        pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())} (Linux 6.5)")
    return found[0]


def aligned(content: bytes) -> mmap.mmap:
    """Return `content` in memory that begins on a page, as direct I/O needs, and which keeps a request whole."""
    buffer = mmap.mmap(-1, max(len(content), 1))
    buffer[: len(content)] = content
    return buffer


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """Open a file for the block."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def stat_of(mountpoint: Path, name: str) -> int:
    """Return the number in one file of stats/."""
    return int((mountpoint / "stats" / name).read_text())


def server_of(mountpoint: Path) -> int:
    """Return the process that answers requests."""
    return stat_of(mountpoint, "worker_pid")


def all_stats(mountpoint: Path) -> dict[str, Any]:
    """Return all statistics of one moment."""
    found = json.loads((mountpoint / "stats/all.json").read_bytes())
    assert isinstance(found, dict)
    return found


def read_everything(fd: int, size_bytes: int) -> bytes:
    """Return the content of the swapfile."""
    return b"".join(os.pread(fd, MIB, at) for at in range(0, size_bytes, MIB))


def require_tools(*names: str) -> None:
    """Skip the test if one of these programs is missing."""
    if missing := [name for name in names if find_program(name) is None]:
        pytest.skip(f"no {', '.join(missing)}")


def tool(*command: str | Path) -> str:
    """Run a program that must succeed, and return what it prints."""
    return run_tool([str(part) for part in command], limit_seconds=2 * LIMIT_SECONDS)


@contextlib.contextmanager
def looped(file: Path, *, sector_bytes: int = PAGE, direct: bool = True) -> Iterator[Path]:
    """Attach a loop device to a file for the block."""
    options = [f"--direct-io={'on' if direct else 'off'}", "--sector-size", str(sector_bytes)]
    device = tool("losetup", "--find", "--show", *options, file)
    try:
        yield Path(device)
    finally:
        release(device)


@contextlib.contextmanager
def fuse_control(folder: Path, mountpoint: Path) -> Iterator[Path]:
    """Mount the kernel's control filesystem of FUSE for the block, and return the folder of a mount's connection."""
    folder.mkdir()
    tool("mount", "-t", "fusectl", "fusectl", folder)
    try:
        yield folder / str(os.minor(mountpoint.stat().st_dev))
    finally:
        tool("umount", folder)


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Freeze a file system for the block: each writer waits."""
    with opened(folder, os.O_RDONLY) as fd:
        fcntl.ioctl(fd, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, _FITHAW, 0)


@contextlib.contextmanager
def disk_mounted(device: Path, folder: Path) -> Iterator[Path]:
    """Mount an ext4 on a device for the block."""
    folder.mkdir(exist_ok=True)
    tool("mount", "-t", "ext4", device, folder)
    try:
        yield folder
    finally:
        try:
            tool("umount", folder)
        except SwapError:
            tool("umount", "--lazy", folder)
            raise
