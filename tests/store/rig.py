# SPDX-License-Identifier: MIT
"""A page store that runs, on a clock that the test can push forward, and ways to look at where a page is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import trio
import trio.testing

from bench.stores import let_go as let_go
from bench.stores import running as running
from tests.store.faulty import FaultyBacking
from zbudfs.core.allocator import REF_BITS
from zbudfs.core.codec import Codec
from zbudfs.core.packing import Packing
from zbudfs.core.page_table import BLOCK, FRAME, KIND_BITS, KIND_MASK, RAW_BLOCK, RAW_FRAME, REF_MASK
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.pool import Pool
from zbudfs.store.reclaimer import CALM_SECONDS, TICK_SECONDS

LIMIT_SECONDS: Final = 60.0
"""Longest time that a whole test may take, on its own clock. A failure, not a measurement."""
POLL_SECONDS: Final = 0.001


_limit: Final = trio.lowlevel.RunVar[trio.CancelScope]("limit")


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test, limited in time. Its clock goes as fast as the real one, and `push` jumps."""

    async def limited() -> None:
        with trio.fail_after(LIMIT_SECONDS) as scope:
            _limit.set(scope)
            await main()

    trio.run(limited, clock=trio.testing.MockClock(rate=1.0))


def push(seconds: float) -> None:
    """Move the test's clock forward."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    _limit.get().deadline += seconds
    clock.jump(seconds)


def fill_reserve(pool: Pool) -> None:
    """Have memory come until as many frames are ready as may be, where no task does that."""
    while runs := pool.take_bare():
        pool.populate(runs)
        pool.add_ready(runs)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until something holds; a failure of the test if it does not."""
    try:
        with trio.fail_after(LIMIT_SECONDS / 3):
            while not condition():
                await trio.sleep(POLL_SECONDS)
    except trio.TooSlowError:
        raise AssertionError(f"waited in vain until {what}") from None


@contextlib.contextmanager
def packed_by(packing: Packing) -> Iterator[Packing]:
    """Have stores whose packing is not said use this one."""
    defaults = StoreMemory.__init__.__kwdefaults__
    assert defaults is not None
    before = defaults["packing"]
    defaults["packing"] = packing
    try:
        yield packing
    finally:
        defaults["packing"] = before


@contextlib.contextmanager
def pure_by_default(*, pure: bool) -> Iterator[None]:
    """Have stores for which nothing else is said keep the hot path in C out, or not."""
    defaults = PageStore.__init__.__kwdefaults__
    assert defaults is not None
    before = defaults["pure"]
    defaults["pure"] = pure
    try:
        yield
    finally:
        defaults["pure"] = before


@contextlib.contextmanager
def made_pool(nr_frames: int) -> Iterator[Pool]:
    """Have a pool without a store."""
    memory = StoreMemory(nr_frames << PAGE_SHIFT, nr_frames, backed=False)
    try:
        memory.populate()
        yield Pool(memory)
    finally:
        let_go(memory)


@contextlib.asynccontextmanager
async def backed_store(
    folder: Path, nr_pages: int = 512, nr_frames: int = 64
) -> AsyncIterator[tuple[PageStore, FaultyBacking]]:
    """Have a running store with a backing file that can be held and made to fail.

    With 64 frames the low watermark is 16 and the high one 32: the 49th frame starts a writeback of 17.
    """
    backing = FaultyBacking(str(folder / "backing"))
    store = PageStore(nr_pages * PAGE_SIZE, nr_frames, backing, Codec())
    async with running(store):
        yield store, backing


async def calm(store: PageStore) -> None:
    """Let time pass until nothing has happened in the store for long; a tick first, which notices what was done last."""
    await trio.testing.wait_all_tasks_blocked()
    seen = store.reclaimer.ticked_at
    push(TICK_SECONDS)
    await until(lambda: store.reclaimer.ticked_at > seen, "a tick")
    push(CALM_SECONDS + TICK_SECONDS)


async def quiet(store: PageStore) -> None:
    """Wait until every task waits and no frame is being written back; then all must add up."""
    await trio.testing.wait_all_tasks_blocked()
    while store.zbud_counters()["pers_zombie_count"]:
        await trio.sleep(POLL_SECONDS)
        await trio.testing.wait_all_tasks_blocked()
    store.check()


# ---- one page ------------------------------------------------------------------------------------------------------


async def put(store: PageStore, page: int, content: bytes) -> None:
    """Write pages from `page` on."""
    await store.write(page * PAGE_SIZE, content)


async def get(store: PageStore, page: int, count: int = 1) -> bytes:
    """Read pages from `page` on."""
    return await store.read(page * PAGE_SIZE, count * PAGE_SIZE)


async def drop(store: PageStore, page: int, count: int = 1) -> None:
    """Discard pages from `page` on."""
    await store.discard(page * PAGE_SIZE, count * PAGE_SIZE)


def kind_of(store: PageStore, page: int) -> int:
    """Return how a page is kept: ABSENT, FRAME, BLOCK, ..."""
    return store.state.table.entries[page] & KIND_MASK


def place_of(store: PageStore, page: int) -> tuple[int, int]:
    """Return the frame or block of a page, and its index in there."""
    ref = store.state.table.entries[page] >> KIND_BITS & REF_MASK
    return ref >> REF_BITS, ref & ((1 << REF_BITS) - 1)


def forge_handle(store: PageStore, page: int, *, owner: int | None = None, size: int | None = None) -> None:
    """Have the handle of a zpage in RAM say another page, or another size."""
    frame, index = place_of(store, page)
    memory = store.memory
    words = memory.frames.view.cast("Q")
    dense = memory.packing.name == "dense"
    first = frame * PAGE_WORDS
    place = first + index if dense else first + (PAGE_WORDS - 1 if index else 0)
    if owner is not None:
        shift = 24 if dense else 12
        words[place] = words[place] & ~(0xFFFFFFFF << shift) | owner << shift
    if size is not None:
        words[place] = words[place] & ~0xFFF | size


def in_ram(store: PageStore, page: int) -> bool:
    """Whether a page is in a frame."""
    return kind_of(store, page) in (FRAME, RAW_FRAME)


def in_block(store: PageStore, page: int) -> bool:
    """Whether a page is in the backing file alone."""
    return kind_of(store, page) in (BLOCK, RAW_BLOCK)


def block_of(store: PageStore, page: int) -> int:
    """Return the block of a page that is in the backing file alone."""
    assert in_block(store, page), f"page {page} is in RAM"
    return place_of(store, page)[0]
