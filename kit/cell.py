# SPDX-License-Identifier: MIT
"""A memory cgroup for one program, which then swaps while the rest of the machine does not.

The cgroup is of version 1 or 2, whichever has the memory controller: a hybrid machine has both trees mounted, and the
controller in one of them. The cell is made directly below the root of that tree, so that no parent limits it.

    with Cell("demo", limit_bytes=128 << 20) as cell:
        subprocess.run(cell.command(["./hungry"]))

The limit does not hold for memory that a program had before it entered the cell. So `command` enters the cell before the
program starts.
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
"""Prefix of the name of every cell."""

_REMOVE_LIMIT_SECONDS: Final = 20.0
"""Longest wait for the kernel to release an empty cgroup. Arbitrary."""

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


class CellError(Exception):
    """No memory cgroup is available. The text says why."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree of cgroups that has the memory controller."""

    path: Path
    """Root of the mounted tree."""
    version: int
    """1 or 2."""


def find_tree(root: str = "/") -> Tree:
    """Return the mounted tree that has the memory controller. The folder `root` holds `proc/`. Raises CellError."""
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
    """One memory cgroup, as a context: it is made on entry and removed on exit. Raises CellError if that is not allowed."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        """Describe a cell. `name` is unique, and `limit_bytes` is the most RAM for all programs in the cell together."""
        self.tree = find_tree()
        self.path = self.tree.path / f"{PREFIX}{name}-{os.getpid()}"
        """Folder of the cgroup."""
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
        """Remove the cgroup. The programs in it must have ended."""
        self.remove()

    def command(self, command: Sequence[str]) -> list[str]:
        """Return a command that enters the cell and then becomes `command`."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def set_limit(self, limit_bytes: int) -> None:
        """Set the most RAM for all programs in the cell together."""
        knob = "memory.limit_in_bytes" if self.tree.version == 1 else "memory.max"
        (self.path / knob).write_text(str(limit_bytes))

    def current_bytes(self) -> int:
        """Return the RAM that the programs in the cell use now, in bytes."""
        knob = "memory.usage_in_bytes" if self.tree.version == 1 else "memory.current"
        return int((self.path / knob).read_text())

    def oom_kills(self) -> int:
        """Return the number of programs in the cell that the kernel has killed because of the limit."""
        knob = "memory.oom_control" if self.tree.version == 1 else "memory.events"
        counts = dict(line.split() for line in (self.path / knob).read_text().splitlines())
        return int(counts["oom_kill"])

    def remove(self) -> None:
        """Remove the cgroup, after the last program has left it. Raises CellError after a limit of time."""
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
