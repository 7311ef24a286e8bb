# SPDX-License-Identifier: MIT
"""The discards of swap: whether the kernel reports freed pages, or only empties the whole device at swapon.

    pages   swapon --discard         the whole device, then each cluster of freed pages
    once    swapon --discard=once    the whole device, and nothing later

The kernel does not report which discards a swap has. So `attach` writes the choice into the loop device, as `lo_file_name`
of loop(4). Otherwise that is the path of the file, which programs read in /sys/block. The choice stays until the device is
detached, also if another program turns the swap off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from zbudfs.swap.loop import loop_devices_on, loop_status

SWAPON_OPTIONS: Final = {"pages": "--discard", "once": "--discard=once"}
"""The choices, each with its option of swapon(8)."""

DEFAULT_DISCARD: Final = "pages"

_NAME: Final = slice(56, 120)
"""Place of `lo_file_name` in `struct loop_info64`."""

_PREFIX: Final = b"zbudfs-discard="


def keep_discard(device: str, discard: str, root: str = "/") -> None:
    """Write the choice into a loop device. Raises OSError."""
    status = bytearray(loop_status(device, root))
    status[_NAME] = (_PREFIX + discard.encode()).ljust(_NAME.stop - _NAME.start, b"\0")
    loop_status(device, root, bytes(status))


def kept_discard(device: str, root: str = "/") -> str | None:
    """Return the choice in a loop device; None if it has none, or if the user may not read it."""
    try:
        name = loop_status(device, root)[_NAME]
    except OSError:
        return None
    return next((each for each in SWAPON_OPTIONS if name.rstrip(b"\0") == _PREFIX + each.encode()), None)


def discard_of(mounts: Sequence[tuple[str, int | None]]) -> str:
    """Return the first choice that the loop devices on the mounts (mountpoint, st_dev) have, or else the default."""
    devices = [loop.path for mountpoint, st_dev in mounts for loop in loop_devices_on(mountpoint, st_dev)]
    return next(filter(None, map(kept_discard, devices)), DEFAULT_DISCARD)
