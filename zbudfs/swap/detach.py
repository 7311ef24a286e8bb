# SPDX-License-Identifier: MIT
"""Make active swap a mounted zbudfs again, if RAM has room for the pages that come back.

swapoff reads every page in. Where memory is too short for them the kernel kills programs, or swapoff, after which swap is
on as before and all of it is to be done again. So the room is counted first and the answer is no, with the figures, and all
keeps running.

    needed     what is in use of this swap, and a margin
    there is   MemAvailable, and the free room of other swaps

The count is on the safe side: the pool's own frames, which become free on the way, are not counted.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from zbudfs.core.sizes import format_size
from zbudfs.swap.attach import release
from zbudfs.swap.loop import Swap, SwapError, ToolKilled, loop_devices_on, run_tool, swaps

LOOK_SECONDS: Final = 30.0
"""Longest time to look at what a device holds. Arbitrary."""

MARGIN_BYTES: Final = 64 << 20
"""Memory that must be left over after swapoff. Guessed, not measured: page tables, and what else runs meanwhile."""


def detach(mounts: Sequence[tuple[str, int | None]], *, force: bool = False, root: str = "/") -> list[str]:
    """Take swap and loop devices off the zbudfs at (mountpoint, st_dev); return the loop devices that were on them.

    Several count as one: there must be room for what comes back from all of them. An st_dev may be None: then the path
    decides. `force` skips the count of memory. Takes as long as reading all of it back takes, and Ctrl-C does not stop it.
    Raises SwapError: where memory is short or swapoff fails, everything is left as it was and keeps running.
    """
    loops = [loop for mountpoint, st_dev in mounts for loop in loop_devices_on(mountpoint, st_dev, root)]
    devices = [loop.path for loop in loops]
    active = swaps(root)
    mine = [swap for swap in active if swap.path in devices]
    on = [swap.path for swap in mine]
    claimed = [device for device in devices if device not in on and is_claimed(device, root)]
    if not force:
        if claimed:
            raise SwapError(
                f"{claimed[0]} is in use, and /proc/swaps does not list it: unmount what is on it; if it is swap that a"
                " container does not show, run this outside, or with --force, which does not count the memory"
            )
        check_room(mine, [swap for swap in active if swap.path not in devices], available_bytes(root))
    for device in [*on, *claimed]:
        _swap_off(device)
    for device in devices:
        release(device, root)
    return devices


def free_leftovers(mountpoint: str, st_dev: int | None, root: str = "/") -> None:
    """Detach the loop devices of the mount that are no active swap: `attach` makes a new one with the right properties.

    Such a device is what a killed `attach` leaves, or a swapoff by another program. Raises SwapError, with nothing changed,
    for a device that is in use, or that holds something other than swap.
    """
    active = {swap.path for swap in swaps(root)}
    left = [loop.path for loop in loop_devices_on(mountpoint, st_dev, root) if loop.path not in active]
    for device in left:
        if is_claimed(device, root):
            raise SwapError(f"{device} is in use, but is no swap that /proc/swaps lists: unmount what is on it first")
        types = run_tool(["wipefs", "--no-act", "--noheadings", "--output", "TYPE", device], limit_seconds=LOOK_SECONDS)
        if foreign := sorted(set(types.split()) - {"swap"}):
            raise SwapError(
                f"{device} holds {', '.join(foreign)}, which would be lost: detach it with losetup --detach {device} if"
                " it is of no use any more"
            )
    for device in left:
        release(device, root)


def is_claimed(device: str, root: str = "/") -> bool:
    """Whether a program or the kernel has a block device for itself: as swap, or as a file system that is mounted."""
    try:
        os.close(os.open(Path(root, device.lstrip("/")), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _swap_off(device: str) -> None:
    """Read everything on a device back. SwapError, with swap still on."""
    with _interrupts_ignored():
        try:
            run_tool(["swapoff", device], limit_seconds=None, own_session=True)
        except ToolKilled as error:
            if error.number != signal.SIGKILL:
                raise
            raise SwapError(
                f"{error}, for want of memory: swap is still on, and nothing was lost; end some programs, or run this"
                " outside of a memory cgroup that is too small for what comes back"
            ) from None


def check_room(mine: list[Swap], others: list[Swap], available: int) -> None:
    """Raise SwapError unless what is in `mine` fits into `available` bytes of RAM and the free room of `others`."""
    used = sum(swap.used_bytes for swap in mine)
    free = sum(swap.size_bytes - swap.used_bytes for swap in others)
    if used and used + MARGIN_BYTES > available + free:
        raise SwapError(
            f"not enough memory for swapoff: {format_size(used)} would come back (and {format_size(MARGIN_BYTES)} must"
            f" stay free), but only {format_size(available)} of RAM and {format_size(free)} of other swap are there;"
            " end some programs or add other swap first; nothing was changed"
        )


def available_bytes(root: str = "/") -> int:
    """Return the memory that programs can still get without swapping (MemAvailable), in bytes."""
    for line in Path(root, "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise SwapError(f"no MemAvailable in {Path(root, 'proc/meminfo')}: cannot tell whether swapoff would fit")


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Keep Ctrl-C from leaving swapoff alone half-way; it runs in a session of its own for the same reason."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
