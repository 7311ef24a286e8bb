# SPDX-License-Identifier: MIT
"""What the units in systemd/ run: the commands that take the name of a configuration instead of a mountpoint.

    serve NAME               becomes the daemon, in place: the process that was started is the service's main process
    swapon --config NAME     what is on already stays on: a unit may be started again
    swapoff --config NAME

Of several instances `serve` becomes the leader (`leader`), and the others act on all of them (`stripe`).

A daemon that is started again goes on with what the one before has left: its mount, its memory, its worker. For that it
needs no configuration: one that has become unusable meanwhile must not be what loses swap.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from zbudfs.cli import commands, leader, stripe
from zbudfs.cli import config as configuration
from zbudfs.cli.alone import NO_LIMIT, alone
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.target import CommandError, need_root
from zbudfs.cli.teardown import take_down
from zbudfs.service import hardening, verdict
from zbudfs.service.disks import missing_mountpoint
from zbudfs.service.launch import DAEMON_COMMAND
from zbudfs.service.mountpoint import escape_path, find_mount, shown_path
from zbudfs.service.notify import Notifier, take_stored
from zbudfs.service.pooldir import is_held
from zbudfs.service.settings import Settings
from zbudfs.swap.loop import SwapError, run_tool, swaps_on, users

DISK_LIMIT_SECONDS: Final = 30.0
"""Longest wait for the disk of a backing file at boot. Arbitrary: as long as the boot may reasonably be held up."""

WHOLE: Final = -1
"""The number of an instance that is the only one."""


def serve(arguments: Arguments) -> int:
    """Become the daemon of a configuration, for a service manager; does not return. Of several instances: their leader.

    An error while nothing is held ends the service for good (`verdict`); any other is for systemd to try again.
    """
    need_root("serve")
    hardening.before_exec()
    stored = verdict.has_stored()  # the leader takes what is stored, and the variables with it
    try:
        return _serve(str(arguments.name))
    except Exception as error:
        if stored or _is_served(str(arguments.name)):
            raise
        problems = error.problems if isinstance(error, configuration.ConfigError) else [error]
        for problem in problems:
            print(f"zbudfs: {' '.join(str(problem).split())}", file=sys.stderr)
        return verdict.GIVE_UP


def _serve(name: str) -> int:
    kept = os.environ.get("LISTEN_FDNAMES", "").split(":")
    stored = any(each.partition(leader.SEPARATOR)[0] == "fuse" for each in kept)
    config = None
    try:
        config = configuration.load(name)
    except configuration.ConfigError as error:
        if not stored:
            raise
        for problem in error.problems:
            print(f"zbudfs: {problem}", file=sys.stderr)
    else:
        for warning in config.warnings:
            print(f"zbudfs: {warning}", file=sys.stderr)
    parts = _parts(config, kept)
    if config is not None and not stored:
        _prepare(config, [part for part in parts.values() if part is not None])
    os.chdir("/")
    if WHOLE not in parts:
        status = leader.lead(parts, take_stored(), Notifier.from_environment())
        stripe.undo_folders([part for part in parts.values() if part is not None])  # those that are mounted on stay
        return status
    command = [*DAEMON_COMMAND, "--service"]
    if (settings := parts[WHOLE]) is not None:
        command += ["--settings-fd", str(_pipe_with(settings))]
    return os.execv(command[0], command)


def _is_served(name: str) -> bool:
    """Return whether a worker serves a mount of this configuration, so that the mount may hold pages."""
    try:
        mountpoint = configuration.load(name).settings.mountpoint
    except configuration.ConfigError:
        mountpoint = configuration.default_mountpoint(name)
    return any(is_held(mounted.mountpoint) for mounted in stripe.mounts_of(mountpoint))


def _parts(config: configuration.Config | None, kept: Sequence[str]) -> dict[int, Settings | None]:
    """The settings of each instance by its number; WHOLE: there is but one, on the mountpoint itself.

    What is there already counts: a configuration that has another number of instances by now takes effect when it is
    mounted anew.
    """
    numbers = [int(each.partition(leader.SEPARATOR)[2] or WHOLE) for each in kept if each.partition(".")[0] == "fuse"]
    if config is None:
        return dict.fromkeys(numbers)
    mountpoint = config.settings.mountpoint
    if not numbers:
        mounts = [mounted.mountpoint for mounted in stripe.mounts_of(mountpoint)]
        numbers = [WHOLE if path == mountpoint else int(path.rpartition("/")[2]) for path in mounts]
    wanted = stripe.divided(config.settings, config.arguments.instances or 1, config.arguments.backing)
    if not numbers:
        numbers = [WHOLE] if len(wanted) == 1 else list(range(len(wanted)))
    if numbers == [WHOLE]:
        return {WHOLE: config.settings}
    return {number: wanted[number] if number < len(wanted) > 1 else None for number in numbers}


def _prepare(config: configuration.Config, parts: Sequence[Settings]) -> None:
    """Make what must be there for a mount, and take away what a dead one without swap has left."""
    configuration.make_mountpoint(config)
    stripe.make_folders(parts)
    for part in parts:
        if part.backing is not None and (missing := missing_mountpoint(part.backing)) is not None:
            _wait_for_disk(missing[0])
        mountpoint = part.mountpoint
        mounted = find_mount(mountpoint)
        if mounted is not None and is_held(mountpoint):
            continue  # a worker serves on; asking the mount might have to wait, and so might a command that works on it
        with alone("serve", mountpoint):
            _make_room(part, parts)
            commands.prepare(part)


def _make_room(part: Settings, parts: Sequence[Settings]) -> None:
    """Take a dead mount without swap away from where a part is to be mounted."""
    mountpoint = part.mountpoint
    mounted = find_mount(mountpoint)
    if mounted is None:
        return
    if here := users(mountpoint, mounted.st_dev):
        raise CommandError(
            f"a zbudfs whose daemon has died is still mounted on {shown_path(mountpoint)}, with {', '.join(here)}:"
            f" run zbudfs umount {shown_path(mountpoint)}; what is swapped out there is lost"
        )
    take_down(mounted)
    stripe.make_folders(parts)


def _wait_for_disk(point: str) -> None:
    """Have the service manager mount what fstab has for `point`, and wait for it; it may be on its way at boot.

    The time is limited, since the boot waits for this service. Whether the disk is there is looked at afterwards. The units
    have no dependency on the mount: one on a mount that itself waits for sysinit.target would be a cycle, in which systemd
    drops a unit of its choice.
    """
    with contextlib.suppress(SwapError):
        run_tool(["systemctl", "start", f"{escape_path(point)}.mount"], limit_seconds=DISK_LIMIT_SECONDS)


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
    mountpoint = config.settings.mountpoint
    with alone("swapon", mountpoint):
        mounts = stripe.mounts_of(mountpoint)
        if not mounts:
            configuration.make_mountpoint(config)
            return commands.make_swap(config.arguments, mountpoint)
        active = [swaps_on(mounted.mountpoint, mounted.st_dev) for mounted in mounts]
        if all(active):
            print("\n".join(swap.path for swaps in active for swap in swaps))
            return 0
        wanted = Arguments(**{**vars(arguments), "mountpoint": mountpoint})
        wanted.priority = config.arguments.priority
        return commands.make_swap(wanted, mountpoint)


def swapoff(arguments: Arguments) -> int:
    """End the swap on a configuration's zbudfs, if there is any."""
    config = configuration.load(str(arguments.config))
    mountpoint = config.settings.mountpoint
    with alone("swapoff", mountpoint, NO_LIMIT):  # another swapoff takes as long as it takes, and so does this one
        mounts = stripe.mounts_of(mountpoint)
        used = any(users(mounted.mountpoint, mounted.st_dev) for mounted in mounts)
        if not mounts or (not used and not arguments.umount):
            return 0
        return commands.end_swap(Arguments(**{**vars(arguments), "mountpoint": mountpoint, "config": None}), mountpoint)
