# SPDX-License-Identifier: MIT
"""What the units in systemd/ run: the commands that take the name of a configuration instead of a mountpoint.

    serve NAME               becomes the daemon, in place: the process that was started is the service's main process
    swapon --config NAME     what is on already stays on: a unit may be started again
    swapoff --config NAME

A daemon that is started again goes on with what the one before has left: its mount, its memory, its worker. For that it
needs no configuration: one that has become unusable meanwhile must not be what loses swap.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from zbudfs.cli import commands
from zbudfs.cli import config as configuration
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.commands import CommandError
from zbudfs.service import hardening
from zbudfs.service.launch import DAEMON_COMMAND
from zbudfs.service.mountpoint import find_mount, shown_path
from zbudfs.service.pooldir import is_held
from zbudfs.service.settings import Settings
from zbudfs.swap.loop import users

UNUSABLE: Final = 2
"""Exit status where the configuration cannot be used: trying again would not help."""


def serve(arguments: Arguments) -> int:
    """Become the daemon of a configuration, for a service manager; does not return."""
    commands.need_root("serve")
    hardening.before_exec()
    name = str(arguments.name)
    stored = "fuse" in os.environ.get("LISTEN_FDNAMES", "").split(":")
    settings = None
    try:
        config = configuration.load(name)
    except configuration.ConfigError as error:
        for problem in error.problems:
            print(f"zbudfs: {problem}", file=sys.stderr)
        if not stored:
            return UNUSABLE
    else:
        for warning in config.warnings:
            print(f"zbudfs: {warning}", file=sys.stderr)
        settings = config.settings
        if not stored:
            _prepare(config)
    command = [*DAEMON_COMMAND, "--service"]
    if settings is not None:
        command += ["--settings-fd", str(_pipe_with(settings))]
    os.chdir("/")
    return os.execv(command[0], command)


def _prepare(config: configuration.Config) -> None:
    """Make what must be there for a mount, and take away what a dead one without swap has left."""
    mountpoint = config.settings.mountpoint
    mounted = find_mount(mountpoint)
    if mounted is not None and is_held(mountpoint):
        return  # a worker serves on; asking the mount might have to wait
    if mounted is not None:
        if here := users(mountpoint, mounted.st_dev):
            raise CommandError(
                f"a zbudfs whose daemon has died is still mounted on {shown_path(mountpoint)}, with {', '.join(here)}:"
                f" run zbudfs umount {shown_path(mountpoint)}; what is swapped out there is lost"
            )
        commands.take_down(mounted)
    configuration.make_mountpoint(config)
    commands.prepare(config.settings)


def _pipe_with(settings: Settings) -> int:
    """The reading end of a pipe that holds the settings; programs started from here have it."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, settings.to_json().encode() + b"\n")  # less than a pipe holds
    os.close(write_fd)
    os.set_inheritable(read_fd, True)
    return read_fd


def swapon(arguments: Arguments) -> int:
    """Make a configuration's zbudfs active swap, mounting it first if need be; print the device."""
    config = configuration.load(str(arguments.config))
    if not config.swap:
        raise CommandError(f"{config.files[-1]} says swap = false: {config.name} is not wanted as swap")
    mounted = find_mount(config.settings.mountpoint)
    if mounted is not None:
        here = users(mounted.mountpoint, mounted.st_dev)
        if any(user.startswith("swap on ") for user in here):
            print(here[0].removeprefix("swap on "))
            return 0
        wanted = Arguments(**{**vars(arguments), "mountpoint": mounted.mountpoint})
        wanted.priority = config.arguments.priority
        return commands.swapon(wanted)
    configuration.make_mountpoint(config)
    return commands.swapon(config.arguments)


def swapoff(arguments: Arguments) -> int:
    """End the swap on a configuration's zbudfs, if there is any."""
    config = configuration.load(str(arguments.config))
    mounted = find_mount(config.settings.mountpoint)
    if mounted is None or (not users(mounted.mountpoint, mounted.st_dev) and not arguments.umount):
        return 0
    return commands.swapoff(Arguments(**{**vars(arguments), "mountpoint": mounted.mountpoint, "config": None}))
