# SPDX-License-Identifier: MIT
"""What can go wrong, by kind of situation. Nothing here has heard of errno; fuse/ translates.

    ZbudfsError
    ├── PoolFull           no frame, and writeback could not empty one: the page was not stored, nothing is lost
    ├── PageLost           this page cannot be read back: its zpage is missing, foreign or damaged
    ├── BackingError       the backing file refused or failed; what was in RAM still is
    │   └── BackingFull    it has no free block
    ├── OutOfRange         a read, write or discard beyond the device
    └── LayoutError        a file or table has not the layout that this version knows

A zpage larger than the largest buddy is a bug of the caller and therefore a ValueError.
"""

from enum import StrEnum


class ZbudfsError(Exception):
    """The base of all: never raised itself."""


class Refusal(StrEnum):
    """Why a write found no frame: the cause for which it is counted."""

    NO_BACKING = "no_backing"
    """The pool is full and there is no backing file."""
    BACKING_FULL = "backing_full"
    """The pool is full and so is the backing file."""
    BACKING_FAILING = "backing_failing"
    """The backing file has just failed, and is tried again later."""
    BACKING_STALLED = "backing_stalled"
    """The backing file has not answered for half a minute."""
    WRITEBACK_OFF = "writeback_off"
    """Somebody has turned writeback off."""
    BUDGET = "budget"
    """The budget of what may be written to the backing file is used up."""
    NO_MEMORY = "no_memory"
    """The limit allows more frames, but the system gives no memory for them."""
    BUSY = "busy"
    """All frames are being read or written at this moment: a pool of a few frames."""


class Loss(StrEnum):
    """Why a page cannot be read back: the cause for which it is counted."""

    DAMAGED = "damaged"
    """A checksum fails, or the zpage does not decompress."""
    FOREIGN = "foreign"
    """Its place holds another page."""
    OLD = "old"
    """Its block holds an old version of it."""
    CRASH = "crash"
    """Its frame or block did not confirm the page table after a worker had died."""


class PoolFull(ZbudfsError):
    """At the pool limit, and nothing could be written back or dropped."""

    def __init__(self, text: str, cause: Refusal = Refusal.BUSY) -> None:
        """Say `text`; it is counted for `cause`."""
        super().__init__(text)
        self.cause = cause


class PageLost(ZbudfsError):
    """The stored form of one page is missing, belongs to another page, or fails its checksum."""

    def __init__(self, text: str, cause: Loss = Loss.DAMAGED) -> None:
        """Say `text`; it is counted for `cause`."""
        super().__init__(text)
        self.cause = cause


class BackingError(ZbudfsError):
    """The backing file failed."""


class BackingFull(BackingError):
    """The backing file has no free block and cannot grow."""


class OutOfRange(ZbudfsError):
    """Beyond the end of the device."""


class LayoutError(ZbudfsError):
    """Not the layout this version knows."""
