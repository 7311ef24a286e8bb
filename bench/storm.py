# SPDX-License-Identifier: MIT
"""The measurement `storm`: a program that uses more memory than its RAM, on zbudfs and other swap in turns.

The program (storm.c) needs `--mib` MiB, has `--limit` MiB of RAM in a memory cgroup, and compares every byte. If the pool is
as large as the storm, all pages stay in RAM, and the comparison is with other compressed RAM. With a smaller pool, cold
frames go to the disk, and the comparison is with an ordinary swap file there, in speed and in bytes written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from bench import targets
from bench.kit import Benchmark, Options, add_also, build, in_turns, progress, workplace
from bench.table import Column, Table
from kit import corpus
from kit.cell import Cell
from kit.programs import MIB, KitError, run

COLUMNS: Final = [
    Column("fill_mib_s", "fill MiB/s"),
    Column("scan_mib_s", "scan MiB/s"),
    Column("random_s", "random page-ins/s"),
    Column("random_p50_us", "p50 us"),
    Column("random_p99_us", "p99 us"),
]
WRITTEN: Final = [Column("written_mib", "MiB written"), Column("disk_mib", "MiB written to the disk in all")]
STORM_LIMIT_SECONDS: Final = 600.0
LOOP: Final = f"import time; end = time.monotonic() + {STORM_LIMIT_SECONDS}\nwhile time.monotonic() < end: pass"
"""A program that needs a CPU all the time, and ends after the longest storm."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--mib", type=int, default=512, metavar="N", help="MiB of memory that the program uses (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, default=212, metavar="N", help="MiB of RAM that the program gets (default: %(default)s)"
    )
    parser.add_argument(
        "--reads", type=int, default=20000, metavar="N", help="number of random page-ins (default: %(default)s)"
    )
    parser.add_argument(
        "--pool",
        type=float,
        action="append",
        metavar="F",
        help="size of the pool as a part of the storm; below 1, a swap file is compared (default: 1, then 0.25)",
    )
    parser.add_argument(
        "--targets",
        metavar="A,B",
        help="targets to compare: zram, floor, floor-zstd, nbdkit, zbudfs, dense, zbudfs-2, swapfile, zbudfs-once, dense-once",
    )
    parser.add_argument(
        "--loops",
        type=int,
        default=0,
        metavar="N",
        help="number of endless loops that run beside each storm, so that the cores are busy (default: %(default)s)",
    )
    add_also(parser)


def measure(options: Options) -> list[Table]:
    """Return one table for each size of the pool."""
    if options.short:
        options.mib, options.limit, options.reads = 24, 12, 500
        options.targets = options.targets or "floor-zstd,zbudfs,swapfile"
    pages = corpus.sample(options.mib * MIB // 8)
    also = dict(options.also)
    found = []
    with workplace(options) as folder, pages.as_file() as corpus_fd:
        for part in options.pool or [1.0, 0.25]:
            table = _table(options, part)
            place = targets.Place(folder, options.mib * 3 // 2 * MIB, max(1, int(options.mib * part)) * MIB, also)
            names = _names(options, part, table) + list(also)
            for number, name in in_turns(names, options.rounds):
                table.add(name, one(name, place, options, corpus_fd))
                progress(f"pool {part:g}, round {number + 1}: {name} {table.rows[name][-1]}")
            table.rows = {name: table.rows[name] for name in names}
            table.notes.append(pages.describe())
            found.append(table)
    return found


def _table(options: Options, part: float) -> Table:
    size = "as large as the storm" if part == 1 else f"of {part:g} of the storm"
    title = f"Swap storm of {options.mib} MiB in {options.limit} MiB of RAM, pool {size}"
    if options.loops:
        title += f", beside {options.loops} endless loops"
    return Table(title, COLUMNS if part >= 1 else [*COLUMNS, *WRITTEN])


def _names(options: Options, part: float, table: Table) -> list[str]:
    """Return the targets to compare, without those that this machine lacks, and set the base of the table."""
    known = dict.fromkeys([*targets.RAM, *targets.DISK, *targets.WITH_ONCE])
    usual = targets.RAM if part >= 1 else targets.DISK
    wanted = options.targets.split(",") if options.targets else list(usual)
    if unknown := [name for name in wanted if name not in known and not name.removeprefix(targets.STRIPED).isdecimal()]:
        raise KitError(f"there is no target {unknown[0]!r}: known are {', '.join(known)}")
    if options.short:
        wanted = [name for name in wanted if name in usual]
    for name in wanted:
        if reason := targets.why_not(name):
            table.notes.append(f"{name} is not compared: {reason}.")
    names = [name for name in wanted if not targets.why_not(name)]
    preferred = ("floor-zstd", "swapfile", *names)
    table.base = next((name for name in preferred if name in names), None)
    return names


def one(name: str, place: targets.Place, options: Options, corpus_fd: int) -> dict[str, float | None]:
    """Run one storm, and return its figures by column. Raises KitError if a byte was wrong."""
    program = build("storm", place.folder)
    with (
        targets.as_swap(name, place) as running,
        Cell("bench", options.limit * MIB) as cell,
        _loops(options.loops),
    ):
        disk, written = targets.disk_written_bytes(place.folder), running.written_bytes()
        command = [str(program), f"/dev/fd/{corpus_fd}", str(options.mib * MIB), str(options.reads)]
        said = run(cell.command(command), limit_seconds=STORM_LIMIT_SECONDS, pass_fds=[corpus_fd])
        written = running.written_bytes() - written
        if disk is not None:
            disk = (targets.disk_written_bytes(place.folder) or 0) - disk
    figures = json.loads(said)
    found: dict[str, float | None] = {column.key: figures[column.key] for column in COLUMNS}
    found["written_mib"] = written / MIB
    found["disk_mib"] = None if disk is None else disk / MIB
    return found


@contextlib.contextmanager
def _loops(count: int) -> Iterator[None]:
    """Run endless loops meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


BENCHMARK: Final = Benchmark(
    "storm",
    "a program with most of its memory on swap: zbudfs, a C floor, nbdkit, zram, a swap file",
    ("root", "fuse", "loop", "swap", "cell"),
    add_options,
    measure,
)
