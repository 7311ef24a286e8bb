# SPDX-License-Identifier: MIT
"""Taking a mount away: `umount`, the end of `swapoff --umount`, and the way back where `mount` or `swapon` fails."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from zbudfs.cli import stripe
from zbudfs.cli.ask import once_more_if_stale
from zbudfs.cli.target import CommandError, refuse_users
from zbudfs.service.mountpoint import Mount, MountError, shown_path, unmount
from zbudfs.service.pooldir import pool_directories, remove_dead
from zbudfs.service.settings import default_backing
from zbudfs.store.backing import MAGIC
from zbudfs.swap.detach import detach
from zbudfs.swap.loop import users

END_LIMIT_SECONDS: Final = 60.0
"""Longest wait for a daemon to end after its unmount. Arbitrary, and generous: it may have to wait for the disk."""

_TELL_AFTER_SECONDS: Final = 2.0
"""How long the daemon may take to notice the unmount, before it is told. Arbitrary."""

_BUSY_LIMIT_SECONDS: Final = 2.0
"""How long "busy" is not believed. Arbitrary: closing the last file of a loop device is finished a little later."""


def take_all_down(mountpoint: str, mounts: Sequence[Mount]) -> None:
    """Unmount all instances of a mountpoint, as `take_down` does; none while swap or a loop device is on any of them."""
    if len(mounts) > 1:
        refuse_users(mountpoint, mounts, f"is in use: {{}}; run zbudfs swapoff {shown_path(mountpoint)} first")
    for mounted in mounts:
        take_down(mounted)
        if mounted.mountpoint != mountpoint:
            stripe.remove_folder(mounted.mountpoint)


def take_down(mounted: Mount) -> None:
    """Unmount, and return when the daemon has ended and its backing file is empty.

    A mount whose daemon has died is taken away as well. Raises CommandError, with nothing changed, while swap or a
    loop device is on it.
    """
    mountpoint = mounted.mountpoint
    shown = shown_path(mountpoint)
    pidfd = _open_daemon(mountpoint)
    if pidfd is None:
        _clean_up_dead(mounted)
        return
    if here := users(mountpoint, mounted.st_dev):
        os.close(pidfd)
        raise CommandError(f"{shown} is in use: {', '.join(here)}; run zbudfs swapoff {shown} first")
    try:
        _unmount_when_idle(mountpoint)
        _wait_for_end(pidfd, shown)
    finally:
        os.close(pidfd)
    _remove_remains(mountpoint)  # there are none, unless the keeper had died before its worker


def _open_daemon(mountpoint: str) -> int | None:
    """Return a file descriptor that becomes readable when the daemon ends; None if it has ended."""
    try:
        return os.pidfd_open(int(once_more_if_stale(Path(mountpoint, "stats/pid").read_text)))
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return None
        raise


def _unmount_when_idle(mountpoint: str) -> None:
    """Unmount; a mount on which nobody has the swapfile open leaves the tree although a process stands in it."""
    end = time.monotonic() + _BUSY_LIMIT_SECONDS
    while True:
        try:
            unmount(mountpoint)
            return
        except MountError as error:
            if error.code != errno.EBUSY:
                raise
            if time.monotonic() > end:
                if int(once_more_if_stale(Path(mountpoint, "stats/open_swapfiles").read_text)):
                    raise
                unmount(mountpoint, lazy=True)
                return
        time.sleep(0.05)


def _wait_for_end(pidfd: int, shown: str) -> None:
    """Wait for the daemon's end; a worker without a keeper does not see the unmount while somebody holds the mount."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(_TELL_AFTER_SECONDS * 1000):
        return
    if _shares_mounts(pidfd):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    if not poll.poll(END_LIMIT_SECONDS * 1000):
        raise CommandError(
            f"{shown} is unmounted, but its daemon has not ended within {END_LIMIT_SECONDS:g} s:"
            " its backing file may not be empty yet"
        )


def _shares_mounts(pidfd: int) -> bool:
    """Return whether a process is in this process's mount namespace: what is unmounted here is unmounted there."""
    with contextlib.suppress(OSError):
        facts = Path(f"/proc/self/fdinfo/{pidfd}").read_text().split()
        pid = int(facts[facts.index("Pid:") + 1])
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")  # noqa: PTH115
    return False


def _clean_up_dead(mounted: Mount) -> None:
    """Take away what dead processes have left: swap, loop devices, mount, memory, and the content of the backing file.

    What was swapped out is gone with them; programs that need it are ended by the kernel.
    """
    mountpoint = mounted.mountpoint
    detach([(mountpoint, mounted.st_dev)], force=True)
    # Nobody can use what is on it any more: the mount leaves the tree although files are still open.
    unmount(mountpoint, lazy=True)
    if not _remove_remains(mountpoint):
        _empty(default_backing(mountpoint))


def _remove_remains(mountpoint: str) -> bool:
    """Take away memory and content of backing files that processes which are gone have not; whether there was any."""
    end = time.monotonic() + _BUSY_LIMIT_SECONDS
    found = False
    while left := pool_directories(mountpoint):
        found = True
        for backing in remove_dead(mountpoint):
            _empty(backing)
        if pool_directories(mountpoint) == left and time.monotonic() > end:
            break  # its processes live: it serves a mount that was taken away lazily
        time.sleep(0.02)  # a standby ends a little later than its keeper
    return found


def _empty(backing: str) -> None:
    """Empty a backing file that nobody has locked. What is not one is left alone, whatever the remains call it."""
    try:
        fd = os.open(backing, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.pread(fd, len(MAGIC), 0) not in (MAGIC, b""):
            return
        os.ftruncate(fd, 0)
    except BlockingIOError:
        pass  # a new daemon's by now, which empties what it finds
    finally:
        os.close(fd)
