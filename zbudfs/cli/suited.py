# SPDX-License-Identifier: MIT
"""Defaults that suit this machine, and the reasons that `zbudfs config` gives for them.

    size        as large as RAM, but no larger than the room on the disk of the backing file: a page for which neither
                the pool nor the disk has room stays in RAM
    pool        a quarter of RAM
    priority    above all other swap and below zram, chosen when swap is turned on

Every function takes `root`, the folder that holds `proc/` and the backing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import shown_path
from zbudfs.service.settings import DEFAULT_POOL, MIN_SIZE_BYTES, PAGE_BYTES, Settings, default_size_bytes
from zbudfs.swap.loop import Swap, swaps
from zbudfs.swap.priority import choose_priority, is_zram


def suited_size_bytes(ram: int, pool_bytes: int, backing: str | None, root: str = "/") -> int:
    """Return the default size for a machine with `ram` bytes, this pool and this backing: at least the pool's size."""
    size = default_size_bytes(ram)
    room = _room_bytes(backing, root)
    if room is None or room >= size:
        return size
    return min(size, max(room, pool_bytes, MIN_SIZE_BYTES) // PAGE_BYTES * PAGE_BYTES)


def reasons(settings: Settings, ram: int, root: str = "/") -> Mapping[str, str]:
    """Return the reasons for the defaults of size, pool, backing and priority, by the names of the options."""
    where = "" if settings.backing is None else shown_path(os.path.dirname(settings.backing))  # noqa: PTH120  any bytes
    as_ram = settings.size_bytes == default_size_bytes(ram)
    room = _room_bytes(settings.backing, root)
    fits = room is not None and room >= settings.size_bytes
    free = "" if room is None else f"{where} has room for {'all of it' if fits else format_size(room)}"
    return {
        "size": "as large as RAM"
        if as_ram
        else f"less than RAM of {format_size(ram)}: the room on the disk of {where}",
        "pool": f"{DEFAULT_POOL} of RAM",
        "backing": free,
        "priority": _why_priority(root),
    }


def _room_bytes(backing: str | None, root: str) -> int | None:
    """Return the largest size of the backing file, in bytes; None for a device, no backing, or an unknown room."""
    if backing is None:
        return None
    path = Path(root, backing.lstrip("/"))
    if path.is_block_device():
        return None
    with contextlib.suppress(OSError):
        system = os.statvfs(next(each for each in path.parents if each.is_dir()))
        free = system.f_bavail * system.f_frsize
        with contextlib.suppress(OSError):
            free += path.lstat().st_blocks * 512
        return free
    return None


def _why_priority(root: str) -> str:
    others: list[Swap] = []
    with contextlib.suppress(OSError, ValueError):
        others = [swap for swap in swaps(root) if not swap.path.startswith("/dev/loop")]
    now = choose_priority(others)
    chosen = "by the kernel" if now is None else f"{now} at present"
    parts = [f"{'below' if is_zram(swap) else 'above'} {shown_path(swap.path)} ({swap.priority})" for swap in others]
    return f"{chosen}, {', '.join(parts) or 'there is no other swap'}"
