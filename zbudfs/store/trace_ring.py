# SPDX-License-Identifier: MIT
"""The ring into which the worker puts the records of a trace, in shared memory that another process reads.

    0       header, 8-byte words (see Word)
    4 KiB   RING_RECORDS records (core/trace.py); number n is at n modulo that

Putting a record there takes a few stores, without an allocation or a wait. A reader that is too slow loses the oldest
records, and sees that from their numbers. A record is complete before HEAD counts it. The ring has memory only while a trace
is on. Every worker writes the same ring, so that a takeover does not end a trace.
"""

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from zbudfs.core.trace import CLASS_BITS, KIND_BITS, RECORD_BYTES, TIME_SHIFT, first_word, second_word
from zbudfs.store.arena import Arena

RING_RECORDS: Final = 1 << 16
"""Records of the ring, 1 MiB: a second of the fastest storm that was measured, if every page of it had its own record."""

HEADER_BYTES: Final = 4096
RING_BYTES: Final = HEADER_BYTES + RING_RECORDS * RECORD_BYTES
MAGIC: Final = 0x31656361_7274627A
"""Number of this layout."""

_HEADER_WORDS: Final = HEADER_BYTES // 8
_MASK: Final = RING_RECORDS - 1
_STAMPED: Final = 1 << TIME_SHIFT

assert KIND_BITS + CLASS_BITS == TIME_SHIFT


class Word(IntEnum):
    """The words of the header."""

    MAGIC = 0
    """MAGIC while there is a trace. It is set last when a trace begins, and is 0 otherwise."""
    HEAD = 1
    """Number of records so far."""
    STARTED_US = 2
    """Start of the trace, in microseconds on the clock that all processes share (CLOCK_MONOTONIC)."""
    BEAT = 3
    """A number that the reader changes regularly. The trace ends if it does not."""


class TraceRing:
    """The writer's side of the ring in `arena`."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._words = arena.view.cast("Q")
        self._head = 0
        self._started_us = 0

    def populate(self) -> None:
        """Give the ring memory; MemoryError. For a worker thread."""
        self._arena.populate(0, RING_BYTES)

    def release(self) -> None:
        """Free the memory of the ring. For a worker thread."""
        self._arena.release(0, self._arena.size)

    def begin(self) -> None:
        """Start an empty ring, whose time begins now. It must be populated."""
        words = self._words
        words[Word.HEAD] = self._head = 0
        words[Word.STARTED_US] = self._started_us = time.monotonic_ns() // 1000
        words[Word.BEAT] = 0
        words[Word.MAGIC] = MAGIC

    def resume(self) -> None:
        """Continue the ring of an earlier worker."""
        self._head = self._words[Word.HEAD]
        self._started_us = self._words[Word.STARTED_US]

    def end(self) -> None:
        """End the trace; readers see that no more records will come."""
        self._words[Word.MAGIC] = 0

    @property
    def beat(self) -> int:
        """The number that the reader changes as long as it reads."""
        return self._words[Word.BEAT]

    def put(self, kind: int, page: int, pages: int, size_class_of: Callable[[int], int]) -> None:
        """Record a request of one page or more, as one record for each run of pages of the same size class."""
        words, head = self._words, self._head
        stamp = (time.monotonic_ns() // 1000 - self._started_us) << TIME_SHIFT | kind
        start, end = page, page + pages
        size_class = size_class_of(page)
        while page < end:
            page += 1
            following = size_class_of(page) if page < end else -1
            if following != size_class:
                at = _HEADER_WORDS + ((head & _MASK) << 1)
                words[at + 1] = (page - start) << 32 | start
                words[at] = stamp | size_class << KIND_BITS
                head += 1
                start, size_class = page, following
        self._head = words[Word.HEAD] = head

    def put_one(self, kind: int, page: int, pages: int, size_class: int) -> None:
        """Record a request whose pages are all of one size class."""
        at = _HEADER_WORDS + ((self._head & _MASK) << 1)
        time_us = time.monotonic_ns() // 1000 - self._started_us
        self._words[at + 1] = second_word(page, pages)
        self._words[at] = first_word(time_us, size_class, kind)
        self._head += 1
        self._words[Word.HEAD] = self._head
