# SPDX-License-Identifier: MIT
"""Sparklines: numbers as a line of small bars, one character for each number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from zbudfs.cli.stdio import shows_unicode

_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_ASCII: Final = " .:-=+*#@"


def sparkline(values: Sequence[float], *, unicode: bool | None = None) -> str:
    """Return a character for each value: a space for 0, and the highest bar for the largest value.

    The bars are block elements, or ASCII if `unicode` is false. None: the locale decides.
    """
    if unicode is None:
        unicode = shows_unicode()
    ramp = _BLOCKS if unicode else _ASCII
    most = max(values, default=0)
    if most <= 0:
        return " " * len(values)
    steps = len(ramp) - 1
    return "".join(ramp[min(steps, math.ceil(max(value, 0) * steps / most))] for value in values)
