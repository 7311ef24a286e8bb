# SPDX-License-Identifier: MIT
"""SIGKILL at each step of each change: afterwards each page is the old one or the new one, never another.

A scene is a small store in memory that outlives a process. It has pages in frames, paired and alone, raw ones, words,
pages in blocks, and ephemeral frames. For N = 1, 2, 3, ... the memory gets the content of the scene. A forked child
does the operation and kills itself at the Nth line of the code that changes state. A new store then takes the memory:

    recover, recount; compare each page; then work on: writes, reads, discards, a recount

This ends when a child reaches the end of the operation. A process with a single thread forks the children, since a fork
in the middle of another thread's work would test something else. Only children that need threads start them: one that
reads blocks, and one that does everything at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, Generic, ParamSpec, TypeVar

import pytest
import trio

from tests.core.frames import lru_of
from tests.core.samples import BIG, HALF, RAW, SMALL, page
from tests.store.rig import drop, get, in_block, in_ram, kind_of, packed_by, put
from tests.support import printed_by
from zbudfs.core.allocator import EPHEMERAL_KIND
from zbudfs.core.codec import Codec, page_of_word
from zbudfs.core.packing import Packing
from zbudfs.core.page_table import BLOCK, FRAME, RAW_BLOCK, RAW_FRAME, WORD
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store import page_store, reclaimer
from zbudfs.store.backing import SEGMENT_BYTES, Backing
from zbudfs.store.iothread import IoThread
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore

PAGES: Final = 24
FRAMES: Final = 16
SIZE: Final = PAGES * PAGE_SIZE
BACKING_BYTES: Final = 2 * SEGMENT_BYTES
"""The size of the backing file. A device of this size has two segments."""
ZEROS: Final = bytes(PAGE_SIZE)
ODD_WORD: Final = page_of_word(0x3FB999999999999A)
"""A word that does not fit the page table: a zpage of one chunk."""

WATCHED: Final = (
    *("store/state.py", "store/recovery.py", "store/pool.py"),
    *("core/allocator.py", "core/zbud.py", "core/dense.py", "core/page_table.py", "core/block_map.py", "core/lists.py"),
)
"""The code that changes state. Each of its lines is a place for a kill."""

PACKINGS: Final = ("zbud", "dense")

Act = Callable[["Scene"], None]


# ---- threads, or none ----------------------------------------------------------------------------------------------

P = ParamSpec("P")
T = TypeVar("T")


class Inline(Generic[T]):
    """A stand-in for IoThread that works in place, since the tests use a thousand stores, and threads take time."""

    def __init__(self, name: str) -> None:
        pass

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function, after a checkpoint as in an IoThread."""
        await trio.lowlevel.checkpoint()
        return function(*args, **kwargs)

    def close(self) -> None:
        """Do nothing, since there is no thread."""


def threads(kind: type) -> None:
    """Set the class of threads for new stores."""
    for module in (page_store, reclaimer):
        setattr(module, "IoThread", kind)  # noqa: B010  which is not what the module's own type says


# ---- the scene -----------------------------------------------------------------------------------------------------


class Kept(Backing):
    """A backing file that is not emptied when one of several stores closes it."""

    def close(self) -> None:
        """Leave the file as it is."""


class Scene:
    """A store whose memory can be restored. `model` is the content of each page."""

    def __init__(self, folder: Path) -> None:
        self.memory = StoreMemory(SIZE, FRAMES, backed=True)
        self.memory.populate()
        assert self.memory.nr_segments * SEGMENT_BYTES == BACKING_BYTES
        self.backing = Kept(str(folder / "backing"))
        self._plain = os.open(folder / "backing", os.O_RDWR | os.O_CLOEXEC)
        self.model: dict[int, bytes] = {}
        self.store = self.fresh()
        self.store.recover()
        trio.run(self._arrange)
        self.store.close()
        self.store.check()
        self._arenas = [
            (arena, bytes(arena.view)) for arena in self.memory.arenas if arena is not self.memory.request_slots
        ]
        self._blocks = self._read_blocks()

    def fresh(self) -> PageStore:
        """Return a new store on the memory, like that of a new worker, before any request."""
        return PageStore(SIZE, FRAMES, self.backing, Codec(), self.memory, pure=True)  # lines of C have no trace

    def content(self, number: int) -> bytes:
        """Return the content of a page."""
        return self.model.get(number, ZEROS)

    async def _put(self, number: int, content: bytes) -> None:
        await put(self.store, number, content)
        self.model[number] = content

    async def _arrange(self) -> None:
        store = self.store
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            for number in (8, 9, 11, 12, 14, 15):
                await self._put(number, page(number))
            await self._put(10, page(10, RAW))
            await self._put(13, page(13, RAW))
            self.write_back(5)
            for number in (11, 13, 14):
                await get(store, number)
            for number, content in (
                *((0, page(0)), (1, page(1)), (2, page(2)), (3, page(3, SMALL))),
                *((4, page(4, RAW)), (5, page(5, BIG)), (6, page_of_word(6)), (7, ODD_WORD), (16, page(16))),
            ):
                await self._put(number, content)
            nursery.cancel_scope.cancel()
        kinds = {0: FRAME, 4: RAW_FRAME, 5: FRAME, 6: WORD, 7: FRAME, 8: BLOCK, 10: RAW_BLOCK, 11: FRAME, 13: RAW_FRAME}
        assert {number: kind_of(store, number) for number in kinds} == kinds, "the scene is not what it should be"
        assert len(lru_of(store.state.pool.allocator, EPHEMERAL_KIND)) == 3

    def write_back(self, most: int, *, fails: bool = False) -> None:
        """Write the coldest frames to the backing file, like the reclaimer, or let the file refuse them."""
        state = self.store.state
        batch = state.begin_writeback(most)
        assert len(batch) == most
        for frame, block in batch:
            self.backing.write_blocks(block, [state.pool.allocator.frame_bytes(frame)])
        if fails:
            state.fail_writeback(batch)
        else:
            state.finish_writeback(batch)

    def with_readers(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run something asynchronous that may read blocks. A child needs this, since it does not have the parent's threads."""
        self.store._page_in.threads = [IoThread("read-0"), IoThread("read-1")]
        trio.run(main)

    def _read_blocks(self) -> bytes:
        return os.pread(self._plain, BACKING_BYTES, 0)

    def image(self) -> list[bytes]:
        """Return everything that outlives a process."""
        return [*(bytes(arena.view) for arena, _ in self._arenas), self._read_blocks()]

    def put_back(self) -> None:
        """Restore memory and backing file."""
        for arena, content in self._arenas:
            arena.view[:] = content
        if self._read_blocks() != self._blocks:
            os.pwrite(self._plain, self._blocks, 0)


# ---- kills ---------------------------------------------------------------------------------------------------------


def at_each_line(act: Callable[[int], None]) -> None:
    """Call `act` with 1, 2, 3, ... before each line of the watched code in this thread."""
    watched: dict[CodeType, bool] = {}
    count = 0

    def in_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            act(count)
        return in_line

    def in_call(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        wanted = watched.get(code)
        if wanted is None:
            wanted = watched[code] = code.co_filename.endswith(WATCHED)
        return in_line if wanted else None

    sys.settrace(in_call)


def kill_at(step: int) -> Callable[[int], None]:
    """Return a function that ends this process at a step."""

    def act(count: int) -> None:
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def in_child(act: Callable[[], None], at_line: Callable[[int], None]) -> bool:
    """Run something in a forked child, which may kill itself. Return True if it did, False if it reached the end."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            at_each_line(at_line)
            act()
            sys.settrace(None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the child died of signal {os.WTERMSIG(status)}"
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


def steps_with_a_change(scene: Scene, act: Callable[[], None], folder: Path) -> list[int]:
    """Return the lines before which memory or backing file differ from the line before.

    A kill at any other line leaves the same state as an earlier one.
    """
    steps: list[int] = []
    last = scene.image()

    def look(count: int) -> None:
        nonlocal last
        image = scene.image()
        if image != last:
            steps.append(count)
            last = image

    def act_and_tell() -> None:
        act()
        sys.settrace(None)
        (folder / "steps").write_text(json.dumps([1, *steps]))

    assert not in_child(act_and_tell, look)
    found: list[int] = json.loads((folder / "steps").read_text())
    return found


def after(scene: Scene, allowed: Mapping[int, tuple[bytes, ...]], seed: int) -> int:
    """Recover the memory of a child, compare, and work on. Return the number of changed pages that are new.

    `allowed` has the possible contents of the changed pages, the old one first.
    """
    store = scene.fresh()
    new = 0
    try:
        found = store.recover()
        assert found.lost_pages == 0, f"{found.lost_pages} pages are lost"
        store.check()
        model: dict[int, bytes] = {}

        async def compare_and_go_on() -> None:
            nonlocal new
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                for number in range(PAGES):
                    content = await get(store, number)
                    choice = allowed.get(number, (scene.content(number),))
                    assert content in choice, f"page {number} is neither the old nor the new one"
                    new += content != choice[0]
                    model[number] = content
                await work_on(store, model, random.Random(seed))
                nursery.cancel_scope.cancel()

        trio.run(compare_and_go_on)
        assert store.statistics().lost_pages == 0
        store.check()
    finally:
        store.close()
    return new


async def work_on(store: PageStore, model: dict[int, bytes], source: random.Random) -> None:
    """Use a store for a while, and compare all of it."""
    for _ in range(6):
        number = source.randrange(PAGES)
        match source.randrange(4):
            case 0:
                await drop(store, number)
                model[number] = ZEROS
            case 1:
                model[number] = page_of_word(source.getrandbits(64))
                await put(store, number, model[number])
            case _:
                model[number] = page(source.getrandbits(32), source.choice((SMALL, HALF, BIG, RAW)))
                await put(store, number, model[number])
    for number in range(PAGES):
        assert await get(store, number) == model[number], f"page {number}, after a while"


# ---- the operations ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """The work of a child, and the pages that it changes."""

    act: Act
    becomes: dict[int, bytes] = field(default_factory=dict)
    fewest: int = 5
    """Lowest number of places for a kill. With fewer, the test does not test."""


def _write(number: int, content: bytes) -> Operation:
    def act(scene: Scene) -> None:
        assert scene.store.requests.write_nowait(number * PAGE_SIZE, content) == len(content)

    count = len(content) // PAGE_SIZE
    return Operation(act, {number + at: content[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] for at in range(count)})


def _several(*operations: Operation) -> Operation:
    def act(scene: Scene) -> None:
        for operation in operations:
            operation.act(scene)

    return Operation(act, {number: new for operation in operations for number, new in operation.becomes.items()})


def _discard(first: int, count: int) -> Operation:
    def act(scene: Scene) -> None:
        trio.run(drop, scene.store, first, count)

    return Operation(act, dict.fromkeys(range(first, first + count), ZEROS))


def _patch(number: int, old: bytes, skip: int, piece: bytes) -> Operation:
    def act(scene: Scene) -> None:
        scene.with_readers(lambda: scene.store.requests.write(number * PAGE_SIZE + skip, piece))

    return Operation(act, {number: old[:skip] + piece + old[skip + len(piece) :]})


def _discard_part(number: int, old: bytes, skip: int, length: int) -> Operation:
    def act(scene: Scene) -> None:
        scene.with_readers(lambda: scene.store.requests.discard(number * PAGE_SIZE + skip, length))

    return Operation(act, {number: old[:skip] + bytes(length) + old[skip + length :]})


def _page_in(*numbers: int) -> Operation:
    def act(scene: Scene) -> None:
        async def main() -> None:
            for number in numbers:
                assert await get(scene.store, number) == scene.content(number)
                assert in_ram(scene.store, number), "it was not adopted"

        scene.with_readers(main)

    return Operation(act)


def _write_back(*, fails: bool) -> Operation:
    def act(scene: Scene) -> None:
        scene.write_back(4, fails=fails)
        assert all(in_block(scene.store, number) is not fails for number in (0, 1, 2, 3, 4))

    return Operation(act, fewest=40)


def _overwritten_zombie() -> Operation:
    """During a writeback a page is overwritten, one is discarded, and one frame loses all its pages."""
    new = page(100, SMALL)

    def act(scene: Scene) -> None:
        state = scene.store.state
        batch = state.begin_writeback(4)
        scene.store.requests.write_nowait(0, new)
        state.forget(2)
        state.forget(4)
        for frame, block in batch:
            scene.backing.write_blocks(block, [state.pool.allocator.frame_bytes(frame)])
        state.finish_writeback(batch)

    return Operation(act, {0: new, 2: ZEROS, 4: ZEROS}, fewest=40)


def _drop_ephemeral() -> Operation:
    def act(scene: Scene) -> None:
        while scene.store.state.drop_ephemeral():
            pass
        assert all(in_block(scene.store, number) for number in (11, 12, 13, 14, 15))

    return Operation(act)


def _recover() -> Operation:
    def act(scene: Scene) -> None:
        assert scene.store.recover().lost_pages == 0

    return Operation(act, fewest=60)


OPERATIONS: Final[dict[str, Operation]] = {
    "a new page, alone": _write(20, page(20, BIG)),
    "a new page, matched": _write(20, page(20, SMALL)),
    "a new raw page": _write(20, page(20, RAW)),
    "a new word": Operation(_write(20, page_of_word(20)).act, {20: page_of_word(20)}, fewest=2),
    "several new pages": _write(17, page(17, RAW) + page(18, BIG) + page(19, HALF) + page_of_word(1) + ODD_WORD),
    "another size, larger": _write(3, page(103, BIG)),
    "another size, smaller": _write(5, page(105, SMALL)),
    "the buddy of another": _write(0, page(100, HALF)),
    "a word over a zpage": _write(1, page_of_word(77)),
    "an odd word over a zpage": _write(1, ODD_WORD),
    "a zpage over a word": _write(6, page(106, HALF)),
    "a raw page over a zpage": _write(0, page(100, RAW)),
    "a zpage over a raw page": _write(4, page(104, HALF)),
    "raw and back": _several(_write(4, page(104, HALF)), _write(0, page(100, RAW))),
    "a zpage over one in a block": _write(8, page(108, HALF)),
    "a zpage over a raw page in a block": _write(10, page(110, HALF)),
    "a zpage over an ephemeral one": _write(11, page(111, HALF)),
    "a raw page over an ephemeral raw one": _write(13, page(113, RAW)),
    "a zpage into the hole of another": _several(_discard(0, 1), _write(20, page(20, HALF))),
    "discard of a zpage": _discard(0, 1),
    "discard of a raw page": _discard(4, 1),
    "discard in a block": _discard(8, 2),
    "discard of an ephemeral pair": _discard(11, 2),
    "discard of many": _discard(0, 14),
    "patch in RAM": _patch(1, page(1), 100, b"patched" * 50),
    "patch in a block": _patch(9, page(9), 4000, b"patched" * 10),
    "patch in a raw block": _patch(10, page(10, RAW), 0, b"patched" * 10),
    "discard of a part": _discard_part(2, page(2), 1000, 500),
    "page-in of a pair": _page_in(8, 9),
    "page-in of a raw page": _page_in(10),
    "writeback": _write_back(fails=False),
    "failed writeback": _write_back(fails=True),
    "writeback of what changes": _overwritten_zombie(),
    "drop of ephemeral frames": _drop_ephemeral(),
    "recovery": _recover(),
}


def in_memory() -> str | None:
    """Return a folder on a tmpfs with direct I/O, or None before Linux 6.6."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.close(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT))
        return "/dev/shm"
    return None


def kill_everywhere(operation: Operation, folder: Path) -> dict[str, int]:
    """Run an operation with a kill at each step in turn. Return the number of kills, and of those after the change."""
    scene = Scene(folder)

    def act() -> None:
        operation.act(scene)

    allowed = {number: (scene.content(number), new) for number, new in operation.becomes.items()}
    steps = steps_with_a_change(scene, act, folder)
    new = 0
    for step in steps:
        scene.put_back()
        assert in_child(act, kill_at(step)), f"it was not killed at step {step}"
        try:
            new += after(scene, allowed, step)
        except BaseException as error:
            raise AssertionError(f"killed at step {step}: {error!r}") from error
    scene.put_back()
    assert not in_child(act, lambda _: None)
    after(scene, {number: (new,) for number, new in operation.becomes.items()}, 0)  # it is complete: all must be new
    return {"kills": len(steps), "new": new}


# ---- everything at once --------------------------------------------------------------------------------------------

STORM_STEPS: Final = 80
STORM_STRIDE: Final = 397
"""Lines between two kills: a prime number, so that the places differ."""

Step = tuple[str, int, tuple[bytes, ...]]


def _storm_steps(source: random.Random) -> list[Step]:
    """Return the steps of a storm: more pages than the pool holds, so that frames are written back, dropped and used again."""
    steps: list[Step] = []
    for _ in range(STORM_STEPS):
        first = source.randrange(PAGES)
        count = min(source.randrange(1, 7), PAGES - first)
        kind = source.choice(("write", "write", "write", "read", "read", "read", "discard"))
        seeds = [source.getrandbits(32) for _ in range(count)]
        contents = tuple(page(seed, source.choice((HALF, HALF, BIG, BIG, BIG, RAW))) for seed in seeds)
        steps.append((kind, first, contents if kind == "write" else (ZEROS,) * count))
    return steps


def kill_in_a_storm(folder: Path) -> dict[str, int]:
    """Kill a store with all its tasks and threads at several places. Return the kills, and its work until then."""
    scene = Scene(folder)
    steps = _storm_steps(random.Random(4))
    progress = StoreMemory(
        SIZE, 1, backed=False
    ).status_area.fields  # shared with the child, like any memory of a store
    kills = new = 0
    killed = True

    def storm() -> None:
        threads(IoThread)
        store = scene.fresh()
        store.recover()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                for done, (kind, first, contents) in enumerate(steps):
                    progress[0] = done
                    if kind == "read":
                        await get(store, first, len(contents))
                    elif kind == "discard":
                        await drop(store, first, len(contents))
                    else:
                        await put(store, first, b"".join(contents))
                progress[0] = len(steps)
                counts = store.statistics()
                assert counts.cumul_writeback_frames > 10, "this is no storm"
                assert counts.cumul_pagein_blocks > 5, "this is no storm"
                nursery.cancel_scope.cancel()

        trio.run(main)

    while killed:
        scene.put_back()
        progress[0] = 0
        killed = in_child(storm, kill_at((kills + 1) * STORM_STRIDE))
        kills += killed
        allowed: dict[int, tuple[bytes, ...]] = {number: (scene.content(number),) for number in range(PAGES)}
        for done, (kind, first, contents) in enumerate(steps[: progress[0] + 1]):
            for number, content in enumerate(contents, first):
                if kind != "read":
                    allowed[number] = (*(allowed[number][-1:] if done == progress[0] else ()), content)
        new += after(scene, allowed, kills)
    assert progress[0] == len(steps)
    return {"kills": kills, "new": new}


# ---- the process of the kills, and the tests -----------------------------------------------------------------------

STORM: Final = "all at once"


def main() -> int:
    """Do all operations with the named packing, and print the result or the error of each."""
    found: dict[str, Any] = {}
    threads(Inline)
    with packed_by(Packing.parse(sys.argv[1])):
        found = do_all()
    print(json.dumps(found))
    return 0


def do_all() -> dict[str, Any]:
    """Do all operations, and return the result or the error of each."""
    found: dict[str, Any] = {}
    for name in (*OPERATIONS, STORM):
        with tempfile.TemporaryDirectory(prefix="zbudfs-crash-", dir=in_memory()) as folder:
            try:
                if name == STORM:
                    found[name] = kill_in_a_storm(Path(folder))
                else:
                    found[name] = kill_everywhere(OPERATIONS[name], Path(folder))
            except Exception:
                found[name] = traceback.format_exc()
    return found


@functools.cache
def results(packing: str) -> dict[str, Any]:
    """Kill each operation everywhere, in a separate process, and return its results."""
    return printed_by("tests.store.test_crash_points", packing)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_each_step(name: str, packing: str) -> None:
    """Each page is old or new after a kill at any step, nothing is lost, and the store works on."""
    found = results(packing)[name]
    assert isinstance(found, dict), found
    operation = OPERATIONS[name]
    assert found["kills"] >= operation.fewest
    if operation.becomes:  # there were kills before and after the change
        assert 0 < found["new"] < found["kills"] * len(operation.becomes)


@pytest.mark.parametrize("packing", PACKINGS)
def test_killed_in_the_midst_of_everything(packing: str) -> None:
    """With all tasks and threads at work, answered requests stay, and other pages are old or new."""
    found = results(packing)[STORM]
    assert isinstance(found, dict), found
    assert found["kills"] >= 20
    assert found["new"] > 0


if __name__ == "__main__":
    raise SystemExit(main())
