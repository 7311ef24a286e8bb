# SPDX-License-Identifier: MIT
"""The commands that the units in systemd/ run. They take the name of a configuration instead of a mountpoint.

    serve NAME               becomes the daemon: the started process stays the main process of the service
    swapon --config NAME     swap that is already on stays on, since a unit may be started again
    swapoff --config NAME

With several instances, `serve` becomes their supervisor (`service/supervisor.py`), and the others act on all instances
(`stripe`).

A daemon that is started again goes on with the mount, the memory and the worker of the daemon before. For that it needs no
configuration, so that a configuration which has become unusable does not lose the swap.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from zbudfs.cli import commands, stripe
from zbudfs.cli import config as configuration
from zbudfs.cli.alone import NO_LIMIT, alone
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError, ConfigError
from zbudfs.cli.mounting import prepare
from zbudfs.cli.option_table import check_choice
from zbudfs.cli.target import need_root
from zbudfs.cli.teardown import take_down
from zbudfs.service import hardening, supervisor, verdict
from zbudfs.service.disks import missing_mountpoint
from zbudfs.service.launch import DAEMON_COMMAND, settings_pipe
from zbudfs.service.mountpoint import escape_path, find_mount, shown_path
from zbudfs.service.notify import Notifier, take_stored
from zbudfs.service.pooldir import is_held
from zbudfs.service.settings import Settings
from zbudfs.swap.loop import SwapError, run_tool, swaps_on, users

DISK_LIMIT_SECONDS: Final = 30.0
"""Longest wait for the disk of a backing file at boot. Arbitrary: an acceptable delay of the boot."""

WHOLE: Final = -1
"""Number of the only instance of a mount that is not divided."""


def serve(arguments: Arguments) -> int:
    """Become the daemon of a configuration, or the supervisor of its instances, for a service manager.

    A single daemon replaces this process. An error while no pages are held ends the service for good (`verdict`). After any
    other error, systemd starts the service again.
    """
    need_root("serve")
    hardening.before_exec()
    stored = verdict.has_stored()  # asked now, since the supervisor takes the stored descriptors and their variables
    try:
        return _serve(str(arguments.name))
    except Exception as error:
        if stored or _is_served(str(arguments.name)):
            raise
        problems = error.problems if isinstance(error, ConfigError) else [error]
        for problem in problems:
            print(f"zbudfs: {' '.join(str(problem).split())}", file=sys.stderr)
        return verdict.GIVE_UP


def _serve(name: str) -> int:
    kept = os.environ.get("LISTEN_FDNAMES", "").split(":")
    stored = any(each.partition(supervisor.SEPARATOR)[0] == "fuse" for each in kept)
    config = None
    try:
        config = configuration.load(name)
    except ConfigError as error:
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
        status = supervisor.supervise(parts, take_stored(), Notifier.from_environment())
        stripe.undo_folders([part for part in parts.values() if part is not None])  # folders with a mount stay
        return status
    command = [*DAEMON_COMMAND, "--service"]
    if (settings := parts[WHOLE]) is not None:
        settings_fd = settings_pipe(settings)
        os.set_inheritable(settings_fd, True)
        command += ["--settings-fd", str(settings_fd)]
    return os.execv(command[0], command)


def _is_served(name: str) -> bool:
    """Return whether a worker serves a mount of this configuration, so that the mount may hold pages."""
    try:
        mountpoint = configuration.load(name).plan.mountpoint
    except ConfigError:
        mountpoint = configuration.default_mountpoint(name)
    return any(is_held(mounted.mountpoint) for mounted in stripe.mounts_of(mountpoint))


def _parts(config: configuration.Config | None, kept: Sequence[str]) -> dict[int, Settings | None]:
    """Return the settings of each instance by its number; WHOLE is the number of a mount without instances.

    The present mounts decide the numbers. If the configuration now has another number of instances, it takes effect at the
    next mount. The settings are None for an instance that the configuration does not have, or if there is no configuration.
    """
    numbers = [
        int(each.partition(supervisor.SEPARATOR)[2] or WHOLE) for each in kept if each.partition(".")[0] == "fuse"
    ]
    if config is None:
        return dict.fromkeys(numbers)
    mountpoint = config.plan.mountpoint
    if not numbers:
        mounts = [mounted.mountpoint for mounted in stripe.mounts_of(mountpoint)]
        numbers = [WHOLE if path == mountpoint else int(path.rpartition("/")[2]) for path in mounts]
    wanted = config.plan.parts
    if not numbers:
        numbers = [WHOLE] if len(wanted) == 1 else list(range(len(wanted)))
    if numbers == [WHOLE]:
        return {WHOLE: config.plan.settings}
    return {number: wanted[number] if number < len(wanted) > 1 else None for number in numbers}


def _prepare(config: configuration.Config, parts: Sequence[Settings]) -> None:
    """Prepare the mounts: make mountpoints, wait for disks, and remove dead mounts without swap."""
    configuration.make_mountpoint(config)
    stripe.make_folders(parts)
    for part in parts:
        if part.backing is not None and (missing := missing_mountpoint(part.backing)) is not None:
            _wait_for_disk(missing[0])
        mountpoint = part.mountpoint
        mounted = find_mount(mountpoint)
        if mounted is not None and is_held(mountpoint):
            continue  # a worker still serves; a question to the mount, or the lock, might have to wait
        with alone("serve", mountpoint):
            _make_room(part, parts)
            prepare(part)


def _make_room(part: Settings, parts: Sequence[Settings]) -> None:
    """Remove a dead mount without swap from the mountpoint of an instance. Raises CommandError if swap is on it."""
    mountpoint = part.mountpoint
    mounted = find_mount(mountpoint)
    if mounted is None:
        return
    if here := users(mountpoint, mounted.st_dev):
        raise CommandError(
            f"a zbudfs whose daemon has died is still mounted on {shown_path(mountpoint)}, with {', '.join(here)}:"
            f" run zbudfs umount {shown_path(mountpoint)}; the pages that are swapped out there are lost"
        )
    take_down(mounted)
    stripe.make_folders(parts)


def _wait_for_disk(point: str) -> None:
    """Make the service manager mount `point` as /etc/fstab says, and wait for it: at boot the disk may appear late.

    The wait is limited, since the boot waits for this service. The caller checks afterwards whether the disk is mounted. The
    units have no dependency on the mount: a mount that waits for sysinit.target would make it a cycle, in which systemd drops
    a unit of its choice.
    """
    with contextlib.suppress(SwapError):
        run_tool(["systemctl", "start", f"{escape_path(point)}.mount"], limit_seconds=DISK_LIMIT_SECONDS)


def swapon(arguments: Arguments) -> int:
    """Turn on swap on the zbudfs of a configuration, mount it first if needed, and print the devices."""
    check_choice(arguments)
    config = configuration.load(str(arguments.config))
    plan = config.plan
    if not plan.swap:
        raise CommandError(f"the configuration {config.name} has swap = false: set swap = true to use it as swap")
    with alone("swapon", plan.mountpoint):
        mounts = stripe.mounts_of(plan.mountpoint)
        if not mounts:
            configuration.make_mountpoint(config)
            return commands.mount_as_swap(plan)
        active = [swaps_on(mounted.mountpoint, mounted.st_dev) for mounted in mounts]
        if all(active):
            print("\n".join(swap.path for swaps in active for swap in swaps))
            return 0
        return commands.make_swap(plan.mountpoint, mounts, plan.priority, plan.discard)


def swapoff(arguments: Arguments) -> int:
    """Turn off the swap on the zbudfs of a configuration, if there is any."""
    check_choice(arguments)
    mountpoint = configuration.load(str(arguments.config)).plan.mountpoint
    with alone("swapoff", mountpoint, NO_LIMIT):  # a swapoff has no time limit
        mounts = stripe.mounts_of(mountpoint)
        used = any(users(mounted.mountpoint, mounted.st_dev) for mounted in mounts)
        if not mounts or (not used and not arguments.umount):
            return 0
        return commands.end_swap(mountpoint, force=arguments.force, umount=arguments.umount)
