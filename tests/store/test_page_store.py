# SPDX-License-Identifier: MIT
"""The page store is compared with a bytearray: any range, any content, tiny pools, with and without a backing file.

The test waits only where a user would, so writeback, page-in and its own requests overlap. A byte must be the last one
written, or belong to a request under way. The limit holds to the frame at any moment, and no table disagrees with
another.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.samples import BIG, HALF, RAW, SMALL, page, pages, text_page
from tests.store.faulty import FaultyBacking
from tests.store.rig import backed_store, drop, get, in_block, place_of, put, quiet, run, running, trio_test, until
from zbudfs.core.codec import Codec, page_of_word
from zbudfs.core.errors import OutOfRange, PageLost, PoolFull
from zbudfs.core.units import NCHUNKS, PAGE_SIZE
from zbudfs.store.backing import Backing
from zbudfs.store.page_store import PageStore

pytestmark = pytest.mark.usefixtures("packing")

PAGES = 40
SIZE = PAGES * PAGE_SIZE
ZEROS = bytes(PAGE_SIZE)
ODD_WORD = struct.unpack("=Q", struct.pack("=d", 0.1))[0]


class LimitWatch(trio.abc.Instrument):
    """A check of the store after each step of each task, since all changes happen in one."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self.most_frames = 0
        self.most_over = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Note the number of frames in use, counted in two ways."""
        counters = self._store.zbud_counters()
        used = counters["pers_pageframes"] + counters["eph_pageframes"]
        statistics = self._store.statistics()
        self.most_frames = max(self.most_frames, used, statistics.pool_used_bytes // PAGE_SIZE)
        self.most_over = max(self.most_over, statistics.pool_used_bytes - statistics.pool_limit_bytes)


@contextlib.contextmanager
def watched(store: PageStore, nr_frames: int) -> Iterator[None]:
    """Watch the pool's limit during the block, to the frame."""
    watch = LimitWatch(store)
    trio.lowlevel.add_instrument(watch)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(watch)
    assert watch.most_frames <= nr_frames
    assert watch.most_over <= 0
    assert store.state.pool.used_frames <= nr_frames


def content_of(kind: int, seed: int, length: int) -> bytes:
    """Return bytes like those of real memory, or difficult ones."""
    generator = random.Random(seed)
    if kind == 0:
        return generator.randbytes(8) * (length // 8) + bytes(length % 8)
    if kind == 1:
        return generator.randbytes(length)
    if kind == 2:
        return (text_page(seed) * (length // PAGE_SIZE + 1))[:length]
    if kind == 3:
        return bytes(length)
    chunks = [
        generator.randbytes(size).ljust(PAGE_SIZE, b"\0") for size in (SMALL, HALF, BIG, 3900) for _ in range(kind - 3)
    ]
    generator.shuffle(chunks)
    return (b"".join(chunks) * (length // PAGE_SIZE + 1))[:length]


def ranges() -> st.SearchStrategy[tuple[int, int]]:
    """Return ranges of the device: pages, parts of one, and across several."""
    whole = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 12)).map(
        lambda pair: (pair[0] * PAGE_SIZE, min(pair[1] * PAGE_SIZE, SIZE - pair[0] * PAGE_SIZE))
    )
    one = st.integers(0, PAGES - 1).map(lambda number: (number * PAGE_SIZE, PAGE_SIZE))
    bounds = st.integers(0, SIZE) | st.integers(0, PAGES).flatmap(
        lambda number: st.sampled_from([-1, 0, 1, 8, 512]).map(lambda by: max(0, min(SIZE, number * PAGE_SIZE + by)))
    )
    some = st.tuples(bounds, bounds).map(lambda pair: (min(pair), min(abs(pair[1] - pair[0]), 9 * PAGE_SIZE)))
    small = st.tuples(st.integers(0, SIZE - 600), st.integers(0, 600))
    return whole | one | some | small


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "read", "discard", "settle", "turn"]),
        ranges(),
        st.integers(0, 5),
        st.integers(0, 1 << 30),
    ),
    max_size=80,
)


async def play(store: PageStore, steps: list[tuple[str, tuple[int, int], int, int]], *, can_be_full: bool) -> None:
    """Do the steps with a store and with a bytearray, and compare."""
    model = bytearray(SIZE)
    for what, (offset, length), kind, seed in steps:
        if what == "settle":
            await quiet(store)
        elif what == "turn":
            await trio.lowlevel.checkpoint()
        elif what == "read":
            assert await store.requests.read(offset, length) == model[offset : offset + length]
        else:
            before = bytes(model)
            model[offset : offset + length] = content_of(kind, seed, length) if what == "write" else bytes(length)
            try:
                if what == "write":
                    await store.requests.write(offset, bytes(model[offset : offset + length]))
                else:
                    await store.requests.discard(offset, length)
            except PoolFull:
                assert can_be_full
                for at in range(offset // PAGE_SIZE * PAGE_SIZE, offset + length, PAGE_SIZE):
                    there = await store.requests.read(at, PAGE_SIZE)
                    assert there in (before[at : at + PAGE_SIZE], model[at : at + PAGE_SIZE]), "neither old nor new"
                    model[at : at + PAGE_SIZE] = there
    for offset in range(0, SIZE, 8 * PAGE_SIZE):
        assert await store.requests.read(offset, 8 * PAGE_SIZE) == model[offset : offset + 8 * PAGE_SIZE]
    for number in range(PAGES):
        assert await get(store, number) == model[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
    await quiet(store)
    await store.requests.discard(0, SIZE)
    await quiet(store)
    statistics = store.statistics()
    assert statistics.stored_pages == statistics.pool_used_bytes == statistics.backing_used_bytes == 0
    assert await store.requests.read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("frames", [1, 3, 8, 64])
@settings(max_examples=30, deadline=None)
@given(steps=STEPS, level=st.sampled_from([-7, -1, 1, 5]))
@trio_test
async def test_any_steps_in_ram(frames: int, level: int, steps: list[tuple[str, tuple[int, int], int, int]]) -> None:
    """Without a backing file a write may be refused, and then each page is old or new."""
    store = PageStore(SIZE, frames, None, Codec(level))
    async with running(store):
        with watched(store, frames):
            await play(store, steps, can_be_full=True)


@pytest.mark.parametrize("frames", [1, 3, 8, 20])
@settings(max_examples=30, deadline=None)
@given(steps=STEPS, level=st.sampled_from([-7, -1, 1, 5]))
def test_any_steps_with_a_backing_file(
    frames: int, level: int, steps: list[tuple[str, tuple[int, int], int, int]]
) -> None:
    """With a backing file as large as the device each write is accepted, with any pool."""

    async def main(path: str) -> None:
        store = PageStore(SIZE, frames, Backing(path), Codec(level))
        async with running(store):
            with watched(store, frames):
                await play(store, steps, can_be_full=False)

    with TemporaryDirectory() as folder:
        run(lambda: main(f"{folder}/backing"))


# ---- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [4, 16, 70])
@pytest.mark.parametrize("seed", range(3))
@trio_test
async def test_tasks_on_disjoint_ranges(tmp_path: Path, frames: int, seed: int) -> None:
    """Five tasks without common pages do not disturb each other, though they share frames, blocks and the disk."""
    tasks, span = 5, 24

    async def worker(store: PageStore, number: int) -> None:
        generator = random.Random(f"{seed} {number}")
        base = number * span * PAGE_SIZE
        model = bytearray(span * PAGE_SIZE)
        for _ in range(200):
            aligned = generator.random() < 0.7
            offset = generator.randrange(span) * PAGE_SIZE if aligned else generator.randrange(len(model))
            length = generator.choice([PAGE_SIZE, 3 * PAGE_SIZE]) if aligned else generator.randrange(9000)
            length = min(length, len(model) - offset)
            what = generator.random()
            if what < 0.5:
                model[offset : offset + length] = content_of(
                    generator.choice([0, 1, 4, 4, 5, 5]), generator.getrandbits(30), length
                )
                await store.requests.write(base + offset, bytes(model[offset : offset + length]))
            elif what < 0.9:
                assert await store.requests.read(base + offset, length) == model[offset : offset + length]
            else:
                model[offset : offset + length] = bytes(length)
                await store.requests.discard(base + offset, length)
            if generator.random() < 0.3:
                await trio.lowlevel.checkpoint()
        assert await store.requests.read(base, len(model)) == model

    store = PageStore(tasks * span * PAGE_SIZE, frames, Backing(str(tmp_path / "backing")), Codec())
    async with running(store):
        with watched(store, frames):
            async with trio.open_nursery() as nursery:
                for number in range(tasks):
                    nursery.start_soon(worker, store, number)
        await quiet(store)
        assert store.statistics().cumul_writeback_frames > 0


class History:
    """The writes to each page and their times, and so the contents that a read may return.

    Times are counted in events, so the order is exact. A version is gone when a later one is complete. A read that
    begins after that must not return it.
    """

    def __init__(self) -> None:
        self._now = 0
        self._versions: list[list[tuple[bytes, int, int]]] = [[(ZEROS, -2, -1)] for _ in range(PAGES)]
        """(content, began, complete) by page. A write under way is never complete."""

    def now(self) -> int:
        """Return the time of the next event."""
        self._now += 1
        return self._now

    def begin(self, number: int, content: bytes) -> int:
        """Begin a write of a page, and return its place in the history."""
        self._versions[number].append((content, self.now(), 1 << 60))
        return len(self._versions[number]) - 1

    def complete(self, number: int, place: int) -> None:
        """Complete a write."""
        content, began, _ = self._versions[number][place]
        self._versions[number][place] = (content, began, self.now())

    def explains(self, number: int, content: bytes, since: int) -> bool:
        """Return whether a read that began at `since` and ends now may have returned `content`."""
        versions = self._versions[number]
        return any(
            there == content and not any(began > complete and done < since for _, began, done in versions)
            for there, _, complete in versions
        )


@pytest.mark.parametrize("frames", [4, 16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.race(8)
@trio_test
async def test_tasks_on_the_same_pages(tmp_path: Path, frames: int, seed: int) -> None:
    """Six tasks read, write and discard the same pages: no read returns an old or a mixed content."""
    history = History()

    async def worker(store: PageStore, worker_number: int) -> None:
        generator = random.Random(f"{seed} {worker_number}")
        for step in range(200):
            number, count = generator.randrange(PAGES - 3), generator.choice([1, 1, 2, 4])
            span = range(number, number + count)
            what = generator.random()
            if what < 0.55:
                noise = generator.choice([16, SMALL, HALF, HALF, BIG, RAW])
                content = pages(count, noise, hash((seed, worker_number, step)) & 0xFFFFFFFF)
                places = [
                    history.begin(at, content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
                    for index, at in enumerate(span)
                ]
                await put(store, number, content)
            elif what < 0.65:
                places = [history.begin(at, ZEROS) for at in span]
                await drop(store, number, count)
            else:
                since = history.now()
                found = await get(store, number, count)
                assert len(found) == count * PAGE_SIZE
                for index, at in enumerate(span):
                    assert history.explains(at, found[index * PAGE_SIZE : (index + 1) * PAGE_SIZE], since), f"page {at}"
                continue
            for at, place in zip(span, places, strict=True):
                history.complete(at, place)
            if generator.random() < 0.3:
                await trio.lowlevel.checkpoint()

    store = PageStore(SIZE, frames, Backing(str(tmp_path / "backing")), Codec())
    async with running(store):
        with watched(store, frames):
            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(worker, store, number)
        await quiet(store)
        since = history.now()
        for number in range(PAGES):
            assert history.explains(number, await get(store, number), since), f"page {number}"
        await quiet(store)
        assert store.statistics().cumul_pagein_pages > 20


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.race(9)
@trio_test
async def test_tasks_that_patch_the_same_pages(tmp_path: Path, seed: int) -> None:
    """Four tasks patch their stripes of each page, while the pages go to the disk and back: no patch is lost."""
    stripe, span = 256, 10

    async def worker(store: PageStore, number: int, model: bytearray) -> None:
        generator = random.Random(f"{seed} {number}")
        for _ in range(200):
            at = generator.randrange(span) * PAGE_SIZE + number * stripe + generator.randrange(stripe)
            length = generator.randrange(1, stripe - at % stripe + 1)
            if generator.random() < 0.15:
                model[at : at + length] = bytes(length)
                await store.requests.discard(at, length)
            else:
                model[at : at + length] = generator.randbytes(length)
                await store.requests.write(at, bytes(model[at : at + length]))
            await trio.lowlevel.checkpoint()

    async def churn(store: PageStore, scope: trio.CancelScope) -> None:
        with scope:
            for version in range(1 << 30):
                await put(store, span + version % (PAGES - span), page(version, BIG))
                await trio.lowlevel.checkpoint()

    model = bytearray(span * PAGE_SIZE)
    store = PageStore(SIZE, 6, Backing(str(tmp_path / "backing")), Codec())
    async with running(store):
        with watched(store, 6):
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()
                nursery.start_soon(churn, store, scope)
                async with trio.open_nursery() as workers:
                    for number in range(4):
                        workers.start_soon(worker, store, number, model)
                scope.cancel()
            assert await store.requests.read(0, len(model)) == model
        await quiet(store)
        assert store.statistics().cumul_pagein_pages > 0


# ---- a pool that is full ---------------------------------------------------------------------------------------------


@trio_test
async def test_a_full_pool(tmp_path: Path) -> None:
    """Without a backing file the pool holds exactly as many pages as it has frames for, and none is lost."""
    store = PageStore(SIZE, 8, None, Codec())
    async with running(store):
        with watched(store, 8):
            for number in range(8):
                await put(store, number, page(number, BIG))
            assert store.statistics().pool_used_bytes == 8 * PAGE_SIZE == store.statistics().pool_limit_bytes
            for offset, content in (
                (20 * PAGE_SIZE, page(20, BIG)),
                (3 * PAGE_SIZE, page(99, BIG)),
                (3 * PAGE_SIZE, page(9, RAW)),
            ):
                with pytest.raises(PoolFull):
                    await store.requests.write(offset, content)
            with pytest.raises(PoolFull):
                await store.requests.write(3 * PAGE_SIZE + 5, b"patch")
            assert store.statistics().refused_pool_full == 4
            await put(store, 21, page_of_word(5))
            await put(store, 22, page(22, SMALL))
            for number in range(8):
                assert await get(store, number) == page(number, BIG)
            assert await get(store, 20) == ZEROS
            assert await get(store, 21) == page_of_word(5)
            assert await get(store, 22) == page(22, SMALL)
            await quiet(store)
            await drop(store, 7)
            await put(store, 20, page(20, BIG))
            await put(store, 3, page_of_word(1))
            await put(store, 30, page(30, BIG))
            assert await get(store, 20) == page(20, BIG)
            assert await get(store, 3) == page_of_word(1)
        await quiet(store)


@pytest.mark.parametrize("offset", [0, 100])
@trio_test
async def test_a_large_write_is_all_or_an_error(offset: int) -> None:
    """A write without room is an error and never a short count, and each page is old or new."""
    store = PageStore(1 << 20, 20, None, Codec())
    async with running(store):
        with watched(store, 20):
            old = pages(12, HALF)
            await put(store, 0, old)
            large = pages(255, BIG, 1000)
            with pytest.raises(PoolFull):
                await store.requests.write(offset, large)
            assert store.statistics().refused_pool_full == 1
            new = (old[:offset] + large).ljust(1 << 20, b"\0")
            before = old.ljust(1 << 20, b"\0")
            changed = 0
            for at in range(0, 1 << 20, PAGE_SIZE):
                found = await store.requests.read(at, PAGE_SIZE)
                assert found in (before[at : at + PAGE_SIZE], new[at : at + PAGE_SIZE])
                changed += found == new[at : at + PAGE_SIZE]
            assert 0 < changed < 256
            await quiet(store)
            await store.requests.discard(0, 1 << 20)
            await put(store, 0, pages(20, BIG))
            assert await get(store, 0, 20) == pages(20, BIG)
        await quiet(store)


@trio_test
async def test_a_large_write_through_a_small_pool(tmp_path: Path) -> None:
    """With a backing file a write of a mebibyte goes through a pool of six frames."""
    store = PageStore(2 << 20, 6, Backing(str(tmp_path / "backing")), Codec())
    async with running(store):
        with watched(store, 6):
            large = pages(256, BIG)
            await store.requests.write(0, large)
            await store.requests.write((1 << 20) + 77, large[:-PAGE_SIZE])
            assert await store.requests.read(0, 1 << 20) == large
            assert await store.requests.read((1 << 20) + 77, (1 << 20) - PAGE_SIZE) == large[:-PAGE_SIZE]
            assert store.statistics().refused_pool_full == 0
        await quiet(store)


# ---- calls that do not wait -------------------------------------------------------------------------------------------


@trio_test
async def test_read_nowait(tmp_path: Path) -> None:
    """Pages in RAM are read at once. For a page on the disk alone, the call says so and changes nothing."""
    async with backed_store(tmp_path) as (store, backing):
        for number in range(49):
            await put(store, number, page(number, BIG))
        await until(lambda: store.statistics().cumul_writeback_frames == 17, "a round is over")
        await quiet(store)
        before = store.statistics().cumul_read_pages
        assert store.requests.read_nowait(0, PAGE_SIZE) is None
        assert store.requests.read_nowait(10 * PAGE_SIZE, 10 * PAGE_SIZE) is None
        assert store.statistics().cumul_read_pages == before
        assert not backing.calls_of("read_blocks")
        assert store.requests.read_nowait(17 * PAGE_SIZE, PAGE_SIZE) == page(17, BIG)
        assert store.requests.read_nowait(17 * PAGE_SIZE + 9, 9000) == pages(4, BIG, 17)[9:9009]
        assert store.requests.read_nowait(100 * PAGE_SIZE, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)
        assert store.statistics().cumul_read_pages == before + 1 + 3 + 3
        assert await get(store, 0) == page(0, BIG)
        assert store.requests.read_nowait(0, PAGE_SIZE) == page(0, BIG)


@trio_test
async def test_write_nowait(tmp_path: Path) -> None:
    """Whole pages are stored from the start, as far as there are frames, and the caller's buffer is not kept."""
    store = PageStore(SIZE, 8, None, Codec())
    async with running(store):
        for noise in (SMALL, HALF, RAW):
            content = bytearray(page(noise, noise))
            assert store.requests.write_nowait(0, memoryview(content)) == PAGE_SIZE
            content[:] = b"x" * PAGE_SIZE
            assert await get(store, 0) == page(noise, noise)
        content = bytearray(page_of_word(ODD_WORD))
        assert store.requests.write_nowait(PAGE_SIZE, memoryview(content)) == PAGE_SIZE
        content[:] = b"x" * PAGE_SIZE
        assert await get(store, 1) == page_of_word(ODD_WORD)
        await drop(store, 0, PAGES)
        assert store.requests.write_nowait(0, pages(12, BIG)) == 8 * PAGE_SIZE
        assert await get(store, 0, 12) == pages(8, BIG) + bytes(4 * PAGE_SIZE)
        assert store.requests.write_nowait(20 * PAGE_SIZE, page(1, BIG)) == 0
        assert store.requests.write_nowait(20 * PAGE_SIZE, page_of_word(1) * 2) == 2 * PAGE_SIZE
        assert store.requests.write_nowait(0, b"") == 0
        assert store.requests.write_nowait(5, page(1)) == store.requests.write_nowait(0, b"part of a page") == 0
        assert await get(store, 0, 12) == pages(8, BIG) + bytes(4 * PAGE_SIZE)
        await quiet(store)


# ---- ranges -----------------------------------------------------------------------------------------------------------


@trio_test
async def test_ranges_beyond_the_device(tmp_path: Path) -> None:
    """Reads and discards end at the end of the device. A write beyond it, and any offset before its start, is refused."""
    store = PageStore(SIZE, 64, None, Codec())
    async with running(store):
        content = pages(PAGES, SMALL)
        await store.requests.write(0, content)
        assert await store.requests.read(SIZE - 10, 100) == content[-10:]
        assert await store.requests.read(SIZE - PAGE_SIZE, 2 * PAGE_SIZE) == content[-PAGE_SIZE:]
        assert (
            await store.requests.read(SIZE, PAGE_SIZE)
            == await store.requests.read(SIZE + 5, 5)
            == await store.requests.read(7, 0)
            == b""
        )
        assert await store.requests.read(9 * SIZE, PAGE_SIZE) == store.requests.read_nowait(9 * SIZE, PAGE_SIZE) == b""
        for offset, length in (
            (SIZE, 1),
            (SIZE - 1, 2),
            (SIZE - PAGE_SIZE, 2 * PAGE_SIZE),
            (-PAGE_SIZE, PAGE_SIZE),
            (-1, 2),
        ):
            with pytest.raises(OutOfRange):
                await store.requests.write(offset, bytes(length))
            with pytest.raises(OutOfRange):
                store.requests.write_nowait(offset, bytes(length))
        for offset, length in ((-PAGE_SIZE, PAGE_SIZE), (-PAGE_SIZE, 2 * PAGE_SIZE), (-1, 2), (-5, 3)):
            with pytest.raises(OutOfRange):
                await store.requests.read(offset, length)
            with pytest.raises(OutOfRange):
                await store.requests.discard(offset, length)
        assert await store.requests.read(0, SIZE) == content
        await store.requests.discard(SIZE - 10, 1 << 60)
        await store.requests.discard(SIZE, 100)
        await store.requests.discard(5 * SIZE, 100)
        await store.requests.discard(100, 0)
        assert await store.requests.read(0, SIZE) == content[:-10] + bytes(10)
        await quiet(store)


@pytest.mark.parametrize(("offset", "length"), [(-PAGE_SIZE, PAGE_SIZE), (-PAGE_SIZE, 2 * PAGE_SIZE), (-1, 2)])
@trio_test
async def test_nothing_is_read_before_the_start(offset: int, length: int) -> None:
    """A negative offset is refused, and does not read from the end."""
    store = PageStore(SIZE, 4, None, Codec())
    async with running(store):
        with pytest.raises(OutOfRange):
            store.requests.read_nowait(offset, length)


@pytest.mark.parametrize("seed", range(3))
@trio_test
async def test_discards_of_any_length(seed: int) -> None:
    """A discard frees exactly its whole pages, in any number of steps, and zeroes the edges."""
    nr_pages = 9000

    store = PageStore(nr_pages * PAGE_SIZE, 64, None, Codec())
    async with running(store):
        generator = random.Random(seed)
        model = bytearray(nr_pages * PAGE_SIZE)
        for _ in range(4):
            for first in range(0, nr_pages, 100):
                if generator.random() < 0.7:
                    word = page_of_word(generator.getrandbits(60)) * 100
                    model[first * PAGE_SIZE : first * PAGE_SIZE + len(word)] = word
                    await put(store, first, word)
            offset = generator.randrange(len(model) // 2)
            length = generator.randrange(len(model) // 2)
            model[offset : offset + length] = bytes(length)
            discarded, stored = store.statistics().cumul_discarded_pages, store.statistics().stored_pages
            await store.requests.discard(offset, length)
            now = store.statistics()
            assert now.cumul_discarded_pages - discarded == stored - now.stored_pages
            for at in (0, offset - 5000, offset - 1, offset + length - 5000, offset + length, len(model) - 70000):
                at = max(at, 0)
                assert await store.requests.read(at, 70000) == model[at : at + 70000]
            assert await store.requests.read(0, len(model)) == model
        await store.requests.discard(0, len(model))
        assert store.statistics().stored_pages == 0
        await quiet(store)


@pytest.mark.race(11)
@trio_test
async def test_a_long_discard_lets_others_in() -> None:
    """Other tasks run during a long discard, and pages that are written behind it stay."""
    nr_pages = 20_000
    store = PageStore(nr_pages * PAGE_SIZE, 64, None, Codec())
    async with running(store):
        for first in range(0, nr_pages, 100):
            await put(store, first, page_of_word(7) * 100)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while store.statistics().stored_pages > 5:
                turns += 1
                await put(store, 3, page(3, HALF))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await trio.lowlevel.checkpoint()
            await drop(store, 0, nr_pages)
        assert turns >= 5
        assert await get(store, 3) == page(3, HALF)
        assert store.statistics().stored_pages == 1
        await quiet(store)


# ---- a lost page -----------------------------------------------------------------------------------------------------


@trio_test
async def test_a_lost_page_in_ram_is_an_error_for_that_page_alone() -> None:
    """Damage in a frame is found: a read ends before the page, and its neighbours can be read."""
    store = PageStore(SIZE, 64, None, Codec())
    async with running(store):
        await put(store, 0, pages(10, BIG))
        frame, _ = place_of(store, 4)
        store.state.pool.allocator.frame_bytes(frame)[1000] ^= 1
        for read in (get(store, 0, 10), get(store, 0, 5)):
            assert await read == pages(4, BIG)
        assert store.requests.read_nowait(0, 10 * PAGE_SIZE) == pages(4, BIG)
        assert await store.requests.read(50, 8 * PAGE_SIZE) == pages(4, BIG)[50:]
        assert await get(store, 5, 5) == pages(5, BIG, 5)
        for count in (1, 3):
            with pytest.raises(PageLost):
                await get(store, 4, count)
            with pytest.raises(PageLost):
                store.requests.read_nowait(4 * PAGE_SIZE, count * PAGE_SIZE)
        with pytest.raises(PageLost):
            await store.requests.write(4 * PAGE_SIZE + 7, b"patch")
        assert store.statistics().lost_pages >= 5
        await put(store, 4, page(44, BIG))
        assert await get(store, 3, 3) == page(3, BIG) + page(44, BIG) + page(5, BIG)
        await quiet(store)


# ---- statistics -------------------------------------------------------------------------------------------------------


@trio_test
async def test_statistics(tmp_path: Path) -> None:
    """All numbers are right after a short story."""
    codec = Codec()
    async with backed_store(tmp_path) as (store, _):
        statistics = store.statistics()
        assert statistics.size_bytes == 512 * PAGE_SIZE
        assert statistics.pool_limit_bytes == statistics.pool_configured_bytes == 64 * PAGE_SIZE
        assert statistics.pool_ready_bytes == 64 * PAGE_SIZE
        assert statistics.stored_pages == statistics.pool_used_bytes == 0
        await put(
            store, 0, page_of_word(0) + page_of_word(ODD_WORD) + page_of_word(1 << 63) + page_of_word((1 << 64) - 1)
        )
        await put(store, 10, pages(4, HALF, 10))
        await put(store, 20, pages(2, RAW, 20))
        statistics = store.statistics()
        assert statistics.stored_pages == 10
        assert statistics.same_filled_pages == 4
        assert statistics.raw_pages == 2
        zpages = [codec.encode(page(number)) for number in range(10, 14)]
        assert statistics.compressed_bytes == sum(map(len, zpages)) + 2 * 12
        dense = store.memory.packing.name == "dense"  # the odd words share a frame with others
        frames = 2 + (not dense) + 2
        assert statistics.pool_used_bytes == frames * PAGE_SIZE
        assert statistics.pool_ready_bytes == (64 - frames) * PAGE_SIZE
        assert sum(store.state.allocator.chunk_histogram()) == 6
        assert store.state.allocator.chunk_histogram()[1] == 2
        assert sum(store.state.allocator.unbuddied_lists()) == 2 * dense
        assert len(store.state.allocator.chunk_histogram()) == len(store.state.allocator.unbuddied_lists()) == NCHUNKS
        assert store.zbud_counters()["pers_zpages"] == 6
        await get(store, 0, 30)
        await get(store, 10)
        await drop(store, 11, 3)
        await drop(store, 100, 3)
        await put(store, 10, page_of_word(3))
        statistics = store.statistics()
        assert statistics.cumul_written_pages == 11
        assert statistics.cumul_read_pages == 31
        assert statistics.cumul_discarded_pages == 3
        assert statistics.stored_pages == 7
        assert statistics.same_filled_pages == 5
        assert statistics.written_back_pages == statistics.cumul_writeback_pages == statistics.cumul_pagein_pages == 0
        for number in range(200, 250):
            await put(store, number, page(number, BIG))
        await until(lambda: store.statistics().cumul_writeback_frames > 0, "a writeback")
        await quiet(store)
        statistics = store.statistics()
        assert statistics.written_back_pages == statistics.cumul_writeback_pages > 0
        assert statistics.same_filled_pages == 5
        assert statistics.raw_pages == 2
        assert statistics.stored_pages == 57
        assert statistics.cumul_writeback_bytes == statistics.cumul_writeback_frames * PAGE_SIZE
        assert statistics.backing_used_bytes == statistics.cumul_writeback_bytes
        assert statistics.backing_ready_bytes == statistics.cumul_grown_bytes + PAGE_SIZE >= 256 << 10
        cold = next(number for number in range(200, 250) if in_block(store, number))
        await get(store, cold, 2)
        now = store.statistics()
        assert now.cumul_pagein_pages == now.cumul_pagein_blocks == 2
        back = 2 + 2 * dense  # the odd words went out with them
        assert now.written_back_pages == statistics.written_back_pages - back
        assert store.zbud_counters()["eph_zpages"] == back
        assert (now.lost_pages, now.pagein_failures, now.writeback_failures, now.refused_pool_full) == (0, 0, 0, 0)
        assert now.pressure_reports == 0


def test_a_closed_store_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    """The backing file is empty after close."""

    async def main() -> None:
        async with backed_store(tmp_path) as (store, _):
            for number in range(100):
                await put(store, number, page(number, BIG))
            assert (tmp_path / "backing").stat().st_size > 0

    run(main)
    assert (tmp_path / "backing").stat().st_size == 0


@trio_test
async def test_two_stores_are_apart(tmp_path: Path) -> None:
    """Two stores in one process share nothing."""
    one = PageStore(SIZE, 8, FaultyBacking(str(tmp_path / "one")), Codec())
    two = PageStore(SIZE, 8, FaultyBacking(str(tmp_path / "two")), Codec())
    async with running(one), running(two):
        for number in range(PAGES):
            await put(one, number, page(number, BIG))
            await put(two, number, page(number + 1000, BIG))
        assert await get(one, 0, PAGES) == pages(PAGES, BIG)
        assert await get(two, 0, PAGES) == pages(PAGES, BIG, 1000)
        await quiet(one)
        await quiet(two)
