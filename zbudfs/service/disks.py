# SPDX-License-Identifier: MIT
"""The layers below a backing: file systems, devices, and the layers below those, down to the disk or to another end.

Writeback must not wait for memory. A file system in memory frees none. A file system that another program or another machine
serves needs memory just when there is none. A loop device is another file.

The daemon refuses such places before it creates anything (`check`), and `zbudfs doctor` names them. Every function takes
`root`, the folder that holds `proc/`, `sys/` and `etc/`; paths are those of a system whose / is `root`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from zbudfs.core.errors import BackingError
from zbudfs.service.mountpoint import FSTYPE, device_name, escape_path, resolve, shown_path, unescape_octal
from zbudfs.store.arena import file_system_number
from zbudfs.store.claim import INSIST
from zbudfs.store.files import below, read_bytes, read_text

NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "afs", "lustre", "gfs2", "ocfs2", "orangefs"}
)
"""File systems whose writes need memory for packets, or another machine."""
MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
ALLOCATING: Final = frozenset({"btrfs", "zfs", "bcachefs", "overlay", "f2fs"})
"""File systems that write to a new place each time, or through another file system: every write allocates."""
NUMBERS: Final = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x958458F6: "hugetlbfs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb3",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x794C7630: "overlay",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0xF2F52010: "f2fs",
    0xEF53: "ext4",
}
"""File system types by their number in statfs(2), for a mount that is not in the mount table, as in a chroot."""

MEMORY_DEVICE: Final = re.compile(r"/dev/(zram|ram)\d")
NETWORK_DEVICE: Final = re.compile(r"/dev/(nbd|rbd|drbd)\d")
LOOP_DEVICE: Final = re.compile(r"/dev/loop\d")
_DEEPEST: Final = 8
"""Most loop devices on files on loop devices ... that `layers` follows."""
_UNIT_FOLDERS: Final = (
    *("etc/systemd/system", "run/systemd/system", "run/systemd/transient"),
    *("run/systemd/generator", "run/systemd/generator.late"),
)
_MISSING: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
_FIEMAP: Final = 0xC020660B


@dataclass(frozen=True, slots=True)
class MountRow:
    """One line of mountinfo."""

    mountpoint: str
    fstype: str
    device: str
    """The device number as "major:minor"."""
    source: str
    options: dict[str, str]
    """The options of the file system."""


def mounts(root: str = "/") -> Iterator[MountRow]:
    """Yield the mounts in the order of the table."""
    for line in read_bytes("proc/self/mountinfo", root).split(b"\n"):
        fields, separator, rest = line.partition(b" - ")
        words, behind = fields.split(b" "), rest.split(b" ")
        if separator and len(words) >= 5 and len(behind) >= 1:
            told = [os.fsdecode(unescape_octal(word)) for word in [*behind, b"", b""]]
            pairs = (each.partition("=") for each in told[2].split(","))
            options = {name: value for name, _, value in pairs}
            yield MountRow(os.fsdecode(unescape_octal(words[4])), told[0], words[2].decode(), told[1], options)


def mount_of(path: str, root: str = "/") -> MountRow:
    """Return the mount that a resolved path is on. The last of several at one place hides the others."""
    found = MountRow("", "unknown", "0:0", "", {})
    for row in mounts(root):
        if _is_inside(path, row.mountpoint) and len(row.mountpoint) >= len(found.mountpoint):
            found = row
    return found


def _upwards(path: str) -> Iterator[str]:
    """Yield a path and the folders above it, up to /."""
    yield path
    while (folder := os.path.dirname(path)) != path:
        yield folder
        path = folder


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


# ---- layers ------------------------------------------------------------------------------------------------------------


def layers(path: str, root: str = "/", depth: int = _DEEPEST) -> list[str]:
    """Return the layers below a path, from the top: file systems by their type, devices as "/dev/NAME".

    The path is that of a file, which need not exist, or of a block device.
    """
    if depth == 0:
        return []
    device = _device_number(path, root)
    if device is not None:
        return _below_device(device, root, depth)
    row = mount_of(os.path.realpath(path) if root == "/" else path, root)
    names = [row.fstype if row.fstype != "unknown" else _type_by_number(path, root)]
    if names == ["overlay"]:
        return names + _below_overlay(path, row, root, depth)
    number = row.device
    if number.startswith("0:") and row.source.startswith("/dev/"):
        number = _device_number(row.source, root) or number  # btrfs reports a number of its own that is no device
    return names + _below_device(number, root, depth)


def _device_number(path: str, root: str) -> str | None:
    """Return the number of the block device at `path` as "major:minor". Return None if the path names no block device."""
    try:
        status = os.stat(below(root, path))
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise
    return device_name(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


def _type_by_number(path: str, root: str) -> str:
    """Return the type of the file system of the path, or of its nearest folder that exists."""
    if root != "/":
        return "unknown"
    there = next(each for each in _upwards(path) if os.path.exists(each))
    with contextlib.suppress(OSError):
        fd = os.open(there, os.O_PATH | os.O_CLOEXEC)
        try:
            return NUMBERS.get(file_system_number(fd) & 0xFFFFFFFF, "unknown")
        finally:
            os.close(fd)
    return "unknown"


def _below_device(number: str, root: str, depth: int) -> list[str]:
    link = below(root, f"sys/dev/block/{number}")
    if not os.path.exists(link):
        return []
    device = os.path.realpath(link)
    if os.path.exists(f"{device}/partition"):
        device = os.path.dirname(device)
    found = []
    for each in sorted(_parts_of(device)):
        found.append(f"/dev/{os.path.basename(each)}")
        with contextlib.suppress(OSError):
            file = read_text(f"{each}/loop/backing_file").rstrip("\n").removesuffix(" (deleted)")
            found += layers(file, root, depth - 1)
    return found


def _parts_of(device: str) -> set[str]:
    """Return a block device and all devices that it consists of, as folders of sysfs."""
    slaves: list[str] = []
    with contextlib.suppress(OSError):
        slaves = os.listdir(f"{device}/slaves")
    return {device}.union(*(_parts_of(os.path.realpath(f"{device}/slaves/{each}")) for each in slaves))


def _below_overlay(path: str, row: MountRow, root: str, depth: int) -> list[str]:
    """Return the layers below the upper layer of an overlay, to which all writes go."""
    upper = row.options.get("upperdir", "")
    if upper and os.path.isdir(below(root, upper)):
        return layers(upper, root, depth - 1)
    # In a container the path of the upper layer means nothing. A file system in memory has no extents for a file.
    return ["tmpfs"] if root == "/" and _without_extents(os.path.dirname(path)) else []


def _without_extents(folder: str) -> bool:
    try:
        fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        fcntl.ioctl(fd, _FIEMAP, (0).to_bytes(8, "little") + (4096).to_bytes(8, "little") + bytes(16))
    except OSError as error:
        return error.errno in (errno.EOPNOTSUPP, errno.ENOTTY)
    finally:
        os.close(fd)
    return False


# ---- checks ------------------------------------------------------------------------------------------------------------


def is_memory(names: list[str]) -> str | None:
    """Return the layer that is memory, or None."""
    return next((name for name in names if name in MEMORY or MEMORY_DEVICE.match(name)), None)


def is_served(names: list[str]) -> str | None:
    """Return the layer that another program, or another machine, serves, or None."""
    return next(
        (name for name in names if name in NETWORK or name == "fuse" or name.startswith(("fuse.", "fuseblk"))), None
    )


def check(path: str, *, force: bool, root: str = "/") -> list[str]:
    """Raise BackingError unless a backing can lie at `path`; return a sentence for each problem of the place."""
    shown = f"the backing {shown_path(path)}"
    if (missing := missing_mount(path, root)) and not force:
        raise BackingError(f"{shown} is refused: {missing}; mount it first, or {INSIST}")
    names = layers(path, root)
    if FSTYPE in names:
        raise BackingError(f"{shown} is refused: it lies on a zbudfs itself, which would wait for itself")
    if (name := is_memory(names)) is not None:
        raise BackingError(
            f"{shown} is refused: it lies on {name}, which is memory; put it on a disk, or use no backing"
        )
    warnings = []
    if (name := is_served(names)) is not None:
        text = f"lies on {name}: writing there needs memory when there is none, and the machine may hang"
        if not force:
            raise BackingError(f"{shown} is refused: it {text}; put it on a disk of this machine, or {INSIST}")
        warnings.append(f"{shown} {text}; put it on a disk of this machine")
    if remote := [name for name in names if NETWORK_DEVICE.match(name)]:
        warnings.append(
            f"{shown} lies on {remote[0]}, a device of a network: writing there needs memory when there is none; put it"
            " on a disk of this machine"
        )
    if names and names[0] == "zfs" and _zfs_version(root) < (2, 3):
        warnings.append(
            f"{shown} is on ZFS before 2.3, which accepts direct I/O but does not do it: use another file system"
        )
    return warnings


def _zfs_version(root: str) -> tuple[int, int]:
    with contextlib.suppress(OSError, ValueError):
        major, minor = read_text("sys/module/zfs/version", root).split("-")[0].split(".")[:2]
        return int(major), int(minor)
    return 0, 0


# ---- mounts that may be missing -----------------------------------------------------------------------------------------


def path_to_mount(backing: str) -> str:
    """Return the path that must be mounted before the daemon starts, for RequiresMountsFor= of a unit."""
    return os.path.dirname(backing)


def missing_mount(path: str, root: str = "/") -> str | None:
    """Return a sentence about the mount that `missing_mountpoint` finds; None if there is none."""
    found = missing_mountpoint(path, root)
    return found and f"{shown_path(found[0])} is in {found[1]} and not mounted"


def missing_mountpoint(path: str, root: str = "/") -> tuple[str, str] | None:
    """Return the nearest mountpoint above a path that the system should mount and has not, and the file that lists it.

    None if there is none. The function accesses the path, which makes an automount mount its file system.
    """
    folder = path_to_mount(path)
    with contextlib.suppress(OSError):
        os.stat(below(root, folder))
    above = [each for each in _upwards(folder) if each != "/"]
    there = {row.mountpoint for row in mounts(root) if row.fstype != "autofs"}
    for mountpoint, source in _wanted_mounts(above, root):
        if mountpoint not in there:
            return mountpoint, source
    return None


def _wanted_mounts(folders: list[str], root: str) -> Iterator[tuple[str, str]]:
    """Yield the folders among `folders` on which a file system should be mounted, and the file that lists it."""
    with contextlib.suppress(OSError):
        for line in read_bytes("etc/fstab", root).split(b"\n"):
            words = line.split()
            if len(words) < 3 or words[0].startswith(b"#"):
                continue
            target = os.fsdecode(unescape_octal(words[1]))
            if target.startswith("/"):
                target = resolve(target) if root == "/" else target.rstrip("/")
                if target in folders:
                    yield target, "/etc/fstab"
    for folder in folders:
        for place in _UNIT_FOLDERS:
            unit = f"/{place}/{escape_path(folder)}.mount"
            with contextlib.suppress(OSError):
                if not stat.S_ISREG(os.stat(below(root, unit)).st_mode):  # masked: a link to /dev/null
                    break
                yield folder, unit
