# SPDX-License-Identifier: MIT
"""The hot path in Python: the readable form of hot.c and hot_disk.c, with the same methods over the same tables.

    write, discard                     pages of a request           (read, make_ready, page_in: C alone, see there)
    coldest, evict, written            a batch of frames that goes to the backing file
    adopt, drop                        a block that is read back, and the release of its frame
    restore                            a zpage that the page table names, after a crash

Tests run both and compare every byte. The product uses this module while a page is patched, since C does not count the
changes of a watched page (store/state.py). A store that is made `pure` uses this module alone.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from zbudfs.core.allocator import EPHEMERAL_KIND, INDEX_MASK, PERSISTENT_KIND, REF_BITS, Allocator
from zbudfs.core.codec import Decompress, check_of, is_word
from zbudfs.core.page_table import BLOCK, FRAME, RAW_BLOCK, PageTable, entry, entry_kind, moved_entry
from zbudfs.core.units import NO_FRAME, PAGE_SHIFT, PAGE_SIZE, WORD_SIZE

if TYPE_CHECKING:
    from zbudfs.core._hot import ColdPath


class Reference:
    """The steps over the tables of one store. `block_of` is the pool's column by frame, which also holds ages."""

    def __init__(self, allocator: Allocator, table: PageTable, block_of: memoryview) -> None:
        self._allocator = allocator
        self._table = table
        self._block_of = block_of

    # ---- requests --------------------------------------------------------------------------------------------------

    def write(
        self,
        page: int,
        content: bytes | memoryview,
        compress: Callable[[memoryview], bytes],
        state: "ColdPath",
        between: Callable[[int], object],
    ) -> int:
        """Store whole pages, as many as there are frames for; return their number. Never calls `between`: requests wait."""
        view = memoryview(content)
        for at in range(0, len(view), PAGE_SIZE):
            piece = view[at : at + PAGE_SIZE]
            word = int.from_bytes(piece[:WORD_SIZE], sys.byteorder)
            if is_word(piece, word):
                stored = state.put_word(page, word)
            else:
                stored = state.put(page, compress(piece), piece)
            if not stored:
                return at >> PAGE_SHIFT
            page += 1
        return len(view) >> PAGE_SHIFT

    def discard(self, page: int, stop: int, most: int, state: "ColdPath") -> tuple[int, int]:
        """Free up to `most` stored pages below `stop`. Return the page at which to continue, and the number freed."""
        done = 0
        while done < most and (page := self._table.next_stored(page, stop)) < stop:
            state.forget(page)
            page += 1
            done += 1
        return page, done

    def read(self, page: int, count: int, decompress: Decompress) -> bytes | None:
        """Return None: store/contents.py reads every page."""
        return None

    def make_ready(self, decompress: Decompress) -> bool:
        """Return False: no page is made ready ahead of a reader."""
        return False

    # ---- to the backing file -------------------------------------------------------------------------------------

    def coldest(self, most: int) -> list[int]:
        """Return up to `most` persistent frames that are not unevictable, coldest first."""
        return list(islice(self._allocator.evictable(PERSISTENT_KIND), most))

    def evict(self, frames: Sequence[int]) -> None:
        """Make persistent frames zombies."""
        for frame in frames:
            self._allocator.writeback_begin(frame)

    def written(self, batch: Sequence[tuple[int, int]]) -> bytes:
        """Free zombies that are written, given as (frame, block). Return the mask of the live zpages of each block."""
        return bytes(map(self._written, batch))

    def _written(self, written: tuple[int, int]) -> int:
        frame, block = written
        live = self._move_to_block(frame, block)
        self._allocator.writeback_done(frame)
        return live

    def _move_to_block(self, frame: int, block: int) -> int:
        """Commit the pages of a frame as pages of a block that is its copy. Return the mask of their indices."""
        live = 0
        for ref, page in self._allocator.residents(frame):
            old = self._table.entries[page]
            index = ref & INDEX_MASK
            kind = BLOCK if entry_kind(old) == FRAME else RAW_BLOCK
            self._table.store(page, moved_entry(old, kind, block << REF_BITS | index))
            live |= 1 << index
        return live

    # ---- from the backing file -------------------------------------------------------------------------------------

    def page_in(
        self,
        frame: int,
        content: memoryview,
        block: int,
        live: int,
        wanted: dict[int, int],
        decompress: Decompress,
    ) -> dict[int, bytes] | None:
        """Return None: store/block_reads.py fills the frame, and store/contents.py reads every page."""
        return None

    def adopt(self, frame: int, block: int, live: int) -> bool:
        """Commit the live zpages of a block as zpages of a frame of `fill_prep` that holds its copy.

        False, without a change, if no zpage is live, or if one does not have the handle and the check of its page's entry.
        """
        found = list(self._copies(frame, block, live))
        if not found or None in found:
            return False
        copies = [copy for copy in found if copy is not None]
        self._allocator.fill_finish(frame, [ref for _, ref in copies])
        self._block_of[frame] = block
        for page, ref in copies:
            self._table.store(page, moved_entry(self._table.entries[page], FRAME, ref))
        return True

    def _copies(self, frame: int, block: int, live: int) -> Iterator[tuple[int, int] | None]:
        """Yield (page, ref) of each live zpage of a block whose copy is in a frame; None for one that its entry contradicts."""
        for index in range(self._allocator.most_zpages):
            if not live >> index & 1:
                continue
            ref = frame << REF_BITS | index
            page = self._allocator.handle_at(ref)
            zpage = self._allocator.zpage(ref, page)
            right = (
                zpage is not None
                and page < self._table.nr_pages
                and self._table.entries[page] == entry(BLOCK, block << REF_BITS | index, check_of(zpage))
            )
            yield (page, ref) if right else None

    def drop(self) -> int:
        """Free the coldest ephemeral frame, and commit its pages as pages of its block. Return the frame, or NO_FRAME."""
        frame = self._allocator.oldest(EPHEMERAL_KIND)
        if frame == NO_FRAME:
            return NO_FRAME
        self._allocator.drop_begin(frame)
        self._move_to_block(frame, self._block_of[frame])
        return self._allocator.drop_done(frame)

    # ---- after a crash -------------------------------------------------------------------------------------------

    def restore(self, ref: int, page: int) -> bool:
        """Claim the zpage at `ref` for `page`: see Allocator."""
        return self._allocator.restore(ref, page)
