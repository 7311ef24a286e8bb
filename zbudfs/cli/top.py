# SPDX-License-Identifier: MIT
"""`zbudfs top`: which mounts to show, and whether there is what it needs. The screen itself is in `top_screen`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.stdio import shows_unicode
from zbudfs.cli.target import CommandError, find_mounted, resolve
from zbudfs.service.mountpoint import zbudfs_mounts

PICTURE_SIZE: Final = (100, 34)
"""Columns and lines of a picture."""


def top(arguments: Arguments) -> int:
    """Show a live view until the user quits; with --picture, draw one and end."""
    try:
        from zbudfs.cli.top_screen import Top
    except ImportError as error:
        if error.name is not None and error.name.startswith("zbudfs"):
            raise
        raise CommandError("top needs textual: pip install 'zbudfs[top]'") from None
    mountpoint = (
        None if arguments.one_mountpoint is None else find_mounted(resolve(arguments.one_mountpoint)).mountpoint
    )
    picture = arguments.picture
    if picture is not None:
        if mountpoint is None and not zbudfs_mounts():
            raise CommandError("no zbudfs is mounted: there is nothing to draw")
        if not Path(picture).absolute().parent.is_dir():
            raise CommandError(f"the folder {str(Path(picture).parent)!r} for the picture does not exist")
        app = Top(mountpoint, arguments.look_seconds)
        app.draw_to(picture, arguments.picture_seconds)
        app.run(headless=True, size=PICTURE_SIZE)
    else:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise CommandError("top needs a terminal; zbudfs status --json is for programs")
        if os.environ.get("TERM", "dumb") == "dumb":
            raise CommandError("top needs a terminal that can move the cursor: TERM is not set, or dumb")
        app = Top(mountpoint, arguments.look_seconds, unicode=shows_unicode())
        app.run()
    return app.return_code or 0
