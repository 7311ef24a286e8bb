# SPDX-License-Identifier: MIT
"""The tree that the mount shows, with inode numbers that never change.

    /              1
    /swapfile      2    0600, the device
    /stats         3    one value a file, all.json, and log; 0444
    /control       4    0700, the tunables (core/tunables.py): one value a file, 0600
    /stats/...          the number is made from the name
    /control/...        the same

The kernel keeps names for ever. A newer version that takes over has other names, but must not give one file the number of
another. So the numbers follow from the names.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Final
from zlib import crc32

from zbudfs.core.tunables import NAMES
from zbudfs.store.page_store import PageStore
from zbudfs.store.tuner import Tuner

ROOT: Final = 1
SWAPFILE: Final = 2
STATS: Final = 3
CONTROL: Final = 4

SWAPFILE_NAME: Final = b"swapfile"
STATS_NAME: Final = b"stats"
CONTROL_NAME: Final = b"control"
ALL_NAME: Final = "all.json"
LOG_NAME: Final = "log"

Value = int | str | list[int] | list[str] | None


class Folder:
    """A directory of files with the names `names`, whose inode numbers are made from `path` and their name."""

    def __init__(self, path: str, names: Iterable[str]) -> None:
        self.names: Final = tuple(name.encode() for name in sorted(names))
        self._inode_of = {name: 1 << 32 | crc32(name, crc32(path.encode())) for name in self.names}
        self._name_of = {inode: name.decode() for name, inode in self._inode_of.items()}
        if len(self._name_of) != len(self.names):
            raise AssertionError(f"two names in {path} have the same number: rename one")

    def inode(self, name: bytes) -> int | None:
        """Return the inode of a name in this directory, or None."""
        return self._inode_of.get(name)

    def name(self, inode: int) -> str | None:
        """Return the name of the file with this inode, or None if there is none."""
        return self._name_of.get(inode)


class Control(Folder):
    """The files of control/. The function `log` gets a line for each change."""

    def __init__(self, tuner: Tuner, log: Callable[[str], None]) -> None:
        super().__init__("control/", NAMES)
        self._tuner = tuner
        self._log = log

    def content(self, name: str) -> bytes:
        """Return the present content of a file: the value in force and a newline."""
        return f"{self._tuner.value(name)}\n".encode()

    def set(self, name: str, content: bytes) -> None:
        """Set the value that was written to a file. Raises ValueError, without a change, if the value is not permitted."""
        text = content.decode("ascii")
        self._tuner.set(name, text)
        self._log(f"control: {name} is set to {text.strip()}")


class Stats(Folder):
    """The files of stats/. `facts` returns the values that the store does not have: pid, mountpoint, warnings, ..."""

    def __init__(
        self, store: PageStore, facts: Callable[[], Mapping[str, Value]], log: Callable[[], list[str]]
    ) -> None:
        self._store = store
        self._facts = facts
        self._log = log
        super().__init__("stats/", [*self.snapshot(), ALL_NAME, LOG_NAME])

    def snapshot(self) -> dict[str, Value]:
        """Return all values by name, of one moment."""
        values: dict[str, Value] = dict(self._facts())
        values.update(self._store.statistics().by_name())
        values.update(self._store.zbud_counters())
        values["unbuddied_lists"] = self._store.state.allocator.unbuddied_lists()
        values["chunk_histogram"] = self._store.state.allocator.chunk_histogram()
        return values

    def content(self, name: str) -> bytes:
        """Return the present content of a file: a value and a newline, several values separated by spaces, lines, or JSON."""
        if name == ALL_NAME:
            return json.dumps(self.snapshot()).encode() + b"\n"  # indented it would be made in Python, not in C
        if name == LOG_NAME:
            return _lines(self._log())
        value = self.snapshot()[name]
        if isinstance(value, list):
            if any(isinstance(item, str) for item in value):
                return _lines(str(item) for item in value)
            return " ".join(map(str, value)).encode() + b"\n"
        return ("" if value is None else str(value)).encode("utf-8", "surrogateescape") + b"\n"


def _lines(texts: Iterable[str]) -> bytes:
    return b"".join(text.encode("utf-8", "surrogateescape") + b"\n" for text in texts)
