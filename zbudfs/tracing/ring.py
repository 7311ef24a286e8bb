# SPDX-License-Identifier: MIT
"""The reader's side of a worker's ring (store/trace_ring.py), in a process of its own.

The ring is the file `trace` in the pool directory or, where the memory has no name, a file that the worker has open. Reading it
does not disturb the worker, which does not know how far a reader has come: records that it overwrites meanwhile are lost.
"""

from __future__ import annotations

import mmap
import os
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Final

from zbudfs.store.trace_ring import HEADER_BYTES, MAGIC, RING_BYTES, RING_RECORDS, Word

_HEADER_WORDS: Final = HEADER_BYTES // 8


class RingReader:
    """The ring in the open file `fd`, which is closed."""

    def __init__(self, fd: int) -> None:
        try:
            self._map = mmap.mmap(fd, RING_BYTES)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        self._tail = 0
        self._beat = 0

    @property
    def active(self) -> bool:
        """Whether a trace is on."""
        return self._words[Word.MAGIC] == MAGIC

    def read(self) -> tuple[array[int], int]:
        """Take what has come since the last time: two words a record; and how many records before it were lost."""
        words = self._words
        self._beat += 1
        words[Word.BEAT] = self._beat
        head, first = words[Word.HEAD], self._tail
        if head < first:  # the memory of a trace that has ended was given back
            return array("Q"), 0
        start = max(first, head - RING_RECORDS)
        taken = self._copy(start, head)
        # Meanwhile the oldest of these may have been overwritten, and one more may be about to be.
        safe = max(start, words[Word.HEAD] + 1 - RING_RECORDS)
        self._tail = head
        return taken[2 * (min(safe, head) - start) :], min(safe, head) - first

    def _copy(self, start: int, end: int) -> array[int]:
        copied = array("Q")
        while start < end:
            slot = start % RING_RECORDS
            some = min(end - start, RING_RECORDS - slot)
            at = _HEADER_WORDS + 2 * slot
            copied.frombytes(self._words[at : at + 2 * some].tobytes())
            start += some
        return copied

    def close(self) -> None:
        """Release the memory."""
        self._words.release()
        self._map.close()


def open_ring(pool_directory: str, worker_pid: int) -> RingReader:
    """Return the ring of a mount. FileNotFoundError if there is none, PermissionError for those who are not root."""
    with suppress(FileNotFoundError):
        return RingReader(os.open(f"{pool_directory}/trace", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
    for path in Path(f"/proc/{worker_pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the file was closed meanwhile
            if path.readlink().name.startswith("memfd:zbudfs-trace"):
                return RingReader(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    raise FileNotFoundError(f"the worker {worker_pid} has no ring for a trace")
