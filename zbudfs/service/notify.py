# SPDX-License-Identifier: MIT
"""The protocol of the service manager (sd_notify): messages as datagrams on a socket, and a store for descriptors.

    NOTIFY_SOCKET   the address: a path, or "@name" for the abstract namespace
    WATCHDOG_USEC   the watchdog's period, in which the manager expects a sign of life
    LISTEN_FDS, LISTEN_FDNAMES    descriptors 3, 4, ... that an earlier process of this service stored with the manager

The module uses no library: a datagram takes a few lines, and a library would be locked memory. No call waits. The manager may
be short of memory itself, so a message that it cannot take at once is dropped and counted. The caller sends a message with a
descriptor, which must not be lost, again until it is accepted.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Final

FIRST_STORED_FD: Final = 3
"""Number of the first stored descriptor: after stdin, stdout and stderr."""

WATCHDOG_PARTS: Final = 4
"""Signs of life in each period of the watchdog. Two are enough; more allow for a dropped one."""


class Notifier:
    """Sends to the service manager. Without a socket (no service manager) every method does nothing and returns success."""

    dropped: int
    """Number of messages that could not be sent at once."""

    def __init__(self, address: str | None = None, watchdog_seconds: float = 0.0) -> None:
        """Send to `address`, in the syntax of NOTIFY_SOCKET; None: send nothing."""
        self.dropped = 0
        self.watchdog_seconds = watchdog_seconds
        """The watchdog's period in seconds; 0: there is none."""
        self._address = f"\0{address[1:]}" if address is not None and address.startswith("@") else address
        self._socket = (
            None
            if address is None
            else socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        )

    @classmethod
    def from_environment(cls) -> Notifier:
        """Make a notifier from the environment. The process id in WATCHDOG_PID is not checked: a keeper inherits the role."""
        text = os.environ.get("WATCHDOG_USEC", "")
        return cls(os.environ.get("NOTIFY_SOCKET") or None, int(text) / 1e6 if text.isdecimal() else 0.0)

    def tell(self, *assignments: str) -> bool:
        """Send assignments such as "READY=1", all in one message. Return whether it was accepted."""
        return self._send(assignments, None)

    def store(self, name: str, fd: int) -> bool:
        """Store a copy of a descriptor with the manager until `forget`. Return whether the message was accepted.

        The manager must not poll the descriptor (FDPOLL=0): it would close it at the first error, and an aborted FUSE
        connection has one. To store a descriptor again has no effect.
        """
        return self._send(("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0"), fd)

    def forget(self, name: str) -> bool:
        """Make the manager close its copies under this name. Return whether the message was accepted."""
        return self._send(("FDSTOREREMOVE=1", f"FDNAME={name}"), None)

    def _send(self, assignments: tuple[str, ...], fd: int | None) -> bool:
        if self._socket is None:
            return True
        data = "\n".join(text.replace("\n", " ") for text in assignments).encode("utf-8", "backslashreplace")
        ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL, self._address)
        except OSError:
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        """Close the socket; later messages are dropped."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def take_stored() -> dict[str, int]:
    """Return the descriptors that the manager has stored, by name, and set close-on-exec on them.

    Of several with one name the last counts; the others are closed. Descriptors for another process are left alone.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, int] = {}
    for index in range(int(count)):
        fd = FIRST_STORED_FD + index
        name = names[index] if index < len(names) and names[index] else "unknown"
        if name in found:
            os.close(found[name])
        os.set_inheritable(fd, False)
        found[name] = fd
    return found
