# SPDX-License-Identifier: MIT
"""Killed at each instruction of the hot path in C: afterwards each page is the old one or the new one, never another.

A child does one thing to a store whose memory outlives it, and its parent has it go on by one instruction at a time
(ptrace). Whenever the memory is not what it was an instruction ago, what has changed is kept: that is what a kill there
would leave behind. Afterwards the memory is made each of these states in turn, a new store takes it over, and is compared:

    old, old, ..., old, new, ..., new           and after the last instruction: all new

Between lines of Python test_crash_points.py does the same; a kill at a moment of its own choosing test_hot.py.
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
"""A copy of many bytes takes many steps. Of states in a row that differ in frames or the undo copy alone
the first ones are tried, then one in so many."""
MOST_STEPS: Final = 2_000_000
_TRACEME: Final = 0
_SINGLESTEP: Final = 9

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

Change = tuple[int, int, bytes]
"""Number of the arena, offset, what is there now."""
PIECE: Final = 256
"""Bytes that are compared and kept at once."""


class Scene:
    """A store in memory that outlives a process, with something of everything; `model` is what each page holds."""

    def __init__(self) -> None:
        self.memory = StoreMemory(PAGES * PAGE_SIZE, FRAMES, backed=False)
        self.memory.populate()
        self.store = PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec(), self.memory)
        assert self.store._hot is not None
        self.store.recover()
        fill_reserve(self.store.state.pool)
        self.model = dict.fromkeys(range(PAGES), bytes(PAGE_SIZE))
        for number, content in (
            *((0, page(0, 600)), (1, page(1, 700)), (2, page(2, 800)), (3, page(3, 900)), (4, page(4, SMALL))),
            *((5, page(5, BIG)), (6, page_of_word(6)), (7, page(7, RAW)), (8, page(8, HALF)), (9, bytes(PAGE_SIZE))),
        ):
            self.put(number, content)
        self.put(1, page(11, 20))  # holes, where the packing makes them
        self.put(3, page_of_word(3))
        self.arenas = [self.memory.pages, self.memory.frames, self.memory.frame_table, self.memory.free_frames]
        self.image = [bytes(arena.view) for arena in self.arenas]

    def put(self, number: int, content: bytes) -> None:
        """Write pages."""
        assert self.store.write_nowait(number * PAGE_SIZE, content) == len(content)
        for at in range(0, len(content), PAGE_SIZE):
            self.model[number + at // PAGE_SIZE] = content[at : at + PAGE_SIZE]

    def put_back(self) -> None:
        """Make the memory what it was."""
        for arena, content in zip(self.arenas, self.image, strict=True):
            arena.view[:] = content


class Watch:
    """Tells what has changed in the arenas of a scene since it was asked last."""

    def __init__(self, scene: Scene) -> None:
        self._arenas = scene.arenas
        self._copies = [ctypes.create_string_buffer(content, len(content)) for content in scene.image]
        self._addresses = [ctypes.addressof(copy) for copy in self._copies]

    def changes(self) -> list[Change]:
        """Return the pieces that are not what they were."""
        found: list[Change] = []
        for number, (arena, copy) in enumerate(zip(self._arenas, self._addresses, strict=True)):
            if not _libc.memcmp(arena.address, copy, arena.size):
                continue
            for at in range(0, arena.size, PIECE):
                if _libc.memcmp(arena.address + at, copy + at, PIECE):
                    ctypes.memmove(copy + at, arena.address + at, PIECE)
                    found.append((number, at, bytes(arena.view[at : at + PIECE])))
        return found


def stepped(scene: Scene, act: Callable[[], object]) -> list[list[Change]]:
    """Have a child do something, an instruction at a time; what each instruction changed that changed anything."""
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
    """Return what all pages hold for a store that takes the memory over; nothing may be lost, and it must be in order."""
    heir = PageStore(PAGES * PAGE_SIZE, FRAMES, None, Codec(), memory)
    assert heir.recover().lost_pages == 0
    heir.check()
    content = heir.read_nowait(0, PAGES * PAGE_SIZE)
    assert content is not None and len(content) == PAGES * PAGE_SIZE
    return [content[at : at + PAGE_SIZE] for at in range(0, len(content), PAGE_SIZE)]


def kill_everywhere(number: int, content: bytes) -> dict[str, int]:
    """Write pages, killed at each instruction; how many states were tried, and in how many of them something was seen."""
    scene = Scene()
    codec = scene.store.codec
    pieces = [content[at : at + PAGE_SIZE] for at in range(0, len(content), PAGE_SIZE)]
    # zstd changes no table, and takes many steps.
    compress = functools.partial(
        next, iter([codec.compress(piece) for piece in pieces if piece != piece[:8] * PAGE_WORDS])
    )
    path = scene.store._hot
    assert path is not None
    old = [scene.model[page] for page in range(PAGES)]
    new = [*old[:number], *pieces, *old[number + len(pieces) :]]
    steps = stepped(scene, lambda: path.write(number, content, compress, scene.store.state, scene.store.between))
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
    """Whether a piece of an arena lies in the undo copy."""
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
    """Do all writes with the packing named; print, for each, what was found, or what went wrong."""
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
    """Have every write killed everywhere, in a process of its own, which has one thread; what it found."""
    return printed_by("tests.store.test_hot_steps", packing)


@pytest.mark.parametrize("packing", ["zbud", "dense"])
@pytest.mark.parametrize("name", WRITES)
def test_killed_at_each_instruction(name: str, packing: str) -> None:
    """After a kill anywhere each page is the old or the new one, nothing is lost, and once new it stays new."""
    found = results(packing)[name]
    assert isinstance(found, dict), found
    assert 0 < found["new"] < found["tried"]


def test_kills_in_compactions() -> None:
    """Frames were compacted meanwhile: there were states in which a copy had to be put back."""
    assert sum(found["compacting"] for found in results("dense").values()) > 10


if __name__ == "__main__":
    raise SystemExit(main())
