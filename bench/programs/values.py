# SPDX-License-Identifier: MIT
"""A client of a redis server: it sets values in the server, and checks them.

values.py SOCKET MIB
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import BinaryIO, Final

from bench.programs.records import cut, report, uses

VALUE_BYTES: Final = 1216
"""Memory of a value, its key and their entry. Measured."""
USES_PER_MIB: Final = 16
_TOGETHER: Final = 64
"""Requests that are sent before the first answer is read."""


class Client:
    """A connection to the server."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._answers: BinaryIO = self._socket.makefile("rb")

    def ask(self, requests: Iterable[tuple[bytes, ...]]) -> Iterator[bytes]:
        """Send requests, _TOGETHER at a time, and yield the answer to each, in order."""
        waiting = iter(requests)
        while some := list(islice(waiting, _TOGETHER)):
            self._socket.sendall(b"".join(_request(request) for request in some))
            for _ in some:
                yield self._answer()

    def _answer(self) -> bytes:
        line = self._answers.readline().rstrip(b"\r\n")
        if line[:1] != b"$":  # the line is the whole answer, unless it is a length
            return line
        length = int(line[1:])
        return self._answers.read(length + 2)[:-2] if length >= 0 else b""

    def close(self) -> None:
        """Close the connection."""
        self._answers.close()
        self._socket.close()


def _request(words: tuple[bytes, ...]) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _key(number: int) -> bytes:
    return b"customer:%d" % number


def _value(number: int) -> bytes:
    return f'{{"customer": {number}, "text": "{cut(number, 900)}"}}'.encode()


def main(argv: list[str]) -> int:
    """Set, get and check the values, and return the exit status."""
    mib = int(argv[2])
    count = mib * (1 << 20) // VALUE_BYTES
    client = Client(argv[1])
    bad = sum(
        answer != b"+OK" for answer in client.ask((b"SET", _key(number), _value(number)) for number in range(count))
    )
    for numbers in (uses(mib * USES_PER_MIB, count), range(count)):
        wanted = list(numbers)
        answers = client.ask((b"GET", _key(number)) for number in wanted)
        bad += sum(answer != _value(number) for number, answer in zip(wanted, answers, strict=True))
    client.close()
    return report(count, bad)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
