# SPDX-License-Identifier: MIT
"""`zbudfs hibernate`: swap on zbudfs off before the machine hibernates, and on again afterwards.

The kernel freezes the daemon before it makes room for the image, which swaps out: with swap on zbudfs the machine hangs.
systemd/zbudfs-hibernate.service runs both steps. Nothing is changed where the first one fails, and the machine does not
hibernate then.

    prepare    another swap for the image? -> note the swaps -> swapoff, if there is room
    finish     swapon, with the priorities of before
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from zbudfs.cli.alone import alone
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.target import CommandError, need_root
from zbudfs.service.mountpoint import Mount, shown_path, zbudfs_mounts
from zbudfs.swap.attach import attach, release
from zbudfs.swap.detach import detach
from zbudfs.swap.loop import Swap, SwapError, loop_devices_on, swaps

NOTE: Final = "run/zbudfs.hibernate"
"""What `prepare` took off: a list of [mountpoint, priority]."""


def hibernate(arguments: Arguments) -> int:
    """Do one of the two steps; the exit status."""
    need_root("hibernate")
    with ExitStack() as stack:
        for mountpoint in sorted({mount.mountpoint for mount in zbudfs_mounts()}):
            stack.enter_context(alone(f"hibernate {arguments.step}", mountpoint))
        return prepare() if arguments.step == "prepare" else finish()


def prepare() -> int:
    """Take swap on all zbudfs off. CommandError, SwapError; then all is as it was."""
    mounts = zbudfs_mounts()
    devices = {loop.path: mount for mount in mounts for loop in loop_devices_on(mount.mountpoint, mount.st_dev)}
    active = swaps()
    mine = [swap for swap in active if swap.path in devices]
    if not mine:
        return 0
    if not image_places([swap for swap in active if swap.path not in devices]):
        raise CommandError(
            "this machine cannot hibernate: there is no swap for the image besides zbudfs, which cannot hold it; add a"
            " swap partition or a swap file on a disk"
        )
    wanted: dict[str, Mount] = {devices[swap.path].mountpoint: devices[swap.path] for swap in mine}
    note = Path("/", NOTE)
    note.write_text(json.dumps([[devices[swap.path].mountpoint, swap.priority] for swap in mine]))
    try:
        detach([(mount.mountpoint, mount.st_dev) for mount in wanted.values()])
    except SwapError as error:
        finish()
        raise SwapError(f"this machine cannot hibernate: {error}") from None
    return 0


def image_places(others: list[Swap]) -> list[Swap]:
    """Return the swaps that can hold a hibernation image: not memory, and not a file behind a loop device."""
    return [swap for swap in others if not swap.path.startswith(("/dev/zram", "/dev/loop", "/dev/ram"))]


def finish() -> int:
    """Put back what `prepare` took off; 1 if any of it cannot be."""
    note = Path("/", NOTE)
    try:
        noted = json.loads(note.read_text())
    except FileNotFoundError:
        return 0
    mounts = {mount.mountpoint: mount for mount in zbudfs_mounts()}
    active = {swap.path for swap in swaps()}
    failed = 0
    for mountpoint, priority in noted:
        mount = mounts.get(mountpoint)
        loops = [] if mount is None else loop_devices_on(mountpoint, mount.st_dev)
        if mount is None or any(loop.path in active for loop in loops):
            continue
        try:
            for loop in loops:  # of a swapoff that failed on its way
                release(loop.path)
            attach(mountpoint, priority if priority >= 0 else None)
        except SwapError as error:
            failed = 1
            print(f"zbudfs: swap on {shown_path(mountpoint)} is off: {error}", file=sys.stderr)
    note.unlink(missing_ok=True)
    return failed
