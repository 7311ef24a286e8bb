# SPDX-License-Identifier: MIT
"""The removal of a mount: for `umount`, for `swapoff --umount`, and after a failure of `mount` or `swapon`."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from zbudfs.cli import stripe
from zbudfs.cli.ask import once_more_if_stale
from zbudfs.cli.errors import CommandError
from zbudfs.cli.target import refuse_users
from zbudfs.service.mountpoint import Mount, MountError, is_dead, shown_path, unmount
from zbudfs.service.pooldir import pool_directories, remove_dead
from zbudfs.service.settings import default_backing
from zbudfs.store.claim import empty_left
from zbudfs.swap.detach import detach
from zbudfs.swap.loop import users

END_LIMIT_SECONDS: Final = 60.0
"""Longest wait for a daemon to end after its unmount. Arbitrary: long, since the daemon may wait for the disk."""

_SIGNAL_AFTER_SECONDS: Final = 2.0
"""Time in which the daemon may notice the unmount by itself; then it gets SIGTERM. Arbitrary."""

_LOOK_SECONDS: Final = 0.02

_BUSY_LIMIT_SECONDS: Final = 2.0
"""Time for which EBUSY is tried again: a loop device closes its file a little later. Arbitrary."""


def take_all_down(mountpoint: str, mounts: Sequence[Mount]) -> None:
    """Unmount all instances of a mountpoint, as `take_down` does.

    Raises CommandError, with nothing changed, while swap or a loop device is on one of them.
    """
    if len(mounts) > 1:
        refuse_users(mountpoint, mounts, f"is in use: {{}}; run zbudfs swapoff {shown_path(mountpoint)} first")
    for mounted in mounts:
        take_down(mounted)
        if mounted.mountpoint != mountpoint:
            stripe.remove_folder(mounted.mountpoint)


def take_down(mounted: Mount) -> None:
    """Unmount, and return when the daemon has ended and its backing file is empty.

    A mount whose daemon has died is removed with its swap and its loop devices. For a live mount, raises CommandError, with
    nothing changed, while swap or a loop device is on it.
    """
    mountpoint = mounted.mountpoint
    shown = shown_path(mountpoint)
    if is_dead(mountpoint):
        _clean_up_dead(mounted)
        return
    daemon = _Daemon(mountpoint)
    try:
        if here := users(mountpoint, mounted.st_dev):
            raise CommandError(f"{shown} is in use: {', '.join(here)}; run zbudfs swapoff {shown} first")
        _unmount_when_idle(mountpoint)
        daemon.wait_for_end()
    finally:
        daemon.close()
    _remove_remains(mountpoint)  # there are remains only if the keeper died before its worker


class _Daemon:
    """The processes of a live mount, with two signs of their end: the keeper's pid, and the lock of the pool directory.

    The pid works in the keeper's own PID namespace only: a process that is invisible from here may still run. The lock is
    free when all processes have ended, in whichever namespace they run.
    """

    def __init__(self, mountpoint: str) -> None:
        """Open a pidfd and the lock file. Raises CommandError if both are out of reach from here."""
        self._shown = shown_path(mountpoint)
        pid = int(once_more_if_stale(Path(mountpoint, "stats/pid").read_text))
        folder = once_more_if_stale(Path(mountpoint, "stats/pool_directory").read_text).removesuffix("\n")
        self._pidfd = _open_process(pid)
        self._lock_fd: int | None = None
        with suppress(OSError):
            self._lock_fd = os.open(f"{folder}/lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if self._pidfd is None and self._lock_fd is None:
            raise CommandError(
                f"the daemon of {self._shown} runs in another container or namespace, where this command cannot see its"
                " end: run the command in the container or namespace in which the mount was made"
            )

    def wait_for_end(self) -> None:
        """Wait until the daemon has ended. Raises CommandError after END_LIMIT_SECONDS.

        A worker without a keeper does not see the unmount while another mount namespace holds the mount. It gets SIGTERM.
        """
        began = time.monotonic()
        signalled = False
        while (waited := time.monotonic() - began) < END_LIMIT_SECONDS:
            if self._has_ended(_LOOK_SECONDS):
                return
            if self._pidfd is not None and waited > _SIGNAL_AFTER_SECONDS and not signalled:
                signalled = True
                if _shares_mounts(self._pidfd):
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
            if self._lock_is_free():
                self._has_ended(_BUSY_LIMIT_SECONDS)  # the keeper itself ends a little later
                return
        raise CommandError(
            f"{self._shown} is unmounted, but its daemon has not ended within {END_LIMIT_SECONDS:g} s:"
            " its backing file may not be empty yet; look for its processes with ps, and at its disk (dmesg)"
        )

    def _has_ended(self, limit_seconds: float) -> bool:
        if self._pidfd is None:
            time.sleep(min(limit_seconds, _LOOK_SECONDS))
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(limit_seconds * 1000))

    def _lock_is_free(self) -> bool:
        if self._lock_fd is None:
            return False
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self._pidfd, self._lock_fd):
            if fd is not None:
                os.close(fd)


def _open_process(pid: int) -> int | None:
    """Return a pidfd of the daemon's process `pid`; None if no process has that pid here, or another program has it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    with suppress(OSError):
        if b"zbudfs.service.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pidfd
    os.close(pidfd)
    return None


def _unmount_when_idle(mountpoint: str) -> None:
    """Unmount. If the mount stays busy but no process has the swapfile open, unmount lazily."""
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


def _shares_mounts(pidfd: int) -> bool:
    """Return whether a process is in the mount namespace of this process, so that it sees the unmount."""
    with suppress(OSError):
        facts = Path(f"/proc/self/fdinfo/{pidfd}").read_text().split()
        pid = int(facts[facts.index("Pid:") + 1])
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")  # noqa: PTH115
    return False


def _clean_up_dead(mounted: Mount) -> None:
    """Remove the remains of dead processes: swap, loop devices, mount, memory, and the content of the backing file.

    The swapped pages are lost. The kernel ends the programs that need them.
    """
    mountpoint = mounted.mountpoint
    detach([(mountpoint, mounted.st_dev)], force=True)
    # No process can use the mount any more, so it is unmounted lazily, even with open files.
    unmount(mountpoint, lazy=True)
    if not _remove_remains(mountpoint):
        _empty(default_backing(mountpoint))


def _remove_remains(mountpoint: str) -> bool:
    """Remove the memory and the content of backing files that dead processes have left. Return whether there was any."""
    end = time.monotonic() + _BUSY_LIMIT_SECONDS
    found = False
    while left := pool_directories(mountpoint):
        found = True
        for backing in remove_dead(mountpoint):
            _empty(backing)
        if pool_directories(mountpoint) == left and time.monotonic() > end:
            break  # its processes live: they serve a mount that was unmounted lazily
        time.sleep(0.02)  # a standby ends a little later than its keeper
    return found


def _empty(backing: str) -> None:
    """Empty a backing that no daemon has claimed. A file that is no backing is left alone, even if the remains name it."""
    try:
        empty_left(backing)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ELOOP):  # claimed by a new daemon, which empties it; or a link
            raise
