# SPDX-License-Identifier: MIT
"""Every change of where a page is. Synchronous: nothing here gives way, so nobody ever sees half a change.

    absent, word   <-- put_word, forget
    frame          <-- put                       persistent: RAM holds the only copy
    block          <-- finish_writeback          from a persistent frame
    frame + block  <-- adopt                     ephemeral: a clean copy of the block
    block          <-- drop_ephemeral

The order inside a change is always: the new form is complete, the entry is stored (the commit), the old form is
freed. Whoever reads the page table alone therefore always finds whole pages.
"""

from array import array
from typing import Final, NamedTuple

from zbudfs.core.allocator import (
    EPHEMERAL_KIND,
    INDEX_MASK,
    MAX_ZPAGE_SIZE,
    MOST_ZPAGES,
    NO_REF,
    PERSISTENT_KIND,
    REF_BITS,
)
from zbudfs.core.block_map import SEGMENT_BLOCKS, BlockMap
from zbudfs.core.codec import WORD_ZPAGE_SIZE, check_of, check_of_raw, word_zpage
from zbudfs.core.hot import Hot
from zbudfs.core.page_table import (
    ABSENT,
    BLOCK,
    CHECK_SHIFT,
    FRAME,
    KIND_BITS,
    KIND_MASK,
    LOST,
    RAW_BLOCK,
    RAW_FRAME,
    REF_MASK,
    PageTable,
    entry_of_word,
)
from zbudfs.core.units import NO_FRAME
from zbudfs.store.pool import Pool

HOLD_INDEX: Final = MOST_ZPAGES
"""The live bit of a block that stands for "being read": the block is not reused meanwhile, whatever happens to its pages."""

FRESH_SECONDS: Final = 30
"""What is read back so soon after it was written should have stayed in RAM. Guessed."""

AGE_STEPS: Final = 4096
"""Frames that one search for old ones looks at: 0.3 ms. Guessed."""

_CHECK_FIELD = ((1 << 64) - 1) >> CHECK_SHIFT << CHECK_SHIFT


class Eviction(NamedTuple):
    """One frame on its way to one block."""

    frame: int
    block: int


class State:
    """Page table, pool and block map, changed together.

    `blocks` is None where there is no backing file. `hot` does in C what it can (core/hot_disk.c); None: all is done here.
    I1: a page's entry names a zpage whose handle is that page.
    I2: zpage i of block b is live iff an entry names it, or an entry names zpage i of an ephemeral frame with
        block_of[frame] == b.
    """

    def __init__(self, table: PageTable, pool: Pool, blocks: BlockMap | None, hot: Hot | None = None) -> None:
        self.table = table
        self.pool = pool
        self.allocator = pool.allocator
        self.blocks = blocks
        self._hot = hot
        self.watched: dict[int, list[int]] = {}
        """By page: [tasks that watch it, changes of its content]. Kept by whoever patches a page across a checkpoint."""
        self._stored_at = pool.stored_at
        self.now = 0
        """Seconds on the store's clock, kept right to a second or so by the reclaimer: no page costs a look at the clock."""
        self._written_at = array("I", bytes(4 * blocks.nr_segments)) if blocks is not None else array("I")
        """By segment: until when what was written there last is fresh."""
        self.cumul_writeback_frames = 0
        self.cumul_writeback_pages = 0
        self.dropped_ephemeral_frames = 0
        self.cumul_raw_pages = 0
        self.take_frame = pool.take_frame
        self.give_frame = pool.give_frame

    # ---- content ---------------------------------------------------------------------------------------------------

    def put(self, page: int, zpage: bytes, content: bytes | memoryview) -> bool:
        """Store a page by its zpage, or as it is where that cannot be; False, and nothing has changed, if there is no frame."""
        if len(zpage) <= MAX_ZPAGE_SIZE and len(zpage) != WORD_ZPAGE_SIZE:
            return self.place(page, zpage)
        stored = self.place_raw(page, content)
        self.cumul_raw_pages += stored
        return stored

    def put_word(self, page: int, word: int) -> bool:
        """Store a same-filled page; False, and nothing has changed, if its word does not fit and there is no frame for it."""
        entry = entry_of_word(word)
        if entry is not None:
            self._commit(page, entry)
            return True
        return self.place(page, word_zpage(word))

    def place(self, page: int, zpage: bytes | memoryview) -> bool:
        """Store a zpage as the content of `page`; False, and nothing has changed, if there is no frame for it.

        One that is too large for a buddy is refused with ValueError: see `place_raw`.
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
        self._commit(page, check_of(zpage) << CHECK_SHIFT | ref << KIND_BITS | FRAME)
        return True

    def place_raw(self, page: int, content: bytes | memoryview) -> bool:
        """Store the page as it is; False, and nothing has changed, if there is no frame for it."""
        frame = self.pool.take_frame()
        if frame == NO_FRAME:
            return False
        ref = self.allocator.create_raw(frame, page, content)
        self._stored_at[frame] = self.now
        self._commit(page, check_of_raw(content) << CHECK_SHIFT | ref << KIND_BITS | RAW_FRAME)
        return True

    def forget(self, page: int) -> None:
        """The page is absent from now on."""
        self._commit(page, ABSENT)

    def _commit(self, page: int, entry: int) -> None:
        old = self.table.store(page, entry)
        if self.watched:
            watch = self.watched.get(page)
            if watch is not None:
                watch[1] += 1
        if old & KIND_MASK >= FRAME:
            self.free_place(old)

    def free_place(self, entry: int) -> None:
        """Where a page was that is elsewhere now, by its entry of then: free it."""
        ref = entry >> KIND_BITS & REF_MASK
        if entry & KIND_MASK >= BLOCK:
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
        """Make up to `most` of the coldest persistent frames zombies and give them blocks; fewer, or none, if there are not.

        With `stored_before` only of those to which nothing was added in or after that second.
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
        if self._hot is not None:
            self._hot.evict(chosen)
        else:
            for frame in chosen:
                self.allocator.writeback_begin(frame)
        return batch

    def _coldest(self, most: int, stored_before: int | None) -> list[int]:
        """Up to `most` evictable persistent frames, coldest first.

        Raw frames go to the old end however new they are. So a new raw frame does not end the search for old frames, and a
        new frame of another kind does; and for many new raw frames it is given up until they are old themselves.
        """
        if stored_before is None and self._hot is not None:
            return self._hot.coldest(most)
        found: list[int] = []
        for step, frame in enumerate(self.allocator.evictable(PERSISTENT_KIND)):
            if len(found) == most or (step == AGE_STEPS and stored_before is not None):
                break
            if stored_before is None or self._stored_at[frame] < stored_before:
                found.append(frame)
            elif not self.allocator.is_raw(frame):
                break
        return found

    def finish_writeback(self, batch: list[Eviction]) -> int:
        """The frames are in their blocks: their pages are there from now on. Returns the number of frames freed.

        A page that was overwritten or discarded while its frame was on the way is no resident any more, and its
        place in the block counts as free.
        """
        assert self.blocks is not None
        lives = self._hot.written(batch) if self._hot is not None else map(self._commit_written, batch)
        fresh_until = self.now + FRESH_SECONDS
        for (frame, block), live in zip(batch, lives, strict=True):
            self.cumul_writeback_pages += live.bit_count()
            self.blocks.set_live(block, live)
            self.give_frame(frame)
            self._written_at[block // SEGMENT_BLOCKS] = fresh_until
        self.cumul_writeback_frames += len(batch)
        return len(batch)

    def _commit_written(self, written: Eviction) -> int:
        """The pages of a zombie are in its block from now on, and its frame is free: which of the block's zpages are live."""
        frame, block = written
        entries = self.table.entries
        live = 0
        for ref, page in self.allocator.residents(frame):
            index = ref & INDEX_MASK
            old = entries[page]
            kind = BLOCK if old & KIND_MASK == FRAME else RAW_BLOCK
            at = block << REF_BITS | index
            self.table.store(page, old & _CHECK_FIELD | at << KIND_BITS | kind)
            live |= 1 << index
        self.allocator.writeback_done(frame)
        return live

    def is_fresh(self, block: int) -> bool:
        """Whether something was written to the segment of the block within the last FRESH_SECONDS: most likely the block."""
        return self.now < self._written_at[block // SEGMENT_BLOCKS]

    def fail_writeback(self, batch: list[Eviction]) -> None:
        """The write failed: the frames go back to the old end of the LRU, in their order, their blocks are free again."""
        assert self.blocks is not None
        for frame, block in reversed(batch):
            self.blocks.set_live(block, 0)
            emptied = self.allocator.writeback_failed(frame)
            if emptied != NO_FRAME:
                self.pool.give_frame(emptied)

    # ---- and back ----------------------------------------------------------------------------------------------------

    def hold_block(self, block: int) -> None:
        """The block is being read: do not use it for anything else until `release_block`."""
        assert self.blocks is not None
        self.blocks.set_live(block, self.blocks.live(block) | 1 << HOLD_INDEX)

    def release_block(self, block: int) -> None:
        """The read is over."""
        assert self.blocks is not None
        self.blocks.free(block, HOLD_INDEX)

    def adopt(self, frame: int, block: int) -> bool:
        """A frame of `fill_prep` holds a copy of `block`: let its pages be there. False if it is not what the table says.

        The copy is taken only if every live zpage of it has its page's handle and check; else nothing has changed.
        """
        assert self.blocks is not None
        allocator = self.allocator
        entries = self.table.entries
        live = self.blocks.live(block) & ~(1 << HOLD_INDEX)
        if self._hot is not None:
            return self._hot.adopt(frame, block, live)
        moves = []
        for index in range(allocator.most_zpages):
            if live >> index & 1:
                ref = frame << REF_BITS | index
                page = allocator.handle_at(ref)
                zpage = allocator.zpage(ref, page)
                if zpage is None or page >= self.table.nr_pages:
                    return False
                old = entries[page]
                there = (block << REF_BITS | index) << KIND_BITS | BLOCK
                if old != check_of(zpage) << CHECK_SHIFT | there:
                    return False
                moves.append((page, old & _CHECK_FIELD | ref << KIND_BITS | FRAME, ref))
        if not moves:
            return False
        allocator.fill_finish(frame, [ref for _, _, ref in moves])
        self.pool.block_of[frame] = block
        for page, entry, _ in moves:
            self.table.store(page, entry)
        return True

    def adopt_raw(self, frame: int, block: int, page: int) -> None:
        """The same for a block that holds the raw page `page`, whose content has been checked."""
        ref = self.allocator.fill_finish_raw(frame, page)
        self.pool.block_of[frame] = block
        self.table.store(page, self.table.entries[page] & _CHECK_FIELD | ref << KIND_BITS | RAW_FRAME)

    def drop_ephemeral(self) -> bool:
        """Free the coldest ephemeral frame: its pages are in its block again. False if there is none."""
        frame = self._hot.drop() if self._hot is not None else self._drop_coldest()
        if frame == NO_FRAME:
            return False
        self.give_frame(frame)
        self.dropped_ephemeral_frames += 1
        return True

    def _drop_coldest(self) -> int:
        """The coldest ephemeral frame, whose pages are in its block again; NO_FRAME if there is none."""
        allocator = self.allocator
        frame = allocator.oldest(EPHEMERAL_KIND)
        if frame == NO_FRAME:
            return NO_FRAME
        allocator.drop_begin(frame)
        block = self.pool.block_of[frame]
        for ref, page in allocator.residents(frame):
            old = self.table.entries[page]
            kind = BLOCK if old & KIND_MASK == FRAME else RAW_BLOCK
            at = block << REF_BITS | ref & INDEX_MASK
            self.table.store(page, old & _CHECK_FIELD | at << KIND_BITS | kind)
        return allocator.drop_done(frame)

    # ---- itself --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Recount all of it; AssertionError where two tables disagree. O(pages + frames + blocks)."""
        self.table.check()
        self.pool.check()
        self.allocator.check()
        live: dict[int, int] = {}
        refs = set()
        for page, entry in enumerate(self.table.entries):
            kind = entry & KIND_MASK
            if kind < FRAME:
                continue
            ref = entry >> KIND_BITS & REF_MASK
            if entry == LOST:
                continue
            if kind in (FRAME, RAW_FRAME):
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
