# SPDX-License-Identifier: MIT
"""The node /dev/loopN of a free loop device. In a container /dev is a copy of its own, to which the kernel adds nothing.

Two nodes take part:

    /dev/loop-control    LOOP_CTL_GET_FREE: the kernel names a free loop device, and makes one if there is none
    /dev/loopN           its node: made here if it is missing, which root may do unless a device cgroup forbids it
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Final

from zbudfs.swap.loop import SwapError

_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_MAJOR: Final = 7


def free_loop_number(root: str = "/") -> int:
    """Return the number of a loop device that is free. Raises OSError; `root` holds `dev/`."""
    fd = os.open(Path(root, "dev/loop-control"), os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(fd, _LOOP_CTL_GET_FREE)
    finally:
        os.close(fd)


def has_node(number: int, root: str = "/") -> bool:
    """Whether the loop device has its node."""
    try:
        status = Path(root, f"dev/loop{number}").stat()
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == os.makedev(_LOOP_MAJOR, number)


def make_node(number: int, name: str, root: str = "/") -> None:
    """Make a node of the loop device with that name in /dev, and see that it can be opened. Raises OSError."""
    path = Path(root, "dev", name)
    os.mknod(path, stat.S_IFBLK | 0o660, os.makedev(_LOOP_MAJOR, number))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except BaseException:
        path.unlink()
        raise


def pass_in(number: int) -> str:
    """Return what gives a container the loop device."""
    return f"pass --device /dev/loop-control --device /dev/loop{number}, or -v /dev:/dev, to the container"


def ensure_free_loop(root: str = "/") -> int:
    """Return the number of a free loop device that has a node. Raises SwapError with what to do."""
    try:
        number = free_loop_number(root)
    except FileNotFoundError:
        raise SwapError(
            "/dev/loop-control is missing: load the module with modprobe loop; in a container,"
            " pass --device /dev/loop-control --device /dev/loop0, or -v /dev:/dev"
        ) from None
    except OSError as error:
        raise SwapError(f"/dev/loop-control gives no loop device: {error.strerror}; {pass_in(0)}") from None
    if not has_node(number, root):
        try:
            make_node(number, f"loop{number}", root)
        except OSError as error:
            raise SwapError(
                f"/dev/loop{number} is missing and cannot be made: {error.strerror}; {pass_in(number)}"
            ) from None
    return number
