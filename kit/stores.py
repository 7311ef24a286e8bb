# SPDX-License-Identifier: MIT
"""Page stores without a mount, for measurements: filled with real pages, with their tasks running."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Final

import trio

from kit.corpus import Corpus
from kit.programs import PAGE, KitError
from zbudfs.core.codec import Codec
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.store.backing import Backing
from zbudfs.store.cipher import KEY_BYTES, BlockCipher
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore

REQUEST_PAGES: Final = 32
"""Pages of a large request: 128 KiB, like the writes of swap."""


def made(nr_pages: int, nr_frames: int, backing: Path | None = None, packing: Packing = ZBUD) -> PageStore:
    """Return a store of `nr_pages` pages over `nr_frames` frames. It encrypts the blocks in `backing`."""
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
    """Run the tasks of a store in this context. At the end they are stopped, the store is closed, and its memory is freed."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            nursery.cancel_scope.cancel()
    finally:
        store.close()
        let_go(store.memory)


def let_go(memory: StoreMemory) -> None:
    """Return the memory of a store to the system now, even if the store is still referenced."""
    for arena in memory.arenas:
        arena.release(0, arena.size)


async def populate(store: PageStore, frames: int) -> None:
    """Wait until so many frames are ready, so that the next measurement does not wait for memory. Raises KitError."""
    pool = store.state.pool
    wanted = min(frames, pool.free_frames)
    with trio.move_on_after(60):
        while pool.ready_frames < wanted:
            store.reclaimer.kick()
            pool.reserve_wanted = frames
            await trio.sleep(0.005)
    if pool.ready_frames < wanted:
        raise KitError(f"after a minute, the store has {pool.ready_frames} ready frames instead of {wanted}")


def requests(corpus: Corpus, nr_pages: int, shift: int = 0) -> list[memoryview]:
    """Return the contents of `nr_pages` neighbouring pages, as large requests. Another `shift` gives other pages."""
    view = memoryview(corpus.pages)
    last = corpus.count - REQUEST_PAGES
    found = []
    for number in range(nr_pages // REQUEST_PAGES):
        first = (number * REQUEST_PAGES + shift) % max(last, 1)
        found.append(view[first * PAGE : (first + REQUEST_PAGES) * PAGE])
    return found


async def fill(store: PageStore, corpus: Corpus, pages: Iterable[int]) -> None:
    """Write runs of REQUEST_PAGES pages; `pages` has the first page of each. The store's tasks run in between."""
    contents = requests(corpus, corpus.count // REQUEST_PAGES * REQUEST_PAGES)
    for number, page in enumerate(pages):
        await store.requests.write(page * PAGE, contents[number % len(contents)])
        await trio.lowlevel.checkpoint()


def spread(nr_pages: int, stored: int, seed: int = 1) -> list[int]:
    """Return the first pages of random runs of REQUEST_PAGES, `stored` pages in all, on a device of `nr_pages`."""
    runs = nr_pages // REQUEST_PAGES
    return [run * REQUEST_PAGES for run in random.Random(seed).sample(range(runs), stored // REQUEST_PAGES)]
