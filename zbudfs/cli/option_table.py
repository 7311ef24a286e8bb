# SPDX-License-Identifier: MIT
"""The table of all options of a mount and of its swap. Each option is declared here alone.

    OPTIONS --> --NAME of mount and swapon, and the check against --config          parser, commands
            --> keys of /etc/zbudfs/*.toml, and what `zbudfs config` prints         config, config_page
            --> -o NAME=VALUE of mount(8)                                           mount_helper
            --> manual pages, completion, example configuration                     scripts/pages.py

To add an option, add an entry here, and the code that uses it. Most often that is a field of `Settings` of the same name,
which gets the value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.expression import EXPRESSION_GRAMMAR, parse_amount
from zbudfs.cli.stripe import MAX_INSTANCES
from zbudfs.cli.values import whole_number
from zbudfs.core.packing import GRAMMAR, Packing
from zbudfs.service.settings import (
    BACKING_FOLDER,
    DEFAULT_LEVEL,
    DEFAULT_PACKING,
    DEFAULT_POOL,
    MAX_LEVEL,
    MIN_LEVEL,
    SettingsError,
)
from zbudfs.swap.discard import DEFAULT_DISCARD, SWAPON_OPTIONS
from zbudfs.swap.priority import DEFAULT_PRIORITY, MAX_PRIORITY

Value = str | int | bool | None
"""The value of an option, with the same meaning for all sources; None: the user chose none."""

FOLDER: Final = "/etc/zbudfs"
"""Folder of the configurations, whose keys are the options."""

BOTH: Final = ("mount", "swapon")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option."""

    name: str
    """Key in files, name of the mount option, and `--name` on the command line."""
    read: Callable[[object, int], Value]
    """Function of (value in a file or text, RAM in bytes) that returns the value. Its ValueError says what is right."""
    kind: str
    """Form of the value in a file, in a few words."""
    default: str
    """Default, in a few words."""
    example: str | int | bool
    """Value in the example configuration: the default, if it can be written as a value."""
    summary: str
    """Purpose of the option: one clause without a full stop."""
    details: str = ""
    """More sentences for the manual page, as reStructuredText."""
    metavar: str = ""
    """Form of the value on the command line."""
    commands: tuple[str, ...] = BOTH
    """Commands that have it as `--name`."""
    mount_option: bool = True
    """Whether `mount -t fuse.zbudfs -o name=VALUE` accepts it."""

    @property
    def field(self) -> str:
        """Name of the attribute in parsed command lines and in `Settings`."""
        return self.name.replace("-", "_")

    @property
    def typed_default(self) -> str:
        """Default in the words of the command line, where a switch is yes or no."""
        words = {"true": "yes", "false": "no"} if self.metavar == "yes|no" else {}
        return words.get(self.default, self.default)


def _path(value: object, ram: int) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError('write an absolute path in quotes, such as "/mnt/zswap"')
    return value


def _backing(value: object, ram: int) -> str:
    try:
        return "none" if value == "none" else _path(value, ram)
    except ValueError:
        raise ValueError('write an absolute path in quotes, such as "/var/swap.backing", or "none"') from None


def _amount(value: object, ram: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if not isinstance(value, str):
        raise ValueError(f"write, in quotes, {EXPRESSION_GRAMMAR}; without quotes a whole number of bytes")
    return parse_amount(value.strip(), ram)


def _number(what: str, low: int, high: int) -> Callable[[object, int], int]:
    read = whole_number(what, low, high)
    return lambda value, ram: read(value)


def _packing(value: object, ram: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"write, in quotes, {GRAMMAR}")
    return str(Packing.parse(value))


def _discard(value: object, ram: int) -> str:
    if not isinstance(value, str) or value not in SWAPON_OPTIONS:
        raise ValueError('it is neither pages nor once: write "pages" or "once"')
    return value


def _switch(value: object, ram: int) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError("write true or false, without quotes")
    if value not in ("yes", "no", "true", "false", "on", "off"):
        raise ValueError("it is neither yes nor no: write yes or no, or true or false")
    return value in ("yes", "true", "on")


OPTIONS: Final = (
    Option(
        name="mountpoint",
        read=_path,
        kind="absolute path",
        default="/run/zbudfs.NAME",
        example="/run/zbudfs.swap",
        summary="directory to mount on, created if it is missing",
        details="The default is below /run, which is writable while the root file system is read-only, is empty after a"
        " reboot, and is unmounted last at power-off.",
        commands=(),
        mount_option=False,
    ),
    Option(
        name="size",
        read=_amount,
        kind="size, percentage of RAM or expression",
        default="RAM",
        example="ram",
        summary="size of the swap file, in whole pages of 4096 bytes",
        details="1M to 16T less a page. Until it is used, the swap file takes memory for its tables only.",
        metavar="SIZE",
    ),
    Option(
        name="pool",
        read=_amount,
        kind="size, percentage of RAM or expression",
        default=DEFAULT_POOL,
        example=DEFAULT_POOL,
        summary="most RAM for stored pages; a percentage is a share of RAM",
        details="1M or more. The daemon takes memory as it is needed, and gives it back.",
        metavar="SIZE|PERCENT",
    ),
    Option(
        name="backing",
        read=_backing,
        kind='absolute path of a file or block device, or "none"',
        default=f"a file in {BACKING_FOLDER}, named after the mountpoint",
        example=f"{BACKING_FOLDER}/run-zbudfs.swap.backing",
        summary="file or block device to which cold frames are written; none: nothing is written to a disk",
        details="The backing is emptied at unmount. See BACKING FILES AND DEVICES.",
        metavar="FILE|DEVICE|none",
    ),
    Option(
        name="force-backing",
        read=_switch,
        kind="true or false",
        default="false",
        example=False,
        summary="accept a backing that is otherwise refused: other users could change it, it holds foreign data (which is"
        " destroyed), or it is on FUSE or on a network",
        details="The option also accepts a backing below a mount that is missing. A backing that is in use, in memory, or on"
        " a zbudfs is always refused. A device that zbudfs has used needs the option no more: then remove it.",
        metavar="yes|no",
    ),
    Option(
        name="level",
        read=_number("a level", MIN_LEVEL, MAX_LEVEL),
        kind=f"whole number, {MIN_LEVEL} to {MAX_LEVEL}, not 0",
        default=str(DEFAULT_LEVEL),
        example=DEFAULT_LEVEL,
        summary=f"compression level of zstd, {MIN_LEVEL} (fast) to {MAX_LEVEL} (small), not 0",
        metavar="N",
    ),
    Option(
        name="encrypt",
        read=_switch,
        kind="true or false",
        default="true",
        example=True,
        summary="encrypt all data in the backing file, with a key that exists in memory only",
        metavar="yes|no",
    ),
    Option(
        name="packing",
        read=_packing,
        kind="zbud, dense, or dense:N with N from 2 to 7",
        default=DEFAULT_PACKING,
        example=DEFAULT_PACKING,
        summary="pages in a frame: zbud holds two and is fast; dense holds up to N, from 2 to 7, and takes half the RAM"
        " or less if the compressed pages are small",
        details="dense without N is dense:7. With dense, rewriting a page takes longer. A mount keeps its packing.",
        metavar="zbud|dense[:N]",
    ),
    Option(
        name="instances",
        read=_number("a number of instances", 1, MAX_INSTANCES),
        kind=f"whole number, 1 to {MAX_INSTANCES}",
        default="1",
        example=1,
        summary="divide size and pool among N daemons, which mount on MOUNTPOINT/0, MOUNTPOINT/1 ...; the kernel fills"
        " their swap in turns",
        details="Then several processors compress at the same time. Instances pay with three or more processors.",
        metavar="N",
        mount_option=False,
    ),
    Option(
        name="swap",
        read=_switch,
        kind="true or false",
        default="true",
        example=True,
        summary="turn swap on when zbudfs-swap@NAME.service starts",
        commands=(),
        mount_option=False,
    ),
    Option(
        name="priority",
        read=_number("a priority", 0, MAX_PRIORITY),
        kind=f"whole number, 0 to {MAX_PRIORITY}",
        default=f"{DEFAULT_PRIORITY}, or a number above all other swap and below zram",
        example=DEFAULT_PRIORITY,
        summary=f"priority of the swap, 0 to {MAX_PRIORITY}: the kernel fills the highest first",
        metavar="N",
        commands=("swapon",),
        mount_option=False,
    ),
    Option(
        name="discard",
        read=_discard,
        kind="pages or once",
        default=DEFAULT_DISCARD,
        example=DEFAULT_DISCARD,
        summary="pages: the kernel reports freed pages, and an idle machine gets its RAM back; once: it does not, and a"
        " program that changes much memory runs faster on Linux 6.18 or later",
        details="These are the discards of swapon(8). Both values empty the whole device at swapon. With once, a freed"
        " page takes room until the kernel uses its place again.",
        metavar="pages|once",
        commands=("swapon",),
        mount_option=False,
    ),
)
"""All options, in the order of help and manual pages."""

BY_NAME: Final = {option.name: option for option in OPTIONS}


def typed(option: Option, text: str, ram: int) -> Value:
    """Read a value from a word of the command line, where a path may be relative. Raises ValueError."""
    if option.read is _backing and text != "none":
        text = os.path.join(os.getcwd(), text)  # noqa: PTH109, PTH118  the path may hold any bytes
    return option.read(text, ram)


def given_options(arguments: object) -> dict[str, Value]:
    """Return the options that were typed on a command line, by name."""
    found = {option.name: getattr(arguments, option.field, None) for option in OPTIONS if option.commands}
    return {name: value for name, value in found.items() if value is not None}


def as_toml(value: Value) -> str:
    """Return a value as TOML. The strings, whole numbers and booleans of JSON are valid TOML."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


def check_choice(arguments: Arguments) -> None:
    """Raise SettingsError unless the command line has either MOUNTPOINT, or --config without options of the table."""
    if (arguments.mountpoint is None) == (arguments.config is None):
        raise SettingsError("write either MOUNTPOINT or --config NAME")
    if arguments.config is not None and (options := given_options(arguments)):
        raise SettingsError(f"--{next(iter(options))} does not go with --config: write it into the file")
