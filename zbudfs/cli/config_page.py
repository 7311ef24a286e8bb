# SPDX-License-Identifier: MIT
"""What `zbudfs config` prints: the effective configuration as TOML whose comments say where each value comes from.

The page is itself a configuration that comes to the same settings on any machine: every key has its final value.
"""

from __future__ import annotations

import json

from zbudfs.cli.config import Config
from zbudfs.cli.keys import KEYS, Value
from zbudfs.core.sizes import format_size


def effective(config: Config) -> dict[str, Value]:
    """Return the value of every key, as the daemon and the swap unit use it."""
    settings = config.settings
    known: dict[str, Value] = {
        "mountpoint": settings.mountpoint,
        "size": settings.size_bytes,
        "pool": settings.pool_bytes,
        "backing": settings.backing or "none",
        "instances": config.arguments.instances or 1,
        "swap": config.swap,
    }
    for key in KEYS:
        if key.name not in known:
            own = getattr(settings, key.field, None)
            known[key.name] = getattr(config.arguments, key.field, None) if own is None else own
    return {key.name: known[key.name] for key in KEYS}


def as_toml(config: Config) -> str:
    """Return the page."""
    lines = []
    for name, value in effective(config).items():
        found = config.found.get(name)
        origin = "default" if found is None else found.source
        if found is not None and found.written != value:
            origin = f"{origin}: {json.dumps(found.written)}"
        if name in ("size", "pool"):
            origin = f"{format_size(int(value or 0))}; {origin}"
        lines.append(
            (f"{name} = {_literal(value)}" if value is not None else f"# {name} is left to the kernel", origin)
        )
    width = max(len(left) for left, _ in lines)
    return "\n".join([f"# {config.name}", *(f"{left:{width}}  # {origin}" for left, origin in lines)])


def as_object(config: Config) -> dict[str, object]:
    """Return the same for programs; the source of a default is null."""
    values = {}
    for name, value in effective(config).items():
        found = config.found.get(name)
        values[name] = {
            "value": value,
            "source": found.source if found else None,
            "written": found.written if found else None,
        }
    return {"name": config.name, "files": config.files, "values": values, "warnings": config.warnings}


def _literal(value: Value) -> str:
    """Return a value as TOML, of which JSON's strings, whole numbers and truth values are a part."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")
