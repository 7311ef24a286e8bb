# SPDX-License-Identifier: MIT
"""The pool's memory is there before it is needed, goes when it is not, and is less while the system is short."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.core.samples import BIG, RAW, page, pages
from tests.store.faulty import FaultyBacking
from tests.store.rig import backed_store, calm, drop, get, push, put, quiet, running, trio_test, until
from tests.store.test_writeback import fill_up
from zbudfs.core.codec import Codec, page_of_word
from zbudfs.core.errors import PoolFull
from zbudfs.core.reclaim import TICK_SECONDS, PressureGovernor
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.arena import punch_hole
from zbudfs.store.growth import GROW_RETRY_MOST_SECONDS, GROW_RETRY_SECONDS
from zbudfs.store.page_store import PageStore
from zbudfs.store.pool import ACTIVE_RESERVE_FRAMES, POPULATE_FRAMES, RESERVE_FRAMES


def memory_of(store: PageStore) -> int:
    """Return the populated bytes of the pool's frames."""
    return store.memory.frames.resident_bytes


def limit_of(store: PageStore) -> int:
    """Return the limit in force, in frames."""
    return store.statistics().pool_limit_bytes // PAGE_SIZE


def used_by(store: PageStore) -> int:
    """Return the number of frames in use."""
    return store.statistics().pool_used_bytes // PAGE_SIZE


# ---- populating and releasing ----------------------------------------------------------------------------------------


@trio_test
async def test_the_reserve_is_there_at_the_start() -> None:
    """A store that has started has its reserve of ready frames, and no more."""
    store = PageStore(64 << 20, 4 * RESERVE_FRAMES, None, Codec())
    async with running(store):
        assert store.statistics().pool_ready_bytes == RESERVE_FRAMES * PAGE_SIZE
        assert RESERVE_FRAMES * PAGE_SIZE <= memory_of(store) <= (RESERVE_FRAMES + 64) * PAGE_SIZE


@trio_test
async def test_memory_is_populated_ahead_of_need_and_given_back() -> None:
    """More frames are populated as some are used. Some calm seconds after they are freed, only a reserve is left."""
    frames = 6 * RESERVE_FRAMES

    store = PageStore(64 << 20, frames, None, Codec())
    async with running(store):
        used = 4 * RESERVE_FRAMES
        for number in range(0, used, 64):
            await put(store, number, page(number, RAW) * 64)
        more = min(ACTIVE_RESERVE_FRAMES, frames - used)
        await until(lambda: store.statistics().pool_ready_bytes == more * PAGE_SIZE, "the reserve is full")
        assert used_by(store) == used
        assert memory_of(store) >= (used + more) * PAGE_SIZE
        await drop(store, 0, used)
        assert used_by(store) == 0
        await calm(store)
        kept = RESERVE_FRAMES + POPULATE_FRAMES
        await until(lambda: memory_of(store) <= (kept + 64) * PAGE_SIZE, "the surplus is given back")
        await quiet(store)
        assert RESERVE_FRAMES * PAGE_SIZE <= store.statistics().pool_ready_bytes <= kept * PAGE_SIZE
        for number in range(0, used, 64):
            await put(store, number, page(number + 1, RAW) * 64)
        for number in range(0, used, 64):
            assert await get(store, number) == page(number + 1, RAW)
        await quiet(store)


@trio_test
async def test_a_writer_that_is_faster_than_memory_waits_for_it() -> None:
    """A burst beyond the reserve waits for memory, and is not refused while the limit allows it."""
    frames = 3 * RESERVE_FRAMES
    store = PageStore(64 << 20, frames, None, Codec())
    async with running(store):
        content = b"".join(page(number, RAW) for number in range(16)) * (frames // 16)
        await store.requests.write(0, content)
        assert used_by(store) == frames
        assert store.statistics().refused_pool_full == 0
        assert await store.requests.read(0, len(content)) == content
        with pytest.raises(PoolFull):
            await put(store, frames + 1, page(1, RAW))
        await quiet(store)


@pytest.mark.race(13)
@trio_test
async def test_a_write_is_not_refused_while_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst during a slow release of surplus memory waits for new memory."""
    gate, held = threading.Event(), threading.Event()

    def slow_punch_hole(fd: int, offset: int, length: int) -> None:
        held.set()
        assert gate.wait(30)
        punch_hole(fd, offset, length)

    frames = 6 * RESERVE_FRAMES
    store = PageStore(64 << 20, frames, None, Codec())
    async with running(store):
        for number in range(0, 4 * RESERVE_FRAMES, 64):
            await put(store, number, page(number, RAW) * 64)
        await drop(store, 0, 4 * RESERVE_FRAMES)
        monkeypatch.setattr("zbudfs.store.arena.punch_hole", slow_punch_hole)
        await calm(store)
        await until(held.is_set, "memory is being given back")
        content = b"".join(page(number, RAW) for number in range(16)) * (frames // 16)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.requests.write, 0, content)
                await trio.testing.wait_all_tasks_blocked()
                assert used_by(store) < frames
                gate.set()
        finally:
            gate.set()
        assert store.statistics().refused_pool_full == 0
        assert await store.requests.read(0, len(content)) == content
        monkeypatch.undo()
        await quiet(store)


# ---- pressure ---------------------------------------------------------------------------------------------------------


@trio_test
async def test_pressure_lowers_the_limit_and_it_recovers(tmp_path: Path) -> None:
    """Each report lowers the limit, frames beyond it are written back, and calm times raise it step by step."""
    told: list[str] = []
    async with backed_store(tmp_path, nr_pages=2048, nr_frames=800, log=told.append) as (store, _):
        for number in range(700):
            await put(store, number, page(number, BIG))
        await quiet(store)
        assert used_by(store) == 700
        store.reclaimer.pressure()
        assert limit_of(store) == 700
        for expected in (613, 537, 470):
            store.reclaimer.pressure()
            assert limit_of(store) == expected
        await until(lambda: used_by(store) < 470, "the pool is below its limit")
        for _ in range(20):
            store.reclaimer.pressure()
        assert limit_of(store) == 200
        assert store.statistics().pressure_reports == 24
        assert store.statistics().pool_configured_bytes == 800 * PAGE_SIZE
        await until(lambda: used_by(store) < 200, "the pool is below its limit")
        await quiet(store)
        assert [text for text in told if "memory pressure" in text] == told[:1]  # of 24 reports
        for number in range(700):
            assert await get(store, number) == page(number, BIG)
        assert used_by(store) <= 200
        for expected in (300, 400, 500, 600, 700, 800):
            push(PressureGovernor.CALM_SECONDS)
            await until(lambda expected=expected: limit_of(store) == expected, f"the limit is {expected}")  # type: ignore[misc]
        push(PressureGovernor.CALM_SECONDS)
        await trio.sleep(0.01)
        assert limit_of(store) == 800
        assert told.count("memory pressure is over: the pool has its whole limit again") == 1
        for number in range(1000, 1600):
            await put(store, number, page(number, BIG))
        assert used_by(store) > 500
        for number in [*range(700), *range(1000, 1600)]:
            assert await get(store, number) == page(number, BIG)
        await quiet(store)


@pytest.mark.race(14)
@trio_test
async def test_the_limit_holds_while_it_is_lowered(tmp_path: Path) -> None:
    """Below a lowered limit no frame is taken: a write waits for writeback, and is not refused."""
    async with backed_store(tmp_path, nr_pages=1024, nr_frames=400) as (store, backing):
        for number in range(300):
            await put(store, number, page(number, BIG))
        await quiet(store)
        with backing.held("write_blocks") as gate:
            for _ in range(20):
                store.reclaimer.pressure()
            assert limit_of(store) == 100
            async with trio.open_nursery() as nursery:
                nursery.start_soon(put, store, 500, page(500, BIG))
                await until(lambda: bool(gate.held), "the writeback has begun")
                await trio.testing.wait_all_tasks_blocked()
                assert await get(store, 500) == bytes(PAGE_SIZE)
                assert used_by(store) == 300
                gate.open()
        assert await get(store, 500) == page(500, BIG)
        await quiet(store)
        assert used_by(store) <= 100
        assert store.statistics().refused_pool_full == 0
        for number in range(300):
            assert await get(store, number) == page(number, BIG)
        await quiet(store)


@trio_test
async def test_pressure_gives_memory_back(tmp_path: Path) -> None:
    """Memory beyond the limit is returned to the system when it is calm, except for a small part."""
    frames = 6 * RESERVE_FRAMES

    async with backed_store(tmp_path, nr_pages=frames, nr_frames=frames) as (store, _):
        for number in range(0, 5 * RESERVE_FRAMES, 64):
            await put(store, number, page(number, RAW) * 64)
        await until(lambda: store.statistics().pool_ready_bytes > 0, "some frames are ready")
        full = memory_of(store)
        for _ in range(20):
            store.reclaimer.pressure()
        await until(lambda: used_by(store) < frames // 4, "the pool is below its limit")
        await quiet(store)
        await calm(store)
        await until(lambda: memory_of(store) < full // 2, "memory is given back")
        for number in range(0, 5 * RESERVE_FRAMES, 64):
            assert await get(store, number) == page(number, RAW)
        await quiet(store)


@trio_test
async def test_pressure_without_a_backing_file() -> None:
    """Without a backing file pages cannot go anywhere, so the limit stays."""
    store = PageStore(1 << 20, 64, None, Codec())
    async with running(store):
        store.reclaimer.pressure()
        assert limit_of(store) == 64
        assert store.statistics().pressure_reports == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
@trio_test
async def test_a_limit_of_a_few_frames(tmp_path: Path, limit: int) -> None:
    """With any limit each write succeeds as long as the disk accepts pages, and no task spins or hangs."""
    async with backed_store(tmp_path, nr_frames=16) as (store, _):
        store.reclaimer.limit.governor = PressureGovernor(limit)
        store.reclaimer.set_limit(limit)
        for number in range(60):
            await put(store, number, page(number, BIG))
            assert used_by(store) <= limit
        await store.requests.write(3 * PAGE_SIZE + 9, b"patch")
        assert await get(store, 0, 3) == pages(3, BIG)
        assert (await get(store, 3))[:20] == page(3, BIG)[:9] + b"patch" + page(3, BIG)[14:20]
        await quiet(store)


@pytest.mark.parametrize("limit", [1, 2, 3])
@trio_test
async def test_a_limit_of_a_few_frames_without_a_backing_file(limit: int) -> None:
    """Without writeback the write is refused, and does not wait for ever."""
    store = PageStore(1 << 20, 16, None, Codec())
    async with running(store):
        store.reclaimer.limit.governor = PressureGovernor(limit)
        store.reclaimer.set_limit(limit)
        for number in range(limit):
            await put(store, number, page(number, BIG))
        for _ in range(3):
            with pytest.raises(PoolFull):
                await put(store, 50, page(50, BIG))
        await put(store, 51, page_of_word(1))
        assert await get(store, 0, limit) == pages(limit, BIG)
        await quiet(store)


# ---- the disk -----------------------------------------------------------------------------------------------------------


@trio_test
async def test_a_disk_that_cannot_grow_is_tried_again(tmp_path: Path) -> None:
    """The log reports when growth fails and when it works again. The tries become rarer, and the file grows again."""
    told: list[str] = []
    backing = FaultyBacking(str(tmp_path / "backing"))
    store = PageStore(16 << 20, 64, backing, Codec(), log=told.append)
    backing.fail("make_ready")
    async with running(store):
        assert store.statistics().backing_ready_bytes == 0
        growth = store.reclaimer._growth
        assert growth is not None
        for back_off in (GROW_RETRY_SECONDS, 2 * GROW_RETRY_SECONDS, 4 * GROW_RETRY_SECONDS):
            await until(lambda: growth._grow_at > trio.current_time(), "the failure is seen")
            tries = len(backing.calls_of("make_ready"))
            assert backing.calls_of("make_ready")[-1].count == 1
            push(back_off - 2 * TICK_SECONDS)
            await trio.testing.wait_all_tasks_blocked()
            assert len(backing.calls_of("make_ready")) == tries
            push(3 * TICK_SECONDS)
            await until(lambda tries=tries: len(backing.calls_of("make_ready")) > tries, "another try")  # type: ignore[misc]
        assert len(told) == 1
        backing.recover()
        push(GROW_RETRY_MOST_SECONDS + TICK_SECONDS)
        await until(lambda: store.statistics().backing_ready_bytes > 0, "the file has grown")
        assert "grows again" in told[-1]
        for number in range(500):
            await put(store, number, page(number, BIG))
        assert await get(store, 0, 500) == pages(500, BIG)
        await quiet(store)


@trio_test
async def test_sync_without_a_backing_file() -> None:
    """There is nothing to do, but the call is a checkpoint."""
    store = PageStore(1 << 20, 16, None, Codec())
    async with running(store):
        with trio.testing.assert_checkpoints():
            await store.requests.sync()


class SmallDisk(FaultyBacking):
    """A backing with few segments that returns room four segments at a time."""

    @property
    def nr_segments(self) -> int:
        """Return 16 segments: 4 MiB."""
        return 16

    @property
    def trim_segments(self) -> int:
        """Return 1 MiB."""
        return 4


@trio_test
async def test_a_disk_that_is_smaller_than_the_device(tmp_path: Path) -> None:
    """The log reports once that it is full, no page is lost, and freed blocks are used."""
    told: list[str] = []
    backing = SmallDisk(str(tmp_path / "backing"))
    store = PageStore(16 << 20, 64, backing, Codec(), log=told.append)
    async with running(store):
        stored = await fill_up(store)
        assert 1023 <= stored < 1200
        assert max(max(call.blocks) for call in backing.calls_of("make_ready")) == 15
        assert len([text for text in told if "is full: all of its 4 MiB are in use" in text]) == 1
        assert store.statistics().backing_full == 1
        assert any("is full" in text for text in store.reclaimer.warnings())
        for number in range(stored):
            assert await get(store, number) == page(number, BIG)
        await drop(store, 0, 900)
        for number in range(3000, 3500):
            await put(store, number, page(number, BIG))
        for number in [*range(900, stored), *range(3000, 3500)]:
            assert await get(store, number) == page(number, BIG)
        await quiet(store)
        push(2 * TICK_SECONDS)
        await until(lambda: store.statistics().backing_full == 0, "free blocks are noticed")
        assert "has free blocks again" in told[-1]


@trio_test
async def test_room_is_given_back_in_large_pieces(tmp_path: Path) -> None:
    """If four segments are one granule, all four or none are released, and a used one is made ready again."""
    backing = SmallDisk(str(tmp_path / "backing"))
    store = PageStore(16 << 20, 64, backing, Codec())
    async with running(store):
        for number in range(1000):
            await put(store, number, page(number, BIG))
        await quiet(store)
        await drop(store, 0, 1000)
        await calm(store)
        await until(lambda: len(backing.calls_of("punch")) >= 1, "some of it is given back")
        assert {(call.first % 4, call.count) for call in backing.calls_of("punch")} == {(0, 4)}
        await quiet(store)
        for number in range(1000):
            await put(store, number, page(number, BIG))
        for number in range(1000):
            assert await get(store, number) == page(number, BIG)
        await quiet(store)
