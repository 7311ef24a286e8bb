# SPDX-License-Identifier: MIT
"""The room in the backing file: it is made ready ahead of need, and given back when it is surplus, in a thread of its own."""

from collections.abc import Callable
from typing import Any, Final

import trio

from zbudfs.core.block_map import NO_SEGMENT, SEGMENT_BLOCKS, BlockMap
from zbudfs.core.budget import Budget
from zbudfs.core.delay import back_off_seconds
from zbudfs.core.errors import BackingError
from zbudfs.core.reclaim import TICK_SECONDS, Activity
from zbudfs.core.statistics import Counters
from zbudfs.store.backing import SEGMENT_BYTES, Backing
from zbudfs.store.faults import Faults
from zbudfs.store.frame_queue import FrameQueue
from zbudfs.store.iothread import IoThread
from zbudfs.store.signals import Signal, next_tick

GROW_SEGMENTS: Final = 16
"""Most segments that one call makes ready: 4 MiB."""

GROW_AHEAD_BLOCKS: Final = 64 * SEGMENT_BLOCKS
"""Free blocks to keep ready: 16 MiB, or as many as the pool has frames if that is less."""

FILE_LOOK_SECONDS: Final = 5.0
"""Time between two checks whether the backing file was deleted or cut short: each costs a call in a thread. Arbitrary."""

GROW_RETRY_SECONDS: Final = 10.0
GROW_RETRY_MOST_SECONDS: Final = 60.0
"""First and longest time between two attempts to grow while the disk refuses. The time doubles with each attempt. Guessed."""


class FileCheck:
    """Checks, once in FILE_LOOK_SECONDS, whether other programs have deleted the backing file or cut it short."""

    def __init__(self, backing: Backing, log: Callable[[str], None]) -> None:
        self._backing = backing
        self._log = log
        self._next_at = 0.0
        self.damage: list[str] = []
        """The damage at the last check, one sentence for each kind."""

    async def look(self, thread: IoThread[Any]) -> None:
        """Check if it is time, and log new damage."""
        if trio.current_time() < self._next_at:
            return
        self._next_at = trio.current_time() + FILE_LOOK_SECONDS
        found = await thread.run(self._backing.damage) or []  # CHECKPOINT, not cancelled
        for text in found:
            if text not in self.damage:
                self._log(text)
        self.damage = found


class Growth:
    """Keeps GROW_AHEAD_BLOCKS blocks of `backing` ready, or `nr_frames` if the pool has fewer frames."""

    def __init__(
        self,
        blocks: BlockMap,
        backing: Backing,
        nr_frames: int,
        budget: Budget,
        queue: FrameQueue,
        activity: Activity,
        faults: Faults,
        counters: Counters,
        log: Callable[[str], None],
    ) -> None:
        self._blocks = blocks
        self._backing = backing
        self._wanted_blocks = min(GROW_AHEAD_BLOCKS, nr_frames)
        self._budget = budget
        self._queue = queue
        self._activity = activity
        self._faults = faults
        self._counters = counters
        self._thread = IoThread[Any]("grow")
        self._lock = trio.Lock()
        self._wanted = Signal()
        self._grow_at = float("-inf")
        """Time of the next attempt to grow."""
        self._failures = 0
        """Number of attempts in a row that the disk has refused."""
        self.file = FileCheck(backing, log)

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    @property
    def is_full(self) -> bool:
        """Whether the backing could not grow when it had to."""
        return "grow" in self._faults or "full" in self._faults

    @property
    def may_grow(self) -> bool:
        """Whether the budget allows a new segment of the backing."""
        cost = self._backing.zeros_per_segment
        return not cost or self._budget.allows(cost, trio.current_time())

    def see_to_blocks(self) -> None:
        """Make `run` grow the backing if few free blocks are left."""
        if self._blocks.free_blocks < self._wanted_blocks >> 1:
            self._wanted.set()

    async def run(self) -> None:
        """Grow, check the file and trim until it is cancelled. While writes fail, order the next attempt."""
        while True:
            await self._wanted.wait(next_tick())
            await self.grow_ahead()
            await self.file.look(self._thread)
            if "write" in self._faults:  # the disk may be well again, with no write meanwhile
                self._queue.writeback_wanted.set()
            if self._activity.is_calm(trio.current_time()):
                await self.trim()

    async def grow_ahead(self) -> None:
        """Make blocks ready until there are enough, or until no more are possible now."""
        await self._grow(self._wanted_blocks)

    async def grow_one(self) -> None:
        """Make some blocks ready, if there is no free block at all."""
        await self._grow(1)

    async def _grow(self, wanted: int) -> None:
        """Make segments of the backing ready until there are `wanted` free blocks, or no more are possible now.

        The lock is free after each step: a round that has no block left does not wait for all that the disk task wants.
        """
        most = 1 if self._failures else GROW_SEGMENTS
        while self._blocks.free_blocks < wanted:
            async with self._lock:  # CHECKPOINT
                if self._blocks.free_blocks < wanted:
                    most = await self._grow_step(most)  # CHECKPOINT
            if not most:
                return
        self._faults.end("full", f"{self._backing.name} has free blocks again")

    async def _grow_step(self, most: int) -> int:
        """Make up to `most` segments ready. Return how many to try next; 0 if no more are possible now.

        After a refusal the next step asks for one segment. If that is refused too, the rest of the disk is left to other
        programs for a while.
        """
        blocks, backing = self._blocks, self._backing
        now = trio.current_time()
        if now < self._grow_at or not self.may_grow:
            return 0
        cost = backing.zeros_per_segment
        first, count = blocks.take_holes(most if self._budget.allows(most * cost, now) else 1)
        if not count:
            if blocks.free_blocks:
                self._faults.end("full", f"{backing.name} has free blocks again")
            else:
                size = blocks.ready_segments * SEGMENT_BYTES >> 20
                self._faults.begin("full", f"{backing.name} is full: all of its {size} MiB are in use", now)
            return 0
        self._budget.spend(count * cost, now)
        zeros_before = backing.zeros_written
        failure = ""
        try:
            grown = await self._thread.run(_make_ready, backing, first, count)  # CHECKPOINT, not cancelled
        except BackingError as error:
            grown, failure = False, str(error)
        except BaseException:
            blocks.return_holes(first, count)
            raise
        now = trio.current_time()
        if grown:
            self._failures = 0
            self._faults.end("grow", f"{backing.name} grows again")
            blocks.add_ready(first, count)
            self._counters.cumul_grown_bytes += backing.zeros_written - zeros_before
            self._queue.has_progressed(now)  # the disk is slow, but it answers
            return most
        blocks.return_holes(first, count)
        self._budget.give_back(count * cost - (backing.zeros_written - zeros_before), now)
        if count > 1:
            return 1
        if not failure:
            self._grow_at = now + TICK_SECONDS  # the check costs nothing
            text = f"{backing.name} cannot grow: what its file system has left is kept for other programs"
        else:
            self._failures += 1
            self._grow_at = now + back_off_seconds(self._failures, GROW_RETRY_SECONDS, GROW_RETRY_MOST_SECONDS)
            text = failure
        self._faults.begin("grow", text, now)
        return 0

    async def trim(self) -> None:
        """Give segments without a used block back to the disk, except for a reserve."""
        blocks, backing = self._blocks, self._backing
        group = backing.trim_segments
        while group and self._activity.is_calm(trio.current_time()):
            async with self._lock:  # CHECKPOINT: no segment may be made ready while it is given back
                segment = blocks.take_free(2 * self._wanted_blocks)
                if segment == NO_SEGMENT:
                    return
                first = segment // group * group
                count = min(group, backing.nr_segments - first)
                try:
                    if blocks.are_holes(first, count):
                        await self._thread.run(backing.punch, first, count)  # CHECKPOINT, not cancelled
                except BackingError:
                    blocks.add_ready(segment, 1)  # the segment still has its room
                    return
                blocks.return_holes(segment, 1)


def _make_ready(backing: Backing, first: int, count: int) -> bool:
    """Make segments ready. False if the disk has no room for them beside its reserve. For a worker thread."""
    if not backing.has_room(count):
        return False
    backing.make_ready(first, count)
    return True
