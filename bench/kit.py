# SPDX-License-Identifier: MIT
"""Parts that all measurements share: the description of a measurement, a folder, statistics, and builds of C programs."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.table import Table
from kit.needs import why_not
from kit.programs import LIMIT_SECONDS, KitError, run

HERE: Final = Path(__file__).resolve().parent

Options = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One measurement: its name, its summary, and its functions."""

    name: str
    summary: str
    needs: tuple[str, ...]
    """Needs of the measurement (kit/needs.py)."""
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], list[Table]]

    def why_not(self) -> str | None:
        """Return why the measurement cannot run on this machine; None if it can."""
        reasons = [f"{need}: {reason}" for need in self.needs if (reason := why_not(need))]
        return "; ".join(reasons) or None


def progress(text: str) -> None:
    """Print the progress to stderr, since stdout has the tables."""
    print(f"  {text}", file=sys.stderr, flush=True)


def add_also(parser: argparse.ArgumentParser) -> None:
    """Add the option that names other versions of zbudfs to compare."""
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        type=_also,
        metavar="NAME=CMD",
        help="compare another version of zbudfs, by its command: old=/other/.venv/bin/zbudfs",
    )


def _also(typed: str) -> tuple[str, str]:
    """Return the name and the command of another version. argparse.ArgumentTypeError."""
    name, _, command = typed.partition("=")
    words = shlex.split(command)
    if not name or not words:
        raise argparse.ArgumentTypeError(f"{typed!r} has no name or no command: write old=/other/.venv/bin/zbudfs")
    if not shutil.which(words[0]):
        raise argparse.ArgumentTypeError(f"{words[0]} is not a program: write the path of the other version's zbudfs")
    return name, command


def zbudfs_command(typed: str | None = None) -> list[str]:
    """Return the command `zbudfs` of this version, or the typed command of another version."""
    return shlex.split(typed) if typed else [sys.executable, "-m", "zbudfs"]


@contextlib.contextmanager
def workplace(options: Options) -> Iterator[Path]:
    """Make a folder on the disk that is measured, for this context."""
    with tempfile.TemporaryDirectory(prefix="zbudfs-bench-", dir=options.dir) as folder:
        yield Path(folder).resolve()


def build(name: str, folder: Path) -> Path:
    """Build `name`.c of bench/ into `folder`, unless it is there, and return its path. Raises KitError."""
    program = folder / name
    if not program.exists():
        libraries: list[str] = []
        if name == "floor":
            libraries = [*shlex.split(run(["pkg-config", "--cflags", "--libs", "fuse3"])), "-lzstd"]
        run(["gcc", "-O2", "-Wall", "-o", program, HERE / f"{name}.c", *libraries])
    return program


def wait_until(condition: Callable[[], bool], what: str, limit_seconds: float = 30.0) -> None:
    """Wait until `condition` is true. Raises KitError after the limit."""
    end = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > end:
            raise KitError(f"waited {limit_seconds:g} s for {what}")
        time.sleep(0.02)


def stats(mountpoint: Path) -> dict[str, Any]:
    """Return stats/all.json of a mount. While workers die, it is read again until a worker answers. Raises KitError."""
    end = time.monotonic() + LIMIT_SECONDS
    while True:
        try:
            found: dict[str, Any] = json.loads((mountpoint / "stats/all.json").read_text())
            return found
        except (OSError, ValueError) as error:
            if time.monotonic() > end:
                raise KitError(f"{mountpoint} does not answer: {error}") from None
        time.sleep(0.01)


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield pairs (round, name): every name once in a round. Each round begins with the next name."""
    for number in range(rounds):
        at = number % len(names) if names else 0
        for name in [*names[at:], *names[:at]]:
            yield number, name
