# SPDX-License-Identifier: MIT
"""A log that never makes the daemon wait.

A daemon in the swap path that writes to a log file may wait for the page cache, the disk, or a log service that is itself
swapped out. All of them may be waiting for the daemon. So a line goes

    always                to a ring of the last 200 lines in memory, which the mount serves as a file
    in the background     to syslog (/dev/log), one datagram a line, without waiting
    in the foreground     to stderr, if it can take a line at once
    of a failed start     to stderr in a service: journald assigns a line of stderr to its unit after the process
                          has ended, but not a datagram

A line that cannot be passed on at once is dropped and counted; the ring still has it. The log opens no file, and needs no
time zone, which would be a file: times in the ring are UTC, and syslog adds its own.

If stderr is an ordinary file, a write may wait for the disk. In the foreground that is the user's choice.
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
"""Lines of the ring. Guessed, not measured: more than a daemon without faults ever logs."""

LINE_BYTES: Final = 1000
"""Longest line in bytes; longer lines are cut. It is below PIPE_BUF (4096), so that a write to a pipe is whole or not done,
and below the 1024 bytes that old syslog services keep."""

MOST_CAUSES_NR: Final = 8
"""Most causes of one lasting fault that are logged. Arbitrary."""

_SYSLOG_PATH: Final = "/dev/log"
_FACILITY_DAEMON: Final = 3 << 3
_SEVERITIES: Final = {"error": 3, "warning": 4, "info": 6}


class Ring(Protocol):
    """Memory for lines that other processes can read."""

    def add_line(self, line: str) -> None:
        """Save a line; must not raise or wait."""


class Log:
    """The daemon's log. Any thread may call its methods; none of them raises or waits."""

    dropped: int
    """Number of lines, since the start, that could not be passed on at once. The ring had them."""

    def __init__(
        self,
        foreground: bool,
        *,
        service: bool = False,
        syslog_path: str = _SYSLOG_PATH,
        stderr_fd: int | None = None,
    ) -> None:
        """Log to `stderr_fd` (by default that of the process) when `foreground`, otherwise to the socket `syslog_path`.

        The log of a `service` writes the reason of a failed start to `stderr_fd`.

        A missing socket is no error: without a syslog only the ring has the lines.
        """
        self.dropped = 0
        self._ring: deque[str] = deque(maxlen=RING_LINES_NR)
        self.ring: Ring | None = None
        """A ring that other processes can read; set once it exists."""
        self._stderr_fd = 2 if stderr_fd is None else stderr_fd
        self._foreground = foreground
        self._service = service
        self._syslog_path = syslog_path
        self._prefix = f"zbudfs[{os.getpid()}]: "
        self._syslog = None if foreground else self._connect()

    def info(self, text: str) -> None:
        """Log an event without consequences."""
        self._log("info", text)

    def warning(self, text: str) -> None:
        """Log a fact that the user should examine."""
        self._log("warning", text)

    def error(self, text: str) -> None:
        """Log an error."""
        self._log("error", text)

    def failed_start(self, text: str) -> None:
        """Log the reason for which the process ends without having served."""
        self._log("error", text, to_stderr=self._service)

    def lines(self) -> list[str]:
        """Return the last lines, oldest first: "2026-01-31T12:00:00Z warning: text"."""
        return list(self._ring)

    def close(self) -> None:
        """Close the socket; the ring still works."""
        if self._syslog is not None:
            self._syslog.close()
            self._syslog = None

    def _log(self, severity: str, text: str, *, to_stderr: bool = False) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for line in text.splitlines() or [""]:
            cut = line.encode("utf-8", "backslashreplace")[:LINE_BYTES].decode("utf-8", "ignore")
            self._ring.append(f"{stamp} {severity}: {cut}")
            if self.ring is not None:
                self.ring.add_line(f"{stamp} {severity}: {cut}")
            sent = self._to_stderr(severity, cut) if self._foreground or to_stderr else self._to_syslog(severity, cut)
            if not sent:
                self.dropped += 1

    def _to_stderr(self, severity: str, line: str) -> bool:
        """Write one line if stderr can take it now.

        The file is not set to O_NONBLOCK: the mode belongs to the open file, which the shell that started us shares.
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
        """Send one line if syslog can take it now. After a restart of syslog it connects again."""
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
    """A fault that lasts: each of its causes is logged once, and so is its end."""

    def __init__(self, tell: Callable[[str], None], tell_end: Callable[[str], None]) -> None:
        self._tell = tell
        self._tell_end = tell_end
        self._told: set[str] = set()

    def begin(self, text: str) -> None:
        """Log the cause, unless it was logged since the fault began."""
        if text not in self._told and len(self._told) < MOST_CAUSES_NR:
            self._told.add(text)
            self._tell(text)

    def end(self, text: str) -> None:
        """Log the end of the fault, if its begin was logged."""
        if self._told:
            self._told.clear()
            self._tell_end(text)


class LogHandler(logging.Handler):
    """Passes records of the standard library's logging, which pyfuse3 and trio use, on to a `Log`.

    It never raises, whatever a record contains: a logging call in a request must not fail the request.
    """

    def __init__(self, log: Log, level: int = logging.INFO) -> None:
        """Pass records of `level` and above on to `log`."""
        super().__init__(level)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record; a traceback follows as separate lines."""
        try:
            text = f"{record.name}: {self.format(record)}"
        except Exception as error:  # the arguments of the record do not fit its text
            text = f"{record.name}: {record.msg!r} (not shown: {error!r})"
        if record.levelno >= logging.ERROR:
            self._log.error(text)
        elif record.levelno >= logging.WARNING:
            self._log.warning(text)
        else:
            self._log.info(text)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is the standard library's
        """Do nothing. The base class prints to stderr, which could wait."""


def route_logging(log: Log, level: int = logging.INFO) -> None:
    """Send every record of the standard library's logging to `log`, and to no other handler.

    The same holds for reports of exceptions that no code can catch (`sys.unraisablehook`). They would go to a stderr that
    no user reads.
    """
    root = logging.getLogger()
    root.handlers[:] = [LogHandler(log, level)]
    root.setLevel(level)
    logging.raiseExceptions = False

    def unraisable(hook: sys.UnraisableHookArgs) -> None:
        with contextlib.suppress(Exception):
            log.error(f"exception ignored: {hook.err_msg or 'in'} {hook.object!r}: {hook.exc_value!r}")

    sys.unraisablehook = unraisable
