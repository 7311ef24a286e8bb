# SPDX-License-Identifier: MIT
"""Blocks that are being read, for both ways to read them: in a thread (page_in.py) and by the kernel (aio_page_in.py).

begin    the block is held: it is not used for anything else, whatever happens to its pages meanwhile
end      its copy becomes an ephemeral frame, if there is a frame for it and it is what the page table says
"""

from collections.abc import Iterable

import trio

from zbudfs.core.allocator import EPHEMERAL_KIND
from zbudfs.core.page_table import KIND_MASK, RAW_BLOCK
from zbudfs.core.readahead import ReadAhead
from zbudfs.core.units import NO_FRAME
from zbudfs.store.reclaimer import Reclaimer
from zbudfs.store.state import State


class BlockReads:
    """The blocks of one backing file that are being read, and the readers that are expected to go on."""

    def __init__(self, state: State, reclaimer: Reclaimer) -> None:
        self._state = state
        self._pool = state.pool
        self._reclaimer = reclaimer
        self.ahead = ReadAhead()
        self.loading: dict[int, trio.Event] = {}
        """By block: set when the read of it that is under way is over."""
        self.cumul_blocks = 0
        self.cumul_pages = 0
        self.cumul_readahead_blocks = 0
        self.cumul_refault_blocks = 0
        self.failures = 0

    def begin(self, block: int, over: trio.Event) -> None:
        """The block is being read from now on."""
        self.loading[block] = over
        self._state.hold_block(block)

    def end(self, block: int) -> None:
        """The read is over. The caller sets the event."""
        self._state.release_block(block)
        del self.loading[block]

    def blocks_ahead(self, wanted: Iterable[int], count: int, most: int) -> list[int]:
        """The blocks to read along with `count` wanted ones, for a reader that goes on where it was: at most `most`."""
        blocks, pool = self._state.blocks, self._pool
        listed = list(wanted)
        last = max(listed)
        window = self.ahead.window(min(listed), last, count)
        found: list[int] = []
        if not window or blocks is None:
            return found
        # A quarter of what can be ephemeral: what was read along earlier must not go for what is read along now.
        free = pool.free_frames - self._reclaimer.watermarks.low_frames
        room = (free + self._state.allocator.nr_frames_of(EPHEMERAL_KIND)) // 4
        for block in range(last + 1, min(last + 1 + min(window, room, most), blocks.nr_blocks)):
            if not blocks.live(block) or block in self.loading:
                break  # free, or on its way to the disk, or being read: not what a reader went on with
            found.append(block)
        return found

    def frame_to_keep(self) -> int:
        """A frame for a block that is read back: the coldest ephemeral one rather than one that writes need. NO_FRAME."""
        pool = self._pool
        if pool.free_frames <= self._reclaimer.watermarks.low_frames and not self._state.drop_ephemeral():
            return NO_FRAME
        return pool.take_frame()

    def keep(self, frame: int, block: int, before: dict[int, int], pages: Iterable[int], *, whole: bool) -> bool:
        """Adopt a frame of `fill_prep` that holds a copy of the block, or hand it back. Whether it was adopted.

        `whole`: one of `pages`, whose entries were `before`, has been read from the copy, or the block was read along.
        """
        if whole and self._adopt(frame, block, before, pages):
            return True
        self._state.allocator.fill_cancel(frame)
        self._pool.give_frame(frame)
        return False

    def _adopt(self, frame: int, block: int, before: dict[int, int], pages: Iterable[int]) -> bool:
        for page in pages:
            if before[page] & KIND_MASK == RAW_BLOCK:
                if self._state.table.entries[page] != before[page]:  # pragma: no cover  one page, and it was whole
                    return False
                self._state.adopt_raw(frame, block, page)
                return True
        return self._state.adopt(frame, block)
