# SPDX-License-Identifier: MIT
"""The writes that wait for a frame, and the rules by which they are refused.

A write that finds no frame waits in `wait_frame_free`. A writeback round can refuse it (PoolFull) if the round began after
the write came and found nothing that it could free. The write is refused too if the disk has not answered for half a minute.
`Refusal` has all causes.

To refuse a page costs nothing: the kernel keeps it in RAM. A write that waits for ever can deadlock the system, since the
disk's own file system may need that memory to answer. It also blocks reads of pages that are in RAM.
"""

from typing import Final

import trio

from zbudfs.core.errors import PoolFull, Refusal
from zbudfs.core.reclaim import PATIENCE_SECONDS, REFUSE_SECONDS
from zbudfs.store.faults import Faults
from zbudfs.store.signals import Signal
from zbudfs.store.state import State

POPULATE_SECONDS: Final = 5.0
"""Longest wait of a write for the system to give the pool memory, when writeback cannot help. Guessed."""


class FrameQueue:
    """The writes of one store that wait for a frame, with the state of reclaim on which they depend."""

    def __init__(self, state: State, faults: Faults) -> None:
        self._state = state
        self._pool = state.pool
        self._faults = faults
        self.memory_wanted = Signal()
        """Set when there are too few ready frames, or the limit has changed."""
        self.writeback_wanted = Signal()
        """Set when there are too few free frames, or an order or a setting has come."""
        self.memory_refused = False
        """Whether the system refused the memory that the pool asked for last."""
        self.progress_at: float | None = None
        """Time of the last progress of the writeback that is under way; None: none is under way."""
        self._parked = trio.lowlevel.ParkingLot()
        self._rounds = 0
        """Number of writeback rounds that have begun."""
        self._stuck: Refusal | None = None
        """The cause for which the last round could free nothing; None if it did not end so."""
        self._filling = 0
        """Number of frames into which blocks are being read: they can be dropped after that."""

    def __len__(self) -> int:
        """Return the number of waiting writes."""
        return len(self._parked)

    def wake(self) -> None:
        """Make all waiting writes check again."""
        self._parked.unpark_all()

    def begin_round(self) -> None:
        """Record that a writeback round begins."""
        self._rounds += 1
        self._stuck = None
        self.progress_at = trio.current_time()

    def end_round(self, stuck: Refusal | None) -> None:
        """Record that the round is over; `stuck` is the cause if it should have freed frames and could not."""
        self._stuck = stuck
        self.wake()

    def has_progressed(self, now: float) -> None:
        """Record that the disk has answered, if a round is under way."""
        if self.progress_at is not None:
            self.progress_at = now

    def filling(self, frames: int) -> None:
        """Add `frames` (less than 0: remove) to the frames that are being read into, which can be dropped after that."""
        self._filling += frames
        if frames < 0:
            self.wake()

    async def wait_frame_free(self) -> None:
        """Wait until a frame can be taken, or until it is worth trying. PoolFull if no frame can become free."""
        pool = self._pool
        rounds_before = self._rounds
        asked_at = trio.current_time()
        give_up_at = asked_at + POPULATE_SECONDS
        while not (pool.ready_frames and pool.free_frames > 0):
            if self._state.drop_ephemeral():
                continue
            now = trio.current_time()
            wake_at = (now if self.progress_at is None else self.progress_at) + REFUSE_SECONDS
            stuck = self._stuck if self._rounds > rounds_before else None
            if now >= wake_at:
                stuck = Refusal.BACKING_STALLED
                self._say_stalled()
            if pool.free_frames > 0:  # the limit allows it, but no frame has memory
                if stuck and (now >= give_up_at or self.memory_refused):
                    raise PoolFull(
                        "the system gives the pool no memory, and no frame can be written back", Refusal.NO_MEMORY
                    )
                self.memory_wanted.set()
                if now >= asked_at + PATIENCE_SECONDS:
                    asked_at = now
                    self.writeback_wanted.set()
                wake_at = asked_at + PATIENCE_SECONDS
            elif not stuck:
                self.writeback_wanted.set()  # a round is under way, or begins: its progress wakes this task
            elif stuck is Refusal.BACKING_STALLED or not self._filling:
                raise PoolFull("no frame is free and none can be written back", stuck)
            # Otherwise the frames that are being read into can be dropped after that, which wakes this task.
            with trio.move_on_at(wake_at):
                await self._parked.park()  # CHECKPOINT

    def _say_stalled(self) -> None:
        text = f"the backing file has not answered for {REFUSE_SECONDS:.0f} s"
        self._faults.begin("stalled", text, trio.current_time(), f"{text}: until it does, pages stay in RAM")
