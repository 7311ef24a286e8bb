# SPDX-License-Identifier: MIT
"""The contents of pages: of a page in RAM, and of a page in a copy of its block. Synchronous and without side effects."""

from typing import Final

from zbudfs.core.allocator import INDEX_MASK, REF_BITS
from zbudfs.core.codec import Codec, check_of, check_of_raw, page_of_word
from zbudfs.core.errors import Loss, PageLost
from zbudfs.core.page_table import (
    ABSENT,
    FRAME,
    RAW_BLOCK,
    RAW_FRAME,
    entry_check,
    entry_kind,
    entry_ref,
    word_of_entry,
)
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.state import State

ZERO_PAGE: Final = bytes(PAGE_SIZE)


class Contents:
    """Reads pages of `state`, whose zpages `codec` can decode."""

    def __init__(self, state: State, codec: Codec) -> None:
        self._entries = state.table.entries
        self._allocator = state.allocator
        self._decode = codec.decode
        self._counters = state.counters

    def in_ram(self, page: int) -> bytes | None:
        """Return the content of a page that is in RAM; None if it is in the backing file alone. PageLost, which it counts."""
        entry = self._entries[page]
        kind = entry_kind(entry)
        if kind == FRAME:
            zpage = self._allocator.zpage(entry_ref(entry), page)
            try:
                if zpage is None:
                    raise PageLost(f"page {page}: its place holds another page", Loss.FOREIGN)
                return self._decode(zpage)
            except PageLost as error:
                self._counters.lost(error.cause)
                raise
        if kind == ABSENT:
            return ZERO_PAGE
        if kind < FRAME:
            return page_of_word(word_of_entry(entry))
        if kind == RAW_FRAME:
            return bytes(self._allocator.frame_bytes(entry_ref(entry) >> REF_BITS))
        return None

    def in_copy(self, frame: int, page: int, entry: int) -> bytes:
        """Return the content of a page from the copy, in `frame`, of the block that `entry` names. PageLost, not counted.

        The zpage's checksum shows damage. The zpage must also have the entry's check: a disk can return an old version.
        """
        ref = entry_ref(entry)
        if entry_kind(entry) == RAW_BLOCK:
            content = bytes(self._allocator.frame_bytes(frame))
            if check_of_raw(content) != entry_check(entry):
                raise PageLost(f"page {page}: its block is damaged or old", Loss.DAMAGED)
            return content
        zpage = self._allocator.zpage(frame << REF_BITS | ref & INDEX_MASK, page)
        if zpage is None:
            raise PageLost(f"page {page}: its block holds another page", Loss.FOREIGN)
        if check_of(zpage) != entry_check(entry):
            self._decode(zpage)  # raises PageLost if it is damaged; otherwise it is an old version
            raise PageLost(f"page {page}: its block holds an old version of it", Loss.OLD)
        return self._decode(zpage)
