# SPDX-License-Identifier: MIT
"""A new store on the memory of a dead one: everything is rebuilt from the page table and the frames.

The dead store is an object that the test drops between two checkpoints, with its zombies, half filled frames and held
blocks. (test_crash_points.py has deaths inside of a change.) Damage costs its own page, and no other.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.frames import lru_of
from tests.core.samples import BIG, HALF, RAW, SMALL, page
from tests.store.rig import (
    block_of,
    drop,
    forge_handle,
    get,
    in_block,
    in_ram,
    kind_of,
    let_go,
    place_of,
    put,
    run,
    trio_test,
)
from zbudfs.core.allocator import EPHEMERAL_KIND, PERSISTENT_KIND, REF_BITS, FrameState
from zbudfs.core.block_map import SEGMENT_BLOCKS
from zbudfs.core.codec import Codec, check_of_raw, page_of_word
from zbudfs.core.errors import LayoutError, PageLost
from zbudfs.core.page_table import BLOCK, FRAME, LOST, RAW_BLOCK, RAW_FRAME, WORD, entry
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.backing import Backing
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.status_area import LAYOUT, Field

pytestmark = pytest.mark.usefixtures("packing")

PAGES: Final = 64
FRAMES: Final = 32
ZEROS: Final = bytes(PAGE_SIZE)
ODD_WORD: Final = page_of_word(0x3FB999999999999A)
"""A word that does not fit the page table: a zpage of one chunk."""


class Kept(Backing):
    """A backing file that outlives its stores."""

    def close(self) -> None:
        """Leave the file as it is."""


class Life:
    """Memory and backing file, and their present store. `model` is the content of each page."""

    def __init__(self, folder: Path, nr_pages: int = PAGES, nr_frames: int = FRAMES, *, backed: bool = True) -> None:
        self.nr_pages = nr_pages
        self.nr_frames = nr_frames
        self.memory = StoreMemory(nr_pages * PAGE_SIZE, nr_frames, backed=backed)
        self.memory.populate()
        self.backing = Kept(str(folder / "backing")) if backed else None
        self.model: dict[int, bytes] = {}
        self.store = self._fresh()
        self.store.recover()

    def _fresh(self) -> PageStore:
        return PageStore(self.nr_pages * PAGE_SIZE, self.nr_frames, self.backing, Codec(), self.memory)

    def die(self) -> None:
        """Drop the store, and make a new one, which has to recover."""
        self.store.close()
        self.store = self._fresh()

    def end(self) -> None:
        """Close everything."""
        self.store.close()
        let_go(self.memory)
        if self.backing is not None:
            os.close(self.backing.fileno())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[PageStore]:
        """Run the store's tasks for the block, and cancel them at the end, in any state."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.store.run)
            yield self.store
            nursery.cancel_scope.cancel()

    async def put(self, number: int, content: bytes) -> None:
        """Write a page."""
        await put(self.store, number, content)
        self.model[number] = content

    async def compare(self, *lost: int) -> None:
        """Each page has the right content, except for the lost ones."""
        for number in range(self.nr_pages):
            if number in lost:
                with pytest.raises(PageLost):
                    await get(self.store, number)
            else:
                assert await get(self.store, number) == self.model.get(number, ZEROS), f"page {number}"

    def write_back(self, most: int) -> int:
        """Write the coldest frames to the backing file, like the reclaimer, and return their number."""
        state = self.store.state
        batch = state.begin_writeback(most)
        assert self.backing is not None
        for frame, block in batch:
            self.backing.write_blocks(block, [state.pool.allocator.frame_bytes(frame)])
        return state.finish_writeback(batch)

    @property
    def entries(self) -> memoryview:
        """Return the page table as it lies in memory."""
        return self.memory.pages.view[: 8 * self.nr_pages].cast("Q")


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    """Return a store that can die."""
    made = Life(tmp_path)
    yield made
    made.end()


async def fill(life: Life) -> None:
    """Store a page of each kind: paired, alone, raw and words in RAM; paired and raw in blocks, and copies of these."""
    async with life.running():
        for number in (20, 21, 22, 23, 24, 25):
            await life.put(number, page(number))
        for number in (26, 27):
            await life.put(number, page(number, RAW))
        assert life.write_back(5) == 5
        for number in (22, 27):
            await get(life.store, number)
        for number, content in (
            *((0, page(0)), (1, page(1)), (2, page(2, BIG)), (3, page(3, RAW)), (4, page_of_word(4))),
            *((5, ODD_WORD), (6, page(6)), (7, page(7)), (8, page_of_word((1 << 64) - 9)), (9, page(9, RAW))),
        ):
            await life.put(number, content)
    kinds = {0: FRAME, 3: RAW_FRAME, 4: WORD, 5: FRAME, 20: BLOCK, 22: FRAME, 26: RAW_BLOCK, 27: RAW_FRAME}
    assert {number: kind_of(life.store, number) for number in kinds} == kinds
    assert len(copies(life.store)) == 2


def copies(store: PageStore) -> list[int]:
    """Return the frames that are copies of blocks."""
    return lru_of(store.state.pool.allocator, EPHEMERAL_KIND)


# ---- correct state stays -------------------------------------------------------------------------------------------


@trio_test
async def test_every_kind_of_entry(life: Life) -> None:
    """Pages of each kind are in their places, and everything adds up."""
    await fill(life)
    before = life.entries.tolist()
    life.die()
    found = life.store.recover()
    life.store.check()
    assert life.entries.tolist() == before
    frames = {place_of(life.store, number)[0] for number in life.model if in_ram(life.store, number)}
    assert (found.stored_pages, found.lost_pages, found.frames, found.blocks) == (18, 0, len(frames), 3)
    await life.compare()
    life.store.check()


@trio_test
async def test_statistics_are_rebuilt(life: Life) -> None:
    """Present numbers, unlike those since the mount, are as before. An ephemeral zpage is a persistent one."""
    await fill(life)
    old, old_zbud, old_histogram = (
        life.store.statistics(),
        life.store.zbud_counters(),
        life.store.state.allocator.chunk_histogram(),
    )
    life.die()
    life.store.recover()
    new, zbud = life.store.statistics(), life.store.zbud_counters()
    for name in (
        *("stored_pages", "same_filled_pages", "raw_pages", "compressed_bytes", "written_back_pages"),
        *("pool_used_bytes", "pool_limit_bytes", "backing_ready_bytes"),
    ):
        assert getattr(new, name) == getattr(old, name), name
    assert new.backing_used_bytes == old.backing_used_bytes - 2 * PAGE_SIZE  # the blocks of the copies
    assert life.store.state.allocator.chunk_histogram() == old_histogram
    for name in ("pageframes", "zpages", "zbytes", "buddied_count", "unbuddied_count", "raw_count"):
        assert zbud[f"eph_{name}"] == 0
        assert zbud[f"pers_{name}"] == old_zbud[f"pers_{name}"] + old_zbud[f"eph_{name}"], name


@trio_test
async def test_nothing_but_pages_and_frames_is_trusted(life: Life) -> None:
    """The allocator's columns, the free frames and the block map may have any content, except for the ready segments."""
    await fill(life)
    source = random.Random(3)
    assert life.memory.blocks is not None
    nr_segments = life.memory.nr_segments
    ready_at = nr_segments * (8 + SEGMENT_BLOCKS + 8) + 8 * (SEGMENT_BLOCKS + 2)
    assert bytes(life.memory.blocks.view[ready_at : ready_at + nr_segments]) == b"\1" * nr_segments
    for view in (
        *(life.memory.frame_table.view, life.memory.free_frames.view),
        life.memory.blocks.view[:ready_at],
    ):
        view[:] = source.randbytes(len(view))
    life.die()
    assert life.store.recover().lost_pages == 0
    life.store.check()
    await life.compare()


@trio_test
async def test_copies_become_originals(life: Life) -> None:
    """An ephemeral frame is persistent afterwards, and its block is free: the frame will be written back again."""
    await fill(life)
    frames = copies(life.store)
    used = life.store.statistics().backing_used_bytes
    life.die()
    life.store.recover()
    assert copies(life.store) == []
    persistent = set(lru_of(life.store.state.pool.allocator, PERSISTENT_KIND))
    assert persistent >= set(frames)
    assert life.store.statistics().backing_used_bytes == used - 2 * PAGE_SIZE
    assert life.write_back(FRAMES) == len(persistent)
    life.store.check()
    assert in_block(life.store, 22)
    await life.compare()


@trio_test
async def test_raw_frames_are_the_oldest(life: Life) -> None:
    """The order of the LRU is lost, but raw frames, which hold one page each, still go out first."""
    await fill(life)
    life.die()
    life.store.recover()
    allocator = life.store.state.pool.allocator
    raw = [allocator.is_raw(frame) for frame in lru_of(allocator, PERSISTENT_KIND)]
    assert raw == sorted(raw, reverse=True)
    assert sum(raw) == 3


@trio_test
async def test_a_zombie_of_which_a_page_went(life: Life) -> None:
    """A page that was overwritten in a zombie is new, its neighbour is there, and the blocks are free."""
    await fill(life)
    batch = life.store.state.begin_writeback(4)
    assert len(batch) == 4
    await life.put(0, page(100, SMALL))
    life.die()
    found = life.store.recover()
    life.store.check()
    assert found.blocks == 3
    allocator = life.store.state.pool.allocator
    assert {allocator.state(frame) for frame, _ in batch} <= {FrameState.PERSISTENT, FrameState.FREE}
    await life.compare()


@trio_test
async def test_a_frame_that_is_being_filled_is_free(life: Life) -> None:
    """A block was being read into a frame: its page is still in the block, the frame is free, and the block is not held."""
    await fill(life)
    state = life.store.state
    block = block_of(life.store, 20)
    state.hold_block(block)
    frame = state.pool.take_frame()
    state.pool.allocator.fill_prep(frame)
    life.die()
    life.store.recover()
    life.store.check()
    state = life.store.state
    assert block_of(life.store, 20) == block
    assert state.blocks is not None
    assert state.blocks.live(block) == 0b11
    assert state.pool.allocator.state(frame) is FrameState.FREE
    await life.compare()


def test_frames_with_memory_are_ready_and_no_others(tmp_path: Path) -> None:
    """Populated frames are used at once, and the others have no memory afterwards either."""
    life = Life(tmp_path, nr_pages=256, nr_frames=256)
    life.memory.populate_frames([(0, 20), (40, 5)])
    resident = life.memory.frames.resident_bytes
    life.die()
    found = life.store.recover()
    assert (found.stored_pages, found.frames) == (0, 0)
    life.store.check()
    assert life.store.statistics().pool_ready_bytes == 25 * PAGE_SIZE
    assert life.memory.frames.resident_bytes == resident
    pool = life.store.state.pool
    taken = {pool.take_frame() for _ in range(25)}
    assert taken == {*range(20), *range(40, 45)}
    assert pool.take_frame() == -1
    bare: set[int] = set()
    while runs := pool.take_bare():
        bare |= {frame for first, count in runs for frame in range(first, first + count)}
        pool.add_ready(runs)
    assert bare == set(range(256)) - taken
    life.end()


def test_bounce_frames_are_no_pool_frames(life: Life) -> None:
    """The frames behind the pool have memory, and are never taken for ready ones."""
    life.die()
    life.store.recover()
    assert life.memory.frames.resident_bytes > 0
    assert life.store.statistics().pool_ready_bytes == 0
    life.store.check()


@trio_test
async def test_ready_segments_stay_ready(life: Life) -> None:
    """Ready segments of the backing file are used at once: nothing grows again, and the size is known."""
    await fill(life)
    old = life.store.statistics()
    assert old.backing_ready_bytes > 0
    assert life.backing is not None
    life.die()
    life.store.recover()
    assert life.store.statistics().backing_ready_bytes == old.backing_ready_bytes
    async with life.running():
        await life.compare()
    assert life.store.statistics().cumul_grown_bytes == old.cumul_grown_bytes
    blocks = life.store.state.blocks
    assert blocks is not None
    assert blocks.ready_segments * SEGMENT_BLOCKS == blocks.free_blocks + blocks.used_blocks + 1  # and the header


@trio_test
async def test_counters_go_on(life: Life) -> None:
    """Counts since the mount continue from their exact value."""
    await fill(life)
    before = life.store.statistics()
    assert min(before.cumul_written_pages, before.cumul_writeback_pages, before.cumul_pagein_blocks) > 0
    await life.put(60, page(60))
    life.die()
    life.store.recover()
    after = life.store.statistics()
    for name in dir(before):
        if name.startswith("cumul_") or name.endswith("_failures") or name in ("refused_pool_full", "lost_pages"):
            assert getattr(after, name) == getattr(before, name) + (name == "cumul_written_pages"), name
    await life.put(61, page(61))
    assert life.store.statistics().cumul_written_pages == before.cumul_written_pages + 2


def test_recovering_nothing(tmp_path: Path) -> None:
    """On unused memory, a recovered store is a new one."""
    fresh = PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec())
    alone = Life(tmp_path, backed=False)
    assert alone.store.statistics() == fresh.statistics()
    assert alone.store.zbud_counters() == fresh.zbud_counters()
    assert alone.store.state.allocator.unbuddied_lists() == fresh.state.allocator.unbuddied_lists()
    alone.store.check()
    fresh.close()
    let_go(fresh.memory)
    alone.end()


@trio_test
async def test_recovering_twice(life: Life) -> None:
    """A store that dies at once leaves the state unchanged."""
    await fill(life)
    life.die()
    first = life.store.recover()
    life.die()
    assert life.store.recover() == first
    life.store.check()
    await life.compare()


def test_a_place_in_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Without a backing file no page can be in a block."""
    life = Life(tmp_path, backed=False)

    async def main() -> None:
        async with life.running():
            for number, noise in enumerate((SMALL, HALF, HALF, BIG, RAW)):
                await life.put(number, page(number, noise))
        life.entries[50] = entry(BLOCK, 2, 1)
        life.die()
        assert life.store.recover().lost_pages == 1
        life.store.check()
        await life.compare(50)

    run(main)
    life.end()


# ---- damage costs its own page, and no other -------------------------------------------------------------------------

Damage = Callable[[Life], int]
"""A function that damages the memory of a dead store, and returns the page that this costs."""


def _another_handle(life: Life) -> int:
    forge_handle(life.store, 0, owner=1)
    return 0


def _size(size: int) -> Damage:
    def damage(life: Life) -> int:
        forge_handle(life.store, 2, size=size)
        return 2

    return damage


def _overlap(life: Life) -> int:
    forge_handle(life.store, 1, size=3000)  # its buddy has 1900
    return 1


def _entry(kind: int, ref: int) -> Damage:
    def damage(life: Life) -> int:
        life.entries[40] = entry(kind, ref, 5)
        return 40

    return damage


def _same_place(kind: int, owner: int) -> Damage:
    def damage(life: Life) -> int:
        assert kind_of(life.store, owner) == kind
        life.entries[40] = life.entries[owner]
        return 40

    return damage


def _raw_in_anothers_frame(life: Life) -> int:
    frame = place_of(life.store, 0)[0]
    content = life.memory.frames.view[frame * PAGE_SIZE : (frame + 1) * PAGE_SIZE]
    life.entries[40] = entry(RAW_FRAME, frame << REF_BITS, check_of_raw(content))  # even with the right check
    return 40


def _raw_content(life: Life) -> int:
    life.memory.frames.view[place_of(life.store, 3)[0] * PAGE_SIZE + 17] ^= 1
    return 3


def _second_place(number: int) -> Damage:
    def damage(life: Life) -> int:
        life.entries[number] |= 1 << 3  # alone in its frame, at the first place
        return number

    return damage


def _frame_without_memory(life: Life) -> int:
    assert life.store.state.pool.allocator.state(0) is FrameState.FREE
    life.memory.frames.release(0, PAGE_SIZE)
    life.entries[40] = entry(FRAME, 0, 5)
    return 40


def _block_in_a_hole(life: Life) -> int:
    assert life.store.state.blocks is not None
    hole = life.store.state.blocks.take_free(0)
    assert hole > 0
    life.entries[40] = entry(BLOCK, hole * SEGMENT_BLOCKS << REF_BITS, 5)
    return 40


DAMAGES: Final[dict[str, Damage]] = {
    "a handle that says another page": _another_handle,
    "a size of nothing": _size(0),
    "a size beyond a buddy": _size(4050),
    "the largest size there is": _size(4095),
    "buddies that overlap": _overlap,
    "a buddy that is not there": _second_place(2),
    "a raw frame at its second place": _second_place(3),
    "a raw frame that is not the content": _raw_content,
    "a raw frame that is another's": _raw_in_anothers_frame,
    "a frame out of range": _entry(FRAME, FRAMES << REF_BITS),
    "a bounce frame": _entry(FRAME, (FRAMES + 1) << REF_BITS),
    "a frame beyond all memory": _entry(FRAME, (1 << 36) - 2),
    "a raw frame out of range": _entry(RAW_FRAME, FRAMES << REF_BITS),
    "a raw frame beyond all memory": _entry(RAW_FRAME, (1 << 36) - 1),
    "a frame without memory": _frame_without_memory,
    "a free frame": _entry(FRAME, 1),
    "a free frame as a raw one": _entry(RAW_FRAME, 0),
    "a block out of range": _entry(BLOCK, 1 << 30),
    "a raw block out of range": _entry(RAW_BLOCK, 1 << 30),
    "a block in a hole": _block_in_a_hole,
    "the header": _entry(BLOCK, 0),
    "a frame of two": _same_place(FRAME, 0),
    "a raw frame of two": _same_place(RAW_FRAME, 3),
    "a block of two": _same_place(BLOCK, 20),
    "a raw block of two": _same_place(RAW_BLOCK, 26),
}


@pytest.mark.parametrize("name", DAMAGES)
@trio_test
async def test_damage_costs_one_page(name: str, life: Life) -> None:
    """The page is EIO and counted, no other changes, and a write or a discard heals it."""
    await fill(life)
    number = DAMAGES[name](life)
    life.die()
    assert life.store.recover().lost_pages == 1
    assert life.entries[number] == LOST
    life.store.check()
    assert life.store.statistics().lost_pages == 1
    await life.compare(number)
    assert life.store.statistics().lost_pages == 2  # and the read of it

    life.die()  # it stays lost, and is not counted again
    assert life.store.recover().lost_pages == 0
    life.store.check()
    await life.compare(number)

    async with life.running():
        if len(name) % 2:
            await life.put(number, page(1000))
        else:
            await drop(life.store, number)
            life.model[number] = ZEROS
        life.store.check()
        await life.compare()
    life.store.check()


@trio_test
async def test_a_part_of_a_lost_page_cannot_be_written(life: Life) -> None:
    """The rest of the page is unknown: the write is an error, the page stays lost, and its neighbours can be read."""
    await fill(life)
    number = _another_handle(life)
    life.die()
    life.store.recover()
    async with life.running() as store:
        with pytest.raises(PageLost):
            await store.requests.write(number * PAGE_SIZE + 5, b"part")
        with pytest.raises(PageLost):
            await store.requests.discard(number * PAGE_SIZE + 5, 9)
        with pytest.raises(PageLost):
            await get(store, number, 2)
        assert await get(store, number + 1, 2) == life.model[number + 1] + life.model[number + 2]
        await life.compare(number)
    life.store.check()


@trio_test
async def test_a_block_claimed_by_an_earlier_page(life: Life) -> None:
    """A read shows which of two pages is in a block. The other one is an error, and never wrong bytes."""
    await fill(life)
    life.entries[10] = life.entries[20]
    life.die()
    assert life.store.recover().lost_pages == 1
    async with life.running():
        await life.compare(10, 20)


@trio_test
async def test_all_damages_at_once(life: Life) -> None:
    """Each damage costs its own page. A discard of everything leaves a store that is empty and sound."""
    await fill(life)
    lost = {_another_handle(life), _raw_content(life)}
    for number, kind in enumerate((FRAME, RAW_FRAME, BLOCK, RAW_BLOCK), 40):
        life.entries[number] = entry(kind, 5 << 20, 1)
        lost.add(number)
    life.die()
    assert life.store.recover().lost_pages == len(lost)
    life.store.check()
    await life.compare(*lost)
    await drop(life.store, 0, PAGES)
    life.model.clear()
    life.store.check()
    await life.compare()
    counts = life.store.statistics()
    assert counts.pool_used_bytes == counts.backing_used_bytes == counts.stored_pages == 0


# ---- foreign memory --------------------------------------------------------------------------------------------------


def _make(
    folder: Path, size_bytes: int = PAGES * PAGE_SIZE, nr_frames: int = FRAMES, *, backed: bool = True
) -> StoreMemory:
    return StoreMemory(size_bytes, nr_frames, backed=backed, folder=str(folder))


MISTAKES: Final[dict[str, Callable[[Path], StoreMemory]]] = {
    "size_bytes": lambda folder: _make(folder, 2 * PAGES * PAGE_SIZE),
    "pool_frames": lambda folder: _make(folder, nr_frames=2 * FRAMES),
    "backed": lambda folder: _make(folder, backed=False),
}


@pytest.mark.parametrize("word", MISTAKES)
def test_memory_of_another_store(word: str, tmp_path: Path) -> None:
    """Memory for other numbers is refused with the difference, and does not change."""
    _make(tmp_path).pages.view[:8] = b"12345678"
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    with pytest.raises(LayoutError, match=f"another layout.*{word}"):
        MISTAKES[word](tmp_path)
    assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == sizes
    assert bytes(_make(tmp_path).pages.view[:8]) == b"12345678"


def test_memory_of_another_version(tmp_path: Path) -> None:
    """An unknown layout is refused in one line, with both numbers and the remedy."""
    memory = _make(tmp_path)
    memory.status_area.fields[Field.LAYOUT] = LAYOUT + 1
    with pytest.raises(LayoutError, match="another layout") as refusal:
        _make(tmp_path)
    for part in (f"{LAYOUT:#x}", f"{LAYOUT + 1:#x}", "restart it with the version that runs", "unmount"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert memory.status_area.fields[Field.LAYOUT] == LAYOUT + 1


def test_a_table_of_another_size(tmp_path: Path) -> None:
    """A file of the wrong length is refused by name."""
    _make(tmp_path)
    os.truncate(tmp_path / "frametable", 12345)
    with pytest.raises(LayoutError, match="frametable has 12345 bytes instead of"):
        _make(tmp_path)


# ---- at any moment -----------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 39)
NOTHING = st.just(0)
OPERATION = st.one_of(
    st.tuples(st.just("put"), NUMBERS, st.sampled_from([SMALL, HALF, HALF, BIG, RAW, 0])),
    st.tuples(st.just("discard"), NUMBERS, st.integers(1, 6)),
    st.tuples(st.just("get"), NUMBERS, st.integers(1, 4)),
    st.tuples(st.just("patch"), NUMBERS, st.integers(0, 4000)),
    st.tuples(st.just("write back"), NOTHING, st.integers(1, 5)),
    st.tuples(st.just("die in a writeback"), NOTHING, st.integers(1, 3)),
    st.tuples(st.just("drop a copy"), NOTHING, NOTHING),
    st.tuples(st.just("die"), NOTHING, NOTHING),
)


async def live_through(life: Life, operations: list[tuple[str, int, int]]) -> None:
    """Do the steps of Hypothesis, with the store's tasks and deaths on the way. The model must agree."""
    remaining = list(enumerate(operations, 1))
    while remaining:
        async with life.running() as store:
            while remaining:
                version, (kind, number, value) = remaining.pop(0)
                match kind:
                    case "put":
                        word = page_of_word((version & 7) << 61 | version)
                        await life.put(number, page(version, value) if value else word)
                    case "discard":
                        await drop(store, number, value)
                        life.model.update(dict.fromkeys(range(number, number + value), ZEROS))
                    case "get":
                        for at in range(number, number + value):
                            assert await get(store, at) == life.model.get(at, ZEROS)
                    case "patch":
                        await store.requests.write(number * PAGE_SIZE + value, b"patched")
                        old = life.model.get(number, ZEROS)
                        life.model[number] = old[:value] + b"patched" + old[value + 7 :]
                    case "write back":
                        life.write_back(value)
                    case "drop a copy":
                        store.state.drop_ephemeral()
                    case "die in a writeback":
                        store.state.begin_writeback(value)
                        break
                    case _:
                        break
        life.die()
        assert life.store.recover().lost_pages == 0
        life.store.check()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATION, min_size=5, max_size=60))
def test_at_any_moment(operations: list[tuple[str, int, int]]) -> None:
    """Each page has its last content after any steps and any number of deaths."""
    with tempfile.TemporaryDirectory(prefix="zbudfs-rebuild-") as folder:
        life = Life(Path(folder), nr_pages=48, nr_frames=16)

        async def main() -> None:
            await live_through(life, operations)
            await life.compare()
            life.store.check()

        try:
            run(main)
        finally:
            life.end()
