# SPDX-License-Identifier: MIT
"""A signal to a task that there may be work, and the moments of all periodic work."""

import math

import trio

from zbudfs.core.reclaim import TICK_SECONDS


class Signal:
    """Wakes one task that may have work. Several calls of `set` wake it once."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Wake the task."""
        self._event.set()

    async def wait(self, until: float = math.inf) -> None:
        """Wait until `set` is called, or was called since the last wait, or until the time `until` on trio's clock."""
        with trio.move_on_at(until):
            await self._event.wait()  # CHECKPOINT
        self._event = trio.Event()


def next_tick() -> float:
    """Return the time, on trio's clock, of the next whole multiple of TICK_SECONDS."""
    return (trio.current_time() // TICK_SECONDS + 1) * TICK_SECONDS
