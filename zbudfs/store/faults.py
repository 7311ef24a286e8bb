# SPDX-License-Identifier: MIT
"""The present faults. Each is logged when it begins and when it ends, and not each time that it occurs."""

from collections.abc import Callable
from typing import Final

LOG_AGAIN_SECONDS: Final = 60.0
"""Shortest time between two log lines of a fault that comes and goes. Arbitrary."""


class Faults:
    """The faults of one store, by their kind. `log` is a function that logs a sentence."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._texts: dict[str, str] = {}
        self._logged_at: dict[str, float] = {}
        self._told: set[str] = set()

    def begin(self, kind: str, text: str, now: float, line: str = "") -> None:
        """Record a fault, which may have begun earlier. `text` describes it; the log gets `line` instead if it is given."""
        begins = kind not in self._texts
        self._texts[kind] = text
        if begins and now >= self._logged_at.get(kind, float("-inf")) + LOG_AGAIN_SECONDS:
            self._logged_at[kind] = now
            self._told.add(kind)
            self._log(line or text)

    def end(self, kind: str, text: str) -> None:
        """Record that a fault, if there was one, is over; the log gets `text`."""
        if self._texts.pop(kind, None) is not None and kind in self._told:
            self._told.discard(kind)
            self._log(text)

    def __contains__(self, kind: str) -> bool:
        """Return whether there is such a fault now."""
        return kind in self._texts

    def text(self, kind: str) -> str:
        """Return the sentence of a present fault."""
        return self._texts[kind]
