# SPDX-License-Identifier: MIT
"""The entry points of the commands. They make Ctrl-C safe while the modules of a command are imported.

The imports take a tenth of a second, and Ctrl-C may come at any moment:

    Python starts | this module | imports, command line | the command                  | Python ends
                                  Ctrl-C ends the         Ctrl-C is KeyboardInterrupt    Ctrl-C ends the
                                  process at once         and undoes the begun steps     process at once

Before this module runs, for some hundredths of a second, Python itself handles Ctrl-C and prints a traceback. So this module
imports nothing of zbudfs at its head. If Ctrl-C is ignored, as a shell does for background jobs, it stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Final

INTERRUPTED: Final = 130
"""Exit status after a Ctrl-C that came just before the command could report it, or just after the command."""

CANNOT_START: Final = 127
"""Exit status if a part of the program cannot be imported. systemd does not start the service again after it."""


def main() -> int:
    """Run the command `zbudfs`, and return the exit status."""

    def load() -> Callable[[], int]:
        from zbudfs.cli.main import prepared

        return prepared()

    return _run(load)


def mount_main() -> int:
    """Run `mount.fuse.zbudfs`, and return the exit status."""

    def load() -> Callable[[], int]:
        from zbudfs.cli.mount_helper import mount_main

        return mount_main

    return _run(load)


def umount_main() -> int:
    """Run `umount.fuse.zbudfs`, and return the exit status."""

    def load() -> Callable[[], int]:
        from zbudfs.cli.mount_helper import umount_main

        return umount_main

    return _run(load)


def _run(load: Callable[[], Callable[[], int]]) -> int:
    """Run a command, and return its exit status. If an import fails, print one line that says how to install again."""
    try:
        return _loaded(load)
    except ImportError as error:
        import os
        import sys

        from zbudfs.cli.installation import Installation

        print(f"zbudfs: cannot start: {error}; install zbudfs again: {Installation().command_again()}", file=sys.stderr)
        held = os.environ.get("LISTEN_FDS", "0") not in ("", "0")  # systemd restarts a service whose mount holds pages
        return 1 if held else CANNOT_START


def _loaded(load: Callable[[], Callable[[], int]]) -> int:
    """Import a command, run it, and return its exit status."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        return load()()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    run = load()
    try:
        signal.signal(signal.SIGINT, handler)
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
