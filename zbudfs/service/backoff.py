# SPDX-License-Identifier: MIT
"""The delays with which a keeper replaces a process that failed."""

import time
from typing import Final

from zbudfs.core.delay import back_off_seconds

LONGEST_BACK_OFF_SECONDS: Final = 30.0
"""Longest time between two attempts to start a standby. Arbitrary: a failed one takes up to 50 MiB for a moment."""

LONGEST_WORKER_BACK_OFF_SECONDS: Final = 10.0
"""Longest time between two attempts to start a worker. Arbitrary."""

STEADY_SECONDS: Final = 10.0
"""Time for which a standby must be ready to end a series of failures. Guessed."""

MAX_FAILURES: Final = 8
"""Number of workers in a row that fail to start, after which the keeper gives up. With the back-off: some 25 seconds."""

SHORT_LIFE_SECONDS: Final = 1.0
"""A worker that dies sooner after its start may die of a request, which the next worker gets again. Guessed."""
FREE_SHORT_LIVES: Final = 2
"""Number of short-lived workers in a row that are replaced at once. Then the back-off begins; the keeper does not give up."""
SHORT_LIFE_BACK_OFF_SECONDS: Final = 1.0
"""Longest back-off after short-lived workers, in which swap is not served. It only keeps a request that kills each worker
from taking all the time of the machine. Other causes of short lives, such as the OOM killer, must not make swap wait."""


class WorkerBackOff:
    """The back-off of the attempts to start a worker."""

    def __init__(self) -> None:
        self.failures = 0
        """Number of workers in a row that did not start, and of forks that failed."""
        self._short_lives = 0
        """Number of workers in a row that died soon after they began to serve, or before."""
        self._retry_at = 0.0

    @property
    def lasts(self) -> bool:
        """Whether it is too early for the next attempt."""
        return time.monotonic() < self._retry_at

    @property
    def gives_up(self) -> bool:
        """Whether too many workers in a row did not start."""
        return self.failures >= MAX_FAILURES

    def worker_serves(self) -> None:
        """End a series of failures, since a worker serves."""
        self.failures = 0

    def worker_died(self, lived_seconds: float | None) -> None:
        """Count a death, `lived_seconds` after the worker began to serve; None: it did not serve."""
        self.failures = 0 if lived_seconds is not None else self.failures + 1
        lived = lived_seconds is not None and lived_seconds >= SHORT_LIFE_SECONDS
        self._short_lives = 0 if lived else self._short_lives + 1
        after_short_lives = back_off_seconds(self._short_lives - FREE_SHORT_LIVES, 0.2, SHORT_LIFE_BACK_OFF_SECONDS)
        self._retry_at = time.monotonic() + max(
            back_off_seconds(self.failures, 0.2, LONGEST_WORKER_BACK_OFF_SECONDS), after_short_lives
        )

    def fork_failed(self) -> None:
        """Count a fork that failed."""
        self.failures += 1
        self._retry_at = time.monotonic() + back_off_seconds(self.failures, 0.2, LONGEST_WORKER_BACK_OFF_SECONDS)


class StandbyBackOff:
    """The back-off of the attempts to start a standby."""

    def __init__(self) -> None:
        self.failures = 0
        self._retry_at = 0.0
        self._ready_since = 0.0

    @property
    def lasts(self) -> bool:
        """Whether it is too early for the next attempt."""
        return time.monotonic() < self._retry_at

    def forked(self) -> None:
        """Record that a new standby starts."""
        self._ready_since = 0.0

    def failed(self) -> None:
        """Count a fork that failed, or a standby that died."""
        self.failures += 1
        self._retry_at = time.monotonic() + back_off_seconds(self.failures, 1.0, LONGEST_BACK_OFF_SECONDS)

    def ready(self) -> tuple[bool, int]:
        """Return whether the standby became ready since the last call, and the failures of a series that it has ended."""
        now = time.monotonic()
        is_new = not self._ready_since
        self._ready_since = self._ready_since or now
        if not self.failures or now - self._ready_since < STEADY_SECONDS:
            return is_new, 0
        failures, self.failures = self.failures, 0
        return is_new, failures
