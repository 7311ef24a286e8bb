# SPDX-License-Identifier: MIT
"""What a service manager is told (sd_notify), and what it keeps for us: datagrams on a socket, descriptors in a store.

    NOTIFY_SOCKET   where to: a path, or "@name" for the abstract namespace
    WATCHDOG_USEC   how often it wants to hear that we live
    LISTEN_FDS, LISTEN_FDNAMES    descriptors 3, 4, ... that an earlier process of this service gave it to keep

By hand, because a datagram is a few lines and a library would be memory that is locked for ever. Nothing here waits: the
manager may itself be short of memory just now, and what it cannot take at once is dropped and counted. What must not be
lost, a descriptor, is sent again by the caller until it was taken.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Final

FIRST_STORED_FD: Final = 3
"""Where the manager puts the first descriptor: behind stdin, stdout and stderr."""

WATCHDOG_PARTS: Final = 4
"""So many signs of life in each period of the watchdog. Two would do; a dropped one is to be no matter."""


class Notifier:
    """Sends to the service manager. Without a socket (not started by one) every method does nothing, and says it did."""

    dropped: int
    """Messages that could not be sent at once."""

    def __init__(self, address: str | None = None, watchdog_seconds: float = 0.0) -> None:
        """Send to `address`, as NOTIFY_SOCKET has it; None: to nobody."""
        self.dropped = 0
        self.watchdog_seconds = watchdog_seconds
        """The watchdog's period; 0: there is none."""
        self._address = f"\0{address[1:]}" if address is not None and address.startswith("@") else address
        self._socket = (
            None
            if address is None
            else socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        )

    @classmethod
    def from_environment(cls) -> Notifier:
        """Send where the environment says. Whose process id WATCHDOG_PID has is no matter: a keeper inherits the role."""
        text = os.environ.get("WATCHDOG_USEC", "")
        return cls(os.environ.get("NOTIFY_SOCKET") or None, int(text) / 1e6 if text.isdecimal() else 0.0)

    def tell(self, *assignments: str) -> bool:
        """Send assignments such as "READY=1", all in one message. Whether it was taken."""
        return self._send(assignments, None)

    def store(self, name: str, fd: int) -> bool:
        """Have the manager keep a copy of a descriptor until it is told to forget it. Whether it was taken.

        It is not to watch the descriptor (FDPOLL=0): it would let go of it as soon as it shows an error, and an aborted
        FUSE connection shows one. One that it has already is no matter.
        """
        return self._send(("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0"), fd)

    def forget(self, name: str) -> bool:
        """Have the manager close what it keeps under that name. Whether the message was taken."""
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
        """Send nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def take_stored() -> dict[str, int]:
    """Return the descriptors that the manager has kept, by name, and keep them from programs started later.

    Of several with one name the last counts; the others are closed. What is meant for another process is left alone.
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
