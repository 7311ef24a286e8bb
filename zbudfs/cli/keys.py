# SPDX-License-Identifier: MIT
"""What can be configured: one list, from which files are read, mount options are read, and the manual is checked.

Each key has the name of the command line's option and gives what that option would give, so that a daemon started from
a file and one started by hand get the same settings through the same checks (`commands.make_settings`). A new option
becomes a new key by one more entry in `KEYS`.

A value is what TOML gives (a str, an int, a bool ...) or, for a mount option, always a str.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from zbudfs.cli.expression import EXPRESSION_GRAMMAR, parse_amount
from zbudfs.cli.stripe import MAX_INSTANCES
from zbudfs.core.packing import GRAMMAR, Packing
from zbudfs.service.settings import BACKING_FOLDER, DEFAULT_LEVEL, DEFAULT_PACKING, DEFAULT_POOL, MAX_LEVEL, MIN_LEVEL
from zbudfs.swap.priority import DEFAULT_PRIORITY, MAX_PRIORITY

Value = str | int | bool | None
"""What a key comes to; None where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One thing that can be configured."""

    name: str
    """In files and mount options, and behind `--` on the command line."""
    read: Callable[[object, int], Value]
    """From (value, RAM in bytes) to what the option of this name would give; ValueError says what would be right."""
    kind: str
    """What a value looks like, in a few words."""
    default: str
    """What holds where the key is not there, in a few words."""
    summary: str
    """What it is for: one sentence without a full stop."""
    mount_option: bool = True
    """Whether `mount -t fuse.zbudfs -o NAME=VALUE` knows it as well."""

    @property
    def field(self) -> str:
        """The name of the field in `Arguments` and, if it has one, in `Settings`."""
        return self.name.replace("-", "_")


def _path(value: object, ram: int) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError('write an absolute path in quotes, such as "/mnt/zswap"')
    return value


def _backing(value: object, ram: int) -> str:
    if value == "none":
        return "none"
    try:
        return _path(value, ram)
    except ValueError:
        raise ValueError('write an absolute path in quotes, such as "/var/swap.backing", or "none"') from None


def _amount(value: object, ram: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if not isinstance(value, str):
        raise ValueError(f"write, in quotes, {EXPRESSION_GRAMMAR}; without quotes a whole number of bytes")
    return parse_amount(value.strip(), ram)


def _pool(value: object, ram: int) -> str:
    return str(_amount(value, ram))


def _number(what: str, low: int, high: int) -> Callable[[object, int], int]:
    def read(value: object, ram: int) -> int:
        try:
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise ValueError
            if isinstance(value, str) and not (
                value.isascii() and value.removeprefix("-").isdigit() and len(value) < 20
            ):
                raise ValueError
            if not low <= int(value) <= high:
                raise ValueError
            return int(value)
        except ValueError:
            raise ValueError(f"it is not {what}: write a whole number from {low} to {high}") from None

    return read


def _packing(value: object, ram: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"write, in quotes, {GRAMMAR}")
    return str(Packing.parse(value))


def switch(value: object, ram: int) -> bool:
    """Read a key that is on or off."""
    if isinstance(value, bool):
        return value
    if value in ("yes", "no", "true", "false", "on", "off"):
        return value in ("yes", "true", "on")
    raise ValueError("write true or false, without quotes")


KEYS: Final = (
    Key(
        name="mountpoint",
        read=_path,
        kind="absolute path",
        default="/run/zbudfs.NAME",
        summary="directory to mount on, created if it is missing",
        mount_option=False,
    ),
    Key(
        name="size",
        read=_amount,
        kind="size, percentage of RAM or expression",
        default="RAM",
        summary="size of the swap file",
    ),
    Key(
        name="pool",
        read=_pool,
        kind="size, percentage of RAM or expression",
        default=DEFAULT_POOL,
        summary="most RAM for what is stored",
    ),
    Key(
        name="backing",
        read=_backing,
        kind='absolute path of a file or block device, or "none"',
        default=f"a file in {BACKING_FOLDER}, named after the mountpoint",
        summary="where cold frames are written",
    ),
    Key(
        name="force-backing",
        read=switch,
        kind="true or false",
        default="false",
        summary="whether a backing is taken that zbudfs refuses: of others, with foreign data, on FUSE or a network",
    ),
    Key(
        name="level",
        read=_number("a level", MIN_LEVEL, MAX_LEVEL),
        kind=f"whole number, {MIN_LEVEL} to {MAX_LEVEL}, not 0",
        default=str(DEFAULT_LEVEL),
        summary="zstd level: low is fast, high is small",
    ),
    Key(
        name="encrypt",
        read=switch,
        kind="true or false",
        default="true",
        summary="whether what is written to the backing file is encrypted",
    ),
    Key(
        name="packing",
        read=_packing,
        kind="zbud, dense, or dense:N with N from 2 to 7",
        default=DEFAULT_PACKING,
        summary="how many pages share a frame: zbud is two and fast, dense up to N",
    ),
    Key(
        name="instances",
        read=_number("a number of instances", 1, MAX_INSTANCES),
        kind=f"whole number, 1 to {MAX_INSTANCES}",
        default="1",
        summary="how many daemons share size and pool, with swap that the kernel fills in turns",
        mount_option=False,
    ),
    Key(
        name="swap",
        read=switch,
        kind="true or false",
        default="true",
        summary="whether zbudfs-swap@NAME makes it active swap",
        mount_option=False,
    ),
    Key(
        name="priority",
        read=_number("a priority", 0, MAX_PRIORITY),
        kind=f"whole number, 0 to {MAX_PRIORITY}",
        default=f"{DEFAULT_PRIORITY}, or what lies above all other swap and below zram",
        summary="priority of the swap: the highest is filled first",
        mount_option=False,
    ),
)
"""All keys, in the order in which they are shown."""

BY_NAME: Final = {key.name: key for key in KEYS}
