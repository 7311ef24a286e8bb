# SPDX-License-Identifier: MIT
"""The plan of a mount: all options of one zbudfs, resolved, checked and complete. They are typed, configured or from fstab.

values (option_table) + defaults --> Plan: the settings of each daemon, and the use of its swap
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from zbudfs.cli import stripe
from zbudfs.cli.option_table import OPTIONS, Value
from zbudfs.cli.suited import suited_size_bytes
from zbudfs.core.sizes import format_size
from zbudfs.service.footprint import check_tables
from zbudfs.service.mountpoint import SOURCE
from zbudfs.service.settings import (
    Settings,
    SettingsError,
    default_backing,
    default_pool_bytes,
    ram_bytes,
)
from zbudfs.swap.discard import DEFAULT_DISCARD

_PASSED_ON: Final = tuple(
    option
    for option in OPTIONS
    if option.field in {field.name for field in fields(Settings)} - {"mountpoint", "backing"}
)
"""Options whose value goes unchanged into the field of `Settings` of the same name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One zbudfs as it will be mounted and used. All of its values are valid."""

    settings: Settings
    """Settings of the whole, as a single daemon would get them."""
    parts: tuple[Settings, ...]
    """Settings of each daemon: one, or one for each instance."""
    swap: bool
    """Whether the configuration wants active swap."""
    priority: int | None
    """Priority of the swap; None: chosen from the other swap of the machine (swap/priority.py)."""
    discard: str
    """Discards of the swap (swap/discard.py)."""
    ram_bytes: int
    """RAM of the machine, in bytes."""

    @property
    def mountpoint(self) -> str:
        """Mountpoint of the whole. Each of several instances has a directory in it."""
        return self.settings.mountpoint


def make_plan(values: Mapping[str, Value], mountpoint: str, *, root: str = "/", source: str = SOURCE) -> Plan:
    """Return the plan for option values by name, with defaults for the others.

    `mountpoint` is a resolved path, `root` holds `proc/`, and mount tables show `source`. Raises SettingsError.
    """
    wanted: Mapping[str, Any] = values
    ram = ram_bytes(root)
    pool_bytes = wanted.get("pool", default_pool_bytes(ram))
    if pool_bytes > ram:
        raise SettingsError(
            f"pool of {format_size(pool_bytes)} is more than this machine's RAM of {format_size(ram)}: write a smaller"
            " pool, since its frames are locked in RAM"
        )
    backing = _backing(wanted["backing"]) if "backing" in wanted else default_backing(mountpoint)
    settings = Settings(
        mountpoint=mountpoint,
        size_bytes=wanted["size"] if "size" in wanted else suited_size_bytes(ram, pool_bytes, backing, root),
        pool_bytes=pool_bytes,
        backing=backing,
        source=source,
        **{option.field: wanted[option.name] for option in _PASSED_ON if option.name in wanted},
    )
    check_tables(settings, ram)
    parts = stripe.divided(settings, wanted.get("instances", 1), wanted.get("backing"))
    return Plan(
        settings=settings,
        parts=tuple(parts),
        swap=wanted.get("swap", True),
        priority=wanted.get("priority"),
        discard=wanted.get("discard", DEFAULT_DISCARD),
        ram_bytes=ram,
    )


def _backing(path: str) -> str | None:
    """Return the absolute path of the backing file; None for "none".

    The folder is resolved. A symbolic link as the last component stays, and the daemon refuses it: with such a link another
    user could make root empty any file.
    """
    if path == "none":
        return None
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        raise SettingsError(f"backing {path!r} is not a file name: write the path of a file, or none")
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118  the path may hold any bytes
