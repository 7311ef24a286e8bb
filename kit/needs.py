# SPDX-License-Identifier: MIT
"""The needs of tests and measurements, and the check whether this machine fulfils them.

A test names its needs with `pytest.mark.needs`:

    root     user 0 with CAP_SYS_ADMIN (mount, losetup, swapon)
    fuse     /dev/fuse can be opened
    loop     loop devices, and the programs for them
    swap     swap can be turned on
    cell     a memory cgroup can be made
    systemd  the program systemd-analyze; systemd need not run
    nbd      the programs for a disk that fails on demand
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kit.cell import CellError, find_tree
from kit.programs import find_program

_CAP_SYS_ADMIN: Final = 21


def why_not(need: str) -> str | None:
    """Return why this machine lacks `need`, with the remedy; None if it has it. Raises KeyError."""
    return NEEDS[need]()


def _root() -> str | None:
    if os.geteuid() != 0:
        return "not root: run it with sudo"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and not int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1:
            return "no CAP_SYS_ADMIN: in a container, run it privileged"
    return None


def _fuse() -> str | None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror} (modprobe fuse)"
    return None


def _loop() -> str | None:
    if not Path("/dev/loop-control").exists():
        return "no /dev/loop-control (modprobe loop)"
    return _programs("losetup")


def _swap() -> str | None:
    if not Path("/proc/swaps").exists():
        return "this kernel has no swap"
    return _programs("mkswap", "swapon", "swapoff")


def _cell() -> str | None:
    try:
        tree = find_tree()
    except CellError as error:
        return str(error)
    return None if os.access(tree.path, os.W_OK) else f"{tree.path} cannot be written"


def _systemd() -> str | None:
    missing = find_program("systemd-analyze") is None
    return "no systemd-analyze (apt-get install systemd)" if missing else None


def _nbd() -> str | None:
    missing = [name for name in ("nbdkit", "nbdfuse", "mkfs.ext4") if find_program(name) is None]
    return f"no {', '.join(missing)} (apt-get install nbdkit libnbd-bin e2fsprogs)" if missing else None


def _programs(*names: str) -> str | None:
    missing = [name for name in names if find_program(name) is None]
    return f"no {', '.join(missing)} (apt-get install util-linux mount)" if missing else None


NEEDS: Final[dict[str, Callable[[], str | None]]] = {
    "root": _root,
    "fuse": _fuse,
    "loop": _loop,
    "swap": _swap,
    "cell": _cell,
    "systemd": _systemd,
    "nbd": _nbd,
}
"""The check of each need: a function that returns why the machine lacks it."""
