# SPDX-License-Identifier: MIT
"""The measurement `store`: the store without a mount, path by path, with pages a second and the time of each part.

    codec       compress or decompress a page, or find out that it is same-filled
    copy        copy the zpage into its frame, or the pages of an answer into one piece
    allocator   find, take and free places, without the copy
    table       store the entry in the page table
    cipher      encrypt or decrypt blocks
    disk        write or read blocks, without the cipher
    request     the rest of the whole: loops, ranges, counters, waking tasks

The time is CPU time, which a busy machine hardly changes. For paths that use the disk, it is real time. The whole is
measured as it runs. Each part is measured alone, in the same round, over the same pages. So the request is a difference. It
can be below zero if parts that are called one by one cost more than together.
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import trio

from bench import disk_reads
from bench.kit import Benchmark, Options, in_turns, progress, workplace
from bench.table import Column, Table
from kit import corpus, stores
from kit.programs import MIB, PAGE, KitError
from zbudfs.core.allocator import MAX_ZPAGE_SIZE, NO_REF, REF_BITS
from zbudfs.core.codec import is_word, page_of_word
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.core.page_table import ABSENT, BLOCK, KIND_BITS, KIND_MASK, RAW_BLOCK, REF_MASK, entry_of_word
from zbudfs.core.reclaim import BATCH_FRAMES
from zbudfs.core.units import NO_FRAME
from zbudfs.store.cipher import KEY_BYTES, BlockCipher
from zbudfs.store.page_store import PageStore
from zbudfs.store.pool import Pool

T = TypeVar("T")

PARTS: Final = ("codec", "copy", "allocator", "table", "cipher", "disk")
COLUMNS: Final = [
    Column("pages_s", "pages/s"),
    Column("whole_us", "us a page"),
    Column("request_us", "request"),
    *(Column(f"{part}_us", part) for part in PARTS),
]
READ_AHEAD_PAGES: Final = 8
"""Pages of a read by the read-ahead of swap: 32 KiB."""
STEP_LIMIT_SECONDS: Final = 120.0
Parts = dict[str, float]
"""Seconds of each part, for all pages together."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--pages", type=int, default=16384, metavar="N", help="pages of each path (default: %(default)s)"
    )
    parser.add_argument(
        "--packings", default=str(ZBUD), metavar="A,B", help="packings, each with a table (default: %(default)s)"
    )


def measure(options: Options) -> list[Table]:
    """Return one table for each packing, with a row for each path."""
    if options.short:
        options.pages = 512
    try:
        packings = {name: Packing.parse(name) for name in options.packings.split(",")}
    except ValueError as error:
        raise KitError(str(error)) from None
    nr_pages = max(options.pages // stores.REQUEST_PAGES, 1) * stores.REQUEST_PAGES
    pages = corpus.sample(min(nr_pages * PAGE, 64 * MIB))
    title = f"The store alone, {nr_pages:,} pages, one thread"
    tables = {name: Table(title if len(packings) == 1 else f"{title}, {name}", COLUMNS) for name in packings}
    from_disk = disk_reads.table()
    with workplace(options) as folder:

        async def one_round(name: str) -> None:
            made = stores.made(nr_pages, nr_pages + 4096, folder / "backing", packings[name])
            async with stores.running(made) as store:
                await stores.populate(store, nr_pages + 1024)
                await Round(store, pages, nr_pages, tables[name]).run()
                if name == next(iter(packings)):
                    await _open_queue(store)
                    await disk_reads.measure(store, _jumping(nr_pages), from_disk)

        for number, name in in_turns(list(packings), options.rounds):
            trio.run(one_round, name)
            progress(f"round {number + 1} of {options.rounds}: {name}")
    for table in tables.values():
        table.notes.append(
            f"Writes have {stores.REQUEST_PAGES} pages, like those of swap. CPU time; for page-in and writeback real time,"
            f" with the disk and the hops to the thread that waits for it. {pages.describe()}"
        )
    return [*tables.values(), from_disk]


async def _open_queue(store: PageStore) -> None:
    """Open the AIO queue of the store, and wait until it is usable. Raises KitError."""
    store.aio.queue.open()
    with trio.move_on_after(STEP_LIMIT_SECONDS):
        while store.aio.queue.path != "aio":
            store.aio.reap()
            await trio.sleep(0.001)
    if store.aio.queue.path != "aio":
        raise KitError("the kernel gives the store no AIO queue")


def timed(function: Callable[..., object], arguments: Iterable[tuple[object, ...]]) -> float:
    """Call a function with each of the arguments, and return the seconds of CPU time."""
    listed = list(arguments)
    began = time.thread_time()
    for each in listed:
        function(*each)
    return time.thread_time() - began


class Scratch:
    """An allocator of the store's kind over its own memory, so that a measurement does not touch the store."""

    def __init__(self, pool: Pool, nr_frames: int) -> None:
        packing = pool.memory.packing
        self.frames = memoryview(bytearray(nr_frames * PAGE))
        table = memoryview(bytearray(packing.kind.table_size(nr_frames)))
        self.allocator = packing.allocator(self.frames, table, nr_frames)
        self._free = list(range(nr_frames))

    def place(self, page: int, zpage: bytes) -> int:
        """Put a zpage into a place, and return its ref."""
        ref = self.allocator.match(page, zpage)
        if ref == NO_REF:
            ref = self.allocator.create_prep(self._free.pop(), len(zpage))
            self.allocator.create_finish(ref, page, zpage)
        return ref

    def free(self, ref: int) -> None:
        """Free the place of a zpage."""
        frame = self.allocator.free(ref)
        if frame != NO_FRAME:
            self._free.append(frame)


class Round:
    """One round over all paths, on a new store with ready frames."""

    def __init__(self, store: PageStore, pages: corpus.Corpus, nr_pages: int, table: Table) -> None:
        self.store = store
        self.nr_pages = nr_pages
        self.table = table
        self.pages = pages
        self.first = stores.requests(pages, nr_pages)
        self.second = stores.requests(pages, nr_pages, shift=7)
        self.zpages = self._encoded(self.first)
        self.more_zpages = self._encoded(self.second)
        self.scratch = Scratch(store.state.pool, nr_pages + 64)
        self.refs: list[int] = []
        self.cipher = BlockCipher(os.urandom(KEY_BYTES))
        self.blocks = memoryview(bytearray(BATCH_FRAMES * PAGE))

    def _encoded(self, requests: list[memoryview]) -> list[bytes]:
        """Return the zpages of the pages, without raw pages: they take another path, and there are few of them."""
        encode = self.store.requests.codec.encode
        found = (encode(request[at : at + PAGE]) for request in requests for at in range(0, len(request), PAGE))
        return [zpage for zpage in found if len(zpage) <= MAX_ZPAGE_SIZE]

    def report(self, row: str, pages: int, whole: float, parts: Parts) -> None:
        """Add the figures of one path to the table."""
        sample: dict[str, float | None] = {
            f"{part}_us": parts[part] / pages * 1e6 if part in parts else None for part in PARTS
        }
        sample["pages_s"] = pages / whole
        sample["whole_us"] = whole / pages * 1e6
        sample["request_us"] = (whole - sum(parts.values())) / pages * 1e6
        self.table.add(row, sample)

    async def run(self) -> None:
        """Measure each path, in the order in which a page takes them."""
        self.same_filled()
        await self.discard("discard of same-filled pages", freed=False)
        self.write("write", self.first, self.zpages, again=False)
        await trio.lowlevel.checkpoint()
        self.write("overwrite", self.second, self.more_zpages, again=True)
        await trio.lowlevel.checkpoint()
        self.read("read 4 KiB", 1)
        self.read(f"read {READ_AHEAD_PAGES * 4} KiB", READ_AHEAD_PAGES)
        await self.discard("discard", freed=True)
        for row in ("writeback, the file grows", "writeback"):
            await self.refill()
            await self.write_back(row)
            if row == "writeback":
                await self.page_in(f"page-in {READ_AHEAD_PAGES * 4} KiB, threads", READ_AHEAD_PAGES, self.nr_pages)
                await self.page_in("page-in 4 KiB, threads", 1, self.nr_pages // 8)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _contents(self, requests: list[memoryview]) -> list[tuple[int, memoryview]]:
        return [(number * stores.REQUEST_PAGES * PAGE, content) for number, content in enumerate(requests)]

    def _table_again(self) -> float:
        """Return the seconds to store all present entries again."""
        entries = self.store.state.table.entries.tolist()
        return timed(self.store.state.table.store, enumerate(entries))

    def same_filled(self) -> None:
        """Measure writes of same-filled pages, each with another word."""
        words = [0x1234 * number for number in range(self.nr_pages)]
        joined = memoryview(b"".join(map(page_of_word, words)))
        size = stores.REQUEST_PAGES * PAGE
        requests = [joined[at : at + size] for at in range(0, len(joined), size)]
        whole = timed(self.store.requests.write_nowait, self._contents(requests))
        codec = timed(
            is_word, ((joined[number * PAGE : (number + 1) * PAGE], word) for number, word in enumerate(words))
        )
        codec += timed(entry_of_word, ((word,) for word in words))
        self.report("same-filled", self.nr_pages, whole, {"codec": codec, "table": self._table_again()})

    def write(self, row: str, requests: list[memoryview], zpages: list[bytes], *, again: bool) -> None:
        """Measure writes of new pages or, with `again`, overwrites of stored pages."""
        whole = timed(self.store.requests.write_nowait, self._contents(requests))
        pieces = ((request[at : at + PAGE],) for request in requests for at in range(0, len(request), PAGE))
        codec = timed(self.store.requests.codec.encode, pieces)
        copy = self._copy(zpages)
        began = time.thread_time()
        refs = [self.scratch.place(page, zpage) for page, zpage in enumerate(zpages)]
        allocator = time.thread_time() - began
        if again:
            allocator += timed(self.scratch.free, ((ref,) for ref in self.refs))
        self.refs = refs
        self.report(
            row,
            self.nr_pages,
            whole,
            {"codec": codec, "copy": copy, "allocator": allocator - copy, "table": self._table_again()},
        )

    def _copy(self, zpages: list[bytes]) -> float:
        """Return the seconds to copy the zpages, two into each frame."""
        target = memoryview(bytearray(len(zpages) // 2 * PAGE + 2 * PAGE))
        target[:] = bytes(len(target))  # so that the kernel has allocated its pages
        began = time.thread_time()
        for number, zpage in enumerate(zpages):
            at = number // 2 * PAGE
            target[at : at + len(zpage)] = zpage
        return time.thread_time() - began

    async def refill(self) -> None:
        """Store all pages. The tasks of the store run in between."""
        for offset, content in self._contents(self.first):
            await self.store.requests.write(offset, content)
            await trio.lowlevel.checkpoint()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def read(self, row: str, count: int) -> None:
        """Measure reads of pages in frames, `count` pages a request, in a jumping order."""
        starts = [at * count for at in _jumping(self.nr_pages // count)]
        whole = timed(self.store.requests.read_nowait, ((at * PAGE, count * PAGE) for at in starts))
        places = [(ref, page) for page, ref in enumerate(self.refs)]
        lookup = timed(self.scratch.allocator.zpage, places)
        found = [self.scratch.allocator.zpage(*place) for place in places]
        codec = timed(self.store.requests.codec.decode, ((zpage,) for zpage in found if zpage is not None))
        parts = {"codec": codec, "allocator": lookup}
        if count > 1:
            content = [bytes(PAGE) for _ in range(count)]
            parts["copy"] = timed(b"".join, ((content,) for _ in starts))
        self.report(row, len(starts) * count, whole, parts)

    # ---- freeing ---------------------------------------------------------------------------------------------------

    async def discard(self, row: str, *, freed: bool) -> None:
        """Measure the discard of all pages, in requests of 2 MiB. `freed` says whether they have frames."""
        size = 512 * PAGE
        began = time.thread_time()
        for offset in range(0, self.nr_pages * PAGE, size):
            await self.store.requests.discard(offset, size)
        whole = time.thread_time() - began
        parts = {"table": timed(self.store.state.table.store, ((page, ABSENT) for page in range(self.nr_pages)))}
        if freed:
            parts["allocator"] = timed(self.scratch.free, ((ref,) for ref in self.refs))
        self.report(row, self.nr_pages, whole, parts)

    # ---- the disk --------------------------------------------------------------------------------------------------

    async def write_back(self, row: str) -> None:
        """Measure writeback in the background, which starts since the limit is lowered below the used frames."""
        reclaimer, pool, state = self.store.reclaimer, self.store.state.pool, self.store.state
        pages_by_hand, by_hand = self._write_back_by_hand() if row == "writeback" else (0, {})
        before, limit = state.counters.cumul_writeback_pages, pool.limit_frames
        began = time.perf_counter()
        self._limit(max(pool.used_frames // 8, BATCH_FRAMES))
        with trio.fail_after(STEP_LIMIT_SECONDS):
            while pool.free_frames < reclaimer.limit.watermarks.low_frames:
                await trio.sleep(0.002)
        whole = time.perf_counter() - began
        pages = state.counters.cumul_writeback_pages - before
        self._limit(limit)
        await stores.populate(self.store, self.nr_pages // 2)
        self.report(row, pages, whole, {part: seconds / pages_by_hand * pages for part, seconds in by_hand.items()})

    def _limit(self, frames: int) -> None:
        """Set the pool's limit, also in the governor, which would otherwise restore the configured one."""
        self.store.reclaimer.limit.governor.configure(frames)
        self.store.reclaimer.set_limit(frames)

    def _write_back_by_hand(self) -> tuple[int, Parts]:
        """Write some batches in this task. Return the number of their pages, and the seconds of each part."""
        state, backing = self.store.state, self.store.backing
        assert backing is not None  # this store has one
        before = state.counters.cumul_writeback_pages
        seconds = {"allocator": 0.0, "cipher": 0.0, "disk": 0.0}
        for _ in range(max(1, self.nr_pages // 8 // BATCH_FRAMES)):
            began = time.perf_counter()
            batch = state.begin_writeback(BATCH_FRAMES)
            chosen = time.perf_counter()
            for first, frames in _runs((block, frame) for frame, block in batch):
                backing.write_blocks(first, [state.allocator.frame_bytes(frame) for frame in frames])
            written = time.perf_counter()
            runs = _runs((block, state.allocator.frame_bytes(frame)) for frame, block in batch)
            cipher = timed(self.cipher.encrypt, ((first, frames, self.blocks) for first, frames in runs))
            seconds["cipher"] += cipher
            seconds["disk"] += written - chosen - cipher
            encrypted = time.perf_counter()
            state.finish_writeback(batch)
            seconds["allocator"] += chosen - began + time.perf_counter() - encrypted
        return state.counters.cumul_writeback_pages - before, seconds

    async def page_in(self, row: str, count: int, pages: int) -> None:
        """Measure reads of pages on the disk, `count` pages a request."""
        state, backing = self.store.state, self.store.backing
        assert backing is not None  # this store has one
        while state.drop_ephemeral():
            pass
        entries = state.table.entries
        starts = [at * count for at in _jumping(self.nr_pages // count) if _on_disk(entries[at * count])][
            : pages // count
        ]
        buffer = mmap.mmap(-1, 2 * count * PAGE)  # aligned, as direct I/O requires
        room = [memoryview(buffer)[at : at + PAGE] for at in range(0, len(buffer), PAGE)]
        disk, nr_blocks = 0.0, 0
        for start in starts:
            blocks = {_block(entry) for entry in entries[start : start + count] if _on_disk(entry)}
            runs = list(_runs((block, 0) for block in sorted(blocks)))
            nr_blocks += len(blocks)
            began = time.perf_counter()
            for first, frames in runs:
                backing.read_blocks(first, room[: len(frames)])
            disk += time.perf_counter() - began
        codec = timed(self.store.requests.codec.decode, ((zpage,) for zpage in self.zpages))
        began = time.perf_counter()
        for start in starts:
            await self.store.requests.read(start * PAGE, count * PAGE)
        whole = time.perf_counter() - began
        done = len(starts) * count
        cipher = timed(self.cipher.decrypt, ((block, [self.blocks[:PAGE]]) for block in range(nr_blocks)))
        self.report(
            row, done, whole, {"cipher": cipher, "disk": disk - cipher, "codec": codec / len(self.zpages) * done}
        )


def _on_disk(entry: int) -> bool:
    return entry & KIND_MASK in (BLOCK, RAW_BLOCK)


def _block(entry: int) -> int:
    return (entry >> KIND_BITS & REF_MASK) >> REF_BITS


def _runs(pairs: Iterable[tuple[int, T]]) -> Iterable[tuple[int, list[T]]]:
    """Return runs (first block, items of the blocks) of neighbouring blocks, from pairs (block, item)."""
    found: list[tuple[int, list[T]]] = []
    for block, what in pairs:
        if found and block == found[-1][0] + len(found[-1][1]):
            found[-1][1].append(what)
        else:
            found.append((block, [what]))
    return found


def _jumping(count: int) -> list[int]:
    """Return the numbers 0 .. count - 1 in a jumping order."""
    step = next(step for step in (7919, 7907, 7901, 1) if count % step)
    return [number * step % count for number in range(count)]


BENCHMARK: Final = Benchmark(
    "store", "the store without a mount, path by path, with the time of each part", (), add_options, measure
)
