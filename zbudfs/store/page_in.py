# SPDX-License-Identifier: MIT
"""Page-in by tasks and threads: for every case, and with a checkpoint wherever it waits.

The common case does not come here (aio_page_in.py). What does: a part of a page, a block that the disk refused or that is
damaged, a page that moved while its block was read, and every read where the kernel has no queue for reads.
"""

import time
from typing import TypeVar

import trio

from zbudfs.core.allocator import REF_BITS
from zbudfs.core.errors import BackingError, Loss, PageLost, ZbudfsError
from zbudfs.core.latency import Latencies, Timed
from zbudfs.core.page_table import KIND_BITS, LOST, REF_MASK
from zbudfs.core.units import NO_FRAME
from zbudfs.store.backing import Backing
from zbudfs.store.block_reads import BlockReads
from zbudfs.store.contents import ZERO_PAGE, Contents
from zbudfs.store.iothread import IoThread
from zbudfs.store.reclaimer import Reclaimer
from zbudfs.store.state import State

Failure = TypeVar("Failure", bound=ZbudfsError)


class PageIn:
    """Reads pages that are in the backing file alone."""

    def __init__(
        self,
        state: State,
        contents: Contents,
        reads: BlockReads,
        reclaimer: Reclaimer,
        backing: Backing | None,
        latencies: Latencies,
    ) -> None:
        self._state = state
        self._pool = state.pool
        self._entries = state.table.entries
        self._contents = contents
        self._reads = reads
        self._reclaimer = reclaimer
        self._backing = backing
        self._latencies = latencies
        self.threads: list[IoThread[dict[int, BackingError]]] = []
        if backing is not None:
            self.threads = [IoThread("read-0"), IoThread("read-1")]
        self._next_thread = 0
        self._bounce_free = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        """End the threads. Nothing may be under way."""
        for thread in self.threads:
            thread.close()

    async def page_in(self, pages: list[int]) -> dict[int, bytes | ZbudfsError]:
        """The contents of pages, the ones that are in the backing file alone included, or why one cannot be had.

        In the order in which they were asked for.
        """
        loading = self._reads.loading
        found: dict[int, bytes | ZbudfsError] = dict.fromkeys(pages, ZERO_PAGE)
        todo = pages
        while todo:
            blocks: dict[int, list[int]] = {}
            for page in todo:
                try:
                    content = self._contents.in_ram(page)
                except PageLost as error:
                    found[page] = kept(error)
                    continue
                if content is not None:
                    found[page] = content
                elif self._entries[page] == LOST:
                    self._contents.lost[Loss.CRASH] += 1
                    found[page] = PageLost(f"page {page} was lost when a worker died", Loss.CRASH)
                else:
                    ref = self._entries[page] >> KIND_BITS & REF_MASK
                    blocks.setdefault(ref >> REF_BITS, []).append(page)
            under_way = [block for block in blocks if block in loading]
            if under_way:
                await loading[under_way[0]].wait()  # CHECKPOINT: everything is looked up again
                todo = [page for wanted in blocks.values() for page in wanted]
                continue
            if not blocks:
                break
            if not self._pool.bounce:
                await self._bounce_free.park()  # CHECKPOINT: everything is looked up again
                todo = [page for wanted in blocks.values() for page in wanted]
                continue
            some = sorted(blocks)[: len(self._pool.bounce)]
            later = [page for block, wanted in blocks.items() if block not in some for page in wanted]
            stale = await self._read_blocks({block: blocks[block] for block in some}, found)  # CHECKPOINT
            todo = later + stale
        return found

    async def _read_blocks(self, wanted: dict[int, list[int]], found: dict[int, bytes | ZbudfsError]) -> list[int]:
        """Read blocks, put the contents of the wanted pages into `found`, and keep the blocks as ephemeral frames.

        For a reader that goes on where it was, the blocks that follow are read along, if there are frames to keep them in.
        Returns the pages that moved while the read was under way: they must be looked up again.
        """
        pool, allocator, state, reads = self._pool, self._state.allocator, self._state, self._reads
        over = trio.Event()
        frames: dict[int, int] = {}
        before = {page: self._entries[page] for pages in wanted.values() for page in pages}
        for block in wanted:
            reads.begin(block, over)
            frame = reads.frame_to_keep()
            if frame == NO_FRAME:
                frame = pool.bounce.pop()
            else:
                allocator.fill_prep(frame)
            frames[block] = frame
        ahead: dict[int, int] = {}
        for block in reads.blocks_ahead(wanted, len(wanted), pool.nr_frames):
            frame = reads.frame_to_keep()
            if frame == NO_FRAME:
                break
            allocator.fill_prep(frame)
            reads.begin(block, over)
            ahead[block] = frame
        frames |= ahead
        stale: list[int] = []
        whole: set[int] = set()
        nr_kept = sum(frame < pool.nr_frames for frame in frames.values())
        self._reclaimer.filling(nr_kept)
        try:
            refused = await self._in_thread(frames)  # CHECKPOINT, not cancelled
            reads.cumul_blocks += len(frames)
            reads.cumul_readahead_blocks += len(ahead)
            whole.update(block for block in ahead if block not in refused)
            reads.cumul_refault_blocks += sum(map(state.is_fresh, wanted))
            for block, pages in wanted.items():
                for page in pages:
                    if self._entries[page] != before[page]:
                        stale.append(page)
                        continue
                    if block in refused:
                        reads.failures += 1
                        found[page] = refused[block]
                        continue
                    try:
                        found[page] = self._contents.in_copy(frames[block], page, before[page])
                    except PageLost as error:
                        self._contents.lost[error.cause] += 1
                        found[page] = kept(error)
                    else:
                        reads.cumul_pages += 1
                        whole.add(block)
        finally:
            for block, frame in frames.items():
                if frame >= pool.nr_frames:
                    pool.bounce.append(frame)
                elif not reads.keep(frame, block, before, wanted.get(block, []), whole=block in whole):
                    whole.discard(block)
                reads.end(block)
            over.set()
            reads.ahead.done(max(frames), len(ahead), len(whole & ahead.keys()))
            self._reclaimer.filling(-nr_kept)
            self._bounce_free.unpark_all()
        return stale

    async def _in_thread(self, frames: dict[int, int]) -> dict[int, BackingError]:
        """Read blocks into frames; which ones the file refused, and why."""
        assert self._backing is not None
        thread = self.threads[self._next_thread]
        self._next_thread ^= 1
        views = {block: self._state.allocator.raw(frame << REF_BITS) for block, frame in frames.items()}
        began = time.perf_counter_ns()
        refused = await thread.run(_read_runs, self._backing, views)  # CHECKPOINT, not cancelled
        self._latencies.record(Timed.PAGEIN, time.perf_counter_ns() - began)
        return refused


def kept(error: Failure) -> Failure:
    """An error that is to be kept for a while, without the frames that it came through.

    Those hold what keeps it: a cycle, and in it the pages of the whole request. Until somebody looks for cycles a disk that
    fails would fill the memory with them.
    """
    error.__context__ = None
    return error.with_traceback(None)


def runs_of(blocks: list[int]) -> list[list[int]]:
    """Blocks in ascending order, neighbours together."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _read_runs(backing: Backing, views: dict[int, memoryview]) -> dict[int, BackingError]:
    """Read blocks into views, neighbours together; which ones the file refused, and why. For a worker thread."""
    refused: dict[int, BackingError] = {}
    for run in runs_of(list(views)):
        try:
            backing.read_blocks(run[0], [views[block] for block in run])
        except BackingError:
            for block in run:  # one by one: a bad block must not take its neighbours along
                try:
                    backing.read_blocks(block, [views[block]])
                except BackingError as error:
                    refused[block] = kept(error)
    return refused
