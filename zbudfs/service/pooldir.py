# SPDX-License-Identifier: MIT
"""The pool directory: /run/zbudfs/NAME, a private tmpfs that is never swapped out and outlives the processes.

    /run/zbudfs/.lock   locked while a directory is made or removed
    /run/zbudfs/NAME/   tmpfs, noswap, limited in size, mode 0700
        lock            locked with flock(2) by the processes of the mount, as long as one of them lives
        serving         record locks: which processes live, and which one serves (service/roster.py)
        settings.json   the settings of the mount, for a command that cleans up
        control         the keeper's socket
        pages frames frametable freeframes blocks board

Without `noswap` (before Linux 6.4), or without the right to mount, the directory is an ordinary one and the memory has no
name. The memory survives a worker, since the keeper has it mapped, but cannot be handed to a newer version.
"""

import contextlib
import ctypes
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from typing import Final

from zbudfs.core.errors import Failed
from zbudfs.service import public
from zbudfs.service.footprint import memory_sizes
from zbudfs.service.mountpoint import MountError, escape_path, unmount
from zbudfs.service.roster import FILE_NAME, Roster
from zbudfs.service.settings import Settings, SettingsError
from zbudfs.store.files import read_bytes, write_text

RUN_FOLDER: Final = "/run/zbudfs"
_LONGEST_NAME: Final = 80
"""Longest name. The address of a socket has 107 bytes, and the keeper's is RUN_FOLDER/NAME@9/control."""
_MS_NOSUID: Final = 1 << 1
_MS_NODEV: Final = 1 << 2
_MS_NOEXEC: Final = 1 << 3
_SLACK_BYTES: Final = 16 << 20
"""Room beyond the tables: for settings, the rounding of files up to a page of the kernel, and files of later versions."""
_TURN_SECONDS: Final = 30.0
"""Longest wait for another process that makes or removes a directory. Arbitrary: it may have a large tmpfs to free."""


class PoolDirectoryError(Failed):
    """The directory cannot be made, or is not as expected; the text is for the user."""


def path_of(mountpoint: str, root: str = RUN_FOLDER) -> str:
    """Return the path of the pool directory of a mountpoint."""
    name = escape_path(mountpoint)
    if len(name) > _LONGEST_NAME:
        import hashlib  # imported here, since such names are rare

        name = f"{name[: _LONGEST_NAME - 33]}-{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]}"
    return f"{root}/{name}"


class PoolDirectoryInUse(PoolDirectoryError):
    """The processes of the directory are alive."""


class PoolDirectory:
    """The directory of one mount. `survives` is whether it is a tmpfs of its own."""

    def __init__(self, path: str, lock_fd: int, roster: Roster, *, survives: bool) -> None:
        self.path = path
        self.survives = survives
        self.lock_fd = lock_fd
        self.roster = roster

    @classmethod
    def create(cls, settings: Settings) -> "PoolDirectory":
        """Make the directory; PoolDirectoryError if another zbudfs has it. A directory of dead processes is removed first."""
        private_folder(RUN_FOLDER, 0o755)
        with _own_turn():
            _remove_dead(settings.mountpoint)
            # A live process may still serve a mount that was detached from this path: its directory stays.
            base = path = path_of(settings.mountpoint)
            number = 0
            while os.path.lexists(path):
                private_folder(path, 0o700)
                number += 1
                path = f"{base}@{number}"
            private_folder(path, 0o700)
            survives = _mount_tmpfs(path, settings)
            with contextlib.suppress(OSError):  # the keeper reports why there are no public statistics
                public.make_folder(path)
            lock_fd = _lock(path)
            write_text(f"{path}/settings.json", settings.to_json())
        return cls(path, lock_fd, _roster(path), survives=survives)

    @classmethod
    def adopt(cls, path: str, lock_fd: int) -> "PoolDirectory":
        """Return the directory of a running mount, whose lock was handed over. PoolDirectoryError."""
        return cls(path, lock_fd, _roster(path), survives=True)

    @property
    def memory_folder(self) -> str | None:
        """The folder of the memory's files; None: the memory has no name."""
        return self.path if self.survives else None

    def remove(self) -> None:
        """Remove the directory with its content. The lock is held until it is gone."""
        try:
            _remove(self.path)
        finally:
            os.close(self.lock_fd)
            self.roster.close()


@contextlib.contextmanager
def _own_turn() -> Iterator[None]:
    """Keep other processes from making or removing directories in this block. PoolDirectoryError if that takes too long."""
    path = f"{RUN_FOLDER}/.lock"
    try:
        turn_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PoolDirectoryError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        end = time.monotonic() + _TURN_SECONDS
        while True:
            try:
                fcntl.flock(turn_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise PoolDirectoryError(
                        f"another process has held {path} for {_TURN_SECONDS:g} s: find it with fuser {path}"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(turn_fd)


def _roster(path: str) -> Roster:
    try:
        return Roster(path)
    except OSError as error:
        raise PoolDirectoryError(f"{path}/{FILE_NAME} cannot be opened: {error.strerror}") from None


def private_folder(path: str, mode: int) -> None:
    """Make a folder that only root may write to, or check that it is one. PoolDirectoryError."""
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise PoolDirectoryError(f"the folder {path} cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
        raise PoolDirectoryError(f"{path} must be a directory of root's that no other user may write to: remove it")


def _mount_tmpfs(path: str, settings: Settings) -> bool:
    # Twice the need: a monitor of full disks would report a filesystem that is full by design.
    size = 2 * (memory_sizes(settings).total_bytes + _SLACK_BYTES)
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
    if not _is_still(lock_fd, f"{path}/lock"):
        os.close(lock_fd)
        raise PoolDirectoryInUse(f"another process has removed {path} meanwhile")
    return lock_fd


def _is_still(fd: int, path: str) -> bool:
    """Return whether the open file `fd` is the file at `path`: a mount may cover its directory, or it may be removed."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False


def pool_directories(mountpoint: str) -> list[str]:
    """Return the existing pool directories of this mountpoint."""
    base = path_of(mountpoint)
    folder, name = os.path.split(base)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(f"{folder}/{found}" for found in names if found == name or found.startswith(f"{name}@"))


def is_held(mountpoint: str) -> bool:
    """Return whether a process, or a service manager's store, has the lock of a pool directory of this mountpoint."""
    return any(map(is_locked, pool_directories(mountpoint)))


def is_locked(path: str) -> bool:
    """Return whether a process, or a service manager's store, has the lock of the pool directory `path`."""
    try:
        os.close(_lock(path))
    except PoolDirectoryInUse:
        return True
    return False


def remove_dead(mountpoint: str) -> list[str]:
    """Remove the pool directories that dead processes of a mount have left, and so free all their memory.

    Returns the paths of the backing files that they used. A directory whose processes live is left alone.
    """
    if not pool_directories(mountpoint):
        return []
    with _own_turn():
        return _remove_dead(mountpoint)


def _remove_dead(mountpoint: str) -> list[str]:
    backings = []
    for path in pool_directories(mountpoint):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            continue  # a link is not followed: to make a directory here is an error then
        try:
            lock_fd = _lock(path)
        except PoolDirectoryInUse:
            continue
        try:
            with contextlib.suppress(OSError, SettingsError):
                backing = Settings.from_json(read_bytes(f"{path}/settings.json")).backing
                backings += [backing] if backing is not None else []
            _remove(path)
        finally:
            os.close(lock_fd)
    return backings


def _remove(path: str) -> None:
    """Remove a directory whose lock this process holds. The unmount is lazy, since the lock's file is open there."""
    public.remove(path)
    with contextlib.suppress(MountError):
        unmount(path, lazy=True)
    import shutil  # imported when the mount ends, so that it is not in the daemon's locked memory

    shutil.rmtree(path, ignore_errors=True)
