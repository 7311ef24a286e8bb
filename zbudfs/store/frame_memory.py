# SPDX-License-Identifier: MIT
"""The memory of the pool's frames: it is populated ahead of need, and released when it is surplus, in a thread of its own."""

from typing import Final

import trio

from zbudfs.core.reclaim import PATIENCE_SECONDS
from zbudfs.store.faults import Faults
from zbudfs.store.frame_queue import FrameQueue
from zbudfs.store.iothread import IoThread
from zbudfs.store.pool import POPULATE_FRAMES, Pool

REFUSED_SECONDS: Final = 0.2
"""Time after the system refused memory before the next attempt: otherwise a waiting write would ask all the time."""


class FrameMemory:
    """Makes bare frames of `pool` ready, and ready frames bare again."""

    def __init__(self, pool: Pool, queue: FrameQueue, faults: Faults) -> None:
        self._pool = pool
        self._queue = queue
        self._faults = faults
        self._thread = IoThread[None]("populate")
        self._populating_since: float | None = None
        self._populate_at = float("-inf")
        """Time of the next attempt."""

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    @property
    def is_late(self) -> bool:
        """Whether no memory is on its way, or it takes longer than a write should wait."""
        since = self._populating_since
        return since is None or trio.current_time() - since >= PATIENCE_SECONDS

    async def populate(self) -> None:
        """Make frames ready until the reserve is full."""
        while trio.current_time() >= self._populate_at and (runs := self._pool.take_bare()):
            self._populating_since = trio.current_time()
            try:
                await self._thread.run(self._pool.populate, runs)  # CHECKPOINT, not cancelled
            except MemoryError as error:
                now = trio.current_time()
                self._faults.begin("memory", str(error), now, f"the pool cannot grow: {error}")
                self._populate_at = now + REFUSED_SECONDS
                self._pool.add_bare(runs)
                self._queue.memory_refused = True
                self._queue.wake()
                return
            except BaseException:
                self._pool.add_bare(runs)
                raise
            finally:
                self._populating_since = None
            self._pool.add_ready(runs)
            self._queue.memory_refused = False
            self._faults.end("memory", "the system gives the pool memory again")
            self._queue.wake()

    async def trim(self) -> None:
        """Release the memory of surplus ready frames."""
        while runs := self._pool.take_surplus(self._pool.reserve_frames + POPULATE_FRAMES, POPULATE_FRAMES):
            await self._thread.run(self._pool.release, runs)  # CHECKPOINT, not cancelled
            self._pool.add_bare(runs)
