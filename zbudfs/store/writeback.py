# SPDX-License-Identifier: MIT
"""Writeback: the choice of the frames to free, and the cause if none can be freed.

    watermarks   ephemeral frames are dropped, then batches of the coldest persistent frames are written to neighbouring
                 blocks, until the high watermark is reached
    orders       a number of frames is written now, or all ephemeral frames are dropped (`order`, `order_drop`)
    age          frames without a store for `age_seconds` are written

All three respect the budget.
"""

from collections.abc import Callable
from typing import Final

import trio

from zbudfs.core.budget import Budget
from zbudfs.core.errors import Refusal
from zbudfs.core.reclaim import BATCH_FRAMES, Activity
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.store.batch_writer import BatchWriter
from zbudfs.store.frame_memory import FrameMemory
from zbudfs.store.frame_queue import FrameQueue
from zbudfs.store.growth import Growth
from zbudfs.store.pool_limit import PoolLimit
from zbudfs.store.state import Eviction, State

DROP_STEP_FRAMES: Final = 512
"""Ephemeral frames that an order drops before other tasks get their turn: some 3 ms."""


class Writeback:
    """Frees frames of one store. `writer` and `growth` are None if there is no backing file."""

    def __init__(
        self,
        state: State,
        queue: FrameQueue,
        memory: FrameMemory,
        limit: PoolLimit,
        writer: BatchWriter | None,
        growth: Growth | None,
        budget: Budget,
        activity: Activity,
        log: Callable[[str], None],
    ) -> None:
        self._state = state
        self._pool = state.pool
        self._queue = queue
        self._memory = memory
        self._limit = limit
        self._writer = writer
        self._growth = growth
        self._budget = budget
        self._activity = activity
        self._log = log
        self.enabled = writer is not None
        """Whether frames are written back without an order."""
        self.age_seconds = 0
        """Frames without a store for this time, in seconds, are written back; 0: never."""
        self.ordered_frames = 0
        """Number of frames that are still to be written back on order."""
        self._ordered_drops = 0
        """Number of ephemeral frames that are still to be dropped on order."""
        self._budget_told = False

    def configure(self, *, enabled: bool, age_seconds: int) -> None:
        """Set whether frames are written back without an order, and from which age on (0: none)."""
        self.enabled = enabled and self._writer is not None
        self.age_seconds = age_seconds

    def look(self) -> None:
        """Check soon whether there is work, since a setting or an order has changed."""
        self._budget_told = False
        self._queue.writeback_wanted.set()

    def tick(self, now: float) -> None:
        """Check the work that depends on the time alone."""
        if self.age_seconds:
            self._queue.writeback_wanted.set()
        if self._budget_told and not self._budget.used_bytes(now):
            self._budget_told = False

    def order(self, frames: int) -> None:
        """Order that `frames` of the coldest persistent frames, or all there are, are written back; 0 ends the order."""
        counters = self._pool.allocator.counters()
        self.ordered_frames = min(frames, counters["pers_pageframes"] - counters["pers_zombie_count"])
        self.look()

    def order_drop(self) -> None:
        """Order that all ephemeral frames are dropped that exist now."""
        self._ordered_drops = self._pool.allocator.counters()["eph_pageframes"]
        self._queue.writeback_wanted.set()

    async def run(self) -> None:
        """Write back, drop and carry out orders until it is cancelled."""
        queue = self._queue
        while True:
            await queue.writeback_wanted.wait()
            queue.begin_round()
            queue.end_round(await self._write_back())  # CHECKPOINT
            await self._drop_ordered()  # CHECKPOINT
            if await self._write_cold():  # CHECKPOINT
                queue.writeback_wanted.set()  # the watermarks come first, then the next batch
            queue.progress_at = None

    def _frames_to_free(self, *, under_way: bool) -> int:
        need = self._limit.watermarks.frames_to_free(self._pool.free_frames, under_way=under_way)
        if not need and len(self._queue) and not self._pool.ready_frames and self._memory.is_late:
            return BATCH_FRAMES  # no memory comes, but frames that are written back can be used at once
        return need

    async def _write_back(self) -> Refusal | None:
        """Do one round. Return the cause if there was something to free and nothing could be freed."""
        under_way = False
        while need := self._frames_to_free(under_way=under_way):
            under_way = True
            if self._state.drop_ephemeral():
                self._queue.wake()
                continue
            if not self.enabled and not self.ordered_frames:
                return Refusal.NO_BACKING if self._writer is None else Refusal.WRITEBACK_OFF
            most = self._limit.watermarks.batch_frames
            frames = min(need, most if self.enabled else min(most, self.ordered_frames))
            obstacle = self._obstacle(frames)
            if obstacle is not None:
                return obstacle
            batch = self._state.begin_writeback(frames)
            if not batch:
                if not await self._blocks_may_come():
                    enough = self._pool.free_frames > 0 and self._pool.ready_frames > 0
                    return None if enough else self._why_no_batch()
                continue
            if not await self._write(batch):
                return Refusal.BACKING_FAILING
        return None

    def _obstacle(self, frames: int) -> Refusal | None:
        """Return the cause for which `frames` frames cannot be written now, as far as it is known beforehand."""
        if self._writer is None:
            return Refusal.NO_BACKING
        now = trio.current_time()
        if now < self._writer.retry_at:
            return Refusal.BACKING_FAILING
        if not self._budget.allows(frames << PAGE_SHIFT, now):
            if not self._budget_told:
                self._budget_told = True
                hours = self._budget.seconds_until_full(now) / 3600
                self._log(f"the writeback budget is used up; it is whole again in {hours:.1f} hours")
            return Refusal.BUDGET
        return None

    def _why_no_batch(self) -> Refusal:
        blocks = self._state.blocks
        if blocks is not None and blocks.free_blocks:
            return Refusal.BUSY
        return Refusal.BUDGET if self._growth is not None and not self._growth.may_grow else Refusal.BACKING_FULL

    async def _drop_ordered(self) -> None:
        """Drop the ephemeral frames of an order."""
        while self._ordered_drops:
            step = min(self._ordered_drops, DROP_STEP_FRAMES)
            dropped = sum(self._state.drop_ephemeral() for _ in range(step))
            self._ordered_drops = self._ordered_drops - dropped if dropped == step else 0
            self._queue.wake()
            await trio.lowlevel.checkpoint()  # CHECKPOINT: no state is held across it

    async def _write_cold(self) -> bool:
        """Write one batch of an order, or else of frames that are too old. True if there may be more."""
        by_order = bool(self.ordered_frames)
        if not by_order and not (self.age_seconds and self.enabled):
            return False
        frames = min(self.ordered_frames, BATCH_FRAMES) if by_order else BATCH_FRAMES
        if self._obstacle(frames) is None:
            batch = self._state.begin_writeback(frames, None if by_order else self._state.now - self.age_seconds)
            if not batch and by_order and await self._blocks_may_come():  # CHECKPOINT
                return True
            if batch and await self._write(batch):  # CHECKPOINT
                self._state.counters.cumul_aged_frames += 0 if by_order else len(batch)
                return True
        self.ordered_frames = 0
        return False

    async def _blocks_may_come(self) -> bool:
        """Grow the backing file, since no batch could be made. True if there are free blocks now."""
        blocks = self._state.blocks
        if blocks is None or self._growth is None or blocks.free_blocks:
            return False  # there are blocks, so frames lack: all are being filled or written
        await self._growth.grow_one()
        return bool(blocks.free_blocks)

    async def _write(self, batch: list[Eviction]) -> bool:
        """Write a batch of zombies, and wake the tasks that depend on it. False if the backing file failed."""
        assert self._writer is not None and self._growth is not None
        if not await self._writer.write(batch):  # CHECKPOINT
            return False
        self._queue.progress_at = trio.current_time()
        self._activity.written(self._queue.progress_at)
        self.ordered_frames = max(0, self.ordered_frames - len(batch))
        self._growth.see_to_blocks()
        self._queue.wake()
        return True
