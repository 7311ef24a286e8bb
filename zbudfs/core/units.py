# SPDX-License-Identifier: MIT
"""The units of the project, and the only place where they are converted.

There are four units:


    page   4096 bytes of the device          numbered from 0
    frame  4096 bytes of pool RAM            numbered from 0
    block  4096 bytes of the backing file    numbered from 0; block 0 is the file's header
    chunk  64 bytes, the unit of room inside a frame; a frame has NCHUNKS of them
"""

from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
"""Bytes of a page, of a frame and of a block."""

CHUNK_SHIFT: Final = 6
CHUNK_SIZE: Final = 1 << CHUNK_SHIFT
NCHUNKS: Final = PAGE_SIZE >> CHUNK_SHIFT

SIZE_CLASS_BYTES: Final = CHUNK_SIZE
"""Step of the size classes of zpages in bytes, handle included. Statistics and traces show no size more exactly."""
SIZE_CLASSES: Final = NCHUNKS
"""Number of size classes. Class 0 takes no room."""

WORD_SIZE: Final = 8
PAGE_WORDS: Final = PAGE_SIZE // WORD_SIZE

NO_FRAME: Final = -1
"""The frame number that stands for "none" in return values."""


def pages_in(size_bytes: int) -> int:
    """Return the whole pages needed for `size_bytes` bytes, rounded up."""
    return -(-size_bytes >> PAGE_SHIFT)
