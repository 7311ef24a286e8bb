# SPDX-License-Identifier: MIT
"""From files to one daemon's settings, with the source of every value.

    /etc/zbudfs/NAME.toml           what is said for NAME; may be empty: every key has a default
    /etc/zbudfs/NAME.toml.d/*.toml  drop-ins, in the order of their names; the last to say something about a key wins

A key that nobody knows is passed over with a warning, so that a file may be older or newer than the program. A value
that cannot work is an error that names the file, the key, the value, and what would be right; all errors of a
configuration are told at once. What a value means, and its limits, are those of the command line (`keys`,
`commands.make_settings`): each value is tried alone with defaults for all others, which is how it is known whose fault
an error is, and then all of them together.

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

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.keys import BY_NAME, Value
from zbudfs.cli.suggest import did_you_mean
from zbudfs.cli.target import resolve
from zbudfs.service.mountpoint import find_mount, shown_path
from zbudfs.service.settings import Settings, SettingsError, ram_bytes

FOLDER: Final = "/etc/zbudfs"

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
"""What a name is made of: nothing that a unit's name or a path would need to escape."""

_MARKS: Final = (
    (b"\xef\xbb\xbf", "UTF-8"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_NEWLINE: Final = "\n"
_PLACE: Final = re.compile(r"(.*) \(at line (\d+), column (\d+)\)", re.DOTALL)
"""How tomllib ends its errors."""
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')\s*=")
_QUOTES: Final = "\"'"

_LONGEST_SHOWN_NR: Final = 80


class ConfigError(Exception):
    """A configuration that cannot be used."""

    def __init__(self, problems: Iterable[str]) -> None:
        """Take one sentence for each thing that is wrong."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Found:
    """One value, as a file says it."""

    value: Value
    """What it comes to: what the command's option of this name would give."""
    written: object
    """What the file says."""
    source: str
    """Path of the file, as seen from inside `root`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that is configured under one name, with the defaults filled in."""

    name: str
    arguments: Arguments
    """As if all of it had been typed to `zbudfs swapon`."""
    settings: Settings
    """What a daemon is told."""
    swap: bool
    """Whether it is wanted as active swap."""
    found: Mapping[str, Found]
    """What the files say, by key; a key that is not there has its default."""
    files: tuple[str, ...]
    """What was read, in that order."""
    warnings: tuple[str, ...]
    """One sentence for each thing that was passed over."""


def names(root: str = "/") -> list[str]:
    """Return the names that something is configured for, in order."""
    folder = _inside(root, FOLDER)
    stems = {path.name.removesuffix(".toml") for path in folder.glob("*.toml")}
    stems |= {path.parent.name.removesuffix(".toml.d") for path in folder.glob("*.toml.d/*.toml")}
    return sorted(name for name in stems if _NAME.fullmatch(name))


def files_of(name: str, root: str = "/") -> list[str]:
    """Return the files that speak of `name`, in the order in which they are read, as paths inside `root`.

    Raises ConfigError if there are none, or for what cannot be a name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError([f"{name!r} is not a name: write up to 64 letters, digits and any of _ . - after the first"])
    first = f"{FOLDER}/{name}.toml"
    drop_ins = sorted(path.name for path in _inside(root, f"{first}.d").glob("*.toml"))
    found = [f"{first}.d/{each}" for each in drop_ins]
    if os.path.lexists(_inside(root, first)):
        found.insert(0, first)
    if not found:
        known = ", ".join(names(root))
        raise ConfigError(
            [f"{first} does not exist (an empty file means all defaults)" + (f"; there is {known}" if known else "")]
        )
    return found


def load(name: str, root: str = "/") -> Config:
    """Return what is configured for `name`. Raises ConfigError with everything that is wrong with it."""
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
                settings_of({key: value}, default_mountpoint(name), root)
            except ValueError as error:  # a SettingsError as well
                said = "" if str(error).startswith(_shown(written)) else f" = {_shown(written)}"
                problems.append(f"{file}: {key}{said}: {error}")
            else:
                found[key] = Found(value, written, file)
    if problems:
        raise ConfigError(problems)
    try:
        values = {key: each.value for key, each in found.items()}
        arguments, settings = settings_of(values, default_mountpoint(name), root)
    except SettingsError as error:
        raise ConfigError([f"{', '.join(files)}: {error}"]) from None
    swap = found["swap"].value if "swap" in found else True
    return Config(
        name=name,
        arguments=arguments,
        settings=settings,
        swap=bool(swap),
        found=found,
        files=tuple(files),
        warnings=tuple(warnings),
    )


def conflicts(configs: Iterable[Config]) -> list[str]:
    """Return a sentence for each two configurations that cannot both be used."""
    taken: dict[tuple[str, str], str] = {}
    sentences = []
    for config in configs:
        for what in ("mountpoint", "backing"):
            path = getattr(config.settings, what)
            other = taken.setdefault((what, path), config.name) if path is not None else config.name
            if other != config.name:
                sentences.append(
                    f"{other} and {config.name} have the same {what}, {shown_path(path)}: change one of them"
                )
    return sentences


def default_mountpoint(name: str) -> str:
    """Return where `name` is mounted if its files do not say.

    Under /run: that can be written at any time, even while the root file system is read-only; it is empty after a
    reboot; and it is the last to go at power-off, after swap. Not inside /run/zbudfs, where pool directories are.
    """
    return f"/run/zbudfs.{name}"


def is_configured(name: str, root: str = "/") -> bool:
    """Whether there is a file for `name`; anything may be asked for."""
    return _NAME.fullmatch(name) is not None and name in names(root)


def make_mountpoint(config: Config) -> None:
    """Make the directory to mount on, and those above it, if they are missing. Raises OSError."""
    mountpoint = config.settings.mountpoint
    if find_mount(mountpoint) is None:  # a dead mount would answer every look at it with an error
        Path(mountpoint).mkdir(mode=0o755, parents=True, exist_ok=True)


def settings_of(values: Mapping[str, Value], mountpoint: str, root: str = "/") -> tuple[Arguments, Settings]:
    """Return what a command line with these values would give; `mountpoint` if there is none among them.

    Raises SettingsError.
    """
    from zbudfs.cli.commands import make_parts, make_settings
    from zbudfs.cli.options import build_parser  # here: it knows the commands, and those know this module

    mountpoint = str(values.get("mountpoint", mountpoint))
    arguments = build_parser().parse_args(["swapon", "--", mountpoint], Arguments())
    for key, value in values.items():
        setattr(arguments, BY_NAME[key].field, value)
    arguments.mountpoint = resolve(mountpoint)
    make_parts(arguments, arguments.mountpoint, root)  # raises where an instance's part would be too small
    return arguments, make_settings(arguments, arguments.mountpoint, root)


def _read(path: Path) -> dict[str, object]:
    if os.path.realpath(path) == os.devnull:
        return {}  # how an administrator takes out a file that a package has brought
    if not path.is_file():
        raise ValueError("it is not a file")
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
        raise ValueError("it is not for zbudfs: its lists or tables are nested too deeply") from None
    except ValueError as error:
        raise ValueError(_toml_error(str(error), text)) from None


def _toml_error(error: str, text: str) -> str:
    """Return what is wrong with a text, with the line first, from the parser's words."""
    match = _PLACE.fullmatch(error)
    if match is None:
        return f"line {text.count(_NEWLINE) + 1}: it is not TOML: {error.replace('document', 'the file')}"
    said, number = match[1], int(match[2])
    lines = text.split(_NEWLINE)
    key = _KEY.match(lines[number - 1]) if number <= len(lines) else None
    if said == "Cannot overwrite a value" and key is not None:
        before = [at for at, line in enumerate(lines[: number - 1], 1) if (m := _KEY.match(line)) and m[1] == key[1]]
        where = f"in line {before[-1]} already" if before else "above already"
        return f"line {number}: it is not TOML: the key {_shown(key[1].strip(_QUOTES))} is {where}; leave one of the two out"
    return f"line {number}: it is not TOML: {said} (column {match[3]})"


def _inside(root: str, path: str) -> Path:
    return Path(root, path.lstrip("/"))


def _unknown(key: str) -> str:
    return f"the key {_shown(key)} is unknown and passed over: {did_you_mean(key.replace('-', '_'), BY_NAME)}"


def _shown(written: object) -> str:
    text = {True: "true", False: "false"}.get(written, "") if isinstance(written, bool) else ""
    text = text or ascii(written)
    return text if len(text) <= _LONGEST_SHOWN_NR else f"{text[:_LONGEST_SHOWN_NR]}..."
