# SPDX-License-Identifier: MIT
"""The contents of pages: of one that is in RAM, and of one in a copy of its block. Synchronous, and nothing is changed."""

from collections.abc import Callable
from typing import Final

from zbudfs.core.allocator import INDEX_MASK, REF_BITS
from zbudfs.core.codec import check_of, check_of_raw, page_of_word
from zbudfs.core.errors import Loss, PageLost
from zbudfs.core.page_table import (
    ABSENT,
    CHECK_SHIFT,
    FRAME,
    KIND_BITS,
    KIND_MASK,
    RAW_BLOCK,
    RAW_FRAME,
    REF_MASK,
    word_of_entry,
)
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.state import State

ZERO_PAGE: Final = bytes(PAGE_SIZE)


class Contents:
    """Reads pages of `state`; `decode` turns a zpage into a page."""

    def __init__(self, state: State, decode: Callable[[bytes | memoryview], bytes]) -> None:
        self._entries = state.table.entries
        self._allocator = state.allocator
        self._decode = decode
        self.lost: dict[str, int] = dict.fromkeys(Loss, 0)
        """Pages that could not be read, by cause; counted by the reader that reports the loss."""

    def in_ram(self, page: int) -> bytes | None:
        """The content of a page that is in RAM, or None if it is in the backing file alone. PageLost, counted."""
        entry = self._entries[page]
        kind = entry & KIND_MASK
        if kind == FRAME:
            zpage = self._allocator.zpage(entry >> KIND_BITS & REF_MASK, page)
            try:
                if zpage is None:
                    raise PageLost(f"page {page}: its place holds another page", Loss.FOREIGN)
                return self._decode(zpage)
            except PageLost as error:
                self.lost[error.cause] += 1
                raise
        if kind == ABSENT:
            return ZERO_PAGE
        if kind < FRAME:
            return page_of_word(word_of_entry(entry))
        if kind == RAW_FRAME:
            return bytes(self._allocator.raw(entry >> KIND_BITS & REF_MASK))
        return None

    def in_copy(self, frame: int, page: int, entry: int) -> bytes:
        """The content of a page from a copy in `frame` of the block that `entry` names. PageLost, not counted.

        The zpage tells whether it is whole. Its check must be the entry's as well: a disk can give back an old version.
        """
        ref = entry >> KIND_BITS & REF_MASK
        if entry & KIND_MASK == RAW_BLOCK:
            content = bytes(self._allocator.raw(frame << REF_BITS))
            if check_of_raw(content) != entry >> CHECK_SHIFT:
                raise PageLost(f"page {page}: its block is damaged or old", Loss.DAMAGED)
            return content
        zpage = self._allocator.zpage(frame << REF_BITS | ref & INDEX_MASK, page)
        if zpage is None:
            raise PageLost(f"page {page}: its block holds another page", Loss.FOREIGN)
        if check_of(zpage) != entry >> CHECK_SHIFT:
            self._decode(zpage)  # damaged, or whole and old
            raise PageLost(f"page {page}: its block holds an old version of it", Loss.OLD)
        return self._decode(zpage)
