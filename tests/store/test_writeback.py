# SPDX-License-Identifier: MIT
"""Writeback and page-in, with a disk that is held at the critical moment, or fails.

Each test checks that each page has its last content or is lost with an error, never wrong bytes, and that all tables
agree.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from tests.core.samples import BIG, HALF, RAW, SMALL, page, pages
from tests.store.faulty import Call, FaultyBacking, Gate, about
from tests.store.rig import (
    backed_store,
    block_of,
    calm,
    drop,
    forge_handle,
    get,
    in_block,
    in_ram,
    kind_of,
    place_of,
    push,
    put,
    quiet,
    run,
    trio_test,
    until,
)
from zbudfs.core.codec import page_of_word
from zbudfs.core.errors import BackingError, BackingFull, PageLost, PoolFull, Refusal, ZbudfsError
from zbudfs.core.page_table import RAW_BLOCK
from zbudfs.core.reclaim import TICK_SECONDS
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.growth import GROW_RETRY_MOST_SECONDS
from zbudfs.store.page_store import PageStore

pytestmark = pytest.mark.usefixtures("packing")

T = TypeVar("T")
ZEROS = bytes(PAGE_SIZE)
FRAMES = 64
START = 49
"""Frames in use that start a writeback."""
ROUND = 17
"""Frames of one writeback."""


def new(number: int, noise: int = BIG) -> bytes:
    """Return another version of a page."""
    return page(1_000_000 + number, noise)


def frames_used(store: PageStore) -> int:
    """Return the number of frames in use."""
    return store.statistics().pool_used_bytes // PAGE_SIZE


async def fill(store: PageStore, count: int, first: int = 0, noise: int = BIG) -> None:
    """Write pages that take a frame each, oldest first, one by one. A writeback may start in between."""
    for number in range(first, first + count):
        await put(store, number, page(number, noise))


async def fill_up(store: PageStore) -> int:
    """Write pages that take a frame each until there is no room, and return their number."""
    for number in range(store.size_bytes // PAGE_SIZE):
        try:
            await put(store, number, page(number, BIG))
        except PoolFull:
            return number
    raise AssertionError("the store never became full")


async def held_at(gate: Gate, calls: int = 1) -> None:
    """Wait until the disk has received the call, and holds it."""
    await until(lambda: len(gate.held) >= calls, f"{calls} calls are held")


async def written_back(store: PageStore) -> None:
    """Write back pages 0 .. 16. All others are in RAM, and no frame is clean."""
    await fill(store, START)
    await until(lambda: store.statistics().cumul_writeback_frames >= ROUND, "a round is over")
    await quiet(store)
    assert [number for number in range(START) if in_block(store, number)] == list(range(ROUND))


async def next_round(store: PageStore, first: int = 100) -> None:
    """Use so many more frames that the next writeback starts."""
    await fill(store, START - frames_used(store), first)


class Task:
    """A call that runs beside the test."""

    def __init__(self, nursery: trio.Nursery, call: Callable[[], Awaitable[object]]) -> None:
        self.result: object = None
        self.error: Exception | None = None
        self.over = trio.Event()
        nursery.start_soon(self._run, call)

    async def _run(self, call: Callable[[], Awaitable[object]]) -> None:
        try:
            self.result = await call()
        except Exception as error:
            self.error = error
        self.over.set()

    async def still_waits(self) -> None:
        """Return whether the call has not ended after each task had a turn."""
        await trio.testing.wait_all_tasks_blocked()
        assert not self.over.is_set()

    async def outcome(self) -> object:
        """Wait for the result, or raise the error."""
        await self.over.wait()
        if self.error is not None:
            raise self.error
        return self.result


async def intact(store: PageStore, expected: dict[int, bytes]) -> None:
    """Each page has the expected content twice: from its place, and from the place after the first read."""
    for number, content in [*expected.items(), *expected.items()]:
        assert await get(store, number) == content, f"page {number}"
    await quiet(store)


# ---- a page changes while its frame is being written -------------------------------------------------------------


async def overwrite(store: PageStore, number: int) -> bytes:
    """Write another version of a page."""
    await put(store, number, new(number))
    return new(number)


async def overwrite_small(store: PageStore, number: int) -> bytes:
    """Write another version that joins the frame of another page."""
    await put(store, number, new(number, SMALL))
    return new(number, SMALL)


async def make_word(store: PageStore, number: int) -> bytes:
    """Make a page the same-filled one of a word."""
    await put(store, number, page_of_word(0x1234))
    return page_of_word(0x1234)


async def make_raw(store: PageStore, number: int) -> bytes:
    """Make a page incompressible."""
    await put(store, number, new(number, RAW))
    return new(number, RAW)


async def discard(store: PageStore, number: int) -> bytes:
    """Discard a page."""
    await drop(store, number)
    return ZEROS


async def patch(store: PageStore, number: int) -> bytes:
    """Change a few bytes of a page of `BIG`."""
    before = await get(store, number)
    await store.requests.write(number * PAGE_SIZE + 100, b"patch")
    return before[:100] + b"patch" + before[105:]


CHANGES = [overwrite, overwrite_small, make_word, make_raw, discard, patch]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("noise", [BIG, RAW])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.race(1, 2, 3)
@trio_test
async def test_a_page_changes_while_it_is_written(
    tmp_path: Path, change: Callable[[PageStore, int], Awaitable[bytes]], noise: int, fails: bool
) -> None:
    """A read returns the new content while the old one is on its way to the disk, after that, and after a failed write."""
    async with backed_store(tmp_path) as (store, backing):
        expected = {number: page(number, noise) for number in range(START)}
        with backing.held("write_blocks") as gate:
            await fill(store, START, noise=noise)
            await held_at(gate)
            zombies = store.zbud_counters()["pers_zombie_count"]
            assert zombies == ROUND
            written = [number for number in range(START) if is_zombie(store, number)]
            for number in (written[0], written[5], written[-1]):
                expected[number] = await change(store, number)
                assert await get(store, number) == expected[number]
            if fails:
                backing.fail("write_blocks")
        await quiet(store)
        backing.recover()
        statistics = store.statistics()
        frames = statistics.cumul_writeback_frames
        assert frames == 0 if fails else frames >= ROUND
        assert statistics.cumul_writeback_pages == statistics.written_back_pages == max(0, frames - 3)
        assert statistics.backing_used_bytes == max(0, frames - 3) * PAGE_SIZE
        await quiet(store)
        await intact(store, expected)


def is_zombie(store: PageStore, number: int) -> bool:
    """Return whether a page is in a frame that is being written back."""
    return in_ram(store, number) and store.state.pool.allocator.state(place_of(store, number)[0]).name == "ZOMBIE"


@pytest.mark.parametrize("changes", [(0,), (1,), (0, 1), (1, 0)])
@pytest.mark.parametrize("how", [overwrite, discard])
@pytest.mark.race(1, 2)
@trio_test
async def test_buddies_change_while_their_frame_is_written(
    tmp_path: Path, changes: tuple[int, ...], how: Callable[[PageStore, int], Awaitable[bytes]]
) -> None:
    """One or both pages of a frame go. The block keeps the other one, and is free if none is left."""
    async with backed_store(tmp_path) as (store, backing):
        expected = {number: page(number) for number in range(2 * START)}
        with backing.held("write_blocks") as gate:
            await fill(store, 2 * START, noise=HALF)
            await held_at(gate)
            assert place_of(store, 0)[0] == place_of(store, 1)[0]
            assert is_zombie(store, 0)
            for number in changes:
                expected[number] = await how(store, number)
        await quiet(store)
        left = {0, 1} - set(changes)
        assert {number for number in (0, 1) if in_block(store, number)} == left
        statistics = store.statistics()
        assert statistics.backing_used_bytes == statistics.cumul_writeback_bytes - (not left) * PAGE_SIZE
        await intact(store, expected)


@pytest.mark.race(1, 2)
@trio_test
async def test_a_page_that_changes_twice_while_it_is_written(tmp_path: Path) -> None:
    """The second version counts, and no frame or block is lost."""
    async with backed_store(tmp_path) as (store, backing):
        with backing.held("write_blocks") as gate:
            await fill(store, START)
            await held_at(gate)
            await put(store, 0, new(1))
            await drop(store, 0)
            await put(store, 0, new(2))
        await quiet(store)
        await intact(store, {0: new(2)} | {number: page(number, BIG) for number in range(1, START)})


# ---- other work meanwhile -----------------------------------------------------------------------------------------


@pytest.mark.race(4)
@trio_test
async def test_a_page_in_is_served_while_a_write_is_held(tmp_path: Path) -> None:
    """During a slow disk write, reads are served from RAM, from zombies, and from the disk."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        with backing.held("write_blocks") as gate:
            await next_round(store)
            await held_at(gate)
            for number in range(START):
                assert await get(store, number) == page(number, BIG)
            assert backing.calls_of("read_blocks")
            assert store.zbud_counters()["pers_zombie_count"] == ROUND
        await quiet(store)


@trio_test
async def test_no_write_waits_for_ever_for_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes beyond the pool are refused after a while, and at once from then on, and accepted when the disk answers."""
    monkeypatch.setattr("zbudfs.store.frame_queue.REFUSE_SECONDS", 0.3)

    said: list[str] = []
    async with backed_store(tmp_path, log=said.append) as (store, backing):
        with backing.held("write_blocks") as gate:
            await fill(store, FRAMES)
            await held_at(gate)
            for count in (1, 2):
                with pytest.raises(PoolFull) as caught:
                    await put(store, 100, new(100))
                assert caught.value.cause is Refusal.BACKING_STALLED
                assert store.statistics().refused_backing_stalled == count
            assert ["does not answer" in text or "not answered" in text for text in said] == [True]
            assert await get(store, 5) == page(5, BIG)
            assert await get(store, 100) == bytes(PAGE_SIZE)
        await quiet(store)
        await put(store, 100, new(100))
        await quiet(store)
        await intact(store, {100: new(100)} | {number: page(number, BIG) for number in range(FRAMES)})
        async with trio.open_nursery() as nursery:
            with backing.held("write_blocks") as gate:  # it has to get nowhere for as long again
                writes = Task(nursery, lambda: fill(store, 2 * FRAMES, 200))
                await held_at(gate)
                await writes.still_waits()
            await writes.outcome()
        await quiet(store)
        assert store.statistics().refused_backing_stalled == 2


@trio_test
async def test_a_disk_that_grows_slowly_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write is refused while each piece of growth comes in time, however long all of it takes."""
    monkeypatch.setattr("zbudfs.store.frame_queue.REFUSE_SECONDS", 0.5)
    monkeypatch.setattr("zbudfs.store.growth.GROW_SEGMENTS", 1)
    make_ready = FaultyBacking.make_ready

    def slowly(backing: FaultyBacking, first: int, count: int) -> None:
        time.sleep(0.2)
        make_ready(backing, first, count)

    async with backed_store(tmp_path, nr_pages=1024, nr_frames=256) as (store, _):
        monkeypatch.setattr(FaultyBacking, "make_ready", slowly)
        await fill(store, 900)
        await quiet(store)
        assert store.statistics().refused_pool_full == 0
        await intact(store, {number: page(number, BIG) for number in range(900)})


@trio_test
async def test_a_write_waits_for_writeback_and_goes_on(tmp_path: Path) -> None:
    """With no frame free a write waits for the disk instead of failing, and others continue meanwhile."""
    async with backed_store(tmp_path) as (store, backing):
        async with trio.open_nursery() as nursery:
            with backing.held("write_blocks") as gate:
                await fill(store, FRAMES)
                await held_at(gate)
                writes = [
                    Task(nursery, lambda: put(store, 100, pages(3, BIG, 100))),
                    Task(nursery, lambda: store.requests.write(200 * PAGE_SIZE + 50, page(200, BIG)[:BIG])),
                    Task(nursery, lambda: put(store, 3, new(3))),
                ]
                for write in writes:
                    await write.still_waits()
                assert await get(store, 5) == page(5, BIG)
                assert await get(store, 3) == page(3, BIG)
                await put(store, 4, page_of_word(9))
            for write in writes:
                await write.outcome()
        await quiet(store)
        statistics = store.statistics()
        assert statistics.refused_pool_full == 0
        assert statistics.pool_used_bytes <= FRAMES * PAGE_SIZE
        expected = {number: page(number, BIG) for number in [*range(FRAMES), 100, 101, 102]}
        expected |= {3: new(3), 4: page_of_word(9), 200: (bytes(50) + page(200, BIG))[:PAGE_SIZE]}
        await intact(store, expected)


@pytest.mark.race(10, 12)
@pytest.mark.parametrize("change", [make_word, discard])
@trio_test
async def test_a_page_changes_while_a_write_to_it_waits(
    tmp_path: Path, change: Callable[[PageStore, int], Awaitable[bytes]]
) -> None:
    """A write waits for a frame, and the page is overwritten or discarded meanwhile: the later commit stands."""
    async with backed_store(tmp_path) as (store, backing):
        async with trio.open_nursery() as nursery:
            with backing.held("write_blocks") as gate:
                await fill(store, FRAMES)
                await held_at(gate)
                write = Task(nursery, lambda: put(store, 3, new(3)))
                await write.still_waits()
                content = await change(store, 3)
                assert await get(store, 3) == content
                await write.still_waits()
            await write.outcome()
        await quiet(store)
        await intact(store, {number: page(number, BIG) for number in range(FRAMES)} | {3: new(3)})


@trio_test
async def test_a_waiting_write_can_be_cancelled(tmp_path: Path) -> None:
    """A cancelled write has changed nothing, or whole pages, and leaves nothing behind."""
    async with backed_store(tmp_path) as (store, backing):
        with backing.held("write_blocks") as gate:
            await fill(store, FRAMES)
            await held_at(gate)
            for offset, content in ((100 * PAGE_SIZE, page(100, BIG)), (3 * PAGE_SIZE + 5, b"patch")):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(store.requests.write, offset, content)
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
                assert scope.cancelled_caught
        await quiet(store)
        await intact(store, {100: ZEROS} | {number: page(number, BIG) for number in range(FRAMES)})


# ---- its start, its end, and its order ----------------------------------------------------------------------------


@trio_test
async def test_writeback_starts_below_low_and_stops_at_high(tmp_path: Path) -> None:
    """Writeback starts at fewer than 16 free frames, continues to 32, and starts again only at 15."""
    async with backed_store(tmp_path) as (store, backing):
        await fill(store, START - 1)
        await quiet(store)
        assert not backing.calls_of("write_blocks")
        await fill(store, 1, START - 1)
        await until(lambda: frames_used(store) == FRAMES - 32, "the high watermark is reached")
        await quiet(store)
        assert sum(call.count for call in backing.calls_of("write_blocks")) == ROUND
        calls = len(backing.calls)
        await fill(store, ROUND - 1, 100)
        await quiet(store)
        assert len(backing.calls) == calls
        assert frames_used(store) == START - 1
        await fill(store, 1, 200)
        await until(lambda: store.statistics().cumul_writeback_frames == 2 * ROUND, "the second round")
        await quiet(store)
        assert frames_used(store) == FRAMES - 32


@trio_test
async def test_neighbours_go_with_one_call(tmp_path: Path) -> None:
    """A batch goes to neighbouring blocks with one write, coldest first, in the order of the frames."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        calls = backing.calls_of("write_blocks")
        assert [call.count for call in calls] == [ROUND]
        assert [block_of(store, number) for number in range(ROUND)] == sorted(calls[0].blocks)


@trio_test
async def test_frames_go_out_as_they_are(tmp_path: Path) -> None:
    """Two pages go out with one block."""
    async with backed_store(tmp_path) as (store, _):
        await fill(store, 2 * START, noise=HALF)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        statistics = store.statistics()
        assert statistics.cumul_writeback_bytes == ROUND * PAGE_SIZE
        assert statistics.cumul_writeback_pages == statistics.written_back_pages == 2 * ROUND
        assert statistics.backing_used_bytes == ROUND * PAGE_SIZE


@trio_test
async def test_raw_pages_go_first(tmp_path: Path) -> None:
    """A raw page is written back before colder pages that compress."""
    async with backed_store(tmp_path) as (store, _):
        await fill(store, 30)
        await fill(store, 5, 30, RAW)
        await fill(store, START - 35, 35)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        assert [number for number in range(START) if in_block(store, number)] == [*range(12), *range(30, 35)]
        assert all(kind_of(store, number) == RAW_BLOCK for number in range(30, 35))
        assert store.statistics().raw_pages == 5
        await intact(store, {number: page(number, RAW if 30 <= number < 35 else BIG) for number in range(START)})
        assert store.statistics().raw_pages == 5


@trio_test
async def test_ephemeral_frames_are_dropped_first(tmp_path: Path) -> None:
    """Clean copies make room without any I/O. Frames are written only when no copy is left."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        await intact(store, {number: page(number, BIG) for number in range(10)})
        assert store.zbud_counters()["eph_pageframes"] == 10
        assert all(in_ram(store, number) for number in range(10))
        reads, writes = len(backing.calls_of("read_blocks")), len(backing.calls_of("write_blocks"))
        with backing.held("write_blocks") as gate:
            await next_round(store)
            await held_at(gate)
            counters = store.zbud_counters()
            assert counters["eph_pageframes"] == 0
            assert counters["eph_evicted_pageframes"] == 10
            assert sum(call.count for call in gate.held) == ROUND - 10
            assert all(in_block(store, number) for number in range(10))
        await quiet(store)
        assert len(backing.calls_of("read_blocks")) == reads
        assert len(backing.calls_of("write_blocks")) == writes + 1
        await intact(store, {number: page(number, BIG) for number in range(START)})


@trio_test
async def test_the_coldest_copy_is_dropped_first(tmp_path: Path) -> None:
    """The oldest clean copy goes first, and a read does not keep it."""
    async with backed_store(tmp_path) as (store, _):
        await written_back(store)
        for number in (5, 3, 8, 5):
            await get(store, number)
        assert store.state.drop_ephemeral()
        assert [in_ram(store, number) for number in (5, 3, 8)] == [False, True, True]
        assert store.state.drop_ephemeral()
        assert [in_ram(store, number) for number in (5, 3, 8)] == [False, False, True]
        await quiet(store)


@trio_test
async def test_a_clean_copy_that_changes_frees_its_block(tmp_path: Path) -> None:
    """An overwrite or a discard of a page in RAM and on the disk frees its block as well."""
    async with backed_store(tmp_path) as (store, _):
        await written_back(store)
        used = store.statistics().backing_used_bytes
        for number in (0, 1, 2):
            await get(store, number)
        await put(store, 0, new(0))
        await drop(store, 1)
        assert store.statistics().backing_used_bytes == used - 2 * PAGE_SIZE
        await quiet(store)
        await intact(store, {0: new(0), 1: ZEROS, 2: page(2, BIG)})


# ---- blocks ---------------------------------------------------------------------------------------------------------


@trio_test
async def test_a_block_is_free_when_its_last_page_goes(tmp_path: Path) -> None:
    """A block is in use as long as one of its two pages is wanted."""
    async with backed_store(tmp_path) as (store, _):
        await fill(store, 2 * START, noise=HALF)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        for number in range(0, 2 * ROUND, 2):
            assert block_of(store, number) == block_of(store, number + 1)
            used = store.statistics().backing_used_bytes
            await (drop(store, number) if number % 4 else put(store, number, page_of_word(3)))
            assert store.statistics().backing_used_bytes == used
            await drop(store, number + 1)
            assert store.statistics().backing_used_bytes == used - PAGE_SIZE
        assert store.statistics().backing_used_bytes == 0
        await quiet(store)


@trio_test
async def test_freed_blocks_are_used_again_first(tmp_path: Path) -> None:
    """With any number of writes the file does not grow beyond the blocks in use."""
    async with backed_store(tmp_path, nr_pages=4096) as (store, backing):
        ready = store.statistics().backing_ready_bytes
        blocks = ready // PAGE_SIZE
        assert 64 <= blocks <= 1024 < 4096
        for version in range(25):
            for number in range(120):
                await put(store, number, page(version * 1000 + number, BIG))
        await quiet(store)
        statistics = store.statistics()
        assert statistics.cumul_writeback_frames > 2 * blocks
        assert statistics.backing_ready_bytes == statistics.cumul_grown_bytes + PAGE_SIZE == ready  # the header
        assert max(max(call.blocks) for call in backing.calls_of("write_blocks")) < blocks
        await intact(store, {number: page(24_000 + number, BIG) for number in range(120)})


@pytest.mark.race(7)
@trio_test
async def test_a_block_that_is_being_read_is_not_used_again(tmp_path: Path) -> None:
    """A block is freed while its page-in is held, and gets no new content before the read has ended."""
    async with backed_store(tmp_path, nr_pages=256) as (store, backing):
        await written_back(store)
        block = block_of(store, 3)
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                read = Task(nursery, lambda: get(store, 3))
                await held_at(gate)
                await drop(store, 0, ROUND)
                assert store.statistics().backing_used_bytes == PAGE_SIZE
                for version in range(12):
                    for number in range(100, 200):
                        await put(store, number, page(version * 1000 + number, BIG))
                assert store.statistics().cumul_writeback_frames > 1000
                again = [call for call in backing.calls_of("write_blocks")[1:] if block in call.blocks]
                assert not again
            assert await read.outcome() in (page(3, BIG), ZEROS)
        await quiet(store)
        assert store.state.blocks is not None
        assert store.state.blocks.live(block) == 0
        for version in range(12):
            for number in range(100, 200):
                await put(store, number, page(version * 1000 + number, BIG))
        assert any(block in call.blocks for call in backing.calls_of("write_blocks")[1:])
        await intact(store, {3: ZEROS} | {number: page(11_000 + number, BIG) for number in range(100, 200)})


# ---- page-in ----------------------------------------------------------------------------------------------------------


@pytest.mark.race(5)
@trio_test
async def test_two_page_ins_of_one_block_read_it_once(tmp_path: Path) -> None:
    """A reader of either page of a block that is being read waits for that read."""
    async with backed_store(tmp_path) as (store, backing):
        await fill(store, 2 * START, noise=HALF)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                reads = [Task(nursery, partial(get, store, number)) for number in (0, 1, 0, 1, 0)]
                span = Task(nursery, lambda: get(store, 0, 6))
                await held_at(gate)
                for read in reads:
                    await read.still_waits()
            assert [await read.outcome() for read in reads] == [page(number) for number in (0, 1, 0, 1, 0)]
            assert await span.outcome() == pages(6)
        first = block_of_copy(store, 0)
        assert sum(first in call.blocks for call in backing.calls_of("read_blocks")) == 1
        counts = store.statistics()
        assert counts.cumul_pagein_blocks - counts.cumul_readahead_blocks == 3
        assert in_ram(store, 0)
        assert in_ram(store, 1)
        await quiet(store)


def block_of_copy(store: PageStore, number: int) -> int:
    """Return the block of which a page's frame is a clean copy."""
    return store.state.pool.block_of[place_of(store, number)[0]]


@trio_test
async def test_neighbours_are_read_with_one_call(tmp_path: Path) -> None:
    """A read of several pages in neighbouring blocks is one read of the file."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        assert await get(store, 2, 8) == pages(8, BIG, 2)
        assert [call.count for call in backing.calls_of("read_blocks")] == [8]
        assert store.statistics().cumul_pagein_pages == 8


@pytest.mark.parametrize("change", CHANGES[:5])
@pytest.mark.race(6)
@trio_test
async def test_a_page_changes_during_its_page_in(
    tmp_path: Path, change: Callable[[PageStore, int], Awaitable[bytes]]
) -> None:
    """The read returns the old or the new content. From then on it is the new one, and the buddy does not change."""
    async with backed_store(tmp_path) as (store, backing):
        await fill(store, 2 * START, noise=HALF)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        expected = {number: page(number) for number in range(2 * START)}
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                both = Task(nursery, lambda: get(store, 4, 2))
                await held_at(gate)
                expected[4] = await change(store, 4)
                assert await get(store, 4) == expected[4]
            found = await both.outcome()
        assert found in (page(4) + page(5), expected[4] + page(5))
        await quiet(store)
        await intact(store, expected)


@pytest.mark.race(7)
@trio_test
async def test_both_pages_go_during_their_page_in(tmp_path: Path) -> None:
    """The copy is dropped, the block is free, and the frame is back."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        used = store.statistics()
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                read = Task(nursery, lambda: get(store, 2))
                await held_at(gate)
                await drop(store, 2)
            assert await read.outcome() in (page(2, BIG), ZEROS)
        assert await get(store, 2) == ZEROS
        statistics = store.statistics()
        assert statistics.pool_used_bytes == used.pool_used_bytes
        assert statistics.backing_used_bytes == used.backing_used_bytes - PAGE_SIZE
        await quiet(store)


@trio_test
async def test_page_ins_without_a_frame_to_keep(tmp_path: Path) -> None:
    """More page-ins at once than there is room for are served, and the limit holds."""
    async with backed_store(tmp_path, nr_pages=2048) as (store, backing):
        await fill(store, 300)
        await quiet(store)
        cold = [number for number in range(300) if in_block(store, number)]
        assert len(cold) > 200
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                reads = {number: Task(nursery, partial(get, store, number)) for number in cold[:200]}
                await held_at(gate, 2)
                await trio.testing.wait_all_tasks_blocked()
                assert frames_used(store) <= FRAMES
            for number, read in reads.items():
                assert await read.outcome() == page(number, BIG)
        assert store.state.pool.used_frames <= FRAMES
        await quiet(store)
        whole = await get(store, 0, 300)
        assert whole == pages(300, BIG)
        await quiet(store)


@trio_test
async def test_writes_while_most_frames_are_being_read_into(tmp_path: Path) -> None:
    """Writers that share the few frames which page-ins have left wait, and none is refused."""
    async with backed_store(tmp_path, nr_frames=8) as (store, backing):
        await fill(store, 30)
        await quiet(store)
        cold = [number for number in range(30) if in_block(store, number)]
        for number in range(30):
            if number not in cold:
                await drop(store, number)
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                reads = {number: Task(nursery, partial(get, store, number)) for number in cold[:10]}
                await held_at(gate, 2)
                await trio.testing.wait_all_tasks_blocked()
                assert store.zbud_counters()["eph_pageframes"] >= 6
                writes = [Task(nursery, partial(put, store, number, page(number, BIG))) for number in range(100, 120)]
                for write in writes:
                    await write.outcome()
            for number, read in reads.items():
                assert await read.outcome() == page(number, BIG)
        assert store.statistics().refused_pool_full == 0
        await quiet(store)
        await intact(store, {number: page(number, BIG) for number in [*cold, *range(100, 120)]})


@trio_test
async def test_a_page_in_can_be_cancelled(tmp_path: Path) -> None:
    """A cancelled read ends when the disk does, and leaves nothing behind. A read that waits for it continues."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                scope = trio.CancelScope()

                async def cancelled() -> None:
                    with scope:
                        await get(store, 1)

                first = Task(nursery, cancelled)
                await held_at(gate)
                second = Task(nursery, lambda: get(store, 1))
                await second.still_waits()
                scope.cancel()
                await first.still_waits()
            await first.outcome()
            assert await second.outcome() == page(1, BIG)
        await quiet(store)
        await intact(store, {number: page(number, BIG) for number in range(START)})


# ---- patches ----------------------------------------------------------------------------------------------------------


def patched(content: bytes, at: int, piece: bytes) -> bytes:
    """Return a page with some replaced bytes."""
    return content[:at] + piece + content[at + len(piece) :]


@pytest.mark.parametrize("change", [overwrite, make_word, make_raw, discard])
@pytest.mark.race(9)
@trio_test
async def test_a_patch_races_a_full_write(tmp_path: Path, change: Callable[[PageStore, int], Awaitable[bytes]]) -> None:
    """A page is replaced while a patch reads it: the patch comes before or after, and no old content is left."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                write = Task(nursery, lambda: store.requests.write(3 * PAGE_SIZE + 700, b"patch"))
                await held_at(gate)
                replaced = await change(store, 3)
                await write.still_waits()
            await write.outcome()
        found = await get(store, 3)
        assert found in (replaced, patched(replaced, 700, b"patch"))
        await quiet(store)
        await intact(store, {3: found, 4: page(4, BIG)})


@pytest.mark.race(9)
@trio_test
async def test_a_patch_races_another(tmp_path: Path) -> None:
    """Patches of different bytes of a page that has to be read are all there in the end."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        async with trio.open_nursery() as nursery:
            with backing.held("read_blocks") as gate:
                pieces = {at: b"<%d>" % at for at in (0, 100, 2000, 4090)}
                writes = [
                    Task(nursery, partial(store.requests.write, 3 * PAGE_SIZE + at, piece))
                    for at, piece in pieces.items()
                ]
                half = Task(nursery, lambda: store.requests.discard(3 * PAGE_SIZE + 3000, 500))
                await held_at(gate)
                for write in [*writes, half]:
                    await write.still_waits()
            for write in [*writes, half]:
                await write.outcome()
        expected = page(3, BIG)
        for at, piece in pieces.items():
            expected = patched(expected, at, piece)
        expected = patched(expected, 3000, bytes(500))
        await intact(store, {3: expected, 2: page(2, BIG), 4: page(4, BIG)})


@pytest.mark.race(9)
@trio_test
async def test_a_patch_that_waits_for_a_frame_races_a_full_write(tmp_path: Path) -> None:
    """A page is replaced while a patch that has read it waits for room: the patch comes before or after."""
    async with backed_store(tmp_path) as (store, backing):
        async with trio.open_nursery() as nursery:
            with backing.held("write_blocks") as gate:
                await fill(store, FRAMES)
                await held_at(gate)
                write = Task(nursery, lambda: store.requests.write(3 * PAGE_SIZE + 700, b"patch"))
                await write.still_waits()
                await put(store, 3, page_of_word(7))
                await write.still_waits()
            await write.outcome()
        found = await get(store, 3)
        assert found in (page_of_word(7), patched(page_of_word(7), 700, b"patch"))
        await quiet(store)


@trio_test
async def test_a_patch_of_a_page_that_cannot_be_read(tmp_path: Path) -> None:
    """The patch is an error, and the page stays lost. A full write heals it."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        backing.fail("read_blocks")
        with pytest.raises(BackingError):
            await store.requests.write(3 * PAGE_SIZE + 700, b"patch")
        backing.recover()
        assert await get(store, 3) == page(3, BIG)
        await quiet(store)


# ---- a disk that fails ----------------------------------------------------------------------------------------------


@trio_test
async def test_a_failing_write_keeps_the_pages_in_ram(tmp_path: Path) -> None:
    """Refused frames stay in RAM, failures are counted, and writeback tries again and continues when the disk works."""
    told: list[str] = []
    async with backed_store(tmp_path, log=told.append) as (store, backing):
        backing.fail("write_blocks")
        await fill(store, START)
        await until(lambda: store.statistics().writeback_failures == 1, "a writeback has failed")
        await quiet(store)
        assert not any(in_block(store, number) for number in range(START))
        assert store.statistics().backing_used_bytes == 0
        assert store.statistics().cumul_writeback_frames == 0
        await intact(store, {number: page(number, BIG) for number in range(START)})
        assert not backing.calls_of("read_blocks")
        assert len(told) == 1
        push(1.5)
        await until(lambda: store.statistics().writeback_failures == 2, "it was tried again")
        assert len(told) == 1
        backing.recover()
        push(1.5)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "it went on")
        await quiet(store)
        assert store.statistics().writeback_failures == 2
        assert len(told) == 2
        assert [number for number in range(START) if in_block(store, number)] == list(range(ROUND))
        await intact(store, {number: page(number, BIG) for number in range(START)})


@trio_test
async def test_a_disk_that_fails_is_not_flooded(tmp_path: Path) -> None:
    """Nothing is written for a second after a failure, whatever happens meanwhile."""
    async with backed_store(tmp_path) as (store, backing):
        backing.fail("write_blocks")
        await fill(store, FRAMES)
        await until(lambda: store.statistics().writeback_failures == 1, "a writeback has failed")
        tried = len(backing.calls_of("write_blocks"))
        for number in range(20):
            with pytest.raises(PoolFull):
                await put(store, 100 + number, page(100 + number, BIG))
        assert len(backing.calls_of("write_blocks")) == tried
        assert store.statistics().refused_pool_full == 20
        await intact(store, {number: page(number, BIG) for number in range(FRAMES)})
        backing.recover()
        push(1.5)
        await put(store, 100, page(100, BIG))
        await intact(store, {100: page(100, BIG), 0: page(0, BIG)})


@trio_test
async def test_a_write_that_fails_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    """A batch goes to many single blocks, one of which the disk refuses: nothing is lost."""
    async with backed_store(tmp_path, nr_pages=700) as (store, backing):
        await fill(store, 600)
        await quiet(store)
        expected = {number: page(number, BIG) for number in range(600)}
        cold = [number for number in range(600) if in_block(store, number)]
        for number in cold[::2]:  # the free blocks are holes of one block each now, but for some at the end
            await drop(store, number)
        singles: list[Call] = []

        def fourth_single(call: Call) -> bool:
            if call.count == 1:
                singles.append(call)
            return len(singles) == 4

        backing.fail("write_blocks", fourth_single)
        for number in cold[::2]:
            expected[number] = new(number)
            try:
                await put(store, number, new(number))
            except PoolFull:
                push(1.5)
                await put(store, number, new(number))
        await quiet(store)
        assert store.statistics().writeback_failures == 1
        assert len(singles) > 10
        await intact(store, expected)


@trio_test
async def test_a_failing_read_is_an_error_for_that_page_alone(tmp_path: Path) -> None:
    """A read of several pages ends before the refused one, which alone is an error. The others are right."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        backing.fail("read_blocks", about({block_of(store, 5)}))
        assert await get(store, 2, 8) == pages(3, BIG, 2)
        assert await store.requests.read(2 * PAGE_SIZE + 10, 6 * PAGE_SIZE) == pages(3, BIG, 2)[10:]
        for count in (1, 4):
            with pytest.raises(BackingError):
                await get(store, 5, count)
        with pytest.raises(BackingError):
            await store.requests.read(5 * PAGE_SIZE + 10, 20)
        assert await get(store, 6, 4) == pages(4, BIG, 6)
        assert store.statistics().pagein_failures >= 3
        assert store.statistics().lost_pages == 0
        await quiet(store)
        backing.recover()
        assert await get(store, 5) == page(5, BIG)
        await intact(store, {number: page(number, BIG) for number in range(START)})


@trio_test
async def test_a_failing_read_of_the_first_page_of_many(tmp_path: Path) -> None:
    """A read that begins with the bad page is an error and returns no byte. The rest can be read."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        backing.fail("read_blocks", about({block_of(store, 0), block_of(store, 3)}))
        with pytest.raises(BackingError):
            await get(store, 0, 10)
        assert await get(store, 1, 10) == pages(2, BIG, 1)
        assert await get(store, 4, 10) == pages(10, BIG, 4)
        await quiet(store)


def test_reads_that_fail_leave_no_cycle(tmp_path: Path) -> None:
    """An error that refers to itself keeps the pages of its request until a garbage collection: gigabytes a minute."""

    async def main() -> None:
        async with backed_store(tmp_path) as (store, backing):
            await written_back(store)
            await put(store, START, page(START, SMALL))
            forge_handle(store, START, owner=START + 1)
            with open(backing.path, "r+b") as file:  # noqa: PTH123
                file.seek(block_of(store, 2) * PAGE_SIZE)
                file.write(bytes(PAGE_SIZE))
            backing.fail("read_blocks", about({block_of(store, 0), block_of(store, 3)}))
            gc.collect()
            gc.disable()
            try:
                failed = 0
                for first, count in ((0, 1), (0, 8), (3, 2), (2, 1), (2, 4), (START, 1), (START, 3)):
                    for read in (partial(get, store, first, count), partial(patch, store, first)):
                        try:
                            await read()
                        except ZbudfsError:
                            failed += 1
                assert failed == 14
                assert len(await get(store, 1, 4)) == PAGE_SIZE
                # trio releases the result a moment later, and so does the thread
                await until(
                    lambda: not any(isinstance(each, ZbudfsError) for each in gc.get_objects()), "the errors are gone"
                )
            finally:
                gc.enable()

    async def patch(store: PageStore, number: int) -> None:
        await store.requests.write(number * PAGE_SIZE + 10, b"patch")

    run(main)


@trio_test
async def test_a_page_in_that_fails_for_two_at_once(tmp_path: Path) -> None:
    """Readers that wait for a failing read try themselves, and get the error or the page. None hangs."""
    async with backed_store(tmp_path) as (store, backing):
        await written_back(store)
        block = block_of(store, 1)
        async with trio.open_nursery() as nursery:
            backing.fail("read_blocks", about({block}))
            with backing.held("read_blocks") as gate:
                reads = [Task(nursery, lambda: get(store, 1)) for _ in range(3)]
                await held_at(gate)
                await reads[-1].still_waits()
            for read in reads:
                with pytest.raises(BackingError):
                    await read.outcome()
        backing.recover()
        await quiet(store)
        assert await get(store, 1) == page(1, BIG)


# ---- a disk that forgets or lies -------------------------------------------------------------------------------------


class Disk:
    """The bytes of the backing file, which the daemon does not notice."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, block: int) -> bytes:
        """Return a block."""
        with self._path.open("rb") as file:
            file.seek(block * PAGE_SIZE)
            return file.read(PAGE_SIZE)

    def write(self, block: int, content: bytes) -> None:
        """Replace a block, also on the disk."""
        with self._path.open("r+b") as file:
            file.seek(block * PAGE_SIZE)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def flip(content: bytes, at: int) -> bytes:
    """Return a copy with one bit flipped."""
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda block: bytes(PAGE_SIZE),
    "ones": lambda block: b"\xff" * PAGE_SIZE,
    "the handle": lambda block: flip(block, 2),
    "the size in the handle": lambda block: flip(block, 0),
    "the start of the zpage": lambda block: flip(block, 11),
    "the middle of the zpage": lambda block: flip(block, 1500),
    "the last sector": lambda block: block[:-512] + bytes(512),
    "the first sector": lambda block: bytes(512) + block[512:],
    "shifted": lambda block: block[64:] + block[:64],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("noise", [HALF, RAW])
@trio_test
async def test_a_damaged_block(tmp_path: Path, damage: str, noise: int) -> None:
    """Each page of a damaged block is lost or, if the damage is elsewhere in the block, right, and never wrong."""
    async with backed_store(tmp_path) as (store, _):
        await fill(store, 2 * START if noise == HALF else START, noise=noise)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        disk = Disk(tmp_path / "backing")
        cold = [number for number in range(2 * START) if in_block(store, number)][:4]
        victims = [number for number in cold if block_of(store, number) == block_of(store, cold[0])]
        disk.write(block_of(store, cold[0]), DAMAGES[damage](disk.read(block_of(store, cold[0]))))
        lost = 0
        for number in victims * 2:
            try:
                assert await get(store, number) == page(number, noise)
            except PageLost:
                lost += 1
        assert lost >= 2
        assert store.statistics().lost_pages == lost
        for number in set(cold) - set(victims):
            assert await get(store, number) == page(number, noise)
        await quiet(store)
        for number in victims:
            await put(store, number, new(number))
        await intact(store, {number: new(number) for number in victims})


@pytest.mark.parametrize("noise", [HALF, BIG, RAW])
@trio_test
async def test_swapped_blocks(tmp_path: Path, noise: int) -> None:
    """Blocks that changed places hold the pages of others: they are lost, and back as soon as the blocks are."""
    async with backed_store(tmp_path) as (store, _):
        await fill(store, 2 * START if noise == HALF else START, noise=noise)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        disk = Disk(tmp_path / "backing")
        cold = [number for number in range(2 * START) if in_block(store, number)]
        one, two = block_of(store, cold[0]), block_of(store, cold[-1])
        assert one != two
        contents = disk.read(one), disk.read(two)
        for block, content in zip((two, one), contents, strict=True):
            disk.write(block, content)
        for number in (cold[0], cold[-1]):
            with pytest.raises(PageLost):
                await get(store, number)
        for block, content in zip((one, two), contents, strict=True):
            disk.write(block, content)
        await intact(store, {number: page(number, noise) for number in (cold[0], cold[-1])})


@pytest.mark.parametrize("noise", [HALF, BIG, RAW])
@trio_test
async def test_an_old_version_of_a_block(tmp_path: Path, noise: int) -> None:
    """An old block, with the same page at the same place and a right handle and checksum, is lost, and not the old bytes."""
    async with backed_store(tmp_path) as (store, _):
        count = 2 * START if noise == HALF else START
        disk = Disk(tmp_path / "backing")
        await fill(store, count, noise=noise)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        cold = [number for number in range(count) if in_block(store, number)]
        old = {number: (place_of(store, number)[1], disk.read(block_of(store, number))) for number in cold}
        await drop(store, 0, count)
        for number in range(count):
            await put(store, number, new(number, noise))
        await until(lambda: store.statistics().cumul_writeback_frames == 2 * ROUND, "a second round is over")
        await quiet(store)
        tried = 0
        for number in cold:
            if in_block(store, number) and place_of(store, number)[1] == old[number][0]:
                tried += 1
                current = disk.read(block_of(store, number))
                assert current != old[number][1]
                disk.write(block_of(store, number), old[number][1])
                with pytest.raises(PageLost):
                    await get(store, number)
                disk.write(block_of(store, number), current)
        assert tried >= 5
        await intact(store, {number: new(number, noise) for number in range(count)})


@trio_test
async def test_a_write_that_never_reached_the_disk(tmp_path: Path) -> None:
    """A block with its earlier content, since the disk lied, is lost, for pages of each kind."""
    async with backed_store(tmp_path) as (store, _):
        disk = Disk(tmp_path / "backing")
        await fill(store, START, noise=BIG)
        await until(lambda: store.statistics().cumul_writeback_frames == ROUND, "a round is over")
        await quiet(store)
        for number in range(ROUND):
            disk.write(block_of(store, number), bytes(PAGE_SIZE))
        for number in range(ROUND):
            with pytest.raises(PageLost):
                await get(store, number)
        assert await get(store, ROUND, START - ROUND) == pages(START - ROUND, BIG, ROUND)
        await quiet(store)


# ---- a full disk ---------------------------------------------------------------------------------------------------


@trio_test
async def test_a_full_backing_file(tmp_path: Path) -> None:
    """On a full disk a write without a frame fails, all stored pages are there, and a discard makes room."""
    told: list[str] = []
    async with backed_store(tmp_path, nr_pages=4096, log=told.append) as (store, backing):
        backing.fail("make_ready", error=BackingFull)
        stored = await fill_up(store)
        statistics = store.statistics()
        blocks = statistics.backing_ready_bytes // PAGE_SIZE - 1
        assert stored >= blocks + FRAMES - 1
        assert statistics.backing_used_bytes == blocks * PAGE_SIZE
        assert statistics.refused_pool_full == 1
        assert any("full" in text or "as the test wants it" in text for text in told)
        for number in range(stored):
            assert await get(store, number) == page(number, BIG)
        assert await get(store, stored) == ZEROS
        await quiet(store)
        await drop(store, 0, 2)
        await put(store, stored, page(stored, BIG))
        await intact(store, {0: ZEROS, 1: ZEROS, 2: page(2, BIG), stored: page(stored, BIG)})
        backing.recover()
        push(GROW_RETRY_MOST_SECONDS + TICK_SECONDS)
        for number in range(stored + 1, stored + 100):
            await put(store, number, page(number, BIG))
        for number in range(2, stored + 100):
            assert await get(store, number) == page(number, BIG)
        await quiet(store)


@trio_test
async def test_the_file_grows_ahead_of_need(tmp_path: Path) -> None:
    """Blocks are ready before the first writeback, and no block is written that is not ready."""
    async with backed_store(tmp_path, nr_pages=4096) as (store, backing):
        assert store.statistics().backing_ready_bytes >= FRAMES * PAGE_SIZE
        assert not backing.calls_of("write_blocks")
        await fill(store, 3000)
        ready: set[int] = set()
        for call in backing.calls:
            if call.name == "make_ready":
                ready |= {block for segment in call.blocks for block in range(segment * 64, segment * 64 + 64)}
            elif call.name == "write_blocks":
                assert call.blocks <= ready - {0}
        assert len(backing.calls_of("make_ready")) >= 3
        await quiet(store)
        assert await get(store, 0, 3000) == pages(3000, BIG)


@trio_test
async def test_freed_blocks_are_given_back_when_it_is_calm(tmp_path: Path) -> None:
    """Some seconds after a discard, free segments are punched, and the other pages are there."""
    async with backed_store(tmp_path, nr_pages=4096) as (store, backing):
        await fill(store, 3000)
        await quiet(store)
        ready = store.statistics().backing_ready_bytes
        blocks_on_disk = (tmp_path / "backing").stat().st_blocks
        await drop(store, 0, 2900)
        await quiet(store)
        assert not backing.calls_of("punch")
        await calm(store)
        await until(lambda: store.statistics().backing_ready_bytes < ready // 2, "most of the file is given back")
        await until(lambda: (tmp_path / "backing").stat().st_blocks < blocks_on_disk // 2, "the disk has it back")
        await quiet(store)
        assert await get(store, 2900, 100) == pages(100, BIG, 2900)
        await fill(store, 3000)
        assert await get(store, 0, 3000) == pages(3000, BIG)
        await quiet(store)


@trio_test
async def test_sync_reaches_the_disk(tmp_path: Path) -> None:
    """A sync follows the writes that were requested before it, and its error is returned."""
    async with backed_store(tmp_path) as (store, backing):
        await store.requests.sync()
        assert [call.name for call in backing.calls if call.name != "make_ready"] == ["sync"]
        backing.fail("sync")
        with pytest.raises(BackingError):
            await store.requests.sync()
