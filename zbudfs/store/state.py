# SPDX-License-Identifier: MIT
"""All changes of a page's place. They are synchronous, without a checkpoint, so that no task ever sees half a change.

    absent, word   <-- put_word, forget
    frame          <-- put                       persistent: RAM holds the only copy
    block          <-- finish_writeback          from a persistent frame
    frame + block  <-- page_in, adopt            ephemeral: a clean copy of the block
    block          <-- drop_ephemeral

The order inside a change is always: the new form is complete, the entry is stored (the commit), the old form is freed. So a
reader of the page table alone always finds whole pages.
"""

from array import array
from itertools import islice
from typing import Final, NamedTuple

from zbudfs.core._hot import Hot
from zbudfs.core.allocator import (
    INDEX_MASK,
    MAX_ZPAGE_SIZE,
    MOST_ZPAGES,
    NO_REF,
    PERSISTENT_KIND,
    REF_BITS,
)
from zbudfs.core.block_map import SEGMENT_BLOCKS, BlockMap
from zbudfs.core.codec import WORD_ZPAGE_SIZE, Decompress, check_of, check_of_raw, word_zpage
from zbudfs.core.page_table import (
    ABSENT,
    BLOCK,
    FRAME,
    LOST,
    RAW_FRAME,
    PageTable,
    entry,
    entry_kind,
    entry_of_word,
    entry_ref,
    moved_entry,
)
from zbudfs.core.reference import Reference
from zbudfs.core.units import NO_FRAME
from zbudfs.store.pool import Pool

HOLD_INDEX: Final = MOST_ZPAGES
"""The live bit of a block that stands for "being read": the block is not reused then, even if all its pages are freed."""

FRESH_SECONDS: Final = 30
"""A block that is read within this time after its write should have stayed in RAM. Guessed."""

AGE_STEPS: Final = 4096
"""Frames that one search for old frames visits: 0.3 ms. Guessed."""


class Eviction(NamedTuple):
    """One frame that is being written to one block."""

    frame: int
    block: int


class State:
    """Page table, pool and block map, changed together.

    `blocks` is None if there is no backing file. With `pure` no step is done in C.
    I1: a page's entry names a zpage whose handle is that page.
    I2: zpage i of block b is live iff an entry names it, or an entry names zpage i of an ephemeral frame with
        block_of[frame] == b.
    """

    def __init__(self, table: PageTable, pool: Pool, blocks: BlockMap | None, *, pure: bool = False) -> None:
        self.table = table
        self.pool = pool
        self.allocator = pool.allocator
        self.blocks = blocks
        self._reference = Reference(pool.allocator, table, pool.block_of)
        self.path: Hot | Reference = self._reference if pure else pool.allocator.hot_path(table, pool.stored_at)
        """The object that does the steps of the common cases."""
        self.watched: dict[int, list[int]] = {}
        """[tasks that watch it, changes of its content] of a page. A task that patches it across a checkpoint watches it."""
        self._stored_at = pool.stored_at
        self.now = 0
        """Seconds on the store's clock. The reclaimer sets it about once a second, so that no page costs a call of a clock."""
        self.written_at = array("I", bytes(4 * blocks.nr_segments)) if blocks is not None else array("I")
        """Time until which the last write to a segment counts as fresh, by segment, on the store's clock."""
        self.counters = pool.memory.status_area.counters
        self.take_frame = pool.take_frame
        self.give_frame = pool.give_frame

    @property
    def changing_path(self) -> Hot | Reference:
        """The path for changes of content: C does not count the changes of watched pages."""
        return self._reference if self.watched else self.path

    # ---- content ---------------------------------------------------------------------------------------------------

    def put(self, page: int, zpage: bytes, content: bytes | memoryview) -> bool:
        """Store a page as its zpage, or raw if that does not fit. False, without a change, if there is no frame."""
        if len(zpage) <= MAX_ZPAGE_SIZE and len(zpage) != WORD_ZPAGE_SIZE:
            return self.place(page, zpage)
        stored = self.place_raw(page, content)
        self.counters.cumul_raw_pages += stored
        return stored

    def put_word(self, page: int, word: int) -> bool:
        """Store a same-filled page. False, without a change, if its word does not fit and there is no frame for it."""
        whole = entry_of_word(word)
        if whole is not None:
            self._commit(page, whole)
            return True
        return self.place(page, word_zpage(word))

    def place(self, page: int, zpage: bytes | memoryview) -> bool:
        """Store a zpage as the content of `page`. False, without a change, if there is no frame for it.

        A zpage that is too large for a frame is a ValueError: see `place_raw`.
        """
        allocator = self.allocator
        ref = allocator.match(page, zpage)
        if ref == NO_REF:
            frame = self.pool.take_frame()
            if frame == NO_FRAME:
                return False
            ref = allocator.create_prep(frame, len(zpage))
            allocator.create_finish(ref, page, zpage)
        self._stored_at[ref >> REF_BITS] = self.now
        self._commit(page, entry(FRAME, ref, check_of(zpage)))
        return True

    def place_raw(self, page: int, content: bytes | memoryview) -> bool:
        """Store the page uncompressed. False, without a change, if there is no frame for it."""
        frame = self.pool.take_frame()
        if frame == NO_FRAME:
            return False
        ref = self.allocator.create_raw(frame, page, content)
        self._stored_at[frame] = self.now
        self._commit(page, entry(RAW_FRAME, ref, check_of_raw(content)))
        return True

    def forget(self, page: int) -> None:
        """Make the page absent."""
        self._commit(page, ABSENT)

    def _commit(self, page: int, new: int) -> None:
        old = self.table.store(page, new)
        watch = self.watched.get(page)
        if watch is not None:
            watch[1] += 1
        if entry_kind(old) >= FRAME:
            self.free_place(old)

    def free_place(self, old: int) -> None:
        """Free the place named by a superseded entry of one of the kinds from FRAME on."""
        ref = entry_ref(old)
        if entry_kind(old) >= BLOCK:
            self._free_in_block(ref)
        else:
            self._free_in_frame(ref)

    def _free_in_frame(self, ref: int) -> None:
        allocator = self.allocator
        frame = ref >> REF_BITS
        if allocator.is_ephemeral(frame):
            self._free_in_block(self.pool.block_of[frame] << REF_BITS | ref & INDEX_MASK)
        emptied = allocator.free(ref)
        if emptied != NO_FRAME:
            self.pool.give_frame(emptied)

    def _free_in_block(self, ref: int) -> None:
        if not ref:
            return  # the page was LOST
        assert self.blocks is not None
        self.blocks.free(ref >> REF_BITS, ref & INDEX_MASK)

    # ---- to the backing file -------------------------------------------------------------------------------------

    def begin_writeback(self, most: int, stored_before: int | None = None) -> list[Eviction]:
        """Make up to `most` of the coldest persistent frames zombies and give them blocks; fewer if frames or blocks lack.

        With `stored_before` it takes only frames whose last store was before that second.
        """
        batch: list[Eviction] = []
        blocks = self.blocks
        if blocks is None:
            return batch
        frames = self._coldest(most, stored_before)
        while len(batch) < len(frames):
            block, count = blocks.alloc(len(frames) - len(batch))
            if not count:
                break
            batch += map(Eviction, frames[len(batch) : len(batch) + count], range(block, block + count))
        chosen = frames[: len(batch)]
        self.path.evict(chosen)
        return batch

    def _coldest(self, most: int, stored_before: int | None) -> list[int]:
        """Return up to `most` evictable persistent frames, coldest first.

        Raw frames go to the old end however new they are. So a new raw frame does not end the search for old frames, while
        a new frame with zpages does. If there are many new raw frames, the search stops at them until they are old.
        """
        if stored_before is None:
            return self.path.coldest(most)
        found: list[int] = []
        for frame in islice(self.allocator.evictable(PERSISTENT_KIND), AGE_STEPS):
            if len(found) == most:
                break
            if self._stored_at[frame] < stored_before:
                found.append(frame)
            elif not self.allocator.is_raw(frame):
                break
        return found

    def finish_writeback(self, batch: list[Eviction]) -> int:
        """Commit the pages of a batch as pages of its blocks, and free the frames. Return the number of frames freed.

        A page that was overwritten or discarded during the write is no resident any more, and its place in the block
        counts as free.
        """
        assert self.blocks is not None
        lives = self.path.written(batch)
        fresh_until = self.now + FRESH_SECONDS
        for (frame, block), live in zip(batch, lives, strict=True):
            self.counters.cumul_writeback_pages += live.bit_count()
            self.blocks.set_live(block, live)
            self.give_frame(frame)
            self.written_at[block // SEGMENT_BLOCKS] = fresh_until
        self.counters.cumul_writeback_frames += len(batch)
        return len(batch)

    def is_fresh(self, block: int) -> bool:
        """Return whether the segment of the block was written within the last FRESH_SECONDS: most likely the block was."""
        return self.now < self.written_at[block // SEGMENT_BLOCKS]

    def fail_writeback(self, batch: list[Eviction]) -> None:
        """Undo a failed write: the frames return to the old end of the LRU, in their order, and their blocks are free."""
        assert self.blocks is not None
        for frame, block in reversed(batch):
            self.blocks.set_live(block, 0)
            emptied = self.allocator.writeback_failed(frame)
            if emptied != NO_FRAME:
                self.pool.give_frame(emptied)

    # ---- from the backing file ---------------------------------------------------------------------------------------

    def hold_block(self, block: int) -> None:
        """Hold a block that is being read: it is not used for anything else until `release_block`."""
        assert self.blocks is not None
        self.blocks.set_live(block, self.blocks.live(block) | 1 << HOLD_INDEX)

    def is_held(self, block: int) -> bool:
        """Return whether the block is being read."""
        assert self.blocks is not None
        return bool(self.blocks.live(block) >> HOLD_INDEX & 1)

    def release_block(self, block: int) -> None:
        """Release a block whose read is over."""
        assert self.blocks is not None
        self.blocks.free(block, HOLD_INDEX)

    def page_in(
        self,
        frame: int,
        content: memoryview,
        block: int,
        wanted: dict[int, int],
        decompress: Decompress,
    ) -> dict[int, bytes] | None:
        """Make a free frame the copy of a held block, with its content, and return the contents of the wanted pages.

        `wanted` has the entries of the pages when the read began. None, without a change, if one of them has changed, if the
        block is raw, or if its content is not what the page table expects. `adopt` and `Contents.in_copy` do it one by one.
        """
        assert self.blocks is not None
        live = self.blocks.live(block) & ~(1 << HOLD_INDEX)
        return self.path.page_in(frame, content, block, live, wanted, decompress)

    def adopt(self, frame: int, block: int) -> bool:
        """Commit the pages of `block` as pages of its copy in a frame of `fill_prep`. False if the table does not confirm it.

        The copy is used only if every live zpage of it has its page's handle and check. Otherwise nothing changes.
        """
        assert self.blocks is not None
        return self.path.adopt(frame, block, self.blocks.live(block) & ~(1 << HOLD_INDEX))

    def adopt_raw(self, frame: int, block: int, page: int) -> None:
        """Commit the raw page `page` as the content of its copy in a frame of `fill_prep`; the caller has checked it."""
        ref = self.allocator.fill_finish_raw(frame, page)
        self.pool.block_of[frame] = block
        self.table.store(page, moved_entry(self.table.entries[page], RAW_FRAME, ref))

    def drop_ephemeral(self) -> bool:
        """Free the coldest ephemeral frame, and commit its pages as pages of its block. False if there is none."""
        frame = self.path.drop()
        if frame == NO_FRAME:
            return False
        self.give_frame(frame)
        self.counters.cumul_dropped_frames += 1
        return True

    @property
    def coldest_age_seconds(self) -> int:
        """Seconds since the last store to the coldest persistent frame; 0 if there is none."""
        frame = self.allocator.oldest(PERSISTENT_KIND)
        return self.now - self._stored_at[frame] if frame != NO_FRAME else 0

    # ---- checks --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Recount everything; AssertionError where two tables differ. O(pages + frames + blocks)."""
        self.table.check()
        self.pool.check()
        self.allocator.check()
        live: dict[int, int] = {}
        refs = set()
        for page, found in enumerate(self.table.entries):
            if entry_kind(found) < FRAME or found == LOST:
                continue
            ref = entry_ref(found)
            if entry_kind(found) in (FRAME, RAW_FRAME):
                assert ref not in refs, f"two pages at ref {ref}"
                refs.add(ref)
                assert (ref, page) in self.allocator.residents(ref >> REF_BITS), f"I1: page {page} is not at {ref}"
                if not self.allocator.is_ephemeral(ref >> REF_BITS):
                    continue
                ref = self.pool.block_of[ref >> REF_BITS] << REF_BITS | ref & INDEX_MASK
            bit = 1 << (ref & INDEX_MASK)
            assert not live.get(ref >> REF_BITS, 0) & bit, f"two pages at {ref & INDEX_MASK} of block {ref >> REF_BITS}"
            live[ref >> REF_BITS] = live.get(ref >> REF_BITS, 0) | bit
        if self.blocks is not None:
            self.blocks.check()
            for block, expected in live.items():
                have = self.blocks.live(block) & ~(1 << HOLD_INDEX)
                assert have == expected, f"I2: live zpages of block {block}: {have:b}, a recount gives {expected:b}"
