# SPDX-License-Identifier: MIT
"""The command `zbudfs doctor`: what to look at, and the exit status."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from typing import Any, Final

from zbudfs.cli import config, values
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.commands import make_parts
from zbudfs.cli.doctor.examine import as_json, as_page, count, examine
from zbudfs.cli.doctor.finding import Level, Machine, warning

_EPILOG: Final = """\
Each line is ok, a warning (it works, but less well or less safely than it could) or a problem (it does not work, or may
hang the machine, or lose what is swapped out), and says what to do. Exit status: 1 if there is a problem. Nothing is
changed: what has to be tried is tried in a process, or with a file, that is gone afterwards.

examples:
  zbudfs doctor                                 with the defaults
  zbudfs doctor swap                            with what is in /etc/zbudfs/swap.toml
  zbudfs doctor --backing /srv/zbudfs.backing   would that be a good place?
  zbudfs doctor --json
"""


def add_doctor(command: Callable[..., Any]) -> None:
    """Declare the command with `command(name, run, summary, epilog)`, which returns a parser."""
    sub = command(
        "doctor", doctor, "tell whether this machine is ready for zbudfs, and what to do if it is not", _EPILOG
    )
    sub.add_argument("--json", action="store_true", help="print one object")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--backing", metavar="FILE|none", help="look at this place for the backing file")
    what.add_argument("name", metavar="NAME", nargs="?", help="look at what is configured (default: the defaults)")
    sub.add_argument(
        "--root",
        type=values.folder,
        default="/",
        metavar="DIR",
        help="look at the system whose / is DIR (default: this one)",
    )


def doctor(arguments: Arguments) -> int:
    """Say whether this machine is ready for zbudfs; 1 if there is a problem."""
    machine, findings = machine_of(arguments), []
    if arguments.name is not None:
        findings = [
            warning("configuration", text, "correct the file")
            for text in config.load(arguments.name, arguments.root).warnings
        ]
    findings += examine(machine)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(as_json(findings, machine.footprint) if arguments.json else as_page(findings, columns))
    return 1 if count(findings, Level.PROBLEM) else 0


def machine_of(arguments: Arguments) -> Machine:
    """Return what is to be looked at: a configuration, a backing file, or the defaults. ConfigError, SettingsError."""
    if arguments.name is not None:
        found = config.load(arguments.name, arguments.root)
        parts = make_parts(found.arguments, found.settings.mountpoint, arguments.root)
        return Machine(
            root=arguments.root,
            settings=found.settings,
            parts=tuple(parts),
            priority=found.arguments.priority,
            swap=found.swap,
        )
    typed = {} if arguments.backing is None else {"backing": arguments.backing}
    _, settings = config.settings_of({**typed}, config.default_mountpoint("swap"), arguments.root)
    return Machine(root=arguments.root, settings=settings)
