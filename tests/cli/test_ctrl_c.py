# SPDX-License-Identifier: MIT
"""Ctrl-C at any moment gives no traceback and leaves nothing behind. Before our first line Python itself answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT, is_mounted, wait_until
from zbudfs.cli import mounting
from zbudfs.cli.option_table import Value
from zbudfs.cli.plan import Plan, make_plan
from zbudfs.cli.stripe import mounts_of
from zbudfs.service.launch import Ready
from zbudfs.service.pooldir import pool_directories

AT_THE_NTH_IMPORT: Final = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Presser(MetaPathFinder):
    left = int(sys.argv.pop(1))
    def find_spec(self, name, path, target=None):
        Presser.left -= 1
        if not Presser.left:
            os.kill(os.getpid(), signal.SIGINT)
        return None

import zbudfs.cli.entry
sys.meta_path.insert(0, Presser())
status = zbudfs.cli.entry.main()
print(Presser.left, file=sys.stderr)
sys.exit(status)
"""
"""A program that acts as `zbudfs` and presses Ctrl-C at its nth import. Without an nth it prints n less the imports."""
MANY: Final = 1 << 20
LONGEST_START_SECONDS: Final = 3.0
"""Longest time from Python's handler to our first line. It usually is some hundredths of a second."""


def run_until_import(number: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `zbudfs WORDS` with Ctrl-C at that import."""
    command = [sys.executable, "-c", AT_THE_NTH_IMPORT, str(number), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=ROOT, check=False)


@pytest.mark.parametrize("words", [("--version",), ("swapon", "--config", "none"), ("status", "/nonexistent")])
def test_while_modules_are_imported(words: tuple[str, ...]) -> None:
    """Ctrl-C ends the command by the signal, without output, as it ends any program."""
    imports = MANY - int(run_until_import(MANY, *words).stderr.splitlines()[-1])
    assert imports > 50
    for number in range(1, imports, imports // 8):
        run = run_until_import(number, *words)
        assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", ""), f"at import {number}"


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command in its own process group, and return when our first line has run."""
    command = [sys.executable, "-m", "zbudfs", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    caught_since = 0.0

    def has_begun() -> bool:  # Python sets its handler, then we replace it; a busy machine may hide the first step
        nonlocal caught_since
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        now = any(line.startswith("SigCgt:") and int(line.split()[1], 16) >> signal.SIGINT - 1 & 1 for line in lines)
        if now and not caught_since:
            caught_since = time.monotonic()
        return caught_since > 0 and (not now or time.monotonic() > caught_since + LONGEST_START_SECONDS)

    end = time.monotonic() + LIMIT_SECONDS
    while not has_begun() and process.poll() is None:
        assert time.monotonic() < end
    return process


def interrupted(process: subprocess.Popen[str], moment: float) -> tuple[int, str]:
    """Press Ctrl-C after so many seconds, and return the exit status and stderr."""
    with process:
        try:
            time.sleep(moment)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
            _, err = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    return process.returncode, err


def test_a_command_that_only_looks() -> None:
    """The command ends by the signal from its first line on, reports it in a line, or has its usual end once it waits."""
    for step in range(0, 21, 3):
        status, err = interrupted(started("status", "--watch", "60"), step / 50)
        assert (status, err) in ((-signal.SIGINT, ""), (130, "zbudfs: interrupted\n"), (0, "")), step


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("foreground", [["--foreground"], []])
def test_a_mount(tmp_path: Path, foreground: list[str]) -> None:
    """An interrupted start undoes its steps. Afterwards, in the foreground, Ctrl-C unmounts."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    backing = tmp_path / "backing"
    for step in range(0, 15, 3):
        options: list[str | Path] = [*foreground, "--size", "4M", "--pool", "1M", "--backing", backing]
        status, err = interrupted(started("mount", *options, mountpoint), step / 20)
        came_last = status == -signal.SIGINT and is_mounted(mountpoint)  # if the command had finished
        if not foreground and (status == 0 or came_last):  # it was up, and is whole
            subprocess.run([sys.executable, "-m", "zbudfs", "umount", mountpoint], check=True, timeout=LIMIT_SECONDS)
        assert status in (-signal.SIGINT, 130, 0), (step, err)
        assert "Traceback" not in err
        assert all(line.startswith("zbudfs: ") for line in err.splitlines()), err
        assert not is_mounted(mountpoint), (step, status, err)
        wait_until(lambda: not pool_directories(str(mountpoint)), "the pool directory's end")


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("instances", [1, 2])
def test_after_the_daemons_are_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instances: int) -> None:
    """If `mount` is interrupted while it prints its notes, it removes its mounts."""

    def interrupt(plan: Plan, ready: Ready) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mounting, "print_notes", interrupt)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options: dict[str, Value] = {
        "size": 8 << 20,
        "pool": 2 << 20,
        "backing": str(tmp_path / "backing"),
        "instances": instances,
    }
    with pytest.raises(KeyboardInterrupt):
        mounting.mount_all(make_plan(options, str(mountpoint)))
    assert mounts_of(str(mountpoint)) == []
    assert list(mountpoint.iterdir()) == []
    wait_until(lambda: not pool_directories(str(mountpoint)), "the pool directory's end")
