# SPDX-License-Identifier: MIT
"""Reclaim: it keeps free frames, free blocks and the pool's limit at their targets, with three tasks and a thread for each.

    writeback   frees frames below the low watermark, and carries out orders             writeback.py, batch_writer.py
    memory      populates frames ahead of need, moves the limit, trims when it is calm   frame_memory.py, pool_limit.py
    disk        grows the backing file ahead of need, trims it when it is calm           growth.py

The tasks have threads of their own so that a slow disk never delays memory, nor slow memory the disk. Writes that find no
frame wait in `queue` (frame_queue.py).
"""

from collections.abc import Callable

import trio

from zbudfs.core.budget import Budget
from zbudfs.core.reclaim import REFUSE_SECONDS, STALL_SECONDS, Activity
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.store.backing import Backing
from zbudfs.store.batch_writer import BatchWriter
from zbudfs.store.faults import Faults
from zbudfs.store.frame_memory import FrameMemory
from zbudfs.store.frame_queue import FrameQueue
from zbudfs.store.growth import Growth
from zbudfs.store.pool import ACTIVE_RESERVE_FRAMES, RESERVE_FRAMES
from zbudfs.store.pool_limit import PoolLimit
from zbudfs.store.signals import next_tick
from zbudfs.store.state import State
from zbudfs.store.writeback import Writeback


class Reclaimer:
    """The reclaim of one store. `log` is a function that logs a sentence."""

    def __init__(self, state: State, backing: Backing | None, log: Callable[[str], None]) -> None:
        self._state = state
        self._pool = state.pool
        self._faults = Faults(log)
        """Kinds: "write", "grow", "full" (the disk has no room for more), "memory", "stalled", "pressure"."""
        self._activity = Activity()
        self.limit = PoolLimit(state.pool)
        self.budget = Budget()
        self.queue = FrameQueue(state, self._faults)
        self._memory = FrameMemory(state.pool, self.queue, self._faults)
        self._writer: BatchWriter | None = None
        self._growth: Growth | None = None
        if backing is not None and state.blocks is not None:
            self._writer = BatchWriter(state, backing, self.budget, self._faults)
            shared = self.budget, self.queue, self._activity, self._faults, state.counters, log
            self._growth = Growth(state.blocks, backing, state.pool.nr_frames, *shared)
        self.writeback = Writeback(
            state, self.queue, self._memory, self.limit, self._writer, self._growth, self.budget, self._activity, log
        )
        self.ticked_at = self._began_at = 0.0
        """Time at which the memory task last read the clock, and the start of the store's own clock."""

    @property
    def failing(self) -> bool:
        """Whether the backing file failed to write the last batch."""
        return self._writer is not None and self._writer.is_failing

    @property
    def full(self) -> bool:
        """Whether the backing could not grow when it had to."""
        return self._growth is not None and self._growth.is_full

    def warnings(self) -> list[str]:
        """Return the present faults of the backing file and the memory, with their consequences, one sentence each."""
        found = list(self._growth.file.damage) if self._growth is not None else []
        for kind, then in (
            ("memory", "the pool cannot grow to its limit; free memory, or raise the memory limit of its cgroup"),
            ("write", "pages stay in RAM while there is room, and zbudfs tries again; look at its disk (dmesg)"),
            (
                "grow",
                "the part that is ready is used, then pages stay in RAM; make room on its disk, zbudfs tries again",
            ),
            ("full", "the part that is ready is used, then pages stay in RAM; use a larger disk or file"),
        ):
            if kind in self._faults:
                found.append(f"{self._faults.text(kind)}: {then}")
        progress_at = self.queue.progress_at
        if progress_at is not None and trio.current_time() - progress_at >= STALL_SECONDS:
            seconds = trio.current_time() - progress_at
            then = "wait" if seconds < REFUSE_SECONDS else "fail"
            found.append(
                f"the backing file has not answered for {seconds:.0f} s: writes {then} once RAM is used up; look at its disk"
                " (dmesg)"
            )
        return found

    def kick(self) -> None:
        """Note that pages were stored, and wake the tasks that have work."""
        self._activity.added()
        if self._pool.ready_frames < self._pool.reserve_frames >> 1:
            self._pool.reserve_wanted = ACTIVE_RESERVE_FRAMES
            self.queue.memory_wanted.set()
        self._see_to_free_frames()

    def _see_to_free_frames(self) -> None:
        if self._pool.free_frames < self.limit.watermarks.low_frames or len(self.queue):
            self.queue.writeback_wanted.set()

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Run all tasks until they are cancelled. The start is complete when the reserve of frames and blocks is ready."""
        self.ticked_at = self._began_at = trio.current_time()
        await self._memory.populate()
        if self._growth is not None:
            await self._growth.grow_ahead()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.writeback.run)
            nursery.start_soon(self._keep_memory)
            if self._growth is not None:
                nursery.start_soon(self._growth.run)
            task_status.started()

    async def _keep_memory(self) -> None:
        """Populate frames, advance the clock, move the limit, and trim, until it is cancelled."""
        while True:
            await self.queue.memory_wanted.wait(next_tick())
            now = self.ticked_at = trio.current_time()
            self._state.now = int(now - self._began_at)
            self.writeback.tick(now)
            await self._memory.populate()
            limit = self.limit.governor.tick(trio.current_time())
            if limit != self._pool.limit_frames:
                self.set_limit(limit)
            if limit == self.limit.governor.configured_frames:
                self._faults.end("pressure", "memory pressure is over: the pool has its whole limit again")
            self._activity.tick(trio.current_time())
            if self._activity.is_calm(trio.current_time()):
                self._pool.reserve_wanted = RESERVE_FRAMES
                await self._memory.trim()

    def close(self) -> None:
        """End the threads."""
        for owner in (self._memory, self._growth, self._writer):
            if owner is not None:
                owner.close()

    async def sync(self) -> None:
        """Sync the backing file: all batches written so far are on the disk then. BackingError."""
        if self._writer is not None:
            await self._writer.sync()
        else:
            await trio.lowlevel.checkpoint()

    # ---- the limit -------------------------------------------------------------------------------------------------

    def configure(
        self, *, limit_frames: int, watermarks: tuple[int, int], writeback_enabled: bool, age_seconds: int
    ) -> None:
        """Set the limit, the low and high watermark (0: it follows the limit), and the rules of writeback."""
        self.writeback.configure(enabled=writeback_enabled, age_seconds=age_seconds)
        self.limit.want_watermarks(*watermarks)
        governor = self.limit.governor
        if limit_frames != governor.configured_frames:
            governor.configure(limit_frames)
        self.set_limit(governor.limit_frames)  # it is lower than the configured limit while memory is short
        self.writeback.look()

    def set_limit(self, frames: int) -> None:
        """Set the pool's limit; frames above it are written back."""
        self.limit.set(frames)
        self.queue.memory_wanted.set()
        self._see_to_free_frames()
        self.queue.wake()

    def pressure(self) -> None:
        """Lower the limit for a while, since the system is short of memory. No effect without a backing file."""
        if self._growth is None:
            return
        before = self._pool.limit_frames
        self._state.counters.pressure_reports += 1
        limit = self.limit.governor.pressure(trio.current_time())
        if limit != before:
            self.set_limit(limit)
            text = (
                f"memory pressure: the pool's limit is {limit << PAGE_SHIFT >> 20} MiB for now, and lower if it lasts"
            )
            self._faults.begin("pressure", text, trio.current_time())
