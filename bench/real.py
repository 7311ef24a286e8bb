# SPDX-License-Identifier: MIT
"""The measurement `real`: redis, node, Java, Python and SQLite, each with less than half of the memory that it needs.

A program needs `--mib` MiB, runs in a memory cgroup of `--limit` MiB, and checks every value (bench/programs). Its swap is,
in turns:

    swapfile       an ordinary swap file
    more-ram       the same swap file, with the pool's RAM added to the limit: the value of that RAM without zbudfs
    zbudfs, dense  zbudfs with a pool of `--pool` MiB and a backing file
    zram           zram of the kernel, without a limit of its RAM

With `--targets`, it can also be zbudfs-once or dense-once, which have `discard = once`.

The swap file, the backing file and the database are on the disk that is measured. One disk is the machine's own. The other
is a slow disk made by nbdkit: each request takes 1 ms longer, and the bandwidth is 20 MiB/s. A ratio compares with the swap
file of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import targets
from bench.chart import Bar, Series, draw
from bench.kit import HERE, Benchmark, Options, progress, stats, wait_until, workplace
from bench.table import Column, Sample, Table, shown
from kit.cell import Cell
from kit.nbd import card_disk
from kit.needs import why_not
from kit.programs import MIB, PAGE, ROOT, KitError, find_program, run

PROGRAM_LIMIT_SECONDS: Final = 600.0
TRIES: Final = 4
"""Most starts of a program that the kernel kills for lack of memory although swap is free. Then its cell is empty.

Kernels with version 1 of memory cgroups sometimes do that while the machine is busy, with a swap file too.
"""
SLOW_DELAY_MS: Final = 1
SLOW_BYTES_PER_SECOND: Final = 20 * MIB
TARGETS: Final = ("swapfile", "more-ram", "zbudfs", "dense", "zram")
DISKS: Final = {"own": "the machine's disk", "slow": "a slow disk (1 ms a request, 20 MiB/s)"}
SWAP_PARTS: Final = 3
"""Size of the swap, as a multiple of the program's memory: a garbage collector may need twice the memory for a while."""


@dataclass(frozen=True, slots=True)
class Program:
    """One program."""

    summary: str
    run: Callable[[Cell, Path, int], None]
    """Function of (cell, folder for files, MiB of memory) that runs the program. Raises KitError for a wrong value."""
    tool: str = ""
    """Command that the program needs besides Python; empty if none."""
    package: str = ""
    """Debian package of that command."""
    prepare: Callable[[Path, int], None] = lambda folder, mib: None
    """Function of (folder for files, MiB of memory) that makes the files before the measurement."""

    def why_not(self) -> str | None:
        """Return why the program cannot run on this machine; None if it can."""
        missing = self.tool and find_program(self.tool) is None
        return f"no {self.tool} (apt-get install --no-install-recommends {self.package})" if missing else None


def _run_in(cell: Cell, *words: str | Path) -> None:
    run(cell.command([str(word) for word in words]), limit_seconds=PROGRAM_LIMIT_SECONDS, cwd=ROOT)


def _python(cell: Cell, folder: Path, mib: int) -> None:
    _run_in(cell, sys.executable, "-m", "bench.programs.objects", str(mib))


def _node(cell: Cell, folder: Path, mib: int) -> None:
    # Without these options, node limits its heap by the RAM of the cgroup, and new objects take a third of that RAM.
    _run_in(
        cell, "node", f"--max-old-space-size={mib * 2}", "--max-semi-space-size=4", HERE / "programs/heap.js", str(mib)
    )


def _compile_java(folder: Path, mib: int) -> None:
    run(["javac", "-d", folder, HERE / "programs/Heap.java"])


def _java(cell: Cell, folder: Path, mib: int) -> None:
    _run_in(cell, "java", f"-Xmx{mib}m", "-XX:+UseSerialGC", "-cp", folder, "Heap", str(mib))


def _fill_database(folder: Path, mib: int) -> None:
    run([sys.executable, "-m", "bench.programs.database", "make", folder / "database", str(mib)], cwd=ROOT)


def _sqlite(cell: Cell, folder: Path, mib: int) -> None:
    _run_in(cell, sys.executable, "-m", "bench.programs.database", "use", folder / "database", str(mib))


def _redis(cell: Cell, folder: Path, mib: int) -> None:
    """Run a redis server in the cell, and its client outside of the cell."""
    socket = Path(f"/tmp/zbudfs-redis-{os.getpid()}")  # a socket's path must be short
    settings = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen(cell.command(["redis-server", *settings]), stdout=subprocess.DEVNULL) as server:
        try:
            wait_until(lambda: server.poll() is not None or socket.exists(), "redis-server")
            client = [sys.executable, "-m", "bench.programs.values", str(socket), str(mib)]
            run(client, limit_seconds=PROGRAM_LIMIT_SECONDS, cwd=ROOT)
        finally:
            server.kill()
            server.wait()
            socket.unlink(missing_ok=True)


PROGRAMS: Final = {
    "redis": Program("a redis server", _redis, "redis-server", "redis-server"),
    "node": Program("a JavaScript heap", _node, "node", "nodejs"),
    "java": Program("a Java heap", _java, "javac", "default-jdk-headless", _compile_java),
    "python": Program("Python objects", _python),
    "sqlite": Program("a database in its cache", _sqlite, prepare=_fill_database),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    for name, default, what in (
        ("mib", 144, "MiB of memory that each program needs"),
        ("limit", 64, "MiB of RAM that each program gets"),
        ("pool", 64, "MiB of the pool"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--most-seconds",
        type=float,
        default=math.inf,
        metavar="S",
        help="after S seconds, begin no further round on a disk (default: no limit)",
    )
    for name, known in (("programs", PROGRAMS), ("targets", TARGETS), ("disks", DISKS)):
        text = ",".join(known)
        parser.add_argument(f"--{name}", default=text, metavar="A,B", help=f"{name} to measure (default: {text})")


def measure(options: Options) -> list[Table]:
    """Return one table for each disk."""
    if options.short:
        options.mib, options.limit, options.pool = 24, 22, 4
        options.programs, options.targets = "python", "swapfile,zbudfs"
    programs = _chosen(options.programs, PROGRAMS, "program")
    names = _chosen(options.targets, (*TARGETS, *targets.WITH_ONCE), "target")
    if "swapfile" not in names:
        raise KitError("every ratio compares with the swap file: add swapfile to --targets")
    found = []
    for disk in _chosen(options.disks, DISKS, "disk"):
        table = Table(
            f"Real programs on {DISKS[disk]}: {options.mib} MiB in {options.limit} MiB of RAM, pool of {options.pool} MiB",
            [],
        )
        found.append(table)
        if disk == "slow" and (reason := why_not("nbd")):
            table.notes.append(f"Skipped: {reason}.")
            continue
        _fill(table, disk, programs, names, options)
    return found


def _chosen(typed: str, known: Iterable[str], what: str) -> list[str]:
    wanted = typed.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise KitError(f"there is no {what} {unknown[0]!r}: known are {', '.join(known)}")
    return wanted


def _fill(table: Table, disk: str, programs: list[str], names: list[str], options: Options) -> None:
    """Measure all programs and targets on one disk."""
    for name in programs:
        if reason := PROGRAMS[name].why_not():
            table.notes.append(f"{name} is not measured: {reason}.")
    for name in names:
        if reason := targets.why_not(name):
            table.notes.append(f"{name} is not compared: {reason}.")
    programs = [name for name in programs if not PROGRAMS[name].why_not()]
    names = [name for name in names if not targets.why_not(name)]
    table.columns = _columns(names)
    size_bytes = options.mib * SWAP_PARTS * MIB
    with workplace(options) as folder, _disk(disk, folder, 3 * size_bytes) as (on_disk, begin):
        # The slow disk is below a FUSE file system, where zbudfs refuses a backing file unless it is forced.
        more = ("--force-backing", "yes") if disk == "slow" else ()
        place = targets.Place(on_disk, size_bytes, options.pool * MIB, options=more)
        with targets.written_swap_file(place):
            for name in programs:
                PROGRAMS[name].prepare(on_disk, options.mib)
            run(["sync", "--file-system", on_disk])
            begin()
            end = time.monotonic() + options.most_seconds
            for number in range(options.rounds):
                if number and time.monotonic() > end:
                    table.notes.append(f"No further round was begun after {options.most_seconds:g} s.")
                    break
                for at, program in enumerate(programs):
                    order = [*names[(number + at) % len(names) :], *names[: (number + at) % len(names)]]
                    progress(f"{disk} disk, round {number + 1}: {program}")
                    table.add(program, _round(program, order, place, options))


def _columns(names: list[str]) -> list[Column]:
    columns = []
    for name in names:
        columns.append(Column(name, f"{name} s"))
        if name != "swapfile":
            columns.append(Column(f"{name}_speed", "times as fast"))
    return [*columns, Column("compression", "compressed to 1 :")]


@contextlib.contextmanager
def _disk(name: str, folder: Path, size_bytes: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Provide a disk: yield a folder on it, and the function that limits its bandwidth."""
    if name == "own":
        yield folder, lambda: None
        return
    with card_disk(folder, size_bytes, SLOW_DELAY_MS) as disk:
        yield disk.mounted, lambda: disk.set_rate(SLOW_BYTES_PER_SECOND)


def _round(program: str, names: list[str], place: targets.Place, options: Options) -> Sample:
    """Run one program on each target, in this order, and return the times and their ratios to the swap file."""
    found: dict[str, float | None] = {}
    for name in names:
        found |= _one(program, name, place, options)
    base = found["swapfile"]
    for name in names:
        if name != "swapfile" and base and (seconds := found[name]):
            found[f"{name}_speed"] = base / seconds
    return found


def _one(program: str, name: str, place: targets.Place, options: Options) -> dict[str, float | None]:
    """Run one program on one target, and return the figures by column. Raises KitError for a wrong value.

    The time is None if the kernel kills each try for lack of memory.
    """
    limit_mib = options.limit + (options.pool if name == "more-ram" else 0)
    for _ in range(TRIES):
        with targets.as_swap("swapfile" if name == "more-ram" else name, place) as running:
            with Cell("real", limit_mib * MIB) as cell:
                written, began = running.written_bytes(), time.monotonic()
                try:
                    PROGRAMS[program].run(cell, place.folder, options.mib)
                except KitError as error:
                    if not cell.oom_kills():
                        raise KitError(f"{program} on {name}: {error}") from None
                    progress(f"  {name}: the kernel killed {program} for lack of memory")
                    continue
                found: dict[str, float | None] = {name: time.monotonic() - began}
            progress(f"  {name}: {found[name]:.1f} s")
            found[f"{name}_written_mib"] = (running.written_bytes() - written) / MIB
            if name == "zbudfs":
                found["compression"] = _compression(place.folder / "mnt-zbudfs")
            return found
    return {name: None}


def _compression(mountpoint: Path) -> float | None:
    """Return the ratio of all stored pages, without same-filled pages, to their zpages; None if there are none."""
    known = stats(mountpoint)
    raw = known["cumul_raw_pages"] * PAGE
    pages, size = known["pers_cumul_zpages"] * PAGE + raw, known["pers_cumul_zbytes"] + raw
    return pages / size if size else None


PICTURE: Final = ROOT / "docs" / "real.svg"
_IN_PICTURE: Final = {
    "swapfile": "swap file",
    "more-ram": "swap file, and the pool's RAM",
    "zbudfs": "zbudfs",
    "dense": "zbudfs --packing dense",
}


def picture(tables: Iterable[Table]) -> str | None:
    """Return a chart of the times on the slow disk as SVG; None if there are none."""
    for table in tables:
        if DISKS["slow"] in table.title and table.rows:
            names = [name for name in _IN_PICTURE if any(column.key == name for column in table.columns)]
            series = [Series(_IN_PICTURE[name], [_bar(table, row, name) for row in table.rows]) for name in names]
            rounds = f"median of {table.rounds} rounds, line: least to most" if table.rounds > 1 else "one round"
            axis = f"seconds ({rounds}); shorter is better"
            return draw(
                "Programs with less than half of their memory, swap on a slow disk", axis, list(table.rows), series
            )
    return None


def _bar(table: Table, row: str, name: str) -> Bar | None:
    values = table.values(row, name)
    if not values:
        return None
    speed = table.median(row, f"{name}_speed")
    times = f", {shown(speed)} x as fast" if speed is not None else ""
    return Bar(statistics.median(values), min(values), max(values), f"{shown(statistics.median(values))} s{times}")


BENCHMARK: Final = Benchmark(
    "real",
    "real programs with less than half of their memory, on a swap file, zbudfs and zram, on two disks",
    ("root", "fuse", "loop", "swap", "cell"),
    add_options,
    measure,
)
