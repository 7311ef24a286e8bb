# SPDX-License-Identifier: MIT
"""The contents of open files of stats/ and control/, within bounds: a program that leaks open files costs no memory.

The memory of the daemon is locked and never given back. So the oldest open file loses its content when there are too many,
or when they hold too many bytes. A read of that file then fails with ESTALE, as it does after a takeover.
"""

from dataclasses import dataclass
from typing import Final

MAX_FILES: Final = 256
"""Most open files with a content. Arbitrary: all of stats/ and control/ at once are half of it."""
MAX_BYTES: Final = 1 << 20
"""Most bytes of all contents. Arbitrary: 16 whole logs."""


@dataclass(slots=True)
class OpenFile:
    """One open file of stats/ or control/."""

    content: bytes
    """The content at the time of the open or of the last write."""
    key: str | None
    """The name in control/; None for a file of stats/."""


class OpenFiles:
    """Open files by handle. Handles are numbers from `first` on, and no number is used twice."""

    def __init__(self, first: int) -> None:
        self._next = first
        self._files: dict[int, OpenFile] = {}
        self._bytes = 0

    def __len__(self) -> int:
        """Return the number of open files with a content."""
        return len(self._files)

    def add(self, content: bytes, key: str | None = None) -> int:
        """Return the handle of a new open file. The oldest open files lose their content if there are too many."""
        handle = self._next
        self._next += 1
        self._files[handle] = OpenFile(content, key)
        self._bytes += len(content)
        while len(self._files) > MAX_FILES or (self._bytes > MAX_BYTES and len(self._files) > 1):
            self.remove(next(iter(self._files)))
        return handle

    def find(self, handle: int) -> OpenFile | None:
        """Return an open file; None if it lost its content, or was opened before a takeover."""
        return self._files.get(handle)

    def rewrite(self, handle: int, content: bytes) -> None:
        """Replace the content of an open file, if it has one."""
        file = self._files.get(handle)
        if file is not None:
            self._bytes += len(content) - len(file.content)
            file.content = content

    def remove(self, handle: int) -> None:
        """Forget an open file, if it is known."""
        file = self._files.pop(handle, None)
        if file is not None:
            self._bytes -= len(file.content)
