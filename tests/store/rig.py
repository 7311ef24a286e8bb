# SPDX-License-Identifier: MIT
"""A running page store with a clock that a test can push forward, and functions that show where a page is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, ParamSpec

import trio
import trio.testing

from kit.stores import let_go as let_go
from kit.stores import running as running
from tests.store.faulty import FaultyBacking
from zbudfs.core.allocator import REF_BITS
from zbudfs.core.codec import Codec
from zbudfs.core.packing import Packing
from zbudfs.core.page_table import BLOCK, FRAME, KIND_BITS, KIND_MASK, RAW_BLOCK, RAW_FRAME, REF_MASK
from zbudfs.core.reclaim import CALM_SECONDS, TICK_SECONDS
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE, PAGE_WORDS
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.pool import Pool

P = ParamSpec("P")

LIMIT_SECONDS: Final = 60.0
"""Longest time of a whole test on its own clock. Its end is a failure, not a measurement."""
POLL_SECONDS: Final = 0.001


_limit: Final[trio.lowlevel.RunVar[trio.CancelScope]] = trio.lowlevel.RunVar("limit")


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test with a time limit. Its clock is as fast as the real one, and `push` makes it jump."""

    async def limited() -> None:
        with trio.fail_after(LIMIT_SECONDS) as scope:
            _limit.set(scope)
            await main()

    trio.run(limited, clock=trio.testing.MockClock(rate=1.0))


def trio_test(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Make a test of a coroutine function, with `run`."""

    @functools.wraps(test)
    def run_test(*args: P.args, **kwargs: P.kwargs) -> None:
        run(lambda: test(*args, **kwargs))

    return run_test


def push(seconds: float) -> None:
    """Move the test's clock forward."""
    clock = trio.lowlevel.current_clock()
    assert isinstance(clock, trio.testing.MockClock)
    _limit.get().deadline += seconds
    clock.jump(seconds)


def fill_reserve(pool: Pool) -> None:
    """Populate frames until as many are ready as allowed, in a store without tasks."""
    while runs := pool.take_bare():
        pool.populate(runs)
        pool.add_ready(runs)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds, or fail the test."""
    try:
        with trio.fail_after(LIMIT_SECONDS / 3):
            while not condition():
                await trio.sleep(POLL_SECONDS)
    except trio.TooSlowError:
        raise AssertionError(f"waited in vain until {what}") from None


@contextlib.contextmanager
def packed_by(packing: Packing) -> Iterator[Packing]:
    """Set the packing of stores that name none."""
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
    """Choose for stores that do not say whether they leave out the hot path in C."""
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
    """Make a pool without a store."""
    memory = StoreMemory(nr_frames << PAGE_SHIFT, nr_frames, backed=False)
    try:
        memory.populate()
        yield Pool(memory)
    finally:
        let_go(memory)


@contextlib.asynccontextmanager
async def backed_store(
    folder: Path, nr_pages: int = 512, nr_frames: int = 64, *, log: Callable[[str], None] = lambda _: None
) -> AsyncIterator[tuple[PageStore, FaultyBacking]]:
    """Run a store with a backing file that can be held and made to fail.

    With 64 frames the low watermark is 16 and the high one 32: the 49th frame starts a writeback of 17.
    """
    backing = FaultyBacking(str(folder / "backing"))
    store = PageStore(nr_pages * PAGE_SIZE, nr_frames, backing, Codec(), log=log)
    async with running(store):
        yield store, backing


async def calm(store: PageStore) -> None:
    """Let time pass until the store has been idle for long. A tick comes first, which notices the last action."""
    await trio.testing.wait_all_tasks_blocked()
    seen = store.reclaimer.ticked_at
    push(TICK_SECONDS)
    await until(lambda: store.reclaimer.ticked_at > seen, "a tick")
    push(CALM_SECONDS + TICK_SECONDS)


async def quiet(store: PageStore) -> None:
    """Wait until each task waits and no frame is being written back. Then everything must add up."""
    await trio.testing.wait_all_tasks_blocked()
    while store.zbud_counters()["pers_zombie_count"]:
        await trio.sleep(POLL_SECONDS)
        await trio.testing.wait_all_tasks_blocked()
    store.check()


# ---- one page ------------------------------------------------------------------------------------------------------


async def put(store: PageStore, page: int, content: bytes) -> None:
    """Write pages, starting at `page`."""
    await store.requests.write(page * PAGE_SIZE, content)


async def get(store: PageStore, page: int, count: int = 1) -> bytes:
    """Read pages, starting at `page`."""
    return await store.requests.read(page * PAGE_SIZE, count * PAGE_SIZE)


async def drop(store: PageStore, page: int, count: int = 1) -> None:
    """Discard pages, starting at `page`."""
    await store.requests.discard(page * PAGE_SIZE, count * PAGE_SIZE)


def kind_of(store: PageStore, page: int) -> int:
    """Return the kind of a page: ABSENT, FRAME, BLOCK, ..."""
    return store.state.table.entries[page] & KIND_MASK


def place_of(store: PageStore, page: int) -> tuple[int, int]:
    """Return the frame or block of a page, and its index there."""
    ref = store.state.table.entries[page] >> KIND_BITS & REF_MASK
    return ref >> REF_BITS, ref & ((1 << REF_BITS) - 1)


def forge_handle(store: PageStore, page: int, *, owner: int | None = None, size: int | None = None) -> None:
    """Write another page number or size into the handle of a zpage in RAM."""
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
    """Return whether a page is in a frame."""
    return kind_of(store, page) in (FRAME, RAW_FRAME)


def in_block(store: PageStore, page: int) -> bool:
    """Return whether only the backing file has a page."""
    return kind_of(store, page) in (BLOCK, RAW_BLOCK)


def block_of(store: PageStore, page: int) -> int:
    """Return the block of a page that only the backing file has."""
    assert in_block(store, page), f"page {page} is in RAM"
    return place_of(store, page)[0]
