# SPDX-License-Identifier: MIT
"""Any user writes any text to `control/` while all files are read: it is refused or in force, and the daemon continues."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import MIB, PAGE, all_stats, opened
from tests.support import LIMIT_SECONDS, mounted, status_of, wait_until

pytestmark = pytest.mark.needs("root", "fuse")

NOBODY: Final = 65534
ROUNDS: Final = 8
PAGES: Final = 300

FIXED: Final = (
    *(b"\0", b"\n", b" ", b"\0" * PAGE, b"1\0", b"1\n\n", b"1\n2\n", b"-1", b"+1", b"1e9", b"0x10", b"1_0", b"nan"),
    *(b"9" * 19, b"9" * 20, b"9" * 5000, b"-" + b"9" * 400, b"9" * 20 + b"G", b"18446744073709551616", b"0", b"1"),
    *(
        "²".encode(),
        "１".encode(),
        "١٢".encode(),
        "ä\u202e".encode(),
        b"\xff\xfe",
        b"%s%n",
        b"{0}",
        b"\x1b[31m",
        b"auto",
    ),
    *(b"all", b"auto\0", b"ALL", b"1M", b"4M", b"1.5M", b".", b"1" * PAGE, b"x" * MIB, b" " * MIB, b"1" + b" " * 9000),
)


def values(source: random.Random) -> Iterator[bytes]:
    """Return the values to write: the fixed ones, and noise."""
    yield from FIXED
    for _ in range(ROUNDS):
        yield source.randbytes(source.choice((1, 3, 8, 64, 5000)))
        yield b"%d" % source.randrange(-(1 << 70), 1 << 70)
        yield b"%d" % source.randrange(0, 3000)


def not_refused(mnt: Path, names: list[str]) -> int:
    """Let another user try to write each value, and return the number of those that were not refused."""
    pid = os.fork()
    if not pid:
        wrong = 200
        try:
            os.chdir(mnt)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            wrong = len(names)
            for name in names:
                try:
                    os.close(os.open(f"control/{name}", os.O_WRONLY))
                except PermissionError:
                    wrong -= 1
        finally:
            os._exit(wrong)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_anything_is_written_to_control(tmp_path: Path) -> None:
    """Each text is EINVAL or a value, other users get EACCES, no bug is logged, no process dies, and each byte is right."""
    source = random.Random(5)
    contents = [source.randbytes(1500).ljust(PAGE, b"\0") for _ in range(PAGES)]
    with (
        mounted(tmp_path / "mnt", "--size", "8M", "--pool", "1M", "--backing", tmp_path / "b") as mnt,
        opened(mnt / "swapfile") as fd,
    ):
        names = sorted(path.name for path in (mnt / "control").iterdir())
        worker = all_stats(mnt)["worker_pid"]
        over = threading.Event()
        reads: Counter[str] = Counter()
        wrong: list[str] = []

        def read_everything() -> None:
            while not over.is_set() or not reads:
                for folder in ("stats", "control"):
                    for path in (mnt / folder).iterdir():
                        path.read_bytes()
                        reads[folder] += 1

        def use_the_swapfile() -> None:
            while not over.is_set() or not reads["swapfile"]:
                for number, content in enumerate(contents):
                    try:
                        os.pwrite(fd, content, number * PAGE)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:  # writeback may be off
                            wrong.append(str(error))
                        continue
                    if os.pread(fd, PAGE, number * PAGE) != content:
                        wrong.append(f"page {number}")
                    reads["swapfile"] += 1

        others = [threading.Thread(target=target) for target in (read_everything, use_the_swapfile)]
        for other in others:
            other.start()
        answers: Counter[int] = Counter()
        try:
            for name in names:
                for value in values(source):
                    with opened(mnt / "control" / name, os.O_WRONLY) as control:
                        try:
                            done = os.write(control, value)
                        except OSError as error:
                            answers[error.errno or 0] += 1
                        else:
                            assert done == len(value)
                            answers[0] += 1
                    assert (mnt / "control" / name).read_text().strip().lstrip("-").isascii()
            assert not_refused(mnt, names) == 0
        finally:
            over.set()
            for other in others:
                other.join(LIMIT_SECONDS)
        assert set(answers) == {0, errno.EINVAL}
        assert answers[errno.EINVAL] > answers[0] > len(names)
        assert min(reads["stats"], reads["control"], reads["swapfile"]) > 0
        assert wrong == []
        for name, text in (("writeback_enabled", "1"), ("writeback_budget_bytes_per_day", "0"), ("trace", "0")):
            (mnt / "control" / name).write_text(text)
        counts = all_stats(mnt)
        assert (counts["worker_pid"], counts["recoveries"], counts["lost_pages"]) == (worker, 0, 0)
        assert "bug" not in (mnt / "stats/log").read_text()
        assert "Traceback" not in (mnt / "stats/log").read_text()
        wait_until(lambda: status_of(mnt)["standby_ready"], "the standby")
        for number, content in enumerate(contents):
            wait_until(lambda number=number, content=content: _written(fd, content, number), "room")  # type: ignore[misc]
            assert os.pread(fd, PAGE, number * PAGE) == content


def _written(fd: int, content: bytes, number: int) -> bool:
    try:
        return os.pwrite(fd, content, number * PAGE) == PAGE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
