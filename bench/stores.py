# SPDX-License-Identifier: MIT
"""A page store alone, without a mount, for measurements of it: filled with real pages, its tasks running."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

import trio

from bench.corpus import Corpus
from bench.kit import PAGE, BenchError
from zbudfs.core.codec import Codec
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.store.backing import Backing
from zbudfs.store.cipher import KEY_BYTES, BlockCipher
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore

REQUEST_PAGES: Final = 32
"""Pages of a large request: 128 KiB, as swap writes them."""


def made(nr_pages: int, nr_frames: int, backing: Path | None = None, packing: Packing = ZBUD) -> PageStore:
    """Return a store of so many pages over so many frames; what it writes to `backing` is encrypted."""
    memory = StoreMemory(nr_pages * PAGE, nr_frames, backed=backing is not None, packing=packing)
    memory.populate()
    disk = Backing(str(backing)) if backing is not None else None
    store = PageStore(nr_pages * PAGE, nr_frames, disk, Codec(), memory)
    store.recover()
    if store.backing is not None and store.memory.outgoing is not None:
        store.backing.encrypt(BlockCipher(os.urandom(KEY_BYTES)), store.memory.outgoing.view)
    return store


@contextlib.asynccontextmanager
async def running(store: PageStore) -> AsyncIterator[PageStore]:
    """Have a store's tasks run; at the end they are stopped, the store is closed, and its memory is let go of."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            nursery.cancel_scope.cancel()
    finally:
        store.close()
        let_go(store.memory)


def let_go(memory: StoreMemory) -> None:
    """Give the memory of a store back to the system now, whoever still has the store."""
    for arena in memory.arenas:
        arena.release(0, arena.size)


async def populate(store: PageStore, frames: int) -> None:
    """Have so many frames ready, so that what is measured next does not wait for memory."""
    pool = store.state.pool
    wanted = min(frames, pool.free_frames)
    with trio.move_on_after(60):
        while pool.ready_frames < wanted:
            store.reclaimer.kick()
            pool.reserve_wanted = frames
            await trio.sleep(0.005)
    if pool.ready_frames < wanted:
        raise BenchError(f"the store has {pool.ready_frames} ready frames after a minute instead of {wanted}")


def requests(corpus: Corpus, nr_pages: int, shift: int = 0) -> list[memoryview]:
    """The contents of `nr_pages` neighbouring pages, as large requests; another `shift` gives other pages."""
    view = memoryview(corpus.pages)
    last = corpus.count - REQUEST_PAGES
    found = []
    for number in range(nr_pages // REQUEST_PAGES):
        first = (number * REQUEST_PAGES + shift) % max(last, 1)
        found.append(view[first * PAGE : (first + REQUEST_PAGES) * PAGE])
    return found


async def fill(store: PageStore, corpus: Corpus, pages: Iterable[int]) -> None:
    """Write pages, in runs of REQUEST_PAGES from each of the given numbers on; the store's tasks get their turns."""
    contents = requests(corpus, corpus.count // REQUEST_PAGES * REQUEST_PAGES)
    for number, page in enumerate(pages):
        await store.write(page * PAGE, contents[number % len(contents)])
        await trio.lowlevel.checkpoint()


def spread(nr_pages: int, stored: int, seed: int = 1) -> list[int]:
    """Where `stored` pages lie on a device of `nr_pages`: the starts of runs of REQUEST_PAGES, in no order."""
    runs = nr_pages // REQUEST_PAGES
    return [run * REQUEST_PAGES for run in random.Random(seed).sample(range(runs), stored // REQUEST_PAGES)]
