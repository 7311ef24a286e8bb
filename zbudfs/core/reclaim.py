# SPDX-License-Identifier: MIT
"""The rules of reclaim: when writeback runs, how much it writes, and how the pool's limit yields to memory pressure.

The functions are pure: callers pass the numbers and the time.
"""

from dataclasses import dataclass
from typing import Final

BATCH_FRAMES: Final = 64
"""Frames that one call writes back: as many as a segment of the backing file has blocks.

256 KiB is enough to make a flash device's cost per byte flat. It is small enough that a page-in behind it in the queue of
the disk waits well under a millisecond. Not measured beyond that.
"""

LARGE_BATCH_FRAMES: Final = 256
"""Most frames that the writing thread gets at once, as several batches: 1 MiB."""

TICK_SECONDS: Final = 1.0
"""Period of the memory task and the disk task. All periodic work happens at the same moments."""

CALM_SECONDS: Final = 5.0
"""Time without a writeback and without a new zpage after which free blocks and frames are surplus. Guessed."""

PATIENCE_SECONDS: Final = 0.05
"""Longest wait of a write for memory that is being populated, before it has frames written back instead.

Populating 4 MiB takes some 2 ms, so after this wait the system is short of memory. Guessed.
"""

STALL_SECONDS: Final = 5.0
"""Time without an answer of the disk after which a warning is logged. Guessed: a busy disk takes tenths of a second."""

REFUSE_SECONDS: Final = 30.0
"""Time without progress of writeback after which a write that finds no frame is refused. Guessed: a sleeping disk needs
some 10 s to spin up, and after 120 s the kernel calls a task hung."""

LOW_DIVISOR: Final = 64
HIGH_DIVISOR: Final = 24


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Free frames below `low_frames` start the writeback, which goes on until there are `high_frames` (hysteresis)."""

    low_frames: int
    high_frames: int

    @classmethod
    def of(cls, limit_frames: int, low_frames: int = 0, high_frames: int = 0) -> "Watermarks":
        """Return the watermarks of a pool of `limit_frames`: 1/64 and 1/24 of it, yet at least one and two batches.

        A small pool has less: at most a quarter and a half of it. `low_frames` and `high_frames` replace them where they
        are not 0, within the limit and low never above high. Writers use the free frames below the low watermark while the
        first batch is on its way to the disk. Guessed so that 25 MiB/s of zpages fit into 100 ms of a 128 MiB pool.
        """
        low = max(min(max(limit_frames // LOW_DIVISOR, BATCH_FRAMES), limit_frames // 4), 1)
        low = min(low_frames, max(limit_frames, 1)) or low
        high = max(min(max(limit_frames // HIGH_DIVISOR, 2 * BATCH_FRAMES), limit_frames // 2), low)
        high = max(min(high_frames, max(limit_frames, 1)), low) if high_frames else high
        return cls(low, high)

    @property
    def batch_frames(self) -> int:
        """The frames that the writing thread gets at once: half of `low_frames`, from one batch to LARGE_BATCH_FRAMES.

        Between two of them the serving thread must run its tasks, which takes as long as a batch while it is busy.
        """
        return max(BATCH_FRAMES, min(self.low_frames // 2, LARGE_BATCH_FRAMES))

    def frames_to_free(self, free_frames: int, *, under_way: bool) -> int:
        """Return how many frames to empty now: up to `high_frames`, once there are fewer than `low_frames`."""
        if free_frames >= self.low_frames and not under_way:
            return 0
        return max(0, self.high_frames - free_frames)


class PressureGovernor:
    """Lowers the pool's limit while the system is short of memory, and raises it again later.

    Each report takes 1/8 off the limit in force, down to a quarter of the configured one. So the cold half of the pool goes
    to the disk within a few seconds of pressure, and the hot part stays. After CALM_SECONDS without a report the limit
    rises again, by an eighth of the configured one at a time. All numbers are guessed, none is measured.
    """

    CALM_SECONDS: Final = 10.0
    STEP: Final = 8
    FLOOR: Final = 4

    def __init__(self, configured_frames: int) -> None:
        self.configured_frames = configured_frames
        self.limit_frames = configured_frames
        self._last_change = 0.0

    def configure(self, frames: int) -> None:
        """Set the configured limit; it is in force at once."""
        self.configured_frames = self.limit_frames = frames

    def pressure(self, now: float) -> int:
        """Lower the limit, since the system reports pressure at time `now` (seconds). Return the new limit in frames."""
        floor = max(self.configured_frames // self.FLOOR, 1)
        self.limit_frames = max(floor, self.limit_frames - self.limit_frames // self.STEP)
        self._last_change = now
        return self.limit_frames

    def tick(self, now: float) -> int:
        """Raise the limit if it is time to. Return the limit in frames at time `now`. Call this periodically."""
        if self.limit_frames < self.configured_frames and now - self._last_change >= self.CALM_SECONDS:
            step = max(self.configured_frames // self.STEP, 1)
            self.limit_frames = min(self.configured_frames, self.limit_frames + step)
            self._last_change = now
        return self.limit_frames


class Activity:
    """The times of the last store and of the last writeback, in seconds. Callers pass the time."""

    def __init__(self) -> None:
        self._written_at = self._added_at = float("-inf")
        self._added = False
        """Whether a page was stored since the last `tick`."""

    def added(self) -> None:
        """Record that a page is stored. The method takes no time, since every request calls it."""
        self._added = True

    def written(self, now: float) -> None:
        """Record that a batch is written back."""
        self._written_at = now

    def tick(self, now: float) -> None:
        """Date the pages that were stored since the last call to now."""
        if self._added:
            self._added = False
            self._added_at = now

    def is_calm(self, now: float) -> bool:
        """Return whether nothing was stored or written back for CALM_SECONDS: free room is surplus then."""
        return now - max(self._written_at, self._added_at) >= CALM_SECONDS
