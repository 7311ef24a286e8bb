# SPDX-License-Identifier: MIT
"""Functions that run programs with a time limit, and constants that all users of the kit share."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30
LIMIT_SECONDS: Final = 120.0
"""Longest time for a step that usually takes a moment. Arbitrary."""

PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
"""Search path of programs, with the folders of root's programs."""


class KitError(Exception):
    """A test or a measurement lacks something that it needs. The text is one sentence for the user."""


def run(command: Sequence[str | Path], *, limit_seconds: float = LIMIT_SECONDS, **options: Any) -> str:
    """Run a program, and return its output. Raises KitError with the program's own message."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_seconds,
            env={**os.environ, "PATH": PATH, "LC_ALL": "C"},
            **options,
        )
    except FileNotFoundError:
        raise KitError(f"the program {words[0]} is missing") from None
    except subprocess.TimeoutExpired:
        raise KitError(f"{shlex.join(words[:4])} ... did not end within {limit_seconds:g} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise KitError(f"{shlex.join(words[:4])} ... failed ({done.returncode}): {said[-1] if said else 'no message'}")
    return str(done.stdout)


def run_tool(*command: str | Path) -> str:
    """Run a program, and return its output without white space at both ends. Raises KitError."""
    return run(command).strip()


def find_program(name: str) -> str | None:
    """Return the path of a program, also of one for root; None if it is missing."""
    return shutil.which(name, path=PATH)
