# SPDX-License-Identifier: MIT
"""The parts that an earlier keeper of a service has left, for the keeper that is started in its place.

    descriptors    from the service manager's store, or else copies from the worker that serves (pidfd_getfd)
    memory         the pool directory: the path of the lock's descriptor
    processes      the roster in the pool directory: a worker that serves, a standby that would take over

There are three cases, which are handled in the same way. The keeper was stopped or killed and its worker still serves; all
processes are dead; or the mount itself is gone, and the descriptors that are left are useless.

In a fourth case nothing is changed (`find` raises Held): the mount is served by processes that this keeper cannot replace.
Their memory has no name by which it could be mapped (before Linux 6.4). Or the kernel does not send again the requests that
the worker has taken (before Linux 6.9). Or their keeper lives, the kernel refuses copies of their descriptors
(CAP_SYS_PTRACE), or they live in a PID namespace that this keeper does not see.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Final

from zbudfs.service.mountpoint import find_mount, is_connected
from zbudfs.service.pooldir import RUN_FOLDER, PoolDirectory, PoolDirectoryError, is_locked, pool_directories
from zbudfs.service.roster import UNSEEN, Roster, is_ending
from zbudfs.service.settings import Settings, SettingsError
from zbudfs.store.files import read_bytes
from zbudfs.store.status_area import CANNOT_RESEND, Field

NAMES: Final = ("fuse", "lock", "backing")
"""Names of the descriptors in the store. The last one exists only if there is a backing file."""

_SYS_PIDFD_GETFD: Final = 438


class Held(Exception):
    """The mount is served by processes that cannot be replaced; the text gives the reason."""

    def __init__(self, why: str, *, for_good: bool = True) -> None:
        """`for_good`: the processes continue to serve. Otherwise all of them are ending, and a later attempt may succeed."""
        super().__init__(why)
        self.for_good = for_good


@dataclass(frozen=True, slots=True)
class Remains:
    """The parts of a mount without a keeper."""

    directory: PoolDirectory
    descriptors: list[int]
    """The connection, the lock and, if there is one, the backing file."""
    settings: Settings
    born_ns: int
    are_working: bool
    """Whether a worker serves or a standby would take over. If not, swap does not work until a new worker serves."""


def find(stored: dict[str, int], mountpoint: str | None) -> Remains | None:
    """Return the remains of the service whose descriptors the manager has `stored`, or of the mount at `mountpoint`.

    None if no mount can be continued; then the descriptors are closed. Held if other processes serve and must be left alone.
    """
    remains = _from_descriptors(stored)
    if remains is not None:
        return remains
    _drop(stored)
    if mountpoint is None or find_mount(mountpoint) is None:
        return None
    for folder in pool_directories(mountpoint):
        remains = _from_worker(folder)
        if remains is not None:
            return remains
    return None


def _from_descriptors(found: dict[str, int]) -> Remains | None:
    """Return the remains; None unless the mount exists, and its memory. Held."""
    if "fuse" not in found or "lock" not in found or not is_connected(found["fuse"]):
        return None
    path, name = os.path.split(os.readlink(f"/proc/self/fd/{found['lock']}"))
    if name != "lock":
        return None
    roster = _roster(path)
    if roster is None:
        return None
    try:
        _check(roster)
        settings = Settings.from_json(read_bytes(f"{path}/settings.json"))
        born_ns = status_field(path, Field.BORN_NS)
        server = roster.server()
        if (
            server is not None
            and not is_ending(server)
            and status_field(path, Field.SERVING)
            and status_field(path, Field.CAN_RESEND) == CANNOT_RESEND
        ):
            raise Held(
                "this kernel does not send requests again (FUSE_NOTIFY_RESEND, Linux 6.9), so the requests under way would be"
                " lost with the worker that serves"
            )
        complete = (settings.backing is not None) == ("backing" in found)
    except (OSError, SettingsError, struct.error):
        complete = False
    except Held:
        roster.close()
        raise
    if not complete:
        roster.close()
        return None
    roster.keep()  # False: the former keeper was killed but has not ended yet; it does no more work
    os.set_blocking(found["fuse"], False)
    wanted = [found[name] for name in NAMES if name in found]
    directory = PoolDirectory(path, found["lock"], roster, survives=True)
    return Remains(directory, wanted, settings, born_ns, bool(roster.working()))


def _roster(folder: str) -> Roster | None:
    """Return the roster of a pool directory; None if the directory no longer exists. Held.

    A directory of a version without a roster is held if it is locked.
    """
    try:
        return Roster(folder, create=False)
    except OSError as error:
        if error.errno == errno.ENOENT and not is_locked(folder):
            return None
        raise Held(f"{folder}/serving cannot be opened ({error.strerror})") from None


def _check(roster: Roster) -> None:
    """Raise Held unless this process can replace all processes in the roster."""
    keeper = roster.keeper()
    if keeper is not None and not is_ending(keeper):
        raise Held(f"its keeper, process {keeper}, is alive" if keeper else "its keeper lives in another PID namespace")
    for pid in roster.others():
        if pid == UNSEEN:
            raise Held("its processes live in another PID namespace")
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            pass
        except OSError as error:
            raise Held(f"process {pid} of it cannot be ended ({error.strerror})") from None


def _drop(stored: dict[str, int]) -> None:
    """Close descriptors that are useless, and free the memory of a mount that is gone. Held."""
    lock_fd = stored.pop("lock", None)
    folder = None
    others: list[int] = []
    if lock_fd is not None:
        folder = os.path.dirname(os.readlink(f"/proc/self/fd/{lock_fd}"))
        roster = _roster(folder)
        if roster is not None:
            others = roster.others()
            roster.close()
    if "backing" in stored and not others:
        fcntl.flock(stored["backing"], fcntl.LOCK_UN)  # for the manager's copy too, which is closed later
    for fd in stored.values():
        os.close(fd)
    if lock_fd is None:
        return
    if folder is not None and os.path.dirname(folder) == RUN_FOLDER and not others:
        with contextlib.suppress(PoolDirectoryError):
            PoolDirectory.adopt(folder, lock_fd).remove()
            return
    os.close(lock_fd)


def _from_worker(folder: str) -> Remains | None:
    """Return the remains, with copies of the descriptors of a process of this directory, if its keeper is gone. Held."""
    roster = _roster(folder)
    if roster is None:
        return None
    try:
        others = roster.others()
        if not others:
            return None
        working = roster.working()
        if not working:
            raise Held(f"process {others[-1]} of it has not ended yet: it waits in the kernel", for_good=False)
        _check(roster)
    finally:
        roster.close()
    if not os.path.exists(f"{folder}/board"):
        raise Held("its memory has no name (that needs a tmpfs with noswap: Linux 6.4)")
    taken = _descriptors_of(folder, working[-1])
    remains = _from_descriptors(taken)
    if remains is None:
        for fd in taken.values():
            os.close(fd)
        raise Held(f"its memory in {folder} is incomplete")
    return remains


def _descriptors_of(folder: str, pid: int) -> dict[str, int]:
    """Return copies of the descriptors of a process that serves a pool directory or would take over. Held."""
    taken: dict[str, int] = {}
    try:
        pidfd = os.pidfd_open(pid)
        try:
            for name, field in zip(NAMES, (Field.FUSE_FD, Field.LOCK_FD, Field.BACKING_FD), strict=True):
                if number := status_field(folder, field):
                    taken[name] = _copy_of(pidfd, number)
        finally:
            os.close(pidfd)
    except (OSError, struct.error) as error:
        for fd in taken.values():
            os.close(fd)
        gone = isinstance(error, ProcessLookupError)
        raise Held(
            f"the descriptors of its process {pid} cannot be copied ({error}): the service manager has not kept them, and"
            " pidfd_getfd needs CAP_SYS_PTRACE",
            for_good=not gone,
        ) from None
    return taken


def status_field(folder: str, field: Field) -> int:
    """Return a number of the status area in a pool directory. OSError, struct.error."""
    with open(f"{folder}/board", "rb") as area:
        found: int = struct.unpack("=Q", os.pread(area.fileno(), 8, 8 * field))[0]
    return found


def _copy_of(pidfd: int, number: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd  # the kernel has set close-on-exec
