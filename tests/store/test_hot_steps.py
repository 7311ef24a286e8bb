# SPDX-License-Identifier: MIT
"""Kills at each instruction of the hot path in C: afterwards each page is the old one or the new one, never another.

A child changes a store in memory that outlives it, and its parent lets it continue by one instruction at a time
(ptrace). The parent keeps each change of the memory: that is the state that a kill there would leave. Afterwards the
memory gets each of these states in turn, a new store takes it over, and the pages are compared:

    old, old, ..., old, new, ..., new           and after the last instruction: all new

test_crash_points.py does the same between lines of Python, and test_hot.py kills at random moments.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.core.samples import BIG, HALF, RAW, SMALL, page
from tests.store.rig import fill_reserve, let_go, packed_by
from tests.support import printed_by
from zbudfs.core._hot import Hot
from zbudfs.core.codec import Codec, page_of_word
from zbudfs.core.dense import Dense
from zbudfs.core.packing import Packing
from zbudfs.core.units import PAGE_SIZE, PAGE_WORDS
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore

PAGES: Final = 24
FRAMES: Final = 8
BULK_BEGINS: Final = 64
BULK_STRIDE: Final = 32
"""The part of the states in a copy of many bytes that is tried: the first ones, and then one of this many."""
MOST_STEPS: Final = 2_000_000
_TRACEME: Final = 0
_SINGLESTEP: Final = 9

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

Change = tuple[int, int, bytes]
"""The number of the arena, the offset, and the new bytes."""
PIECE: Final = 256
"""Bytes that are compared and kept at once."""


class Scene:
    """A store in memory that outlives a process, with each kind of page. `model` is the content of each page."""

    def __init__(self) -> None:
        self.memory = StoreMemory(PAGES * PAGE_SIZE, FRAMES, backed=False)
        self.memory.populate()
        self.store = PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec(), self.memory)
        assert isinstance(self.store.state.path, Hot)
        self.store.recover()
        fill_reserve(self.store.state.pool)
        self.model = dict.fromkeys(range(PAGES), bytes(PAGE_SIZE))
        for number, content in (
            *((0, page(0, 600)), (1, page(1, 700)), (2, page(2, 800)), (3, page(3, 900)), (4, page(4, SMALL))),
            *((5, page(5, BIG)), (6, page_of_word(6)), (7, page(7, RAW)), (8, page(8, HALF)), (9, bytes(PAGE_SIZE))),
        ):
            self.put(number, content)
        self.put(1, page(11, 20))  # holes, if the packing makes them
        self.put(3, page_of_word(3))
        self.arenas = [self.memory.pages, self.memory.frames, self.memory.frame_table, self.memory.free_frames]
        self.image = [bytes(arena.view) for arena in self.arenas]

    def put(self, number: int, content: bytes) -> None:
        """Write pages."""
        assert self.store.requests.write_nowait(number * PAGE_SIZE, content) == len(content)
        for at in range(0, len(content), PAGE_SIZE):
            self.model[number + at // PAGE_SIZE] = content[at : at + PAGE_SIZE]

    def put_back(self) -> None:
        """Restore the memory."""
        for arena, content in zip(self.arenas, self.image, strict=True):
            arena.view[:] = content


class Watch:
    """A record of the changes in the arenas of a scene between two questions."""

    def __init__(self, scene: Scene) -> None:
        self._arenas = scene.arenas
        self._copies = [ctypes.create_string_buffer(content, len(content)) for content in scene.image]
        self._addresses = [ctypes.addressof(copy) for copy in self._copies]

    def changes(self) -> list[Change]:
        """Return the pieces that have changed."""
        found: list[Change] = []
        for number, (arena, copy) in enumerate(zip(self._arenas, self._addresses, strict=True)):
            for at in self._differing(arena.address, copy, 0, arena.size):
                ctypes.memmove(copy + at, arena.address + at, PIECE)
                found.append((number, at, bytes(arena.view[at : at + PIECE])))
        return found

    def _differing(self, address: int, copy: int, begin: int, end: int) -> list[int]:
        """Return the starts of the pieces that differ between `begin` and `end`. An instruction changes one or two."""
        if not _libc.memcmp(address + begin, copy + begin, end - begin):
            return []
        if end - begin == PIECE:
            return [begin]
        middle = begin + (end - begin) // PIECE // 2 * PIECE
        return self._differing(address, copy, begin, middle) + self._differing(address, copy, middle, end)


def stepped(scene: Scene, act: Callable[[], object]) -> list[list[Change]]:
    """Run something in a child, one instruction at a time, and return the changes of each instruction."""
    pid = os.fork()
    if not pid:
        me = os.getpid()
        if not _libc.ptrace(_TRACEME, 0, None, None):
            os.kill(me, signal.SIGSTOP)
            act()
            os.kill(me, signal.SIGSTOP)
        os._exit(2)
    found: list[list[Change]] = []
    watch = Watch(scene)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSTOPPED(status), "the child cannot be traced"
    for _ in range(MOST_STEPS):
        if _libc.ptrace(_SINGLESTEP, pid, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
            break
        if changes := watch.changes():
            found.append(changes)
    done = os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert done, f"the child did not come to its end: status {status:#x}"
    return found


def taken_over(memory: StoreMemory) -> list[bytes]:
    """Return the content of all pages for a store that takes the memory over. No page may be lost, and all must add up."""
    heir = PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec(), memory)
    assert heir.recover().lost_pages == 0
    heir.check()
    content = heir.requests.read_nowait(0, PAGES * PAGE_SIZE)
    assert content is not None and len(content) == PAGES * PAGE_SIZE
    return [content[at : at + PAGE_SIZE] for at in range(0, len(content), PAGE_SIZE)]


def kill_everywhere(number: int, content: bytes) -> dict[str, int]:
    """Kill a write at each instruction. Return the number of states, and of those with a visible change."""
    scene = Scene()
    codec = scene.store.requests.codec
    pieces = [content[at : at + PAGE_SIZE] for at in range(0, len(content), PAGE_SIZE)]
    # zstd changes no table, and takes many steps.
    compress = functools.partial(
        next, iter([codec.compress(piece) for piece in pieces if piece != piece[:8] * PAGE_WORDS])
    )
    path = scene.store.state.path
    old = [scene.model[page] for page in range(PAGES)]
    new = [*old[:number], *pieces, *old[number + len(pieces) :]]
    steps = stepped(
        scene, lambda: path.write(number, content, compress, scene.store.state, scene.store.requests.between)
    )
    scene.put_back()
    image = [bytearray(part) for part in scene.image]
    allocator = scene.store.state.allocator
    undo = scene.memory.frame_table.view[-1:0] if not isinstance(allocator, Dense) else allocator._undo_of.cast("B")
    assert taken_over(scene.memory) == old
    found = {"states": 1, "tried": 1, "new": 0, "compacting": 0}
    bulk = 0
    last_new = 0
    for step, changes in enumerate(steps):
        found["states"] += 1
        only_bytes = all(arena == 1 or is_undo_copy(scene, arena, at) for arena, at, _ in changes)
        for arena, at, piece in changes:
            image[arena][at : at + len(piece)] = piece
        bulk = bulk + 1 if only_bytes else 0
        if bulk > BULK_BEGINS and bulk % BULK_STRIDE and step < len(steps) - 1:
            continue
        for at, part in enumerate(image):
            scene.arenas[at].view[:] = part
        found["tried"] += 1
        found["compacting"] += any(undo)
        pages = taken_over(scene.memory)
        wrong = [at for at in range(PAGES) if pages[at] not in (old[at], new[at])]
        assert not wrong, f"step {step}: pages {wrong} are neither the old nor the new ones"
        is_new = sum(pages[at] != old[at] for at in range(PAGES))
        assert is_new >= last_new, f"step {step}: a page that was new is the old one again"
        last_new = is_new
        found["new"] += is_new > 0
    assert pages == new
    scene.store.close()
    let_go(scene.memory)
    return found


def is_undo_copy(scene: Scene, arena: int, at: int) -> bool:
    """Return whether a piece of an arena is in the undo copy."""
    own = type(scene.store.state.allocator).OWN_BYTES
    used = type(scene.store.state.allocator).table_size(FRAMES)
    return arena == 2 and own > 0 and used - own + PIECE <= at < used


WRITES: Final[dict[str, tuple[int, bytes]]] = {
    "a new page, alone": (20, page(20, BIG)),
    "a new page beside others": (20, page(20, 1100)),
    "a small new page": (20, page(20, 20)),
    "a new page where holes are": (20, page(20, 2150)),
    "another size, larger": (4, page(104, 1500)),
    "another size, smaller": (2, page(102, SMALL)),
    "the only page of a frame": (5, page(105, 3100)),
    "a word over a zpage": (0, page_of_word(77)),
    "a zpage over a word": (6, page(106, HALF)),
    "a zpage over a raw page": (7, page(107, SMALL)),
    "several": (0, page(100, 900) + page(101, 500) + page_of_word(5) + page(103, 700) + page(104, 900) + page(105, 40)),
}


def main() -> int:
    """Do all writes with the named packing, and print the result or the error of each."""
    found: dict[str, Any] = {}
    with packed_by(Packing.parse(sys.argv[1])):
        for name, (number, content) in WRITES.items():
            try:
                found[name] = kill_everywhere(number, content)
            except Exception as error:
                found[name] = repr(error)
    print(json.dumps(found))
    return 0


@functools.cache
def results(packing: str) -> dict[str, Any]:
    """Kill each write everywhere, in a separate process with one thread, and return its results."""
    return printed_by("tests.store.test_hot_steps", packing)


@pytest.mark.parametrize("packing", ["zbud", "dense"])
@pytest.mark.parametrize("name", WRITES)
def test_killed_at_each_instruction(name: str, packing: str) -> None:
    """Each page is old or new after a kill anywhere, nothing is lost, and a new page stays new."""
    found = results(packing)[name]
    assert isinstance(found, dict), found
    assert 0 < found["new"] < found["tried"]


def test_kills_in_compactions() -> None:
    """There were compactions: in some states a copy had to be put back."""
    assert sum(found["compacting"] for found in results("dense").values()) > 10


if __name__ == "__main__":
    raise SystemExit(main())
