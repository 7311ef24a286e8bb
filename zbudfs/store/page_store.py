# SPDX-License-Identifier: MIT
"""The page store: reads, writes and discards of any byte range of the device.

    write    page -> word / zpage / raw -> place in a frame (wait for one if there is none) -> commit
    read     entry -> zeros / word / frame / block (read, checked, kept as an ephemeral frame if there is room)
    discard  entry -> absent; the edges that are not whole pages are zeroed

All state is changed on the one trio thread, and only between checkpoints. Nothing that was looked up is trusted
across a checkpoint: it is looked up again. docs/concurrency.md numbers the races and where each is settled.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from zbudfs.core.allocator import CUMULATIVE_COUNTERS
from zbudfs.core.block_map import BlockMap
from zbudfs.core.codec import (
    Codec,
    is_word,
)
from zbudfs.core.errors import Loss, OutOfRange, PageLost, PoolFull, Refusal, ZbudfsError
from zbudfs.core.page_table import (
    ABSENT,
    BLOCK,
    KIND_MASK,
    RAW_BLOCK,
    RAW_FRAME,
    WORD,
    WORD_HALVES,
    WORD_INVERTED,
)
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS, WORD_SIZE
from zbudfs.store.aio_page_in import AioPageIn
from zbudfs.store.backing import SEGMENT_BYTES, Backing
from zbudfs.store.block_reads import BlockReads
from zbudfs.store.board import Field
from zbudfs.store.contents import Contents
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_in import PageIn, kept
from zbudfs.store.pool import Pool
from zbudfs.store.reclaimer import Reclaimer
from zbudfs.store.recovery import Recovery, rebuild
from zbudfs.store.state import State
from zbudfs.store.tracer import Tracer

ZERO_PAGE: Final = bytes(PAGE_SIZE)
DISCARD_STEP_PAGES: Final = 2048
"""Stored pages that one stretch of a discard frees before it lets other requests in: some 4 ms in Python, 0.4 in C."""

CUMULATIVE: Final = (
    ("store", "_cumul_read_pages"),
    ("store", "_cumul_written_pages"),
    ("store", "_cumul_discarded_pages"),
    ("reads", "cumul_blocks"),
    ("reads", "cumul_pages"),
    ("reads", "cumul_readahead_blocks"),
    ("reads", "cumul_refault_blocks"),
    ("state", "cumul_raw_pages"),
    ("reads", "failures"),
    *(("refused", cause) for cause in Refusal),
    *(("lost", cause) for cause in Loss),
    ("state", "cumul_writeback_frames"),
    ("state", "cumul_writeback_pages"),
    ("state", "dropped_ephemeral_frames"),
    ("reclaimer", "cumul_grown_bytes"),
    ("reclaimer", "writeback_failures"),
    ("reclaimer", "cumul_aged_frames"),
    ("governor", "reports"),
)
"""Counters that a new worker goes on with: whose, and which."""

_OFFSET_MASK: Final = PAGE_SIZE - 1

Failure = TypeVar("Failure", bound=ZbudfsError)


@dataclass(frozen=True, slots=True)
class PageStoreStatistics:
    """A snapshot. Cumulative counts are since the mount."""

    size_bytes: int
    """Of the device."""
    pool_limit_bytes: int
    """In force now: the configured limit, or less under memory pressure."""
    pool_configured_bytes: int
    pool_used_bytes: int
    """Frames that hold something, zombies and ephemeral ones included."""
    pool_ready_bytes: int
    """Free frames that have memory: the reserve."""
    stored_pages: int
    """Not absent: same-filled, raw and written back ones included."""
    same_filled_pages: int
    """One 8-byte word repeated: kept as the word, in the page table or (a word too odd for it) in a zpage of one chunk."""
    raw_pages: int
    """Kept uncompressed, in RAM or on disk: no zpage small enough for a buddy."""
    compressed_bytes: int
    """Of the zpages in RAM, ephemeral ones included, without handles."""
    written_back_pages: int
    """In the backing file and not in RAM."""
    backing_used_bytes: int
    """Blocks that hold something."""
    backing_ready_bytes: int
    """Allocated to the backing file by the file system, the free part included."""
    cumul_writeback_bytes: int
    """Bytes of frames written to the backing file."""
    cumul_writeback_pages: int
    """Pages that these frames held when they were written."""
    cumul_writeback_frames: int
    cumul_grown_bytes: int
    """Zeros written to make the backing file ready ahead of need."""
    cumul_pagein_blocks: int
    """Blocks read back, those read ahead included."""
    cumul_readahead_blocks: int
    """Blocks read back along with others, before they were asked for."""
    cumul_pagein_pages: int
    """Pages that were asked for and came from a block."""
    cumul_refault_blocks: int
    """Blocks read back soon after they were written: what went to the disk was still needed."""
    cumul_read_pages: int
    cumul_written_pages: int
    cumul_discarded_pages: int
    """Pages that were stored when they were discarded."""
    cumul_raw_pages: int
    """Pages written that were kept uncompressed: their zpage would have been larger than a buddy can be."""
    cumul_aged_frames: int
    """Frames written back because nothing had been added to them for `age_seconds`."""
    cumul_dropped_frames: int
    """Ephemeral frames dropped to get a free frame."""
    refused_pool_full: int
    """Writes answered with ENOSPC: no frame, and nothing could be written back or dropped. The causes are in `causes`."""
    writeback_failures: int
    """Batches that the backing file did not take; their frames stayed in RAM."""
    pagein_failures: int
    """Reads of a block that the backing file refused."""
    lost_pages: int
    """Reads answered with EIO because the zpage was missing, foreign or damaged. The causes are in `causes`."""
    pressure_reports: int
    """Times that the system reported memory pressure and the limit was lowered."""
    pool_limit_set_bytes: int
    """The limit that is wanted: that of the mount, or what was set since."""
    low_watermark_frames: int
    high_watermark_frames: int
    level: int
    """zstd level of what is compressed now."""
    writeback_enabled: int
    """1 if frames are written back without an order."""
    writeback_failing: int
    """1 if the backing file did not take the last batch."""
    writeback_ordered_frames: int
    """Frames that are still to be written back on order."""
    writeback_budget_bytes_per_day: int
    """0: no limit."""
    writeback_budget_used_bytes: int
    writeback_budget_left_bytes: int
    writeback_budget_full_in_seconds: int
    """Until the whole allowance is there again."""
    backing_full: int
    """1 if the backing file could not grow when it had to."""
    age_seconds: int
    """Frames to which nothing was added for so long are written back; 0: never."""
    coldest_age_seconds: int
    """How long nothing was added to the frame that goes next."""

    def by_name(self) -> dict[str, int]:
        """Return all of them by name: `asdict` would take three times as long."""
        return {name: getattr(self, name) for name in self.__slots__}


class PageStore:
    """A device of `size_bytes` (a multiple of 4096) over a pool of `pool_frames` frames and, perhaps, a backing file.

    `run` must be running while it is used. Not safe for use by two threads. With `memory`, which must be made for the same
    numbers, nothing is touched, and nothing may be asked, before `recover`. `pure` keeps the hot path in C out of it.
    """

    def __init__(
        self,
        size_bytes: int,
        pool_frames: int,
        backing: Backing | None,
        codec: Codec,
        memory: StoreMemory | None = None,
        *,
        pure: bool = False,
    ) -> None:
        self.size_bytes = size_bytes
        attach = memory is not None
        if memory is None:
            memory = StoreMemory(size_bytes, pool_frames, backed=backing is not None)
            memory.populate()
        self.memory = memory
        self._table = memory.page_table()
        self._pool = Pool(memory, attach=attach)
        blocks = None
        if memory.blocks is not None:
            limit = backing.nr_segments if backing is not None else None
            blocks = BlockMap(memory.blocks.view, memory.nr_segments, attach=attach, limit=limit)
        self._allocator = self._pool.allocator
        self._hot = None if pure else self._allocator.hot(self._table, self._pool.stored_at)
        self.state = State(self._table, self._pool, blocks, self._hot)
        self.backing = backing
        self.codec = codec
        self.reclaimer = Reclaimer(self.state, backing)
        self.tracer = Tracer(self.state, memory)
        self.between: Callable[[], object] = _nothing
        """Called after every few pages of a large write: whoever reads meanwhile need not wait for all of it."""
        self._contents = Contents(self.state, codec.decode)
        self._reads = BlockReads(self.state, self.reclaimer)
        latencies = memory.board.latencies
        self._page_in = PageIn(self.state, self._contents, self._reads, self.reclaimer, backing, latencies)
        self.aio = AioPageIn(self.state, self._contents, self._reads, backing, latencies)
        self._cumul_read_pages = 0
        self._cumul_written_pages = 0
        self._cumul_discarded_pages = 0
        self._refused: dict[str, int] = dict.fromkeys(Refusal, 0)

    def use_codec(self, codec: Codec) -> None:
        """Compress with this one from now on; what is stored is read by any."""
        self.codec = codec

    def recover(self) -> Recovery:
        """Take over what is in the memory, from whoever worked with it before. Nobody else may be."""
        found = rebuild(self.state)
        values = self.memory.board.counters(len(CUMULATIVE) + CUMULATIVE_COUNTERS)
        for (owner, name), value in zip(CUMULATIVE, values, strict=False):
            self._owner(owner)[name] = value
        self._allocator.go_on_from(values[len(CUMULATIVE) :])
        self._contents.lost[Loss.CRASH] += found.lost_pages
        return found

    def save_counters(self) -> None:
        """Put the cumulative counters where they survive this process; what comes after the last time is lost with it.

        Beside them what is stored now, for the keeper to tell.
        """
        board = self.memory.board
        mine = [self._owner(owner)[name] for owner, name in CUMULATIVE]
        board.save_counters(mine + self._allocator.cumulative())
        counts = self._table.counts
        board.fields[Field.STORED_PAGES] = self._table.stored_pages
        board.fields[Field.USED_FRAMES] = self._pool.used_frames
        board.fields[Field.WRITTEN_BACK_PAGES] = counts[BLOCK] + counts[RAW_BLOCK]

    def _owner(self, owner: str) -> dict[str, int]:
        """The counters of an owner, by name."""
        owners: dict[str, dict[str, int]] = {
            "store": self.__dict__,
            "state": self.state.__dict__,
            "reclaimer": self.reclaimer.__dict__,
            "governor": self.reclaimer.governor.__dict__,
            "refused": self._refused,
            "reads": self._reads.__dict__,
            "lost": self._contents.lost,
        }
        return owners[owner]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read, write back, grow, trim and populate until cancelled; started once the first frames are ready."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.aio.run)
            await self.reclaimer.run(task_status=task_status)

    def close(self) -> None:
        """End the threads and empty the backing file. Nothing may be under way."""
        self.reclaimer.close()
        self.aio.close()
        self._page_in.close()
        if self.backing is not None:
            self.backing.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise OutOfRange(f"bytes {offset} .. {offset + length} of a device of {self.size_bytes}")

    # ---- read ------------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """As `read`, for what is in RAM; None, and nothing was counted, if some of it is in the backing file alone."""
        if length == PAGE_SIZE and not offset & _OFFSET_MASK and 0 <= offset < self.size_bytes:
            page = offset >> PAGE_SHIFT
            content = self._hot.read(page, 1, self.codec.decompress) if self._hot is not None else None
            if content is None:
                content = self._contents.in_ram(page)
            if content is not None:
                self._cumul_read_pages += 1
            return content
        pages = self._pages_of(offset, length)
        if self._hot is not None and pages:
            content = self._hot.read(pages.start, len(pages), self.codec.decompress)
            if content is not None:
                self._cumul_read_pages += len(pages)
                return self._cut(content, offset, length)
        found: list[bytes] = []
        for page in pages:
            try:
                content = self._contents.in_ram(page)
            except PageLost:
                if not found:
                    raise
                break
            if content is None:
                return None
            found.append(content)
        self._cumul_read_pages += len(found)
        return self._cut(b"".join(found), offset, length)

    def make_ready(self) -> bool:
        """In a moment in which nothing else is to be done: decompress one more page that a reader in order will ask for.

        False: there is none. What is read is the same with it and without it.
        """
        return self._hot is not None and self._hot.make_ready(self.codec.decompress)

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes `offset` .. `offset + length`; fewer where the device ends, or a page is lost that is not the first.

        A checkpoint only if a page is in the backing file alone. PageLost, BackingError.
        """
        pages = self._pages_of(offset, length)
        self._cumul_read_pages += len(pages)
        return self._cut(b"".join(await self._load_until_lost(pages)), offset, length)  # CHECKPOINT

    def _pages_of(self, offset: int, length: int) -> range:
        if offset < 0 or length < 0:
            raise OutOfRange(f"bytes {offset} .. {offset + length}")
        end = min(offset + length, self.size_bytes)
        return range(offset >> PAGE_SHIFT, (end + _OFFSET_MASK) >> PAGE_SHIFT if end > offset else 0)

    def _cut(self, pages: bytes, offset: int, length: int) -> bytes:
        """The part of neighbouring pages that was asked for."""
        skip = offset & _OFFSET_MASK
        length = min(length, max(self.size_bytes - offset, 0))
        return pages if not skip and len(pages) <= length else pages[skip : skip + length]

    async def _load(self, page: int) -> bytes:
        """The content of a page. A checkpoint only if it is in the backing file alone. PageLost, BackingError."""
        content = self._contents.in_ram(page)
        if content is None:
            loaded = (await self._page_in.page_in([page]))[page]  # CHECKPOINT
            if not isinstance(loaded, bytes):
                try:
                    raise loaded
                finally:
                    del loaded  # see `kept`
            return loaded
        return content

    async def _load_until_lost(self, pages: Iterable[int]) -> list[bytes]:
        """The contents of neighbouring pages up to the first that cannot be read; that error if it is the first of all.

        A short read, and an error for the rest when that is asked for, keeps the loss of one page from its
        neighbours: swap read-ahead asks for several at once.
        """
        found: list[bytes | None] = []
        missing = []
        lost: ZbudfsError | None = None
        for page in pages:
            try:
                content = self._contents.in_ram(page)
            except PageLost as error:
                lost = kept(error)
                break
            found.append(content)
            if content is None:
                missing.append(page)
        contents: list[bytes] = []
        there: bytes | ZbudfsError = b""
        loaded = iter((await self._page_in.page_in(missing)).values()) if missing else iter(())  # CHECKPOINT
        for content in found:
            there = next(loaded) if content is None else content
            if isinstance(there, ZbudfsError):
                lost = there
                break
            contents.append(there)
        if lost is not None and not contents:
            try:
                raise lost
            finally:
                del lost, found, loaded, there  # see `kept`
        return contents

    # ---- write -----------------------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, content: bytes | memoryview) -> int:
        """Store what can be stored at once, from the start on: the number of bytes. OutOfRange.

        Whole pages, and as many as there are frames for; the rest is for `write`. `content` is not kept.
        """
        length = len(content)
        self._check_range(offset, length)
        if (offset | length) & _OFFSET_MASK:
            return 0
        page = offset >> PAGE_SHIFT
        state = self.state
        if self._hot is not None and not state.watched:
            done = self._hot.write(page, content, self.codec.compress, state, self.between)
            self._cumul_written_pages += done
            self.reclaimer.kick()
            return done << PAGE_SHIFT
        view = memoryview(content)
        words = view.cast("Q")
        encode = self.codec.encode
        for at in range(0, length, PAGE_SIZE):
            piece = view[at : at + PAGE_SIZE]
            word_at = at // WORD_SIZE
            # Words far apart that are equal are rare in other pages: the whole comparison is made for few.
            word = words[word_at]
            if word == words[word_at + PAGE_WORDS - 1] and word == words[word_at + 77] and is_word(piece, word):
                stored = state.put_word(page, word)
            else:
                stored = state.put(page, encode(piece), piece)
            if not stored:
                length = at
                break
            page += 1
        self._cumul_written_pages += length >> PAGE_SHIFT
        self.reclaimer.kick()
        return length

    async def write(self, offset: int, content: bytes | memoryview) -> None:
        """Store `content` at `offset`. OutOfRange, PoolFull. A checkpoint only if there is no frame, or to patch a page.

        All or an error: after an error some of the pages may be the new ones. A short count is never reported, since
        the kernel's loop driver takes a short write for a complete one.
        """
        length = len(content)
        self._check_range(offset, length)
        view = memoryview(content)
        at = 0
        while at < length:
            skip = (offset + at) & _OFFSET_MASK
            whole = (length - at) & ~_OFFSET_MASK
            if skip or not whole:
                part = min(PAGE_SIZE - skip, length - at)
                await self._patch((offset + at) >> PAGE_SHIFT, skip, bytes(view[at : at + part]))  # CHECKPOINT
                at += part
                continue
            done = self.write_nowait(offset + at, view[at : at + whole])
            if done < whole:
                await self._wait_frame_free()  # CHECKPOINT
            at += done

    async def _wait_frame_free(self) -> None:
        try:
            await self.reclaimer.wait_frame_free()
        except PoolFull as error:
            self._refused[error.cause] += 1
            raise

    async def _patch(self, page: int, skip: int, piece: bytes) -> None:
        """Replace some bytes of a page.

        What was read before a checkpoint is only used if the page has not changed since: otherwise it is read again.
        """
        watch = self.state.watched.setdefault(page, [0, 0])
        watch[0] += 1
        try:
            while True:
                changes = watch[1]
                content = await self._load(page)  # CHECKPOINT if it is in the backing file
                if watch[1] != changes:
                    continue
                content = content[:skip] + piece + content[skip + len(piece) :]
                if self.write_nowait(page << PAGE_SHIFT, content):
                    return
                await self._wait_frame_free()  # CHECKPOINT: the page may have changed, all over again
        finally:
            watch[0] -= 1
            if not watch[0]:
                del self.state.watched[page]

    # ---- discard ---------------------------------------------------------------------------------------------------

    async def discard(self, offset: int, length: int) -> None:
        """The bytes read as zeros from now on; whole pages are freed. What lies beyond the device is ignored.

        Costs what is stored there, not how long it is. Lets others in after every few milliseconds of work.
        """
        if offset < 0 or length < 0:
            raise OutOfRange(f"bytes {offset} .. {offset + length}")
        end = min(offset + length, self.size_bytes)
        if offset >= end:
            return
        first, skip = divmod(offset, PAGE_SIZE)
        last, tail = divmod(end, PAGE_SIZE)
        if skip and first == last:
            await self._zero(first, skip, tail - skip)
            return
        if skip:
            await self._zero(first, skip, PAGE_SIZE - skip)
            first += 1
        page = self._discard_some(first, last)
        while page < last:
            await trio.lowlevel.checkpoint()  # CHECKPOINT: pages before `page` may have been written anew, rightly so
            page = self._discard_some(page, last)
        if tail:
            await self._zero(last, 0, tail)

    def _discard_some(self, page: int, stop: int) -> int:
        """Free up to DISCARD_STEP_PAGES stored pages; the page at which to go on, `stop` when done."""
        if self._hot is not None and not self.state.watched:
            page, done = self._hot.discard(page, stop, DISCARD_STEP_PAGES, self.state)
            self._cumul_discarded_pages += done
            return page
        forget = self.state.forget
        next_stored = self._table.next_stored
        for done in range(DISCARD_STEP_PAGES):
            page = next_stored(page, stop)
            if page >= stop:
                self._cumul_discarded_pages += done
                return stop
            forget(page)
            page += 1
        self._cumul_discarded_pages += DISCARD_STEP_PAGES
        return page

    async def _zero(self, page: int, skip: int, length: int) -> None:
        if self._table.entries[page] & KIND_MASK != ABSENT:
            await self._patch(page, skip, bytes(length))

    # ---- the rest --------------------------------------------------------------------------------------------------

    async def sync(self) -> None:
        """What was written before is stored, and what of it was written back is on the disk. BackingError."""
        await self.reclaimer.sync()

    def statistics(self) -> PageStoreStatistics:
        """A snapshot of all counters."""
        counts = self._table.counts
        counters = self._allocator.counters()
        reclaimer = self.reclaimer
        budget = reclaimer.budget
        now = reclaimer.ticked_at
        blocks = self.state.blocks
        return PageStoreStatistics(
            size_bytes=self.size_bytes,
            pool_limit_bytes=self._pool.limit_frames << PAGE_SHIFT,
            pool_configured_bytes=self._pool.nr_frames << PAGE_SHIFT,
            pool_used_bytes=self._pool.used_frames << PAGE_SHIFT,
            pool_ready_bytes=self._pool.ready_frames << PAGE_SHIFT,
            stored_pages=self._table.stored_pages,
            same_filled_pages=counts[WORD] + counts[WORD_INVERTED] + counts[WORD_HALVES] + self._table.word_zpages,
            raw_pages=counts[RAW_FRAME] + counts[RAW_BLOCK],
            compressed_bytes=counters["pers_zbytes"] + counters["eph_zbytes"],
            written_back_pages=counts[BLOCK] + counts[RAW_BLOCK],
            backing_used_bytes=blocks.used_blocks << PAGE_SHIFT if blocks is not None else 0,
            backing_ready_bytes=blocks.ready_segments * SEGMENT_BYTES if blocks is not None else 0,
            cumul_writeback_bytes=self.state.cumul_writeback_frames << PAGE_SHIFT,
            cumul_writeback_pages=self.state.cumul_writeback_pages,
            cumul_writeback_frames=self.state.cumul_writeback_frames,
            cumul_grown_bytes=reclaimer.cumul_grown_bytes,
            cumul_pagein_blocks=self._reads.cumul_blocks,
            cumul_readahead_blocks=self._reads.cumul_readahead_blocks,
            cumul_pagein_pages=self._reads.cumul_pages,
            cumul_refault_blocks=self._reads.cumul_refault_blocks,
            cumul_read_pages=self._cumul_read_pages,
            cumul_written_pages=self._cumul_written_pages,
            cumul_discarded_pages=self._cumul_discarded_pages,
            cumul_raw_pages=self.state.cumul_raw_pages,
            cumul_aged_frames=reclaimer.cumul_aged_frames,
            cumul_dropped_frames=self.state.dropped_ephemeral_frames,
            refused_pool_full=sum(self._refused.values()),
            writeback_failures=reclaimer.writeback_failures,
            pagein_failures=self._reads.failures,
            lost_pages=sum(self._contents.lost.values()),
            pressure_reports=reclaimer.governor.reports,
            pool_limit_set_bytes=reclaimer.governor.configured_frames << PAGE_SHIFT,
            low_watermark_frames=reclaimer.watermarks.low_frames,
            high_watermark_frames=reclaimer.watermarks.high_frames,
            level=self.codec.level,
            writeback_enabled=int(reclaimer.writeback_enabled),
            writeback_failing=int(reclaimer.failing),
            writeback_ordered_frames=reclaimer.ordered_frames,
            writeback_budget_bytes_per_day=budget.bytes_per_day,
            writeback_budget_used_bytes=budget.used_bytes(now),
            writeback_budget_left_bytes=budget.left_bytes(now),
            writeback_budget_full_in_seconds=budget.seconds_until_full(now),
            backing_full=int(reclaimer.full),
            age_seconds=reclaimer.age_seconds,
            coldest_age_seconds=reclaimer.coldest_age_seconds,
        )

    def causes(self) -> dict[str, int]:
        """Refused writes and lost pages by cause: `refused_CAUSE`, `lost_CAUSE`."""
        refused = {f"refused_{cause}": count for cause, count in self._refused.items()}
        return refused | {f"lost_{cause}": count for cause, count in self._contents.lost.items()}

    def forget_cumulative(self) -> None:
        """Set what counts requests to zero: whoever tried the store out before it was in use does not count."""
        self._cumul_read_pages = self._cumul_written_pages = self._cumul_discarded_pages = 0
        self._allocator.forget_cumulative()

    def zbud_counters(self) -> dict[str, int]:
        """The allocator's counters, by the kernel's names."""
        return self._allocator.counters()

    def unbuddied_lists(self) -> list[int]:
        """How many frames have one buddy that uses n chunks, for n from 0 to 63."""
        return self._allocator.unbuddied_lists()

    def chunk_histogram(self) -> list[int]:
        """How many zpages use n chunks, for n from 0 to 63."""
        return self._allocator.chunk_histogram()

    def check(self) -> None:
        """Recount everything; AssertionError where it disagrees. Only while nothing is under way. O(everything)."""
        self.state.check()
        assert not self._reads.loading, "a block is being read"
        assert not self.state.watched, "a page is being patched"
        assert self._allocator.counters()["pers_zombie_count"] == 0, "a frame is being written back"


def _nothing() -> None:
    """Do nothing: nobody waits."""
