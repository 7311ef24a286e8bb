# SPDX-License-Identifier: MIT
"""Make a mounted zbudfs active swap, in steps that are undone in reverse when one fails.

    losetup --find --show --direct-io=on --sector-size 4096 MOUNTPOINT/swapfile
    check that direct I/O is really on;  queue/rq_affinity = 2;  queue/wbt_lat_usec = 0
    mkswap DEVICE
    swapon --discard[=once] DEVICE          (swap/discard.py)

Direct I/O: otherwise every page would be in the page cache as well, and memory would be needed to free memory.
4096-byte sectors: all requests are whole pages. Discard: the kernel reports the pages that it no longer needs.

A request ends on the CPU where it began (rq_affinity 2): an interrupt there wakes the program that waits for the page.
Otherwise the daemon's CPU ends it, in ksoftirqd, which preempts the daemon. Random page-ins of a swap storm on two cores
go 1.13 to 1.17 times as fast with it. Beside two endless loops the 99th percentile is 0.2 ms instead of 1.0 ms (measured).

No write-back throttling: it holds back just those writes that free memory (a guess about its effect, not measured).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from zbudfs.swap.discard import DEFAULT_DISCARD, SWAPON_OPTIONS, keep_discard
from zbudfs.swap.loop import SWAPFILE, SwapError, loop_devices, run_tool, swaps
from zbudfs.swap.nodes import ensure_free_loop

_STEP_LIMIT_SECONDS: Final = 60.0
"""Longest time one program may take. Arbitrary; mkswap writes one page and swapon discards the whole device."""

_RELEASE_LIMIT_SECONDS: Final = 10.0
"""Longest wait for a loop device to release its file, while udev or blkid look at it. Arbitrary."""

_CLOSE_LIMIT_SECONDS: Final = 2.0
"""Longest wait for a busy `swapfile`: the kernel closes the last file of a loop device a little later. Arbitrary."""

_AS_SWAP: Final = {"rq_affinity": "2", "wbt_lat_usec": "0"}
"""Attributes of a loop device's queue while it is swap."""

_DEFAULTS: Final = {"rq_affinity": "1", "wbt_lat_usec": "-1"}
"""The kernel's, with which it is given back."""


def attach(mountpoint: str, priority: int | None = None, discard: str = DEFAULT_DISCARD, root: str = "/") -> str:
    """Make the swapfile of the zbudfs at `mountpoint` active swap; return the loop device it goes through.

    `priority` is 0 to `MAX_PRIORITY`, None leaves it to the kernel. `discard` is one of `SWAPON_OPTIONS`. `root` holds
    `sys/`, `proc/` and `dev/`. Raises SwapError with everything undone that was done here.
    """
    swapfile = Path(mountpoint, SWAPFILE)
    try:
        regular = stat.S_ISREG(swapfile.stat().st_mode)
    except OSError:
        regular = False
    if not regular:
        raise SwapError(f"there is no {SWAPFILE} in {mountpoint!r}: nothing is mounted there, or its daemon has died")
    _check_alone(swapfile)
    device = _losetup(swapfile)
    try:
        with contextlib.suppress(OSError):  # then the choice is unknown later
            keep_discard(device, discard, root)
        _check_direct_io(device, root)
        _tune(device, root, _AS_SWAP)
        run_tool(["mkswap", device], limit_seconds=_STEP_LIMIT_SECONDS)
        options = [] if priority is None else ["--priority", str(priority)]
        run_tool(["swapon", SWAPON_OPTIONS[discard], *options, device], limit_seconds=_STEP_LIMIT_SECONDS)
    except BaseException:
        with contextlib.suppress(SwapError):  # the first error is the one to report
            _undo(device, root)
        raise
    return device


def _check_alone(swapfile: Path) -> None:
    """Raise SwapError if a program has `swapfile` open for writing: a loop device must be the only writer.

    losetup itself would try again and again, and say 13 seconds later that the device is busy.
    """
    end = time.monotonic() + _CLOSE_LIMIT_SECONDS
    while True:
        try:
            os.close(os.open(swapfile, os.O_RDWR | os.O_CLOEXEC))
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        if time.monotonic() > end:
            raise SwapError(
                f"{str(swapfile)!r} is open for writing: end the program that has it open (see fuser -v), since a loop device"
                " has it alone"
            )
        time.sleep(0.05)


def _losetup(swapfile: Path) -> str:
    """Make a loop device on `swapfile`; return its path."""
    command: list[str | bytes] = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096"]
    number = ensure_free_loop()
    while True:
        try:
            return run_tool([*command, os.fsencode(swapfile)], limit_seconds=_STEP_LIMIT_SECONDS)
        except SwapError:
            before, number = number, ensure_free_loop()
            if number == before:  # another program has not taken the one that had a node
                raise


def _undo(device: str, root: str) -> None:
    """Take `device` down again, whether or not swapon had come to its end."""
    if any(swap.path == device for swap in swaps(root)):
        run_tool(["swapoff", device], limit_seconds=_STEP_LIMIT_SECONDS, own_session=True)
    release(device, root)


def release(device: str, root: str = "/") -> None:
    """Detach the loop device `device` and wait until its file is free. Raises SwapError.

    The kernel detaches later when another program, such as udev, still has the device open: then losetup succeeds, and
    an unmount right after it would find the file busy.
    """
    _tune(device, root, _DEFAULTS)
    with _locked(Path(root, device.lstrip("/"))):
        run_tool(["losetup", "--detach", device], limit_seconds=_STEP_LIMIT_SECONDS)
    end = time.monotonic() + _RELEASE_LIMIT_SECONDS
    while any(loop.path == device for loop in loop_devices(root)):
        if time.monotonic() > end:
            raise SwapError(f"{device} is held open by another program (see fuser -v {device})")
        time.sleep(0.02)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep udev from the device, by the lock that it respects. Wait for a udev that reads the device, for a limited time.

    A read that is under way when the device loses its file would be an I/O error in the kernel's log. systemd describes the
    lock: https://systemd.io/BLOCK_DEVICE_LOCKING.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield  # losetup reports the cause
        return
    end = time.monotonic() + _RELEASE_LIMIT_SECONDS
    try:
        while time.monotonic() < end:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _check_direct_io(device: str, root: str) -> None:
    """losetup only asks for direct I/O: the kernel may fall back without a word."""
    if not any(loop.direct_io for loop in loop_devices(root) if loop.path == device):
        raise SwapError(f"direct I/O is not possible on {device}: swap through the page cache would hang the machine")


def _tune(device: str, root: str, attributes: dict[str, str]) -> None:
    """Set attributes of the device's queue; one that this kernel has not got is left out."""
    for name, value in attributes.items():
        with contextlib.suppress(OSError):
            Path(root, "sys/block", Path(device).name, "queue", name).write_text(value)
