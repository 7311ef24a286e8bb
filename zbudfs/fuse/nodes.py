# SPDX-License-Identifier: MIT
"""The tree that the mount shows, with inode numbers that never change.

/            1
/swapfile    2    0600, the device
/stats       3    one value a file, and all.json
/stats/...   16 and on, in the order of their names
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Final

from zbudfs.store.page_store import PageStore

ROOT: Final = 1
SWAPFILE: Final = 2
STATS: Final = 3
FIRST_STAT: Final = 16

SWAPFILE_NAME: Final = b"swapfile"
STATS_NAME: Final = b"stats"
ALL_NAME: Final = "all.json"
LOG_NAME: Final = "log"

Value = int | str | list[int] | list[str] | None


class Stats:
    """The files of stats/. `facts` gives what the store does not know: pid, mountpoint, warnings, ..."""

    def __init__(
        self, store: PageStore, facts: Callable[[], Mapping[str, Value]], log: Callable[[], list[str]]
    ) -> None:
        self._store = store
        self._facts = facts
        self._log = log
        names = [*self.snapshot(), ALL_NAME, LOG_NAME]
        self.names: Final = tuple(name.encode() for name in sorted(names))
        self._inode_of = {name: FIRST_STAT + index for index, name in enumerate(self.names)}

    def inode(self, name: bytes) -> int | None:
        """The inode of stats/`name`, or None."""
        return self._inode_of.get(name)

    def name(self, inode: int) -> str | None:
        """The name of the file with this inode, or None if there is none."""
        index = inode - FIRST_STAT
        return self.names[index].decode() if 0 <= index < len(self.names) else None

    def snapshot(self) -> dict[str, Value]:
        """Everything by name, of one moment."""
        values: dict[str, Value] = dict(self._facts())
        values.update(asdict(self._store.statistics()))
        values.update(self._store.zbud_counters())
        values["unbuddied_lists"] = self._store.unbuddied_lists()
        values["chunk_histogram"] = self._store.chunk_histogram()
        return values

    def content(self, name: str) -> bytes:
        """What the file holds now: a value and a newline, several values separated by spaces, lines, or JSON."""
        if name == ALL_NAME:
            return json.dumps(self.snapshot(), indent=1).encode() + b"\n"
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
