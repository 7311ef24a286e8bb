# SPDX-License-Identifier: MIT
"""`zbudfs set` and the files of control/, on a real mount."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.calls import all_stats, opened, server_of, stat_of
from tests.support import mounted, run_zbudfs, status_of, wait_until, zbudfs
from zbudfs.core.tunables import NAMES

pytestmark = pytest.mark.needs("root", "fuse")


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    """Return a small mount with a backing file."""
    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing") as mountpoint:
        yield mountpoint


def values(mountpoint: Path) -> dict[str, int]:
    """Return the values in force."""
    return {name: int((mountpoint / "control" / name).read_text()) for name in NAMES}


def test_everything_is_listed(mnt: Path) -> None:
    """Each key is listed with its value and its meaning, and JSON has the same numbers."""
    lines = zbudfs("set", mnt).splitlines()
    found = values(mnt)
    assert json.loads(zbudfs("set", "--json", mnt)) == found
    for name in NAMES:
        assert any(line.split()[:2] == [name, str(found[name])] for line in lines), name


def test_setting_is_in_force_and_survives(mnt: Path) -> None:
    """A new value is printed, is in stats/, and stays when the worker has died."""
    told = zbudfs("set", "pool_limit_bytes=8M", "level=7", "writeback_budget_bytes_per_day=1G", mnt)
    assert "8388608  (8 MiB)" in told
    assert "age_seconds" not in told
    zbudfs("set", "low_watermark_frames=500", "high_watermark_frames=900", mnt)
    zbudfs("set", "low_watermark_frames=10", "high_watermark_frames=20", mnt)  # below the old low watermark
    before = values(mnt)
    assert (before["low_watermark_frames"], before["high_watermark_frames"]) == (10, 20)
    report = status_of(mnt)
    assert (report["pool_limit_bytes"], report["level"]) == (8 << 20, 7)
    with opened(mnt / "swapfile") as fd:
        os.pwrite(fd, os.urandom(1 << 20), 0)
    zbudfs("set", "writeback=all", mnt)
    wait_until(lambda: stat_of(mnt, "cumul_writeback_frames") == 256, "everything to be written back")
    left = stat_of(mnt, "writeback_budget_left_bytes")
    assert left < 1 << 30
    wait_until(lambda: all_stats(mnt)["standby_ready"], "a standby")
    counted = {
        name: number for name, number in all_stats(mnt).items() if name.endswith(("latency_us", "latency_sum_us"))
    }
    os.kill(server_of(mnt), signal.SIGKILL)
    wait_until(lambda: stat_of(mnt, "recoveries") == 1, "a new worker")
    assert values(mnt) == before
    assert stat_of(mnt, "level") == 7
    assert left <= stat_of(mnt, "writeback_budget_left_bytes") <= left + (1 << 20)
    after = all_stats(mnt)
    for name, number in counted.items():
        assert after[name] == number, name
    log = (mnt / "stats/log").read_text()
    assert "control: pool_limit_bytes is set to 8M" in log


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["levl=3"], 2, "did you mean level?"),
        (["level=3", "level=4"], 2, "level is set twice"),
        (["level"], 2, "is not KEY=VALUE"),
        (
            ["level=3", "pool_limit_bytes=1T"],
            2,
            "the pool of this mount has 16 MiB, so write a size from 1048576 to 16777216 bytes",
        ),
        (["low_watermark_frames=5", "high_watermark_frames=4"], 2, "watermark_frames is"),
        (["age_seconds=soon"], 2, "it must be a whole number"),
    ],
)
def test_a_wrong_value_is_reported_and_changes_nothing(words: list[str], status: int, reason: str, mnt: Path) -> None:
    """A wrong value gives one line, before anything is set."""
    before = values(mnt)
    run = run_zbudfs("set", *words, mnt)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (status, "", 1)
    assert reason in run.stderr
    assert values(mnt) == before


def test_without_a_backing_file(tmp_path: Path) -> None:
    """Writeback cannot be turned on, and a message says so."""
    with mounted(tmp_path / "mnt") as mountpoint:
        assert values(mountpoint)["writeback_enabled"] == 0
        run = run_zbudfs("set", "writeback=all", mountpoint)
        assert (run.returncode, run.stderr) == (2, "zbudfs: writeback cannot be set: this mount has no backing file\n")


def test_the_manners_of_sysfs(mnt: Path) -> None:
    """A bad value is EINVAL and changes nothing, a shell's redirection works, and a read starts at the beginning."""
    level = mnt / "control/level"
    level.write_text("4\n")  # with O_TRUNC
    assert level.read_text() == "4\n"
    with opened(level) as fd:
        assert os.read(fd, 100) == b"4\n"
        for wrong in (b"", b"0", b"x", b"\xff", b"4\0", b"1" * 5000):
            if wrong:
                with pytest.raises(OSError, match="Invalid argument") as caught:
                    os.write(fd, wrong)
                assert caught.value.errno == errno.EINVAL
        assert os.write(fd, b"5") == 1
        assert os.pread(fd, 100, 0) == b"5\n"
        os.ftruncate(fd, 0)
        assert os.pread(fd, 100, 0) == b"5\n"
    os.truncate(level, 0)
    assert level.read_text() == "5\n"
    with pytest.raises(PermissionError):
        level.unlink()
    with pytest.raises(PermissionError):
        level.chmod(0o777)
    with pytest.raises(PermissionError):
        (mnt / "control/other").touch()


def test_root_is_needed(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user gets a message that root is needed."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    from zbudfs.cli.main import main

    assert main(["set", "level=3", str(mnt)]) == 1
