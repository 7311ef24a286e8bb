# SPDX-License-Identifier: MIT
"""`zbudfs hibernate` turns swap on zbudfs off before the machine hibernates, and on again afterwards.

For a hibernation the kernel first freezes the daemon, then swaps out to make room for the image. With swap on zbudfs the
machine would hang. systemd/zbudfs-hibernate.service runs both steps. If the first step fails, it changes nothing, and the
machine does not hibernate.

    prepare    check for another swap on a disk -> write the note -> swapoff, if RAM has room -> check for room for the image
    finish     swapon, with the priorities and discards in the note
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from zbudfs.cli.alone import alone
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError
from zbudfs.cli.target import need_root
from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import Mount, shown_path, zbudfs_mounts
from zbudfs.service.settings import ram_bytes
from zbudfs.swap.attach import attach, release
from zbudfs.swap.detach import available_bytes, detach
from zbudfs.swap.discard import DEFAULT_DISCARD, kept_discard
from zbudfs.swap.loop import Swap, SwapError, loop_devices_on, swaps

NOTE: Final = "run/zbudfs.hibernate"
"""File with the swaps that `prepare` turned off: a list of [mountpoint, priority, discard or null]."""


def hibernate(arguments: Arguments) -> int:
    """Do one of the two steps, and return the exit status."""
    need_root("hibernate")
    with ExitStack() as stack:
        for mountpoint in sorted({mount.mountpoint for mount in zbudfs_mounts()}):
            stack.enter_context(alone(f"hibernate {arguments.step}", mountpoint))
        return prepare() if arguments.step == "prepare" else finish()


def prepare() -> int:
    """Turn off the swap on all zbudfs mounts. Raises CommandError and SwapError, with nothing changed."""
    mounts = zbudfs_mounts()
    devices = {loop.path: mount for mount in mounts for loop in loop_devices_on(mount.mountpoint, mount.st_dev)}
    active = swaps()
    mine = [swap for swap in active if swap.path in devices]
    if not mine:
        return 0
    if not image_places([swap for swap in active if swap.path not in devices]):
        raise CommandError(
            "this machine cannot hibernate: there is no swap for the image, since zbudfs cannot hold it; add a swap"
            " partition or a swap file on a disk"
        )
    wanted: dict[str, Mount] = {devices[swap.path].mountpoint: devices[swap.path] for swap in mine}
    note = Path("/", NOTE)
    noted = [(devices[swap.path].mountpoint, swap.priority, kept_discard(swap.path)) for swap in mine]
    note.write_text(json.dumps(noted))
    try:
        detach([(mount.mountpoint, mount.st_dev) for mount in wanted.values()])
        check_image_room(image_places(swaps()), image_room_bytes())
    except SwapError as error:
        finish()
        raise SwapError(f"this machine cannot hibernate: {error}") from None
    return 0


def image_places(others: list[Swap]) -> list[Swap]:
    """Return the swaps that can hold a hibernation image: neither memory, nor a file behind a loop device."""
    return [swap for swap in others if not swap.path.startswith(("/dev/zram", "/dev/loop", "/dev/ram"))]


def check_image_room(places: list[Swap], needed: int) -> None:
    """Raise SwapError if the swaps on a disk have less than `needed` bytes free. Pages that were on zbudfs may be there now.

    systemd has looked at the free swap as well, but before zbudfs turned its swap off.
    """
    free = sum(swap.size_bytes - swap.used_bytes for swap in places)
    if needed > free:
        raise SwapError(
            f"memory and image need some {format_size(needed)} of swap on a disk, and {format_size(free)} is free after the"
            " pages of zbudfs have come back; end some programs, or add swap on a disk"
        )


def image_room_bytes(root: str = "/") -> int:
    """Return the swap that the kernel will need on a disk, in bytes.

    The kernel swaps out until the rest of the used memory fits into /sys/power/image_size. It writes this rest as the
    image. A compression of 2 : 1 is assumed for the image.
    """
    ram = ram_bytes(root)
    used = ram - available_bytes(root)
    try:
        image = int(Path(root, "sys/power/image_size").read_text())
    except OSError:
        image = ram * 2 // 5  # the kernel's default
    return used - min(used, image) // 2


def finish() -> int:
    """Turn on again each swap that `prepare` turned off. Return 1 if one of them fails."""
    note = Path("/", NOTE)
    try:
        noted = json.loads(note.read_text())
    except FileNotFoundError:
        return 0
    mounts = {mount.mountpoint: mount for mount in zbudfs_mounts()}
    active = {swap.path for swap in swaps()}
    failed = 0
    for mountpoint, priority, discard in noted:
        mount = mounts.get(mountpoint)
        loops = [] if mount is None else loop_devices_on(mountpoint, mount.st_dev)
        if mount is None or any(loop.path in active for loop in loops):
            continue
        try:
            for loop in loops:  # left by a swapoff that failed halfway
                release(loop.path)
            attach(mountpoint, priority if priority >= 0 else None, discard or DEFAULT_DISCARD)
        except SwapError as error:
            failed = 1
            print(f"zbudfs: swap on {shown_path(mountpoint)} stays off: {error}", file=sys.stderr)
    note.unlink(missing_ok=True)
    return failed
