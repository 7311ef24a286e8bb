# SPDX-License-Identifier: MIT
"""A mount on which nothing happens sleeps, whatever the size of its pool, and its standby is ready all the same."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.idle import costs_of
from tests.service.test_keeper import MIB, Served, fill, mount, opened
from tests.support import wait_until
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.board import Field
from zbudfs.store.memory import Follower, StoreMemory

__all__ = ["mount"]  # the fixture

SECONDS = 6.0
MOST_A_SECOND = 10.0
"""Wake-ups of all processes: there are 4, and 21 when each task had a clock of its own."""


def mapped_bytes(pid: int, name: str) -> int:
    """Return how much of an arena a process has in its page tables."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(f"/{name}"))
    return 1024 * next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))


@pytest.mark.needs("root", "fuse")
def test_an_idle_mount_wakes_seldom(mount: Callable[..., Served], tmp_path: Path) -> None:
    """Keeper, worker and standby, with a backing file as well."""
    served = mount("--backing", tmp_path / "backing")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 256)
    pids = (served.keeper, served.worker, served.standby)
    time.sleep(4.0)  # what comes after the last write

    def wake_ups() -> int:
        return sum(count for pid in pids for _, count in costs_of(pid).values())

    before = wake_ups()
    time.sleep(SECONDS)
    assert wake_ups() - before < MOST_A_SECOND * SECONDS


@pytest.mark.needs("root", "fuse")
def test_the_standby_follows(mount: Callable[..., Served]) -> None:
    """What the worker gets memory for is mapped by the standby soon afterwards, before it is needed."""
    served = mount("--size", "128M", "--pool", "64M")
    standby = served.standby
    noise = os.urandom(MIB)
    with opened(served.swapfile) as fd:
        for at in range(48):
            os.pwrite(fd, noise, at * MIB)
    wait_until(lambda: mapped_bytes(standby, "frames") >= 48 * MIB, "the standby mapping the frames")
    wait_until(lambda: served.field(Field.FRESH_FRAMES) * PAGE_SIZE <= mapped_bytes(standby, "frames"), "all of them")
    assert served.standby == standby


class Recorder(StoreMemory):
    """Store memory that records what is mapped."""

    whole = 0
    parts: list[tuple[int, int]]

    def mapped(self) -> tuple[int, list[tuple[int, int]]]:
        """Return how often all of it was, and which frames were by themselves."""
        return self.whole, list(self.parts)

    def map_populated(self) -> None:
        """Count it."""
        self.whole += 1
        super().map_populated()

    def map_frames(self, first: int, count: int) -> None:
        """Keep which."""
        self.parts.append((first, count))
        super().map_frames(first, count)


def test_only_what_is_new_is_mapped() -> None:
    """All of it once, then the frames that have got memory for the first time, and nothing while there are none."""
    memory = Recorder(MIB, 1024, backed=False)
    memory.parts = []
    memory.populate()
    fields = memory.board.fields
    follower = Follower(memory)
    for _ in range(3):
        follower.follow()
    assert memory.mapped() == (1, [])
    assert [follower.is_behind] == [False]
    for first in (0, 100):
        memory.populate_frames([(first, 100)])
        fields[Field.FRESH_FRAMES] = first + 100
        fields[Field.POPULATED_FRAMES] += 100
        assert [follower.is_behind] == [True]
        for _ in range(3):
            follower.follow()
    assert memory.mapped() == (1, [(0, 100), (100, 100)])


def test_parts_of_an_arena_that_have_memory() -> None:
    """Those that begin in the bytes that are asked for, cut at their end."""
    memory = StoreMemory(MIB, 1024, backed=False)
    frames = memory.frames
    frames.populate(10 * PAGE_SIZE, 10 * PAGE_SIZE)
    frames.populate(30 * PAGE_SIZE, PAGE_SIZE)
    assert frames.populated(0, 40 * PAGE_SIZE) == [
        (10 * PAGE_SIZE, 10 * PAGE_SIZE),
        (30 * PAGE_SIZE, PAGE_SIZE),
    ]
    assert frames.populated(15 * PAGE_SIZE, 10 * PAGE_SIZE) == [(15 * PAGE_SIZE, 5 * PAGE_SIZE)]
    assert frames.populated(12 * PAGE_SIZE, 3 * PAGE_SIZE) == [(12 * PAGE_SIZE, 3 * PAGE_SIZE)]
    assert frames.populated(20 * PAGE_SIZE, 10 * PAGE_SIZE) == []
