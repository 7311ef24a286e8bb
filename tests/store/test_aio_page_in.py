# SPDX-License-Identifier: MIT
"""Page-in through the kernel's queue: real reads of a real file, which a test can hold, refuse or change."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from kit.nbd import nbd_disk
from kit.programs import run_tool
from tests.store.faulty import FaultyBacking
from tests.store.rig import backed_store, block_of, drop, get, in_block, in_ram, put, quiet, trio_test, until
from tests.support import LIMIT_SECONDS, ROOT
from zbudfs.core.errors import PageLost
from zbudfs.core.latency import BUCKETS, Timed
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store import read_queue
from zbudfs.store._aio import Queue
from zbudfs.store.aio_page_in import AioPageIn
from zbudfs.store.cipher import KEY_BYTES, BlockCipher
from zbudfs.store.page_store import PageStore

pytestmark = pytest.mark.usefixtures("packing")


@pytest.fixture(autouse=True, params=["C", "Python"])
def language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Try the reads of single pages in C, and their specification."""
    if request.param == "Python":
        monkeypatch.setattr(AioPageIn, "_use_c", lambda _: None)
    return str(request.param)


class HeldQueue:
    """A queue of the kernel whose reads the test can hold, refuse, cut short, or change."""

    def __init__(self, nr_slots: int) -> None:
        self._queue = Queue(nr_slots)
        self.slot, self.fileno, self.ring = self._queue.slot, self._queue.fileno, self._queue.ring
        self.held = False
        self.submitted: list[tuple[int, list[int]]] = []
        self._waiting: list[tuple[int, list[tuple[int, list[int]]]]] = []
        self.most = nr_slots
        """The number of runs that the kernel takes at once."""
        self.result: Callable[[int], int] = lambda result: result

    def submit(self, fd: int, runs: list[tuple[int, list[int]]]) -> int:
        """Submit runs, or keep them until `release`."""
        runs = runs[: self.most]
        self.submitted += runs
        if self.held:
            self._waiting.append((fd, runs))
            return len(runs)
        return self._queue.submit(fd, runs)

    def submit_one(self, fd: int, offset: int, slot: int) -> bool:
        """Submit the read of one block, or keep it until `release`."""
        if self.held or not self.most:
            return self.submit(fd, [(offset, [slot])]) == 1
        self.submitted.append((offset, [slot]))
        return self._queue.submit_one(fd, offset, slot)

    def reap(self) -> list[tuple[int, int]]:
        """Return the completed reads."""
        return [(slot, self.result(result)) for slot, result in self._queue.reap()]

    def release(self) -> None:
        """Submit the held reads."""
        self.held = False
        for fd, runs in self._waiting:
            assert self._queue.submit(fd, runs) == len(runs)
        self._waiting.clear()

    def close(self) -> None:
        """Close the queue."""
        self.release()
        self._queue.close()


class Client:
    """A reader, with the answers by request and the requests that went to a task."""

    def __init__(self, store: PageStore, queue: HeldQueue) -> None:
        self.store = store
        self.queue = queue
        self.answers: dict[int, bytes] = {}
        self.again: list[tuple[int, int, int]] = []
        store.aio.serve(self._answered, self._hand_over)
        self._next = 0

    def _answered(self, key: int, content: bytes) -> None:
        assert key not in self.answers, "a request is answered twice"
        assert all(key != what[0] for what in self.again), "a request is answered and handed over"
        self.answers[key] = content

    def _hand_over(self, key: int, offset: int, length: int) -> None:
        assert key not in self.answers, "a request is answered and handed over"
        assert all(key != what[0] for what in self.again), "a request is handed over twice"
        self.again.append((key, offset, length))

    def read(self, page: int, count: int = 1) -> int | None:
        """Begin a read, and return the key of the request, or None if it did not begin."""
        self._next += 1
        begun = self.store.aio.begin(self._next, page * PAGE_SIZE, count * PAGE_SIZE)
        return self._next if begun else None

    async def answer(self, key: int | None) -> bytes:
        """Return the answer to a request that has begun."""
        assert key is not None, "the read was not begun"
        await until(lambda: key in self.answers or any(key == what[0] for what in self.again), "an answer")
        assert key in self.answers, "the read was handed to a task"
        return self.answers[key]


def content_of(number: int, noise_bytes: int = 1500) -> bytes:
    """Return a page that differs from all others. More noise makes a larger zpage."""
    return random.Random(number).randbytes(noise_bytes) + bytes(PAGE_SIZE - noise_bytes)


@contextlib.asynccontextmanager
async def reading(
    folder: Path, patch: pytest.MonkeyPatch, nr_pages: int = 512, nr_frames: int = 64
) -> AsyncIterator[tuple[PageStore, FaultyBacking, Client]]:
    """Run a store with a queue. Its first 200 pages are written, and most are only in the backing file."""
    patch.setattr(read_queue, "new_queue", HeldQueue)
    async with backed_store(folder, nr_pages, nr_frames) as (store, backing):
        assert store.memory.outgoing is not None
        backing.encrypt(BlockCipher(bytes(range(KEY_BYTES))), store.memory.outgoing.view)
        assert store.aio.queue.open()
        store.aio.queue.opened()
        for number in range(200):
            await put(store, number, content_of(number))
        await until(lambda: store.aio.queue.path == "aio", "the first read has come back")
        await quiet(store)
        queue = cast(HeldQueue, store.aio.queue._kernel)
        queue.submitted.clear()
        yield store, backing, Client(store, queue)
        queue.result = lambda result: result
        await quiet(store)


def cold(store: PageStore) -> list[int]:
    """Return the pages that only the backing file has."""
    return [number for number in range(200) if in_block(store, number)]


@trio_test
async def test_a_page_comes_without_a_task_and_its_block_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread reads, the answer is the page, and the page is in RAM afterwards."""
    async with reading(tmp_path, monkeypatch) as (store, backing, client):
        number = cold(store)[0]
        assert await client.answer(client.read(number)) == content_of(number)
        assert not backing.calls_of("read_blocks")
        assert in_ram(store, number)
        assert store.statistics().cumul_pagein_blocks == 1
        row = store.memory.status_area.latencies.row(Timed.PAGEIN).tolist()
        counts, (nanoseconds, longest) = row[:BUCKETS], row[BUCKETS:]
        assert counts.index(1) == (nanoseconds // 1000).bit_length() and sum(counts) == 1 and longest == nanoseconds > 0


@trio_test
async def test_several_pages_in_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of one request may be in neighbouring blocks, in others, in RAM, absent, and words."""
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        first = cold(store)[4]
        await put(store, first + 1, content_of(999))
        await put(store, first + 2, b"zbudfs!!" * (PAGE_SIZE // 8))
        await drop(store, first + 3)
        expected = [content_of(first), content_of(999), b"zbudfs!!" * (PAGE_SIZE // 8), bytes(PAGE_SIZE)]
        expected += [content_of(number) for number in range(first + 4, first + 16)]
        assert await client.answer(client.read(first, 16)) == b"".join(expected)


@pytest.mark.race(20)
@trio_test
async def test_requests_for_one_block_share_its_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request for a block that is being read waits for that read."""
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        number = cold(store)[0]
        client.queue.held = True
        keys = [client.read(number) for _ in range(5)]
        assert len(client.queue.submitted) == 1
        client.queue.release()
        for key in keys:
            assert await client.answer(key) == content_of(number)


@pytest.mark.race(20)
@trio_test
async def test_the_task_waits_for_a_block_that_the_queue_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read in a task looks the page up again when the queue's read has ended. The queue refuses a block of a task."""
    async with reading(tmp_path, monkeypatch) as (store, backing, client):
        number, other = cold(store)[0], cold(store)[40]
        client.queue.held = True
        key = client.read(number)
        async with trio.open_nursery() as nursery:
            found: list[bytes] = []

            async def read() -> None:
                found.append(await get(store, number))

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert not found
            client.queue.release()
        assert found == [content_of(number)] == [await client.answer(key)]
        assert not backing.calls_of("read_blocks")
        with backing.held("read_blocks") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(get, store, other)
                await until(lambda: bool(gate.held), "a thread reads")
                assert client.read(other) is None
                gate.open()


@pytest.mark.parametrize("change", ["write", "discard", "word"])
@pytest.mark.race(19)
@trio_test
async def test_a_page_changes_during_its_page_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """The old copy is no answer: a task looks the page up again. The block has no new owner meanwhile."""
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        number = cold(store)[0]
        block = block_of(store, number)
        client.queue.held = True
        key = client.read(number)
        if change == "discard":
            await drop(store, number)
        else:
            await put(store, number, content_of(7777) if change == "write" else b"abcdefgh" * 512)
        now = await get(store, number)
        for other in range(300, 420):
            await put(store, other, content_of(other))
        await until(lambda: not store.zbud_counters()["pers_zombie_count"], "the writeback is over")
        assert store.state.blocks is not None
        assert store.state.blocks.live(block)
        client.queue.release()
        await until(lambda: bool(client.again), "the request is handed over")
        assert client.again == [(key, number * PAGE_SIZE, PAGE_SIZE)]
        assert await get(store, number) == now != content_of(number)


@pytest.mark.parametrize("result", [-errno.EIO, -errno.EAGAIN, -errno.EOPNOTSUPP, 0, 512])
@trio_test
async def test_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: int) -> None:
    """A read that fails, would wait, or is short goes to a task. Nothing stays held, and the page is not lost."""
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        number = cold(store)[0]
        client.queue.result = lambda _: result
        key = client.read(number)
        await until(lambda: bool(client.again), "the request is handed over")
        assert client.again == [(key, number * PAGE_SIZE, PAGE_SIZE)]
        assert in_block(store, number)
        assert await get(store, number) == content_of(number)
        assert store.statistics().lost_pages == 0


@pytest.mark.parametrize("count", [1, 3])
@trio_test
async def test_an_error_in_one_read_ends_that_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """If a completion cannot be finished, a task answers its requests. The other reads are answered, and nothing stays held."""
    async with reading(tmp_path, monkeypatch) as (store, backing, client):
        pages = {block_of(store, number): number for number in cold(store) if in_block(store, number + count - 1)}
        chosen = list(pages.values())[: 4 * count : count]
        free = store.state.pool.free_frames + store.zbud_counters()["eph_pageframes"]
        decrypt = backing.decrypt
        failures = [MemoryError("no memory")]

        def failing(block: int, frames: Sequence[memoryview]) -> None:
            if failures:
                raise failures.pop()
            decrypt(block, frames)

        monkeypatch.setattr(backing, "decrypt", failing)
        if store.aio._single is not None:
            store.aio._use_c()  # with the new `decrypt`
        client.queue.held = True
        keys = [client.read(number, count) for number in chosen]
        client.queue.release()
        deadline = trio.current_time() + LIMIT_SECONDS
        while store.aio.in_flight and trio.current_time() < deadline:
            with contextlib.suppress(MemoryError):
                store.aio.reap()
            time.sleep(0.001)
        assert not failures and not store.aio.in_flight
        assert len(client.again) == 1
        assert len(client.answers) == len(keys) - 1
        assert len(store.aio.queue.free) == read_queue.SLOTS
        assert not store._reads.loading and not store.aio._blocks
        assert store.state.pool.free_frames + store.zbud_counters()["eph_pageframes"] == free
        for number in chosen:
            assert await get(store, number) == content_of(number)


@trio_test
async def test_a_damaged_block_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue hands a damaged page over, and the task counts and reports the loss."""
    async with reading(tmp_path, monkeypatch) as (store, backing, client):
        number = cold(store)[0]
        os.pwrite(backing.fileno(), memoryview(aligned(os.urandom(PAGE_SIZE))), block_of(store, number) * PAGE_SIZE)
        client.read(number)
        await until(lambda: bool(client.again), "the request is handed over")
        assert store.statistics().lost_pages == 0
        with pytest.raises(PageLost):
            await get(store, number)
        assert store.statistics().lost_pages == 1


def aligned(content: bytes) -> memoryview:
    """Return a copy that O_DIRECT accepts."""
    place = mmap.mmap(-1, PAGE_SIZE)
    place[:] = content
    return memoryview(place)


@trio_test
async def test_more_reads_than_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads without a free slot do not begin, and all slots are free again afterwards."""
    monkeypatch.setattr(read_queue, "SLOTS", 8)
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        pages = {block_of(store, number): number for number in cold(store)}
        chosen = list(pages.values())[::3][:12]
        client.queue.held = True
        keys = {number: client.read(number) for number in chosen}
        begun = {number: key for number, key in keys.items() if key is not None}
        assert len(begun) == 8
        client.queue.release()
        for number, key in begun.items():
            assert await client.answer(key) == content_of(number)
        await until(lambda: len(store.aio.queue.free) == 8, "the slots are free")


@trio_test
async def test_the_kernel_takes_only_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel takes only one run of a request, the request does not begin. After that run nothing is held."""
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        first = next(
            number
            for number in cold(store)
            if in_block(store, number + 9) and abs(block_of(store, number + 9) - block_of(store, number)) > 1
        )
        for number in range(first + 1, first + 9):
            await drop(store, number)
        client.queue.most = 1
        assert client.read(first, 10) is None
        await until(lambda: not store.aio.in_flight, "the run that was taken is over")
        assert len(store.aio.queue.free) == read_queue.SLOTS
        await quiet(store)
        assert await get(store, first) == content_of(first)


@trio_test
async def test_the_kernel_takes_no_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read does not begin. No slot is lost, no block is held, and a later read begins."""
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        number = cold(store)[0]
        client.queue.most = 0
        assert client.read(number) is None
        assert len(store.aio.queue.free) == read_queue.SLOTS and not store.aio.in_flight
        assert not store.state.is_held(block_of(store, number))
        client.queue.most = read_queue.SLOTS
        assert await client.answer(client.read(number)) == content_of(number)


@trio_test
async def test_no_frame_to_keep_a_block_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If pages without writeback use every frame, reads are answered and the block is not kept."""
    async with reading(tmp_path, monkeypatch) as (store, _, client):
        chosen = cold(store)[:8]
        store.reclaimer.writeback.enabled = False
        with contextlib.suppress(Exception):
            for number in range(300, 500):
                await put(store, number, random.Random(number).randbytes(PAGE_SIZE))
        for number in chosen:
            assert await client.answer(client.read(number)) == content_of(number)
        store.reclaimer.writeback.enabled = True


@trio_test
async def test_a_reader_in_order_gets_blocks_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs grow, and later requests find their pages in RAM."""
    async with reading(tmp_path, monkeypatch, nr_frames=96) as (store, _, client):
        pages = cold(store)
        for number in pages[: len(pages) // 8 * 8 : 8]:
            if all(in_block(store, number + at) for at in range(8)):
                await client.answer(client.read(number, 8))
        assert store.statistics().cumul_readahead_blocks > 0
        assert any(len(slots) > 8 for _, slots in client.queue.submitted)


@pytest.mark.parametrize("seed", range(3))
@trio_test
async def test_anything_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Reads are held for a while, between writes and discards. Each gives a content that the page had meanwhile."""
    chance = random.Random(seed)
    async with reading(tmp_path, monkeypatch, nr_frames=48) as (store, _, client):
        history: dict[int, list[bytes]] = {number: [content_of(number)] for number in range(200)}
        open_reads: dict[int, tuple[int, int, list[int]]] = {}
        checked = 0
        for step in range(1500):
            match chance.randrange(10):
                case 0 | 1 | 2:
                    number = chance.randrange(200)
                    history[number].append(content_of(step + 1000, chance.choice((40, 700, 1500, 2500, 4096))))
                    await put(store, number, history[number][-1])
                case 3 if chance.random() < 0.3:
                    number = chance.randrange(200)
                    history[number].append(bytes(PAGE_SIZE))
                    await drop(store, number)
                case 4:
                    client.queue.held = True
                case 5:
                    client.queue.release()
                    await trio.lowlevel.checkpoint()
                case _:
                    count = chance.choice((1, 1, 1, 2, 8))
                    number = chance.randrange(200 - count)
                    key = client.read(number, count)
                    if key is not None:
                        open_reads[key] = (number, count, [len(history[number + at]) - 1 for at in range(count)])
            if step % 50 == 49:
                client.queue.release()
                await until(lambda: not store.aio.in_flight, "all reads are over")
            for key, (number, count, since) in list(open_reads.items()):
                content = client.answers.get(key)
                if content is None:
                    continue
                for at in range(count):
                    piece = content[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
                    assert piece in history[number + at][since[at] :], f"step {step}: page {number + at}"
                    checked += 1
                del open_reads[key]
        client.queue.release()
        await until(lambda: not store.aio.in_flight, "all reads are over")
        await quiet(store)
        assert checked > 50
        for number, versions in history.items():
            assert await get(store, number) == versions[-1]


@trio_test
async def test_a_store_that_nobody_uses_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object in C refers to functions of the store that refers to it. The garbage collector frees both."""
    async with reading(tmp_path, monkeypatch) as (store, backing, client):
        assert await client.answer(client.read(cold(store)[0]))
        alive = weakref.ref(store.aio)
    del store, backing, client
    gc.collect()
    assert alive() is None


# ---- without a queue -----------------------------------------------------------------------------------------------------


@trio_test
async def test_the_kernel_has_no_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads read then, and the store says so."""

    def refused(_: int) -> Queue:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(read_queue, "new_queue", refused)
    async with backed_store(tmp_path) as (store, _):
        assert not store.aio.queue.open()
        assert store.aio.queue.path == "threads"
        assert not store.aio.begin(1, 0, PAGE_SIZE)


@trio_test
async def test_a_file_without_direct_io_is_read_by_threads(tmp_path: Path) -> None:
    """AIO through the page cache would make the serving thread wait."""
    async with backed_store(tmp_path) as (store, backing):
        backing.direct = False
        assert not store.aio.queue.open()


def test_a_queue_with_wrong_arguments() -> None:
    """Errors name the mistake, and nothing is submitted."""
    with pytest.raises(ValueError, match="1 to 256 slots"):
        Queue(0)
    with pytest.raises(ValueError, match="1 to 256 slots"):
        Queue(257)
    queue = Queue(4)
    with pytest.raises(IndexError, match="no slot 4"):
        queue.submit(0, [(0, [4])])
    with pytest.raises(IndexError, match="no slot 9"):
        queue.slot(9)
    with pytest.raises(ValueError, match="at least one slot"):
        queue.submit(0, [(0, [])])
    with pytest.raises(ValueError, match="at least one slot"):
        queue.submit(0, [(0, [0, 1, 2, 3, 0])])
    with pytest.raises(TypeError, match="tuple"):
        queue.submit(0, [[0, [0]]])  # type: ignore[list-item]
    assert queue.submit(-1, [(0, [0])]) == 0
    assert queue.reap() == []
    queue.close()
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.reap()
    with pytest.raises(ValueError, match="closed"):
        queue.submit(0, [(0, [0])])


def test_a_queue_gives_some_at_a_time(tmp_path: Path) -> None:
    """If many reads have ended, `reap` returns some of them, and the descriptor stays readable until all were returned."""
    file = tmp_path / "file"
    file.write_bytes(bytes(16 * PAGE_SIZE))
    queue = Queue(16)
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        head, tail = (ctypes.c_uint32.from_address(queue.ring() + at) for at in (0, 4))
        for number in range(16):
            assert queue.submit_one(fd, number * PAGE_SIZE, number)
        end = time.monotonic() + LIMIT_SECONDS
        while tail.value - head.value < 16 and time.monotonic() < end:
            time.sleep(0.001)
        parts = []
        while select.select([queue.fileno()], [], [], 0)[0]:
            parts.append(queue.reap())
        assert [len(part) for part in parts] == [6, 6, 4]
        assert sorted(slot for part in parts for slot, _ in part) == list(range(16))
        assert queue.reap() == []
    finally:
        os.close(fd)
        queue.close()


DYING = """
import os, sys, time
from zbudfs.store._aio import Queue
from zbudfs.store.aio_page_in import AioPageIn
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
queue = Queue(4)
assert queue.submit(fd, [(0, [0])]) == 1
print("submitted", flush=True)
time.sleep(600)
"""


@pytest.mark.needs("root", "fuse", "loop", "nbd")
@pytest.mark.race(21)
def test_a_process_ends_only_when_its_reads_have_come_back(tmp_path: Path) -> None:
    """The kernel keeps a killed process and its slots until the disk has answered."""
    with nbd_disk(tmp_path, 16 << 20) as disk:
        file = disk.mounted / "blocks"
        file.write_bytes(os.urandom(PAGE_SIZE))
        run_tool("sync", "--file-system", disk.mounted)
        with disk.standing_still():
            reader = subprocess.Popen([sys.executable, "-c", DYING, str(file)], stdout=subprocess.PIPE, cwd=ROOT)
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"submitted\n"
            reader.kill()
            with pytest.raises(subprocess.TimeoutExpired):
                reader.wait(1.0)
        assert reader.wait(30.0) == -signal.SIGKILL
        reader.stdout.close()
