# SPDX-License-Identifier: MIT
"""The command `zbudfs`: it parses the words, runs the command, and turns an error into one line and an exit status.

    0    success
    1    the command failed: one line "zbudfs: ..." on stderr says why
    2    usage error, such as an unknown option, or a malformed size or name: one line as well
    130  Ctrl-C

An error of the user or of the system never prints a traceback: a traceback is a bug. `parser` names the function of each
command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from zbudfs.cli.argument_parser import one_line
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import ConfigError, ConfigNameError
from zbudfs.cli.parser import build_parser
from zbudfs.cli.stdio import OutputError, checked_output
from zbudfs.core.errors import Failed
from zbudfs.service.mountpoint import shown_path
from zbudfs.service.settings import SettingsError

FAILURE: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process) and return its exit status."""
    return prepared(argv)()


def prepared(argv: Sequence[str] | None = None) -> Callable[[], int]:
    """Parse the command line, import the code of its command, and return the function that runs the command.

    If the command line is wrong, or asks for help, the function only returns the exit status.
    """
    parsed: list[Arguments] = []

    def parse() -> int:
        parsed.append(build_parser().parse_args(argv, Arguments()))
        return 0

    status = guarded(parse)
    if not parsed:
        return lambda: status
    run = parsed[0].run.function()
    return lambda: guarded(lambda: run(parsed[0]))


def guarded(run: Callable[[], int]) -> int:
    """Call `run` and return its exit status, or print its error in one line and return the status of that error."""
    try:
        with checked_output():
            return _reported(run)
    except BrokenPipeError:
        return FAILURE  # the reader of the output closed it on purpose, so no message is printed
    except OutputError as error:
        return _fail(error, FAILURE)


def _reported(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as end:  # argparse: 0 after --help and --version, 2 after an error that it has printed
        return end.code if isinstance(end.code, int) else USAGE
    except ConfigNameError as error:
        return _fail(error, USAGE)
    except ConfigError as error:
        return max(_fail(problem, FAILURE) for problem in error.problems)
    except SettingsError as error:
        return _fail(error, USAGE)
    except Failed as error:
        return _fail(error, FAILURE)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except (BrokenPipeError, OutputError):
        raise
    except OSError as error:
        return _fail(_sentence(error), FAILURE)


def _sentence(error: OSError) -> str:
    """Return the message of a system error: the file, if the error names one, and the text of the errno."""
    path = error.filename2 if error.filename2 is not None else error.filename
    if error.strerror is None or not isinstance(path, str | bytes):
        return str(error)
    return f"{shown_path(os.fsdecode(path))}: {error.strerror}"


def _fail(why: object, status: int) -> int:
    with suppress(OSError):
        print(f"zbudfs: {one_line(str(why))}", file=sys.stderr)
    return status
