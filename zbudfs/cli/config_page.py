# SPDX-License-Identifier: MIT
"""The output of `zbudfs config`: the effective configuration as TOML, with the source of each value in a comment.

The output is itself a configuration, and means the same on every machine: every key has its final value.
"""

from __future__ import annotations

import json
import sys

from zbudfs.cli import option_table
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.config import Config, conflicts, load, names
from zbudfs.cli.errors import ConfigError, ConfigNameError
from zbudfs.cli.option_table import FOLDER, OPTIONS, Value
from zbudfs.cli.plan import Plan
from zbudfs.core.sizes import format_size


def effective(plan: Plan) -> dict[str, Value]:
    """Return the value of every option, as the daemon and the swap unit use it."""
    known: dict[str, Value] = {
        "size": plan.settings.size_bytes,
        "pool": plan.settings.pool_bytes,
        "backing": plan.settings.backing or "none",
        "instances": len(plan.parts),
        "swap": plan.swap,
        "priority": plan.priority,
        "discard": plan.discard,
    }
    return {
        option.name: known[option.name] if option.name in known else getattr(plan.settings, option.field)
        for option in OPTIONS
    }


def as_toml(config: Config) -> str:
    """Return the configuration as TOML, with comments."""
    lines = []
    for name, value in effective(config.plan).items():
        found = config.found.get(name)
        why = config.reasons.get(name)
        default = f"default: {why}" if why else "default"
        origin = default if found is None else found.source
        if found is not None and found.written != value:
            origin = f"{origin}: {json.dumps(found.written)}"
        if name in ("size", "pool"):
            origin = f"{format_size(int(value or 0))}; {origin}"
        left = f"{name} = {option_table.as_toml(value)}" if value is not None else f"# {name} is chosen by swapon"
        lines.append((left, origin))
    width = max(len(left) for left, _ in lines)
    return "\n".join([f"# {config.name}", *(f"{left:{width}}  # {origin}" for left, origin in lines)])


def as_object(config: Config) -> dict[str, object]:
    """Return the configuration as an object for JSON. A default value has the source None."""
    values = {}
    for name, value in effective(config.plan).items():
        found = config.found.get(name)
        values[name] = {
            "value": value,
            "source": found.source if found else None,
            "written": found.written if found else None,
            "reason": None if found else config.reasons.get(name) or None,
        }
    return {"name": config.name, "files": config.files, "values": values, "warnings": config.warnings}


def config(arguments: Arguments) -> int:
    """Print each value of a configuration and its source; with --check, print errors only. Return 1 if there is an error."""
    root = arguments.root
    wanted = names(root) if arguments.name is None else [arguments.name]
    loaded = []
    problems: list[str] = []
    for name in wanted:
        try:
            loaded.append(load(name, root))
        except ConfigNameError:
            raise
        except ConfigError as error:
            problems += error.problems
    problems += conflicts(loaded)
    for text in (*(text for each in loaded for text in each.warnings), *problems):
        print(f"zbudfs: {text}", file=sys.stderr)
    if arguments.check:
        print(f"configurations: {len(wanted)}, problems: {len(problems)}")
    elif arguments.json:
        objects = [as_object(each) for each in loaded]
        if arguments.name is None:
            print(json.dumps(objects, indent=2))
        elif objects:
            print(json.dumps(objects[0], indent=2))
    elif loaded:
        print("\n\n".join(as_toml(each) for each in loaded))
    elif not wanted:
        print(f"there is no configuration: {FOLDER} has no .toml file")
    return 1 if problems else 0
