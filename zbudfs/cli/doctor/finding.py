# SPDX-License-Identifier: MIT
"""The input of a check (`Machine`), and its output (`Finding`)."""

from __future__ import annotations

import enum
import os
import resource
from dataclasses import dataclass, field
from pathlib import Path

from zbudfs.service.footprint import Footprint
from zbudfs.service.settings import Settings, ram_bytes


class Level(enum.StrEnum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    """zbudfs works, but less well or less safely than it could."""
    PROBLEM = "problem"
    """zbudfs does not work, or may hang the machine or lose swapped pages."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    check: str
    """Name of the check, in a few words."""
    text: str
    """Result of the check, and its consequence."""
    remedy: str = ""
    """Advice to the user; empty if the level is OK."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that is checked, and the settings of the zbudfs for which it is checked."""

    root: str
    """Root folder of the machine, with proc/, sys/, dev/ and everything else."""
    settings: Settings
    """Settings of the present or future mount."""
    parts: tuple[Settings, ...] = ()
    """Settings of each instance, if there are several."""
    priority: int | None = None
    """Priority of the swap; None: chosen from the other swap (swap/priority.py)."""
    swap: bool = False
    """Whether the configuration wants active swap."""
    page_bytes: int = field(default_factory=resource.getpagesize)
    """Size of a page of the kernel: 4096 bytes, or 16 or 64 KiB on some arm64, ppc64 and loong machines."""

    @property
    def footprint(self) -> Footprint:
        """The memory that all instances take and save. Raises OSError, ValueError."""
        return Footprint.of(self.parts or (self.settings,), ram_bytes(self.root))

    def path(self, name: str) -> Path:
        """Return the absolute path `name` below the root folder."""
        return Path(self.root, name.lstrip("/"))

    def read(self, name: str) -> str:
        """Return the text of a file, without white space at both ends. Raises OSError."""
        return os.fsdecode(self.path(name).read_bytes()).strip()

    def first_line_with(self, name: str, start: str) -> str:
        """Return the rest of the first line that starts with `start`.

        Raises OSError if the file cannot be read, and ValueError if no line starts so.
        """
        for line in self.read(name).split("\n"):
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise ValueError(f"no {start} in {name}")


def ok(check: str, text: str) -> Finding:
    """Return a finding of the level OK."""
    return Finding(Level.OK, check, text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Return a finding of the level WARNING."""
    return Finding(Level.WARNING, check, text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    """Return a finding of the level PROBLEM."""
    return Finding(Level.PROBLEM, check, text, remedy)
