# SPDX-License-Identifier: MIT
"""The blocks that are being read, for both ways of reading: in a thread (page_in.py) and by the kernel (aio_page_in.py).

A read has two steps here:

    begin    holds the block: it is not used for anything else, even if all its pages are freed meanwhile
    end      releases the block. `keep` has made its copy an ephemeral frame before, if the page table confirms the copy
"""

from collections.abc import Callable, Iterable

import trio

from zbudfs.core.allocator import EPHEMERAL_KIND
from zbudfs.core.page_table import RAW_BLOCK, entry_kind
from zbudfs.core.readahead import FEWEST_BLOCKS, ReadAhead
from zbudfs.core.units import NO_FRAME
from zbudfs.store.pool_limit import PoolLimit
from zbudfs.store.state import State


class Read:
    """A read of blocks that is under way. A task can wait for its end."""

    __slots__ = ("_over",)

    def __init__(self) -> None:
        self._over: trio.Event | None = None  # made for the first task that waits: most reads have none

    async def wait(self) -> None:
        """Wait for the end of the read."""
        if self._over is None:
            self._over = trio.Event()
        await self._over.wait()

    def end(self) -> None:
        """Wake the tasks that wait, since the read is over."""
        if self._over is not None:
            self._over.set()


class BlockReads:
    """The blocks of one backing file that are being read, and the state of its readers in order."""

    def __init__(self, state: State, limit: PoolLimit) -> None:
        self._state = state
        self._pool = state.pool
        self._limit = limit
        self.ahead = ReadAhead()
        self.loading: dict[int, Read] = {}
        """The read of each block that is being read, without those in C (core/hot_reads.c): see `under_way`."""
        self.take_over: Callable[[int], Read | None] = _nothing
        """A function that takes over the read of a block from C, and returns it."""

    def begin(self, block: int, read: Read) -> None:
        """Record that a read of the block begins, and hold the block."""
        self.loading[block] = read
        self._state.hold_block(block)

    def under_way(self, block: int) -> Read | None:
        """Return the read of a block, after taking it over if C does it. None: the block is not being read."""
        if not self._state.is_held(block):
            return None
        return self.loading.get(block) or self.take_over(block)

    def end(self, block: int) -> None:
        """Record that the read is over, and release the block. The caller ends the `Read`."""
        self._state.release_block(block)
        del self.loading[block]

    def blocks_ahead(self, wanted: Iterable[int], count: int, most: int) -> list[int]:
        """Return the read-ahead for `count` wanted blocks, if a reader in order reads them: at most `most` blocks."""
        blocks, pool = self._state.blocks, self._pool
        found: list[int] = []
        if count < FEWEST_BLOCKS:
            return found
        listed = list(wanted)
        last = max(listed)
        window = self.ahead.window(min(listed), last, count)
        if not window or blocks is None:
            return found
        # Only a quarter of the possible ephemeral frames: new read-ahead must not replace earlier read-ahead.
        free = pool.free_frames - self._limit.watermarks.low_frames
        room = (free + self._state.allocator.nr_frames_of(EPHEMERAL_KIND)) // 4
        for block in range(last + 1, min(last + 1 + min(window, room, most), blocks.nr_blocks)):
            if not blocks.live(block) or self._state.is_held(block):
                break  # the block is free, being written, or being read: a reader in order would not need it
            found.append(block)
        return found

    def frame(self) -> int:
        """Take a frame for the copy of a block. Return NO_FRAME if the pool has none to give.

        The method drops the coldest ephemeral frame first if writes need the free ones.
        """
        pool = self._pool
        if pool.free_frames <= self._limit.watermarks.low_frames and not self._state.drop_ephemeral():
            return NO_FRAME
        return pool.take_frame()

    def frame_to_fill(self) -> int:
        """Take a frame like `frame`, and make it unevictable until the caller gives it to `keep`."""
        frame = self.frame()
        if frame != NO_FRAME:
            self._state.allocator.fill_prep(frame)
        return frame

    def keep(self, frame: int, block: int, before: dict[int, int], pages: Iterable[int], *, whole: bool) -> bool:
        """Adopt a frame that holds a copy of the block, or hand it back. Return whether it was adopted.

        `whole`: one of `pages`, whose entries were `before`, was read from the copy, or the block is read-ahead.
        """
        if frame >= self._pool.nr_frames:
            self._pool.bounce.append(frame)
            return False
        if whole and self._adopt(frame, block, before, pages):
            return True
        self._state.allocator.fill_cancel(frame)
        self._pool.give_frame(frame)
        return False

    def _adopt(self, frame: int, block: int, before: dict[int, int], pages: Iterable[int]) -> bool:
        for page in pages:
            if entry_kind(before[page]) == RAW_BLOCK:
                if self._state.table.entries[page] != before[page]:  # pragma: no cover  one page, which was read
                    return False
                self._state.adopt_raw(frame, block, page)
                return True
        return self._state.adopt(frame, block)


def _nothing(_: int) -> None:
    """Take over nothing: this function is in place while C reads no block."""
