# SPDX-License-Identifier: MIT
"""The tree that the mount shows, with inode numbers that never change.

/              1
/swapfile      2    0600, the device
/stats         3    one value a file, and all.json; 0444
/control       4    0700, what can be changed (core/tunables.py): one value a file, 0600
/stats/...          made from the name: the kernel keeps names for ever, and a newer version that takes over has
/control/...        other names, but must not give the number of one file to another
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Final
from zlib import crc32

from zbudfs.core.tunables import NAMES
from zbudfs.store.page_store import PageStore
from zbudfs.store.steering import Steering

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
        """The inode of a name in this directory, or None."""
        return self._inode_of.get(name)

    def name(self, inode: int) -> str | None:
        """The name of the file with this inode, or None if there is none."""
        return self._name_of.get(inode)


class Control(Folder):
    """The files of control/. `log` is told what was set."""

    def __init__(self, steering: Steering, log: Callable[[str], None]) -> None:
        super().__init__("control/", NAMES)
        self._steering = steering
        self._log = log

    def content(self, name: str) -> bytes:
        """What the file holds now: the value in force and a newline."""
        return f"{self._steering.value(name)}\n".encode()

    def set(self, name: str, content: bytes) -> None:
        """What was written to the file. ValueError, and nothing has changed."""
        text = content.decode("ascii")
        self._steering.set(name, text)
        self._log(f"control: {name} is set to {text.strip()}")


class Stats(Folder):
    """The files of stats/. `facts` gives what the store does not know: pid, mountpoint, warnings, ..."""

    def __init__(
        self, store: PageStore, facts: Callable[[], Mapping[str, Value]], log: Callable[[], list[str]]
    ) -> None:
        self._store = store
        self._facts = facts
        self._log = log
        super().__init__("stats/", [*self.snapshot(), ALL_NAME, LOG_NAME])

    def snapshot(self) -> dict[str, Value]:
        """Everything by name, of one moment."""
        values: dict[str, Value] = dict(self._facts())
        values.update(self._store.statistics().by_name())
        values.update(self._store.causes())
        values.update(self._store.zbud_counters())
        values["unbuddied_lists"] = self._store.unbuddied_lists()
        values["chunk_histogram"] = self._store.chunk_histogram()
        return values

    def content(self, name: str) -> bytes:
        """What the file holds now: a value and a newline, several values separated by spaces, lines, or JSON."""
        if name == ALL_NAME:
            return json.dumps(self.snapshot()).encode() + b"\n"  # indented it would not be done in C
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
