# SPDX-License-Identifier: MIT
"""Refusals of an old kernel, an odd file system or a bug in a thread are reported, and leave nothing half done.

The tests replace system calls, since no system at hand refuses them on request. tests/fuse has disks that really fail.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing

from tests.core.samples import BIG, RAW, page
from tests.store.faulty import FaultyBacking
from tests.store.rig import (
    LIMIT_SECONDS,
    backed_store,
    drop,
    forge_handle,
    get,
    in_block,
    let_go,
    push,
    put,
    quiet,
    running,
    trio_test,
    until,
)
from zbudfs.core.codec import Codec
from zbudfs.core.errors import BackingError, PageLost, PoolFull, Refusal
from zbudfs.core.reclaim import CALM_SECONDS, REFUSE_SECONDS, STALL_SECONDS, PressureGovernor
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store import arena as arena_module
from zbudfs.store import cgroup_limit, cipher, pressure
from zbudfs.store.arena import Arena
from zbudfs.store.backing import Backing
from zbudfs.store.cipher import KEY_BYTES, BlockCipher, LibraryXts, best_xts
from zbudfs.store.frame_memory import REFUSED_SECONDS
from zbudfs.store.growth import GROW_RETRY_MOST_SECONDS
from zbudfs.store.iothread import IoThread
from zbudfs.store.page_store import PageStore
from zbudfs.store.pressure import PressureMonitor
from zbudfs.store.tuner import Tuner


def refuse(*_: object, **__: object) -> NoReturn:
    """Refuse a system call."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def have_a_bug(*_: object, **__: object) -> NoReturn:
    """Raise an unexpected error."""
    raise RuntimeError("a bug")


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_populated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.14 memory is allocated in another way. If that is refused too, it is a MemoryError."""

    class OldKernel:
        fallocate = arena_module._libc.fallocate

        def madvise(self, *_: object) -> int:
            return -1

    arena = Arena("old", 1 << 20)
    try:
        monkeypatch.setattr(arena_module, "_libc", OldKernel())
        arena.populate(0, 1 << 16)
        assert bytes(arena.view[: 1 << 16]) == bytes(1 << 16)
        monkeypatch.setattr(arena_module, "fallocate", refuse)
        with pytest.raises(MemoryError, match="no memory for 65536 bytes: Operation not supported"):
            arena.populate(1 << 16, 1 << 16)
    finally:
        monkeypatch.undo()
        arena.release(0, arena.size)


def test_a_cgroup_that_says_nothing_of_its_page_cache(tmp_path: Path) -> None:
    """Without that number, no page cache counts as free room."""
    assert cgroup_limit._number_after(b"inactive_file ", b"anon 5\nfile 7\n") == 0
    (tmp_path / "memory.max").write_text("5")
    room = cgroup_limit.CgroupLimit(str(tmp_path))
    room._open(str(tmp_path), 2)  # memory.current is missing
    assert room.available_bytes() == cgroup_limit.UNLIMITED


@trio_test
async def test_a_populating_thread_with_a_bug() -> None:
    """The frames that were to be populated are still frames."""
    store = PageStore(1 << 20, 64, None, Codec())
    store.state.pool.populate = have_a_bug  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, ExceptionGroup)):
        await store.run()
    try:
        assert store.state.pool.take_bare() != []
    finally:
        store.close()
        let_go(store.memory)


@trio_test
async def test_refused_memory_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store asks again and again. The log reports the start, and `warnings` has it as long as it lasts."""
    told: list[str] = []
    store = PageStore(1 << 20, 64, None, Codec(), log=told.append)
    asked = 0

    def no_memory(_: object) -> NoReturn:
        nonlocal asked
        asked += 1
        raise MemoryError("no memory for 5 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(store.state.pool, "populate", no_memory)
        async with running(store):
            for wanted in (2, 3):
                push(REFUSED_SECONDS + 1)
                await until(lambda wanted=wanted: asked >= wanted, "memory is asked for again")  # type: ignore[misc]
            assert told == ["the pool cannot grow: no memory for 5 bytes"]
            assert store.reclaimer.warnings() == [
                "no memory for 5 bytes: the pool cannot grow to its limit; free memory, or raise the memory limit of its cgroup"
            ]
            patch.undo()
            push(REFUSED_SECONDS + 1)
            await put(store, 0, page(0, BIG))
            assert store.reclaimer.warnings() == []


def test_pressure_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A trigger with short memory calls the report in the trio thread, but not after the end of the monitor."""
    if not os.access(pressure.PSI_PATH, os.W_OK):
        pytest.skip(f"needs {pressure.PSI_PATH}")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 1 kB\n")
    fired = threading.Event()

    class Poll:
        """A poll that always says that the trigger has fired."""

        def register(self, fd: int, mask: int) -> None:
            self.last = fd

        def poll(self) -> list[tuple[int, int]]:
            fired.wait(LIMIT_SECONDS)
            return []

    async def main() -> PressureMonitor:
        reports: list[bool] = []
        monitor = PressureMonitor(lambda: reports.append(trio.lowlevel.in_trio_run()), meminfo_path=str(meminfo))
        fired.set()
        await until(lambda: len(reports) > 2, "a report")
        assert all(reports)
        meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 900 kB\n")
        fired.clear()
        await trio.testing.wait_all_tasks_blocked()
        fired.set()
        meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 1 kB\n")
        return monitor

    try:
        with monkeypatch.context() as patch:
            patch.setattr(select, "poll", Poll)
            monitor = trio.run(main)
    except OSError as error:
        pytest.skip(f"needs a PSI trigger: {error.strerror}")
    monitor._thread.join(LIMIT_SECONDS)
    assert not monitor._thread.is_alive(), "it ends when there is nobody to report to"
    monitor.close()


@trio_test
async def test_a_trace_for_which_there_is_no_memory() -> None:
    """The trace is not on, and the next order tries again."""
    store = PageStore(1 << 20, 64, None, Codec())
    helper = IoThread[None]("helper")
    async with running(store), trio.open_nursery() as nursery:
        nursery.start_soon(store.tracer.run, helper)
        tuner = Tuner(store)
        populate = store.tracer._ring.populate
        asked: list[int] = []

        def no_memory() -> NoReturn:
            asked.append(1)
            raise MemoryError

        store.tracer._ring.populate = no_memory  # type: ignore[method-assign]
        tuner.set("trace", "1")
        await until(lambda: bool(asked), "the order is seen")
        await trio.testing.wait_all_tasks_blocked()
        assert tuner.value("trace") == 0
        store.tracer._ring.populate = populate  # type: ignore[method-assign]
        tuner.set("trace", "1")
        await until(lambda: tuner.value("trace") == 1, "the trace is on")
        push(1)
        await trio.testing.wait_all_tasks_blocked()
        assert tuner.value("trace") == 1, "unread, but not for long"
        tuner.set("trace", "0")
        await until(lambda: tuner.value("trace") == 0, "the trace is off")
        nursery.cancel_scope.cancel()
    helper.close()


# ---- the cipher -----------------------------------------------------------------------------------------------------


def test_without_the_systems_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's cipher is used."""
    monkeypatch.setitem(sys.modules, "zbudfs.store._cipher", None)
    assert isinstance(best_xts(os.urandom(KEY_BYTES)), LibraryXts)


def test_a_cipher_that_does_not_give_back_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a cipher is not used at all."""

    class Broken(LibraryXts):
        def decrypt(self, number: int, pieces: object, /) -> None:
            pass

    monkeypatch.setattr(cipher, "best_xts", Broken)
    with pytest.raises(MemoryError, match="this memory is faulty"):
        BlockCipher(os.urandom(KEY_BYTES))


# ---- the backing file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call", "reason"),
    [
        ("fdatasync", lambda backing, frame: backing.sync(), "synced: Operation not supported"),
        ("pwritev", lambda backing, frame: backing.write_blocks(1, [frame]), "written: Operation not supported"),
        ("preadv", lambda backing, frame: backing.read_blocks(1, [frame]), "read: Operation not supported"),
        ("pwritev", lambda backing, frame: backing.make_ready(0, 1), "grown: Operation not supported"),
        ("pwritev", lambda backing, frame: backing.make_ready(1, 1), "grown: Operation not supported"),
    ],
)
def test_calls_that_are_refused(
    name: str,
    call: Callable[[Backing, memoryview], None],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each refused call is an error that names the operation, and the file continues to work."""
    backing = Backing(str(tmp_path / "backing"))
    arena = Arena("frames", 1 << 20)
    frame = arena.view[:PAGE_SIZE]
    try:
        backing.make_ready(0, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(BackingError, match=reason):
                call(backing, frame)
        call(backing, frame)
        backing.warm_up()  # nothing to do without a cipher
        backing.encrypt(BlockCipher(os.urandom(KEY_BYTES)), arena.view[PAGE_SIZE : 2 * PAGE_SIZE])
        backing.warm_up()
    finally:
        frame.release()
        backing.close()


@pytest.mark.parametrize("given", [0, 100])
def test_a_file_that_takes_and_gives_odd_amounts(given: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, or half a sector, is an error, since no block device does that."""
    backing = Backing(str(tmp_path / "backing"))
    frame = memoryview(bytearray(PAGE_SIZE))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *_: given)
            patch.setattr(os, "preadv", lambda *_: given)
            with pytest.raises(BackingError, match=f"accepted {given} bytes of 4096"):
                backing.write_blocks(1, [frame])
            with pytest.raises(BackingError, match=f"returned {given} bytes of 4096"):
                backing.read_blocks(1, [frame])
            if not given:
                with pytest.raises(BackingError, match="cannot be grown: Input/output error"):
                    backing.make_ready(0, 1)
    finally:
        backing.close()


def test_a_file_that_cannot_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file is not opened, and no descriptor stays open."""
    path = tmp_path / "backing"
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BackingError, match="cannot be prepared: Operation not supported"):
        Backing(str(path))
    monkeypatch.undo()
    Backing(str(path)).close()  # the lock is free


@trio_test
async def test_a_file_system_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that cannot be punched keeps its room, and is used again."""
    async with backed_store(tmp_path, nr_pages=2048) as (store, backing):
        for number in range(1500):
            await put(store, number, page(number, BIG))
        ready = store.statistics().backing_ready_bytes
        await drop(store, 0, 1500)
        backing.fail("punch")
        push(CALM_SECONDS + 2)
        await until(lambda: bool(backing.calls_of("punch")), "a hole is tried")
        await quiet(store)
        assert store.statistics().backing_ready_bytes == ready
        for number in range(1500):
            await put(store, number, page(number, BIG))
        await quiet(store)


@trio_test
async def test_a_file_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning says so. A changed file is logged once for each change, and warned of all the time."""
    told: list[str] = []
    async with backed_store(tmp_path, log=told.append) as (store, backing):
        for number in range(300):
            await put(store, number, page(number, BIG))
        await quiet(store)
        Path(backing.path).unlink()
        os.truncate(f"/proc/self/fd/{backing._fd}", PAGE_SIZE)
        push(1.5)
        for words in ("has been deleted", "has been truncated"):
            await until(lambda words=words: words in " ".join(store.reclaimer.warnings()), "a warning")  # type: ignore[misc]
        lines = len(told)
        looks: list[list[str]] = []
        look = backing.damage

        def look_again() -> list[str]:
            looks.append(look())
            return looks[-1]

        monkeypatch.setattr(backing, "damage", look_again)
        push(1.5)
        await until(lambda: bool(looks), "another look")
        await trio.testing.wait_all_tasks_blocked()
        assert len(looks[-1]) == 2
        assert len(told) == lines
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", refuse)
            assert backing.damage() == [
                f"the backing file {backing.path} cannot be examined: Operation not supported; look at its disk (dmesg)"
            ]


@trio_test
async def test_a_disk_in_trouble_is_warned_of(tmp_path: Path) -> None:
    """`warnings` name a disk that takes nothing, cannot grow, or does not answer."""
    async with backed_store(tmp_path) as (store, backing):
        warnings = store.reclaimer.warnings
        backing.fail("write_blocks")
        for number in range(60):
            await put(store, number, page(number, BIG))
        await until(lambda: any("pages stay in RAM while there is room" in text for text in warnings()), "a warning")
        backing.recover()
        push(2)
        await until(lambda: not warnings(), "the disk is well")
        with backing.held("write_blocks") as gate:
            for number in range(100, 110):
                await put(store, number, page(number, BIG))
            store.reclaimer.writeback.order(5)
            await until(lambda: bool(gate.held), "a write is under way")
            push(STALL_SECONDS + 1)
            assert any("writes wait once RAM is used up" in text for text in warnings())
            push(REFUSE_SECONDS)
            assert any("writes fail once RAM is used up" in text for text in warnings())
        await quiet(store)
        assert warnings() == []


@trio_test
async def test_a_file_that_cannot_grow_is_warned_of(tmp_path: Path) -> None:
    """The ready part of the file is used meanwhile."""
    backing = FaultyBacking(str(tmp_path / "backing"))
    store = PageStore(16 << 20, 64, backing, Codec())
    backing.fail("make_ready")
    async with running(store):
        assert any(
            "the part that is ready is used, then pages stay in RAM" in text for text in store.reclaimer.warnings()
        )
        for number in range(40):
            await put(store, number, page(number, BIG))
        store.reclaimer.writeback.order(5)
        await until(lambda: store.reclaimer.writeback.ordered_frames == 0, "the order has ended: there is no block")
        backing.recover()
        push(GROW_RETRY_MOST_SECONDS)
        store.reclaimer.writeback.order(5)
        await until(lambda: store.statistics().written_back_pages > 0, "it is written when blocks come")


@pytest.mark.parametrize("name", ["write_blocks", "make_ready"])
@trio_test
async def test_a_writing_thread_with_a_bug(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon ends, and its successor finds no half written frame and no lost segment."""
    backing = FaultyBacking(str(tmp_path / "backing"))
    store = PageStore(16 << 20, 64, backing, Codec())
    assert store.state.blocks is not None
    holes = store.state.blocks.holes
    monkeypatch.setattr(backing, name, have_a_bug)
    with pytest.raises((RuntimeError, ExceptionGroup)):  # noqa: PT012
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            for number in range(60):
                await put(store, number, page(number, BIG))
            await trio.sleep(LIMIT_SECONDS)
    try:
        assert store.zbud_counters()["pers_zombie_count"] == 0
        store.state.blocks.check()
        assert name == "write_blocks" or store.state.blocks.holes == holes
    finally:
        store.close()
        let_go(store.memory)


@trio_test
async def test_a_spent_budget_is_reported_each_time(tmp_path: Path) -> None:
    """The log reports each time that the budget is used up. Meanwhile the file does not grow either."""
    told: list[str] = []
    async with backed_store(tmp_path, nr_pages=4096, log=told.append) as (store, _):
        for day in (1, 2):
            store.reclaimer.budget.set(1 << 20, trio.current_time(), 0)
            for _ in range(2):
                with pytest.raises(PoolFull) as refused:  # noqa: PT012
                    for number in range(4000):
                        await put(store, number, page(day * 5000 + number, BIG))
                assert refused.value.cause is Refusal.BUDGET
            assert len([text for text in told if "budget is used up" in text]) == day
            store.reclaimer.budget.set(0, trio.current_time())
            push(1.5)
            await until(lambda: not store.reclaimer.writeback._budget_told, "the budget is whole again")


@trio_test
async def test_an_order_without_a_backing_file() -> None:
    """The order ends at once."""
    store = PageStore(1 << 20, 64, None, Codec())
    async with running(store):
        await put(store, 0, page(0, RAW))
        assert store.state.begin_writeback(4) == []
        store.reclaimer.writeback.order(5)
        await quiet(store)
        assert store.reclaimer.writeback.ordered_frames == 0
        assert await get(store, 0) == page(0, RAW)


@trio_test
async def test_nothing_can_go_while_all_is_in_use(tmp_path: Path) -> None:
    """There are blocks, but every frame is busy, so none can be written."""
    async with backed_store(tmp_path) as (store, _):
        assert store.reclaimer.writeback._why_no_batch() is Refusal.BUSY


@trio_test
async def test_a_write_waits_for_what_is_being_read() -> None:
    """Nothing can be written back, but a frame that is being filled can be dropped when it is full, so no write is refused."""
    store = PageStore(1 << 20, 16, None, Codec())
    async with running(store):
        store.reclaimer.limit.governor = PressureGovernor(1)
        store.reclaimer.set_limit(1)
        await put(store, 0, page(0, BIG))
        with pytest.raises(PoolFull):
            await put(store, 1, page(1, BIG))
        store.reclaimer.queue.filling(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, store, 1, page(1, BIG))
            await trio.testing.wait_all_tasks_blocked()
            await drop(store, 0)
            store.reclaimer.queue.filling(-1)
        assert await get(store, 1) == page(1, BIG)


@trio_test
async def test_a_budget_that_allows_no_file(tmp_path: Path) -> None:
    """The file does not grow until there is some budget."""
    backing = FaultyBacking(str(tmp_path / "backing"))
    store = PageStore(16 << 20, 64, backing, Codec())
    store.reclaimer.budget.set(PAGE_SIZE, trio.current_time(), 0)
    async with running(store):
        assert store.statistics().backing_ready_bytes == 0
        store.reclaimer.budget.set(0, trio.current_time())
        push(1.5)
        await until(lambda: store.statistics().backing_ready_bytes > 0, "it has grown")


@trio_test
async def test_a_page_that_is_damaged_while_its_reader_waits(tmp_path: Path) -> None:
    """The page was in a block, and is lost in RAM when the reader looks again: an error, for that page."""
    async with backed_store(tmp_path) as (store, backing):
        for number in range(100):
            await put(store, number, page(number, BIG))
        await quiet(store)
        assert in_block(store, 0)
        lost: list[BaseException] = []

        async def reader() -> None:
            try:
                await get(store, 0)
            except PageLost as error:
                lost.append(error)

        with backing.held("read_blocks") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await until(lambda: bool(gate.held), "the block is being read")
                nursery.start_soon(reader)
                await trio.testing.wait_all_tasks_blocked()
                await put(store, 0, page(7777, BIG))
                forge_handle(store, 0, owner=9)
                gate.open()
        assert len(lost) == 2
        await put(store, 0, page(0, BIG))
        assert await get(store, 0) == page(0, BIG)


@trio_test
async def test_a_write_waits_while_memory_is_on_its_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is written back for it while populating takes a short time."""
    async with backed_store(tmp_path) as (store, backing):
        pool = store.state.pool
        go_on = threading.Event()
        populate = pool.populate

        def slow(runs: list[tuple[int, int]]) -> None:
            go_on.wait(LIMIT_SECONDS)
            populate(runs)

        pool.populate = slow  # type: ignore[method-assign]
        pool.add_bare(pool.take_surplus(0, 64))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, store, 0, page(0, BIG))
            await trio.testing.wait_all_tasks_blocked()
            store.reclaimer.writeback.look()
            await trio.testing.wait_all_tasks_blocked()
            assert backing.calls_of("write_blocks") == []
            go_on.set()
        assert await get(store, 0) == page(0, BIG)
