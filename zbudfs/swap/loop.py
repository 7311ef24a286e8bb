# SPDX-License-Identifier: MIT
"""Finding out what sits on a mount: loop devices and swaps, from the kernel's own tables.

    /sys/block/loopN/loop/backing_file     which file; a path, as seen from wherever the kernel sees it
    /dev/loopN, LOOP_GET_STATUS64          which device that file is on: the truth, if its file system answers
    /proc/swaps                            which block devices are swap, how large and how full

A path alone may mislead: it carries " (deleted)", belongs to another mount namespace, or is that of an earlier mount
which has been lazily taken away. The device number of a mount is its own as long as it lives, so it decides where it
is available. A mount whose daemon has died does not answer any more, and then the path decides.

Every reader takes `root`, the folder that holds `proc/`, `sys/` and `dev/`, so that a test can make one up.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zbudfs.core.errors import Failed

SWAPFILE: Final = "swapfile"
"""Name of the one file that a zbudfs is for."""

LOOP_DEVICE: Final = "loop device "
"""Prefix of a loop device in the result of `users`, if it is no active swap."""

SYSTEM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH of the programs that run as root."""

_LOOP_SET_STATUS64: Final = 0x4C04
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_INFO64_BYTES: Final = 232
_DELETED: Final = " (deleted)"
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class SwapError(Failed):
    """Something about loop devices or swap that cannot be done; the text is one sentence for the user."""


class ToolKilled(SwapError):
    """A program was killed, by the signal `number`."""

    def __init__(self, name: str, number: int) -> None:
        """Say that of the program `name`."""
        super().__init__(f"{name} was killed by signal {number}")
        self.number = number


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """A loop device with a file behind it."""

    path: str
    """The block device, "/dev/loop3"."""
    backing_file: str
    """Path of the file behind it, as the kernel reports it, without " (deleted)"."""
    direct_io: bool
    """Whether it goes past the page cache."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One active swap."""

    path: str
    """The block device or file."""
    size_bytes: int
    """Room for pages."""
    used_bytes: int
    """Pages there now."""
    priority: int
    """Highest is used first."""


def loop_devices(root: str = "/") -> list[LoopDevice]:
    """Return all loop devices that have a file behind them, by number."""
    found = []
    for folder in sorted(Path(root, "sys/block").glob("loop*/loop"), key=lambda path: (len(path.parent.name), path)):
        try:
            # One newline ends the value; any other is part of the file's name.
            backing_file = os.fsdecode((folder / "backing_file").read_bytes()).removesuffix("\n")
            direct_io = (folder / "dio").read_text().strip() == "1"
        except OSError:
            continue  # detached meanwhile
        found.append(LoopDevice(f"/dev/{folder.parent.name}", backing_file.removesuffix(_DELETED), direct_io))
    return found


def loop_devices_on(mountpoint: str, st_dev: int | None, root: str = "/") -> list[LoopDevice]:
    """Return the loop devices whose file lies on the mount at `mountpoint` with device number `st_dev`.

    `st_dev` None: the path decides alone.
    """
    inside = mountpoint.rstrip("/") + "/"
    found = []
    for loop in loop_devices(root):
        path_fits = loop.backing_file.startswith(inside)
        # Asking a loop device makes the kernel ask the file's file system: only those that may be ours.
        if not path_fits and not loop.backing_file.endswith(f"/{SWAPFILE}"):
            continue
        backing_dev = _backing_dev(loop.path, root) if st_dev is not None else None
        if path_fits if backing_dev is None else backing_dev == st_dev:
            found.append(loop)
    return found


def loop_status(device: str, root: str = "/", new: bytes | None = None) -> bytes:
    """Return the `struct loop_info64` of a loop device, after it was set to `new` if there is one. Raises OSError."""
    fd = os.open(Path(root, device.lstrip("/")), os.O_RDONLY | os.O_CLOEXEC)
    try:
        if new is not None:
            fcntl.ioctl(fd, _LOOP_SET_STATUS64, new)
        return fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
    finally:
        os.close(fd)


def swaps(root: str = "/") -> list[Swap]:
    """Return all active swaps. Raises OSError where /proc/swaps cannot be read."""
    return parse_swaps(Path(root, "proc/swaps").read_bytes())


def parse_swaps(text: bytes) -> list[Swap]:
    """Return the swaps in `text`, the contents of /proc/swaps."""
    found = []
    for line in text.splitlines()[1:]:
        # Filename Type Size Used Priority; sizes in KiB
        words = line.split()
        if len(words) >= 5:
            path = _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), words[0])
            size, used, priority = (int(word) for word in words[-3:])
            found.append(Swap(os.fsdecode(path).removesuffix(_DELETED), size * 1024, used * 1024, priority))
    return found


def users(mountpoint: str, st_dev: int | None = None, root: str = "/") -> list[str]:
    """Return what sits on the mount at `mountpoint`, for people: "swap on /dev/loop0", "loop device /dev/loop3".

    Empty when it can be unmounted as far as swap is concerned. `st_dev` as in `loop_devices_on`.
    """
    active = {swap.path for swap in swaps(root)}
    return [
        f"swap on {loop.path}" if loop.path in active else f"{LOOP_DEVICE}{loop.path}"
        for loop in loop_devices_on(mountpoint, st_dev, root)
    ]


def swaps_on(mountpoint: str, st_dev: int | None = None, root: str = "/") -> list[Swap]:
    """Return the active swaps on the mount at `mountpoint`; `st_dev` as in `loop_devices_on`."""
    devices = {loop.path for loop in loop_devices_on(mountpoint, st_dev, root)}
    return [swap for swap in swaps(root) if swap.path in devices]


def was_swap(device: str, root: str = "/") -> bool:
    """Whether `attach` has set the queue of a loop device up for swap, on which it stays until the device is detached."""
    try:
        return Path(root, "sys/block", Path(device).name, "queue/rq_affinity").read_text().strip() == "2"
    except OSError:
        return False


def run_tool(command: Sequence[str | bytes], *, limit_seconds: float | None, own_session: bool = False) -> str:
    """Run a program of util-linux and return what it prints.

    Raises SwapError with the program's own words when it fails, is missing, is killed (ToolKilled), or takes longer than
    `limit_seconds` (None: no limit). With `own_session` a Ctrl-C at the terminal does not reach it. The program is looked for
    in the folders of the system alone: root's PATH may be empty, or name a folder that others can write to.
    """
    name = os.fsdecode(command[0])
    environment = {**os.environ, "PATH": SYSTEM_PATH, "LC_ALL": "C"}  # messages may be shown to others: in English
    try:
        run = subprocess.run(
            command,
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=limit_seconds,
            env=environment,
            start_new_session=own_session,
            close_fds=False,  # it inherits the command's lock (cli/alone.py), and nothing else
        )
    except FileNotFoundError:
        raise SwapError(f"the program {name} is missing: install util-linux (apt-get install util-linux)") from None
    except subprocess.TimeoutExpired:
        raise SwapError(f"{name} did not end within {limit_seconds:g} s") from None
    if run.returncode != 0:
        if run.returncode < 0:
            raise ToolKilled(name, -run.returncode)
        words = run.stderr.decode("utf-8", "backslashreplace").strip().splitlines()
        raise SwapError(words[-1] if words else f"{name} failed ({run.returncode})")
    return run.stdout.decode("utf-8", "surrogateescape").strip()


def _backing_dev(device: str, root: str) -> int | None:
    """Return the st_dev of the file behind a loop device; None when the device or the file's system does not report it."""
    try:
        status = loop_status(device, root)
    except OSError:
        return None
    encoded = struct.unpack_from("=Q", status)[0]
    # huge_encode_dev() of the kernel: minor bits 0-7 and 20-31, major bits 8-19.
    return os.makedev((encoded >> 8) & 0xFFF, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))
