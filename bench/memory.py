# SPDX-License-Identifier: MIT
"""The measurement `memory`: the RAM of all processes of a mount, empty and with a full pool, and the part of the tables.

The RAM is the proportional set size (PSS), summed over keeper, worker and standby, so that shared memory counts once. The
tables are files of the pool directory; their allocated blocks are counted.
"""

from __future__ import annotations

import argparse
import mmap
import os
from pathlib import Path
from typing import Final

from bench import targets
from bench.kit import Benchmark, Options, progress, stats, wait_until, workplace
from bench.table import Column, Table
from kit import corpus
from kit.programs import GIB, MIB, PAGE
from zbudfs.service.pooldir import path_of

EMPTY_MIB: Final = 90
"""Bound on the RAM of an empty daemon, without the part that is proportional to the size of the device."""
DEVICE_PERCENT: Final = 0.6
POOL_TABLES_PERCENT: Final = 0.8
POOL_TABLES: Final = ("frametable", "freeframes")
DEVICE_TABLES: Final = ("pages", "blocks")
REQUEST_BYTES: Final = MIB


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--device",
        type=int,
        action="append",
        metavar="MIB",
        help="size of an empty device (default: 1, 4, 16 and 64 GiB)",
    )
    parser.add_argument("--pool", type=int, default=1024, metavar="MIB", help="size of the pool (default: %(default)s)")


def measure(options: Options) -> list[Table]:
    """Return two tables: empty daemons, and a daemon with a full pool."""
    if options.short:
        options.device, options.pool = [32], 8
    with workplace(options) as folder:
        return [_empty(folder, options), _full(folder, options)]


def _empty(folder: Path, options: Options) -> Table:
    table = Table(
        f"An empty daemon, pool of {options.pool} MiB",
        [
            *(Column("pss_mib", "PSS MiB"), Column("bound_mib", f"{EMPTY_MIB} MiB + {DEVICE_PERCENT} % of the device")),
            *(Column("keeper_mib", "keeper"), Column("worker_mib", "worker"), Column("standby_mib", "standby")),
            *(
                Column("device_tables_mib", "tables of the device, MiB"),
                Column("device_tables_percent", "% of the device"),
            ),
        ],
    )
    for mib in options.device or [1024, 4096, 16384, 65536]:
        place = targets.Place(folder, mib * MIB, min(options.pool, mib) * MIB)
        with targets.as_file("zbudfs", place) as (mountpoint, _):
            sample: dict[str, float | None] = dict(pss_mib(mountpoint))
            sample["bound_mib"] = EMPTY_MIB + mib * DEVICE_PERCENT / 100
            tables = table_bytes(mountpoint, DEVICE_TABLES)
            sample["device_tables_mib"] = None if tables is None else tables / MIB
            sample["device_tables_percent"] = None if tables is None else 100 * tables / (mib * MIB)
        table.add(f"{mib:,} MiB device", sample)
        progress(f"{mib} MiB: {sample}")
    return table


def _full(folder: Path, options: Options) -> Table:
    """Measure a daemon after nearly all frames of its pool are used, but before it writes back."""
    table = Table(
        f"A daemon with a full pool of {options.pool} MiB",
        [
            *(Column("stored_mib", "stored MiB"), Column("frames_mib", "in frames, MiB"), Column("pss_mib", "PSS MiB")),
            *(
                Column("per_gib", "PSS MiB per GiB stored, frames and empty daemon included"),
                Column("beside_mib", "PSS less frames"),
            ),
            *(Column("pool_tables_mib", "tables of the pool, MiB"), Column("pool_tables_percent", "% of the pool")),
        ],
    )
    pages = corpus.sample(min(options.pool, 64) * MIB)
    place = targets.Place(folder, options.pool * 4 * MIB, options.pool * MIB)
    with targets.as_file("zbudfs", place) as (mountpoint, _):
        # The pool is not filled to its last frame: below the low watermark, the daemon writes frames back.
        enough, at, step = 0.9 * options.pool * MIB, 0, max(options.pool // 64, 1) * MIB
        while at < place.size_bytes and stats(mountpoint)["pool_used_bytes"] < enough:
            write(mountpoint / "swapfile", pages.pages, at, step)
            at += step
        wait_until(lambda: bool(stats(mountpoint)["standby_ready"]), "the standby")
        known = stats(mountpoint)
        stored, frames = known["stored_pages"] * PAGE, known["pool_used_bytes"] + known["pool_ready_bytes"]
        sample: dict[str, float | None] = dict(pss_mib(mountpoint))
        tables = table_bytes(mountpoint, POOL_TABLES)
    total = sample["pss_mib"] or 0.0
    sample |= {"stored_mib": stored / MIB, "frames_mib": frames / MIB, "per_gib": total / (stored / GIB)}
    sample["beside_mib"] = total - frames / MIB
    sample["pool_tables_mib"] = None if tables is None else tables / MIB
    sample["pool_tables_percent"] = None if tables is None else 100 * tables / (options.pool * MIB)
    table.add(f"{options.pool * 4:,} MiB device", sample)
    table.notes.append(f"The tables of the pool may take at most {POOL_TABLES_PERCENT} % of it. {pages.describe()}")
    return table


def write(swapfile: Path, content: bytes, start: int, length: int) -> None:
    """Write `content`, repeated, to the bytes `start` .. `start + length` of the swapfile; both are whole MiB."""
    buffer = mmap.mmap(-1, REQUEST_BYTES)  # aligned, as direct I/O requires
    fd = os.open(swapfile, os.O_RDWR | os.O_DIRECT)
    try:
        for at in range(start, start + length, REQUEST_BYTES):
            first = at % max(PAGE, len(content) - REQUEST_BYTES) // PAGE * PAGE
            buffer[:] = content[first : first + REQUEST_BYTES].ljust(REQUEST_BYTES, b"\0")
            os.pwritev(fd, [buffer], at)
    finally:
        os.close(fd)


def pss_mib(mountpoint: Path) -> dict[str, float]:
    """Return the PSS in MiB of each process of a mount, and of all together."""
    known = stats(mountpoint)
    found = {}
    for who in ("keeper", "worker", "standby"):
        lines = Path(f"/proc/{known[f'{who}_pid']}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found[f"{who}_mib"] = sizes["Pss"] / 1024
    return {"pss_mib": sum(found.values()), **found}


def table_bytes(mountpoint: Path, names: tuple[str, ...]) -> int | None:
    """Return the RAM of some tables of a mount; None if they have no name, without a tmpfs for the pool directory."""
    folder = Path(path_of(str(mountpoint)))
    try:
        return sum((folder / name).stat().st_blocks * 512 for name in names)
    except OSError:
        return None


BENCHMARK: Final = Benchmark(
    "memory", "RAM of the processes and tables, with an empty and a full pool", ("root", "fuse"), add_options, measure
)
