# SPDX-License-Identifier: MIT
"""The writer of batches of frames to the backing file, in a thread of its own."""

import time
from collections.abc import Sequence
from typing import Final

import trio

from zbudfs.core.budget import Budget
from zbudfs.core.errors import BackingError
from zbudfs.core.latency import Timed
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.store.backing import Backing
from zbudfs.store.faults import Faults
from zbudfs.store.iothread import IoThread
from zbudfs.store.state import Eviction, State

RETRY_SECONDS: Final = 1.0
"""Time after a failed writeback before the next one. Guessed: a disk that fails at once must not be flooded."""


class BatchWriter:
    """Writes zombies of `state` to their blocks of `backing`."""

    def __init__(self, state: State, backing: Backing, budget: Budget, faults: Faults) -> None:
        self._state = state
        self._backing = backing
        self._budget = budget
        self._faults = faults
        self._latencies = state.pool.memory.status_area.latencies
        self._thread = IoThread[None]("writeback")
        self.retry_at = 0.0
        """Time before which no batch is written, since the last one failed."""

    def close(self) -> None:
        """End the thread."""
        self._thread.close()

    @property
    def is_failing(self) -> bool:
        """Whether the backing file failed to write the last batch."""
        return "write" in self._faults

    async def sync(self) -> None:
        """Sync the backing file: all batches written so far are on the disk then. BackingError."""
        await self._thread.run(self._backing.sync)

    async def write(self, batch: list[Eviction]) -> bool:
        """Write a batch of zombies. False if the backing file failed. In every case no frame stays a zombie."""
        backing = self._backing
        self._budget.spend(len(batch) << PAGE_SHIFT, trio.current_time())
        written_before = backing.written_bytes
        began = time.perf_counter_ns()
        try:
            await self._thread.run(_write_runs, backing, self._runs_of(batch))  # CHECKPOINT, not cancelled
        except BackingError as error:
            self._state.fail_writeback(batch)
            self._state.counters.writeback_failures += 1
            now = trio.current_time()
            self.retry_at = now + RETRY_SECONDS
            self._budget.give_back((len(batch) << PAGE_SHIFT) - (backing.written_bytes - written_before), now)
            self._faults.begin("write", str(error), now, f"{error}; the pages stay in RAM, and zbudfs tries again")
            return False
        except BaseException:
            self._state.fail_writeback(batch)
            raise
        self._latencies.record(Timed.WRITEBACK, time.perf_counter_ns() - began)
        self._state.finish_writeback(batch)
        self._faults.end("write", f"{backing.name} accepts writes again")
        self._faults.end("stalled", f"{backing.name} answers again")
        return True

    def _runs_of(self, batch: list[Eviction]) -> list[tuple[int, list[memoryview]]]:
        """Return a batch as (first block, bytes of the frames) for each run of neighbouring blocks."""
        allocator = self._state.allocator
        runs: list[tuple[int, list[memoryview]]] = []
        expected = -1
        for frame, block in batch:
            if block != expected:
                runs.append((block, []))
            runs[-1][1].append(allocator.frame_bytes(frame))
            expected = block + 1
        return runs


def _write_runs(backing: Backing, runs: Sequence[tuple[int, Sequence[memoryview]]]) -> None:
    """Write each run to its blocks. BackingError at the first run that fails. For a worker thread."""
    for block, frames in runs:
        backing.write_blocks(block, frames)
