# SPDX-License-Identifier: MIT
"""A real backing file that can be slow and can fail, when the test says so.

Each call reaches the real file, unless it has the order to fail. test_backing.py drives this and the real file through
the same cases.
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
"""Longest time that a call is held, so that a test which forgets one fails instead of hanging."""


@dataclass(frozen=True)
class Call:
    """A call of one of the methods."""

    name: str
    first: int
    """The first block or segment."""
    count: int

    @property
    def blocks(self) -> set[int]:
        """Return the blocks or segments of the call."""
        return set(range(self.first, self.first + self.count))


def about(blocks: set[int]) -> Callable[[Call], bool]:
    """Return whether a call is about one of some blocks or segments."""
    return lambda call: bool(blocks & call.blocks)


class Gate:
    """A gate that holds calls until it is opened."""

    def __init__(self) -> None:
        self.held: list[Call] = []
        """The calls that have come, including those that continued when the gate opened."""
        self._open = threading.Event()

    def pass_through(self, call: Call) -> None:
        """Wait until the gate is open. The thread of the call runs this."""
        self.held.append(call)
        if not self._open.wait(LIMIT_SECONDS):
            raise TimeoutError(f"{call} was held for {LIMIT_SECONDS:g} s")

    def open(self) -> None:
        """Let all calls through from now on."""
        self._open.set()


class FaultyBacking(Backing):
    """The backing file at `path`. `calls` has all calls, including held and failed ones."""

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
        """Hold each later call of a method. All continue at the end of the block at the latest."""
        gate = self._gates[name] = Gate()
        try:
            yield gate
        finally:
            self._gates.pop(name, None)
            gate.open()

    def fail(
        self, name: str, when: Callable[[Call], bool] = lambda _: True, error: type[BackingError] = BackingError
    ) -> None:
        """Let the calls of a method fail for which `when` is true, until `recover`. The calling thread evaluates it."""
        self._failures[name] = lambda call: error("as the test wants it") if when(call) else None

    def recover(self) -> None:
        """Let no call fail any more."""
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
                del error  # or it and this frame would refer to each other

    def write_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Write blocks, after a delay or not at all."""
        self._call("write_blocks", block, len(frames))
        super().write_blocks(block, frames)

    def read_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Read blocks, after a delay or not at all."""
        self._call("read_blocks", block, len(frames))
        super().read_blocks(block, frames)

    def sync(self) -> None:
        """Sync, after a delay or not at all."""
        self._call("sync", 0, 0)
        super().sync()

    def make_ready(self, first: int, count: int) -> None:
        """Make segments ready, after a delay or not at all."""
        self._call("make_ready", first, count)
        super().make_ready(first, count)

    def punch(self, first: int, count: int) -> None:
        """Punch segments, after a delay or not at all."""
        self._call("punch", first, count)
        super().punch(first, count)
