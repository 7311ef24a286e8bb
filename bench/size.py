# SPDX-License-Identifier: MIT
"""The measurement `size`: the cost of an operation on devices of 256 MiB to 64 GiB, each filled to the same part.

All stores exist at the same time, and the rounds take turns. Reads and overwrites go to random stored pages. Discards go to
random runs of stored pages, which are written again after the measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from typing import Final

import trio

from bench.kit import Benchmark, Options, in_turns, progress
from bench.table import Column, Table
from kit import corpus, stores
from kit.programs import MIB, PAGE
from zbudfs.store.page_store import PageStore

COLUMNS: Final = [
    Column("read_us", "read 4 KiB, us"),
    Column("overwrite_us", "overwrite 4 KiB, us"),
    Column("discard_us", "discard a page, us"),
    Column("statistics_us", "statistics, us"),
    Column("stored_mib", "stored MiB", ratio=False),
]
BASE_MIB: Final = 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--device",
        type=int,
        action="append",
        metavar="MIB",
        help="size of a device in MiB (default: 256 MiB, 1, 4, 16 and 64 GiB)",
    )
    parser.add_argument(
        "--part", type=float, default=0.03, metavar="F", help="filled part of the device (default: %(default)s)"
    )
    parser.add_argument(
        "--operations",
        type=int,
        default=5000,
        metavar="N",
        help="operations of each kind in a round (default: %(default)s)",
    )


def measure(options: Options) -> list[Table]:
    """Return one table, with a row for each size."""
    if options.short:
        options.device, options.operations, options.part = [16, 64], 100, 0.1
    sizes = {f"{mib:,} MiB": mib for mib in options.device or [256, 1024, 4096, 16384, 65536]}
    table = Table(f"Cost against size, {100 * options.part:g} % of the device stored", COLUMNS)
    table.base = next((row for row, mib in sizes.items() if mib == BASE_MIB), next(iter(sizes)))
    pages = corpus.sample(32 * MIB if not options.short else 2 * MIB)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            made: dict[str, tuple[PageStore, list[int]]] = {}
            for row, mib in sizes.items():
                nr_pages = mib * MIB // PAGE
                stored = max(int(nr_pages * options.part), stores.REQUEST_PAGES)
                store = await stack.enter_async_context(stores.running(stores.made(nr_pages, stored + 1024)))
                places = stores.spread(nr_pages, stored)
                await stores.fill(store, pages, places)
                made[row] = store, places
                progress(f"{row}: {store.statistics().stored_pages:,} pages stored")
            for number, row in in_turns(list(made), options.rounds):
                table.add(row, await _one(*made[row], options.operations, pages, number))
                await trio.lowlevel.checkpoint()
                progress(f"round {number + 1}: {row} {table.rows[row][-1]}")

    trio.run(main)
    table.rows = {row: table.rows[row] for row in sizes}
    table.notes.append(f"The store alone, without FUSE and without writeback; CPU time. {pages.describe()}")
    return [table]


async def _one(
    store: PageStore, places: list[int], operations: int, pages: corpus.Corpus, seed: int
) -> dict[str, float | None]:
    """Run one round on one store, and return the microseconds of CPU time of each operation."""
    chooser = random.Random(seed)
    chosen = [(chooser.choice(places) + chooser.randrange(stores.REQUEST_PAGES)) * PAGE for _ in range(operations)]
    view = memoryview(pages.pages)
    contents = [view[at * PAGE : (at + 1) * PAGE] for at in chooser.choices(range(pages.count), k=operations)]

    began = time.thread_time()
    for offset in chosen:
        store.requests.read_nowait(offset, PAGE)
    read = time.thread_time()
    for offset, content in zip(chosen, contents, strict=True):
        store.requests.write_nowait(offset, content)
    written = time.thread_time()

    length = stores.REQUEST_PAGES * PAGE
    runs = [
        page * PAGE for page in chooser.sample(places, min(len(places), max(operations // stores.REQUEST_PAGES, 1)))
    ]
    before_discard = time.thread_time()
    for offset in runs:
        await store.requests.discard(offset, length)
    discarded = time.thread_time()
    for offset in runs:
        first = chooser.randrange(pages.count - stores.REQUEST_PAGES) * PAGE
        store.requests.write_nowait(offset, view[first : first + length])

    before_statistics = time.thread_time()
    for _ in range(100):
        store.statistics()
    snapshots = time.thread_time()
    return {
        "read_us": (read - began) / operations * 1e6,
        "overwrite_us": (written - read) / operations * 1e6,
        "discard_us": (discarded - before_discard) / (len(runs) * stores.REQUEST_PAGES) * 1e6,
        "statistics_us": (snapshots - before_statistics) / 100 * 1e6,
        "stored_mib": store.statistics().stored_pages * PAGE / MIB,
    }


BENCHMARK: Final = Benchmark(
    "size", "time of an operation on devices of 256 MiB to 64 GiB, filled to the same part", (), add_options, measure
)
