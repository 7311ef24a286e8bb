# SPDX-License-Identifier: MIT
"""`zbudfs top`: the choice of the mount, and the checks for a terminal and libraries. The screen is in `top_screen`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError
from zbudfs.cli.installation import Installation
from zbudfs.cli.stdio import shows_unicode
from zbudfs.cli.target import find_mounted, resolve
from zbudfs.service.mountpoint import zbudfs_mounts
from zbudfs.service.settings import SettingsError

PICTURE_AFTER_SECONDS: Final = 10.0
"""Default time until a picture is drawn."""
PICTURE_SIZE: Final = (100, 34)
"""Columns and lines of a picture."""


def top(arguments: Arguments) -> int:
    """Show the live view until the user quits; with --picture, draw it and end."""
    try:
        from zbudfs.cli.top_screen import Top
    except ImportError as error:
        if error.name is not None and error.name.startswith("zbudfs"):
            raise
        raise CommandError(f"top needs textual: {Installation().command_for('top')}") from None
    mountpoint = (
        None if arguments.one_mountpoint is None else find_mounted(resolve(arguments.one_mountpoint)).mountpoint
    )
    picture = arguments.picture
    if picture is None and arguments.picture_seconds is not None:
        raise SettingsError("--after is for --picture FILE: write both, or neither")
    if picture is not None:
        if mountpoint is None and not zbudfs_mounts():
            raise CommandError("no zbudfs is mounted: there is nothing to draw")
        if not Path(picture).absolute().parent.is_dir():
            raise CommandError(f"the folder {str(Path(picture).parent)!r} for the picture does not exist")
        app = Top(mountpoint, arguments.look_seconds)
        app.draw_to(picture, PICTURE_AFTER_SECONDS if arguments.picture_seconds is None else arguments.picture_seconds)
        app.run(headless=True, size=PICTURE_SIZE)
    else:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise CommandError("top needs a terminal; zbudfs status --json is for programs")
        if os.environ.get("TERM", "dumb") == "dumb":
            raise CommandError("top needs a terminal that can move the cursor: TERM is not set, or dumb")
        app = Top(mountpoint, arguments.look_seconds, unicode=shows_unicode())
        app.run()
    return app.return_code or 0
