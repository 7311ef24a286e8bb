# SPDX-License-Identifier: MIT
"""Striping: several zbudfs mounts that the commands treat as one, for machines with more cores than one daemon uses.

    MOUNTPOINT/0 ... MOUNTPOINT/N-1      an instance each: a whole zbudfs with its own daemon, pool and backing file
    size, pool                           divided among the instances
    swap                                 the same priority for all, so that the kernel fills them in turns

The mounts themselves are the only record of a stripe: the mounts on MOUNTPOINT/0, MOUNTPOINT/1 and so on are the instances
of MOUNTPOINT. A command can also name one instance, and then treats it like any other zbudfs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from zbudfs.service.mountpoint import Mount, shown_path, zbudfs_mounts
from zbudfs.service.settings import PAGE_BYTES, Settings, SettingsError, default_backing

MAX_INSTANCES: Final = 32
"""Most instances of a mount. The kernel has room for 23 to 32 swaps (MAX_SWAPFILES), depending on its configuration."""

Report = dict[str, Any]
_LARGEST: Final = frozenset(
    {
        *("last_recovery_us", "coldest_age_seconds", "writeback_failing", "backing_full"),
        *("writeback_budget_full_in_seconds", "writeback_enabled"),
    }
)
"""Numbers whose largest value is reported for the whole. The same holds for all names that end in `_max_us`."""
_OF_EACH: Final = frozenset({"pid", "keeper_pid", "worker_pid", "standby_pid", "level", "age_seconds"})
"""Numbers whose sum has no meaning: one value is reported if all instances agree, else a list."""


def divided(whole: Settings, instances: int, backing: str | None) -> list[Settings]:
    """Return the settings of each instance; for one instance, the settings of the whole.

    `backing` is the typed value, None for the default. Raises SettingsError if a part is too small.
    """
    if instances == 1:
        return [whole]
    try:
        return [
            replace(
                whole,
                mountpoint=(mountpoint := instance_of(whole.mountpoint, number)),
                size_bytes=whole.size_bytes // instances // PAGE_BYTES * PAGE_BYTES,
                pool_bytes=whole.pool_bytes // instances // PAGE_BYTES * PAGE_BYTES,
                backing=_backing(whole, backing, mountpoint, number),
            )
            for number in range(instances)
        ]
    except SettingsError as error:
        raise SettingsError(f"each of {instances} instances: {error}") from None


def _backing(whole: Settings, typed: str | None, mountpoint: str, number: int) -> str | None:
    if whole.backing is None:
        return None
    if Path(whole.backing).is_block_device():
        raise SettingsError(
            f"backing {shown_path(whole.backing)} is a device, which instances cannot share: write the path of a file"
        )
    return default_backing(mountpoint) if typed is None else f"{whole.backing}.{number}"


def instance_of(mountpoint: str, number: int) -> str:
    """Return the mountpoint of an instance."""
    return f"{mountpoint.rstrip('/')}/{number}"


def mounts_of(mountpoint: str) -> list[Mount]:
    """Return the zbudfs mounted on `mountpoint`, or its instances in order; empty if there is neither."""
    known = {mount.mountpoint: mount for mount in zbudfs_mounts()}  # of several mounts on one place, the topmost
    if mountpoint in known:
        return [known[mountpoint]]
    numbers = range(MAX_INSTANCES)
    return [known[path] for number in numbers if (path := instance_of(mountpoint, number)) in known]


def is_part(mountpoint: str, whole: str) -> bool:
    """Return whether `mountpoint` is `whole`, or the mountpoint of one of its instances."""
    return mountpoint == whole or mountpoint in (instance_of(whole, number) for number in range(MAX_INSTANCES))


def grouped(mounts: Iterable[Mount]) -> list[tuple[str, list[Mount]]]:
    """Group mounts by the mountpoint of their whole. Return pairs (mountpoint of the whole, mounts) in the given order."""
    there = list(mounts)
    paths = {mount.mountpoint for mount in there}
    found: dict[str, list[Mount]] = {}
    for mount in there:
        folder, _, name = mount.mountpoint.rpartition("/")
        striped = name.isdecimal() and {instance_of(folder, 0), instance_of(folder, 1)} <= paths
        found.setdefault(folder if striped and folder else mount.mountpoint, []).append(mount)
    for members in found.values():
        members.sort(key=lambda mount: (len(mount.mountpoint), mount.mountpoint))
    return list(found.items())


def make_folders(parts: Sequence[Settings]) -> None:
    """Make the directories of the instances. A directory that is a mountpoint is skipped: on a dead mount, access fails."""
    mounted = {mount.mountpoint for mount in zbudfs_mounts()}
    for part in parts if len(parts) > 1 else ():
        if part.mountpoint in mounted:
            continue
        Path(part.mountpoint).mkdir(mode=0o755, exist_ok=True)


def undo_folders(parts: Sequence[Settings]) -> None:
    """Remove the directories of the instances again."""
    for part in parts if len(parts) > 1 else ():
        remove_folder(part.mountpoint)


def remove_folder(mountpoint: str) -> None:
    """Remove the directory of an instance. A directory that is not empty, or does not exist, is left alone."""
    with contextlib.suppress(OSError):
        Path(mountpoint).rmdir()


def summed(mountpoint: str, reports: Sequence[Report]) -> Report:
    """Return one report of all instances; its `instances` has the report of each.

    Numbers are added up, and lists of numbers element by element. For times, the largest value is taken. A boolean is true
    if it is true for all instances. A text is one value if all instances agree, else a list. If an instance gives no
    numbers, the whole report is an error.
    """
    whole: Report = {"mountpoint": mountpoint}
    if errors := [str(report["error"]) for report in reports if "error" in report]:
        whole["error"] = "; ".join(errors)
    else:
        for name in reports[0]:
            if name != "mountpoint":
                whole[name] = _together(name, [report[name] for report in reports if name in report])
        whole["warnings"] = _missing(mountpoint, reports) + whole.get("warnings", [])
    whole["instances"] = list(reports)
    return whole


def _missing(mountpoint: str, reports: Sequence[Report]) -> list[str]:
    numbers = {int(str(report["mountpoint"]).rpartition("/")[2]) for report in reports}
    missing = (shown_path(instance_of(mountpoint, number)) for number in range(max(numbers)) if number not in numbers)
    return [f"nothing is mounted on {path}, although instances with higher numbers are mounted" for path in missing]


def _together(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, list):
        if name not in ("users", "swap_off", "warnings", "remedies"):  # histograms
            return [sum(place) for place in zip(*values, strict=True)]
        return list(dict.fromkeys(each for value in values for each in value))
    if isinstance(first, bool):
        return all(values)
    if name in ("mounted_at", "as_of", "renewed_at"):
        return min(values)
    if isinstance(first, int | float) and name not in _OF_EACH:
        return max(values) if name in _LARGEST or name.endswith("_max_us") else sum(values)
    return first if all(value == first for value in values) else values
