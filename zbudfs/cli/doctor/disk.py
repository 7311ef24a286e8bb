# SPDX-License-Identifier: MIT
"""Where cold frames would be written: is there room, does it go past the page cache, and does it need memory itself?

What writes back must not wait for memory: a file system served by another program, or over a network, allocates just
when there is none; a loop or zram device is memory, or another file system, in disguise.
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
    """Look at the backing file, or at the folder where it would be."""
    backing = machine.settings.backing
    if backing is None:
        yield ok("backing file", "none is wanted: what does not fit into the pool is refused")
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
    """Compare the room that there is with what is wanted at most."""
    wanted = machine.settings.size_bytes
    if device:
        try:
            with path.open("rb") as file:
                free = max(0, file.seek(0, os.SEEK_END) - DEVICE_START - DEVICE_END)
        except OSError as error:
            return warning("backing room", f"the device cannot be opened: {error.strerror}", "run this as root")
        text = f"the device has room for {format_size(free)}, and up to {format_size(wanted)} is wanted"
        remedy = "take a larger device, or size smaller"
    else:
        system = os.statvfs(folder)
        free = system.f_bavail * system.f_frsize
        with contextlib.suppress(OSError):
            free += path.stat().st_blocks * 512
        text = f"{format_size(free)} of room, and the file may grow to {format_size(wanted)}"
        remedy = "make room, or size smaller"
    if free >= wanted:
        return ok("backing room", text)
    return warning("backing room", f"{text}: when the disk is full, pages stay in RAM", remedy)


def _direct_io(path: Path, shown: str, *, device: bool) -> Finding:
    """Try a write with O_DIRECT, to a file of ours that is gone afterwards; a device is only opened."""
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
            return warning("direct I/O", f"{shown}: it could not be tried: {error.strerror}", "run this as root")
        return warning(
            "direct I/O",
            f"{shown}: O_DIRECT is refused ({error.strerror}): what is written back goes through the page cache, which"
            " needs memory when there is none",
            _REMEDY,
        )
    return ok("direct I/O", f"tried beside {shown}" if not device else f"{shown} can be opened for it")


def _aligned_block() -> memoryview:
    """Return zeros at an address that O_DIRECT takes."""
    room = ctypes.create_string_buffer(2 * _BLOCK_BYTES)
    start = -ctypes.addressof(room) % _BLOCK_BYTES
    return memoryview(room)[start : start + _BLOCK_BYTES]


def _file_system(machine: Machine, backing: str) -> Iterator[Finding]:
    """Look at what the backing lies on, down to the disk."""
    names = disks.layers(backing, machine.root)
    top = names[0] if names else "a disk"
    if missing := disks.missing_mount(backing, machine.root):
        yield problem("backing file", missing, "mount it before zbudfs is mounted")
    elif (name := disks.is_served(names)) is not None:
        text = f"on {name}: another program or machine, which may need memory, would have to write what frees memory"
        yield problem("backing file", text, _REMEDY)
    elif (name := disks.is_memory(names)) is not None:
        yield problem("backing file", f"on {name}, which is memory: nothing is gained by writing there", _REMEDY)
    elif below := [name for name in names if disks.LOOP_DEVICE.match(name) or disks.NETWORK_DEVICE.match(name)]:
        text = f"on {', '.join(below)}: that is a network, or another file system in disguise"
        yield problem("backing file", text, _REMEDY)
    elif top in disks.ALLOCATING:
        text = f"on {top}, which allocates memory and changes metadata whenever it writes"
        yield warning("backing file", text, _REMEDY)
    else:
        yield ok("backing file", f"{shown_path(backing)} on {top}")
