# SPDX-License-Identifier: MIT
"""The demonstration: a program gets a third of the memory that it needs, and every byte comes back.

    a folder -> zbudfs swapon -> a memory cgroup -> the program fills, waits, compares -> swapoff and umount

Everything is made in a temporary folder. It is removed at the end, also after Ctrl-C and after a failure. The exit status is
1 if a byte was wrong or a step failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from types import FrameType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.cell import Cell, CellError  # noqa: E402  after the path is known
from kit.needs import NEEDS, why_not  # noqa: E402
from zbudfs.core.sizes import format_size  # noqa: E402
from zbudfs.service.mountpoint import find_mount  # noqa: E402

LIMIT_MIB: Final = 128
"""RAM that the program gets."""
NEEDED_MIB: Final = 3 * LIMIT_MIB
"""Memory that the program needs."""
POOL: Final = "64M"
"""Size of the pool. It is smaller than the stored pages, so that some of them are written to the disk."""
SIZE: Final = "1G"
"""Size of the swap, several times the memory that does not fit into RAM."""

_STEP_LIMIT_SECONDS: Final = 120.0
_STORM_LIMIT_SECONDS: Final = 600.0


class DemoError(Exception):
    """A step failed. The text says which step and why."""


def main() -> int:
    """Run the demonstration, and return the exit status."""
    if refusals := [f"{need}: {reason}" for need in NEEDS if (reason := why_not(need))]:
        print("this machine cannot run the demonstration:", *refusals, sep="\n  ", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="zbudfs-demo-") as folder:
            print(f"a program that needs {NEEDED_MIB} MiB gets {LIMIT_MIB} MiB of RAM; the rest swaps to zbudfs")
            with swapped_on(Path(folder)) as mountpoint, Cell("demo", LIMIT_MIB << 20) as cell:
                full, outcome = run_storm(cell, mountpoint)
        print_table(full, outcome)
    except KeyboardInterrupt:
        print("interrupted; swap and mount were removed", file=sys.stderr)
        return 130
    except (DemoError, CellError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 1 if outcome["bad"] else 0


@contextlib.contextmanager
def swapped_on(folder: Path) -> Iterator[Path]:
    """Mount a zbudfs in `folder`, and turn on swap on it, for this context. Yield the mountpoint."""
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    options = ["--size", SIZE, "--pool", POOL, "--backing", str(folder / "backing"), "--priority", "32767"]
    try:
        device = zbudfs("swapon", *options, str(mountpoint)).strip()
        print(f"mounted on {mountpoint}, swap on {device}, pool of {POOL}")
        yield mountpoint
    finally:
        if find_mount(str(mountpoint.resolve())) is not None:
            zbudfs("swapoff", "--umount", str(mountpoint))


def run_storm(cell: Cell, mountpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the program in `cell`. Return the status of the mount with full memory, and the result of the program."""
    command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), str(NEEDED_MIB)])
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True) as storm:
        try:
            assert storm.stdout is not None  # it is a pipe
            print("filling its memory ...", flush=True)
            if storm.stdout.readline().strip() != "filled":
                raise DemoError(f"the program ended with status {storm.wait(_STEP_LIMIT_SECONDS)} while filling")
            full: dict[str, Any] = json.loads(zbudfs("status", "--json", str(mountpoint)))
            print("comparing every byte ...", flush=True)
            said, _ = storm.communicate("go on\n", timeout=_STORM_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the program did not end within {_STORM_LIMIT_SECONDS:g} s") from None
        finally:
            storm.kill()
    if storm.returncode not in (0, 1):
        raise DemoError(f"the program ended with status {storm.returncode} while comparing")
    outcome: dict[str, Any] = json.loads(said.splitlines()[-1])
    return full, outcome


def print_table(full: dict[str, Any], outcome: dict[str, Any]) -> None:
    """Print the stored pages, the memory that they took, and the number of wrong pages."""
    stored = full["stored_pages"] * 4096
    taken = full["pool_used_bytes"] + full["backing_used_bytes"]
    saved = f"{format_size(stored - taken)} ({100 * (stored - taken) / stored:.0f} %)" if stored else "nothing"
    rows = [
        ("memory of the program", f"{NEEDED_MIB} MiB"),
        ("RAM it was given", f"{LIMIT_MIB} MiB"),
        ("swapped out", f"{format_size(stored)} in {full['stored_pages']:,} pages"),
        ("  of one repeated word", f"{full['same_filled_pages']:,} pages"),
        ("  incompressible", f"{full['raw_pages']:,} pages"),
        ("takes of RAM", format_size(full["pool_used_bytes"])),
        ("takes on disk", format_size(full["backing_used_bytes"])),
        ("saved", saved),
        ("wrong pages", f"{outcome['bad']} of {outcome['pages']:,}"),
    ]
    print()
    for name, value in rows:
        print(f"  {name:24} {value}")
    print()
    print("every byte came back" if not outcome["bad"] else "BYTES WERE WRONG")


def zbudfs(*arguments: str) -> str:
    """Run the command `zbudfs`, and return its output. Ctrl-C waits until the command ends. Raises DemoError."""
    command = [sys.executable, "-m", "zbudfs", *arguments]
    try:
        with _interrupts_deferred():
            run = subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_STEP_LIMIT_SECONDS, start_new_session=True
            )
    except subprocess.CalledProcessError as error:
        raise DemoError(str(error.stderr).strip()) from None
    except subprocess.TimeoutExpired:
        raise DemoError(f"zbudfs {arguments[0]} did not end within {_STEP_LIMIT_SECONDS:g} s") from None
    return run.stdout


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM in this context. If one came, KeyboardInterrupt is raised at the end.

    It uses handlers instead of SIG_IGN, which a daemon that is started inside would inherit.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [(number, signal.signal(number, lambda number, _: came.append(number))) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.chdir("/")
    raise SystemExit(main())
