# SPDX-License-Identifier: MIT
"""What all measurements share: options, a place to work in, programs run with a limit, and the C programs built."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.table import Table
from scripts.needs import why_not

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
PAGE: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30
LIMIT_SECONDS: Final = 120.0
"""Longest time for a step that takes a moment. Arbitrary."""

Options = argparse.Namespace


class BenchError(Exception):
    """A measurement cannot be made; the text is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One measurement: a name, what it tells, and the functions behind it."""

    name: str
    summary: str
    needs: tuple[str, ...]
    """What the machine must have (scripts/needs.py)."""
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], list[Table]]

    def why_not(self) -> str | None:
        """Why it cannot be made here; None if it can."""
        reasons = [f"{need}: {reason}" for need in self.needs if (reason := why_not(need))]
        return "; ".join(reasons) or None


def progress(text: str) -> None:
    """Tell on stderr what is being done: stdout has the tables."""
    print(f"  {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], *, limit_seconds: float = LIMIT_SECONDS, **options: Any) -> str:
    """Run a program and return what it prints. Raises BenchError with its own words."""
    words = [str(word) for word in command]
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_seconds,
            env={**os.environ, "PATH": path, "LC_ALL": "C"},
            **options,
        )
    except FileNotFoundError:
        raise BenchError(f"the program {words[0]} is missing") from None
    except subprocess.TimeoutExpired:
        raise BenchError(f"{shlex.join(words[:4])} ... did not end within {limit_seconds:g} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BenchError(f"{shlex.join(words[:4])} ... failed ({done.returncode}): {said[-1] if said else 'no words'}")
    return str(done.stdout)


def find_program(name: str) -> str | None:
    """Where a program is, those for root included."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def zbudfs_command(typed: str | None = None) -> list[str]:
    """The command `zbudfs`: this one, or what was typed for another."""
    return shlex.split(typed) if typed else [sys.executable, "-m", "zbudfs"]


@contextlib.contextmanager
def workplace(options: Options) -> Iterator[Path]:
    """A folder on a disk for as long as a measurement takes."""
    with tempfile.TemporaryDirectory(prefix="zbudfs-bench-", dir=options.dir) as folder:
        yield Path(folder).resolve()


def build(name: str, folder: Path) -> Path:
    """Build `name`.c of this folder into `folder`. Raises BenchError."""
    program = folder / name
    if not program.exists():
        libraries: list[str] = []
        if name == "floor":
            libraries = [*shlex.split(run(["pkg-config", "--cflags", "--libs", "fuse3"])), "-lzstd"]
        run(["gcc", "-O2", "-Wall", "-o", program, HERE / f"{name}.c", *libraries])
    return program


def wait_until(condition: Callable[[], bool], what: str, limit_seconds: float = 30.0) -> None:
    """Wait until something holds. Raises BenchError."""
    end = time.monotonic() + limit_seconds
    while not condition():
        if time.monotonic() > end:
            raise BenchError(f"waited {limit_seconds:g} s for {what}")
        time.sleep(0.02)


def stats(mountpoint: Path) -> dict[str, Any]:
    """Everything that a mount says about itself. Also while workers die: an open file of a dead one is opened anew."""
    end = time.monotonic() + LIMIT_SECONDS
    while True:
        try:
            found: dict[str, Any] = json.loads((mountpoint / "stats/all.json").read_text())
            return found
        except (OSError, ValueError) as error:
            if time.monotonic() > end:
                raise BenchError(f"{mountpoint} does not answer: {error}") from None
        time.sleep(0.01)


def in_turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): every name once a round, each round beginning with the next one."""
    for number in range(rounds):
        at = number % len(names) if names else 0
        for name in [*names[at:], *names[:at]]:
            yield number, name
