# SPDX-License-Identifier: MIT
"""When to write back, how much, and how the pool's limit yields to memory pressure. Pure: told the numbers and the time."""

from dataclasses import dataclass
from typing import Final

BATCH_FRAMES: Final = 64
"""Frames written back with one call: as many as a segment of the backing file has blocks.

256 KiB is enough to make a flash device's cost per byte flat, and few enough that a page-in which the disk
queues behind it waits well under a millisecond there. Not measured beyond that.
"""

LOW_DIVISOR: Final = 64
HIGH_DIVISOR: Final = 24


@dataclass(frozen=True, slots=True)
class Watermarks:
    """Free frames below `low_frames` start the writeback, which goes on until there are `high_frames` (hysteresis)."""

    low_frames: int
    high_frames: int

    @classmethod
    def of(cls, limit_frames: int, low_frames: int = 0, high_frames: int = 0) -> "Watermarks":
        """For a pool of `limit_frames`: 1/64 and 1/24 of it, yet at least one and two batches where the pool allows.

        `low_frames` and `high_frames` are used instead where they are not 0, within the limit and low never above high.
        The room between low and nothing is what the writers use while the first batch is on its way to the disk;
        guessed so that 25 MiB/s of zpages fit into 100 ms of a 128 MiB pool.
        """
        low = max(min(max(limit_frames // LOW_DIVISOR, BATCH_FRAMES), limit_frames // 4), 1)
        low = min(low_frames, max(limit_frames, 1)) or low
        high = max(min(max(limit_frames // HIGH_DIVISOR, 2 * BATCH_FRAMES), limit_frames // 2), low)
        high = max(min(high_frames, max(limit_frames, 1)), low) if high_frames else high
        return cls(low, high)

    def frames_to_free(self, free_frames: int, *, under_way: bool) -> int:
        """How many frames to empty now: up to high, once below low."""
        if free_frames >= self.low_frames and not under_way:
            return 0
        return max(0, self.high_frames - free_frames)


class PressureGovernor:
    """Lowers the pool's limit while the system is short of memory, and lets it recover.

    Each report takes 1/8 off the limit in force, down to a quarter of the configured one, so that the cold half
    of the pool goes to the disk within a few seconds of pressure and the hot part stays. After CALM_SECONDS
    without a report the limit comes back an eighth of the configured one at a time. All guessed, none measured.
    """

    CALM_SECONDS: Final = 10.0
    STEP: Final = 8
    FLOOR: Final = 4

    def __init__(self, configured_frames: int) -> None:
        self.configured_frames = configured_frames
        self.limit_frames = configured_frames
        self.reports = 0
        self._last_change = 0.0

    def configure(self, frames: int) -> None:
        """The limit that is wished from now on; it is in force at once."""
        self.configured_frames = self.limit_frames = frames

    def pressure(self, now: float) -> int:
        """The system reports pressure at time `now` (seconds): the new limit in frames."""
        self.reports += 1
        floor = max(self.configured_frames // self.FLOOR, 1)
        self.limit_frames = max(floor, self.limit_frames - self.limit_frames // self.STEP)
        self._last_change = now
        return self.limit_frames

    def tick(self, now: float) -> int:
        """To be called now and then: the limit in frames at time `now`."""
        if self.limit_frames < self.configured_frames and now - self._last_change >= self.CALM_SECONDS:
            step = max(self.configured_frames // self.STEP, 1)
            self.limit_frames = min(self.configured_frames, self.limit_frames + step)
            self._last_change = now
        return self.limit_frames
