# SPDX-License-Identifier: MIT
"""Configuration files: they become the settings of a daemon, and each value keeps its source.

    /etc/zbudfs/NAME.toml           the configuration NAME; it may be empty, since every key has a default
    /etc/zbudfs/NAME.toml.d/*.toml  drop-ins, in the order of their names; the last file that sets a key wins

An unknown key is ignored with a warning, so that a file may be older or newer than the program. A wrong value is an error
that names the file, the key, the value, and a right value. All errors of a configuration are reported together. Each value
is first checked alone, with defaults for all others, so that the error names the value at fault. Then all values are
checked together (`option_table`, `plan`).

Every reader takes `root`, the folder that holds `etc/` and `proc/`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zbudfs.cli.errors import ConfigError, ConfigNameError
from zbudfs.cli.option_table import BY_NAME, FOLDER, Value
from zbudfs.cli.plan import Plan, make_plan
from zbudfs.cli.suggest import did_you_mean, nearest
from zbudfs.cli.suited import reasons
from zbudfs.cli.target import resolve
from zbudfs.service.mountpoint import find_mount, shown_path
from zbudfs.service.settings import SettingsError, ram_bytes

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
"""Pattern of a configuration's name. Neither a unit name nor a path has to escape any of these characters."""

_MARKS: Final = (
    (b"\xef\xbb\xbf", "UTF-8"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_NEWLINE: Final = "\n"
_PLACE: Final = re.compile(r"(.*) \(at line (\d+), column (\d+)\)", re.DOTALL)
"""Pattern of an error of tomllib: the text, the line and the column."""
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')\s*=")
_QUOTES: Final = "\"'"

_LONGEST_SHOWN_NR: Final = 80


@dataclass(frozen=True, slots=True)
class Found:
    """One value that a file sets."""

    value: Value
    """The value of the option."""
    written: object
    """The value as the file has it."""
    source: str
    """Path of the file, as seen from inside `root`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The configuration of one name."""

    name: str
    plan: Plan
    """The values of the files, with defaults for the missing keys."""
    found: Mapping[str, Found]
    """The values in the files, by key; a key that is missing here has its default."""
    files: tuple[str, ...]
    """The files that were read, in the order of reading."""
    warnings: tuple[str, ...]
    """One sentence for each key that was ignored."""
    reasons: Mapping[str, str]
    """The reason of each default on this machine, by key."""


def names(root: str = "/") -> list[str]:
    """Return the names of all configurations, sorted."""
    folder = _inside(root, FOLDER)
    stems = {path.name.removesuffix(".toml") for path in folder.glob("*.toml")}
    stems |= {path.parent.name.removesuffix(".toml.d") for path in folder.glob("*.toml.d/*.toml")}
    return sorted(name for name in stems if _NAME.fullmatch(name))


def files_of(name: str, root: str = "/") -> list[str]:
    """Return the files of the configuration `name`, in the order of reading, as paths inside `root`.

    Raises ConfigError if there are none, and ConfigNameError if `name` is malformed.
    """
    if not _NAME.fullmatch(name):
        raise ConfigNameError(
            f"{name!r} is not a name: write up to 64 letters, digits and any of _ . - after the first"
        )
    first = f"{FOLDER}/{name}.toml"
    drop_ins = sorted(path.name for path in _inside(root, f"{first}.d").glob("*.toml"))
    found = [f"{first}.d/{each}" for each in drop_ins]
    if os.path.lexists(_inside(root, first)):
        found.insert(0, first)
    if not found:
        raise ConfigError([f"{first} does not exist: {_instead(name, names(root))}"])
    return found


def _instead(name: str, known: list[str]) -> str:
    """Return what to do about a name that has no file."""
    stem = name.removesuffix(".toml")
    if stem != name:
        return f"write the name without .toml: {stem}"
    if near := nearest(name, known):
        return f"did you mean {near}? Otherwise create it (an empty file means all defaults)"
    return "create it (an empty file means all defaults)" + (f", or use one of {', '.join(known)}" if known else "")


def load(name: str, root: str = "/") -> Config:
    """Return the configuration `name`. Raises ConfigError with all of its errors."""
    files = files_of(name, root)
    ram = ram_bytes(root)
    found: dict[str, Found] = {}
    problems: list[str] = []
    warnings: list[str] = []
    for file in files:
        try:
            table = _read(_inside(root, file))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{file}: {error.strerror if isinstance(error, OSError) else error}")
            continue
        for key, written in table.items():
            if key not in BY_NAME:
                warnings.append(f"{file}: {_unknown(key)}")
                continue
            try:
                value = BY_NAME[key].read(written, ram)
                _plan({key: value}, name, root)
            except ValueError as error:  # SettingsError is one
                said = "" if str(error).startswith(_shown(written)) else f" = {_shown(written)}"
                problems.append(f"{file}: {key}{said}: {error}")
            else:
                found[key] = Found(value, written, file)
    if problems:
        raise ConfigError(problems)
    try:
        plan = _plan({key: each.value for key, each in found.items()}, name, root)
    except SettingsError as error:
        raise ConfigError([f"{', '.join(files)}: {error}"]) from None
    why = reasons(plan.settings, ram, root)
    return Config(name=name, plan=plan, found=found, files=tuple(files), warnings=tuple(warnings), reasons=why)


def _plan(values: Mapping[str, Value], name: str, root: str) -> Plan:
    return make_plan(values, resolve(str(values.get("mountpoint", default_mountpoint(name)))), root=root)


def conflicts(configs: Iterable[Config]) -> list[str]:
    """Return a sentence for each pair of configurations that cannot be used together."""
    taken: dict[tuple[str, str], str] = {}
    sentences = []
    for config in configs:
        for what in ("mountpoint", "backing"):
            path = getattr(config.plan.settings, what)
            other = taken.setdefault((what, path), config.name) if path is not None else config.name
            if other != config.name:
                sentences.append(
                    f"{other} and {config.name} have the same {what}, {shown_path(path)}: change one of them"
                )
    return sentences


def default_mountpoint(name: str) -> str:
    """Return the mountpoint of the configuration `name` if its files set none.

    It is below /run, which is writable even while the root file system is read-only, and is empty after a reboot. At
    power-off, /run is unmounted last, after swap. The mountpoint is not inside /run/zbudfs, which has the pool directories.
    """
    return f"/run/zbudfs.{name}"


def is_configured(name: str, root: str = "/") -> bool:
    """Return whether `name`, which may be any text, has a configuration file."""
    return _NAME.fullmatch(name) is not None and name in names(root)


def make_mountpoint(config: Config) -> None:
    """Make the mountpoint and its parent directories, if they are missing. Raises OSError."""
    mountpoint = config.plan.mountpoint
    if find_mount(mountpoint) is None:  # on a dead mount, every access fails
        Path(mountpoint).mkdir(mode=0o755, parents=True, exist_ok=True)


def _read(path: Path) -> dict[str, object]:
    if os.path.realpath(path) == os.devnull:
        return {}  # an administrator masks a package's file with a link to /dev/null
    if not path.is_file():
        raise ValueError("it is not a regular file")
    content = path.read_bytes()
    for mark, name in _MARKS:
        if content.startswith(mark):
            raise ValueError(
                f"line 1: it is not TOML: it begins with the byte order mark of {name}; save it as UTF-8 without one"
            )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: it is not TOML: byte {error.start} is not UTF-8; save it as UTF-8") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its lists or tables are nested too deeply: no key of zbudfs has any") from None
    except ValueError as error:
        raise ValueError(_toml_error(str(error), text)) from None


def _toml_error(error: str, text: str) -> str:
    """Return the message for an error of tomllib: the line of `text` first, then what is wrong."""
    match = _PLACE.fullmatch(error)
    if match is None:
        return f"line {text.count(_NEWLINE) + 1}: it is not TOML: {error.replace('document', 'the file')}"
    said, number = match[1], int(match[2])
    lines = text.split(_NEWLINE)
    key = _KEY.match(lines[number - 1]) if number <= len(lines) else None
    if said == "Cannot overwrite a value" and key is not None:
        before = [at for at, line in enumerate(lines[: number - 1], 1) if (m := _KEY.match(line)) and m[1] == key[1]]
        where = f"in line {before[-1]}" if before else "above"
        shown = _shown(key[1].strip(_QUOTES))
        return f"line {number}: it is not TOML: the key {shown} is already set {where}; remove one of the two"
    return f"line {number}: it is not TOML: {said} (column {match[3]})"


def _inside(root: str, path: str) -> Path:
    return Path(root, path.lstrip("/"))


def _unknown(key: str) -> str:
    return f"the key {_shown(key)} is unknown, and is ignored: {did_you_mean(key.replace('-', '_'), BY_NAME)}"


def _shown(written: object) -> str:
    text = {True: "true", False: "false"}.get(written, "") if isinstance(written, bool) else ""
    text = text or ascii(written)
    return text if len(text) <= _LONGEST_SHOWN_NR else f"{text[:_LONGEST_SHOWN_NR]}..."
