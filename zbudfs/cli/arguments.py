# SPDX-License-Identifier: MIT
"""What was typed, with its types: `options` fills it in, `commands` reads it, and neither needs the other for that."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

MOUNT_OPTIONS: Final = ("size", "pool", "backing", "force_backing", "level", "encrypt", "packing", "instances")
"""The options that say what is mounted. They mean nothing for a mount that is there, and a configuration says them itself."""


class Arguments(argparse.Namespace):
    """What was typed, with the types that the parser gives."""

    run: Callable[[Arguments], int]
    """The command."""
    mountpoint: str
    """As typed; status has `one_mountpoint` instead."""
    one_mountpoint: str | None
    """As typed; None: all of them."""
    size: int | None
    """Bytes; None: the default."""
    pool: str | None
    """A size or a percentage that has been checked; None: the default."""
    backing: str | None
    """A path or "none"; None: the default."""
    level: int | None
    """zstd level; None: the default."""
    encrypt: bool | None
    """Whether to encrypt what is written back; None: the default."""
    force_backing: bool | None
    """Whether to take a backing that is refused otherwise; None: the default."""
    packing: str | None
    """As core/packing.py writes it; None: the default."""
    instances: int | None
    """How many daemons share size and pool; None: the default."""
    foreground: bool
    """Whether the daemon stays at the terminal."""
    priority: int | None
    """Swap priority; None: left to the kernel."""
    umount: bool
    """Whether swapoff unmounts as well."""
    force: bool
    """Whether swapoff leaves out the count of memory."""
    watch: float | str | None
    """Seconds between two looks; None: one look. What is no number was meant as the mountpoint."""
    listen: tuple[str, int] | None
    """Address and port of the exporter; None: the default."""
    textfile: str | None
    """File that the exporter writes; None: it listens."""
    interval: float | None
    """Seconds between two writes of that file; None: it is written once."""
    mountpoints: list[str]
    """As typed; none: all of them."""
    words: list[str]
    """What set is told: KEY=VALUE ..., then the mountpoint."""
    json: bool
    """Whether JSON is printed."""
    name: str | None
    """Of a configuration; None: all of them."""
    step: str
    """Of hibernate: prepare or finish."""
    config: str | None
    """Name of a configuration that says the rest; None: the mountpoint is typed."""
    check: bool
    """Whether config only looks for errors."""
    root: str
    """Folder that holds the system whose configuration is read."""
    pids: list[int]
    """Processes that estimate looks at."""
    all: bool
    """Whether estimate looks at all processes."""
    file: str | None
    """That estimate looks at; None: processes."""
    sample: int | None
    """Bytes to look at; None: the default."""
    seed: int
    """What random choices start from."""
    levels: list[int] | None
    """zstd levels to compare; None: the default one alone."""
    plot: str | None
    """Picture to draw; None: none."""
    pools: list[str] | None
    """Pools to compare, as they were typed; None: the recorded one."""
    packings: list[str] | None
    """Packings to compare; None: the recorded one."""
    watermarks: list[str] | None
    """Pairs of watermarks to compare, as they were typed; None: the daemon's."""
    trace: str
    """File that holds a trace."""
    output: str
    """File to write."""
    seconds: float | None
    """How long to record; None: until told to stop."""
    max: int | None
    """Largest size of a trace, in bytes; None: the default."""
    look_seconds: float
    """Seconds between looks of top."""
    picture: str | None
    """Picture that top draws instead of a screen; None: none."""
    picture_seconds: float
    """Seconds until top draws it."""
