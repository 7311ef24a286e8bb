# SPDX-License-Identifier: MIT
"""Striping: several zbudfs that the commands treat as one, for machines with more cores than one daemon can use.

    MOUNTPOINT/0 ... MOUNTPOINT/N-1      each an instance: a whole zbudfs with a daemon, a pool and a backing file of its own
    size, pool                           divided among them
    swap                                 all with the same priority, so that the kernel fills them in turns

Nothing is kept about it but the mounts themselves: those on MOUNTPOINT/0, MOUNTPOINT/1 and so on are the instances of
MOUNTPOINT. An instance can also be named alone, and is a zbudfs like any other then.
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
"""The kernel has room for 23 to 32 swaps (MAX_SWAPFILES), depending on how it was built."""

Report = dict[str, Any]
_LARGEST: Final = frozenset(
    {
        *("last_recovery_us", "coldest_age_seconds", "writeback_failing", "backing_full"),
        *("writeback_budget_full_in_seconds", "writeback_enabled"),
    }
)
"""Numbers of which the largest is told; so it is with all whose names end in `_max_us`."""
_OF_EACH: Final = frozenset({"pid", "keeper_pid", "worker_pid", "standby_pid", "level", "age_seconds"})
"""Numbers that mean nothing when they are added up: told once where they are all the same, else one by one."""


def divided(whole: Settings, instances: int, backing: str | None) -> list[Settings]:
    """The settings of each instance; those as they are for one. `backing` is what was typed, None for the default.

    Raises SettingsError where a part would be too small.
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
        raise SettingsError(f"backing {shown_path(whole.backing)} is one device, which is not divided: write a file")
    return default_backing(mountpoint) if typed is None else f"{whole.backing}.{number}"


def instance_of(mountpoint: str, number: int) -> str:
    """Where an instance is mounted."""
    return f"{mountpoint.rstrip('/')}/{number}"


def mounts_of(mountpoint: str) -> list[Mount]:
    """The zbudfs mounted on `mountpoint`, or its instances in their order; empty if there is neither."""
    known = {mount.mountpoint: mount for mount in zbudfs_mounts()}  # of several on one place the topmost
    if mountpoint in known:
        return [known[mountpoint]]
    numbers = range(MAX_INSTANCES)
    return [known[path] for number in numbers if (path := instance_of(mountpoint, number)) in known]


def is_part(mountpoint: str, whole: str) -> bool:
    """Whether `mountpoint` is `whole`, or that of one of its instances."""
    return mountpoint == whole or mountpoint in (instance_of(whole, number) for number in range(MAX_INSTANCES))


def grouped(mounts: Iterable[Mount]) -> list[tuple[str, list[Mount]]]:
    """All mounts, instances together: (mountpoint of the whole, mounts) in the order in which they came."""
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
    """Make the directories on which instances are to be mounted; a dead mount would answer every look at it with an error."""
    mounted = {mount.mountpoint for mount in zbudfs_mounts()}
    for part in parts if len(parts) > 1 else ():
        if part.mountpoint in mounted:
            continue
        Path(part.mountpoint).mkdir(mode=0o755, exist_ok=True)


def undo_folders(parts: Sequence[Settings]) -> None:
    """Take them away again."""
    for part in parts if len(parts) > 1 else ():
        remove_folder(part.mountpoint)


def remove_folder(mountpoint: str) -> None:
    """Take the directory of an instance away again; one that is not empty, or gone already, is left alone."""
    with contextlib.suppress(OSError):
        Path(mountpoint).rmdir()


def summed(mountpoint: str, reports: Sequence[Report]) -> Report:
    """One report of all instances: numbers added up, and lists of numbers place by place; `instances` has each one's own.

    Of times the largest counts; what says yes or no says yes if all do; what is told in words is told once where all say
    the same, else one by one. An instance that gives no numbers makes an error of the whole.
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
    return [f"nothing is mounted on {path}, which lies among the instances" for path in missing]


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
