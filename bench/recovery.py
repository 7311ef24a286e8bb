# SPDX-License-Identifier: MIT
"""The measurement `recovery`: the time for which swap stops when the worker dies, with different amounts of stored pages.

It has two tables:

    alone    the store is rebuilt from the page table and the frames
    mount    a worker is killed with SIGKILL; the time runs from the order to the standby to the moment when it can
             answer, as the standby counts it (`last_recovery_us`)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Final

import trio

from bench import targets
from bench.kit import Benchmark, Options, in_turns, progress, stats, wait_until, workplace
from bench.memory import write
from bench.table import Column, Table
from kit import corpus, stores
from kit.programs import GIB, MIB, PAGE
from zbudfs.core.codec import Codec
from zbudfs.store.page_store import PageStore

COLUMNS: Final = [Column("ms", "ms"), Column("s_gib", "s per GiB stored"), Column("pages", "stored pages")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--stored", type=int, action="append", metavar="MIB", help="MiB of stored pages (default: 256, 1024 and 4096)"
    )


def measure(options: Options) -> list[Table]:
    """Return two tables: the store alone, and a mount."""
    if options.short:
        options.stored = [8]
    sizes = options.stored or [256, 1024, 4096]
    pages = corpus.sample(min(64, max(sizes)) * MIB)
    return [_alone(options, sizes, pages), _mounts(options, sizes, pages)]


def _alone(options: Options, sizes: list[int], pages: corpus.Corpus) -> Table:
    table = Table("Recovery of the store alone", COLUMNS)

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            made: dict[str, PageStore] = {}
            for mib in sizes:
                nr_pages = mib * MIB // PAGE
                store = await stack.enter_async_context(stores.running(stores.made(2 * nr_pages, nr_pages)))
                await stores.fill(store, pages, stores.spread(2 * nr_pages, nr_pages))
                made[f"{mib:,} MiB stored"] = store
            for number, row in in_turns(list(made), options.rounds):
                table.add(row, _rebuild(made[row]))
                progress(f"round {number + 1}: {row} {table.rows[row][-1]}")

    trio.run(main)
    table.rows = {f"{mib:,} MiB stored": table.rows[f"{mib:,} MiB stored"] for mib in sizes}
    table.notes.append(pages.describe())
    return table


def _rebuild(store: PageStore) -> dict[str, float | None]:
    """Recover the memory of a store into another store, check that no page is missing, and return the figures."""
    other = PageStore(store.size_bytes, store.memory.nr_frames, None, Codec(), store.memory)
    try:
        began = time.perf_counter()
        found = other.recover()
        took = time.perf_counter() - began
        if found.lost_pages or found.stored_pages != store.statistics().stored_pages:
            raise AssertionError(f"{found} of {store.statistics().stored_pages} pages")
    finally:
        other.close()
    return _sample(took, found.stored_pages)


def _sample(seconds: float, stored_pages: int) -> dict[str, float | None]:
    return {"ms": seconds * 1000, "s_gib": seconds / (stored_pages * PAGE / GIB), "pages": stored_pages}


def _mounts(options: Options, sizes: list[int], pages: corpus.Corpus) -> Table:
    table = Table("Takeover of a mount whose worker was killed", COLUMNS)
    for mib in sizes:
        with workplace(options) as folder:
            place = targets.Place(folder, 2 * mib * MIB, mib * MIB)
            with targets.as_file("zbudfs", place) as (mountpoint, _):
                write(mountpoint / "swapfile", pages.pages, 0, mib * MIB)
                for number in range(options.rounds):
                    table.add(f"{mib:,} MiB stored", _kill(mountpoint))
                    progress(f"round {number + 1}: {mib} MiB {table.rows[f'{mib:,} MiB stored'][-1]}")
    table.notes.append("The page table, frames and their tables are in RAM that the standby has mapped already.")
    return table


def _kill(mountpoint: Path) -> dict[str, float | None]:
    wait_until(lambda: bool(stats(mountpoint)["standby_ready"]), "the standby")
    before = stats(mountpoint)
    os.kill(before["worker_pid"], signal.SIGKILL)
    wait_until(lambda: int(stats(mountpoint)["recoveries"]) > int(before["recoveries"]), "the takeover")
    after = stats(mountpoint)
    if after["stored_pages"] != before["stored_pages"] or after["lost_pages"]:
        raise AssertionError(f"{before['stored_pages']} pages before, {after['stored_pages']} after")
    return _sample(after["last_recovery_us"] / 1e6, after["stored_pages"])


BENCHMARK: Final = Benchmark(
    "recovery", "time of a takeover, by the amount of stored pages", ("root", "fuse"), add_options, measure
)
