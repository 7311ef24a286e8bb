# SPDX-License-Identifier: MIT
"""The keeper's messages to the service manager: descriptors to store, READY=1, WATCHDOG=1, a line of status.

Without a service manager every method does nothing. No method waits (service/notify.py).
"""

import time
from collections.abc import Callable
from typing import Final

from zbudfs.service.notify import WATCHDOG_PARTS, Notifier

START_EXTENSION_SECONDS: Final = 60
"""Seconds by which each sign of life extends the manager's limit on a start. As long as the unit's watchdog."""

STATUS_SECONDS: Final = 5.0
"""Shortest time between two lines of status. Arbitrary."""


class ServiceManager:
    """The service manager, with the messages that it has accepted. `notifier` is None without a service manager."""

    def __init__(self, notifier: Notifier | None) -> None:
        self.is_there = notifier is not None
        """Whether this process is the main process of a service."""
        self._notifier = notifier or Notifier()
        self._not_stored: dict[str, int] = {}
        self._is_ready = False
        self._beat = 0
        """The last heartbeat that was reported."""
        self._status = ""
        self._alive_at = self._status_at = 0.0

    def tell(self, *assignments: str) -> bool:
        """Send assignments such as "STATUS=...". Return whether they were accepted."""
        return self._notifier.tell(*assignments)

    def store(self, descriptors: dict[str, int]) -> None:
        """Store copies of these descriptors with the manager; `look` sends them until they are accepted."""
        self._not_stored = dict(descriptors)

    def forget(self, descriptors: dict[str, int]) -> None:
        """Make the manager close its copies of these descriptors."""
        for name in descriptors:
            self._notifier.forget(name)

    def close(self) -> None:
        """Close the socket; later messages are dropped."""
        self._notifier.close()

    def look(self, beat: int, status: Callable[[], str], *, serves: bool) -> None:
        """Report changes. `beat` is the worker's heartbeat; `serves`: the first worker of this keeper has served."""
        if not self.is_there:
            return
        self._not_stored = {name: fd for name, fd in self._not_stored.items() if not self._notifier.store(name, fd)}
        self._is_ready = self._is_ready or (serves and self._notifier.tell("READY=1"))
        # The heartbeat of the worker counts, not that of the keeper's loop: a stuck worker is a stuck service.
        self.show_life(beat)
        now = time.monotonic()
        if now >= self._status_at:
            self._status_at = now + STATUS_SECONDS
            text = status()
            if text != self._status and self._notifier.tell(f"STATUS={text}"):
                self._status = text

    def show_life(self, beat: int) -> None:
        """Send a sign of life if a child has given one; with it a start or a rebuild may take any time."""
        now = time.monotonic()
        if beat == self._beat or now < self._alive_at:
            return
        words = ["WATCHDOG=1"] if self._notifier.watchdog_seconds > 0 else []
        words += [] if self._is_ready else [f"EXTEND_TIMEOUT_USEC={START_EXTENSION_SECONDS * 1_000_000}"]
        if not words or self._notifier.tell(*words):
            self._beat = beat
            self._alive_at = now + (self._notifier.watchdog_seconds or START_EXTENSION_SECONDS) / WATCHDOG_PARTS
