# SPDX-License-Identifier: MIT
"""The commands that the documents show are run, on a mount that is there: what they look at and set is real.

The tutorial is run as a whole by test_tutorial.py, and with it whatever mounts, swaps, restarts and takes away. Left out here
is what never ends by itself: watching, serving, and the live view, which have tests of their own.
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

ELSEWHERE: Final = {"mount", "umount", "swapon", "swapoff", "restart", "serve", "config"}
"""Commands that are run by the tutorial, or (serve, config) need files of the system: tests/service, tests/cli."""
ENDLESS: Final = {"--watch", "--listen", "--interval"}
SHORT: Final = {"60": "1", "30": "1"}
"""Seconds that a document has time for."""


def to_run(command: str, folder: Path, mountpoint: Path) -> list[str] | None:
    """The words of a shown command, with its places and programs exchanged for real ones; None if it is not to be run."""
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
        "high_watermark_frames=N": "high_watermark_frames=auto",
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
        return None  # one word is a name in a sentence
    words = [real.get(word, word) for word in words]
    return [str(folder / word) if word.endswith((".svg", ".zbt")) else word for word in words]


@contextlib.contextmanager
def writing(swapfile: Path) -> Iterator[None]:
    """Have something written now and then, so that there is something to be seen."""
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
    """Each ends with status 0."""
    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing") as mountpoint, writing(mountpoint / "swapfile"):
        (tmp_path / "core").write_bytes(os.urandom(1 << 20))
        shown = [command for document in DOCUMENTS for command in commands(document.read_text())]
        found = [to_run(command, tmp_path, mountpoint) for command in shown]
        whole = {tuple(words) for words in found if words is not None}
        # What shows or replays a recording comes after what makes it.
        ordered = sorted(whole, key=lambda words: ("replay" in words or "show" in words, words))
        names = {words[0] for words in ordered}
        assert names >= {"estimate", "set", "status", "top", "trace"}, names
        failed: dict[str, str] = {}
        for words in ordered:
            run = run_zbudfs(*words)
            if run.returncode != 0 and not (run.returncode == 2 and "required" in run.stderr):  # a name of it
                failed[" ".join(words)] = run.stderr
        assert failed == {}, failed
