# SPDX-License-Identifier: MIT
"""The measurement `packing`: pages in a frame with each packing, for the memory of real programs.

    fill     place every page once: pages in a frame, and microseconds to place a compressed page
    churn    overwrite random pages with the content of others, twice for each page: the same figures
    write    fill and churn in a pool of a third of the frames: bytes written back per byte of their pages

Each program makes a heap and stops. Pages of one repeated word are left out, since they take no frame. Three zpages in two
frames could gain from the zpages between half and two thirds of a frame, so their share is reported. `bound` is the number
of pages in a frame that a packing without any loss would reach, with a handle of 8 bytes for each zpage.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from bench.kit import Benchmark, Options, in_turns, progress, workplace
from bench.table import Column, Table
from kit import corpus, stores
from kit.programs import PAGE, KitError
from zbudfs.core.allocator import HANDLE_SIZE, MAX_ZPAGE_SIZE
from zbudfs.core.codec import DEFAULT_LEVEL, Codec
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.store.backing import Backing
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore

COLUMNS: Final = [
    Column("filled", "pages a frame, filled"),
    Column("churned", "after the churn"),
    Column("written", "bytes written per page byte"),
    Column("fill_us", "place, us"),
    Column("churn_us", "replace, us"),
]
PROGRAMS: Final = ("python", "node", "java")
DEFAULT_PACKINGS: Final = "zbud,dense:2,dense:3,dense:4,dense:5,dense:6,dense:7"
FEWEST_FRAMES: Final = 64

_PYTHON: Final = """
import json, random, time
d = [{'id': i, 'name': 'user%d' % i, 'tags': random.choices('abcdef', k=5), 'v': random.random()} for i in range(COUNT)]
s = json.dumps(d); print('up', flush=True); time.sleep(300)
"""
_NODE: Final = """
const a = []; for (let i = 0; i < 4 * COUNT; i++) a.push({id: i, name: 'user' + i, v: Math.random(), s: 'x'.repeat(i % 50)});
const m = new Map(a.map((o) => [o.name, o])); console.log('up'); setTimeout(() => m, 300000);
"""
_JAVA: Final = """
import java.util.*;
public class Heap {
    record User(int id, String name, List<String> tags, double value) {}
    public static void main(String[] arguments) throws Exception {
        Random random = new Random(1);
        Map<String, User> users = new HashMap<>();
        for (int i = 0; i < 3 * COUNT; i++)
            users.put("user" + i, new User(i, "user" + i, List.of("a" + random.nextInt(9), "b" + i % 7), random.nextDouble()));
        System.out.println("up"); System.out.flush(); Thread.sleep(300000); System.out.println(users.size());
    }
}
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--pages", type=int, default=24_000, metavar="N", help="most pages of each program (default: %(default)s)"
    )
    parser.add_argument(
        "--objects", type=int, default=90_000, metavar="N", help="objects in each program (default: %(default)s)"
    )
    parser.add_argument(
        "--level", type=int, default=DEFAULT_LEVEL, metavar="N", help="zstd level (default: %(default)s)"
    )
    parser.add_argument(
        "--programs", default=",".join(PROGRAMS), metavar="A,B", help="programs to run (default: %(default)s)"
    )
    parser.add_argument(
        "--packings", default=DEFAULT_PACKINGS, metavar="A,B", help="packings to compare (default: %(default)s)"
    )


def measure(options: Options) -> list[Table]:
    """Return one table for each program."""
    if options.short:
        options.pages, options.objects, options.programs, options.packings = 2000, 12_000, "python", "zbud,dense"
    try:
        packings = [Packing.parse(text) for text in options.packings.split(",")]
        codec = Codec(options.level)
    except ValueError as error:
        raise KitError(str(error)) from None
    found = []
    with workplace(options) as folder:
        for program in options.programs.split(","):
            if program not in PROGRAMS:
                raise KitError(f"there is no program {program!r}: known are {', '.join(PROGRAMS)}")
            table = Table(f"Packing the memory of {program}, zstd level {options.level}", COLUMNS)
            table.base = str(ZBUD) if ZBUD in packings else None
            started = command(program, options.objects, folder)
            if shutil.which(started[0]) is None:
                table.notes.append(f"{program} is not measured: it is not installed.")
                found.append(table)
                continue
            pages = snapshot(started)
            random.Random(7).shuffle(pages)
            del pages[options.pages :]
            zpages = [codec.encode(page) for page in pages]
            for number, name in in_turns([str(packing) for packing in packings], options.rounds):
                packing = Packing.parse(name)
                table.add(name, trio.run(_one, pages, zpages, packing, folder, number))
                progress(f"{program}, round {number + 1}: {name} {table.rows[name][-1]}")
            table.rows = {str(packing): table.rows[str(packing)] for packing in packings}
            table.notes.append(describe(zpages))
            found.append(table)
    return found


def command(program: str, count: int, folder: Path) -> list[str]:
    """Return the command that starts a program with `count` objects."""
    if program == "python":
        return [sys.executable, "-I", "-c", _PYTHON.replace("COUNT", str(count))]
    if program == "node":
        return ["node", "-e", _NODE.replace("COUNT", str(count))]
    heap = folder / "Heap.java"
    heap.write_text(_JAVA.replace("COUNT", str(count)))
    return ["java", "-Xmx512m", str(heap)]


def snapshot(command: Sequence[str]) -> list[bytes]:
    """Start a program, wait for its line "up", and return the pages of its memory. Raises KitError."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None  # it is a pipe
            if process.stdout.readline() != b"up\n":
                raise KitError(f"{command[0]} did not start: run it by hand to see why")
            return corpus.memory_of(process.pid)
        finally:
            process.kill()


def describe(zpages: Sequence[bytes]) -> str:
    """Return a sentence on the sizes of zpages."""
    sizes = [len(zpage) + HANDLE_SIZE for zpage in zpages]
    raw = sum(len(zpage) > MAX_ZPAGE_SIZE for zpage in zpages)
    between = sum(PAGE / 2 < size <= 2 * PAGE / 3 for size in sizes)
    larger = sum(size > 2 * PAGE / 3 for size in sizes) - raw
    mean = sum(sizes) / len(sizes)
    return (
        f"Pages: {len(sizes):,}; a zpage and its handle have {mean:.0f} bytes on average (bound: {PAGE / mean:.2f} pages a"
        f" frame); {raw / len(sizes):.1%} incompressible, {between / len(sizes):.1%} between half and two thirds of a frame,"
        f" {larger / len(sizes):.1%} larger."
    )


async def _one(
    pages: Sequence[bytes], zpages: Sequence[bytes], packing: Packing, folder: Path, seed: int
) -> dict[str, float | None]:
    """Run one round: fill, churn, and write back. Return its figures by column."""
    count = len(pages)
    order = random.Random(seed)
    churn = [(order.randrange(count), order.randrange(count)) for _ in range(2 * count)]
    memory = StoreMemory(count * PAGE, count, backed=False, packing=packing)
    memory.populate()
    store = PageStore(count * PAGE, count, None, Codec(), memory)
    store.recover()
    pool = store.state.pool
    pool.reserve_wanted = count
    while runs := pool.take_bare():
        pool.populate(runs)
        pool.add_ready(runs)
    place, place_raw = store.state.place, store.state.place_raw

    def put(page: int, content: int) -> None:
        zpage = zpages[content]
        done = place(page, zpage) if len(zpage) <= MAX_ZPAGE_SIZE else place_raw(page, pages[content])
        assert done, "there is a frame for each page"

    began = time.perf_counter()
    for page in range(count):
        put(page, page)
    filled = time.perf_counter()
    frames_filled = pool.used_frames
    began_churn = time.perf_counter()
    for page, content in churn:
        put(page, content)
    churned = time.perf_counter()
    frames = pool.used_frames
    store.check()
    store.close()
    stores.let_go(memory)
    return {
        "filled": count / frames_filled,
        "churned": count / frames,
        "written": await _written(pages, packing, folder, max(frames // 3, FEWEST_FRAMES), churn),
        "fill_us": (filled - began) / count * 1e6,
        "churn_us": (churned - began_churn) / len(churn) * 1e6,
    }


async def _written(
    pages: Sequence[bytes], packing: Packing, folder: Path, frames: int, churn: Sequence[tuple[int, int]]
) -> float | None:
    """Return the bytes written back per byte of their pages, in a pool too small for all; None if none were written back."""
    memory = StoreMemory(len(pages) * PAGE, frames, backed=True, packing=packing)
    memory.populate()
    store = PageStore(len(pages) * PAGE, frames, Backing(str(folder / "backing")), Codec(), memory)
    store.recover()
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for page, content in [*((page, page) for page in range(len(pages))), *churn]:
            await store.requests.write(page * PAGE, pages[content])
        counted = store.statistics()
        nursery.cancel_scope.cancel()
    store.close()
    stores.let_go(memory)
    if not counted.cumul_writeback_pages:
        return None
    return counted.cumul_writeback_bytes / (counted.cumul_writeback_pages * PAGE)


BENCHMARK: Final = Benchmark(
    "packing", "pages in a frame with each packing, for the memory of real programs", (), add_options, measure
)
