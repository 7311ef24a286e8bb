# SPDX-License-Identifier: MIT
"""The search for the mount that a command works on, from the typed path."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zbudfs.cli import stripe
from zbudfs.cli.errors import CommandError
from zbudfs.service import mountpoint as mountpoints
from zbudfs.service.mountpoint import Mount, shown_path
from zbudfs.swap.loop import users


def need_root(command: str) -> None:
    """Raise CommandError unless the user is root. Afterwards all user and group ids of this process are 0.

    Otherwise the kernel refuses this process a FUSE mount of root (see `service/mountpoint.py`): for example after newgrp, or
    in a setuid program.
    """
    if os.geteuid() != 0:
        raise CommandError(f"{command} needs root: run it with sudo")
    if any(os.getresuid()) or any(os.getresgid()):
        try:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        except OSError as error:
            raise CommandError(f"{command} needs user id 0 and group id 0: {error.strerror}") from None


def all_mounted(mountpoint: str) -> list[Mount]:
    """Return the zbudfs mounted on `mountpoint`, or its instances. Raises CommandError if there is none."""
    found = stripe.mounts_of(mountpoint)
    if not found:
        raise not_mounted(mountpoint)
    return found


def not_mounted(mountpoint: str) -> CommandError:
    """Return the error of a mountpoint that has no zbudfs."""
    return CommandError(f"no zbudfs is mounted on {shown_path(mountpoint)}: zbudfs status lists the mounts")


def find_mounted(mountpoint: str) -> Mount:
    """Return the zbudfs mounted on `mountpoint`. Raises CommandError if there is none, or if there are instances."""
    found, *more = all_mounted(mountpoint)
    if more or found.mountpoint != mountpoint:
        raise CommandError(
            f"{shown_path(mountpoint)} has {len(more) + 1} instances: name one, such as {shown_path(found.mountpoint)}"
        )
    return found


def resolve(path: str) -> str:
    """Return the absolute path without symbolic links. The path need not exist, and a dead mount is no obstacle.

    Raises CommandError if `path` cannot be a path.
    """
    if not path or "\0" in path:
        raise CommandError(f"{path!r} is not a path")
    return mountpoints.resolve(path)


def refuse_users(mountpoint: str, mounts: Sequence[Mount], sentence: str) -> None:
    """Raise CommandError if swap or a loop device is on any of the mounts."""
    if here := [user for mounted in mounts for user in users(mounted.mountpoint, mounted.st_dev)]:
        raise CommandError(f"{shown_path(mountpoint)} {sentence.format(', '.join(here))}")
