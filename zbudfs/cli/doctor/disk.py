# SPDX-License-Identifier: MIT
"""Checks of the place for the backing file: its room, direct I/O past the page cache, and its own need for memory.

Writeback must not wait for memory. A file system that another program or a network serves allocates memory when there is
none left. A loop or zram device hides memory or another file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from zbudfs.cli.doctor.finding import Finding, Machine, ok, problem, warning
from zbudfs.core.sizes import format_size
from zbudfs.service import disks
from zbudfs.service.mountpoint import shown_path
from zbudfs.store.space import DEVICE_END, DEVICE_START

_BLOCK_BYTES: Final = 4096
_REMEDY: Final = "put it on ext4 or xfs on a disk of this machine: backing = FILE, or --backing FILE"


def check_backing(machine: Machine) -> Iterator[Finding]:
    """Check the backing, or the folder in which a backing file would be made."""
    backing = machine.settings.backing
    if backing is None:
        yield ok("backing file", "none is wanted: pages that do not fit into the pool stay in RAM")
        return
    shown = shown_path(backing)
    path = machine.path(backing)
    if path.is_symlink() and not path.is_block_device():
        yield problem("backing file", f"{shown} is a symbolic link, which the daemon refuses", "name the file itself")
        return
    device = path.is_block_device()
    folder = path if device else next(each for each in path.parents if each.is_dir())
    yield from _file_system(machine, backing)
    yield _room(machine, path, folder, device=device)
    yield _direct_io(path if device else folder, shown, device=device)


def _room(machine: Machine, path: Path, folder: Path, *, device: bool) -> Finding:
    """Compare the free room with the largest size of the backing."""
    wanted = machine.settings.size_bytes
    if device:
        try:
            with path.open("rb") as file:
                free = max(0, file.seek(0, os.SEEK_END) - DEVICE_START - DEVICE_END)
        except OSError as error:
            return warning("backing room", f"the device cannot be opened: {error.strerror}", "run this as root")
        text = f"the device has room for {format_size(free)}, and up to {format_size(wanted)} is needed"
        remedy = "use a larger device, or a smaller size"
    else:
        system = os.statvfs(folder)
        free = system.f_bavail * system.f_frsize
        with contextlib.suppress(OSError):
            free += path.stat().st_blocks * 512
        text = f"the disk has room for {format_size(free)}, and the file may grow to {format_size(wanted)}"
        remedy = "make room, or use a smaller size"
    if free >= wanted:
        return ok("backing room", text)
    return warning("backing room", f"{text}: when the disk is full, pages stay in RAM", remedy)


def _direct_io(path: Path, shown: str, *, device: bool) -> Finding:
    """Try a write with O_DIRECT to a temporary file. A device is only opened."""
    flags = os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | (0 if device else os.O_TMPFILE), 0o600)
        try:
            if not device:
                os.pwrite(fd, _aligned_block(), 0)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return warning("direct I/O", f"{shown}: O_DIRECT could not be tried: {error.strerror}", "run this as root")
        return warning(
            "direct I/O",
            f"{shown}: O_DIRECT is refused ({error.strerror}): writeback goes through the page cache, which needs memory"
            " when memory is short",
            _REMEDY,
        )
    return ok("direct I/O", f"works in the folder of {shown}" if not device else f"{shown} can be opened for it")


def _aligned_block() -> memoryview:
    """Return a block of zeros, aligned as O_DIRECT requires."""
    room = ctypes.create_string_buffer(2 * _BLOCK_BYTES)
    start = -ctypes.addressof(room) % _BLOCK_BYTES
    return memoryview(room)[start : start + _BLOCK_BYTES]


def _file_system(machine: Machine, backing: str) -> Iterator[Finding]:
    """Check the layers below the backing, down to the disk."""
    names = disks.layers(backing, machine.root)
    top = names[0] if names else "a disk"
    if missing := disks.missing_mount(backing, machine.root):
        yield problem("backing file", missing, "mount it before zbudfs is mounted")
    elif (name := disks.is_served(names)) is not None:
        text = f"on {name}: another program or machine does the writes that free memory, and may need memory for them"
        yield problem("backing file", text, _REMEDY)
    elif (name := disks.is_memory(names)) is not None:
        yield problem("backing file", f"on {name}, which is memory: writeback would free none", _REMEDY)
    elif below := [name for name in names if disks.LOOP_DEVICE.match(name) or disks.NETWORK_DEVICE.match(name)]:
        text = f"on {', '.join(below)}, which hides a network or another file system"
        yield problem("backing file", text, _REMEDY)
    elif top in disks.ALLOCATING:
        text = f"on {top}, which allocates memory and changes metadata for every write"
        yield warning("backing file", text, _REMEDY)
    else:
        yield ok("backing file", f"{shown_path(backing)} on {top}")
