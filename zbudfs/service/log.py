# SPDX-License-Identifier: MIT
"""A log that never makes the daemon wait.

A daemon in the swap path that writes a line to a log file may wait for the page cache, for the disk, or for a log
service that has itself been swapped out, and all of them may be waiting for the daemon. So a line goes

    always                to a ring of the last 200 lines in memory, which the mount serves as a file
    in the background     to syslog (/dev/log), one datagram a line, without waiting
    in the foreground     to stderr, if it can take a line at once

and where that is not possible at once, it is dropped and counted: the ring still has it. No file is opened here and
no time zone is asked for (that would be a file): times in the ring are UTC, syslog stamps its own.

Not promised: a stderr that is an ordinary file can make a write wait for the disk; in the foreground that is the
user's choice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

RING_LINES_NR: Final = 200
"""Lines kept in memory. Guessed, not measured: more than a daemon says in its life when all is well."""

LINE_BYTES: Final = 1000
"""Longest line; what is longer is cut. Below PIPE_BUF (4096), so that a write to a pipe is whole or not at all, and
below the 1024 bytes that old syslog services keep."""

MOST_CAUSES_NR: Final = 8
"""Causes of one lasting fault that are told. Arbitrary."""

_SYSLOG_PATH: Final = "/dev/log"
_FACILITY_DAEMON: Final = 3 << 3
_SEVERITIES: Final = {"error": 3, "warning": 4, "info": 6}


class Ring(Protocol):
    """Keeps lines where other processes see them."""

    def add_line(self, line: str) -> None:
        """Keep a line; must not raise or wait."""


class Log:
    """Takes lines from any thread; no method raises or waits."""

    dropped: int
    """Lines that could not be passed on at once, since the start; the ring had them."""

    def __init__(self, foreground: bool, *, syslog_path: str = _SYSLOG_PATH, stderr_fd: int | None = None) -> None:
        """Log to `stderr_fd` (by default that of the process) when `foreground`, otherwise to the socket `syslog_path`.

        A socket that is not there is no error: without a syslog the ring is all there is.
        """
        self.dropped = 0
        self._ring: deque[str] = deque(maxlen=RING_LINES_NR)
        self.ring: Ring | None = None
        """Where lines are kept as well, for other processes; set once it exists."""
        self._stderr_fd = 2 if stderr_fd is None else stderr_fd
        self._foreground = foreground
        self._syslog_path = syslog_path
        self._prefix = f"zbudfs[{os.getpid()}]: "
        self._syslog = None if foreground else self._connect()

    def info(self, text: str) -> None:
        """Log what is good to know."""
        self._log("info", text)

    def warning(self, text: str) -> None:
        """Log what the user should look into."""
        self._log("warning", text)

    def error(self, text: str) -> None:
        """Log what went wrong."""
        self._log("error", text)

    def lines(self) -> list[str]:
        """Return the last lines, oldest first: "2026-01-31T12:00:00Z warning: text"."""
        return list(self._ring)

    def close(self) -> None:
        """Let go of the socket; the ring goes on."""
        if self._syslog is not None:
            self._syslog.close()
            self._syslog = None

    def _log(self, severity: str, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for line in text.splitlines() or [""]:
            cut = line.encode("utf-8", "backslashreplace")[:LINE_BYTES].decode("utf-8", "ignore")
            self._ring.append(f"{stamp} {severity}: {cut}")
            if self.ring is not None:
                self.ring.add_line(f"{stamp} {severity}: {cut}")
            sent = self._to_stderr(severity, cut) if self._foreground else self._to_syslog(severity, cut)
            if not sent:
                self.dropped += 1

    def _to_stderr(self, severity: str, line: str) -> bool:
        """Write one line if stderr can take it now.

        Not with O_NONBLOCK: that is a property of the open file, which is shared with the shell that started us.
        """
        mark = "" if severity == "info" else f"{severity}: "
        try:
            poll = select.poll()
            poll.register(self._stderr_fd, select.POLLOUT)
            ready = poll.poll(0)
            if not ready or not ready[0][1] & select.POLLOUT:
                return False
            data = f"zbudfs: {mark}{line}\n".encode()
            return os.write(self._stderr_fd, data) == len(data)
        except OSError:
            return False

    def _to_syslog(self, severity: str, line: str) -> bool:
        """Send one line if syslog can take it now; a syslog that was started again is connected to again."""
        data = f"<{_FACILITY_DAEMON | _SEVERITIES[severity]}>{self._prefix}{line}".encode()
        for _ in range(2):
            if self._syslog is None:
                return False
            try:
                self._syslog.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError:
                self._syslog.close()
                self._syslog = self._connect()
            else:
                return True
        return False

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            connection.connect(self._syslog_path)
        except OSError:
            connection.close()
            return None
        return connection


class Lasting:
    """A fault that lasts: each cause is told once, and so is the end."""

    def __init__(self, tell: Callable[[str], None], tell_end: Callable[[str], None]) -> None:
        self._tell = tell
        self._tell_end = tell_end
        self._told: set[str] = set()

    def begin(self, text: str) -> None:
        """Tell the fault, unless it was told since it began."""
        if text not in self._told and len(self._told) < MOST_CAUSES_NR:
            self._told.add(text)
            self._tell(text)

    def end(self, text: str) -> None:
        """Tell that it is over, if its begin was told."""
        if self._told:
            self._told.clear()
            self._tell_end(text)


class LogHandler(logging.Handler):
    """Passes records of the standard library's logging, which pyfuse3 and trio use, on to a `Log`.

    It never raises, whatever a record holds: a logging call somewhere in a request must not fail the request.
    """

    def __init__(self, log: Log, level: int = logging.INFO) -> None:
        """Pass records of `level` and above on to `log`."""
        super().__init__(level)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record; a traceback follows as lines of its own."""
        try:
            text = f"{record.name}: {self.format(record)}"
        except Exception as error:  # a record whose arguments do not fit its text
            text = f"{record.name}: {record.msg!r} (not shown: {error!r})"
        if record.levelno >= logging.ERROR:
            self._log.error(text)
        elif record.levelno >= logging.WARNING:
            self._log.warning(text)
        else:
            self._log.info(text)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is the standard library's
        """Do nothing: printing to stderr, as the base class does, could wait."""


def route_logging(log: Log, level: int = logging.INFO) -> None:
    """Have `log` take every record of the standard library's logging, and nothing else take any.

    Also what Python itself prints of exceptions that nobody can catch (`sys.unraisablehook`): those would go to a
    stderr that nobody reads.
    """
    root = logging.getLogger()
    root.handlers[:] = [LogHandler(log, level)]
    root.setLevel(level)
    logging.raiseExceptions = False

    def unraisable(hook: sys.UnraisableHookArgs) -> None:
        with contextlib.suppress(Exception):
            log.error(f"exception ignored: {hook.err_msg or 'in'} {hook.object!r}: {hook.exc_value!r}")

    sys.unraisablehook = unraisable
