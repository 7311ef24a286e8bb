# SPDX-License-Identifier: MIT
"""Page-in in the common case: the kernel reads the blocks (aio.c), and the thread that serves requests does the rest.

    read request, pages on disk --begin--> blocks held, reads submitted ... request loop continues ...
    completion --reap--> decrypt, check, decompress, reply, adopt        without a task, a thread or a turn of the event loop

The loop that waits for requests also waits for completions (fuse/shim.c). `reap` runs between two requests, and like a
request it has no checkpoint.

A request goes to `again` if an entry of its pages has changed since it began, or if a block is refused, damaged or old. The
caller then reads in a task (page_in.py), which reads the page table again and reports the errors.

The most frequent read, of one page whose block nothing else reads, is also in C (core/hot_reads.c): `_begin_page` and
`_finish_page` are its specification. C holds such a block without an entry in `loading`. Python takes the read over if another
request needs the block, or if C cannot finish it.

A block is read into a slot of the queue (read_queue.py), and copied into a frame when the read is complete. So no frame is
held during a read, and a read that outlives this process cannot reach a frame of its successor.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from zbudfs.core._hot import Hot, PageReads
from zbudfs.core.allocator import REF_BITS
from zbudfs.core.codec import Decompress
from zbudfs.core.errors import PageLost
from zbudfs.core.latency import Latencies, Timed
from zbudfs.core.page_table import BLOCK, LOST, entry_kind, entry_ref
from zbudfs.core.statistics import PAGE_READ_COUNTERS
from zbudfs.core.units import NO_FRAME, PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.backing import Backing
from zbudfs.store.block_reads import BlockReads, Read
from zbudfs.store.contents import Contents
from zbudfs.store.page_in import runs_of
from zbudfs.store.read_queue import ReadQueue
from zbudfs.store.state import State


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

    def take(self, block: Block, found: dict[int, bytes]) -> None:
        """Take what was found in a block, whose read is over."""
        self.left -= 1
        first = self.offset >> PAGE_SHIFT
        end = first + (self.length >> PAGE_SHIFT)
        for page in block.before:
            if first <= page < end:
                content = found.get(page)
                if content is None:
                    self.whole = False
                else:
                    self.contents[page] = content


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


class Run(Read):
    """A run of neighbouring blocks that one read fetches."""

    __slots__ = ("batch", "began", "blocks")

    def __init__(self, blocks: list[Block], batch: Batch) -> None:
        super().__init__()
        self.blocks = blocks
        self.batch = batch
        self.began = time.perf_counter_ns()


class PageRead(Read):
    """The read of one block for one request of one page: the most frequent read, without read-ahead."""

    __slots__ = ("before", "began", "block", "frame", "key", "number", "page", "slot")

    def __init__(self, key: int, page: int, entry: int, number: int, slot: int) -> None:
        super().__init__()
        self.key = key
        self.page = page
        self.before = {page: entry}
        self.number = number
        self.slot = slot
        self.block: Block | None = None
        """The block with its requests. It is None while no other request wants the block."""
        self.frame = NO_FRAME
        """The frame that C has taken for the block, which is decrypted then."""
        self.began = time.perf_counter_ns()

    def shared(self) -> Block:
        """Return the block, to which another request can be added."""
        if self.block is None:
            self.block = Block(self.number, self.slot)
            self.block.before = self.before
            self.block.requests = [Request(self.key, self.page << PAGE_SHIFT, PAGE_SIZE, 1)]
        return self.block


class AioPageIn:
    """Page-in through the queue of one backing file. While the queue is not usable, `begin` returns False."""

    def __init__(
        self,
        state: State,
        contents: Contents,
        reads: BlockReads,
        backing: Backing | None,
        latencies: Latencies,
        decompress: Decompress,
    ) -> None:
        self._state = state
        self._entries = state.table.entries
        self._contents = contents
        self._reads = reads
        self._backing = backing
        self._latencies = latencies
        self._decompress = decompress
        self.queue = ReadQueue(backing)
        self._single: PageReads | None = None
        """The reads of single pages in C."""
        self._runs: dict[int, Run | PageRead] = {}
        """The reads in flight in Python, by first slot."""
        self._blocks: dict[int, Block] = {}
        """The blocks being read, by number; a part of `reads.loading`."""
        self._reply: Callable[[int, bytes], object] = _nobody
        self._again: Callable[[int, int, int], object] = _nobody
        reads.take_over = self._take_over

    def serve(self, reply: Callable[[int, bytes], object], again: Callable[[int, int, int], object]) -> None:
        """Set the functions: `reply(key, content)` answers a request, `again(key, offset, length)` gives it to a task."""
        self._reply = reply
        self._again = again
        if self._single is not None:
            self._single.reply = reply

    @property
    def in_flight(self) -> list[int]:
        """The moment at which each read in flight began, in nanoseconds of `time.perf_counter_ns`."""
        in_c = self._single.in_flight() if self._single is not None else []
        return [run.began for run in self._runs.values()] + [began for _, _, began in in_c]

    def oldest_seconds(self) -> int:
        """Return the age of the oldest read in flight, in whole seconds; 0 if there is none."""
        now = time.perf_counter_ns()
        return (now - min(self.in_flight, default=now)) // 1_000_000_000

    # ---- requests --------------------------------------------------------------------------------------------------

    def begin(self, key: int, offset: int, length: int) -> bool:
        """Begin to answer a read of whole pages, some of which are on disk alone. False: nothing was begun."""
        if not self.queue.is_usable or (offset | length) & (PAGE_SIZE - 1):
            return False
        first = offset >> PAGE_SHIFT
        if length == PAGE_SIZE:
            if self._single is not None and self._single.begin(key, first, self._state.now):
                return True
            if self._begin_page(key, first):
                return True
        wanted: dict[int, dict[int, int]] = {}
        entries = self._entries
        for page in range(first, min(first + (length >> PAGE_SHIFT), len(entries))):
            entry = entries[page]
            if entry_kind(entry) >= BLOCK:
                if entry == LOST:
                    return False
                wanted.setdefault(entry_ref(entry) >> REF_BITS, {})[page] = entry
        blocks, reads = self._blocks, self._reads
        under_way = {number: reads.under_way(number) for number in wanted}
        for number, read in under_way.items():
            if isinstance(read, PageRead):
                blocks[number] = read.shared()
        new = [number for number in wanted if number not in blocks]
        if not wanted or len(new) > len(self.queue.free) or any(under_way[number] is not None for number in new):
            return False  # a task reads one of them
        if new and not self._submit(new, len(wanted)):
            return False
        request = Request(key, offset, length, len(wanted))
        for number, before in wanted.items():
            block = blocks[number]
            block.requests.append(request)
            block.before.update(before)
        return True

    def _begin_page(self, key: int, page: int) -> bool:
        """Begin to answer a read of one page, if no read of its block is under way. False: nothing was begun."""
        assert self._backing is not None
        entry = self._entries[page]
        number = entry_ref(entry) >> REF_BITS
        free = self.queue.free
        if entry_kind(entry) < BLOCK or entry == LOST or self._state.is_held(number) or not free:
            return False
        slot = free.pop()
        if not self.queue.submit_one(self._backing.offset_of(number), slot):
            free.append(slot)
            return False
        read = self._runs[slot] = PageRead(key, page, entry, number, slot)
        self._reads.begin(number, read)
        self._state.counters.cumul_pagein_blocks += 1
        if self._state.is_fresh(number):
            self._state.counters.cumul_refault_blocks += 1
        return True

    def _submit(self, new: list[int], count: int) -> bool:
        """Submit reads of blocks and of their read-ahead. False if the kernel did not take all of them."""
        assert self._backing is not None
        reads, free, counters = self._reads, self.queue.free, self._state.counters
        ahead = reads.blocks_ahead(new, count, len(free) - len(new))
        nr_blocks = len(new) + len(ahead)
        groups = runs_of(new + ahead)
        batch = Batch(groups[-1][-1], len(ahead), nr_blocks)
        runs = []
        wire = []
        for numbers in groups:
            slots = [free.pop() for _ in numbers]
            runs.append(Run(list(map(Block, numbers, slots)), batch))
            wire.append((self._backing.offset_of(numbers[0]), slots))
        taken = self.queue.submit(wire)
        for run, (_, slots) in zip(runs[:taken], wire, strict=False):
            self._runs[slots[0]] = run
            for block in run.blocks:
                reads.begin(block.number, run)
                self._blocks[block.number] = block
        for _, slots in wire[taken:]:
            free += slots
            batch.left -= len(slots)
        counters.cumul_pagein_blocks += batch.left
        if ahead:
            counters.cumul_readahead_blocks += len(ahead)
        fresh = sum(map(self._state.is_fresh, new))
        if fresh:
            counters.cumul_refault_blocks += fresh
        return taken == len(runs)  # if not, the task that answers the request waits for the reads that the kernel took

    # ---- completions -----------------------------------------------------------------------------------------------

    def reap(self) -> int:
        """Finish reads that the kernel has completed, and return their number. Never waits.

        An error in one read (MemoryError, or a bug) is raised after the others are finished. Tasks then read its blocks again.
        """
        done = self.queue.reap()
        error: Exception | None = None
        for slot, result in done:
            try:
                self._complete(slot, result)
            except Exception as failure:
                error = failure
                self._give_up(slot)
        if error is not None:
            try:
                raise error
            finally:
                del error  # a cycle with its traceback
        return len(done)

    def _complete(self, slot: int, result: int) -> None:
        """Finish a read: bytes read, or -errno."""
        if self._single is not None and self._single.finish(slot, result):
            return
        run = self._read_in(slot)
        if run is None:
            self.queue.header_read(slot, result)
            self._use_c()
            return
        self._latencies.record(Timed.PAGEIN, time.perf_counter_ns() - run.began)
        if isinstance(run, PageRead):
            self._finish_page(run, good=result == PAGE_SIZE)
        else:
            self._finish_run(run, good=result == len(run.blocks) << PAGE_SHIFT)
        del self._runs[slot]

    def _give_up(self, slot: int) -> None:
        """End a read after an error in the midst of it. Nothing stays held, and tasks answer its requests."""
        run = self._read_in(slot)
        if run is None:
            return
        del self._runs[slot]
        if isinstance(run, Run):
            for block in run.blocks:
                if block.number in self._blocks:
                    self._finish(block, good=False)
            run.end()
        elif run.number in self._reads.loading:
            if run.frame != NO_FRAME and not self._state.allocator.state(run.frame):
                self._state.give_frame(run.frame)
            run.frame = NO_FRAME
            self._finish_page(run, good=False)

    def _use_c(self) -> None:
        """Let C read single pages, since the queue is usable."""
        path, blocks, backing = self._state.path, self._state.blocks, self._backing
        if not self.queue.is_usable or not isinstance(path, Hot) or blocks is None or backing is None:
            return
        self._single = PageReads(
            path,
            (blocks.live_masks, self._state.written_at, self._latencies.row(Timed.PAGEIN), self._state.counters.words),
            PAGE_READ_COUNTERS,
            (self.queue.submitter(), self._reads.frame, backing.decrypt, self._decompress),
            self.queue.free,
            self.queue.slots,
            backing.offset_of(0),
        )
        self._single.reply = self._reply

    def _read_in(self, slot: int) -> Run | PageRead | None:
        """Return the read in a slot, after taking it over if C has it. None: the slot has no read."""
        read = self._runs.get(slot)
        taken = self._single.take(slot) if read is None and self._single is not None else None
        if taken is not None:
            key, page, entry, number, began, frame = taken
            read = self._runs[slot] = self._reads.loading[number] = PageRead(key, page, entry, number, slot)
            read.began = began
            read.frame = frame
        return read

    def _take_over(self, block: int) -> Read | None:
        """Take over the read of a block from C. None: C does not read it."""
        in_c = self._single.in_flight() if self._single is not None else []
        return next((self._read_in(slot) for slot, number, _ in in_c if number == block), None)

    def _finish_page(self, read: PageRead, *, good: bool) -> None:
        """End the read of a block for one page: keep it, and answer the request."""
        if read.block is not None:
            self._finish(read.block, good=good)
            read.end()
            return
        found: dict[int, bytes] = {}
        if read.frame != NO_FRAME:
            found, _ = self._kept_in(read.frame, read.number, read.slot, read.before)
        elif good:
            found, _ = self._kept(read.number, read.slot, read.before, wanted=True)
        self._reads.end(read.number)
        self.queue.free.append(read.slot)
        read.end()
        content = found.get(read.page)
        if content is None:
            self._again(read.key, read.page << PAGE_SHIFT, PAGE_SIZE)
            return
        self._state.counters.paged_in()
        self._reply(read.key, content)

    def _finish_run(self, run: Run, *, good: bool) -> None:
        """End the read of a run of blocks: answer the requests for them, and keep the blocks."""
        batch = run.batch
        for block in run.blocks:
            batch.kept += self._finish(block, good=good)
        run.end()
        batch.left -= len(run.blocks)
        if not batch.left:
            self._reads.ahead.done(batch.last, batch.ahead, batch.kept)

    def _finish(self, block: Block, *, good: bool) -> bool:
        """End the read of a block: keep it, and answer its requests. Return whether a block of the read-ahead was kept."""
        requests, number = block.requests, block.number
        found: dict[int, bytes] = {}
        was_kept = False
        if good:
            found, was_kept = self._kept(number, block.slot, block.before, wanted=bool(requests))
            self._state.counters.cumul_pagein_pages += len(found)
        del self._blocks[number]
        self._reads.end(number)
        self.queue.free.append(block.slot)
        for request in requests:
            request.take(block, found)
            if not request.left:
                self._answer(request)
        return was_kept and not requests

    def _kept(self, number: int, slot: int, before: dict[int, int], *, wanted: bool) -> tuple[dict[int, bytes], bool]:
        """Keep a block as an ephemeral frame. Return the contents of the pages in `before`, and whether the block was kept.

        If no frame is free, the method ignores a block of the read-ahead, which is not `wanted`.
        """
        assert self._backing is not None
        frame, bounce = self._reads.frame(), self._state.pool.bounce
        if frame == NO_FRAME and not (wanted and bounce):
            return {}, False
        content = self.queue.slots[slot]
        try:
            self._backing.decrypt(number, (content,))
        except BaseException:
            if frame != NO_FRAME:
                self._state.give_frame(frame)
            raise
        if frame == NO_FRAME:
            frame = bounce.pop()
        else:
            found = self._state.page_in(frame, content, number, before, self._decompress)
            if found is not None:
                return found, True
        return self._kept_in(frame, number, slot, before)

    def _kept_in(self, frame: int, number: int, slot: int, before: dict[int, int]) -> tuple[dict[int, bytes], bool]:
        """Do the same as `_kept` with a decrypted block and a frame for it, page by page. The frame may be a bounce frame."""
        if frame < self._state.pool.nr_frames:
            self._state.allocator.fill_prep(frame)
        self._state.allocator.frame_bytes(frame)[:] = self.queue.slots[slot]
        found = self._contents_in(frame, before)
        return found, self._reads.keep(frame, number, before, before, whole=bool(found) or not before)

    def _contents_in(self, frame: int, before: dict[int, int]) -> dict[int, bytes]:
        """Return the contents of pages from the copy of their block, without those that changed or are damaged."""
        found: dict[int, bytes] = {}
        for page, entry in before.items():
            if self._entries[page] == entry:
                try:
                    found[page] = self._contents.in_copy(frame, page, entry)
                except PageLost:
                    continue  # the task that reads it again reports it
        return found

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
                self._state.counters.cumul_read_pages += len(pieces)
                self._reply(request.key, pieces[0] if len(pieces) == 1 else b"".join(pieces))
                return
        self._again(request.key, request.offset, request.length)


def _nobody(*_: object) -> None:
    """Do nothing: this function is in place until `serve` sets another."""
