# SPDX-License-Identifier: MIT
"""The pool directory: /run/zbudfs/NAME, a private tmpfs that is never swapped out and outlives the processes.

    /run/zbudfs/NAME/   tmpfs, noswap, limited in size, mode 0700
        lock            flock()ed by the processes of the mount: held as long as one of them lives
        settings.json   what was mounted, for whoever has to clean up
        control         the keeper's socket
        pages frames frametable freeframes blocks board

Without `noswap` (before Linux 6.4), or without the right to mount, the directory is an ordinary one and the memory has no
name: it survives a worker, since the keeper has it mapped, but nothing can be handed to a newer version.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import Final

from zbudfs.service.mountpoint import MountError, escape_path, unmount
from zbudfs.service.settings import Settings, SettingsError

RUN_FOLDER: Final = "/run/zbudfs"
_LONGEST_NAME: Final = 80
"""The address of a socket has 107 bytes, and that of the keeper's is RUN_FOLDER/NAME@9/control."""
_MS_NOSUID: Final = 1 << 1
_MS_NODEV: Final = 1 << 2
_MS_NOEXEC: Final = 1 << 3
_SLACK_BYTES: Final = 16 << 20


class PoolDirectoryError(Exception):
    """The directory cannot be made or is not what it should be; the text is for the user."""


def path_of(mountpoint: str, root: str = RUN_FOLDER) -> str:
    """The pool directory that belongs to a mountpoint."""
    name = escape_path(mountpoint)
    if len(name) > _LONGEST_NAME:
        import hashlib  # only here: hardly ever

        name = f"{name[: _LONGEST_NAME - 33]}-{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]}"
    return f"{root}/{name}"


class PoolDirectoryInUse(PoolDirectoryError):
    """Its processes are alive."""


class PoolDirectory:
    """The directory of one mount. `survives` tells whether it is a tmpfs of its own."""

    def __init__(self, path: str, lock_fd: int, *, survives: bool) -> None:
        self.path = path
        self.survives = survives
        self.lock_fd = lock_fd

    @classmethod
    def create(cls, settings: Settings) -> "PoolDirectory":
        """Make it; PoolDirectoryError if another zbudfs has it. What a dead one has left is taken away first."""
        _private_folder(RUN_FOLDER, 0o755)
        remove_dead(settings.mountpoint)
        # One that is alive may still serve a mount that was taken away from here lazily.
        base = path = path_of(settings.mountpoint)
        number = 0
        while os.path.lexists(path):
            _private_folder(path, 0o700)
            number += 1
            path = f"{base}@{number}"
        _private_folder(path, 0o700)
        survives = _mount_tmpfs(path, settings)
        directory = cls(path, _lock(path), survives=survives)
        Path(path, "settings.json").write_text(settings.to_json())
        return directory

    @classmethod
    def adopt(cls, path: str, lock_fd: int) -> "PoolDirectory":
        """The directory of a mount that runs, whose lock was handed over."""
        return cls(path, lock_fd, survives=True)

    @property
    def memory_folder(self) -> str | None:
        """Where the memory's files go; None: without a name."""
        return self.path if self.survives else None

    def remove(self) -> None:
        """Take it away with all that is in it."""
        os.close(self.lock_fd)
        _remove(self.path)


def _private_folder(path: str, mode: int) -> None:
    try:
        Path(path).mkdir(mode=mode, parents=True, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise PoolDirectoryError(f"the folder {path} cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
        raise PoolDirectoryError(f"{path} must be a directory of root's that nobody else may write to: remove it")


def _mount_tmpfs(path: str, settings: Settings) -> bool:
    # Tables are 8 bytes a page, up to 40 a frame and 1.3 a block; the frames themselves; and some room.
    pages = settings.size_bytes >> 12
    size = settings.pool_bytes + pages * 10 + (settings.pool_bytes >> 12) * 48 + _SLACK_BYTES
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    data = f"size={size},mode=0700,noswap".encode()
    return bool(libc.mount(b"zbudfs-pool", os.fsencode(path), b"tmpfs", flags, data) == 0)


def _lock(path: str) -> int:
    try:
        lock_fd = os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PoolDirectoryError(f"{path}/lock cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock_fd)
        raise PoolDirectoryInUse(f"another zbudfs has {path}") from None
    return lock_fd


def pool_directories(mountpoint: str) -> list[str]:
    """The pool directories of this mountpoint that there are."""
    base = path_of(mountpoint)
    folder, name = os.path.split(base)
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except FileNotFoundError:
        return []
    return sorted(f"{folder}/{found}" for found in names if found == name or found.startswith(f"{name}@"))


def is_held(mountpoint: str) -> bool:
    """Whether a process, or a service manager's store, has the lock of a pool directory of this mountpoint."""
    for path in pool_directories(mountpoint):
        try:
            os.close(_lock(path))
        except PoolDirectoryInUse:
            return True
    return False


def remove_dead(mountpoint: str) -> list[str]:
    """Take away the pool directories that dead processes of a mount have left, and with them all memory that they held.

    Returns the paths of the backing files that they used. One whose processes live is left alone.
    """
    backings = []
    for path in pool_directories(mountpoint):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            continue  # a link is not followed: whoever makes a directory here is told
        try:
            lock_fd = _lock(path)
        except PoolDirectoryInUse:
            continue
        with contextlib.suppress(OSError, SettingsError):
            backing = Settings.from_json(Path(path, "settings.json").read_bytes()).backing
            backings += [backing] if backing is not None else []
        os.close(lock_fd)
        _remove(path)
    return backings


def _remove(path: str) -> None:
    try:
        unmount(path)
    except MountError as error:
        if error.code == errno.EBUSY:
            with contextlib.suppress(MountError):
                unmount(path, lazy=True)
    shutil.rmtree(path, ignore_errors=True)
