# SPDX-License-Identifier: MIT
"""Records of a trace: what was asked of the device and when, never what was in it. 16 bytes each.

    first word    | time since the start, microseconds: 53 bits | size class: 7 | kind: 4 |
    second word   | pages: 32 bits                    | first page: 32                    |

A size class says how the pages are kept: 0 takes no room (same-filled, or absent), 1 to 63 are the chunks of a zpage with its
handle, RAW_CLASS is a page that did not compress, UNKNOWN_CLASS is in the backing file alone, or was not stored.
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
    """What was asked, and what came of it."""

    WRITE = 1
    """Stored."""
    READ = 2
    """Answered from RAM."""
    PAGEIN = 3
    """Read, and in the backing file alone. What else a request asked for is READ."""
    DISCARD = 4
    REFUSED = 5
    """A write that was not stored, since there was no room."""
    LOST = 6
    """A read that failed."""
    GAP = 15
    """So many records, not pages, were overwritten before anybody had read them."""


def first_word(time_us: int, size_class: int, kind: int) -> int:
    """The first word of a record."""
    return time_us << TIME_SHIFT | size_class << KIND_BITS | kind


def second_word(page: int, pages: int) -> int:
    """The second word of a record; more pages than it can count are as many as it can."""
    return min(pages, 0xFFFFFFFF) << 32 | page
