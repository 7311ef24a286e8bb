# SPDX-License-Identifier: MIT
"""A memory cgroup for one program: the way to have it swap while the rest of the machine does not.

Version 1 or 2, wherever the memory controller is: a hybrid machine has both trees mounted and the controller in one
of them. The cell is made directly under the root of that tree, so that no limit above it interferes.

    with Cell("demo", limit_bytes=128 << 20) as cell:
        subprocess.run(cell.command(["./hungry"]))

Not promised: that the limit holds for what a program had before it went in; `command` goes in before it starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

PREFIX: Final = "zbudfs-"
"""What the name of every cell starts with."""

_REMOVE_LIMIT_SECONDS: Final = 20.0
"""Longest wait for the kernel to let go of an empty cgroup. Arbitrary."""

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


class CellError(Exception):
    """No memory cgroup can be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Where the memory controller is."""

    path: Path
    """Root of the mounted tree."""
    version: int
    """1 or 2."""


def find_tree(root: str = "/") -> Tree:
    """Return the mounted tree that has the memory controller. `root` holds `proc/`. Raises CellError."""
    for line in Path(root, "proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        # source mountpoint type options dump pass
        words = line.split(" ")
        path = Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), words[1]))
        if words[2] == "cgroup" and "memory" in words[3].split(","):
            return Tree(path, 1)
        if words[2] == "cgroup2":
            with contextlib.suppress(OSError):
                if "memory" in Path(root, *path.parts[1:], "cgroup.controllers").read_text().split():
                    return Tree(path, 2)
    raise CellError("no cgroup with a memory controller is mounted")


class Cell:
    """One memory cgroup, made when entered and removed when left. Raises CellError where that is not allowed."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        """`name` should be unlike any other; `limit_bytes` is the most RAM that all in the cell may have."""
        self.tree = find_tree()
        self.path = self.tree.path / f"{PREFIX}{name}-{os.getpid()}"
        """The cgroup's folder."""
        self._limit_bytes = limit_bytes

    def __enter__(self) -> Cell:
        """Make the cgroup and set its limit."""
        try:
            if self.tree.version == 2:
                subtree = self.tree.path / "cgroup.subtree_control"
                if "memory" not in subtree.read_text().split():
                    subtree.write_text("+memory")
            self.path.mkdir()
        except OSError as error:
            raise CellError(f"cannot make a memory cgroup at {self.path}: {error.strerror}") from None
        try:
            self.set_limit(self._limit_bytes)
        except OSError as error:
            self.remove()
            raise CellError(f"cannot limit the memory of {self.path}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the cgroup; the programs in it must have ended."""
        self.remove()

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command that goes into the cell and becomes `command`."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def set_limit(self, limit_bytes: int) -> None:
        """Set the most RAM that all in the cell may have from now on."""
        knob = "memory.limit_in_bytes" if self.tree.version == 1 else "memory.max"
        (self.path / knob).write_text(str(limit_bytes))

    def current_bytes(self) -> int:
        """Return the RAM that the programs in the cell have now."""
        knob = "memory.usage_in_bytes" if self.tree.version == 1 else "memory.current"
        return int((self.path / knob).read_text())

    def remove(self) -> None:
        """Remove the cgroup; waits a while for the last program to be gone from it. Raises CellError."""
        end = time.monotonic() + _REMOVE_LIMIT_SECONDS
        while True:
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise CellError(f"cannot remove the cgroup {self.path}: {error.strerror}") from None
            time.sleep(0.05)
