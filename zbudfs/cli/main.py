# SPDX-License-Identifier: MIT
"""The command `zbudfs`: from words to one call, and from errors to one line and an exit status.

    0    done
    1    it could not be done: one line "zbudfs: ..." on stderr says why
    2    it was asked for wrongly (an unknown option, a size that is none): one line as well
    130  Ctrl-C

A user's or a system's error never shows a traceback; a traceback is a bug. What the commands do is in `commands`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.config import ConfigError
from zbudfs.cli.options import build_parser, one_line
from zbudfs.cli.stdio import OutputError, checked_output
from zbudfs.cli.target import CommandError
from zbudfs.service.launch import LaunchError
from zbudfs.service.mountpoint import MountError, shown_path
from zbudfs.service.pooldir import PoolDirectoryError
from zbudfs.service.settings import SettingsError
from zbudfs.swap.loop import SwapError

FAILURE: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process) and return its exit status."""

    def run() -> int:
        arguments = build_parser().parse_args(argv, Arguments())
        return arguments.run(arguments)

    return guarded(run)


def guarded(run: Callable[[], int]) -> int:
    """Do something and return its exit status, or tell its error in one line and return the status for that."""
    try:
        with checked_output():
            return _told(run)
    except BrokenPipeError:
        return FAILURE  # the reader of the output has gone, and knows it
    except OutputError as error:
        return _fail(error, FAILURE)


def _told(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as end:  # argparse: 0 after --help and --version, 2 after an error that it has told
        return end.code if isinstance(end.code, int) else USAGE
    except ConfigError as error:
        return max(_fail(problem, FAILURE) for problem in error.problems)
    except SettingsError as error:
        return _fail(error, USAGE)
    except (CommandError, LaunchError, MountError, PoolDirectoryError, SwapError) as error:
        return _fail(error, FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except (BrokenPipeError, OutputError):
        raise
    except OSError as error:
        return _fail(_sentence(error), FAILURE)


def _sentence(error: OSError) -> str:
    """Return what failed: the file, if the error names one, and the system's words."""
    path = error.filename2 if error.filename2 is not None else error.filename
    if error.strerror is None or not isinstance(path, str | bytes):
        return str(error)
    return f"{shown_path(os.fsdecode(path))}: {error.strerror}"


def _fail(why: object, status: int) -> int:
    with suppress(OSError):
        print(f"zbudfs: {one_line(str(why))}", file=sys.stderr)
    return status
