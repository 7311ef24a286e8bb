# SPDX-License-Identifier: MIT
"""The errors of the store, by kind of situation, and the base class of errors whose text is for the user.

The errors of the store carry no errno: fuse/ translates them.

    ZbudfsError
    ├── PoolFull           no frame, and writeback could not empty one: the page was not stored, nothing is lost
    ├── PageLost           this page cannot be read back: its zpage is missing, foreign or damaged
    ├── BackingError       the backing file refused or failed; the pages in RAM are still there
    │   └── BackingFull    it has no free block
    ├── OutOfRange         a read, write or discard beyond the device
    └── LayoutError        this version does not know the layout of a file or table

A zpage larger than a frame can hold is a bug of the caller, and therefore a ValueError.
"""

from enum import StrEnum


class Failed(Exception):
    """The base class of errors that a command prints. The text is one sentence for the user, with the remedy if any."""


class ZbudfsError(Exception):
    """The base class of all errors of the store. It is never raised itself."""


class Refusal(StrEnum):
    """The cause for which a write found no frame. Each cause has its counter."""

    NO_BACKING = "no_backing"
    """The pool is full and there is no backing file."""
    BACKING_FULL = "backing_full"
    """The pool is full and so is the backing file."""
    BACKING_FAILING = "backing_failing"
    """The backing file has just failed. Writeback tries again later."""
    BACKING_STALLED = "backing_stalled"
    """The backing file has not answered for half a minute."""
    WRITEBACK_OFF = "writeback_off"
    """Writeback is turned off: `writeback_enabled` is 0."""
    BUDGET = "budget"
    """The budget of writes to the backing file is used up."""
    NO_MEMORY = "no_memory"
    """The limit allows more frames, but the system gives no memory for them."""
    BUSY = "busy"
    """Every frame is being read or written at this moment, which happens in a pool of a few frames."""


class Loss(StrEnum):
    """The cause for which a page cannot be read back. Each cause has its counter."""

    DAMAGED = "damaged"
    """A checksum fails, or the zpage does not decompress."""
    FOREIGN = "foreign"
    """Its place holds another page."""
    OLD = "old"
    """Its block holds an old version of it."""
    CRASH = "crash"
    """Its frame or block did not match the page table after the death of a worker."""


class PoolFull(ZbudfsError):
    """The pool is at its limit, and nothing could be written back or dropped."""

    def __init__(self, text: str, cause: Refusal = Refusal.BUSY) -> None:
        """Make an error with the message `text`, counted for `cause`."""
        super().__init__(text)
        self.cause = cause


class PageLost(ZbudfsError):
    """The stored form of one page is missing, belongs to another page, or fails its checksum."""

    def __init__(self, text: str, cause: Loss = Loss.DAMAGED) -> None:
        """Make an error with the message `text`, counted for `cause`."""
        super().__init__(text)
        self.cause = cause


class BackingError(ZbudfsError):
    """The backing file failed."""


class BackingFull(BackingError):
    """The backing file has no free block and cannot grow."""


class OutOfRange(ZbudfsError):
    """A request reaches beyond the end of the device."""


class LayoutError(ZbudfsError):
    """This version does not know the layout of a file or table."""
