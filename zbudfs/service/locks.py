# SPDX-License-Identifier: MIT
"""Locks on a mountpoint, which are free once their holder has ended for any reason: files that are locked with flock(2).

    /run/zbudfs/.commands/NAME     only one command at a time changes a mountpoint (cli/alone.py)
    /run/zbudfs/.mounting/NAME     only one daemon at a time starts on it (service/daemon.py)

NAME is that of the pool directory. No pool directory has a name that begins with a dot, so no lock looks like one. The file
has a few words about its holder, for messages. The last holder removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Final

from zbudfs.service.mountpoint import MountError, shown_path
from zbudfs.service.pooldir import RUN_FOLDER, path_of, private_folder

COMMANDS: Final = ".commands"
MOUNTING: Final = ".mounting"
_LONGEST_WORDS: Final = 200


class LockHeld(Exception):
    """Another process has the lock; `holder` describes that process, as far as it is known."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class MountpointLock:
    """A lock that this process holds."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self.fd = fd

    @classmethod
    def take(cls, kind: str, mountpoint: str, holder: str, *, shared: bool = False) -> MountpointLock:
        """Take a lock without waiting. `kind` is COMMANDS or MOUNTING; `holder` describes this process to others.

        Raises LockHeld, and PoolDirectoryError if the folder cannot be used.
        """
        private_folder(RUN_FOLDER, 0o755)
        private_folder(f"{RUN_FOLDER}/{kind}", 0o700)
        path = _path(kind, mountpoint)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                words = os.pread(fd, _LONGEST_WORDS, 0).decode("utf-8", "replace")
                os.close(fd)
                raise LockHeld(words) from None
            if _is_at(path, fd):
                break
            os.close(fd)  # its last holder has just removed it
        os.ftruncate(fd, 0)
        os.pwrite(fd, holder.encode("utf-8", "replace"), 0)
        return cls(path, fd)

    def release(self) -> None:
        """Free the lock, and remove its file unless another process shares it."""
        with contextlib.suppress(OSError):
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(self._path, self.fd):
                os.unlink(self._path)
        os.close(self.fd)


def who_comes_up(mountpoint: str) -> str | None:
    """Return a description of the daemon that starts on `mountpoint`; None if there is none."""
    if not os.path.lexists(_path(MOUNTING, mountpoint)):
        return None
    try:
        MountpointLock.take(MOUNTING, mountpoint, "", shared=True).release()
    except LockHeld as error:
        return error.holder
    return None


def _path(kind: str, mountpoint: str) -> str:
    return f"{RUN_FOLDER}/{kind}/{os.path.basename(path_of(mountpoint))}"


def _is_at(path: str, fd: int) -> bool:
    """Return whether the open file `fd` is the file at `path`."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


@contextlib.contextmanager
def coming_up(mountpoint: str) -> Iterator[None]:
    """Keep other daemons from starting on `mountpoint` in this block. Raises MountError if one is starting already."""
    try:
        lock = MountpointLock.take(MOUNTING, mountpoint, f"pid {os.getpid()}")
    except LockHeld as error:
        raise MountError(
            f"another zbudfs ({error.holder}) is being mounted on {shown_path(mountpoint)}: see zbudfs status"
        ) from None
    try:
        yield
    finally:
        lock.release()
