# SPDX-License-Identifier: MIT
"""What an old kernel, an odd file system or a bug in a thread would do: it is told, and nothing stays half done.

The system calls are the ones that are replaced here, since no system at hand refuses them when it is wanted; disks that
really fail are in tests/fuse.
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
    run,
    running,
    until,
)
from zbudfs.core.codec import Codec
from zbudfs.core.errors import BackingError, PageLost, PoolFull, Refusal
from zbudfs.core.reclaim import PressureGovernor
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store import arena as arena_module
from zbudfs.store import cipher, headroom, pressure
from zbudfs.store.arena import Arena
from zbudfs.store.backing import Backing
from zbudfs.store.cipher import KEY_BYTES, BlockCipher, LibraryXts, best_xts
from zbudfs.store.iothread import IoThread
from zbudfs.store.page_store import PageStore
from zbudfs.store.pressure import PressureMonitor
from zbudfs.store.reclaimer import (
    CALM_SECONDS,
    GROW_RETRY_MOST_SECONDS,
    REFUSE_SECONDS,
    REFUSED_SECONDS,
    STALL_SECONDS,
)
from zbudfs.store.steering import Steering


def refuse(*_: object, **__: object) -> NoReturn:
    """Be a system call that is refused."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def have_a_bug(*_: object, **__: object) -> NoReturn:
    """Be something that raises what nobody expects."""
    raise RuntimeError("a bug")


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_populated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.14 it is allocated another way; where that is refused as well it is a MemoryError."""

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
    """Then there is none that could go."""
    assert headroom._number_after(b"inactive_file ", b"anon 5\nfile 7\n") == 0
    (tmp_path / "memory.max").write_text("5")
    room = headroom.Headroom(str(tmp_path))
    room._open(tmp_path, 2)  # memory.current is missing
    assert room.available_bytes() == headroom.UNLIMITED


def test_a_populating_thread_with_a_bug() -> None:
    """The frames that were to be made ready are still frames."""

    async def main() -> None:
        store = PageStore(1 << 20, 64, None, Codec())
        store.state.pool.populate = have_a_bug  # type: ignore[method-assign]
        with pytest.raises((RuntimeError, ExceptionGroup)):
            await store.run()
        try:
            assert store.state.pool.take_bare() != []
        finally:
            store.close()
            let_go(store.memory)

    run(main)


def test_memory_that_is_refused_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for again and again, and said in the log when it begins; `warnings` says it as long as it lasts."""

    async def main() -> None:
        told: list[str] = []
        store = PageStore(1 << 20, 64, None, Codec())
        store.reclaimer.log = told.append
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
                assert store.reclaimer.warnings() == ["no memory for 5 bytes: the pool cannot grow to its limit"]
                patch.undo()
                push(REFUSED_SECONDS + 1)
                await put(store, 0, page(0, BIG))
                assert store.reclaimer.warnings() == []

    run(main)


def test_pressure_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When the trigger fires and memory is short, on the trio thread; not after the end of that."""
    if not os.access(pressure.PSI_PATH, os.W_OK):
        pytest.skip(f"needs {pressure.PSI_PATH}")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 1 kB\n")
    fired = threading.Event()

    class Poll:
        """Says that the trigger has fired, whenever it is asked."""

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


def test_a_trace_for_which_there_is_no_memory() -> None:
    """It is not on, and the next order tries again."""

    async def main() -> None:
        store = PageStore(1 << 20, 64, None, Codec())
        helper = IoThread[None]("helper")
        async with running(store), trio.open_nursery() as nursery:
            nursery.start_soon(store.tracer.run, helper)
            steering = Steering(store)
            populate = store.tracer._ring.populate
            asked: list[int] = []

            def no_memory() -> NoReturn:
                asked.append(1)
                raise MemoryError

            store.tracer._ring.populate = no_memory  # type: ignore[method-assign]
            steering.set("trace", "1")
            await until(lambda: bool(asked), "the order is seen")
            await trio.testing.wait_all_tasks_blocked()
            assert steering.value("trace") == 0
            store.tracer._ring.populate = populate  # type: ignore[method-assign]
            steering.set("trace", "1")
            await until(lambda: steering.value("trace") == 1, "the trace is on")
            push(1)
            await trio.testing.wait_all_tasks_blocked()
            assert steering.value("trace") == 1, "unread, but not for long"
            steering.set("trace", "0")
            await until(lambda: steering.value("trace") == 0, "the trace is off")
            nursery.cancel_scope.cancel()
        helper.close()

    run(main)


# ---- the cipher -----------------------------------------------------------------------------------------------------


def test_without_the_systems_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's is used."""
    monkeypatch.setitem(sys.modules, "zbudfs.store._cipher", None)
    assert isinstance(best_xts(os.urandom(KEY_BYTES)), LibraryXts)


def test_a_cipher_that_does_not_give_back_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not used at all."""

    class Broken(LibraryXts):
        def decrypt(self, number: int, pieces: object, /) -> None:
            pass

    monkeypatch.setattr(cipher, "best_xts", Broken)
    with pytest.raises(MemoryError, match="cannot be trusted"):
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
    """Each is an error that says what could not be done, and the file goes on."""
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
    """Nothing, or half a sector: not what a block device does, and an error."""
    backing = Backing(str(tmp_path / "backing"))
    frame = memoryview(bytearray(PAGE_SIZE))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", lambda *_: given)
            patch.setattr(os, "preadv", lambda *_: given)
            with pytest.raises(BackingError, match=f"took {given} bytes of 4096"):
                backing.write_blocks(1, [frame])
            with pytest.raises(BackingError, match=f"gave {given} bytes of 4096"):
                backing.read_blocks(1, [frame])
            if not given:
                with pytest.raises(BackingError, match="cannot be grown: Input/output error"):
                    backing.make_ready(0, 1)
    finally:
        backing.close()


def test_a_file_that_cannot_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not opened, and not left open."""
    path = tmp_path / "backing"
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BackingError, match="cannot be prepared: Operation not supported"):
        Backing(str(path))
    monkeypatch.undo()
    Backing(str(path)).close()  # nobody holds its lock


def test_a_file_system_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be punched keeps its room, and is used again."""

    async def main() -> None:
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

    run(main)


def test_a_file_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what is said of it; a file that somebody was at is told once each, and warned of all the time."""

    async def main() -> None:
        told: list[str] = []
        async with backed_store(tmp_path) as (store, backing):
            store.reclaimer.log = told.append
            for number in range(300):
                await put(store, number, page(number, BIG))
            await quiet(store)
            Path(backing.path).unlink()
            os.truncate(f"/proc/self/fd/{backing._fd}", PAGE_SIZE)
            push(1.5)
            for words in ("has been deleted", "has been cut short"):
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
                    f"the backing file {backing.path} cannot be looked at: Operation not supported"
                ]

    run(main)


def test_a_disk_in_trouble_is_warned_of(tmp_path: Path) -> None:
    """While it takes nothing, cannot grow, or answers nothing."""

    async def main() -> None:
        async with backed_store(tmp_path) as (store, backing):
            warnings = store.reclaimer.warnings
            backing.fail("write_blocks")
            for number in range(60):
                await put(store, number, page(number, BIG))
            await until(
                lambda: any("pages stay in RAM while there is room" in text for text in warnings()), "a warning"
            )
            backing.recover()
            push(2)
            await until(lambda: not warnings(), "the disk is well")
            with backing.held("write_blocks") as gate:
                for number in range(100, 110):
                    await put(store, number, page(number, BIG))
                store.reclaimer.order_writeback(5)
                await until(lambda: bool(gate.held), "a write is under way")
                push(STALL_SECONDS + 1)
                assert any("writes wait once RAM is used up" in text for text in warnings())
                push(REFUSE_SECONDS)
                assert any("writes fail once RAM is used up" in text for text in warnings())
            await quiet(store)
            assert warnings() == []

    run(main)


def test_a_file_that_cannot_grow_is_warned_of(tmp_path: Path) -> None:
    """What it has is used meanwhile."""

    async def main() -> None:
        backing = FaultyBacking(str(tmp_path / "backing"))
        store = PageStore(16 << 20, 64, backing, Codec())
        backing.fail("make_ready")
        async with running(store):
            assert any("what it has is used, then pages stay in RAM" in text for text in store.reclaimer.warnings())
            for number in range(40):
                await put(store, number, page(number, BIG))
            store.reclaimer.order_writeback(5)
            await until(lambda: store.reclaimer.ordered_frames == 0, "the order has ended: there is no block")
            backing.recover()
            push(GROW_RETRY_MOST_SECONDS)
            store.reclaimer.order_writeback(5)
            await until(lambda: store.statistics().written_back_pages > 0, "it is written when blocks come")

    run(main)


@pytest.mark.parametrize("name", ["write_blocks", "make_ready"])
def test_a_writing_thread_with_a_bug(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon ends, and who takes over finds no frame half written and no segment lost."""

    async def main() -> None:
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

    run(main)


def test_the_budget_is_told_once_a_time(tmp_path: Path) -> None:
    """Used up, it is said; used up again after it was whole, it is said again. Nor is the file grown meanwhile."""

    async def main() -> None:
        told: list[str] = []
        async with backed_store(tmp_path, nr_pages=4096) as (store, _):
            store.reclaimer.log = told.append
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
                await until(lambda: not store.reclaimer._budget_told, "the budget is whole again")

    run(main)


def test_an_order_without_a_backing_file() -> None:
    """It ends at once."""

    async def main() -> None:
        store = PageStore(1 << 20, 64, None, Codec())
        async with running(store):
            await put(store, 0, page(0, RAW))
            assert store.state.begin_writeback(4) == []
            store.reclaimer.order_writeback(5)
            await quiet(store)
            assert store.reclaimer.ordered_frames == 0
            assert await get(store, 0) == page(0, RAW)

    run(main)


def test_nothing_can_go_while_all_is_in_use(tmp_path: Path) -> None:
    """There are blocks, and no frame that could be written: all are busy."""

    async def main() -> None:
        async with backed_store(tmp_path) as (store, _):
            assert store.reclaimer._why_no_batch() is Refusal.BUSY

    run(main)


def test_a_write_waits_for_what_is_being_read() -> None:
    """Nothing can be written back, but a frame that is being filled can be dropped when it is full: nobody is refused."""

    async def main() -> None:
        store = PageStore(1 << 20, 16, None, Codec())
        async with running(store):
            store.reclaimer.governor = PressureGovernor(1)
            store.reclaimer.set_limit(1)
            await put(store, 0, page(0, BIG))
            with pytest.raises(PoolFull):
                await put(store, 1, page(1, BIG))
            store.reclaimer.filling(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(put, store, 1, page(1, BIG))
                await trio.testing.wait_all_tasks_blocked()
                await drop(store, 0)
                store.reclaimer.filling(-1)
            assert await get(store, 1) == page(1, BIG)

    run(main)


def test_a_budget_that_allows_no_file(tmp_path: Path) -> None:
    """It does not grow until there is some."""

    async def main() -> None:
        backing = FaultyBacking(str(tmp_path / "backing"))
        store = PageStore(16 << 20, 64, backing, Codec())
        store.reclaimer.budget.set(PAGE_SIZE, trio.current_time(), 0)
        async with running(store):
            assert store.statistics().backing_ready_bytes == 0
            store.reclaimer.budget.set(0, trio.current_time())
            push(1.5)
            await until(lambda: store.statistics().backing_ready_bytes > 0, "it has grown")

    run(main)


def test_a_page_that_is_damaged_while_its_reader_waits(tmp_path: Path) -> None:
    """It was in a block when the reader asked, and is lost in RAM when it looks again: an error, for that page."""

    async def main() -> None:
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

    run(main)


def test_a_write_waits_while_memory_is_on_its_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is written back for it as long as populating has not taken long."""

    async def main() -> None:
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
                store.reclaimer.look()
                await trio.testing.wait_all_tasks_blocked()
                assert backing.calls_of("write_blocks") == []
                go_on.set()
            assert await get(store, 0) == page(0, BIG)

    run(main)
