# SPDX-License-Identifier: MIT
"""`zbudfs set` changes tunables of a running mount: it checks the values, writes control/, and prints the values in force.

The daemon checks the values again and decides. It can only answer "Invalid argument". So the command checks first: it
names the wrong value and a right one before it changes anything.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from zbudfs.cli.ask import all_numbers, within_limit
from zbudfs.cli.suggest import did_you_mean
from zbudfs.core.sizes import format_size
from zbudfs.core.tunables import AUTO, NAMES, ORDERS, TUNABLES, Limits, parse
from zbudfs.service.settings import SettingsError

LOW: Final = "low_watermark_frames"
HIGH: Final = "high_watermark_frames"


def pairs(typed: Sequence[str]) -> dict[str, str]:
    """Return the typed KEY=VALUE words as values by key. Raises SettingsError for a malformed word or a wrong key."""
    found: dict[str, str] = {}
    for text in typed:
        name, separator, value = text.partition("=")
        if not separator:
            raise SettingsError(f"{text!r} is not KEY=VALUE: write KEY=VALUE ..., and the MOUNTPOINT as the last word")
        if name not in NAMES:
            hint = did_you_mean(name.replace("-", "_"), NAMES)
            raise SettingsError(f"{name!r} cannot be set: {hint} (see zbudfs set --help)")
        if name in found:
            raise SettingsError(f"{name} is set twice: leave one of the two out")
        found[name] = value
    return found


def check(wanted: Mapping[str, str], mountpoint: str) -> None:
    """Raise SettingsError unless all values together are right for the mount, and OSError if it does not answer."""
    numbers = all_numbers(mountpoint)
    low, high = int(numbers[LOW]), int(numbers[HIGH])
    pool_bytes = int(numbers["pool_configured_bytes"])
    backed = bool(numbers["backing_path"])
    try:
        # The two watermarks bound each other, so each is checked against the future value of the other.
        low_bound = _wanted_number(wanted, LOW, low)
        high_bound = _wanted_number(wanted, HIGH, high)
        for name, text in wanted.items():
            parse(name, text, Limits(pool_bytes, backed, low_bound, high_bound))
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _wanted_number(wanted: Mapping[str, str], name: str, now: int) -> int:
    text = wanted.get(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else now


def apply(wanted: Mapping[str, str], mountpoint: str) -> None:
    """Write values that `check` has accepted to control/. Raises OSError with a text that names the values already set."""
    done: list[str] = []
    for name in _order(wanted, mountpoint):
        try:
            within_limit(lambda name=name: _write(mountpoint, name, wanted[name]))  # type: ignore[misc]
        except OSError as error:
            before = f"; set before it: {', '.join(done)}" if done else ""
            why = "the daemon refused it" if error.errno == errno.EINVAL else error.strerror
            raise OSError(error.errno, f"{name}={wanted[name]}: {why}{before}") from None
        done.append(name)


def _order(wanted: Mapping[str, str], mountpoint: str) -> list[str]:
    """Return the keys in the order of writing: values before orders, and first the watermark that makes room."""
    names = sorted(wanted, key=lambda name: (name in ORDERS, NAMES.index(name)))
    if LOW in wanted and HIGH in wanted:
        high_now = int(value(mountpoint, HIGH))
        raised = wanted[HIGH].strip() == AUTO or int(wanted[HIGH]) >= high_now
        first, second = (HIGH, LOW) if raised else (LOW, HIGH)
        names = [first, second, *(name for name in names if name not in (LOW, HIGH))]
    return names


def _write(mountpoint: str, name: str, text: str) -> None:
    fd = os.open(Path(mountpoint, "control", name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def value(mountpoint: str, name: str) -> str:
    """Return the value of one tunable that is in force. Raises OSError."""
    return within_limit(Path(mountpoint, "control", name).read_text).strip()


def values(mountpoint: str) -> dict[str, int]:
    """Return the values of all tunables that are in force. Raises OSError."""
    return {name: int(value(mountpoint, name)) for name in NAMES}


def as_lines(found: Mapping[str, int], numbers: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `zbudfs set`: the value of each key in `found`, and its meaning."""
    width = max(map(len, found))
    for tunable in TUNABLES:
        if tunable.name in found:
            number = found[tunable.name]
            shown = f"{number}  ({format_size(number)})" if "bytes" in tunable.unit else str(number)
            if tunable.name == "writeback_budget_bytes_per_day" and number:
                shown += f", {format_size(int(numbers['writeback_budget_left_bytes']))} left"
            yield f"  {tunable.name:{width}}  {shown}"
            yield f"  {'':{width}}  {tunable.meaning}"
