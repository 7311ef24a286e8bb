# SPDX-License-Identifier: MIT
"""What a check is told, and what it says."""

from __future__ import annotations

import enum
import os
import resource
from dataclasses import dataclass, field
from pathlib import Path

from zbudfs.service.footprint import Footprint
from zbudfs.service.settings import Settings, ram_bytes


class Level(enum.StrEnum):
    """How it stands."""

    OK = "ok"
    WARNING = "warning"
    """It works, but less well, or less safely, than it could."""
    PROBLEM = "problem"
    """It does not work, or may hang the machine or lose what is swapped out."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    check: str
    """What was looked at, in a few words."""
    text: str
    """What was seen, and what follows from it."""
    remedy: str = ""
    """What to do; empty if it is ok."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is looked at."""

    root: str
    """The folder that holds proc/, sys/, dev/ and everything else."""
    settings: Settings
    """What would be mounted, or is."""
    parts: tuple[Settings, ...] = ()
    """The settings of each instance, if there are several."""
    priority: int | None = None
    """That of its swap; None: chosen by other swap (swap/priority.py)."""
    swap: bool = False
    """Whether a configuration wants it to be active swap."""
    page_bytes: int = field(default_factory=resource.getpagesize)
    """The kernel's page: 4096 bytes, or 16 or 64 KiB on some arm64, ppc64 and loong machines."""

    @property
    def footprint(self) -> Footprint:
        """What all instances take and save. OSError, ValueError."""
        return Footprint.of(self.parts or (self.settings,), ram_bytes(self.root))

    def path(self, name: str) -> Path:
        """Return where the absolute path `name` is."""
        return Path(self.root, name.lstrip("/"))

    def read(self, name: str) -> str:
        """Return the text of a file, without white space around it, its lines ended by newlines only. Raises OSError."""
        return os.fsdecode(self.path(name).read_bytes()).strip()

    def first_line_with(self, name: str, start: str) -> str:
        """Return what follows `start` in the line of a file that starts with it. Raises OSError; ValueError: none."""
        for line in self.read(name).split("\n"):
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise ValueError(f"no {start} in {name}")


def ok(check: str, text: str) -> Finding:
    """Say that all is well."""
    return Finding(Level.OK, check, text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Say that it could be better."""
    return Finding(Level.WARNING, check, text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    """Say that it is not fit for use."""
    return Finding(Level.PROBLEM, check, text, remedy)
