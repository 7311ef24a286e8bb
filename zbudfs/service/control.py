# SPDX-License-Identifier: MIT
"""The keeper's control socket: a few clients at a time, and the keeper waits for none of them.

    {"order": "restart", "interpreter": PATH}  ->
                                               <-  {"pid": P, "version": V}  or  {"error": "..."}

A client sends its order in one piece. A client that has not sent an order after CLIENT_SECONDS is dropped.
"""

import contextlib
import json
import os
import socket
import time
from typing import Final

MAX_CLIENTS: Final = 4
"""Most clients at a time. More of them wait in the socket's queue."""
CLIENT_SECONDS: Final = 5.0
"""Longest time in which a client must send its order. Arbitrary."""
_ORDER_BYTES: Final = 1 << 16
_QUEUE: Final = 64
"""Clients that can wait to be accepted. A connect beyond that fails."""


class Client:
    """The connection of one client."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.expires_at = time.monotonic() + CLIENT_SECONDS

    def fileno(self) -> int:
        """Return the descriptor of the connection."""
        return self._connection.fileno()

    def take_order(self) -> bytes | None:
        """Return the data that the client has sent: empty if it has closed the connection, None if none has come yet."""
        try:
            return self._connection.recv(_ORDER_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def answer(self, answer: dict[str, object]) -> None:
        """Send the answer, if the client can take it at once, and close the connection."""
        with self._connection, contextlib.suppress(OSError):
            self._connection.send(json.dumps(answer).encode() + b"\n", socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Close this process's descriptor of the connection, without an answer."""
        self._connection.close()


class Control:
    """The control socket at `path`. OSError if it cannot be made."""

    def __init__(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._clients: list[Client] = []
        try:
            self._socket.bind(path)
            os.chmod(path, 0o600)
            self._socket.listen(_QUEUE)
        except OSError:
            self._socket.close()
            raise

    def descriptors(self) -> list[int]:
        """Return the descriptors to poll. One is readable when `orders` has work."""
        accepting = [self._socket.fileno()] if len(self._clients) < MAX_CLIENTS else []
        return accepting + [client.fileno() for client in self._clients]

    def orders(self) -> list[tuple[Client, bytes]]:
        """Return the orders that have come, with the clients that wait for an answer. Does not wait."""
        while len(self._clients) < MAX_CLIENTS:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # no client waits, or there is no free descriptor
                break
            connection.setblocking(False)
            self._clients.append(Client(connection))
        found = []
        for client in list(self._clients):
            data = client.take_order()
            if data is None and time.monotonic() < client.expires_at:
                continue
            self._clients.remove(client)
            if data:
                found.append((client, data))
            else:
                client.answer({"error": "no order has come"})
        return found

    def close(self) -> None:
        """Answer all clients that the keeper ends, and close the socket."""
        for client in self._clients:
            client.answer({"error": "the keeper ends"})
        self.close_copies()

    def close_copies(self) -> None:
        """Close the socket and all connections in this process. In a child of the keeper they are copies."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        self._socket.close()
