# SPDX-License-Identifier: MIT
"""Reclaim: keeping free frames, free blocks and the pool's limit as they should be. Three tasks, a thread each.

    writeback   free frames below the low watermark: drop ephemeral frames, then write batches of the coldest
                persistent ones to neighbouring blocks, until the high watermark is reached
    memory      populate ready frames ahead of need, release the surplus when things are calm, and lower and
                raise the pool's limit under memory pressure
    disk        grow the backing file ahead of need, and give wholly free segments back when things are calm

They have threads of their own so that a slow disk never keeps memory from coming, nor the other way round.

A write that finds no frame waits in `wait_frame_free`. It is told to give up (PoolFull) only by a writeback round
that began after it came and found nothing to do: no backing file, a full one, one that has just failed, writeback
turned off or its budget used up; or when the disk has not answered for half a minute. To refuse a page costs nothing:
it stays in RAM with its owner. To make it wait for ever may take from the system the very memory that the disk's own
file system needs to answer, and keeps reads of what is in RAM from getting through.

Besides what the watermarks ask for, the writeback task does what it is ordered to (`order_writeback`, `order_drop`), and
writes back frames that are older than `age_seconds`. All of it keeps to the budget.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from zbudfs.core.allocator import PERSISTENT_KIND
from zbudfs.core.block_map import NO_SEGMENT, SEGMENT_BLOCKS
from zbudfs.core.budget import Budget
from zbudfs.core.errors import BackingError, PoolFull, Refusal
from zbudfs.core.latency import Timed
from zbudfs.core.reclaim import BATCH_FRAMES, PressureGovernor, Watermarks
from zbudfs.core.units import NO_FRAME, PAGE_SHIFT
from zbudfs.store.backing import SEGMENT_BYTES, Backing
from zbudfs.store.faults import Faults
from zbudfs.store.iothread import IoThread
from zbudfs.store.pool import ACTIVE_RESERVE_FRAMES, POPULATE_FRAMES, RESERVE_FRAMES
from zbudfs.store.state import Eviction, State

GROW_SEGMENTS: Final = 16
"""Segments made ready with one call: 4 MiB."""

GROW_AHEAD_BLOCKS: Final = 64 * SEGMENT_BLOCKS
"""Free blocks kept ready: 16 MiB, or all that the pool can hold if that is less."""

CALM_SECONDS: Final = 5.0
"""Without a writeback and a new zpage for so long, free blocks and frames are surplus. Guessed."""

TICK_SECONDS: Final = 1.0
"""Between two looks of the memory and the disk task. All that is periodic happens at the same moments (`next_tick`)."""

FILE_LOOK_SECONDS: Final = 5.0
"""Between two looks at what somebody may have done to the backing file: each costs a call in a thread. Arbitrary."""

RETRY_SECONDS: Final = 1.0
"""After a failed writeback the next one is not tried before. Guessed: a disk that fails at once must not be flooded."""

GROW_RETRY_SECONDS: Final = 10.0
GROW_RETRY_MOST_SECONDS: Final = 60.0
"""After the disk has refused to let the file grow it is not tried again before, for twice as long each time. Guessed."""

PATIENCE_SECONDS: Final = 0.05
"""How long a write waits for memory that is on its way before it has something written back instead.

Populating 4 MiB takes some 2 ms, so by then the system is short of memory. Guessed.
"""

REFUSED_SECONDS: Final = 0.2
"""After the system had no memory for the pool it is not asked again before: a write that waits would ask all the time."""

DROP_STEP_FRAMES: Final = 512
"""Ephemeral frames dropped on order before other tasks get their turn: some 3 ms."""

STALL_SECONDS: Final = 5.0
"""A disk that has not answered for so long is worth a warning. Guessed: a busy one takes tenths of a second."""

REFUSE_SECONDS: Final = 30.0
"""A write that finds no frame is refused when writeback has got nowhere for so long. Guessed: a sleeping disk needs some
10 s to spin up, and after 120 s the kernel calls a task hung."""

POPULATE_SECONDS: Final = 5.0
"""How long a write waits for the system to give the pool memory, where writing back cannot help. Guessed."""


def next_tick() -> float:
    """Return when the next whole TICK_SECONDS begin, on trio's clock."""
    return (trio.current_time() // TICK_SECONDS + 1) * TICK_SECONDS


class Reclaimer:
    """The reclaim of one store. `log` is called with a sentence when something is worth telling."""

    def __init__(self, state: State, backing: Backing | None, log: Callable[[str], None] | None = None) -> None:
        self._state = state
        self._pool = state.pool
        self._backing = backing
        self._latencies = self._pool.memory.board.latencies
        self.log = log or (lambda _: None)
        self.governor = PressureGovernor(self._pool.nr_frames)
        self.watermarks = Watermarks.of(self._pool.nr_frames)
        self.wanted_watermarks = (0, 0)
        """Low and high as somebody has set them; 0: they follow the limit."""
        self.writeback_enabled = backing is not None
        """Whether anything is written back without an order."""
        self.budget = Budget()
        self.age_seconds = 0
        """Frames to which nothing was added for so long are written back; 0: never."""
        self.ordered_frames = 0
        """Frames that are still to be written back on order."""
        self.ordered_drops = 0
        """Ephemeral frames that are still to be dropped on order."""
        self.ticked_at = self._began_at = 0.0
        """When the memory task looked at the clock last, and the start of the store's own clock."""
        self.writeback_failures = 0
        self.cumul_grown_bytes = 0
        self.cumul_aged_frames = 0
        self._writer = IoThread[None]("writeback") if backing is not None else None
        self._grower = IoThread[Any]("grow") if backing is not None else None
        self._populator = IoThread[None]("populate")
        self._writeback_wanted = trio.Event()
        self._memory_wanted = trio.Event()
        self._disk_wanted = trio.Event()
        self._grow_lock = trio.Lock()
        self._waiting = trio.lowlevel.ParkingLot()
        self._rounds = 0
        """Writeback rounds that have begun."""
        self._stuck: Refusal | None = None
        """Why the last round ended, if it was because there was nothing that it could free."""
        self._populating_since: float | None = None
        self._populate_at = float("-inf")
        """Before that it is not tried again."""
        self._memory_refused = False
        """The system did not give the pool the memory that it asked for last."""
        self._filling = 0
        """Frames that blocks are being read into: they can be dropped when that is over."""
        self._retry_at = 0.0
        self._last_writeback = self._last_added = float("-inf")
        self._added = False
        """Something was stored since the memory task looked last."""
        self._grow_at = float("-inf")
        """Before that the backing is not grown again."""
        self._grow_failures = 0
        """Times in a row that the disk has refused to let it grow."""
        self._faults = Faults(lambda text: self.log(text))
        """Kinds: "write", "grow", "full" (the disk has no room for more), "memory", "stalled"."""
        self._look_at_file_at = 0.0
        self._damage: list[str] = []
        """What somebody has done to the backing file."""
        self._progress_at: float | None = None
        """When the writeback that is under way last got somewhere."""
        self._budget_told = False

    @property
    def failing(self) -> bool:
        """The backing file did not take what was written last."""
        return "write" in self._faults

    @property
    def full(self) -> bool:
        """The backing could not grow when it had to."""
        return "grow" in self._faults or "full" in self._faults

    def warnings(self) -> list[str]:
        """What is wrong with the backing file or the memory now, and what that means; nothing while all is well."""
        found = list(self._damage)
        for kind, then in (
            ("memory", "the pool cannot grow to its limit"),
            ("write", "pages stay in RAM while there is room, and it is tried again"),
            ("grow", "what it has is used, then pages stay in RAM; it is tried again"),
            ("full", "what it has is used, then pages stay in RAM"),
        ):
            if kind in self._faults:
                found.append(f"{self._faults.text(kind)}: {then}")
        if self._progress_at is not None and trio.current_time() - self._progress_at >= STALL_SECONDS:
            seconds = trio.current_time() - self._progress_at
            then = "wait" if seconds < REFUSE_SECONDS else "fail"
            found.append(f"the backing file has not answered for {seconds:.0f} s: writes {then} once RAM is used up")
        return found

    def kick(self) -> None:
        """Pages were stored: see whether there is something to do, soon."""
        self._added = True
        if self._pool.ready_frames < self._pool.reserve_frames >> 1:
            self._pool.reserve_wanted = ACTIVE_RESERVE_FRAMES
            self._memory_wanted.set()
        self._see_to_free_frames()

    def _see_to_free_frames(self) -> None:
        if self._pool.free_frames < self.watermarks.low_frames or len(self._waiting):
            self._writeback_wanted.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """All tasks, until cancelled. Started when the reserve of frames and blocks is there."""
        self.ticked_at = self._began_at = trio.current_time()
        await self._populate()
        await self._grow()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_back_for_ever)
            nursery.start_soon(self._keep_memory_for_ever)
            if self._backing is not None:
                nursery.start_soon(self._keep_disk_for_ever)
            task_status.started()

    def close(self) -> None:
        """End the threads."""
        for thread in (self._populator, self._grower, self._writer):
            if thread is not None:
                thread.close()

    async def wait_frame_free(self) -> None:
        """Until a frame can be taken, or there is reason to try. PoolFull if nothing can be done about it."""
        pool = self._pool
        rounds_before = self._rounds
        asked_at = trio.current_time()
        give_up_at = asked_at + POPULATE_SECONDS
        while not (pool.ready_frames and pool.free_frames > 0):
            if self._state.drop_ephemeral():
                continue
            now = trio.current_time()
            wake_at = (now if self._progress_at is None else self._progress_at) + REFUSE_SECONDS
            stuck = self._stuck if self._rounds > rounds_before else None
            if now >= wake_at:
                stuck = Refusal.BACKING_STALLED
                self._say_stalled()
            if pool.free_frames > 0:  # the limit allows it, but no frame has memory
                if stuck and (now >= give_up_at or self._memory_refused):
                    raise PoolFull(
                        "the system gives the pool no memory, and no frame can be written back", Refusal.NO_MEMORY
                    )
                self._memory_wanted.set()
                if now >= asked_at + PATIENCE_SECONDS:
                    asked_at = now
                    self._writeback_wanted.set()
                wake_at = asked_at + PATIENCE_SECONDS
            elif not stuck:
                self._writeback_wanted.set()  # a round is under way, or will be: it wakes us if it gets anywhere
            elif stuck is Refusal.BACKING_STALLED or not self._filling:
                raise PoolFull("no frame is free and none can be written back", stuck)
            # else what is being read into can be dropped when that is over, which wakes us
            with trio.move_on_at(wake_at):
                await self._waiting.park()  # CHECKPOINT

    def _say_stalled(self) -> None:
        text = f"the backing file has not answered for {REFUSE_SECONDS:.0f} s"
        self._faults.begin("stalled", text, trio.current_time(), f"{text}: until it does, pages stay in RAM")

    def filling(self, frames: int) -> None:
        """So many more frames are being read into, or fewer: then they can be had."""
        self._filling += frames
        if frames < 0:
            self._waiting.unpark_all()

    async def sync(self) -> None:
        """What was written back before is on the disk. BackingError."""
        if self._writer is not None and self._backing is not None:
            await self._writer.run(self._backing.sync)
        else:
            await trio.lowlevel.checkpoint()

    def set_limit(self, frames: int) -> None:
        """The pool's limit from now on; what is over it is written back."""
        self._pool.limit_frames = frames
        self.watermarks = Watermarks.of(frames, *self.wanted_watermarks)
        self._memory_wanted.set()
        self._see_to_free_frames()
        self._waiting.unpark_all()

    def look(self) -> None:
        """Something was changed: the writeback task sees whether there is something to do."""
        self._budget_told = False
        self._writeback_wanted.set()

    def order_writeback(self, frames: int) -> None:
        """Write so many of the coldest persistent frames back now, or as many as there are; 0 ends what was ordered."""
        counters = self._pool.allocator.counters()
        self.ordered_frames = min(frames, counters["pers_pageframes"] - counters["pers_zombie_count"])
        self.look()

    def order_drop(self) -> None:
        """Drop all ephemeral frames that there are now."""
        self.ordered_drops = self._pool.allocator.counters()["eph_pageframes"]
        self._writeback_wanted.set()

    @property
    def coldest_age_seconds(self) -> int:
        """How long nothing was added to the coldest persistent frame; 0 if there is none."""
        frame = self._pool.allocator.oldest(PERSISTENT_KIND)
        return self._state.now - self._pool.stored_at[frame] if frame != NO_FRAME else 0

    def pressure(self) -> None:
        """The system is short of memory: lower the limit for a while. Without a backing file there is nowhere to go."""
        if self._backing is None:
            return
        before = self._pool.limit_frames
        limit = self.governor.pressure(trio.current_time())
        if limit != before:
            self.set_limit(limit)
            text = (
                f"memory pressure: the pool's limit is {limit << PAGE_SHIFT >> 20} MiB for now, and lower if it lasts"
            )
            self._faults.begin("pressure", text, trio.current_time())

    # ---- writeback -------------------------------------------------------------------------------------------------

    async def _write_back_for_ever(self) -> None:
        while True:
            await self._writeback_wanted.wait()
            self._writeback_wanted = trio.Event()
            self._rounds += 1
            self._stuck = None
            self._progress_at = trio.current_time()
            self._stuck = await self._write_back()
            self._waiting.unpark_all()
            await self._drop_ordered()  # CHECKPOINT
            if await self._write_cold():  # CHECKPOINT
                self._writeback_wanted.set()  # the watermarks come first, then the next batch
            self._progress_at = None

    def _frames_to_free(self, *, under_way: bool) -> int:
        need = self.watermarks.frames_to_free(self._pool.free_frames, under_way=under_way)
        if not need and len(self._waiting) and not self._pool.ready_frames:
            since = self._populating_since
            if since is None or trio.current_time() - since >= PATIENCE_SECONDS:
                return BATCH_FRAMES  # memory does not come: what is written back can be used at once
        return need

    async def _write_back(self) -> Refusal | None:
        """One round. If there was something to free and nothing that could be: why."""
        under_way = False
        while need := self._frames_to_free(under_way=under_way):
            under_way = True
            if self._state.drop_ephemeral():
                self._waiting.unpark_all()
                continue
            if not self.writeback_enabled and not self.ordered_frames:
                return Refusal.NO_BACKING if self._backing is None else Refusal.WRITEBACK_OFF
            frames = min(need, BATCH_FRAMES, BATCH_FRAMES if self.writeback_enabled else self.ordered_frames)
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
        """Why so many frames cannot be written at present, as far as that is known before it is tried."""
        if self._writer is None:
            return Refusal.NO_BACKING
        now = trio.current_time()
        if now < self._retry_at:
            return Refusal.BACKING_FAILING
        if not self.budget.allows(frames << PAGE_SHIFT, now):
            if not self._budget_told:
                self._budget_told = True
                hours = self.budget.seconds_until_full(now) / 3600
                self.log(f"the writeback budget is used up; it is whole again in {hours:.1f} hours")
            return Refusal.BUDGET
        return None

    def _why_no_batch(self) -> Refusal:
        blocks = self._state.blocks
        if blocks is not None and blocks.free_blocks:
            return Refusal.BUSY
        return Refusal.BACKING_FULL if self._may_grow() else Refusal.BUDGET

    def _may_grow(self) -> bool:
        """Whether the budget allows to make a new segment of the backing ready."""
        cost = self._backing.zeros_per_segment if self._backing is not None else 0
        return not cost or self.budget.allows(cost, trio.current_time())

    async def _drop_ordered(self) -> None:
        """Drop the ephemeral frames that were ordered to be dropped."""
        while self.ordered_drops:
            step = min(self.ordered_drops, DROP_STEP_FRAMES)
            dropped = sum(self._state.drop_ephemeral() for _ in range(step))
            self.ordered_drops = self.ordered_drops - dropped if dropped == step else 0
            self._waiting.unpark_all()
            await trio.lowlevel.checkpoint()  # CHECKPOINT: nothing was looked up

    async def _write_cold(self) -> bool:
        """Write one batch of what was ordered, or else of what is too old. True if there may be more."""
        by_order = bool(self.ordered_frames)
        if not by_order and not (self.age_seconds and self.writeback_enabled):
            return False
        frames = min(self.ordered_frames, BATCH_FRAMES) if by_order else BATCH_FRAMES
        if self._obstacle(frames) is None:
            batch = self._state.begin_writeback(frames, None if by_order else self._state.now - self.age_seconds)
            if not batch and by_order and await self._blocks_may_come():  # CHECKPOINT
                return True
            if batch and await self._write(batch):  # CHECKPOINT
                self.cumul_aged_frames += 0 if by_order else len(batch)
                return True
        self.ordered_frames = 0
        return False

    async def _blocks_may_come(self) -> bool:
        """Called when no batch could be made: True if the backing file grew meanwhile."""
        blocks = self._state.blocks
        if blocks is None or blocks.free_blocks:
            return False  # there are blocks, so it is frames that lack: all are being filled or written
        await self._grow()
        return bool(blocks.free_blocks)

    async def _write(self, batch: list[Eviction]) -> bool:
        """Write a batch of zombies; False if the backing file failed. Whatever happens, no frame stays a zombie."""
        backing, writer = self._backing, self._writer
        assert backing is not None and writer is not None
        self.budget.spend(len(batch) << PAGE_SHIFT, trio.current_time())
        written_before = backing.written_bytes
        began = time.perf_counter_ns()
        try:
            await writer.run(_write_runs, backing, self._runs_of(batch))  # CHECKPOINT, not cancelled
        except BackingError as error:
            self._state.fail_writeback(batch)
            self.writeback_failures += 1
            now = trio.current_time()
            self._retry_at = now + RETRY_SECONDS
            self.budget.give_back((len(batch) << PAGE_SHIFT) - (backing.written_bytes - written_before), now)
            self._faults.begin("write", str(error), now, f"{error}; the pages stay in RAM, and it is tried again")
            return False
        except BaseException:
            self._state.fail_writeback(batch)
            raise
        self._latencies.record(Timed.WRITEBACK, time.perf_counter_ns() - began)
        self._state.finish_writeback(batch)
        self._faults.end("write", f"{backing.name} takes pages again")
        self._faults.end("stalled", f"{backing.name} answers again")
        self._last_writeback = self._progress_at = trio.current_time()
        self.ordered_frames = max(0, self.ordered_frames - len(batch))
        if self._state.blocks is not None and self._state.blocks.free_blocks < self._blocks_wanted() >> 1:
            self._disk_wanted.set()
        self._waiting.unpark_all()
        return True

    def _runs_of(self, batch: list[Eviction]) -> list[tuple[int, list[memoryview]]]:
        """A batch as (first block, frames' bytes) for each run of neighbouring blocks."""
        allocator = self._pool.allocator
        runs: list[tuple[int, list[memoryview]]] = []
        expected = -1
        for frame, block in batch:
            if block != expected:
                runs.append((block, []))
            runs[-1][1].append(allocator.frame_bytes(frame))
            expected = block + 1
        return runs

    # ---- memory ----------------------------------------------------------------------------------------------------

    async def _keep_memory_for_ever(self) -> None:
        while True:
            with trio.move_on_at(next_tick()):
                await self._memory_wanted.wait()
            self._memory_wanted = trio.Event()
            self.ticked_at = trio.current_time()
            self._state.now = int(self.ticked_at - self._began_at)
            if self.age_seconds:
                self._writeback_wanted.set()
            if self._budget_told and not self.budget.used_bytes(self.ticked_at):
                self._budget_told = False
            await self._populate()
            limit = self.governor.tick(trio.current_time())
            if limit != self._pool.limit_frames:
                self.set_limit(limit)
            if limit == self.governor.configured_frames:
                self._faults.end("pressure", "memory pressure is over: the pool has its whole limit again")
            if self._added:
                self._added = False
                self._last_added = trio.current_time()
            if self._calm():
                self._pool.reserve_wanted = RESERVE_FRAMES
                await self._trim_frames()

    def _calm(self) -> bool:
        """Whether nothing has been written back, and nothing been stored, for a while: what is free then is surplus."""
        return trio.current_time() - max(self._last_writeback, self._last_added) >= CALM_SECONDS

    async def _populate(self) -> None:
        """Make frames ready until the reserve is full."""
        while trio.current_time() >= self._populate_at and (runs := self._pool.take_bare()):
            self._populating_since = trio.current_time()
            try:
                await self._populator.run(self._pool.populate, runs)  # CHECKPOINT, not cancelled
            except MemoryError as error:
                now = trio.current_time()
                self._faults.begin("memory", str(error), now, f"the pool cannot grow: {error}")
                self._populate_at = now + REFUSED_SECONDS
                self._pool.add_bare(runs)
                self._memory_refused = True
                self._waiting.unpark_all()
                return
            except BaseException:
                self._pool.add_bare(runs)
                raise
            finally:
                self._populating_since = None
            self._pool.add_ready(runs)
            self._memory_refused = False
            self._faults.end("memory", "the pool gets memory again")
            self._waiting.unpark_all()

    async def _trim_frames(self) -> None:
        """Give the memory of surplus ready frames back to the system."""
        while runs := self._pool.take_surplus(self._pool.reserve_frames + POPULATE_FRAMES, POPULATE_FRAMES):
            await self._populator.run(self._pool.release, runs)  # CHECKPOINT, not cancelled
            self._pool.add_bare(runs)

    # ---- disk ------------------------------------------------------------------------------------------------------

    async def _keep_disk_for_ever(self) -> None:
        while True:
            with trio.move_on_at(next_tick()):
                await self._disk_wanted.wait()
            self._disk_wanted = trio.Event()
            await self._grow()
            if trio.current_time() >= self._look_at_file_at:
                self._look_at_file_at = trio.current_time() + FILE_LOOK_SECONDS
                await self._look_at_file()
            if self.failing:  # the disk may be well again, with nobody writing meanwhile
                self._writeback_wanted.set()
            if self._calm():
                await self._trim_blocks()

    async def _look_at_file(self) -> None:
        """See whether somebody has deleted the backing file or cut it short."""
        assert self._grower is not None and self._backing is not None
        found = await self._grower.run(self._backing.damage) or []  # CHECKPOINT, not cancelled
        for text in found:
            if text not in self._damage:
                self.log(text)
        self._damage = found

    def _blocks_wanted(self) -> int:
        return min(GROW_AHEAD_BLOCKS, self._pool.nr_frames)

    async def _grow(self) -> None:
        """Make segments of the backing ready until there are enough free blocks.

        A disk that refuses is asked for a single segment, then left alone for a while: what is left is for others.
        """
        blocks, backing, grower = self._state.blocks, self._backing, self._grower
        if blocks is None or backing is None or grower is None:
            return
        async with self._grow_lock:
            most = 1 if self._grow_failures else GROW_SEGMENTS
            while blocks.free_blocks < self._blocks_wanted():
                now = trio.current_time()
                if now < self._grow_at or not self._may_grow():
                    return
                cost = backing.zeros_per_segment
                first, count = blocks.take_holes(most if self.budget.allows(most * cost, now) else 1)
                if not count:
                    if blocks.free_blocks:
                        self._faults.end("full", f"{backing.name} has free blocks again")
                    else:
                        size = blocks.ready_segments * SEGMENT_BYTES >> 20
                        self._faults.begin("full", f"{backing.name} is full: all of its {size} MiB are in use", now)
                    return
                self.budget.spend(count * cost, now)
                zeros_before = backing.zeros_written
                failure = ""
                try:
                    grown = await grower.run(_make_ready, backing, first, count)  # CHECKPOINT, not cancelled
                except BackingError as error:
                    grown, failure = False, str(error)
                except BaseException:
                    blocks.return_holes(first, count)
                    raise
                now = trio.current_time()
                if grown:
                    self._grow_failures = 0
                    self._faults.end("grow", f"{backing.name} grows again")
                    blocks.add_ready(first, count)
                    self.cumul_grown_bytes += backing.zeros_written - zeros_before
                    continue
                blocks.return_holes(first, count)
                self.budget.give_back(count * cost - (backing.zeros_written - zeros_before), now)
                if count > 1:
                    most = 1
                    continue
                if not failure:
                    self._grow_at = now + TICK_SECONDS  # to look costs nothing
                    text = f"{backing.name} cannot grow: what its file system has left is kept for other programs"
                else:
                    self._grow_at = now + min(GROW_RETRY_SECONDS * 2**self._grow_failures, GROW_RETRY_MOST_SECONDS)
                    self._grow_failures = min(self._grow_failures + 1, 8)
                    text = failure
                self._faults.begin("grow", text, now)
                return
            self._faults.end("full", f"{backing.name} has free blocks again")

    async def _trim_blocks(self) -> None:
        """Give wholly free segments beyond the reserve back to the disk."""
        blocks, backing, grower = self._state.blocks, self._backing, self._grower
        assert blocks is not None and backing is not None and grower is not None
        group = backing.trim_segments
        while group and self._calm():
            async with self._grow_lock:  # CHECKPOINT; nothing that is being given back must be made ready meanwhile
                segment = blocks.take_free(2 * self._blocks_wanted())
                if segment == NO_SEGMENT:
                    return
                first = segment // group * group
                count = min(group, backing.nr_segments - first)
                try:
                    if blocks.are_holes(first, count):
                        await grower.run(backing.punch, first, count)  # CHECKPOINT, not cancelled
                except BackingError:
                    blocks.add_ready(segment, 1)  # it still has its room
                    return
                blocks.return_holes(segment, 1)


def _make_ready(backing: Backing, first: int, count: int) -> bool:
    """Make segments ready; False if the disk has no room for them beside its reserve. For a worker thread."""
    if not backing.has_room(count):
        return False
    backing.make_ready(first, count)
    return True


def _write_runs(backing: Backing, runs: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
    """Write each run to its blocks; BackingError at the first that fails. For a worker thread."""
    for block, frames in runs:
        backing.write_blocks(block, frames)
