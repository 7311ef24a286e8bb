# SPDX-License-Identifier: MIT
"""The settings that can be changed while a mount runs: names, meanings, and permitted values.

control/ and `zbudfs set` use this module. A value is a whole number; each key has its own syntax. The parser returns the
number or raises ValueError; the text says what is wrong and how to write it. An order is a key that starts work: reading it
returns the work that is left.
"""

from dataclasses import dataclass
from typing import Final

from zbudfs.core.codec import MAX_LEVEL, MIN_LEVEL
from zbudfs.core.sizes import format_size, parse_size
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE

MIN_POOL_BYTES: Final = 1 << 20
AUTO: Final = "auto"
"""The value of a watermark that follows the pool's limit."""
ALL: Final = "all"

MAX_SECONDS: Final = 10 * 366 * 86400
MAX_BYTES: Final = 1 << 60
MAX_WRITERS: Final = 64
_LONGEST: Final = 64
"""Longest text that the parser reads, in characters."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """A key of control/."""

    name: str
    unit: str
    meaning: str
    order: bool = False
    """Whether the key starts work. Then reading it returns the work that is left."""


TUNABLES: Final = (
    Tunable("pool_limit_bytes", "bytes", "most RAM that frames may take, up to the pool of the mount"),
    Tunable("low_watermark_frames", "frames", "free frames below which writeback starts; auto follows the limit"),
    Tunable("high_watermark_frames", "frames", "free frames at which writeback stops; auto follows the limit"),
    Tunable(
        "level",
        "zstd level",
        f"level for pages that are compressed from now on: {MIN_LEVEL} (fast) to {MAX_LEVEL} (small), not 0",
    ),
    Tunable("writeback_enabled", "0 or 1", "whether frames are written to the backing file without an order"),
    Tunable("writeback_budget_bytes_per_day", "bytes a day", "most that is written to the backing file; 0 is no limit"),
    Tunable("age_seconds", "seconds", "frames that got no page for this time are written back; 0 is never"),
    Tunable(
        "trace", "0 or 1", "whether requests are recorded for zbudfs trace; it turns off when no program reads them"
    ),
    Tunable(
        "writers",
        "open files",
        f"most open files of swapfile for writing; 1 refuses a second loop device; up to {MAX_WRITERS}",
    ),
    Tunable(
        "writeback",
        "frames",
        "write N or all of the coldest frames now; reads as the frames still to write",
        order=True,
    ),
    Tunable(
        "drop_ephemeral",
        "frames",
        "write 1 to drop clean copies of blocks; reads as the number of such copies",
        order=True,
    ),
)

NAMES: Final = tuple(tunable.name for tunable in TUNABLES)
ORDERS: Final = frozenset(tunable.name for tunable in TUNABLES if tunable.order)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one mount for values."""

    pool_bytes: int
    """Bytes of the mount's pool."""
    backed: bool
    """Whether it has a backing file."""
    low_watermark_frames: int
    """The low watermark in force now."""
    high_watermark_frames: int


def parse(name: str, text: str, limits: Limits) -> int:
    """Return the number that `text` means for `name`. ValueError with a sentence; KeyError for an unknown name.

    The number 0 of a watermark stands for AUTO; the number -1 of `writeback` stands for ALL.
    """
    text = text.strip()
    if len(text) > _LONGEST:
        raise ValueError(f"{name} is a text of {len(text)} characters: write a number, or what zbudfs set --help says")
    return _PARSERS[name](name, text, limits)


def _whole_number(name: str, text: str, low: int, high: int, also: str = "") -> int:
    digits = text.removeprefix("-")
    number = int(text) if digits.isascii() and digits.isdigit() else None
    if number is None or not low <= number <= high:
        if low == high:
            raise ValueError(f"{name} is {text!r}: write {low}{also}")
        if high - low == 1:
            raise ValueError(f"{name} is {text!r}: write {low} or {high}{also}")
        raise ValueError(f"{name} is {text!r}: it must be a whole number from {low} to {high}{also}")
    return number


def _size(name: str, text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if size > MAX_BYTES:
        raise ValueError(f"{name} is {text!r}: the most is {MAX_BYTES} bytes")
    return size


def _pool_limit(name: str, text: str, limits: Limits) -> int:
    size = _size(name, text) >> PAGE_SHIFT << PAGE_SHIFT
    low = min(MIN_POOL_BYTES, limits.pool_bytes)
    if not low <= size <= limits.pool_bytes:
        raise ValueError(
            f"{name} is {text!r}: the pool of this mount has {format_size(limits.pool_bytes)}, so write a size from"
            f" {low} to {limits.pool_bytes} bytes; for a larger pool, mount again with another --pool"
        )
    return size


def _low_watermark(name: str, text: str, limits: Limits) -> int:
    if text == AUTO:
        return 0
    return _whole_number(name, text, 1, limits.high_watermark_frames, f" (high_watermark_frames), or {AUTO}")


def _high_watermark(name: str, text: str, limits: Limits) -> int:
    if text == AUTO:
        return 0
    low, high = limits.low_watermark_frames, limits.pool_bytes // PAGE_SIZE
    return _whole_number(name, text, low, high, f" (low_watermark_frames to the frames of the pool), or {AUTO}")


def _level(name: str, text: str, limits: Limits) -> int:
    level = _whole_number(name, text, MIN_LEVEL, MAX_LEVEL, ", not 0")
    if not level:
        raise ValueError(f"{name} 0 is refused: zstd takes it for its default, 3; write the level that is meant")
    return level


def _need_backing(name: str, limits: Limits) -> None:
    if not limits.backed:
        raise ValueError(f"{name} cannot be set: this mount has no backing file")


def _enabled(name: str, text: str, limits: Limits) -> int:
    enabled = _whole_number(name, text, 0, 1)
    if enabled:
        _need_backing(name, limits)
    return enabled


def _budget(name: str, text: str, limits: Limits) -> int:
    size = _size(name, text)
    if 0 < size < PAGE_SIZE:
        raise ValueError(f"{name} is {text!r}: less than a frame of {PAGE_SIZE} bytes a day; 0 is no limit")
    if size:
        _need_backing(name, limits)
    return size


def _age(name: str, text: str, limits: Limits) -> int:
    seconds = _whole_number(name, text, 0, MAX_SECONDS)
    if seconds:
        _need_backing(name, limits)
    return seconds


def _writeback(name: str, text: str, limits: Limits) -> int:
    _need_backing(name, limits)
    if text == ALL:
        return -1
    return _whole_number(name, text, 0, limits.pool_bytes // PAGE_SIZE, f" frames, or {ALL}")


def _trace(name: str, text: str, limits: Limits) -> int:
    return _whole_number(name, text, 0, 1)


def _writers(name: str, text: str, limits: Limits) -> int:
    return _whole_number(name, text, 1, MAX_WRITERS)


def _drop(name: str, text: str, limits: Limits) -> int:
    return _whole_number(name, text, 1, 1, ": that drops all clean copies of blocks")


_PARSERS: Final = {
    "pool_limit_bytes": _pool_limit,
    "low_watermark_frames": _low_watermark,
    "high_watermark_frames": _high_watermark,
    "level": _level,
    "writeback_enabled": _enabled,
    "writeback_budget_bytes_per_day": _budget,
    "age_seconds": _age,
    "trace": _trace,
    "writers": _writers,
    "writeback": _writeback,
    "drop_ephemeral": _drop,
}
