# SPDX-License-Identifier: MIT
"""The settings of a daemon: a few values, checked once, passed as JSON.

The command line makes a `Settings`, and a service manager may do so too. The daemon reads no other input, no environment and no
file. A value that cannot work is refused here, before anything is mounted. The `SettingsError` names the field, the value, and
a right one. A `Settings` that exists is valid: `__post_init__` runs every check.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Final

from zbudfs.core.packing import ZBUD, Packing
from zbudfs.core.sizes import format_size, parse_size_or_percent
from zbudfs.service.mountpoint import SOURCE, escape_path
from zbudfs.store.files import below, read_text

PAGE_BYTES: Final = 4096
MIN_SIZE_BYTES: Final = 1 << 20
MAX_SIZE_BYTES: Final = (1 << 44) - PAGE_BYTES
"""16 TiB less a page: page numbers have 32 bits, and one of them means "none"."""
MIN_POOL_BYTES: Final = 1 << 20
"""256 frames. Fewer cannot hold the requests in work and a batch of writeback beside them."""
MIN_LEVEL: Final = -7
MAX_LEVEL: Final = 19

DEFAULT_LEVEL: Final = -1
"""Measured: 8 us and 1025 bytes for a real page; level 1 takes 11 us for 941 bytes, and both pack 1.93 to a frame."""
DEFAULT_POOL: Final = "25%"
"""Share of RAM. Guessed, not measured: large enough to help, while programs keep the rest."""
DEFAULT_PACKING: Final = str(ZBUD)
BACKING_FOLDER: Final = "/var/lib/zbudfs"

_NAME_MAX: Final = 255
"""Longest file name on Linux file systems, in bytes."""


class SettingsError(ValueError):
    """A value cannot work. The text names the field, the value and a right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one daemon. Raises SettingsError for a value that cannot work."""

    mountpoint: str
    """Directory to mount on: absolute, symbolic links resolved."""
    size_bytes: int
    """Size of `swapfile`: whole pages, 1 MiB up to 16 TiB less a page."""
    pool_bytes: int
    """Most RAM that frames may take: 1 MiB or more. A part of a frame at the end is not used."""
    backing: str | None
    """Absolute path of the backing file; None: there is no writeback."""
    level: int = DEFAULT_LEVEL
    """zstd compression level: -7 (fast) to 19 (small), not 0."""
    encrypt: bool = True
    """Whether blocks are encrypted in the backing file."""
    force_backing: bool = False
    """Whether to use a backing that other users could change, that has foreign data, or that another program serves."""
    source: str = SOURCE
    """The device name in mount tables. `mount -a` compares it to see that a line of fstab is mounted already."""
    packing: str = DEFAULT_PACKING
    """The packing of zpages into frames, by its name: see core/packing.py."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ not in str(field.type).replace("None", "NoneType").split(" | "):
                kind = "a path or none" if field.name == "backing" else f"of type {field.type}"
                raise SettingsError(f"{field.name} is {value!r}: it must be {kind}")
        _check_path("mountpoint", self.mountpoint)
        _check_size(self.size_bytes)
        _check_pool(self.pool_bytes)
        if self.backing is not None:
            _check_path("backing", self.backing)
            if f"{self.backing}/".startswith(f"{self.mountpoint.rstrip('/')}/") and self.mountpoint != "/":
                raise SettingsError(f"backing {self.backing!r} lies on the mountpoint: it must be somewhere else")
        _check_level(self.level)
        if not self.source or "\0" in self.source or len(self.source) > _NAME_MAX:
            raise SettingsError(f"source {self.source!r} is refused: it must be a name of 1 to {_NAME_MAX} characters")
        try:
            Packing.parse(self.packing)
        except ValueError as error:
            raise SettingsError(f"packing: {error}") from None

    def to_json(self) -> str:
        """Return the settings as one line of JSON, in ASCII; paths that are not UTF-8 survive."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Settings:
        """Return the settings in `text`. Raises SettingsError unless `to_json` could have written it."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"settings are not JSON: {error}") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict):
            raise SettingsError(f"settings must be a JSON object with {', '.join(sorted(known))}")
        if unknown := found.keys() - known:
            raise SettingsError(f"unknown settings: {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
        if missing := {field.name for field in fields(cls) if field.default is MISSING} - found.keys():
            raise SettingsError(f"missing settings: {', '.join(sorted(missing))}")
        return cls(**found)


def ram_bytes(root: str = "/") -> int:
    """Return the RAM of this machine, in bytes (MemTotal). `root` holds `proc/`; raises OSError, ValueError."""
    for line in read_text("proc/meminfo", root).splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    raise ValueError(f"no MemTotal in {below(root, 'proc/meminfo')}")


def default_size_bytes(ram: int) -> int:
    """Return the default size for a machine with `ram` bytes: as large as RAM, in whole pages."""
    return min(max(ram // PAGE_BYTES * PAGE_BYTES, MIN_SIZE_BYTES), MAX_SIZE_BYTES)


def default_pool_bytes(ram: int) -> int:
    """Return the default pool limit for a machine with `ram` bytes: a quarter, in whole frames."""
    return max(parse_size_or_percent(DEFAULT_POOL, ram) // PAGE_BYTES * PAGE_BYTES, MIN_POOL_BYTES)


def default_backing(mountpoint: str) -> str:
    """Return the path of the backing file that belongs to `mountpoint`.

    The file name is the escaped mountpoint, so that two mounts never use the same file. If it is too long for a file name,
    it is cut, and a digest of the whole keeps it unique.
    """
    name = f"{escape_path(mountpoint)}.backing"
    if len(name) > _NAME_MAX:
        import hashlib  # imported here, since the daemon imports this module and does not use it

        digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]
        name = f"{name[: _NAME_MAX - 48]}-{digest}.backing"
    return f"{BACKING_FOLDER}/{name}"


def _check_path(field: str, path: str) -> None:
    if not path.startswith("/"):
        raise SettingsError(f"{field} {path!r} is not an absolute path: it must start with /")
    if "\0" in path:
        raise SettingsError(f"{field} {path!r} has a zero byte, which no path can have")


def _check_size(size_bytes: int) -> None:
    if size_bytes < MIN_SIZE_BYTES:
        raise SettingsError(f"size of {size_bytes} bytes is too small: it must be 1M or more")
    if size_bytes > MAX_SIZE_BYTES:
        raise SettingsError(
            f"size of {format_size(size_bytes)} ({size_bytes} bytes) is too large: the most is {MAX_SIZE_BYTES}"
            " bytes, 16T less one page, since page numbers have 32 bits"
        )
    below = size_bytes // PAGE_BYTES * PAGE_BYTES
    if below != size_bytes:
        raise SettingsError(
            f"size of {size_bytes} bytes is not a multiple of {PAGE_BYTES}: the nearest are {below} and"
            f" {below + PAGE_BYTES}"
        )


def _check_pool(pool_bytes: int) -> None:
    if pool_bytes < MIN_POOL_BYTES:
        raise SettingsError(
            f"pool of {format_size(pool_bytes)} ({pool_bytes} bytes) is too small: it must be 1M or more"
        )


def _check_level(level: int) -> None:
    if level == 0:
        raise SettingsError(
            f'level 0 is refused: zstd takes it for "the default", which is level 3; write another level from {MIN_LEVEL} to'
            f" {MAX_LEVEL} (-1 is the default here)"
        )
    if not MIN_LEVEL <= level <= MAX_LEVEL:
        raise SettingsError(f"level {level} does not exist: write one from {MIN_LEVEL} (fast) to {MAX_LEVEL} (small)")


_CHECKS: Final[Mapping[str, Callable[[int], None]]] = {"size": _check_size, "pool": _check_pool, "level": _check_level}


def check_number(option: str, number: int) -> None:
    """Raise SettingsError if the number of an option is wrong with any values of the others."""
    if (check := _CHECKS.get(option)) is not None:
        check(number)
