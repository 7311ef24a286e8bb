# SPDX-License-Identifier: MIT
"""Page-ins of single pages from the disk through the store's AIO queue, beside reads of the same blocks by the disk alone.

The store does the whole page-in: it submits the read, and after the completion it decrypts, checks, decompresses, answers
and keeps the block. The disk alone reads the same blocks in the same order, with direct I/O and a queue of its own. Both
keep `depth` requests in flight, and one thread waits for completions with poll(2).
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Final

from bench.table import Column, Table
from kit.programs import PAGE, KitError
from zbudfs.core.allocator import REF_BITS
from zbudfs.core.page_table import BLOCK, RAW_BLOCK, entry_kind, entry_ref
from zbudfs.store.page_store import PageStore
from zbudfs.store.read_queue import new_queue

DEPTHS: Final = (1, 16)
WAIT_SECONDS: Final = 60.0


def table() -> Table:
    """Return the empty table of these reads."""
    columns = [Column("store_us", "us a page-in"), Column("disk_us", "us a read of the disk"), Column("times", "times")]
    return Table("Page-ins of 4 KiB from the disk, the store alone against the disk alone", columns)


async def measure(store: PageStore, pages: list[int], found: Table) -> None:
    """Add one round: page-ins of `pages`, which are on the disk, in this order. Raises KitError."""
    for depth in DEPTHS:
        while store.state.drop_ephemeral():
            pass
        entries = store.state.table.entries
        blocks: dict[int, int] = {}  # a page of each block: the second page of a block would be in RAM
        for page in pages:
            if entry_kind(entries[page]) in (BLOCK, RAW_BLOCK):
                blocks.setdefault(entry_ref(entries[page]) >> REF_BITS, page)
        disk = _disk(store, list(blocks), depth)
        whole = _page_ins(store, list(blocks.values()), depth)
        found.add(
            f"depth {depth}",
            {"store_us": whole / len(blocks) * 1e6, "disk_us": disk / len(blocks) * 1e6, "times": whole / disk},
        )


def _disk(store: PageStore, blocks: list[int], depth: int) -> float:
    """Return the seconds in which the disk alone reads the blocks."""
    assert store.backing is not None
    queue = new_queue(depth)
    offset_of, file = store.backing.offset_of, store.backing.fileno()

    def begin(number: int, slot: int) -> None:
        if queue.submit(file, [(offset_of(blocks[number]), [slot])]) != 1:
            raise KitError("the kernel did not take a read of the disk")

    def reap() -> list[int]:
        done = queue.reap()
        if any(result != PAGE for _, result in done):
            raise KitError("the disk did not read a block")
        return [slot for slot, _ in done]

    try:
        return _seconds(len(blocks), depth, queue.fileno(), begin, reap)
    finally:
        queue.close()


def _page_ins(store: PageStore, pages: list[int], depth: int) -> float:
    """Return the seconds in which the store reads the pages in."""
    answered: list[int] = []

    def again(key: int, offset: int, length: int) -> None:
        raise KitError(f"page {offset // PAGE} needs a second read")

    def begin(number: int, slot: int) -> None:
        offset = pages[number] * PAGE
        if store.requests.read_nowait(offset, PAGE) is not None or not store.aio.begin(slot, offset, PAGE):
            raise KitError(f"page {pages[number]} is not read through the queue")

    def reap() -> list[int]:
        store.aio.reap()
        done = answered.copy()
        answered.clear()
        return done

    store.aio.serve(lambda key, content: answered.append(key), again)
    return _seconds(len(pages), depth, store.aio.queue.completions()[0], begin, reap)


def _seconds(
    count: int, depth: int, descriptor: int, begin: Callable[[int, int], None], reap: Callable[[], list[int]]
) -> float:
    """Return the seconds for `count` reads, with `depth` in flight. `begin(number, slot)` starts one; `reap` frees slots."""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    free, begun, done = list(range(depth)), 0, 0
    began = time.perf_counter()
    while done < count:
        while free and begun < count:
            begin(begun, free.pop())
            begun += 1
        if not ready.poll(WAIT_SECONDS * 1000):
            raise KitError(f"the disk did not answer for {WAIT_SECONDS:g} s")
        finished = reap()
        free += finished
        done += len(finished)
    return time.perf_counter() - began
