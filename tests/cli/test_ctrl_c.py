# SPDX-License-Identifier: MIT
"""Ctrl-C at any moment: no traceback, and nothing left behind. Before our first line it is Python's own to answer."""

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
"""A program that is `zbudfs`, and presses Ctrl-C when it imports the nth module; else it tells n less what there were."""
MANY: Final = 1 << 20
LONGEST_START_SECONDS: Final = 3.0
"""From Python's handler to our first line, which is some hundredths of a second away."""


def run_until_import(number: int) -> subprocess.CompletedProcess[str]:
    """Run `zbudfs --version` with a Ctrl-C at that import."""
    command = [sys.executable, "-c", AT_THE_NTH_IMPORT, str(number), "--version"]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=ROOT, check=False)


def test_while_modules_are_imported() -> None:
    """It ends the command as it ends any program: by the signal, without a word."""
    imports = MANY - int(run_until_import(MANY).stderr)
    assert imports > 50
    for number in range(1, imports, imports // 8):
        run = run_until_import(number)
        assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "", ""), f"at import {number}"


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command in a process group of its own; return when our first line has run."""
    command = [sys.executable, "-m", "zbudfs", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    caught_since = 0.0

    def has_begun() -> bool:  # Python's handler is there, and gone again; which may not be seen on a busy machine
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
    """Press Ctrl-C after so many seconds; return the exit status and what is on stderr."""
    with process:
        try:
            time.sleep(moment)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, err = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    return process.returncode, err


def test_a_command_that_only_looks() -> None:
    """From its first line on: ended by the signal, told in a line, or, once it waits, the end that was expected."""
    for step in range(0, 21, 3):
        status, err = interrupted(started("status", "--watch", "60"), step / 50)
        assert (status, err) in ((-signal.SIGINT, ""), (130, "zbudfs: interrupted\n"), (0, "")), step


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("foreground", [["--foreground"], []])
def test_a_mount(tmp_path: Path, foreground: list[str]) -> None:
    """While the daemon comes up all that was made is undone again; afterwards, in the foreground, it unmounts."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    backing = tmp_path / "backing"
    for step in range(0, 15, 3):
        options: list[str | Path] = [*foreground, "--size", "4M", "--pool", "1M", "--backing", backing]
        status, err = interrupted(started("mount", *options, mountpoint), step / 20)
        came_last = status == -signal.SIGINT and is_mounted(mountpoint)  # when the command had nothing left to do
        if not foreground and (status == 0 or came_last):  # it was up, and is whole
            subprocess.run([sys.executable, "-m", "zbudfs", "umount", mountpoint], check=True, timeout=LIMIT_SECONDS)
        assert status in (-signal.SIGINT, 130, 0), (step, err)
        assert "Traceback" not in err
        assert all(line.startswith("zbudfs: ") for line in err.splitlines()), err
        assert not is_mounted(mountpoint), (step, status, err)
        wait_until(lambda: not pool_directories(str(mountpoint)), "the pool directory's end")
