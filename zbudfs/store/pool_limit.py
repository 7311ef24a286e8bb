# SPDX-License-Identifier: MIT
"""The number of frames that the pool may use now, and the watermarks that follow from it."""

from zbudfs.core.reclaim import PressureGovernor, Watermarks
from zbudfs.store.pool import Pool


class PoolLimit:
    """The limit of one pool: the configured limit, or less under memory pressure (`governor`)."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.governor = PressureGovernor(pool.nr_frames)
        self.watermarks = Watermarks.of(pool.nr_frames)
        self._wanted_watermarks = (0, 0)

    def want_watermarks(self, low_frames: int, high_frames: int) -> None:
        """Set the watermarks from the next `set` on; 0: they follow the limit."""
        self._wanted_watermarks = (low_frames, high_frames)

    def set(self, frames: int) -> None:
        """Set the limit that is in force, and the watermarks with it."""
        self._pool.limit_frames = frames
        self.watermarks = Watermarks.of(frames, *self._wanted_watermarks)
