# SPDX-License-Identifier: MIT
"""Where the commands begin. What they are made of takes a tenth of a second and more to import, and Ctrl-C may come then.

    Python starts | this module | imports              | the command                  | Python ends
                                  Ctrl-C ends it, as     Ctrl-C is a KeyboardInterrupt  Ctrl-C ends it
                                  it ends any program    and undoes what was begun

Before this module, for some hundredths of a second, Python itself has the word, and a traceback of its own. Nothing but this
is imported before the first step is taken. Where Ctrl-C is ignored (a shell does that to what runs behind it) it stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Final

INTERRUPTED: Final = 130
"""Exit status after a Ctrl-C that came just before the command could tell of it, or just after."""

CANNOT_START: Final = 127
"""Exit status where a part of the program is missing. systemd does not try a service again after it."""


def main() -> int:
    """Be `zbudfs`; return the exit status."""

    def load() -> Callable[[], int]:
        from zbudfs.cli.main import main

        return main

    return _run(load)


def mount_main() -> int:
    """Be `mount.fuse.zbudfs`; return the exit status."""

    def load() -> Callable[[], int]:
        from zbudfs.cli.mount_helper import mount_main

        return mount_main

    return _run(load)


def umount_main() -> int:
    """Be `umount.fuse.zbudfs`; return the exit status."""

    def load() -> Callable[[], int]:
        from zbudfs.cli.mount_helper import umount_main

        return umount_main

    return _run(load)


def _run(load: Callable[[], Callable[[], int]]) -> int:
    """Run a command and return its exit status. One line where a part of the program cannot be imported."""
    try:
        return _loaded(load)
    except ImportError as error:
        import os
        import sys

        print(f"zbudfs: cannot start: {error}; install zbudfs again, for example with make install", file=sys.stderr)
        held = os.environ.get("LISTEN_FDS", "0") not in ("", "0")  # a service whose mount holds pages is tried again
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
