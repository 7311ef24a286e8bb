# SPDX-License-Identifier: MIT
"""The page store: a device whose pages are in the frames of a pool, or in the blocks of a backing file.

    requests   reads, writes and discards                        requests.py
    page-in    pages that only the backing file has              page_in.py, aio_page_in.py
    reclaim    frames and blocks that are free ahead of need     reclaimer.py
    state      the place of each page                            state.py

This module makes these parts and connects them.
"""

from collections.abc import Callable

import trio

from zbudfs.core.block_map import BlockMap
from zbudfs.core.codec import Codec
from zbudfs.core.page_table import BLOCK, RAW_BLOCK
from zbudfs.core.statistics import PageStoreStatistics
from zbudfs.store.aio_page_in import AioPageIn
from zbudfs.store.backing import Backing
from zbudfs.store.block_reads import BlockReads
from zbudfs.store.contents import Contents
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_in import PageIn
from zbudfs.store.pool import Pool
from zbudfs.store.reclaimer import Reclaimer
from zbudfs.store.recovery import Recovery, rebuild
from zbudfs.store.requests import Requests
from zbudfs.store.snapshot import snapshot
from zbudfs.store.state import State
from zbudfs.store.status_area import Field
from zbudfs.store.tracer import Tracer


class PageStore:
    """A device of `size_bytes` (a multiple of 4096) over a pool of `pool_frames` frames and, perhaps, a backing file.

    Requests are possible while `run` runs, from one thread. `memory` is that of an earlier store of the same size: it is not
    touched, and no request is possible, before `recover`. With `pure` no step is done in C. `log` is a function that logs a
    sentence. `between` is called after every page of a write, with their number so far: it answers reads that have come.
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
        log: Callable[[str], None] = lambda _: None,
        between: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.size_bytes = size_bytes
        attach = memory is not None
        if memory is None:
            memory = StoreMemory(size_bytes, pool_frames, backed=backing is not None)
            memory.populate()
        self.memory = memory
        pool = Pool(memory, attach=attach)
        blocks = None
        if memory.blocks is not None:
            limit = backing.nr_segments if backing is not None else None
            blocks = BlockMap(memory.blocks.view, memory.nr_segments, attach=attach, limit=limit)
        self.state = State(memory.page_table(), pool, blocks, pure=pure)
        self.backing = backing
        self.reclaimer = Reclaimer(self.state, backing, log)
        self.tracer = Tracer(self.state, memory)
        contents = Contents(self.state, codec)
        self._reads = BlockReads(self.state, self.reclaimer.limit)
        latencies = memory.status_area.latencies
        self._page_in = PageIn(self.state, contents, self._reads, self.reclaimer.queue, backing, latencies)
        self.aio = AioPageIn(self.state, contents, self._reads, backing, latencies, codec.decompress)
        self.requests = Requests(size_bytes, self.state, contents, self._page_in, self.reclaimer, codec, between)

    def recover(self) -> Recovery:
        """Take over the pages in the memory. No other process may work with it."""
        return rebuild(self.state)

    def report_use(self) -> None:
        """Write the present use in the status area, for the keeper."""
        fields, counts = self.memory.status_area.fields, self.state.table.counts
        fields[Field.STORED_PAGES] = self.state.table.stored_pages
        fields[Field.USED_FRAMES] = self.state.pool.used_frames
        fields[Field.WRITTEN_BACK_PAGES] = counts[BLOCK] + counts[RAW_BLOCK]

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Run all tasks until they are cancelled. The start is complete when the first frames are ready."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.aio.queue.run, self.aio.reap)
            await self.reclaimer.run(task_status=task_status)

    def close(self) -> None:
        """End the threads and empty the backing file. No request may be under way."""
        self.reclaimer.close()
        self.aio.queue.close()
        self._page_in.close()
        if self.backing is not None:
            self.backing.close()

    def statistics(self) -> PageStoreStatistics:
        """Return all statistics, of one moment."""
        return snapshot(self.size_bytes, self.requests.codec.level, self.state, self.reclaimer)

    def zbud_counters(self) -> dict[str, int]:
        """Return the counters of the allocator, by the names of the kernel."""
        return self.state.allocator.counters()

    def check(self) -> None:
        """Recount everything. AssertionError if two tables differ or a request is under way. O(pages + frames + blocks)."""
        self.state.check()
        assert not self._reads.loading and not self.aio.in_flight, "a block is being read"
        assert not self.state.watched, "a page is being patched"
        assert self.state.allocator.counters()["pers_zombie_count"] == 0, "a frame is being written back"
