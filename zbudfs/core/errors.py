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


class ZbudfsError(Exception):
    """The base of all: never raised itself."""


class PoolFull(ZbudfsError):
    """At the pool limit, and nothing could be written back or dropped."""


class PageLost(ZbudfsError):
    """The stored form of one page is missing, belongs to another page, or fails its checksum."""


class BackingError(ZbudfsError):
    """The backing file failed."""


class BackingFull(BackingError):
    """The backing file has no free block and cannot grow."""


class OutOfRange(ZbudfsError):
    """Beyond the end of the device."""


class LayoutError(ZbudfsError):
    """Not the layout this version knows."""
