# SPDX-License-Identifier: MIT
"""Parsed command lines, with the types of their values. `parser` fills them in, and the commands read them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Later:
    """The function of a command, by its module in `zbudfs.cli`. A command line imports only the module of its command.

    All modules together would take twice the time of most commands.
    """

    module: str
    name: str

    def function(self) -> Callable[[Arguments], int]:
        """Import the module, and return the function. It carries out the command, and returns the exit status."""
        found: Callable[[Arguments], int] = getattr(importlib.import_module(f"zbudfs.cli.{self.module}"), self.name)
        return found


class Arguments(argparse.Namespace):
    """The parsed command line of one command. An attribute exists only if that command has the argument."""

    run: Later
    """The function of the command."""
    mountpoint: str
    """Mountpoint as typed. `status` and `top` have `one_mountpoint` instead."""
    one_mountpoint: str | None
    """Mountpoint as typed; None: not given."""
    pool: str | None
    """Checked size or percentage; None: the default."""
    backing: str | None
    """Path of the backing, or "none"; None: the default."""
    foreground: bool
    """Whether the daemon stays at the terminal."""
    priority: int | None
    """Swap priority; None: chosen by zbudfs (swap/priority.py)."""
    discard: str | None
    """Discards of the swap; None: as they were, or the default (swap/discard.py)."""
    umount: bool
    """Whether swapoff also unmounts."""
    force: bool
    """Whether swapoff skips the check that RAM has room for the swapped pages."""
    watch: float | str | None
    """Seconds between two pages of `status`; None: one page. A path here is the mountpoint, typed without seconds."""
    listen: tuple[str, int] | None
    """Address and port of the exporter; None: the default."""
    textfile: str | None
    """File that the exporter writes; None: the exporter listens."""
    interval: float | None
    """Seconds between two writes of `textfile`; None: one write."""
    mountpoints: list[str]
    """Mountpoints as typed; empty: all."""
    words: list[str]
    """Words of `set`: KEY=VALUE ..., then the mountpoint."""
    json: bool
    """Whether the command prints JSON."""
    name: str | None
    """Name of a configuration; None: all configurations."""
    step: str
    """Step of hibernate: "prepare" or "finish"."""
    config: str | None
    """Name of a configuration that has the mountpoint and the options; None: they are typed."""
    check: bool
    """Whether `config` prints errors only."""
    root: str
    """Folder that holds the system whose configuration is read."""
    pids: list[int]
    """Processes whose memory estimate samples."""
    all: bool
    """Whether estimate samples all processes."""
    file: str | None
    """File that estimate samples; None: processes."""
    sample: int | None
    """Size of the sample in bytes; None: the default."""
    seed: int
    """Seed of random choices."""
    levels: list[int] | None
    """zstd levels to compare; None: the default level alone."""
    plot: str | None
    """File for a plot; None: no plot."""
    pools: list[str] | None
    """Pool sizes to compare, as typed; None: the recorded one."""
    packings: list[str] | None
    """Packings to compare; None: the recorded one."""
    watermarks: list[str] | None
    """Pairs of watermarks to compare, as typed; None: those of the daemon."""
    trace: str
    """File that holds a trace."""
    output: str
    """File to write."""
    seconds: float | None
    """Length of the recording; None: until Ctrl-C or SIGTERM."""
    max: int | None
    """Largest size of a trace, in bytes; None: the default."""
    look_seconds: float
    """Seconds between two updates of top."""
    picture: str | None
    """File to which top draws its screen; None: top shows it on the terminal."""
    picture_seconds: float | None
    """Seconds until top draws `picture`; None: the default."""
