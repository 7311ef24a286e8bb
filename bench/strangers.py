# SPDX-License-Identifier: MIT
"""The measurement `strangers`: the time of a page-in while another user attacks the mount.

A program reads random pages of swapfile as a loop device does (reader.c), on one processor, in real time. A process of
another user runs on another processor, and repeats one attack as fast as it can:

    on tmpfs    on files of a tmpfs: the cost of the load alone, and the base of the comparison
    on zbudfs   the same calls on the mount, or on its public statistics

The rows take turns. A column has the number of repetitions of the attack. Each is some thousands of calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench.kit import Benchmark, Options, build, in_turns, progress, workplace, zbudfs_command
from bench.memory import write
from bench.table import Column, Table
from kit import corpus
from kit.programs import LIMIT_SECONDS, MIB, PAGE, KitError, run

NOBODY: Final = 65534
SIZE_BYTES: Final = 64 * MIB
COLUMNS: Final = [
    Column("p50_us", "p50 us"),
    Column("p99_us", "p99 us"),
    Column("max_us", "longest us", ratio=False),
    Column("reads", "reads", ratio=False),
    Column("rounds", "rounds of the attack", ratio=False),
]
ON_TMPFS: Final = "on tmpfs"
ON_ZBUDFS: Final = "on zbudfs"

Attack = Callable[[Path], object]


def _many(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        with contextlib.suppress(OSError):
            call()


def _open_and_close(path: Path, flags: int, times: int) -> None:
    """Open a file many times, then close all descriptors together, as the end of a process does."""
    fds: list[int] = []
    _many(lambda: fds.append(os.open(path, flags)), times)
    for fd in fds:
        os.close(fd)


def _in_threads(path: Path) -> None:
    threads = [threading.Thread(target=_open_and_close, args=(path, os.O_RDONLY, 10)) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _map(path: Path) -> None:
    def once() -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ)
        finally:
            os.close(fd)

    _many(once, 1000)


def _look(folder: Path) -> None:
    """Make each system call that takes a path, many times."""
    for call in (
        lambda: os.stat(folder),  # noqa: PTH116
        lambda: os.listdir(folder),  # noqa: PTH208
        lambda: os.access(folder, os.R_OK),
        lambda: os.statvfs(folder),
        lambda: os.getxattr(folder, "security.x"),
        lambda: os.chdir(folder),
    ):
        _many(call, 500)


ATTACKS: Final[dict[str, Attack]] = {
    "directories": lambda at: _open_and_close(at, os.O_RDONLY | os.O_DIRECTORY, 5000),
    "files of stats/": lambda at: _open_and_close(at / "stats/all.json", os.O_RDONLY, 5000),
    "threads": lambda at: _in_threads(at / "stats/all.json"),
    "maps": lambda at: _map(at / "stats/all.json"),
    "stat, list, access, statfs, xattr": _look,
    "public statistics": lambda at: _many((at / "public.json").read_bytes, 1000),
}
"""Attacks by name: functions that take the attacked folder."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="seconds of reads in each round (default: %(default)s)"
    )


def measure(options: Options) -> list[Table]:
    """Return one table for each attack."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise KitError("this measurement needs two processors: one for the reader, and one for the attacker")
    seconds = 0.2 if options.short else options.seconds
    pages = corpus.sample(16 * MIB)
    tables = {name: Table(f"Page-ins under attack: {name}", COLUMNS, base=ON_TMPFS) for name in ATTACKS}
    with workplace(options) as folder, _mounted(folder, pages) as (mountpoint, floor):
        reader = build("reader", folder)
        rows = [(name, where) for name in ATTACKS for where in (ON_TMPFS, ON_ZBUDFS)]
        names = [f"{name}\n{where}" for name, where in rows]
        for number, row in in_turns(names, options.rounds):
            name, _, where = row.partition("\n")
            target = floor if where == ON_TMPFS else mountpoint
            if name == "public statistics" and where == ON_ZBUDFS:
                target = folder / "links"
            with _attacked(ATTACKS[name], target, cpus[-1]) as rounds:
                sample = _read(reader, mountpoint / "swapfile", seconds, cpus[0])
                sample["rounds"] = float(rounds())
            tables[name].add(where, sample)
            progress(f"round {number + 1}: {name}, {where}: {sample}")
    for table in tables.values():
        table.notes.append(
            "The reader and the attacker have a processor each. The daemon runs on both. Reader and daemon run in real time."
        )
    return list(tables.values())


@contextlib.contextmanager
def _mounted(folder: Path, pages: corpus.Corpus) -> Iterator[tuple[Path, Path]]:
    """Make a mount, and a tmpfs with files of the same names, for this context. Yield both folders."""
    mountpoint, floor, links = folder / "mnt", folder / "floor", folder / "links"
    for path in (mountpoint, floor, links):
        path.mkdir()
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        command = [
            *zbudfs_command(),
            "mount",
            "--backing",
            "none",
            "--size",
            str(SIZE_BYTES),
            "--pool",
            str(SIZE_BYTES),
        ]
        run([*command, mountpoint])
        stack.callback(run, [*zbudfs_command(), "umount", mountpoint])
        write(mountpoint / "swapfile", pages.pages, 0, SIZE_BYTES)
        run(["mount", "-t", "tmpfs", "-o", "mode=0755", "floor", floor])
        stack.callback(run, ["umount", "--lazy", floor])
        (floor / "stats").mkdir()
        everything = (mountpoint / "stats/all.json").read_bytes()
        (floor / "stats/all.json").write_bytes(everything)
        (floor / "public.json").write_bytes(everything)
        pool = Path((mountpoint / "stats/pool_directory").read_text().strip())
        (links / "public.json").symlink_to(pool.parent.parent / f"{pool.parent.name}-stats" / f"{pool.name}.json")
        yield mountpoint, floor


@contextlib.contextmanager
def _attacked(attack: Attack, target: Path, cpu: int) -> Iterator[Callable[[], int]]:
    """Repeat an attack as another user on one processor, in this context. Yield a function that counts the repetitions."""
    count = mmap.mmap(-1, mmap.PAGESIZE)
    number = memoryview(count).cast("Q")
    pid = os.fork()
    if not pid:
        try:
            os.sched_setaffinity(0, {cpu})
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            while True:
                attack(target)
                number[0] += 1
        finally:
            os._exit(1)
    try:
        time.sleep(0.2)
        yield lambda: int(number[0])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _read(reader: Path, swapfile: Path, seconds: float, cpu: int) -> dict[str, float | None]:
    """Run the reader for some seconds, and return its figures."""
    found: dict[str, float | None] = json.loads(
        run([reader, swapfile, str(SIZE_BYTES), str(seconds), str(cpu)], limit_seconds=seconds + LIMIT_SECONDS)
    )
    return found


BENCHMARK: Final = Benchmark(
    "strangers", "time of a page-in while another user attacks the mount", ("root", "fuse"), add_options, measure
)
