# SPDX-License-Identifier: MIT
"""The settings of a running store: limits, watermarks, level, writeback, budget, ages, orders; and their adoption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.store.faulty import FaultyBacking
from tests.store.rig import backed_store, get, in_block, in_ram, push, put, quiet, running, trio_test, until
from zbudfs.core.budget import DAY_SECONDS
from zbudfs.core.codec import Codec
from zbudfs.core.errors import PoolFull, Refusal
from zbudfs.core.tunables import NAMES
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.status_area import Field
from zbudfs.store.tuner import Tuner

FRAMES: Final = 64


def noise(page: int) -> bytes:
    """Return a page that does not compress, so that it takes a frame."""
    return random.Random(page).randbytes(PAGE_SIZE)


def text(page: int) -> bytes:
    """Return a page of a bit more than half a frame, so that each is alone in one."""
    return random.Random(page).randbytes(2200).ljust(PAGE_SIZE, b"x")


async def fill(store: PageStore, most: int, cause: Refusal) -> int:
    """Write pages until one is refused for that cause, and return their number."""
    for page in range(most):
        try:
            await put(store, page, noise(page))
        except PoolFull as error:
            assert error.cause is cause  # noqa: PT017
            return page
    raise AssertionError("nothing was refused")


@trio_test
async def test_values_of_a_fresh_store(tmp_path: Path) -> None:
    """A fresh store has the settings of its start."""
    async with backed_store(tmp_path) as (store, _):
        tuner = Tuner(store)
        tuner.resume()
        found = {name: tuner.value(name) for name in NAMES}
        assert found == {
            "pool_limit_bytes": FRAMES * PAGE_SIZE,
            "low_watermark_frames": 16,
            "high_watermark_frames": 32,
            "level": -1,
            "writeback_enabled": 1,
            "writeback_budget_bytes_per_day": 0,
            "age_seconds": 0,
            "trace": 0,
            "writers": 1,
            "writeback": 0,
            "drop_ephemeral": 0,
        }


@trio_test
async def test_a_wrong_value_changes_nothing(tmp_path: Path) -> None:
    """A wrong value changes nothing, not even the status area."""
    async with backed_store(tmp_path) as (store, _):
        tuner = Tuner(store)
        before = [store.memory.status_area.fields[field] for field in Field]
        for name in NAMES:
            values = {other: tuner.value(other) for other in NAMES}
            with pytest.raises(ValueError, match=name):
                tuner.set(name, "nonsense")
            assert {other: tuner.value(other) for other in NAMES} == values
        assert [store.memory.status_area.fields[field] for field in Field] == before


@trio_test
async def test_the_limit_goes_down_and_up(tmp_path: Path) -> None:
    """Frames beyond a lower limit are written back, and a higher limit is used again."""
    backing = FaultyBacking(str(tmp_path / "backing"))
    async with running(PageStore(1024 * PAGE_SIZE, 512, backing, Codec())) as store:
        tuner = Tuner(store)
        for page in range(400):
            await put(store, page, noise(page))
        assert not store.statistics().cumul_writeback_frames
        tuner.set("pool_limit_bytes", "1M")
        await until(lambda: store.statistics().pool_used_bytes <= 1 << 20, "the pool is below its limit")
        await quiet(store)
        assert store.statistics().pool_limit_bytes == store.statistics().pool_limit_set_bytes == 1 << 20
        assert store.statistics().cumul_writeback_frames >= 400 - 256
        tuner.set("pool_limit_bytes", "2M")
        assert store.statistics().pool_limit_bytes == 2 << 20
        for page in range(400):
            assert await get(store, page) == noise(page)
        await quiet(store)


@trio_test
async def test_pressure_does_not_forget_the_limit_that_was_set(tmp_path: Path) -> None:
    """Pressure lowers the limit that was set, and restores that one."""
    backing = FaultyBacking(str(tmp_path / "backing"))
    async with running(PageStore(1024 * PAGE_SIZE, 1024, backing, Codec())) as store:
        Tuner(store).set("pool_limit_bytes", "2M")
        store.reclaimer.pressure()
        assert store.statistics().pool_limit_bytes == (2 << 20) * 7 // 8
        assert Tuner(store).value("pool_limit_bytes") == 2 << 20
        push(60.0)
        await until(lambda: store.statistics().pool_limit_bytes == 2 << 20, "the limit is back")


@trio_test
async def test_watermarks(tmp_path: Path) -> None:
    """The watermarks start and end writeback, and follow the limit again on request."""
    async with backed_store(tmp_path) as (store, _):
        tuner = Tuner(store)
        tuner.set("low_watermark_frames", "1")
        tuner.set("high_watermark_frames", "10")
        for page in range(FRAMES - 1):
            await put(store, page, noise(page))
        await quiet(store)
        assert store.statistics().cumul_writeback_frames == 0  # one free frame is enough now
        await put(store, FRAMES - 1, noise(FRAMES - 1))
        await quiet(store)
        assert store.statistics().cumul_writeback_frames == 10
        tuner.set("high_watermark_frames", "auto")
        tuner.set("low_watermark_frames", "auto")
        await quiet(store)
        assert (tuner.value("low_watermark_frames"), tuner.value("high_watermark_frames")) == (16, 32)


@trio_test
async def test_the_level_of_what_is_stored_from_now_on(tmp_path: Path) -> None:
    """Pages of both levels can be read, and a higher level makes smaller zpages."""
    words = [b"some", b"words", b"come", b"again", b"and", b"others", b"do", b"not"]
    source = random.Random(5)
    page = b" ".join(source.choice(words) for _ in range(2000))[:PAGE_SIZE]

    async with backed_store(tmp_path) as (store, _):
        await put(store, 0, page)
        fast = store.statistics().compressed_bytes
        Tuner(store).set("level", "19")
        await put(store, 1, page)
        assert store.statistics().compressed_bytes - fast < fast
        assert store.statistics().level == 19
        assert await get(store, 0, 2) == page * 2


@trio_test
async def test_writeback_that_is_off(tmp_path: Path) -> None:
    """Nothing is written by itself, writes beyond the pool are refused for that cause, and an order still works."""
    async with backed_store(tmp_path) as (store, _):
        tuner = Tuner(store)
        tuner.set("writeback_enabled", "0")
        for page in range(FRAMES):
            await put(store, page, noise(page))
        await quiet(store)
        with pytest.raises(PoolFull) as caught:
            await put(store, FRAMES, noise(FRAMES))
        assert caught.value.cause is Refusal.WRITEBACK_OFF
        assert store.statistics().refused_writeback_off == store.statistics().refused_pool_full == 1
        assert store.statistics().cumul_writeback_frames == 0
        tuner.set("writeback", "10")
        await until(lambda: not tuner.value("writeback"), "the order is done")
        await quiet(store)
        assert store.statistics().cumul_writeback_frames == 10
        tuner.set("writeback_enabled", "1")
        for page in range(FRAMES, 2 * FRAMES):
            await put(store, page, noise(page))
        for page in range(2 * FRAMES):
            assert await get(store, page) == noise(page)
        await quiet(store)


@trio_test
async def test_everything_is_written_back_on_order(tmp_path: Path) -> None:
    """All frames go out, whatever the watermarks. Then the copies that were read back are dropped on order."""
    async with backed_store(tmp_path) as (store, _):
        tuner = Tuner(store)
        for page in range(20):
            await put(store, page, text(page) if page % 2 else noise(page))
        tuner.set("writeback", "all")
        await until(lambda: all(in_block(store, page) for page in range(20)), "all of it is on disk")
        await quiet(store)
        assert tuner.value("writeback") == 0
        for page in range(5):
            assert await get(store, page) == (text(page) if page % 2 else noise(page))
        assert tuner.value("drop_ephemeral") == 5
        assert store.statistics().cumul_refault_blocks == 5
        tuner.set("drop_ephemeral", "1")
        await until(lambda: not tuner.value("drop_ephemeral"), "they are dropped")
        await quiet(store)
        assert store.statistics().pool_used_bytes == 0
        assert store.statistics().cumul_dropped_frames == 5


@trio_test
async def test_an_order_ends_where_the_disk_fails(tmp_path: Path) -> None:
    """The order ends, and the frames stay."""
    async with backed_store(tmp_path) as (store, backing):
        tuner = Tuner(store)
        for page in range(10):
            await put(store, page, noise(page))
        backing.fail("write_blocks")
        tuner.set("writeback", "all")
        await until(lambda: not tuner.value("writeback"), "the order is given up")
        await quiet(store)
        assert store.statistics().writeback_failures == 1
        assert all(in_ram(store, page) for page in range(10))


@trio_test
async def test_frames_go_when_they_are_old(tmp_path: Path) -> None:
    """Frames without a new page for that time go out, younger ones stay, and raw frames wait as well."""
    async with backed_store(tmp_path) as (store, _):
        tuner = Tuner(store)
        for page in range(5):
            await put(store, page, text(page))
        push(100.0)
        await until(lambda: store.statistics().coldest_age_seconds >= 90, "time has passed")
        for page in range(5, 10):
            await put(store, page, text(page))
        await put(store, 10, noise(10))  # raw: at the old end, and new
        tuner.set("age_seconds", "50")
        await until(lambda: in_block(store, 4), "the old ones are gone")
        await quiet(store)
        assert [in_block(store, page) for page in range(11)] == [True] * 5 + [False] * 6
        assert store.statistics().cumul_aged_frames == 5
        push(100.0)
        await until(lambda: all(in_block(store, page) for page in range(11)), "the others are old now")
        await quiet(store)
        assert store.statistics().pool_used_bytes == 0


@trio_test
async def test_the_budget_is_kept(tmp_path: Path) -> None:
    """Exactly the budget is written. Then writes are refused for that cause, until it is refilled."""
    async with backed_store(tmp_path, nr_pages=4096, nr_frames=128) as (store, _):
        tuner = Tuner(store)
        tuner.set("writeback_budget_bytes_per_day", "1M")
        written = await fill(store, 4096, Refusal.BUDGET)
        await quiet(store)
        found = store.statistics()
        out = found.cumul_writeback_bytes
        assert 512 << 10 <= out <= 1 << 20
        assert found.writeback_budget_used_bytes + found.writeback_budget_left_bytes == 1 << 20
        assert found.writeback_budget_left_bytes < 64 * PAGE_SIZE  # a batch
        assert found.writeback_budget_full_in_seconds > DAY_SECONDS // 2
        assert store.statistics().refused_budget == 1
        for page in range(written):
            assert await get(store, page) == noise(page)
        push(DAY_SECONDS / 2)
        await until(lambda: store.statistics().writeback_budget_left_bytes > 400 << 10, "the budget is refilled")
        await put(store, written, noise(written))
        await until(lambda: store.statistics().cumul_writeback_bytes > out, "it goes on")
        await quiet(store)


@trio_test
async def test_settings_are_adopted() -> None:
    """Another worker on the same memory has all settings, and the rest of the budget."""
    memory = StoreMemory(256 * PAGE_SIZE, 512, backed=False)
    memory.populate()

    store = PageStore(256 * PAGE_SIZE, 512, None, Codec(), memory)
    store.recover()
    tuner = Tuner(store)
    for name, text_ in (("pool_limit_bytes", "1M"), ("low_watermark_frames", "3"), ("level", "-5")):
        tuner.set(name, text_)
    tuner.set("high_watermark_frames", "7")
    tuner.save()
    mine = {name: tuner.value(name) for name in NAMES}
    assert (mine["pool_limit_bytes"], mine["level"], mine["high_watermark_frames"]) == (1 << 20, -5, 7)
    other = PageStore(256 * PAGE_SIZE, 512, None, Codec(), memory)
    follower = Tuner(other)
    follower.resume_level()
    assert other.requests.codec.level == -5
    other.recover()
    follower.resume()
    assert {name: follower.value(name) for name in NAMES} == mine
    await trio.lowlevel.checkpoint()


@trio_test
async def test_a_budget_is_adopted_as_it_was_left(tmp_path: Path) -> None:
    """A crash refills nothing."""
    async with backed_store(tmp_path) as (store, _):
        tuner = Tuner(store)
        tuner.set("writeback_budget_bytes_per_day", "8M")
        store.reclaimer.budget.spend(5 << 20, trio.current_time())
        tuner.save()
        store.reclaimer.budget.set(0, trio.current_time())
        tuner.resume()
        assert tuner.value("writeback_budget_bytes_per_day") == 8 << 20
        assert (3 << 20) <= store.reclaimer.budget.left_bytes(trio.current_time()) < (3 << 20) + 4096


@trio_test
async def test_counters_continue() -> None:
    """The next worker continues each number that only grows, including those of the allocator."""
    memory = StoreMemory(256 * PAGE_SIZE, 64, backed=False)
    memory.populate()

    def growing(store: PageStore) -> dict[str, int]:
        found = {**store.statistics().by_name(), **store.zbud_counters()}
        return {
            name: number
            for name, number in found.items()
            if name.startswith(("cumul_", "refused_", "lost_", "pressure_")) or "_cumul_" in name or "evicted" in name
        }

    store = PageStore(256 * PAGE_SIZE, 64, None, Codec(), memory)
    store.recover()
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await fill(store, 256, Refusal.NO_BACKING)
        await store.requests.discard(0, 5 * PAGE_SIZE)
        await put(store, 3, text(3))
        await get(store, 0, 20)
        store.state.counters.pressure_reports += 1
        nursery.cancel_scope.cancel()
    before = growing(store)
    assert before["cumul_written_pages"] == before["cumul_raw_pages"] + 1 == 65
    assert (before["refused_no_backing"], before["pressure_reports"], before["pers_cumul_zpages"]) == (1, 1, 1)
    other = PageStore(256 * PAGE_SIZE, 64, None, Codec(), memory)
    other.recover()
    assert growing(other) == before
