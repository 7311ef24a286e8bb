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
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from zbudfs.cli.doctor.finding import Finding, Machine, ok, problem, warning
from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import shown_path, unescape_octal

NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "afs", "lustre", "gfs2", "ocfs2", "orangefs"}
)
"""File systems whose writes need memory for packets, or another machine."""

MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
ALLOCATING: Final = frozenset({"btrfs", "zfs", "bcachefs", "overlay", "f2fs"})
"""File systems that write elsewhere than they wrote before, or through another one: every write allocates."""

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
    if path.is_symlink():
        yield problem("backing file", f"{shown} is a symbolic link, which the daemon refuses", "name the file itself")
        return
    device = path.is_block_device()
    folder = path if device else next(each for each in path.parents if each.is_dir())
    yield from _file_system(machine, backing, folder, device=device)
    if not device:
        yield _room(machine, path, folder)
    yield _direct_io(path if device else folder, shown, device=device)


def _room(machine: Machine, path: Path, folder: Path) -> Finding:
    """Compare the free room with what the file may grow to."""
    system = os.statvfs(folder)
    free = system.f_bavail * system.f_frsize
    with contextlib.suppress(OSError):
        free += path.stat().st_blocks * 512
    wanted = machine.settings.size_bytes
    text = f"{format_size(free)} of room, and the file may grow to {format_size(wanted)}"
    if free >= wanted:
        return ok("backing room", text)
    return warning("backing room", f"{text}: when the disk is full, pages stay in RAM", "make room, or size smaller")


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


def _file_system(machine: Machine, backing: str, folder: Path, *, device: bool) -> Iterator[Finding]:
    """Look at what the backing file lies on, down to the disk."""
    if device:
        number = f"{os.major(folder.stat().st_rdev)}:{os.minor(folder.stat().st_rdev)}"
        fstype = "block device"
    else:
        fstype, number = mount_of(machine.read("/proc/self/mountinfo"), os.path.realpath(backing))
    if fstype.startswith("fuse") and fstype != "fusectl":
        text = f"on {fstype}: another program, which may need memory, would have to write what frees memory"
        yield problem("backing file", text, _REMEDY)
    elif fstype in NETWORK:
        text = f"on {fstype}: writing over a network needs memory when there is none, and the machine may hang"
        yield problem("backing file", text, _REMEDY)
    elif fstype in MEMORY:
        yield problem("backing file", f"on {fstype}, which is memory: nothing is gained by writing there", _REMEDY)
    elif fstype in ALLOCATING:
        text = f"on {fstype}, which allocates memory and changes metadata whenever it writes"
        yield warning("backing file", text, _REMEDY)
    elif below := virtual_devices(machine, number):
        text = f"on {', '.join(below)}: that is memory, a network, or another file system in disguise"
        yield problem("backing file", text, _REMEDY)
    else:
        yield ok("backing file", f"{shown_path(backing)} on {fstype}")


def mount_of(mountinfo: str, path: str) -> tuple[str, str]:
    """Return (file system type, device as "major:minor") of the mount that a resolved path is on."""
    best, found = -1, ("unknown", "0:0")
    for line in mountinfo.split("\n"):
        fields, separator, rest = line.partition(" - ")
        words = fields.split(" ")
        if not separator or len(words) < 5:
            continue
        top = os.fsdecode(unescape_octal(os.fsencode(words[4])))
        inside = path == top or path.startswith(f"{top.rstrip('/')}/")
        if inside and len(top) >= best:  # the last of several at one place hides the others
            best, found = len(top), (rest.split(" ")[0], words[2])
    return found


def virtual_devices(machine: Machine, number: str) -> list[str]:
    """Return what is no disk among the block device "major:minor" and those below it: loop, zram, network devices."""
    link = machine.path(f"/sys/dev/block/{number}")
    if not link.exists():
        return []
    device = link.resolve()
    if (device / "partition").exists():
        device = device.parent
    names = sorted(_names_of(device))
    return [f"/dev/{name}" for name in names if re.match(r"(loop|zram|ram|nbd|rbd|drbd)\d", name)]


def _names_of(device: Path) -> set[str]:
    """Return the names of a block device and of all that it is made of; `device` is its folder in /sys."""
    return {device.name}.union(*(_names_of(slave.resolve()) for slave in device.glob("slaves/*")))
