# SPDX-License-Identifier: MIT
"""The supervisor of several instances. For each keeper it acts as a service manager does for a single daemon.

    service manager  <--- READY, WATCHDOG, STATUS, descriptors ---  supervisor  <--- the same --- keeper of instance 0, 1 ...

The supervisor starts the keepers and restarts those that die. It listens to each keeper on a separate socket. It keeps a copy
of the descriptors that a keeper stores, and stores them with the service manager under "fuse.0", "lock.0" and so on. So a
restarted supervisor continues with the mounts of the one before. It is ready when all keepers are ready. On SIGTERM it passes
the signal to all keepers and ends after them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from zbudfs.service import verdict
from zbudfs.service.launch import DAEMON_COMMAND, settings_pipe
from zbudfs.service.notify import FIRST_STORED_FD, WATCHDOG_PARTS, Notifier
from zbudfs.service.pooldir import RUN_FOLDER
from zbudfs.service.settings import Settings

SEPARATOR: Final = "."
"""The separator between the name of a descriptor and the number of its instance."""

FIRST_DELAY_SECONDS: Final = 0.2
LONGEST_DELAY_SECONDS: Final = 10.0
"""Delay before a keeper is restarted. It doubles until the keeper is ready. The limits are those of zbudfs@.service."""

TICK_SECONDS: Final = 1.0
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_HIGH_FD: Final = 256
"""Lowest number for copies of descriptors while those from 3 on are put in order."""


class Member:
    """One instance and the state of its keeper. With `settings` None it can only continue with stored descriptors."""

    def __init__(self, number: int, settings: Settings | None, stored: Mapping[str, int], folder: str) -> None:
        self.number = number
        self.settings = settings
        self.stored = dict(stored)
        """Copies of the descriptors that the keeper has stored, by name."""
        self.pid = 0
        """The keeper's process; 0: there is none now."""
        self.ended = False
        """Whether the mount is gone, so that no keeper is restarted."""
        self.failed = False
        """Whether the last keeper gave up: it held no pages and could not start."""
        self.ready = False
        self.status = "starting"
        self.heard_at = 0.0
        self.start_at = 0.0
        self._delay = FIRST_DELAY_SECONDS
        self._path = Path(folder, f"notify-{os.getpid()}-{number}")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._path.unlink(missing_ok=True)
        self.socket.bind(str(self._path))
        self._path.chmod(0o600)

    def start(self) -> None:
        """Start a keeper with the settings and with the descriptors that an earlier keeper has stored."""
        settings_fd = settings_pipe(self.settings) if self.settings is not None else -1
        self.ready = False
        self.heard_at = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._become_keeper(settings_fd)
            finally:
                os._exit(1)
        if settings_fd >= 0:
            os.close(settings_fd)

    def _become_keeper(self, settings_fd: int) -> None:
        """Do the steps of a service manager between fork and exec, in the child. Does not return."""
        signal.set_wakeup_fd(-1)
        # No process would hear a keeper without a supervisor. The worker serves until the next supervisor starts a keeper.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        wanted = [*self.stored.values(), *([settings_fd] if settings_fd >= 0 else [])]
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, _HIGH_FD) for fd in wanted]
        for number, fd in enumerate(high, FIRST_STORED_FD):
            os.dup2(fd, number)
        # With an open lock of another instance, this instance's processes would look like processes of that instance.
        os.closerange(FIRST_STORED_FD + len(high), os.sysconf("SC_OPEN_MAX"))
        command = [*DAEMON_COMMAND, "--service"]
        if settings_fd >= 0:
            command += ["--settings-fd", str(FIRST_STORED_FD + len(high) - 1)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(self._path), "LISTEN_PID": str(os.getpid())}
        environment |= {"LISTEN_FDS": str(len(self.stored)), "LISTEN_FDNAMES": ":".join(self.stored)}
        os.execve(command[0], command, environment)

    def has_died(self, status: int, *, ending: bool) -> None:
        """Record that the keeper has ended. Status 0: the mount is gone, or the keeper was asked to end."""
        self.pid = 0
        self.ready = False
        self.ended = ending or status == 0
        self.failed = status == verdict.GIVE_UP
        self.status = "ended" if self.ended else f"the keeper ended with status {status}"
        self.start_at = time.monotonic() + self._delay
        self._delay = min(2 * self._delay, LONGEST_DELAY_SECONDS)

    def hear(self, notifier: Notifier) -> None:
        """Read the keeper's messages. `notifier` forwards which descriptors the service manager must remove."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 4096, len(self.stored) + 4)
            except BlockingIOError:
                return
            said = [line.partition("=")[::2] for line in data.decode("utf-8", "replace").split("\n")]
            self.heard_at = time.monotonic()
            for fd in fds:
                os.set_inheritable(fd, False)
            words = dict(said)
            name = words.get("FDNAME", "")
            if "FDSTORE" in words and fds and name:
                self._keep(name, fds.pop())
            if "FDSTOREREMOVE" in words:
                notifier.forget(f"{name}{SEPARATOR}{self.number}")
                if name in self.stored:
                    os.close(self.stored.pop(name))
            if "READY" in words:
                self.ready = True
                self._delay = FIRST_DELAY_SECONDS
            if words.get("MAINPID", "").isdecimal():
                self.pid = int(words["MAINPID"])
            self.status = words.get("STATUS", self.status)
            for fd in fds:
                os.close(fd)

    def _keep(self, name: str, fd: int) -> None:
        if name in self.stored:
            os.close(self.stored[name])
        self.stored[name] = fd

    def signal(self, number: int) -> None:
        """Send the keeper a signal."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def close(self) -> None:
        """Remove the socket."""
        self.socket.close()
        self._path.unlink(missing_ok=True)


def split_stored(stored: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """Return the descriptors that the service manager has stored, by instance. Those without a number are closed."""
    found: dict[int, dict[str, int]] = {}
    for whole, fd in stored.items():
        name, _, number = whole.rpartition(SEPARATOR)
        if name and number.isdecimal():
            found.setdefault(int(number), {})[name] = fd
        else:
            os.close(fd)
    return found


def forget_dead(folder: str) -> None:
    """Remove the sockets of supervisors that were killed."""
    for path in Path(folder).glob("notify-*-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            path.unlink(missing_ok=True)


def supervise(parts: Mapping[int, Settings | None], stored: Mapping[str, int], notifier: Notifier) -> int:
    """Serve the numbered instances until all mounts are gone or a signal ends the service. Return the exit status."""
    ctypes.CDLL(None).prctl(
        _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
    )  # a keeper that took over in a hand-over is a grandchild of this process
    known = split_stored(stored)
    Path(RUN_FOLDER).mkdir(mode=0o755, parents=True, exist_ok=True)
    forget_dead(RUN_FOLDER)
    members = [Member(number, settings, known.get(number, {}), RUN_FOLDER) for number, settings in parts.items()]
    try:
        return _Supervisor(members, notifier).run()
    finally:
        for member in members:
            member.close()


class _Supervisor:
    def __init__(self, members: Sequence[Member], notifier: Notifier) -> None:
        self._members = members
        self._notifier = notifier
        self._told: dict[str, int] = {}
        """Descriptors that the service manager has stored, by the manager's names for them."""
        self._told_ready = False
        self._told_status = ""
        self._alive_at = 0.0
        self._ending = False
        self._held = any(member.stored for member in members)
        """Whether mounts of an earlier supervisor exist, which may have pages."""
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        failed = False  # an instance cannot start, and the supervisor ends the others
        while not all(member.ended for member in self._members):
            now = time.monotonic()
            for member in self._members:
                if not member.pid and not member.ended and now >= member.start_at:
                    member.start()
            sockets = [member.socket.fileno() for member in self._members]
            select.select([self._wake, *sockets], [], [], TICK_SECONDS)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 512)
            for member in self._members:
                member.hear(self._notifier)
            self._reap()
            self._tell(time.monotonic())
            if not (self._held or self._told_ready or self._ending) and any(member.failed for member in self._members):
                failed = True
                self._end(0, None)
        return verdict.GIVE_UP if failed else 0

    def _end(self, number: int, frame: object) -> None:
        """Ask all keepers to end. Each decides by the swap on its mount."""
        self._ending = True
        self._notifier.tell("STOPPING=1")
        for member in self._members:
            member.signal(signal.SIGTERM)
            member.ended = member.ended or not member.pid

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for member in self._members:
                if member.pid == pid:
                    member.has_died(os.waitstatus_to_exitcode(status), ending=self._ending)

    def _tell(self, now: float) -> None:
        """Report descriptors, readiness, watchdog and status of all instances to the service manager."""
        notifier = self._notifier
        for member in self._members:
            for name, fd in member.stored.items():
                whole = f"{name}{SEPARATOR}{member.number}"
                if self._told.get(whole) != fd and notifier.store(whole, fd):
                    self._told[whole] = fd
            # A keeper is silent until it is ready. The service manager limits the time until all are ready.
            silent_seconds = now - member.heard_at if member.pid and member.ready else 0.0
            if silent_seconds > notifier.watchdog_seconds > 0:
                print(f"zbudfs: the keeper of instance {member.number} hangs and is killed", file=sys.stderr)
                member.heard_at = now
                member.signal(signal.SIGKILL)
        if not self._told_ready and all(member.ready for member in self._members):
            self._told_ready = notifier.tell("READY=1")
        if notifier.watchdog_seconds and now >= self._alive_at and notifier.tell("WATCHDOG=1"):
            self._alive_at = now + notifier.watchdog_seconds / WATCHDOG_PARTS
        status = "; ".join(f"{member.number}: {member.status}" for member in self._members)
        if status != self._told_status and notifier.tell(f"STATUS={status}"):
            self._told_status = status
