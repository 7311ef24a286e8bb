# SPDX-License-Identifier: MIT
"""The hot path in C does the same as the Python code, with each packing: the same bytes in tables, the same counters.

Python is the reference. Two stores get the same requests, one of them without the extension. Afterwards each arena of
both is compared byte by byte. Separate tests try mistakes that only C can make. These are damaged tables (an error, and
no write elsewhere), views that a caller keeps, and kills at any instruction.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final, cast

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.frames import lru_of
from tests.core.samples import BIG, HALF, RAW, SMALL, page, text_page
from tests.store.rig import drop, fill_reserve, get, let_go, packed_by, place_of, put, trio_test
from tests.support import LIMIT_SECONDS, ROOT
from zbudfs.core._hot import Hot, PageReads
from zbudfs.core.allocator import NO_REF, REF_BITS
from zbudfs.core.block_map import BlockMap
from zbudfs.core.codec import Codec, page_of_word
from zbudfs.core.dense import Dense
from zbudfs.core.errors import PageLost
from zbudfs.core.latency import Timed
from zbudfs.core.packing import Packing
from zbudfs.core.page_table import (
    ABSENT,
    BLOCK,
    CHECK_SHIFT,
    FRAME,
    KIND_BITS,
    KIND_MASK,
    LOST,
    RAW_BLOCK,
    REF_MASK,
    entry,
    entry_ref,
)
from zbudfs.core.reference import Reference
from zbudfs.core.units import NO_FRAME, PAGE_SIZE, PAGE_WORDS
from zbudfs.core.zbud import Zbud
from zbudfs.store import read_queue
from zbudfs.store.backing import Backing
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.read_queue import SLOTS
from zbudfs.store.state import HOLD_INDEX

PAGES: Final = 48
FRAMES: Final = 24
FAULTS: Final = ("", "", "", "shared", "ahead", "changed", "damaged", "refused")
"""Faults of a block that is read; "": none, "shared": two requests need it, "ahead": no page of it is wanted."""
WORDS: Final = (0, 7, 1 << 60, (1 << 64) - 3, 0xDEADBEEF << 32 | 0xDEADBEEF, 0x3FB999999999999A, 1 << 63)
"""Zero, each form of a word that fits an entry, and words that do not fit."""
WEIGHTS: Final = {
    "write": 40,
    "read": 14,
    "read on": 12,
    "drop": 10,
    "fill": 1,
    "filled": 1,
    "writeback": 11,
    "take block": 10,
    "page in": 1,
}
"""The relative frequency of each step of the long test."""


@pytest.fixture(scope="module", autouse=True, params=["zbud", "dense"])
def packing(request: pytest.FixtureRequest) -> Iterator[Packing]:
    """Try each packing."""
    with packed_by(Packing.parse(request.param)) as packing:
        yield packing


def test_the_choice() -> None:
    """A store uses the path in C, and a pure one uses the readable path."""
    assert isinstance(PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec()).state.path, Hot)
    assert isinstance(PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec(), pure=True).state.path, Reference)


# ---- both do the same ----------------------------------------------------------------------------------------------


class InstantQueue:
    """A queue that has read a block when a read of it is submitted. A test can change the slots and the result."""

    def __init__(self, nr_slots: int) -> None:
        self._memory = memoryview(mmap.mmap(-1, nr_slots * PAGE_SIZE))
        self.done: list[tuple[int, int]] = []

    def slot(self, number: int) -> memoryview:
        """Return the memory of a slot."""
        return self._memory[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]

    def submit_one(self, fd: int, offset: int, slot: int) -> bool:
        """Read a block."""
        self.done.append((slot, os.preadv(fd, [self.slot(slot)], offset)))
        return True

    def submit(self, fd: int, runs: list[tuple[int, list[int]]]) -> int:
        """Read runs of one block."""
        return sum(self.submit_one(fd, offset, slot) for offset, [slot] in runs)

    def reap(self) -> list[tuple[int, int]]:
        """Return the reads."""
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        """Do nothing: the kernel has no part in it."""


class Pair:
    """Two stores that get the same requests. The second one is pure."""

    def __init__(self, folder: Path) -> None:
        self.stores = [
            PageStore(PAGES * PAGE_SIZE, FRAMES, Backing(str(folder / name)), Codec(), pure=name == "pure")
            for name in ("hot", "pure")
        ]
        assert [type(store.state.path) for store in self.stores] == [Hot, Reference]
        self.filled: list[list[tuple[int, int, bytes]]] = [[], []]
        self.next_page = 0
        self.taken = 0
        """Number of pages that were read by `take_block`."""
        for store in self.stores:  # without tasks, chance does not decide which frames are ready
            fill_reserve(store.state.pool)
            assert store.state.blocks is not None
            store.state.blocks.add_ready(*store.state.blocks.take_holes(2))
            with unittest.mock.patch.object(read_queue, "new_queue", InstantQueue):
                assert store.aio.queue.open()
            store.aio.reap()
        assert [store.aio._single is None for store in self.stores] == [False, True]

    def write(self, first: int, content: bytes) -> None:
        """Write as many pages as there are frames for."""
        hot, pure = (store.requests.write_nowait(first * PAGE_SIZE, content) for store in self.stores)
        assert hot == pure

    def read(self, first: int, count: int) -> None:
        """Read pages in RAM, which needs no other work."""
        hot, pure = (store.requests.read_nowait(first * PAGE_SIZE, count * PAGE_SIZE) for store in self.stores)
        assert hot == pure
        self.next_page = (first + count) % PAGES
        while self.stores[0].requests.make_ready():
            pass

    def read_on(self, count: int) -> None:
        """Read the pages after the last read. Some were made ready, and may have changed since."""
        self.read(self.next_page, min(count, PAGES - self.next_page))

    def write_back(self, most: int, *, fails: bool, overwritten: tuple[int, bytes] | None = None) -> None:
        """Write frames back, like the reclaimer. A page may be overwritten meanwhile."""
        batches = [store.state.begin_writeback(most) for store in self.stores]
        assert batches[0] == batches[1]
        for store, batch in zip(self.stores, batches, strict=True):
            assert store.backing is not None
            for frame, block in batch:
                store.backing.write_blocks(block, [store.state.allocator.frame_bytes(frame)])
        if overwritten is not None:
            self.write(*overwritten)
        for store, batch in zip(self.stores, batches, strict=True):
            if fails:
                store.state.fail_writeback(batch)
            else:
                store.state.finish_writeback(batch)

    def begin_filling(self, page: int, size: int) -> None:
        """Take the place for a zpage in a frame with room, if there is one. The frame is unevictable until `end_filling`."""
        for store, filled in zip(self.stores, self.filled, strict=True):
            ref = store.state.allocator.match_prep(size)
            if ref != NO_REF:
                filled.append((ref, page, bytes(size)))
        assert self.filled[0] == self.filled[1]

    def end_filling(self) -> None:
        """Fill the taken places, and free them at once, so that no page is there."""
        for store, filled in zip(self.stores, self.filled, strict=True):
            for ref, number, zpage in filled:
                store.state.allocator.match_finish(ref, number, zpage)
            for ref, _, _ in filled:
                emptied = store.state.allocator.free(ref)
                if emptied != NO_FRAME:
                    store.state.give_frame(emptied)
            filled.clear()

    async def page_in(self, number: int) -> None:
        """Read a page in any place. Its block may become an ephemeral frame."""
        assert await get(self.stores[0], number) == await get(self.stores[1], number)

    def take_block(self, number: int, fault: str) -> None:
        """Read the block of the first page from `number` on that is in one, like aio_page_in.py, with a fault or none."""
        found: list[list[object]] = []
        for store in self.stores:
            entries = list(store.state.table.entries)
            in_blocks = [at for at, now in enumerate(entries) if now & KIND_MASK in (BLOCK, RAW_BLOCK) and now != LOST]
            if not in_blocks:
                continue
            number = min(in_blocks, key=lambda at, number=number: (at - number) % PAGES)  # type: ignore[misc]
            if fault == "ahead":
                found.append(self._read_ahead(store, entry_ref(entries[number]) >> REF_BITS))
                continue
            self.taken += 1
            answers: list[object] = []
            store.aio.serve(lambda *answer, to=answers: to.append(answer), lambda *again, to=answers: to.append(again))
            queue = cast(InstantQueue, store.aio.queue._kernel)
            begun = [store.aio.begin(key, number * PAGE_SIZE, PAGE_SIZE) for key in range(1 + (fault == "shared"))]
            assert all(begun) and len(queue.done) == 1 == len(store.aio.in_flight)
            [(slot, result)] = queue.done
            if fault == "changed":
                answers.append(store.requests.write_nowait(number * PAGE_SIZE, page(number + 77)))
            elif fault == "damaged":
                content = queue.slot(slot)
                content[::64] = bytes(0xFF ^ byte for byte in content[::64])
            queue.done = [(slot, -errno.EIO if fault == "refused" else result)]
            store.aio.reap()
            assert not store.aio.in_flight and len(store.aio.queue.free) == SLOTS
            found.append(answers)
        assert found[:1] == found[1:]

    def _read_ahead(self, store: PageStore, block: int) -> list[object]:
        """Keep a block that no request needs."""
        assert store.backing is not None
        store.backing.read_blocks(block, [store.aio.queue.slots[0]])
        store.state.hold_block(block)
        kept = store.aio._kept(block, 0, {}, wanted=False)
        store.state.release_block(block)
        return list(kept)

    def compare(self) -> None:
        """Compare each byte of each table and frame, and each counter."""
        hot, pure = self.stores
        for store, filled in zip(self.stores, self.filled, strict=True):
            if not filled:
                store.check()
        for mine, other in zip(hot.memory.arenas, pure.memory.arenas, strict=True):
            for offset, length in mine.populated():
                assert bytes(mine.view[offset : offset + length]) == bytes(other.view[offset : offset + length])
        assert hot.statistics() == pure.statistics()
        assert hot.zbud_counters() == pure.zbud_counters()
        assert hot.state.allocator.unbuddied_lists() == pure.state.allocator.unbuddied_lists()
        assert hot.state.allocator.chunk_histogram() == pure.state.allocator.chunk_histogram()
        assert hot.state.pool.ready_frames == pure.state.pool.ready_frames

    def close(self) -> None:
        """Close both."""
        for store in self.stores:
            store.close()
            let_go(store.memory)


contents = st.one_of(
    st.builds(
        page, st.integers(0, 99), st.sampled_from((SMALL, SMALL, 700, HALF, HALF, BIG, RAW, 3990, 4016, 4017, 4030))
    ),
    st.builds(text_page, st.integers(0, 9)),
    st.builds(page_of_word, st.sampled_from(WORDS)),
    st.builds(lambda at: (b"\x01" + bytes(7)) * at + bytes(8) * (PAGE_WORDS - at), st.integers(1, PAGE_WORDS - 1)),
)
numbers = st.integers(0, PAGES - 1)
steps = st.one_of(
    *[st.tuples(st.just("write"), numbers, st.lists(contents, min_size=1, max_size=6))] * 3,
    *[st.tuples(st.just("read"), numbers, st.integers(1, 6))] * 2,
    *[st.tuples(st.just("read on"), st.integers(1, 9), st.none())] * 3,
    st.tuples(st.just("drop"), numbers, st.integers(1, 4)),
    st.tuples(st.just("writeback"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("overwritten"), numbers, contents),
    st.tuples(st.just("fill"), numbers, st.sampled_from((12, 500, 1900))),
    st.tuples(st.just("filled"), st.none(), st.none()),
    st.tuples(st.just("page in"), numbers, st.none()),
    *[st.tuples(st.just("take block"), numbers, st.sampled_from(FAULTS))] * 2,
    st.tuples(st.just("drop ephemeral"), st.none(), st.none()),
    st.tuples(st.just("later"), st.integers(1, 9), st.none()),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, min_size=1, max_size=24))
@trio_test
async def test_the_same_as_python(tmp_path: Path, ops: list[tuple[str, int, object]]) -> None:
    """Both have the same tables, frames and counters after each step."""
    pair = Pair(tmp_path)
    try:
        for what, number, more in ops:
            if what == "write":
                assert isinstance(more, list)
                pair.write(number, b"".join(more)[: (PAGES - number) * PAGE_SIZE])
            elif what == "read":
                assert isinstance(more, int)
                pair.read(number, more)
            elif what == "read on":
                pair.read_on(number)
            elif what == "drop":
                assert isinstance(more, int)
                for store in pair.stores:
                    await drop(store, number, more)
            elif what == "writeback":
                pair.write_back(number, fails=bool(more))
            elif what == "overwritten":
                assert isinstance(more, bytes)
                pair.write_back(3, fails=False, overwritten=(number, more))
            elif what == "fill":
                assert isinstance(more, int)
                pair.begin_filling(number, more)
            elif what == "filled":
                pair.end_filling()
            elif what == "page in":
                await pair.page_in(number)
            elif what == "take block":
                assert isinstance(more, str)
                pair.take_block(number, more)
            elif what == "drop ephemeral":
                for store in pair.stores:
                    store.state.drop_ephemeral()
            else:
                for store in pair.stores:
                    store.state.now += number
            pair.compare()
    finally:
        pair.close()


@trio_test
async def test_the_same_as_python_for_long(tmp_path: Path) -> None:
    """Thousands of steps over few pages empty, match and fill frames again and again."""
    source = random.Random(8)
    samples = [page(seed, size) for seed in range(8) for size in (20, SMALL, 700, 1200, HALF, 2100, BIG, RAW)]
    samples += [page_of_word(word) for word in WORDS]
    pair = Pair(tmp_path)
    compactions = 0
    allocator = pair.stores[1].state.allocator
    if isinstance(allocator, Dense):
        compact = allocator._compact

        def counting(frame: int) -> None:
            nonlocal compactions
            compactions += 1
            compact(frame)

        vars(allocator).update(_compact=counting)
    for step in range(2500):
        first, count = source.randrange(PAGES - 4), source.randrange(1, 5)
        (what,) = source.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if what == "write":
            pair.write(first, b"".join(source.choices(samples, k=count)))
        elif what == "read":
            pair.read(first, count)
        elif what == "read on":
            pair.read_on(count)
        elif what == "drop":
            for store in pair.stores:
                await drop(store, first, count)
        elif what == "fill":
            pair.begin_filling(first, source.choice((12, 500, 1900)))
        elif what == "filled":
            pair.end_filling()
        elif what == "writeback":
            pair.write_back(2, fails=source.random() < 0.3, overwritten=(first, source.choice(samples)))
        elif what == "take block":
            pair.take_block(first, source.choice(FAULTS))
        else:
            await pair.page_in(first)
        if step % 50 == 0:
            pair.compare()
    pair.end_filling()
    pair.compare()
    assert pair.taken > 100
    assert compactions > 50 or not isinstance(allocator, Dense)
    counters = pair.stores[0].zbud_counters()
    assert counters["pers_cumul_zpages"] > 500 and counters["pers_evicted_pageframes"] > 50
    pair.close()


# ---- mistakes that only C can make ---------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def filled() -> AsyncIterator[PageStore]:
    """Make a store with each kind of page. Pages 2 and 3 share a frame, and 4 is alone in one."""
    store = PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec())
    try:
        fill_reserve(store.state.pool)
        for number, content in enumerate((page_of_word(5), page(1, RAW), page(2), page(3), page(4, BIG))):
            await put(store, number, content)
        assert place_of(store, 2)[0] == place_of(store, 3)[0] != place_of(store, 4)[0]
        yield store
    finally:
        store.close()
        let_go(store.memory)


@pytest.mark.race(18)
@trio_test
async def test_pages_made_ready() -> None:
    """18. Only a reader in order has its next pages decompressed ahead. It does not get a content that has changed since."""
    made: list[int] = []

    def decompress(zpage: memoryview, size: int) -> bytes:
        made.append(len(zpage))
        return codec.decompress(zpage, size)

    store = PageStore(PAGES * PAGE_SIZE, FRAMES, None, codec := Codec())
    hot = store.state.path
    fill_reserve(store.state.pool)
    expected = list(map(page, range(32)))
    assert store.requests.write_nowait(0, b"".join(expected)) == 32 * PAGE_SIZE

    def read(first: int, count: int) -> int:
        """Return the number of pages that were decompressed for the read."""
        made.clear()
        content = hot.read(first, count, decompress)
        assert content == b"".join(expected[first : first + count])
        return len(made)

    def ready() -> int:
        made.clear()
        while hot.make_ready(decompress):
            pass
        return len(made)

    assert (read(8, 4), ready()) == (4, 0), "who is to know where it goes on?"
    assert (read(12, 4), ready(), ready()) == (4, 4, 0)
    assert (read(16, 4), ready()) == (0, 4)
    for number, content in ((20, page(99)), (21, bytes(PAGE_SIZE)), (22, page(7, RAW))):
        await put(store, number, content)
        expected[number] = content
    assert read(20, 4) == 1, "the new one, and three for which zstd is not asked"
    assert (read(0, 2), read(2, 2), ready(), read(3, 2)) == (2, 2, 2, 1), "it goes on in the midst: one was ready"
    assert (read(5, 9), read(14, 9), ready(), read(23, 9)) == (9, 7, 8, 1), "eight are as many as there may be"
    store.close()
    let_go(store.memory)


HIGH: Final = 0xFFFFFFF0
DAMAGES: Final = (
    *("bud next", "bud end", "lru next", "lru end", "state", "owner", "stack"),
    *("first chunks", "last chunks"),  # columns of zbud
    *("used", "tail", "live", "mask of live ones"),  # and columns of dense
)


@pytest.mark.parametrize("damage", DAMAGES)
@trio_test
async def test_damaged_tables_are_an_error(damage: str) -> None:
    """An index that leads elsewhere is an AssertionError, and no page or frame has changed."""
    async with filled() as store:
        allocator, pool = store.state.allocator, store.state.pool
        frame = place_of(store, 4)[0]
        content = page(9, SMALL)  # fits beside 4
        if damage == "bud next":
            allocator._budlists.nexts[frame] = HIGH
        elif damage == "bud end":
            allocator._budlists.nexts[FRAMES + allocator._list_of(frame)] = HIGH
        elif damage == "lru next":
            allocator._lru.prevs[frame] = HIGH
        elif damage == "lru end":
            allocator._lru.prevs[FRAMES] = HIGH
        elif damage == "state":
            allocator._state[frame] = 3
        elif damage == "owner":
            allocator._owner[frame] = 3
        elif damage == "stack":
            pool._stack[pool.ready_frames - 1] = HIGH
            content = page(9, BIG)  # needs its own frame
        elif damage in ("first chunks", "last chunks"):
            if not isinstance(allocator, Zbud):
                return
            allocator._chunks[damage != "first chunks"][frame] = 1
        elif not isinstance(allocator, Dense):
            return
        elif damage == "used":
            allocator._used[frame] = 1
        elif damage == "tail":
            allocator._tail[frame] = PAGE_SIZE + 1
        else:
            allocator._live[frame] = 0 if damage == "live" else 0xFF
        before = bytes(store.memory.frames.view), bytes(store.memory.pages.view)
        with pytest.raises(AssertionError, match="the tables are damaged"):
            store.requests.write_nowait(9 * PAGE_SIZE, content)
        assert (bytes(store.memory.frames.view), bytes(store.memory.pages.view)) == before


@pytest.mark.parametrize("ref", [FRAMES << 3, 1 << 35, 2, 7])
@trio_test
async def test_an_entry_that_leads_nowhere(ref: int) -> None:
    """Python handles a place that no frame has, with an error for the read and the overwrite."""
    async with filled() as store:
        entries = store.state.table.entries
        entries[2] = entry(FRAME, ref, 0)
        with pytest.raises((PageLost, IndexError, AssertionError, TypeError)):
            store.requests.read_nowait(2 * PAGE_SIZE, PAGE_SIZE)
        with contextlib.suppress(IndexError, AssertionError):
            store.requests.write_nowait(2 * PAGE_SIZE, page(5))
        assert await get(store, 4) == page(4, BIG)
        assert await get(store, 3) == page(3)


@trio_test
async def test_a_damaged_zpage_is_lost_and_its_neighbours_are_not() -> None:
    """Python finds the damage, counts it, and returns the bytes before it."""
    async with filled() as store:
        frame, index = place_of(store, 3)
        zpage = store.state.allocator.zpage(frame << REF_BITS | index, 3)
        assert index == 1 and zpage is not None
        zpage[700] ^= 0xFF
        assert store.requests.read_nowait(2 * PAGE_SIZE, 3 * PAGE_SIZE) == page(2)
        with pytest.raises(PageLost):
            store.requests.read_nowait(3 * PAGE_SIZE, PAGE_SIZE)
        assert store.statistics().lost_damaged == 2


@trio_test
async def test_damaged_zpages_are_not_moved() -> None:
    """An impossible handle is an AssertionError before anything of the frame is moved or copied."""
    async with filled() as store:
        allocator = store.state.allocator
        if not isinstance(allocator, Dense):
            return
        for number in range(10, 17):
            await put(store, number, page(number, 600))
        frame, index = place_of(store, 12)
        assert frame == place_of(store, 11)[0]
        await drop(store, 11)
        word = frame * PAGE_WORDS + index
        handle = allocator._words[word]
        content = page(9, 700)  # fits into the hole and the tail together
        before = bytes(store.memory.pages.view), bytes(store.memory.frame_table.view)
        for damaged in (
            handle | 0xFFF,
            handle & ~0xFFF,
            handle - 1,
            handle | 0xFFF << 12,
            handle & ~(0xFFF << 12),
            handle ^ 1 << 60,
        ):
            allocator._words[word] = damaged
            frames = bytes(store.memory.frames.view)
            with pytest.raises(AssertionError, match="the tables are damaged"):
                store.requests.write_nowait(9 * PAGE_SIZE, content)
            assert bytes(store.memory.frames.view) == frames
            assert (bytes(store.memory.pages.view), bytes(store.memory.frame_table.view)) == before
        allocator._words[word] = handle
        await put(store, 9, content)
        assert place_of(store, 9)[0] == frame
        assert await get(store, 9) == content
        store.check()


@trio_test
async def test_a_view_that_is_kept_is_of_no_use() -> None:
    """A compressor or decompressor that keeps its view cannot see later content of that memory."""
    async with filled() as store:
        kept: list[memoryview] = []
        codec = store.requests.codec
        compress, decompress = codec.compress, codec.decompress

        def keeping(view: memoryview) -> bytes:
            kept.append(view)
            return bytes(compress(view))

        def keeping_too(view: memoryview, size: int) -> bytes:
            kept.append(view)
            return bytes(decompress(view, size))

        vars(codec).update(compress=keeping, decompress=keeping_too)
        await put(store, 20, page(20))
        assert store.requests.read_nowait(20 * PAGE_SIZE, PAGE_SIZE) == page(20)
        assert len(kept) == 2
        for view in kept:
            with pytest.raises(ValueError, match="released"):
                view[0]


@trio_test
async def test_an_error_of_a_compressor_is_passed_on() -> None:
    """The pages before are stored, that one is not, and nothing leaks or is half done."""
    async with filled() as store:
        compress = store.requests.codec.compress
        calls = 0

        def failing(view: memoryview) -> bytes:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise MemoryError("no memory")
            return bytes(compress(view))

        vars(store.requests.codec).update(compress=failing)
        with pytest.raises(MemoryError):
            store.requests.write_nowait(30 * PAGE_SIZE, b"".join(page(number) for number in range(30, 34)))
        vars(store.requests.codec).update(compress=compress)
        store.check()
        assert [await get(store, number) for number in (30, 31)] == [page(30), page(31)]
        assert await get(store, 32, 2) == bytes(2 * PAGE_SIZE)


@trio_test
async def test_compress_that_gives_what_no_place_is_for() -> None:
    """Twelve bytes would look like a word, so such a page is kept raw."""
    async with filled() as store:
        compress = store.requests.codec.compress
        vars(store.requests.codec).update(compress=lambda view: b"x" * 12)
        await put(store, 9, page(9))
        vars(store.requests.codec).update(compress=compress)
        assert await get(store, 9) == page(9)
        assert store.statistics().raw_pages == 2


def test_arguments() -> None:
    """Wrong ranges and buffers are refused before any change."""
    memory = StoreMemory(PAGES * PAGE_SIZE, FRAMES, backed=False)
    memory.populate()
    store = PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec(), memory)
    path = store.state.path
    assert path is not None
    for first, count in ((PAGES, 1), (PAGES + 1, 0), (1 << 63, 1), (0, PAGES + 1)):
        with pytest.raises(IndexError):
            path.read(first, count, store.requests.codec.decompress)
    with pytest.raises(IndexError):
        path.write(PAGES - 1, bytes(2 * PAGE_SIZE), store.requests.codec.compress, store.state, store.requests.between)
    with pytest.raises(OverflowError):
        path.read(-1, 1, store.requests.codec.decompress)
    packing = memory.packing
    layout, zpages = packing.kind.LAYOUT, packing.zpages
    number = 13 + len(packing.kind.OWN_WIDTHS) + 1
    buffers = [memoryview(bytearray(64)) for _ in range(number)]
    for few in ((), buffers[:13], buffers[1:], [*buffers, buffers[0]]):
        with pytest.raises(TypeError):
            Hot(layout, zpages, FRAMES, *few)
    for other in ((layout, 1), (layout, 8), (layout ^ 1, zpages)):
        with pytest.raises(ValueError, match="no packing has the layout"):
            Hot(*other, FRAMES, *buffers)
    with pytest.raises(ValueError, match="buffer 1 has 64 bytes instead of 72"):
        Hot(layout, zpages, FRAMES, *buffers)
    with pytest.raises(ValueError, match="too many frames"):
        Hot(layout, zpages, 1 << 40, *buffers)
    with pytest.raises(BufferError):
        Hot(layout, zpages, FRAMES, *[memoryview(bytes(64))] * number)
    large = [memoryview(bytearray(FRAMES * PAGE_SIZE)) for _ in range(number)]
    for short in range(1, number):
        if short < number - 1 or packing.kind.OWN_BYTES:
            with pytest.raises(ValueError, match=f"buffer {short} has 8 bytes"):
                Hot(layout, zpages, FRAMES, *large[:short], memoryview(bytearray(8)), *large[short + 1 :])


def test_arguments_of_single_reads(tmp_path: Path) -> None:
    """Wrong tables, counters and slots are refused. A frame that is not free is an error, and changes nothing."""
    store = PageStore(PAGES * PAGE_SIZE, FRAMES, Backing(str(tmp_path / "backing")), Codec())
    fill_reserve(store.state.pool)
    hot, blocks, allocator = store.state.path, store.state.blocks, store.state.allocator
    assert isinstance(hot, Hot) and blocks is not None
    blocks.add_ready(*blocks.take_holes(2))
    row, words = store.memory.status_area.latencies.row(Timed.PAGEIN), store.state.counters.words
    tables = blocks.live_masks, store.state.written_at, row, words
    numbers, free = (0, 1, 2, 3), [5, 300]
    frames = [FRAMES]
    slots = [memoryview(bytearray(PAGE_SIZE)) for _ in range(6)]
    calls = (lambda offset, slot: True, frames.pop, lambda block, pieces: None, Codec().decompress)

    def made(**other: object) -> PageReads:
        given = {"tables": tables, "numbers": numbers, "calls": calls, "free": free, "slots": slots, "start": 0} | other
        return PageReads(hot, *given.values())  # type: ignore[arg-type]

    for wrong, error in (
        ({"tables": (blocks.live_masks[:-1], memoryview(bytearray(4)), row, words)}, "a table is too short"),
        ({"tables": (blocks.live_masks, store.state.written_at, row[:-1], words)}, "a table is too short"),
        ({"tables": (blocks.live_masks, store.state.written_at, memoryview(bytearray(999))[1:], words)}, "not aligned"),
        ({"numbers": (0, 1, 2, len(words))}, f"no counter {len(words)}"),
    ):
        with pytest.raises(ValueError, match=error):
            made(**wrong)
    with pytest.raises(BufferError):
        made(tables=(bytes(64), store.state.written_at, row, words))
    for wrong_type in ({"free": ()}, {"slots": ()}, {"tables": ()}, {"numbers": (1,)}, {"calls": ()}):
        with pytest.raises(TypeError):
            made(**wrong_type)
    reads = made()
    entries = store.state.table.entries
    entries[7] = entry(BLOCK, 1 << REF_BITS, 5)
    with pytest.raises(IndexError, match="no slot 300"):
        reads.begin(1, 7, 0)
    assert free.pop() == 300
    entries[8] = entry(BLOCK, blocks.nr_blocks << REF_BITS, 5)
    entries[9] = LOST
    assert [reads.begin(1, page, 0) for page in (PAGES, 1 << 63, 6, 8, 9)] == [False] * 5
    for name, arguments in (("begin", (1, 7)), ("finish", (5,)), ("begin", (1, "7", 0)), ("finish", (5, "1"))):
        with pytest.raises(TypeError):
            getattr(reads, name)(*arguments)
    for slot in (-1, 256):
        with pytest.raises(IndexError, match=f"no slot {slot}"):
            reads.take(slot)
        with pytest.raises(IndexError, match=f"no slot {slot}"):
            reads.finish(slot, PAGE_SIZE)
    assert not reads.finish(5, PAGE_SIZE) and reads.take(5) is None, "there is no read yet"
    assert reads.begin("key", 7, 0) and free == []  # type: ignore[arg-type]
    assert blocks.live(1) == 1 << HOLD_INDEX
    assert [(slot, block) for slot, block, _ in reads.in_flight()] == [(5, 1)]
    assert not reads.begin(2, 7, 0), "the block is held, and no slot is free"
    free.append(5)
    assert not reads.begin(2, 7, 0), "the block is held"
    blocks.live_masks[1] = 0
    with pytest.raises(AssertionError, match="the read in slot"):
        reads.begin(2, 7, 0)
    assert free.pop() == 5
    before = bytes(store.memory.frames.view), bytes(store.memory.pages.view), allocator.counters()
    with pytest.raises(AssertionError, match="the tables are damaged"):
        reads.finish(5, PAGE_SIZE)
    assert before == (bytes(store.memory.frames.view), bytes(store.memory.pages.view), allocator.counters())
    assert reads.take(5) is not None and reads.take(5) is None and reads.in_flight() == []
    store.close()
    let_go(store.memory)


def heir_of(store: PageStore, *, pure: bool) -> PageStore:
    """Return a store over a copy of another's memory, before it has recovered."""
    theirs = store.memory
    memory = StoreMemory(PAGES * PAGE_SIZE, FRAMES, backed=True, packing=theirs.packing)
    memory.populate()
    memory.populate_frames([(0, FRAMES)])
    for mine, other in zip(memory.arenas, theirs.arenas, strict=True):
        mine.view[:] = other.view
    return PageStore(PAGES * PAGE_SIZE, FRAMES, store.backing, Codec(), memory, pure=pure)


@pytest.mark.parametrize("seed", range(4))
def test_recovering_is_the_same(seed: int, tmp_path: Path) -> None:
    """A store with damaged frames and page table is rebuilt with the same losses, tables and counters."""
    source, pair = random.Random(seed), Pair(tmp_path)
    for first in range(0, PAGES, 4):
        pair.write(first, b"".join(page(first + at, source.choice((SMALL, 700, 1300, HALF))) for at in range(4)))
    store = pair.stores[0]
    words, entries = store.memory.frames.view.cast("Q"), store.state.table.entries
    for _ in range(6):
        words[source.randrange(FRAMES) * PAGE_WORDS + source.choice([0, 1, 2, PAGE_WORDS - 1])] ^= (
            1 << source.randrange(40)
        )
        entries[source.randrange(PAGES)] = entries[source.randrange(PAGES)]
        entries[source.randrange(PAGES)] ^= 1 << KIND_BITS + source.randrange(REF_BITS + 4)
    heirs = [heir_of(store, pure=pure) for pure in (False, True)]
    found = [heir.recover() for heir in heirs]
    assert found[0] == found[1]
    assert found[0].lost_pages > 0
    for mine, other in zip(*(heir.memory.arenas for heir in heirs), strict=True):
        assert bytes(mine.view) == bytes(other.view)
    assert heirs[0].zbud_counters() == heirs[1].zbud_counters()
    for heir in heirs:
        heir.state.allocator.check()
        let_go(heir.memory)
    pair.close()


@trio_test
async def test_damaged_frames_on_their_way() -> None:
    """A frame that cannot be written back, dropped or filled is an AssertionError, and nothing has changed."""
    async with filled() as store:
        hot, state, allocator = store.state.path, store.state, store.state.allocator
        frame, raw = place_of(store, 4)[0], place_of(store, 1)[0]
        assert hot.coldest(0) == []
        assert hot.coldest(99) == lru_of(allocator, 0)
        before = bytes(store.memory.frames.view), bytes(store.memory.pages.view), allocator.counters()

        def damaged(call: Callable[[], object]) -> None:
            with pytest.raises(AssertionError, match="the tables are damaged"):
                call()
            assert before == (bytes(store.memory.frames.view), bytes(store.memory.pages.view), allocator.counters())

        for wrong in (HIGH, FRAMES, store.state.pool._stack[0]):
            damaged(lambda wrong=wrong: hot.evict([wrong]))  # type: ignore[misc]
            damaged(lambda wrong=wrong: hot.written([(wrong, 1)]))  # type: ignore[misc]
            damaged(lambda wrong=wrong: hot.adopt(wrong, 1, 1))  # type: ignore[misc]
        block = memoryview(bytearray(PAGE_SIZE))
        free, unused = store.state.pool._stack[0], Codec().decompress
        wrong_frames = [(number, PAGE_SIZE, 1) for number in (HIGH, FRAMES, frame, raw)]
        for at, length, live in (
            *wrong_frames,
            (free, PAGE_SIZE - 1, 1),
            (free, PAGE_SIZE, 1 << allocator.most_zpages),
        ):
            damaged(lambda at=at, length=length, live=live: hot.page_in(at, block[:length], 1, live, {}, unused))  # type: ignore[misc]
        damaged(lambda: hot.written([(frame, 1)]))
        allocator._pins[frame] = 1
        assert frame not in hot.coldest(99)
        damaged(lambda: hot.evict([frame]))
        allocator._pins[frame] = 0
        for prevs, member in (
            (allocator._lru.prevs, frame),
            (allocator._budlists.prevs, frame),
            (allocator._lru.prevs, raw),
        ):
            kept, prevs[member] = prevs[member], HIGH
            damaged(lambda member=member: hot.evict([member]))  # type: ignore[misc]
            prevs[member] = kept
        assert hot.drop() == -1
        for name, wrong_arguments in (
            ("evict", (7,)),
            ("written", ([7],)),
            ("coldest", ("1",)),
            ("adopt", (1,)),
            ("page_in", (free, block, 1, 1, [], unused)),
            ("page_in", (free, 7, 1, 1, {}, unused)),
            ("page_in", (free, block, 1, 1, {})),
        ):
            with pytest.raises(TypeError):
                getattr(hot, name)(*wrong_arguments)
        state.check()

        hot.evict([frame, raw])
        before = bytes(store.memory.frames.view), bytes(store.memory.pages.view), allocator.counters()
        damaged(lambda: hot.evict([frame]))
        for number in (1, 4):
            entries = state.table.entries
            kept = entries[number]
            entries[number] = ABSENT
            before = bytes(store.memory.frames.view), bytes(store.memory.pages.view), allocator.counters()
            damaged(lambda number=number: hot.written([(raw if number == 1 else frame, 5)]))  # type: ignore[misc]
            entries[number] = kept
        assert list(hot.written([(frame, 5), (raw, 6)])) == [1, 1]
        assert entries[4] & KIND_MASK == BLOCK and entries[1] & KIND_MASK == RAW_BLOCK


@trio_test
async def test_a_block_in_a_free_frame() -> None:
    """C keeps a block only if the page table expects its content. In other cases Python does it, and knows why."""
    codec = Codec()
    store = PageStore(PAGES * PAGE_SIZE, FRAMES, None, codec)
    hot, allocator, entries = store.state.path, store.state.allocator, store.state.table.entries
    fill_reserve(store.state.pool)
    for number, size in ((2, 1500), (3, 1400)):
        await put(store, number, page(number, size))
    frame = place_of(store, 2)[0]
    assert place_of(store, 3)[0] == frame
    block = memoryview(bytearray(allocator.frame_bytes(frame)))
    hot.evict([frame])
    (live,) = hot.written([(frame, 77)])
    store.state.give_frame(frame)
    before = {number: entries[number] for number in (2, 3)}
    free = store.state.pool.take_frame()

    def taken(
        content: memoryview = block, wanted: dict[int, int] = before, number: int = 77
    ) -> dict[int, bytes] | None:
        tables = bytes(store.memory.pages.view), bytes(store.memory.frame_table.view)
        found = hot.page_in(free, content, number, live, wanted, codec.decompress)
        changed = tables != (bytes(store.memory.pages.view), bytes(store.memory.frame_table.view))
        assert changed == (found is not None)
        return found

    def refuse(zpage: memoryview, size: int) -> bytes:
        raise KeyboardInterrupt

    for wrong in ({2: before[2] ^ 1 << CHECK_SHIFT}, {2: before[3]}, {2: ABSENT}, {HIGH: before[2]}, {5: before[2]}):
        assert taken(wanted=wrong) is None, "the page has changed meanwhile"
    assert taken(number=78) is None, "no page is in that block"
    for number in (2, 3):
        entries[number] ^= 1 << CHECK_SHIFT
        assert taken(wanted={}) is None, "the block holds an old version"
        entries[number] ^= 1 << CHECK_SHIFT
    damaged = memoryview(bytearray(block))
    zpage = damaged[bytes(block).index(bytes(codec.encode(page(3, 1400)))) :]
    zpage[20] ^= 1
    assert taken(damaged) is None, "the zpage is damaged"
    with pytest.raises(KeyboardInterrupt):
        hot.page_in(free, block, 77, live, before, refuse)
    with pytest.raises(TypeError):
        hot.page_in(free, block, 77, live, {2: "x"}, codec.decompress)  # type: ignore[dict-item]
    assert taken() == {2: page(2, 1500), 3: page(3, 1400)}
    assert await get(store, 2) == page(2, 1500) and allocator.is_ephemeral(free)
    with pytest.raises(AssertionError, match="the tables are damaged"):
        hot.page_in(free, block, 77, live, before, codec.decompress)
    store.close()
    let_go(store.memory)


# ---- killed at any instruction -------------------------------------------------------------------------------------

KILLS: Final = 40
KILL_PAGES: Final = 256
KILL_FRAMES: Final = 160


def version(number: int, count: int) -> bytes:
    """Return the content of a page after write `count`, which contains that number. One in eight is a word, and one is raw."""
    if not count:
        return bytes(PAGE_SIZE)
    source = random.Random(number << 20 | count)
    head = b"%8d%8d" % (number, count)
    form = source.randrange(8)
    if form == 0:
        return head[8:] * PAGE_WORDS
    size = RAW - len(head) if form == 1 else source.choice((SMALL, 700, HALF, HALF, 2100, BIG))
    return head + source.randbytes(size).ljust(PAGE_SIZE - len(head), b"\0")


def take_over(memory: StoreMemory, disk: Backing, *, pure: bool) -> PageStore:
    """Return a store that continues with the content of memory and disk."""
    backing = Backing(disk.path, os.dup(disk.fileno()))
    store = PageStore(KILL_PAGES * PAGE_SIZE, KILL_FRAMES, backing, Codec(), memory, pure=pure)
    assert store.recover().lost_pages == 0
    return store


def leave(store: PageStore) -> None:
    """Close a store, except for its memory and its disk."""
    assert store.backing is not None
    os.close(store.backing.fileno())
    store.backing = None
    store.close()


def move_about(store: PageStore, source: random.Random) -> None:
    """Write frames back, drop ephemeral ones and read blocks back, like the tasks of a store, without a checkpoint."""
    state, pool, allocator, backing = store.state, store.state.pool, store.state.allocator, store.backing
    assert backing is not None and state.blocks is not None
    decompress = store.requests.codec.decompress
    batch = state.begin_writeback(source.randrange(1, 24))
    for frame, block in batch:
        backing.write_blocks(block, [allocator.frame_bytes(frame)])
    state.finish_writeback(batch)
    for _ in range(source.randrange(8)):
        state.drop_ephemeral()
    for page_number in source.choices(range(KILL_PAGES), k=12):
        there = state.table.entries[page_number]
        block = there >> KIND_BITS + REF_BITS & REF_MASK >> REF_BITS
        frame = pool.take_frame() if there & KIND_MASK in (BLOCK, RAW_BLOCK) else NO_FRAME
        if frame == NO_FRAME:
            continue
        state.hold_block(block)
        content = memoryview(mmap.mmap(-1, PAGE_SIZE))
        backing.read_blocks(block, [content])
        at_once = source.randrange(2) and state.page_in(frame, content, block, {page_number: there}, decompress)
        if not at_once:
            allocator.fill_prep(frame)
            allocator.frame_bytes(frame)[:] = content
            if there & KIND_MASK == RAW_BLOCK:
                state.adopt_raw(frame, block, page_number)
            else:
                assert state.adopt(frame, block)
        state.release_block(block)


def overwrite_for_ever(memory: StoreMemory, disk: Backing, round_number: int, tell: int) -> None:
    """Overwrite and move pages until killed. Report (first page, pages, count) before each request, and the result after it."""
    store = take_over(memory, disk, pure=False)
    assert isinstance(store.state.path, Hot)
    fill_reserve(store.state.pool)
    source = random.Random(round_number)
    requests = []
    for step in range(100):
        pages = source.randrange(1, 12)
        first = source.randrange(KILL_PAGES - pages)
        count = round_number * 1000 + step
        requests.append((first, count, b"".join(version(first + at, count) for at in range(pages))))
    os.write(tell, b"ready ")
    while True:
        for first, count, content in requests:
            os.write(tell, b"%d,%d,%d " % (first, len(content) // PAGE_SIZE, count))
            stored = store.requests.write_nowait(first * PAGE_SIZE, content)  # as many pages as there are frames for
            os.write(tell, b"%d " % (stored // PAGE_SIZE))
            if not source.randrange(4):
                move_about(store, source)


def killed_child(memory: StoreMemory, disk: Backing, round_number: int, after_seconds: float) -> str:
    """Let a child overwrite pages, kill it after some time, and return its reports."""
    reads, tells = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            overwrite_for_ever(memory, disk, round_number, tells)
        os._exit(1)
    os.close(tells)
    said = os.read(reads, 6) if select.select([reads], [], [], LIMIT_SECONDS / 2)[0] else b""
    kill_at = time.monotonic() + after_seconds
    while said and time.monotonic() < kill_at:
        if select.select([reads], [], [], max(0, kill_at - time.monotonic()))[0]:
            said += os.read(reads, 1 << 16)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while more := os.read(reads, 1 << 16):
        said += more
    os.close(reads)
    assert status == signal.SIGKILL, f"the child ended by itself: {status}"
    return said.decode()


def kill_again_and_again() -> tuple[int, int]:
    """Kill writers and compare each page. Return the number of complete requests, and of kills in the middle of one."""
    memory = StoreMemory(KILL_PAGES * PAGE_SIZE, KILL_FRAMES, backed=True)
    memory.populate()
    folder = tempfile.TemporaryDirectory(dir="/dev/shm")  # a disk that takes no time, so that kills hit the other work
    disk = Backing(f"{folder.name}/backing")
    blocks = BlockMap(memory.blocks.view, memory.nr_segments) if memory.blocks is not None else None
    assert blocks is not None
    holes = blocks.take_holes(memory.nr_segments)
    disk.make_ready(*holes)
    blocks.add_ready(*holes)
    may_be: list[set[int]] = [{0} for _ in range(KILL_PAGES)]
    source = random.Random(11)
    answered = midst = on_disk = 0
    for round_number in range(1, KILLS + 1):
        said = killed_child(memory, disk, round_number, source.uniform(0.0002, 0.03)).split(" ")
        assert said[0] == "ready", said
        for request, end in zip(said[1:-1:2], [*said[2:-1:2], ""], strict=False):
            first, pages, count = map(int, request.split(","))
            for number in range(first, first + pages):
                if not end:
                    may_be[number].add(count)
                elif number < first + int(end):
                    may_be[number] = {count}
            answered += end != ""
            midst += end == ""
        heir = take_over(memory, disk, pure=bool(round_number % 2))
        heir.check()
        on_disk += heir.statistics().written_back_pages
        contents = trio.run(heir.requests.read, 0, KILL_PAGES * PAGE_SIZE)
        for number in range(KILL_PAGES):
            content = contents[number * PAGE_SIZE :][:PAGE_SIZE]
            found = {count for count in may_be[number] if content == version(number, count)}
            assert found, f"round {round_number}: page {number} is none of {sorted(may_be[number])}"
            may_be[number] = found
        heir.check()
        leave(heir)
    assert on_disk > KILLS, "hardly anything was written back"
    disk.close()
    folder.cleanup()
    return answered, midst


def test_killed_at_any_instruction(packing: Packing) -> None:
    """A process that writes through C is killed many times without warning. Each page is whole and one of its own."""
    command = [sys.executable, "-m", "tests.store.test_hot", str(packing)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=4 * LIMIT_SECONDS, cwd=ROOT, check=True)
    answered, midst = map(int, run.stdout.split())
    assert answered > KILLS
    assert midst > KILLS // 8, "hardly any kill came while something was written"


if __name__ == "__main__":
    with packed_by(Packing.parse(sys.argv[1])):
        print(*kill_again_and_again())
