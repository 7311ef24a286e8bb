# SPDX-License-Identifier: MIT
"""What is wrong at present: each fault is logged when it begins and when it ends, not each time that it is met."""

from collections.abc import Callable
from typing import Final

LOG_AGAIN_SECONDS: Final = 60.0
"""A fault that comes and goes is logged once in so many seconds. Arbitrary."""


class Faults:
    """The faults of one store, by their kind. `log` is called with a sentence."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._texts: dict[str, str] = {}
        self._logged_at: dict[str, float] = {}
        self._told: set[str] = set()

    def begin(self, kind: str, text: str, now: float, line: str = "") -> None:
        """A fault is met, described by `text`, and in the log by `line` if given. It may have begun long ago."""
        begins = kind not in self._texts
        self._texts[kind] = text
        if begins and now >= self._logged_at.get(kind, float("-inf")) + LOG_AGAIN_SECONDS:
            self._logged_at[kind] = now
            self._told.add(kind)
            self._log(line or text)

    def end(self, kind: str, text: str) -> None:
        """There is no such fault (any more)."""
        if self._texts.pop(kind, None) is not None and kind in self._told:
            self._told.discard(kind)
            self._log(text)

    def __contains__(self, kind: str) -> bool:
        """Whether there is such a fault now."""
        return kind in self._texts

    def text(self, kind: str) -> str:
        """Return the sentence of a fault that is there."""
        return self._texts[kind]
