# SPDX-License-Identifier: MIT
"""What an earlier keeper of a service has left, for the one that is started in its place.

    descriptors    from the service manager's store, or else out of the worker that serves on (pidfd_getfd)
    memory         the pool directory: the lock's descriptor tells its path
    processes      a worker that serves, a standby that would take over: whoever has the lock open

Three cases, and one way for all of them: the keeper was stopped or killed and its worker serves on; all of them are dead;
the mount itself is gone and only descriptors are left, which is nothing to go on with.

A fourth: the worker serves on, and its memory has no name by which it could be mapped (before Linux 6.4). Then nothing is
touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zbudfs.service.mountpoint import find_mount, is_connected
from zbudfs.service.pooldir import RUN_FOLDER, PoolDirectory, pool_directories
from zbudfs.service.settings import Settings, SettingsError
from zbudfs.store.board import Field

NAMES: Final = ("fuse", "lock", "backing")
"""Of the descriptors in the store; the last is there only if there is a backing file."""

END_LIMIT_SECONDS: Final = 60.0
"""How long a killed worker may take to be gone: it may be in the middle of a write to a slow disk. Arbitrary."""

_DAEMON: Final = b"zbudfs.service.daemon"
_SYS_PIDFD_GETFD: Final = 438


@dataclass(frozen=True, slots=True)
class Remains:
    """A mount without a keeper."""

    folder: str
    """The pool directory."""
    descriptors: list[int]
    """Connection, lock and, if there is one, backing file."""
    settings: Settings
    born_ns: int
    pidfds: list[int]
    """Of the processes that are left: a worker that serves, a standby."""

    def end(self) -> None:
        """Kill who is left and wait until they are gone, with all their threads. TimeoutError."""
        for pidfd in self.pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        end = time.monotonic() + END_LIMIT_SECONDS
        for pidfd in self.pidfds:
            if not select.select([pidfd], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"a worker has not ended within {END_LIMIT_SECONDS:g} s after it was killed")
            os.close(pidfd)


def find(stored: dict[str, int], mountpoint: str | None) -> Remains | None:
    """Return what is left of the service whose descriptors the manager has `stored`, or of the mount at `mountpoint`.

    None if there is nothing to go on with; then the descriptors are closed.
    """
    remains = _from_descriptors(stored)
    if remains is None:
        _drop(stored)
        for folder in pool_directories(mountpoint) if mountpoint is not None else ():
            remains = remains or _from_worker(folder)
    return remains


def is_served(mountpoint: str) -> bool:
    """Whether the mount at `mountpoint` is there, and somebody alive who has one of its pool directories."""
    if find_mount(mountpoint) is None:
        return False
    for folder in pool_directories(mountpoint):
        with contextlib.suppress(OSError):
            lock_fd = os.open(f"{folder}/lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if _is_held(lock_fd):
                    return True
            finally:
                os.close(lock_fd)
    return False


def _from_descriptors(found: dict[str, int]) -> Remains | None:
    """None unless the mount is there, and its memory."""
    if "fuse" not in found or "lock" not in found or not is_connected(found["fuse"]):
        return None
    path, name = os.path.split(os.readlink(f"/proc/self/fd/{found['lock']}"))  # noqa: PTH115
    try:
        settings = Settings.from_json(Path(path, "settings.json").read_bytes())
        born_ns = board_field(path, Field.BORN_NS)
    except (OSError, SettingsError, struct.error):
        return None
    if name != "lock" or (settings.backing is not None) != ("backing" in found):
        return None
    os.set_blocking(found["fuse"], False)
    wanted = [found[name] for name in NAMES if name in found]
    return Remains(path, wanted, settings, born_ns, _holders(found["lock"]))


def _drop(stored: dict[str, int]) -> None:
    """Let go of descriptors that are of no use, and of the memory of a mount that is gone."""
    lock_fd = stored.pop("lock", None)
    held = lock_fd is not None and _is_held(lock_fd)
    served = held and "fuse" in stored and is_connected(stored["fuse"])
    if "backing" in stored and not served:
        fcntl.flock(stored["backing"], fcntl.LOCK_UN)  # for the manager's copy as well, which is closed some time later
    for fd in stored.values():
        os.close(fd)
    if lock_fd is None:
        return
    folder = os.path.dirname(os.readlink(f"/proc/self/fd/{lock_fd}"))  # noqa: PTH115, PTH120
    if os.path.dirname(folder) == RUN_FOLDER and not held:  # noqa: PTH120
        PoolDirectory.adopt(folder, lock_fd).remove()
    else:
        os.close(lock_fd)


def _from_worker(folder: str) -> Remains | None:
    """Take copies of the descriptors of the worker that serves this pool directory, if its keeper is gone."""
    try:
        pid, keeper = board_field(folder, Field.WORKER_PID), board_field(folder, Field.KEEPER_PID)
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError, struct.error):
        return None
    taken: dict[str, int] = {}
    try:
        if not _has_open(pid, os.stat(f"{folder}/lock")) or _has_open(keeper, os.stat(f"{folder}/lock")):  # noqa: PTH116
            return None
        for name, field in zip(NAMES, (Field.FUSE_FD, Field.LOCK_FD, Field.BACKING_FD), strict=True):
            if number := board_field(folder, field):
                taken[name] = _copy_of(pidfd, number)
    except (OSError, struct.error):
        pass
    finally:
        os.close(pidfd)
    remains = _from_descriptors(taken)
    if remains is None:
        for fd in taken.values():
            os.close(fd)
    return remains


def board_field(folder: str, field: Field) -> int:
    """Return a number of the board in a pool directory. OSError, struct.error."""
    with open(f"{folder}/board", "rb") as board:  # noqa: PTH123
        found: int = struct.unpack("=Q", os.pread(board.fileno(), 8, 8 * field))[0]
    return found


def _copy_of(pidfd: int, number: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd  # close-on-exec, as the kernel makes it


def _holders(lock_fd: int) -> list[int]:
    """Pidfds of the daemon's processes that have this lock open, without our own."""
    status = os.fstat(lock_fd)
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(int(name))
                if _has_open(int(name), status):
                    found.append(pidfd)
                else:
                    os.close(pidfd)
    return found


def _is_held(lock_fd: int) -> bool:
    """Whether a process of the daemon has this lock open, other than this one."""
    holders = _holders(lock_fd)
    for pidfd in holders:
        os.close(pidfd)
    return bool(holders)


def _has_open(pid: int, status: os.stat_result) -> bool:
    """Whether a process is one of the daemon's and has the file with this status open."""
    folder = f"/proc/{pid}"
    try:
        with open(f"{folder}/cmdline", "rb") as command:  # noqa: PTH123
            if _DAEMON not in command.read().split(b"\0"):
                return False
        for name in os.listdir(f"{folder}/fd"):  # noqa: PTH208
            with contextlib.suppress(OSError):
                found = os.stat(f"{folder}/fd/{name}")  # noqa: PTH116
                if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                    return True
    except OSError:
        pass
    return False
