# SPDX-License-Identifier: MIT
"""The delay before the next attempt, in a series of failures."""

from typing import Final

_MOST_DOUBLINGS: Final = 30
"""The bound of the exponent. A series may last for days, and 2.0**1024 is an OverflowError."""


def back_off_seconds(failures: int, first_seconds: float, longest_seconds: float) -> float:
    """Return the delay after `failures` in a row: it doubles with each, up to `longest_seconds`. 0 without a failure."""
    if failures <= 0:
        return 0.0
    doublings: int = min(failures - 1, _MOST_DOUBLINGS)
    return min(first_seconds * (1 << doublings), longest_seconds)
