# SPDX-License-Identifier: MIT
"""An idle mount sleeps, with any size of pool, and its standby is ready."""

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
from zbudfs.store.memory import Follower, StoreMemory
from zbudfs.store.status_area import Field

__all__ = ["mount"]  # the fixture

SECONDS = 3.0
MOST_A_SECOND = 10.0
"""Wake-ups of all processes: there are 4, and there were 21 when each task had its own clock."""


def mapped_bytes(pid: int, name: str) -> int:
    """Return how much of an arena is in the page tables of a process."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(f"/{name}"))
    return 1024 * next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))


@pytest.mark.needs("root", "fuse")
def test_an_idle_mount_wakes_seldom(mount: Callable[..., Served], tmp_path: Path) -> None:
    """Keeper, worker and standby wake seldom, also with a backing file."""
    served = mount("--backing", tmp_path / "backing")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 256)
    pids = (served.keeper, served.worker, served.standby)
    time.sleep(2.0)  # the work after the last write

    def wake_ups() -> int:
        return sum(count for pid in pids for _, count in costs_of(pid).values())

    before = wake_ups()
    time.sleep(SECONDS)
    assert wake_ups() - before < MOST_A_SECOND * SECONDS


@pytest.mark.needs("root", "fuse")
def test_the_standby_follows(mount: Callable[..., Served]) -> None:
    """The standby maps the memory that the worker gets soon afterwards, before it is needed."""
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
    """Store memory that records the mapped parts."""

    whole = 0
    parts: list[tuple[int, int]]

    def mapped(self) -> tuple[int, list[tuple[int, int]]]:
        """Return how often all of it was mapped, and which frames were mapped alone."""
        return self.whole, list(self.parts)

    def map_populated(self) -> None:
        """Count the call."""
        self.whole += 1
        super().map_populated()

    def map_frames(self, first: int, count: int) -> None:
        """Record the frames."""
        self.parts.append((first, count))
        super().map_frames(first, count)


def test_only_what_is_new_is_mapped() -> None:
    """All of it is mapped once, then the frames that got memory for the first time, and nothing if there are none."""
    memory = Recorder(MIB, 1024, backed=False)
    memory.parts = []
    memory.populate()
    fields = memory.status_area.fields
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
    """The ranges are those that begin in the requested bytes, cut at their end."""
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
