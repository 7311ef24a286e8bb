# SPDX-License-Identifier: MIT
"""Numbers as a line of small bars, a character each, for whatever the terminal can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from zbudfs.cli.stdio import shows_unicode

_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_ASCII: Final = " .:-=+*#@"


def sparkline(values: Sequence[float], *, unicode: bool | None = None) -> str:
    """Return a character for each value, from nothing for 0 to the highest for the largest.

    In block elements, or in ASCII where `unicode` is false (None: as the locale allows).
    """
    if unicode is None:
        unicode = shows_unicode()
    ramp = _BLOCKS if unicode else _ASCII
    most = max(values, default=0)
    if most <= 0:
        return " " * len(values)
    steps = len(ramp) - 1
    return "".join(ramp[min(steps, math.ceil(max(value, 0) * steps / most))] for value in values)
