# SPDX-License-Identifier: MIT
"""Page-in in the common case: the kernel reads the blocks (aio.c), and the thread that serves requests does the rest.

    read request, pages on disk --begin--> blocks held, reads submitted ... request loop continues ...
    completion --reap--> decrypt, check, decompress, reply, adopt        without a task, a thread or a turn of the event loop

The loop that waits for requests also waits for completions (fuse/shim.c). `reap` runs between two requests, and like a
request it has no checkpoint.

A request goes to `again` if an entry of its pages has changed since it began, or if a block is refused, damaged or old. The
caller then reads in a task (page_in.py), which reads the page table again and reports the errors.

A block is read into a slot, which is private memory, and copied into a frame when the read is complete. So no frame is held
during a read, and a read that outlives this process cannot reach a frame of its successor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from zbudfs.core.allocator import REF_BITS
from zbudfs.core.errors import PageLost
from zbudfs.core.latency import Latencies, Timed
from zbudfs.core.page_table import BLOCK, LOST, entry_kind, entry_ref
from zbudfs.core.units import NO_FRAME, PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.backing import Backing
from zbudfs.store.block_reads import BlockReads
from zbudfs.store.contents import Contents
from zbudfs.store.page_in import runs_of
from zbudfs.store.state import State

if TYPE_CHECKING:
    from zbudfs.store._aio import Queue

SLOTS: Final = 128
"""Blocks that can be read at once: for the eight requests that the kernel keeps in flight, of eight pages each, and as much
again for read-ahead. The slots are 512 KiB of locked memory in the worker and in the standby."""


class Request:
    """A read request for neighbouring pages. `key` identifies it for the caller."""

    __slots__ = ("contents", "key", "left", "length", "offset", "whole")

    def __init__(self, key: int, offset: int, length: int, left: int) -> None:
        self.key = key
        self.offset = offset
        self.length = length
        self.left = left
        """Blocks that are still being read."""
        self.contents: dict[int, bytes] = {}
        """The contents read so far, by page."""
        self.whole = True
        """Whether every page so far was found in its block."""


class Block:
    """A block that is being read."""

    __slots__ = ("before", "number", "requests", "slot")

    def __init__(self, number: int, slot: int) -> None:
        self.number = number
        self.slot = slot
        self.before: dict[int, int] = {}
        """The wanted pages, with their entries when the read began."""
        self.requests: list[Request] = []
        """The requests for the block. Empty for a block of the read-ahead."""


class Batch:
    """The blocks of one submission."""

    __slots__ = ("ahead", "kept", "last", "left")

    def __init__(self, last: int, ahead: int, left: int) -> None:
        self.last = last
        """The highest block."""
        self.ahead = ahead
        """Number of blocks of the read-ahead."""
        self.kept = 0
        """Number of blocks of the read-ahead whose copy was kept."""
        self.left = left
        """Number of blocks that are still being read."""


class Run:
    """A run of neighbouring blocks that one read fetches."""

    __slots__ = ("batch", "began", "blocks", "over")

    def __init__(self, blocks: list[Block], batch: Batch) -> None:
        self.blocks = blocks
        self.batch = batch
        self.over = trio.Event()
        self.began = time.perf_counter_ns()


class AioPageIn:
    """Page-in through an AIO queue. Without one (`open` was not called, or was refused) `begin` returns False."""

    def __init__(
        self, state: State, contents: Contents, reads: BlockReads, backing: Backing | None, latencies: Latencies
    ) -> None:
        self._state = state
        self._pool = state.pool
        self._counters = state.counters
        self._entries = state.table.entries
        self._contents = contents
        self._reads = reads
        self._backing = backing
        self._latencies = latencies
        self._queue: Queue | None = None
        self._slots: list[memoryview] = []
        self._free: list[int] = []
        self._runs: dict[int, Run] = {}
        """The reads in flight, by first slot."""
        self._blocks: dict[int, Block] = {}
        """The blocks being read, by number; a part of `reads.loading`."""
        self._usable = False
        """Whether a read has completed through the queue."""
        self._opened = trio.Event()
        self._reply: Callable[[int, bytes], object] = _nobody
        self._again: Callable[[int, int, int], object] = _nobody
        self.requests = 0
        """Number of requests that were answered in this way."""

    def serve(self, reply: Callable[[int, bytes], object], again: Callable[[int, int, int], object]) -> None:
        """Set the functions: `reply(key, content)` answers a request, `again(key, offset, length)` gives it to a task."""
        self._reply = reply
        self._again = again

    # ---- the queue -------------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Make the queue and submit a read of the header through it. False: the kernel has no queue, so threads read.

        The queue is usable when that read completes without an error. The method never waits for the disk.
        """
        if self._queue is not None:
            return True
        if self._backing is None or not self._backing.direct:
            return False
        try:
            queue = new_queue(SLOTS)
        except (ImportError, OSError):
            return False
        if queue.submit(self._backing.fileno(), [(0, [0])]) != 1:
            queue.close()
            return False
        self._slots = [queue.slot(number) for number in range(SLOTS)]
        self._free = list(range(1, SLOTS))
        self._queue = queue
        return True

    @property
    def path(self) -> str:
        """The way in which pages come from the disk: "aio", "threads", or "none" without a backing file."""
        if self._backing is None:
            return "none"
        return "aio" if self._usable else "threads"

    def oldest_seconds(self) -> int:
        """Return the age of the oldest read in flight, in whole seconds; 0 if there is none."""
        run = next(iter(self._runs.values()), None)  # in the order of their submission
        return 0 if run is None else (time.perf_counter_ns() - run.began) // 1_000_000_000

    def completions(self) -> tuple[int, int]:
        """Return the descriptor that is readable after a completion, and the address of the ring (aio.c); (-1, 0): no queue."""
        return (self._queue.fileno(), self._queue.ring()) if self._queue is not None else (-1, 0)

    async def run(self) -> None:
        """Reap whenever the event loop finds a completion first. Runs until it is cancelled."""
        while self._queue is None:
            await self._opened.wait()
        while True:
            await trio.lowlevel.wait_readable(self._queue.fileno())
            self.reap()

    def opened(self) -> None:
        """Wake `run`, since the queue exists. Call this in trio's thread; `open` may run in any thread."""
        self._opened.set()

    def close(self) -> None:
        """Wait for the reads in flight and free the queue."""
        if self._queue is not None:
            self._usable = False
            self._slots.clear()
            self._queue.close()
            self._queue = None

    # ---- requests --------------------------------------------------------------------------------------------------

    def begin(self, key: int, offset: int, length: int) -> bool:
        """Begin to answer a read of whole pages, some of which are on disk alone. False: nothing was begun."""
        if not self._usable or (offset | length) & (PAGE_SIZE - 1):
            return False
        first = offset >> PAGE_SHIFT
        wanted: dict[int, list[int]] = {}
        entries = self._entries
        for page in range(first, min(first + (length >> PAGE_SHIFT), len(entries))):
            entry = entries[page]
            if entry_kind(entry) >= BLOCK:
                if entry == LOST:
                    return False
                wanted.setdefault(entry_ref(entry) >> REF_BITS, []).append(page)
        loading = self._reads.loading
        new = [block for block in wanted if block not in loading]
        if not wanted or len(new) > len(self._free) or (len(wanted) != len(new) and not self._all_ours(wanted)):
            return False
        if new and not self._submit(new, len(wanted)):
            return False
        request = Request(key, offset, length, len(wanted))
        for number, pages in wanted.items():
            block = self._blocks[number]
            block.requests.append(request)
            for page in pages:
                block.before[page] = entries[page]
        return True

    def _all_ours(self, wanted: dict[int, list[int]]) -> bool:
        """Return whether every wanted block that is being read is being read by this object, and not by a task."""
        return all(block in self._blocks for block in wanted if block in self._reads.loading)

    def _submit(self, new: list[int], count: int) -> bool:
        """Submit reads of blocks and of their read-ahead. False if the kernel did not take all of them."""
        assert self._queue is not None and self._backing is not None
        reads = self._reads
        ahead = reads.blocks_ahead(new, count, len(self._free) - len(new))
        batch = Batch(max(new + ahead), len(ahead), len(new) + len(ahead))
        runs = [Run([Block(number, self._free.pop()) for number in numbers], batch) for numbers in runs_of(new + ahead)]
        wire = [(self._backing.offset_of(run.blocks[0].number), [block.slot for block in run.blocks]) for run in runs]
        taken = self._queue.submit(self._backing.fileno(), wire)
        for run in runs[:taken]:
            self._runs[run.blocks[0].slot] = run
            for block in run.blocks:
                reads.begin(block.number, run.over)
                self._blocks[block.number] = block
        for run in runs[taken:]:
            self._free += [block.slot for block in run.blocks]
            batch.left -= len(run.blocks)
        self._counters.cumul_pagein_blocks += batch.left
        self._counters.cumul_readahead_blocks += len(ahead)
        self._counters.cumul_refault_blocks += sum(map(self._state.is_fresh, new))
        return taken == len(runs)  # if not, the task that answers the request waits for the reads that the kernel took

    # ---- completions -----------------------------------------------------------------------------------------------

    def reap(self) -> int:
        """Finish the reads that the kernel has completed, and return their number. Never waits."""
        if self._queue is None:
            return 0
        done = self._queue.reap()
        for slot, result in done:
            run = self._runs.pop(slot, None)
            if run is None:  # the read of the header
                self._usable = result == PAGE_SIZE
                self._free.append(slot)
                continue
            self._latencies.record(Timed.PAGEIN, time.perf_counter_ns() - run.began)
            good = result == len(run.blocks) << PAGE_SHIFT
            batch = run.batch
            for block in run.blocks:
                batch.kept += self._finish(block, good=good)
            run.over.set()
            batch.left -= len(run.blocks)
            if not batch.left:
                self._reads.ahead.done(batch.last, batch.ahead, batch.kept)
        return len(done)

    def _finish(self, block: Block, *, good: bool) -> bool:
        """End the read of a block: answer its requests and keep the copy. Return whether a read-ahead block was kept."""
        reads, pool = self._reads, self._pool
        del self._blocks[block.number]
        frame = self._frame_for(block) if good else NO_FRAME
        whole = frame != NO_FRAME and not block.requests
        found: dict[int, bytes] = {}
        if frame != NO_FRAME:
            for page, before in block.before.items():
                if self._entries[page] == before:
                    try:
                        found[page] = self._contents.in_copy(frame, page, before)
                    except PageLost:
                        continue  # the task that reads it again reports it
                    whole = True
        self._counters.cumul_pagein_pages += len(found)
        for request in block.requests:
            request.left -= 1
            first = request.offset >> PAGE_SHIFT
            for page in block.before:
                if first <= page < first + (request.length >> PAGE_SHIFT):
                    content = found.get(page)
                    if content is None:
                        request.whole = False
                    else:
                        request.contents[page] = content
        was_kept = False
        if frame == NO_FRAME:
            pass
        elif frame >= pool.nr_frames:
            pool.bounce.append(frame)
        else:
            was_kept = reads.keep(frame, block.number, block.before, block.before, whole=whole)
        reads.end(block.number)
        self._free.append(block.slot)
        for request in block.requests:
            if not request.left:
                self._answer(request)
        return was_kept and not block.requests

    def _frame_for(self, block: Block) -> int:
        """Return the frame, from `fill_prep` or a bounce frame, with the decrypted block. NO_FRAME: none is available."""
        assert self._backing is not None
        frame = self._reads.frame_to_keep()
        if frame != NO_FRAME:
            self._state.allocator.fill_prep(frame)
        elif block.requests and self._pool.bounce:
            frame = self._pool.bounce.pop()
        else:
            return NO_FRAME
        view = self._state.allocator.frame_bytes(frame)
        view[:] = self._slots[block.slot]
        self._backing.decrypt(block.number, [view])
        return frame

    def _answer(self, request: Request) -> None:
        """Answer a request whose blocks were all read, or give it to a task."""
        if request.whole:
            first = request.offset >> PAGE_SHIFT
            pages = range(first, min(first + (request.length >> PAGE_SHIFT), len(self._entries)))
            pieces = []
            for page in pages:
                piece = request.contents.get(page)
                try:
                    piece = self._contents.in_ram(page) if piece is None else piece
                except PageLost:
                    piece = None
                if piece is None:
                    break  # the page moved meanwhile, or is lost
                pieces.append(piece)
            else:
                self.requests += 1
                self._counters.cumul_read_pages += len(pieces)
                self._reply(request.key, pieces[0] if len(pieces) == 1 else b"".join(pieces))
                return
        self._again(request.key, request.offset, request.length)


def new_queue(nr_slots: int) -> Queue:
    """Return a new AIO queue. OSError if the kernel refuses it, ImportError if the extension was not built."""
    from zbudfs.store._aio import Queue

    return Queue(nr_slots)


def _nobody(*_: object) -> None:
    """Do nothing: this function is in place until `serve` sets another."""
