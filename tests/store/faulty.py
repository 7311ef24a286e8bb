# SPDX-License-Identifier: MIT
"""A real backing file that can be slow and can fail: what a disk does, when the test says so.

Nothing is made up: every call goes through to the real file, unless it is told to fail instead. test_backing.py drives
this and the real thing through the same cases.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from zbudfs.core.errors import BackingError
from zbudfs.store.backing import Backing

LIMIT_SECONDS: Final = 30.0
"""Longest time that a call is held: a test that forgets one fails instead of hanging."""


@dataclass(frozen=True)
class Call:
    """A call of one of the methods."""

    name: str
    first: int
    """First block, or segment."""
    count: int

    @property
    def blocks(self) -> set[int]:
        """The blocks, or segments, that it is about."""
        return set(range(self.first, self.first + self.count))


def about(blocks: set[int]) -> Callable[[Call], bool]:
    """Return whether a call is about one of some blocks, or segments."""
    return lambda call: bool(blocks & call.blocks)


class Gate:
    """Holds calls until it is opened."""

    def __init__(self) -> None:
        self.held: list[Call] = []
        """Calls that have come, those that went on when it was opened included."""
        self._open = threading.Event()

    def pass_through(self, call: Call) -> None:
        """Wait until the gate is open. For the thread that makes the call."""
        self.held.append(call)
        if not self._open.wait(LIMIT_SECONDS):
            raise TimeoutError(f"{call} was held for {LIMIT_SECONDS:g} s")

    def open(self) -> None:
        """Let all calls through from now on."""
        self._open.set()


class FaultyBacking(Backing):
    """The backing file at `path`; `calls` are those that were made, held and failed ones included."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.calls: list[Call] = []
        self._gates: dict[str, Gate] = {}
        self._failures: dict[str, Callable[[Call], BackingError | None]] = {}

    def calls_of(self, name: str) -> list[Call]:
        """Return the calls of one method."""
        return [call for call in self.calls if call.name == name]

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[Gate]:
        """Hold every call of a method that comes from now on; all go on at the end at the latest."""
        gate = self._gates[name] = Gate()
        try:
            yield gate
        finally:
            self._gates.pop(name, None)
            gate.open()

    def fail(
        self, name: str, when: Callable[[Call], bool] = lambda _: True, error: type[BackingError] = BackingError
    ) -> None:
        """Have the calls of a method fail that `when` says yes to, until `recover`. It is asked in the calling thread."""
        self._failures[name] = lambda call: error("as the test wants it") if when(call) else None

    def recover(self) -> None:
        """Nothing fails any more."""
        self._failures.clear()

    def _call(self, name: str, first: int, count: int) -> None:
        call = Call(name, first, count)
        self.calls.append(call)
        gate = self._gates.get(name)
        if gate is not None:
            gate.pass_through(call)
        failure = self._failures.get(name)
        error = failure(call) if failure is not None else None
        if error is not None:
            try:
                raise error
            finally:
                del error  # else it and this frame would refer to each other

    def write_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Write blocks, later or not at all."""
        self._call("write_blocks", block, len(frames))
        super().write_blocks(block, frames)

    def read_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Read blocks, later or not at all."""
        self._call("read_blocks", block, len(frames))
        super().read_blocks(block, frames)

    def sync(self) -> None:
        """Sync, later or not at all."""
        self._call("sync", 0, 0)
        super().sync()

    def make_ready(self, first: int, count: int) -> None:
        """Make segments ready, later or not at all."""
        self._call("make_ready", first, count)
        super().make_ready(first, count)

    def punch(self, first: int, count: int) -> None:
        """Punch segments, later or not at all."""
        self._call("punch", first, count)
        super().punch(first, count)
