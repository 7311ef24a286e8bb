# SPDX-License-Identifier: MIT
"""Mounting a plan: the checks, the start of its daemons, and the clean-up if one of them does not start."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from zbudfs.cli import footprint_text, stripe
from zbudfs.cli.errors import CommandError
from zbudfs.cli.plan import Plan
from zbudfs.cli.teardown import take_down
from zbudfs.service import disks, launch
from zbudfs.service.mountpoint import Mount, MountError, check_mountpoint, find_mount, is_dead, shown_path
from zbudfs.service.settings import BACKING_FOLDER, Settings


def mount_all(plan: Plan) -> list[Mount]:
    """Start the daemons of a plan in the background, and return their mounts when all are ready.

    If one daemon does not start, or the user presses Ctrl-C, the others are unmounted again. Raises CommandError,
    MountError, LaunchError.
    """
    try:
        prepare_all(plan)
        try:
            for part in plan.parts:
                ready = launch.start(part)
            print_notes(plan, ready)  # the system refuses every daemon the same protections
        except BaseException:
            for mounted in stripe.mounts_of(plan.mountpoint):  # prepare_all found none, so this command made them
                take_down(mounted)
            raise
    except BaseException:
        stripe.undo_folders(plan.parts)
        raise
    return stripe.mounts_of(plan.mountpoint)


def prepare_all(plan: Plan) -> None:
    """Check that a plan can be mounted, and make the folders that it needs. Raises CommandError, MountError."""
    _check_free(plan.mountpoint)
    stripe.make_folders(plan.parts)
    for part in plan.parts:
        prepare(part)


def prepare(settings: Settings) -> None:
    """Check that a daemon can start: the mountpoint is free, and the backing file has a folder.

    Raises CommandError, MountError.
    """
    _check_free(settings.mountpoint)
    _prepare_backing_folder(settings)
    _print_hidden(settings.mountpoint)


def _check_free(mountpoint: str) -> None:
    """Raise CommandError or MountError if nothing can be mounted on `mountpoint`. The daemon checks this again."""
    if find_mount(mountpoint) is not None and is_dead(mountpoint):
        raise CommandError(
            f"a zbudfs whose daemon has died is still mounted on {shown_path(mountpoint)}:"
            f" run zbudfs umount {shown_path(mountpoint)} first"
        )
    check_mountpoint(mountpoint)
    if below := stripe.mounts_of(mountpoint):
        raise MountError(f"zbudfs is mounted on {shown_path(below[0].mountpoint)} already")


def _prepare_backing_folder(settings: Settings) -> None:
    """Make the folder of default backing files, which only root may look into; any other folder must exist."""
    if settings.backing is None:
        return
    folder = Path(settings.backing).parent
    if str(folder) == BACKING_FOLDER:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not folder.is_dir():
        if missing := disks.missing_mount(settings.backing):
            raise CommandError(f"the backing {shown_path(settings.backing)} is refused: {missing}; mount it first")
        raise CommandError(f"the folder {shown_path(str(folder))} for the backing file does not exist: create it first")


def _print_hidden(mountpoint: str) -> None:
    """Print a note if the mount hides files of the directory. mount(8) allows that, but it is seldom intended."""
    with contextlib.suppress(OSError), os.scandir(mountpoint) as entries:
        if next(entries, None) is not None:
            print(
                f"zbudfs: {shown_path(mountpoint)} is not empty: the mount hides its files until the umount",
                file=sys.stderr,
            )


def print_notes(plan: Plan, ready: launch.Ready) -> None:
    """Print how many protections the system refused and, on a machine with little RAM, how much of it zbudfs takes."""
    if nr := len(ready.warnings):
        shown = shown_path(plan.parts[0].mountpoint)
        print(
            f"zbudfs: the system refused {nr} of the daemon's protections: run zbudfs status {shown} for details",
            file=sys.stderr,
        )
    if (text := footprint_text.note(plan.parts, plan.ram_bytes)) is not None:
        print(f"zbudfs: {text}", file=sys.stderr)
