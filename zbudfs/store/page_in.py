# SPDX-License-Identifier: MIT
"""Page-in by tasks and threads: for every case, with a checkpoint at each wait.

The common case is in aio_page_in.py instead. This module serves parts of pages, blocks that the disk refused or that are
damaged, and pages that moved while their block was read. It serves all reads if the kernel has no AIO queue.
"""

import time
from typing import TypeVar

import trio

from zbudfs.core.allocator import REF_BITS
from zbudfs.core.errors import BackingError, Loss, PageLost, ZbudfsError
from zbudfs.core.latency import Latencies, Timed
from zbudfs.core.page_table import LOST, entry_ref
from zbudfs.core.units import NO_FRAME
from zbudfs.store.backing import Backing
from zbudfs.store.block_reads import BlockReads, Read
from zbudfs.store.contents import ZERO_PAGE, Contents
from zbudfs.store.frame_queue import FrameQueue
from zbudfs.store.iothread import IoThread
from zbudfs.store.state import State

Failure = TypeVar("Failure", bound=ZbudfsError)


class PageIn:
    """Reads pages that are in the backing file alone."""

    def __init__(
        self,
        state: State,
        contents: Contents,
        reads: BlockReads,
        queue: FrameQueue,
        backing: Backing | None,
        latencies: Latencies,
    ) -> None:
        self._state = state
        self._pool = state.pool
        self._counters = state.counters
        self._entries = state.table.entries
        self._contents = contents
        self._reads = reads
        self._queue = queue
        self._backing = backing
        self._latencies = latencies
        self.threads: list[IoThread[dict[int, BackingError]]] = []
        if backing is not None:
            self.threads = [IoThread("read-0"), IoThread("read-1")]
        self._next_thread = 0
        self._bounce_free = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        """End the threads. No read may be under way."""
        for thread in self.threads:
            thread.close()

    async def page_in(self, pages: list[int]) -> dict[int, bytes | ZbudfsError]:
        """Return the content of each page, wherever the page is, or the error of a page that cannot be read.

        The result has the order of the argument.
        """
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
                    self._counters.lost(Loss.CRASH)
                    found[page] = PageLost(f"page {page} was lost when a worker died", Loss.CRASH)
                else:
                    ref = entry_ref(self._entries[page])
                    blocks.setdefault(ref >> REF_BITS, []).append(page)
            under_way = next(filter(None, map(self._reads.under_way, blocks)), None)
            if under_way is not None:
                await under_way.wait()  # CHECKPOINT: the page table is read again
                todo = [page for wanted in blocks.values() for page in wanted]
                continue
            if not blocks:
                break
            if not self._pool.bounce:
                await self._bounce_free.park()  # CHECKPOINT: the page table is read again
                todo = [page for wanted in blocks.values() for page in wanted]
                continue
            some = sorted(blocks)[: len(self._pool.bounce)]
            later = [page for block, wanted in blocks.items() if block not in some for page in wanted]
            stale = await self._read_blocks({block: blocks[block] for block in some}, found)  # CHECKPOINT
            todo = later + stale
        return found

    async def _read_blocks(self, wanted: dict[int, list[int]], found: dict[int, bytes | ZbudfsError]) -> list[int]:
        """Read blocks, put the contents of the wanted pages into `found`, and keep the blocks as ephemeral frames.

        The read includes the read-ahead of a reader in order, as far as there are frames to keep it.
        Returns the pages that moved during the read, for which the caller must read the page table again.
        """
        pool, state, reads = self._pool, self._state, self._reads
        read = Read()
        frames: dict[int, int] = {}
        before = {page: self._entries[page] for pages in wanted.values() for page in pages}
        for block in wanted:
            reads.begin(block, read)
            frame = reads.frame_to_fill()
            frames[block] = pool.bounce.pop() if frame == NO_FRAME else frame
        ahead: dict[int, int] = {}
        for block in reads.blocks_ahead(wanted, len(wanted), pool.nr_frames):
            frame = reads.frame_to_fill()
            if frame == NO_FRAME:
                break
            reads.begin(block, read)
            ahead[block] = frame
        frames |= ahead
        stale: list[int] = []
        whole: set[int] = set()
        nr_kept = sum(frame < pool.nr_frames for frame in frames.values())
        self._queue.filling(nr_kept)
        try:
            refused = await self._in_thread(frames)  # CHECKPOINT, not cancelled
            self._counters.cumul_pagein_blocks += len(frames)
            self._counters.cumul_readahead_blocks += len(ahead)
            whole.update(block for block in ahead if block not in refused)
            self._counters.cumul_refault_blocks += sum(map(state.is_fresh, wanted))
            for block, pages in wanted.items():
                for page in pages:
                    if self._entries[page] != before[page]:
                        stale.append(page)
                        continue
                    if block in refused:
                        self._counters.pagein_failures += 1
                        found[page] = refused[block]
                        continue
                    try:
                        found[page] = self._contents.in_copy(frames[block], page, before[page])
                    except PageLost as error:
                        self._counters.lost(error.cause)
                        found[page] = kept(error)
                    else:
                        self._counters.cumul_pagein_pages += 1
                        whole.add(block)
        finally:
            for block, frame in frames.items():
                if not reads.keep(frame, block, before, wanted.get(block, []), whole=block in whole):
                    whole.discard(block)
                reads.end(block)
            read.end()
            reads.ahead.done(max(frames), len(ahead), len(whole & ahead.keys()))
            self._queue.filling(-nr_kept)
            self._bounce_free.unpark_all()
        return stale

    async def _in_thread(self, frames: dict[int, int]) -> dict[int, BackingError]:
        """Read blocks into frames. Return the error of each block that the file refused."""
        assert self._backing is not None
        thread = self.threads[self._next_thread]
        self._next_thread ^= 1
        views = {block: self._state.allocator.frame_bytes(frame) for block, frame in frames.items()}
        began = time.perf_counter_ns()
        refused = await thread.run(_read_runs, self._backing, views)  # CHECKPOINT, not cancelled
        self._latencies.record(Timed.PAGEIN, time.perf_counter_ns() - began)
        return refused


def kept(error: Failure) -> Failure:
    """Return an error, without its traceback, that can be kept for a while.

    The frames of the traceback refer to the dictionary of errors: a cycle, which includes the pages of the whole request.
    Until the garbage collector runs, a disk that fails would fill the memory with such cycles.
    """
    error.__context__ = None
    return error.with_traceback(None)


def runs_of(blocks: list[int]) -> list[list[int]]:
    """Return the blocks in ascending order, as runs of neighbours."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _read_runs(backing: Backing, views: dict[int, memoryview]) -> dict[int, BackingError]:
    """Read blocks into views, run by run. Return the error of each block that the file refused. For a worker thread."""
    refused: dict[int, BackingError] = {}
    for run in runs_of(list(views)):
        try:
            backing.read_blocks(run[0], [views[block] for block in run])
        except BackingError:
            for block in run:  # read one by one: a bad block must not fail its neighbours
                try:
                    backing.read_blocks(block, [views[block]])
                except BackingError as error:
                    refused[block] = kept(error)
    return refused
