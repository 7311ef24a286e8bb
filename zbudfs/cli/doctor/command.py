# SPDX-License-Identifier: MIT
"""The command `zbudfs doctor`: the choice of the machine to check, and the exit status."""

from __future__ import annotations

import shutil
import sys

from zbudfs.cli import config
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.doctor.examine import as_json, as_page, count, examine
from zbudfs.cli.doctor.finding import Level, Machine, warning
from zbudfs.cli.option_table import BY_NAME, typed
from zbudfs.cli.plan import make_plan


def doctor(arguments: Arguments) -> int:
    """Print whether this machine is ready for zbudfs. Return 1 if there is a problem."""
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
    """Return the machine to check, for a configuration, a backing file or the defaults. Raises ConfigError, SettingsError."""
    if arguments.name is not None:
        plan = config.load(arguments.name, arguments.root).plan
        return Machine(
            root=arguments.root, settings=plan.settings, parts=plan.parts, priority=plan.priority, swap=plan.swap
        )
    values = {} if arguments.backing is None else {"backing": typed(BY_NAME["backing"], arguments.backing, 0)}
    return Machine(
        root=arguments.root,
        settings=make_plan(values, config.default_mountpoint("swap"), root=arguments.root).settings,
    )
