# SPDX-License-Identifier: MIT
"""The parser of /proc/PID/maps, for maps of the daemon itself and for maps of processes of other users.

The kernel ends each line with a newline and escapes a newline in a file name, but no other character. So a file name may
hold anything that str.splitlines() takes for the end of a line. The parser works on bytes and splits at newlines only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

USER_END: Final = 1 << 57
"""No 64-bit machine that runs the daemon gives programs an address beyond this one."""

_LINE: Final = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ [0-9]+(?: +([^\n]*))?\n?"
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps."""

    start: int
    """First address."""
    end: int
    """First address behind it."""
    access: str
    """Four letters: r, w, x or "-", then p (private) or s (shared)."""
    name: str
    """Path of the file, a name in brackets such as "[heap]", or empty for anonymous memory."""


def parse_maps(lines: Iterable[bytes]) -> Iterator[Mapping]:
    """Yield the mappings of user memory in the lines of /proc/PID/maps. A line that is not one of the kernel's is skipped."""
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        start, end = int(match[1], 16), int(match[2], 16)
        if start < end <= USER_END:
            yield Mapping(start, end, match[3].decode(), (match[4] or b"").decode(errors="replace"))
