# SPDX-License-Identifier: MIT
"""Mountpoints of /etc/fstab on which nothing is mounted yet.

A file below such a mountpoint would be made on the filesystem that the mount will hide: often the root filesystem, which it
would fill. A mount with `nofail` may come after everything else at boot, or not at all.
"""

import os
from pathlib import Path

from zbudfs.service.mountpoint import unescape_octal


def unmounted_above(path: str, root: str = "/") -> str | None:
    """Return the mountpoint of fstab nearest above `path` if nothing is mounted on it, else None.

    An automount counts as mounted: the kernel mounts when the path is used. A line with `noauto` counts like any other.
    """
    nearest = ""
    for point in _points(Path(root, "etc/fstab"), 1):
        if path.startswith(f"{point.rstrip('/')}/") and len(point) > len(nearest):
            nearest = point
    if nearest in ("", "/") or nearest in _points(Path(root, "proc/self/mountinfo"), 4):
        return None
    return nearest


def _points(table: Path, column: int) -> set[str]:
    """Return the mountpoints in one column of a table, without links in them; empty if the table cannot be read."""
    try:
        lines = table.read_bytes().split(b"\n")
    except OSError:
        return set()
    words = [line.split() for line in lines if not line.lstrip().startswith(b"#")]
    found = (os.fsdecode(unescape_octal(each[column])) for each in words if len(each) > column)
    return {os.path.realpath(point) for point in found if point.startswith("/")}
