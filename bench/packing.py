# SPDX-License-Identifier: MIT
"""How many pages a frame holds, packing by packing, on the memory of real programs.

    packing.py [--pages N] [--level N] [--programs python,node,java] [--packings zbud,dense:2,...] [--json]

Each program makes itself a heap and stops; its writable private memory is read from /proc, pages that are one word
repeated left out (they take no frame), and compressed as the daemon does. Then, for each packing, through a page store
with a real backing file:

    fill     every page once, the pool large enough: pages a frame
    churn    twice as many overwrites of random pages by other pages' content: pages a frame again
    write    the same content in a pool of a third of the frames: bytes written back per byte of the pages in them

and how large zpages are: the share between half and two thirds of a frame is what three zpages to a pair of frames
could gain. A program that is not installed is left out, and said so. No root is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zbudfs.core.allocator import HANDLE_SIZE, MAX_ZPAGE_SIZE
from zbudfs.core.codec import DEFAULT_LEVEL, Codec, is_word
from zbudfs.core.packing import Packing
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.backing import Backing
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore

PYTHON: Final = """
import json, random, time
d = [{'id': i, 'name': 'user%d' % i, 'tags': random.choices('abcdef', k=5), 'v': random.random()} for i in range(COUNT)]
s = json.dumps(d); print('up', flush=True); time.sleep(300)
"""
NODE: Final = """
const a = []; for (let i = 0; i < 4 * COUNT; i++) a.push({id: i, name: 'user' + i, v: Math.random(), s: 'x'.repeat(i % 50)});
const m = new Map(a.map((o) => [o.name, o])); console.log('up'); setTimeout(() => m, 300000);
"""
JAVA: Final = """
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
UP_LIMIT_SECONDS: Final = 120.0
_READ_BYTES: Final = 1 << 20


def commands(count: int, folder: str) -> dict[str, list[str]]:
    """Return how each program is started, `count` objects large, by its name."""
    heap = Path(folder, "Heap.java")
    heap.write_text(JAVA.replace("COUNT", str(count)))
    return {
        "python": [sys.executable, "-c", PYTHON.replace("COUNT", str(count))],
        "node": ["node", "-e", NODE.replace("COUNT", str(count))],
        "java": ["java", "-Xmx512m", str(heap)],
    }


def memory_of(pid: int) -> Iterator[bytes]:
    """Yield the pages of a process's writable private memory that are not one word repeated."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem:
        for line in maps:
            fields = line.split()
            if not fields[1].startswith("rw") or fields[1][3] != "p" or fields[-1] in ("[vvar]", "[vsyscall]"):
                continue
            start, end = (int(bound, 16) for bound in fields[0].split("-"))
            for at in range(start, end, _READ_BYTES):
                try:
                    mem.seek(at)
                    piece = mem.read(min(_READ_BYTES, end - at))
                except OSError:  # reserved, not readable
                    break
                for offset in range(0, len(piece) - PAGE_SIZE + 1, PAGE_SIZE):
                    page = piece[offset : offset + PAGE_SIZE]
                    if not is_word(page, int.from_bytes(page[:8], sys.byteorder)):
                        yield page


def snapshot(argv: Sequence[str]) -> list[bytes]:
    """Return the pages of a program, read once it has said that it is up."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"up\n":
                raise SystemExit(f"packing.py: {argv[0]} did not come up")
            return list(memory_of(process.pid))
        finally:
            process.kill()


@dataclass(frozen=True)
class Sizes:
    """How large the zpages of a program are."""

    pages: int
    mean_bytes: float
    raw_share: float
    """Pages that no frame can hold compressed."""
    pair_share: float
    """Zpages, handle included, above a half and up to two thirds of a frame."""

    @classmethod
    def of(cls, zpages: Sequence[bytes]) -> Sizes:
        """Measure them."""
        sizes = [len(zpage) + HANDLE_SIZE for zpage in zpages]
        between = sum(PAGE_SIZE / 2 < size <= 2 * PAGE_SIZE / 3 for size in sizes)
        raw = sum(len(zpage) > MAX_ZPAGE_SIZE for zpage in zpages)
        return cls(len(sizes), sum(sizes) / len(sizes), raw / len(sizes), between / len(sizes))


@dataclass(frozen=True)
class Result:
    """What a packing makes of the pages of a program."""

    packing: str
    filled: float
    """Pages a frame after the fill."""
    churned: float
    """Pages a frame after the churn."""
    written: float
    """Bytes written back per byte of the pages that were in the frames."""
    fill_us: float
    """Microseconds to place one compressed page during the fill."""
    churn_us: float
    """The same during the churn, the old zpage freed."""


async def measure(pages: Sequence[bytes], zpages: Sequence[bytes], packing: Packing, folder: str) -> Result:
    """Fill, churn, and write back."""
    count = len(pages)
    order = random.Random(7)
    replaced = [order.randrange(count) for _ in range(2 * count)]
    by = [order.randrange(count) for _ in range(2 * count)]
    memory = StoreMemory(count << PAGE_SHIFT, count, backed=False, packing=packing)
    memory.populate()
    store = PageStore(count << PAGE_SHIFT, count, None, Codec(), memory)
    store.recover()
    pool = store.state.pool
    pool.reserve_wanted = count
    while runs := pool.take_bare():
        pool.populate(runs)
        pool.add_ready(runs)

    def put(page: int, content: int) -> None:
        state = store.state
        zpage = zpages[content]
        done = state.place(page, zpage) if len(zpage) <= MAX_ZPAGE_SIZE else state.place_raw(page, pages[content])
        assert done

    start = time.perf_counter()
    for page in range(count):
        put(page, page)
    fill_seconds = time.perf_counter() - start
    filled = count / pool.used_frames
    start = time.perf_counter()
    for page, content in zip(replaced, by, strict=True):
        put(page, content)
    churn_seconds = time.perf_counter() - start
    frames = pool.used_frames
    store.check()
    store.close()
    for arena in memory.arenas:
        arena.release(0, arena.size)
    written = await write_back(pages, packing, folder, max(frames // 3, 256), zip(replaced, by, strict=True))
    return Result(
        str(packing), filled, count / frames, written, fill_seconds / count * 1e6, churn_seconds / count / 2 * 1e6
    )


async def write_back(
    pages: Sequence[bytes], packing: Packing, folder: str, frames: int, churn: Iterator[tuple[int, int]]
) -> float:
    """Return bytes written back per page byte, in a pool too small for the pages."""
    size = len(pages) << PAGE_SHIFT
    memory = StoreMemory(size, frames, backed=True, packing=packing)
    memory.populate()
    store = PageStore(size, frames, Backing(f"{folder}/backing"), Codec(), memory)
    store.recover()
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        for page, content in itertools.chain(((page, page) for page in range(len(pages))), churn):
            await store.write(page << PAGE_SHIFT, pages[content])
        counted = store.statistics()
        nursery.cancel_scope.cancel()
    store.close()
    for arena in memory.arenas:
        arena.release(0, arena.size)
    return counted.cumul_writeback_bytes / (max(counted.cumul_writeback_pages, 1) * PAGE_SIZE)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=36_000, help="most pages of each program (default: %(default)s)")
    parser.add_argument("--objects", type=int, default=90_000, help="how large the programs are (default: %(default)s)")
    parser.add_argument("--level", type=int, default=DEFAULT_LEVEL, help="zstd level (default: %(default)s)")
    parser.add_argument("--programs", default="python,node,java")
    parser.add_argument("--packings", default="zbud,dense:2,dense:3,dense:4,dense:5,dense:6,dense:7")
    parser.add_argument("--folder", help="where the backing file lies (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one object instead of a table")
    arguments = parser.parse_args(argv)
    try:
        packings = [Packing.parse(text) for text in arguments.packings.split(",")]
        codec = Codec(arguments.level)
    except ValueError as error:
        parser.error(str(error))
    found = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        known = commands(arguments.objects, folder)
        for name in arguments.programs.split(","):
            if name not in known:
                parser.error(f"{name!r} is not a program: write some of {', '.join(known)}")
            if shutil.which(known[name][0]) is None:
                print(f"packing.py: {name} is not installed and left out", file=sys.stderr)
                continue
            pages = snapshot(known[name])
            random.Random(7).shuffle(pages)
            del pages[arguments.pages :]
            zpages = [codec.encode(page) for page in pages]
            sizes = Sizes.of(zpages)
            results = [trio.run(measure, pages, zpages, packing, folder) for packing in packings]
            found[name] = {"sizes": asdict(sizes), "packings": [asdict(result) for result in results]}
            if not arguments.json:
                print_table(name, sizes, results)
    if arguments.json:
        print(json.dumps(found, indent=2))
    return 0


def print_table(name: str, sizes: Sizes, results: Sequence[Result]) -> None:
    """Print what was measured on one program."""
    print(
        f"{name}: {sizes.pages:,} pages, {sizes.mean_bytes:.0f} bytes each, {sizes.raw_share:.1%} incompressible,"
        f" {sizes.pair_share:.1%} between half and two thirds of a frame"
    )
    print(f"  {'packing':10}{'filled':>8}{'churned':>9}{'written':>9}{'fill us':>9}{'churn us':>10}")
    for result in results:
        print(
            f"  {result.packing:10}{result.filled:8.2f}{result.churned:9.2f}{result.written:9.3f}"
            f"{result.fill_us:9.2f}{result.churn_us:10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
