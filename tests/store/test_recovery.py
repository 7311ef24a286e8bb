# SPDX-License-Identifier: MIT
"""A worker dies at any moment, and the next one finds each page old or new.

A dead worker leaves the bytes of its memory and its file. So the test copies the memory between any two lines of the
store while it works, rebuilds from the copy, and reads each page there.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
import trio.testing

import zbudfs
from tests.core.samples import BIG, HALF, RAW, SMALL, page, pages
from tests.store.rig import (
    backed_store,
    calm,
    drop,
    forge_handle,
    get,
    in_block,
    let_go,
    place_of,
    put,
    quiet,
    running,
    trio_test,
    until,
)
from zbudfs.core.allocator import REF_BITS, FrameState
from zbudfs.core.block_map import SEGMENT_BLOCKS, BlockMap
from zbudfs.core.codec import Codec, page_of_word
from zbudfs.core.errors import PageLost
from zbudfs.core.page_table import (
    ABSENT,
    BLOCK,
    FRAME,
    KIND_BITS,
    KIND_MASK,
    LOST,
    RAW_BLOCK,
    RAW_FRAME,
    REF_MASK,
    word_of_entry,
)
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.backing import Backing
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.pool import Pool
from zbudfs.store.recovery import Recovery, rebuild
from zbudfs.store.state import State

pytestmark = pytest.mark.usefixtures("packing")

PAGES = 40
FRAMES = 12
ZEROS = bytes(PAGE_SIZE)
ODD_WORD = page_of_word(0x0102030405060708)
CHANGING = ("state.py", "allocator.py", "zbud.py", "dense.py", "block_map.py", "page_table.py")
"""The code that changes state."""
HERE = str(Path(zbudfs.__file__).parent)


class Heir:
    """The memory of a store, copied at some moment, and the state that the next worker rebuilds."""

    def __init__(self, store: PageStore, path: Path) -> None:
        self._source = store.memory
        self._path = path
        backed = self._source.blocks is not None
        self._memory = StoreMemory(self._source.size_bytes, self._source.nr_frames, backed=backed)
        self._codec = Codec()

    def take_over(self) -> tuple[State, Recovery]:
        """Copy the present memory, and rebuild."""
        for source, mine in zip(self._source.arenas, self._memory.arenas, strict=True):
            if source is self._source.request_slots:
                continue
            mine.release(0, mine.size)
            for offset, length in source.populated():
                mine.view[offset : offset + length] = source.view[offset : offset + length]
        memory = self._memory
        blocks = None
        if memory.blocks is not None:
            blocks = BlockMap(memory.blocks.view, memory.nr_segments, attach=True)
        table = memory.page_table()
        state = State(table, Pool(memory, attach=True), blocks)
        found = rebuild(state)
        state.check()
        return state, found

    def page(self, state: State, number: int) -> bytes:
        """Read a page in the steps that the head of core/page_table.py describes. Raises PageLost."""
        entry = state.table.entries[number]
        kind, ref = entry & KIND_MASK, entry >> KIND_BITS & REF_MASK
        allocator = state.pool.allocator
        if kind == ABSENT:
            return ZEROS
        if kind < FRAME:
            return page_of_word(word_of_entry(entry))
        if kind not in (FRAME, RAW_FRAME):
            bounce = state.pool.bounce[0]
            with self._path.open("rb") as file:
                file.seek((ref >> REF_BITS) << PAGE_SHIFT)
                allocator.frame_bytes(bounce)[:] = file.read(PAGE_SIZE)
            ref = bounce << REF_BITS | ref & ((1 << REF_BITS) - 1)
        if kind in (RAW_FRAME, RAW_BLOCK):
            return bytes(allocator.frame_bytes(ref >> REF_BITS))
        zpage = allocator.zpage(ref, number)
        if zpage is None:
            raise PageLost(f"page {number} has another handle")
        return self._codec.decode(zpage)

    def close(self) -> None:
        """Drop the copy."""
        let_go(self._memory)


@contextlib.contextmanager
def interrupted(seed: str, moment: Any) -> Iterator[None]:
    """Call `moment` between lines of core/ and store/, most often where state changes."""
    generator = random.Random(seed)

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(HERE) or frame.f_code.co_name in ("check", "statistics", "counters"):
            return None
        often = 0.08 if name.endswith(CHANGING) else 0.01
        if event == "line" and generator.random() < often:
            moment()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("seed", range(3))
@trio_test
async def test_a_worker_dies_between_any_two_lines(tmp_path: Path, seed: int, backed: bool) -> None:
    """During writes, patches, discards, writeback and page-in, no page is lost or wrong, and each is old or new."""
    path = tmp_path / "backing"
    frames = FRAMES if backed else 2 * PAGES
    # Nothing can be called between lines of C: tests/store/test_hot.py kills there.
    store = PageStore(PAGES * PAGE_SIZE, frames, Backing(str(path)) if backed else None, Codec(), pure=True)
    generator = random.Random(seed)
    old = [ZEROS] * PAGES
    new = list(old)
    moments = 0
    async with running(store):
        heir = Heir(store, path)

        def moment() -> None:
            nonlocal moments
            moments += 1
            state, found = heir.take_over()
            assert found.lost_pages == 0
            assert found.stored_pages == state.table.stored_pages
            for number in range(PAGES):
                there = heir.page(state, number)
                assert there == old[number] or there == new[number], f"page {number}"

        with interrupted(f"{seed} {backed}", moment):
            for step in range(120):
                number, count = generator.randrange(PAGES - 3), generator.choice([1, 1, 2, 3])
                what = generator.random()
                if what < 0.5:
                    noise = generator.choice([SMALL, HALF, HALF, BIG, RAW])
                    content = pages(count, noise, step * 100 + seed * 10**6)
                    if what < 0.05:
                        content = (ODD_WORD + page_of_word(step) * 3)[: count * PAGE_SIZE]
                    new[number : number + count] = [
                        content[at : at + PAGE_SIZE] for at in range(0, count * PAGE_SIZE, PAGE_SIZE)
                    ]
                    await put(store, number, content)
                elif what < 0.6:
                    new[number] = new[number][:100] + b"%9d" % step + new[number][109:]
                    await store.requests.write(number * PAGE_SIZE + 100, b"%9d" % step)
                elif what < 0.7:
                    new[number : number + count] = [ZEROS] * count
                    await drop(store, number, count)
                else:
                    assert await get(store, number, count) == b"".join(new[number : number + count])
                old = list(new)
                await trio.lowlevel.checkpoint()
        await quiet(store)
        moment()
        heir.close()
        assert moments > 100
        if backed:
            assert store.statistics().cumul_writeback_frames > 10
            assert store.statistics().cumul_pagein_pages > 3


@trio_test
async def test_the_next_worker_goes_on(tmp_path: Path) -> None:
    """A store over the memory and the file of another serves all of it, with its counters, and works on."""
    path = tmp_path / "backing"
    first = PageStore(512 * PAGE_SIZE, 64, Backing(str(path)), Codec())
    assert first.backing is not None
    expected = {number: page(number, (BIG, HALF, RAW)[number % 3]) for number in range(120)}
    expected |= {200: ODD_WORD, 201: page_of_word(7)}
    async with trio.open_nursery() as nursery:
        await nursery.start(first.run)
        for number, content in expected.items():
            await put(first, number, content)
        for number in range(0, 30, 3):
            await get(first, number)
        await drop(first, 119)
        await quiet(first)
        nursery.cancel_scope.cancel()
    expected[119] = ZEROS
    before = first.statistics()
    assert before.written_back_pages > 20
    second = PageStore(512 * PAGE_SIZE, 64, Backing(str(path), os.dup(first.backing.fileno())), Codec(), first.memory)
    found = second.recover()
    assert (found.stored_pages, found.lost_pages) == (121, 0)
    second.state.check()
    after = second.statistics()
    for name in (
        "stored_pages",
        "same_filled_pages",
        "raw_pages",
        "written_back_pages",
        "pool_used_bytes",
        "backing_ready_bytes",
        "cumul_writeback_bytes",
        "cumul_writeback_pages",
        "cumul_read_pages",
        "cumul_discarded_pages",
    ):
        assert getattr(after, name) == getattr(before, name), name
    assert second.zbud_counters()["eph_pageframes"] == 0
    assert found.frames == after.pool_used_bytes // PAGE_SIZE
    assert found.blocks == after.backing_used_bytes // PAGE_SIZE
    async with running(second):
        for number, content in expected.items():
            assert await get(second, number) == content, f"page {number}"
        for number in range(300):
            expected[number] = page(number + 5000, BIG)
            await put(second, number, expected[number])
        for number, content in expected.items():
            assert await get(second, number) == content, f"page {number}"
        await quiet(second)
        await drop(second, 0, 512)
        assert second.statistics().pool_used_bytes == second.statistics().backing_used_bytes == 0
        await quiet(second)


@trio_test
async def test_trimmed_frames_are_free_afterwards(tmp_path: Path) -> None:
    """Frames without memory are recognised, also between others."""
    store = PageStore(4096 * PAGE_SIZE, 4096, None, Codec())
    async with running(store):
        for number in range(0, 4096, 64):
            await put(store, number, page(number, RAW) * 64)
        for number in range(0, 4096, 4):
            await drop(store, number, 3)
        await calm(store)
        await until(lambda: store.memory.frames.resident_bytes < 3000 * PAGE_SIZE, "memory is given back")
        await quiet(store)
        heir = Heir(store, tmp_path / "none")
        state, found = heir.take_over()
        assert found == Recovery(1024, 0, 1024, 0)
        assert state.pool.used_frames == 1024
        assert all(heir.page(state, number) == page(number // 64 * 64, RAW) for number in range(3, 4096, 4))
        state.pool.check()
        heir.close()


@pytest.mark.parametrize("damage", ["handle", "raw", "no such frame", "no such block", "a hole", "the header", "taken"])
@trio_test
async def test_a_contradicted_page_is_lost_alone(tmp_path: Path, damage: str) -> None:
    """An entry that its frame or block contradicts is a lost page, and counted. Others are right, and a write heals it."""
    async with backed_store(tmp_path, nr_pages=4096) as (store, _):
        expected = {number: page(number, RAW if number == 30 else BIG) for number in range(49)}
        for number, content in expected.items():
            await put(store, number, content)
        await until(lambda: store.statistics().cumul_writeback_frames == 17, "a round is over")
        await quiet(store)
        await get(store, 30)
        entries, allocator = store.state.table.entries, store.state.pool.allocator
        assert in_block(store, 0)
        assert not in_block(store, 30)
        assert not in_block(store, 40)
        if damage == "handle":
            victim = 40
            forge_handle(store, victim, owner=victim ^ 2)
        elif damage == "raw":
            victim = 30
            allocator.frame_bytes(place_of(store, victim)[0])[77] ^= 1
        elif damage == "no such frame":
            victim = 40
            entries[victim] = 1 << 20 << KIND_BITS | FRAME
        elif damage == "taken":
            victim = 1
            entries[victim] = entries[0]
        else:
            victim = 0
            block = {"no such block": 1 << 30, "a hole": 60 * SEGMENT_BLOCKS, "the header": 0}[damage]
            entries[victim] = block << REF_BITS << KIND_BITS | BLOCK
        heir = Heir(store, tmp_path / "backing")
        state, found = heir.take_over()
        assert found.lost_pages == 1
        assert state.table.entries[victim] == LOST
        for number, content in expected.items():
            if number != victim:
                assert heir.page(state, number) == content, f"page {number}"
        state.put_word(victim, 5)
        state.check()
        assert heir.page(state, victim) == page_of_word(5)
        heir.close()


@trio_test
async def test_a_lost_page_is_an_error_until_it_is_written(tmp_path: Path) -> None:
    """The next worker answers a lost page with an error, counts it, and accepts a new version."""
    first = PageStore(PAGES * PAGE_SIZE, 64, None, Codec())
    async with trio.open_nursery() as nursery:
        await nursery.start(first.run)
        await put(first, 0, pages(10, BIG))
        nursery.cancel_scope.cancel()
    first.state.pool.allocator.frame_bytes(place_of(first, 4)[0])[:8] = bytes(8)
    second = PageStore(PAGES * PAGE_SIZE, 64, None, Codec(), first.memory)
    assert second.recover().lost_pages == 1
    async with running(second):
        assert second.statistics().lost_pages == 1
        assert await get(second, 0, 10) == pages(4, BIG)
        for _ in range(2):
            with pytest.raises(PageLost):
                await get(second, 4)
        with pytest.raises(PageLost):
            await second.requests.write(4 * PAGE_SIZE + 5, b"patch")
        assert await get(second, 5, 5) == pages(5, BIG, 5)
        await put(second, 4, page(44, BIG))
        assert await get(second, 4) == page(44, BIG)
        await quiet(second)


@trio_test
async def test_zombies_and_copies_become_persistent(tmp_path: Path) -> None:
    """A zombie and a clean copy of a block are the only copy afterwards, and the block is free."""
    async with backed_store(tmp_path) as (store, backing):
        for number in range(49):
            await put(store, number, page(number, BIG))
        await until(lambda: store.statistics().cumul_writeback_frames == 17, "a round is over")
        await quiet(store)
        for number in range(5):
            await get(store, number)
        heir = Heir(store, tmp_path / "backing")
        with backing.held("write_blocks") as gate:
            for number in range(100, 130):
                if not gate.held:
                    await put(store, number, page(number, BIG))
                    await trio.testing.wait_all_tasks_blocked()
            await until(lambda: bool(gate.held), "a write is held")
            state, found = heir.take_over()
            states = {state.pool.allocator.state(frame) for frame in range(64)}
            assert states <= {FrameState.FREE, FrameState.PERSISTENT}
            in_blocks = store.statistics().written_back_pages
            assert found.blocks == in_blocks < store.statistics().backing_used_bytes // PAGE_SIZE
            for number in range(49):
                assert heir.page(state, number) == page(number, BIG)
        await quiet(store)
        heir.close()
