# SPDX-License-Identifier: MIT
"""The roster of a mount: which of its processes are alive, and which one serves.

The roster is the file `serving` in the pool directory. Each process of the mount locks one byte of it (POSIX record locks):

    byte 0      the worker that serves: it takes this lock before it reads or changes any table
    byte 1      the active keeper
    16 to 79    each process has one of them for as long as it lives

A record lock belongs to one process. A child does not inherit it, and no copy of a descriptor in another process holds it.
The kernel releases it when the last thread of the process has ended, also if that thread waits in a disk write after
SIGKILL. Any process that may open the file can ask for the holder, without CAP_SYS_PTRACE and without /proc/PID/fd.

Closing any descriptor of the file drops all locks of the process on it. So each process opens the file once, keeps it open,
and starts its children by fork(2), which copies the descriptor and no lock.
"""

import contextlib
import errno
import fcntl
import os
import signal
import struct
from typing import Final

FILE_NAME: Final = "serving"

UNSEEN: Final = 0
"""Replaces a process id if the holder lives in a PID namespace that this process cannot see."""

MAX_PROCESSES: Final = 64

_SERVER: Final = 0
_KEEPER: Final = 1
_FIRST: Final = 16
_FLOCK: Final = struct.Struct("@hhqqi0q")
"""struct flock of a 64-bit system: type, whence, start, length, pid."""


class Roster:
    """The roster in the folder of a pool directory. OSError if its file cannot be opened."""

    def __init__(self, folder: str, *, create: bool = True) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        self._fd = os.open(f"{folder}/{FILE_NAME}", flags, 0o600)

    def close(self) -> None:
        """Close the file. All locks of this process go with it."""
        os.close(self._fd)

    # ---- this process --------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Enter this process into the roster. OSError if it is full."""
        for place in range(_FIRST, _FIRST + MAX_PROCESSES):
            if self._take(place):
                return
        raise OSError(errno.EBUSY, f"more than {MAX_PROCESSES} processes of one mount")

    def serve(self) -> bool:
        """Become the process that serves; False while another process is. Does not wait."""
        return self._take(_SERVER)

    def keep(self) -> bool:
        """Become the keeper; False while another process is. Does not wait."""
        return self._take(_KEEPER)

    def _take(self, place: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    # ---- others --------------------------------------------------------------------------------------------------

    def server(self) -> int | None:
        """Return the process that serves, or UNSEEN; None if there is none, other than this process."""
        return self._holder(_SERVER)

    def keeper(self) -> int | None:
        """Return the keeper, or UNSEEN; None if there is none, other than this process."""
        return self._holder(_KEEPER)

    def others(self) -> list[int]:
        """Return all other processes of the mount that live; UNSEEN for one that cannot be seen from here.

        The process that serves is the last.
        """
        server = self.server()
        found = [self._holder(place) for place in range(_FIRST, _FIRST + MAX_PROCESSES)]
        others = [pid for pid in found if pid is not None and pid != server]
        return others if server is None else [*others, server]

    def working(self) -> list[int]:
        """Return the others that continue to work, without those that end as soon as their last thread can."""
        return [pid for pid in self.others() if not is_ending(pid)]

    def end_others(self, spared: int) -> None:
        """Kill all other processes but one. Does not wait for their end: the lock of byte 0 does that.

        PermissionError if one of them must not be killed.
        """
        for pid in self.others():
            if pid in (spared, UNSEEN):
                continue
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    if pid in self.others():  # if not, the number may be another process's now
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                finally:
                    os.close(pidfd)

    def _holder(self, place: int) -> int | None:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else max(pid, UNSEEN)


def is_ending(pid: int) -> bool:
    """Return whether a process does no more work: it has ended except for threads in the kernel, or has SIGKILL pending.

    False if that is unknown.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            lines = dict(line.split(b":", 1) for line in status.read().splitlines() if b":" in line)
    except (FileNotFoundError, ProcessLookupError):
        return pid != UNSEEN
    except OSError:
        return False
    pending = int(lines.get(b"SigPnd", b"0"), 16) | int(lines.get(b"ShdPnd", b"0"), 16)
    return lines.get(b"State", b"?").split()[0] in (b"Z", b"X") or bool(pending >> signal.SIGKILL - 1 & 1)
