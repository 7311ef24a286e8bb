# SPDX-License-Identifier: MIT
"""Records of a trace: the requests to the device with their times, without any content. 16 bytes each.

    first word    | time since the start, microseconds: 53 bits | size class: 7 | kind: 4 |
    second word   | pages: 32 bits                    | first page: 32                    |

A size class says how the pages are kept:

    0               they take no room: same-filled, or absent
    1 to 63         chunks of a zpage with its handle
    RAW_CLASS       pages that did not compress
    UNKNOWN_CLASS   pages that are in the backing file alone, or were not stored
"""

from enum import IntEnum
from typing import Final

from zbudfs.core.units import SIZE_CLASSES

RECORD_BYTES: Final = 16
KIND_BITS: Final = 4
KIND_MASK: Final = (1 << KIND_BITS) - 1
CLASS_BITS: Final = 7
CLASS_MASK: Final = (1 << CLASS_BITS) - 1
TIME_SHIFT: Final = KIND_BITS + CLASS_BITS

RAW_CLASS: Final = SIZE_CLASSES
UNKNOWN_CLASS: Final = CLASS_MASK


class Kind(IntEnum):
    """The kind of a request, with its result."""

    WRITE = 1
    """A write that was stored."""
    READ = 2
    """A read that was answered from RAM."""
    PAGEIN = 3
    """A read of pages that were in the backing file alone. The other pages of its request have a record of kind READ."""
    DISCARD = 4
    REFUSED = 5
    """A write that was not stored, since there was no room."""
    LOST = 6
    """A read that failed."""
    GAP = 15
    """A mark instead of a request: that many records (in place of pages) were overwritten before they were read."""


def first_word(time_us: int, size_class: int, kind: int) -> int:
    """Return the first word of a record."""
    return time_us << TIME_SHIFT | size_class << KIND_BITS | kind


def second_word(page: int, pages: int) -> int:
    """Return the second word of a record. It holds 2**32 - 1 pages at most."""
    return min(pages, 0xFFFFFFFF) << 32 | page
