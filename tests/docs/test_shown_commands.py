# SPDX-License-Identifier: MIT
"""The commands of the documents run on a real mount.

test_tutorial.py runs the tutorial as a whole, with all commands that mount, swap, restart and unmount. This module
leaves out the commands that never end by themselves (watching, serving, the live view), which have their own tests.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.docs.test_commands import DOCUMENTS, commands
from tests.support import mounted, run_zbudfs

ELSEWHERE: Final = {"mount", "umount", "swapon", "swapoff", "restart", "serve", "config", "doctor", "hibernate"}
"""Commands that the tutorial runs, or that depend on the whole system (tests/service, tests/cli).

`hibernate` would turn off every swap on zbudfs of this machine.
"""
ENDLESS: Final = {"--watch", "--listen", "--interval"}
SHORT: Final = {"60": "1", "30": "1"}
"""Shorter times for the seconds in a document."""


def to_run(command: str, folder: Path, mountpoint: Path) -> list[str] | None:
    """Return the words of a command, with real places and processes, or None if this module does not run it."""
    real = {
        **SHORT,
        "/mnt/zswap": str(mountpoint),
        "/mnt/zplay": str(mountpoint),
        "MOUNTPOINT": str(mountpoint),
        "COMMAND": "status",
        "--all": str(os.getpid()),
        "PID": str(os.getpid()),
        "1234": str(os.getpid()),
        "5678": str(os.getppid()),
        "core.1234": str(folder / "core"),
        "low_watermark_frames=N": "low_watermark_frames=100",
        "high_watermark_frames=M": "high_watermark_frames=200",
        "pool_limit_bytes=64M": "pool_limit_bytes=8M",
        "pool_limit_bytes=32M": "pool_limit_bytes=8M",
    }
    words = shlex.split(command)[1:]
    if (
        len(words) < 2
        or words[0] in ELSEWHERE
        or ENDLESS & set(words)
        or (words[0] == "top" and "--picture" not in words)
    ):
        return None  # a single word is a name in a sentence
    words = [real.get(word, word) for word in words]
    return [str(folder / word) if word.endswith((".svg", ".zbt")) else word for word in words]


@contextlib.contextmanager
def writing(swapfile: Path) -> Iterator[None]:
    """Write pages to the swapfile in the background, so that the commands have something to show."""
    end = threading.Event()

    def write() -> None:
        with swapfile.open("r+b", buffering=0) as file:
            for number in itertools.count():
                os.pwrite(file.fileno(), os.urandom(2048) * 2, number % 1024 * 4096)
                if end.wait(0.05):
                    return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        end.set()
        writer.join()


@pytest.mark.needs("root", "fuse")
def test_shown_commands(tmp_path: Path) -> None:
    """Each command ends with status 0."""
    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing") as mountpoint, writing(mountpoint / "swapfile"):
        (tmp_path / "core").write_bytes(os.urandom(1 << 20))
        shown = [command for document in DOCUMENTS for command in commands(document.read_text())]
        found = [to_run(command, tmp_path, mountpoint) for command in shown]
        whole = {tuple(words) for words in found if words is not None}
        # Commands that show or replay a recording come after the command that makes it.
        ordered = sorted(whole, key=lambda words: ("replay" in words or "show" in words, words))
        names = {words[0] for words in ordered}
        assert names >= {"estimate", "set", "status", "top", "trace"}, names
        failed: dict[str, str] = {}
        for words in ordered:
            run = run_zbudfs(*words)
            if run.returncode != 0 and not (run.returncode == 2 and "required" in run.stderr):  # a name of the command
                failed[" ".join(words)] = run.stderr
        assert failed == {}, failed
