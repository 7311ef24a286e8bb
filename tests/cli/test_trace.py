# SPDX-License-Identifier: MIT
"""`zbudfs trace`: record from a real mount, show, replay, and refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.storm import make_page
from tests.store.disks import tmpfs
from tests.support import LIMIT_SECONDS, is_mounted, run_zbudfs, status_of, wait_until, zbudfs
from tests.tracing.samples import trace_file
from zbudfs.cli.main import main
from zbudfs.cli.target import not_mounted
from zbudfs.core.trace import Kind

PAGES = 3000


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Return a mount whose pool holds a part of PAGES."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    zbudfs("mount", "--size", "64M", "--pool", "4M", "--backing", tmp_path / "backing", folder)
    yield folder
    if is_mounted(folder):
        zbudfs("umount", folder)


class Recorder:
    """A running `zbudfs trace record`."""

    def __init__(self, mountpoint: Path, path: Path, *options: str) -> None:
        command = [sys.executable, "-m", "zbudfs", "trace", "record", *options, "-o", str(path), str(mountpoint)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: (mountpoint / "control/trace").read_text() == "1\n", "the daemon records")

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal, and return the exit status and the output."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT_SECONDS)
        return self.process.returncode, out, err


def use(mountpoint: Path, first: int = 0) -> None:
    """Write PAGES pages, read every third and compare, and punch some."""
    fd = os.open(mountpoint / "swapfile", os.O_RDWR)
    try:
        for page in range(first, first + PAGES, 8):
            os.pwrite(fd, b"".join(make_page(number, 0, 1) for number in range(page, page + 8)), page * 4096)
        for page in range(first, first + PAGES, 3):
            assert os.pread(fd, 4096, page * 4096) == make_page(page, 0, 1)
    finally:
        os.close(fd)
    subprocess.run(
        ["fallocate", "--punch-hole", "--offset", "0", "--length", "1MiB", mountpoint / "swapfile"], check=True
    )


def shown(path: Path) -> dict[str, Any]:
    """Return the output of show for a trace."""
    found: dict[str, Any] = json.loads(zbudfs("trace", "show", "--json", path))
    return found


@pytest.mark.needs("root", "fuse")
def test_record_show_replay(mountpoint: Path, tmp_path: Path) -> None:
    """The file has all requests, and a replay with the same settings repeats the daemon's work."""
    path = tmp_path / "it.zbt"
    recorder = Recorder(mountpoint, path)
    use(mountpoint)
    daemon = status_of(mountpoint)
    status, out, err = recorder.end()
    assert (status, err) == (0, "")
    assert out.endswith(f"in {path}\n")
    wait_until(lambda: (mountpoint / "control/trace").read_text() == "0\n", "the daemon stops")
    found = shown(path)
    assert found["pages"]["write"] == PAGES
    assert found["pages"]["read"] + found["pages"]["pagein"] == PAGES / 3
    assert found["pages"]["discard"] == 256
    assert found["distinct_pages"] == PAGES
    assert found["lost_records"] == 0
    assert sum(found["written_by_size_class"].values()) <= PAGES
    (replayed,) = json.loads(zbudfs("trace", "replay", "--json", path))
    assert replayed["wrong_pages"] == replayed["lost_pages"] == 0
    assert replayed["written_pages"] == PAGES
    assert replayed["pool_bytes"] == daemon["pool_limit_bytes"]
    assert abs(replayed["writeback_frames"] - daemon["cumul_writeback_frames"]) < 0.3 * daemon["cumul_writeback_frames"]


@pytest.mark.needs("root", "fuse")
def test_a_takeover_does_not_end_a_recording(mountpoint: Path, tmp_path: Path) -> None:
    """The requests that the next worker serves are in the same file."""
    path = tmp_path / "it.zbt"
    wait_until(lambda: bool(status_of(mountpoint)["standby_ready"]), "a standby")
    recorder = Recorder(mountpoint, path)
    use(mountpoint)
    before = status_of(mountpoint)["worker_pid"]
    os.kill(before, signal.SIGKILL)
    use(mountpoint, first=PAGES)
    assert status_of(mountpoint)["worker_pid"] != before
    assert (mountpoint / "control/trace").read_text() == "1\n"
    assert recorder.end(signal.SIGTERM)[0] == 0
    assert shown(path)["distinct_pages"] == 2 * PAGES


@pytest.mark.needs("root", "fuse")
def test_the_end_of_the_mount_ends_a_recording(mountpoint: Path, tmp_path: Path) -> None:
    """The file is whole, and a second recording is refused meanwhile."""
    path = tmp_path / "it.zbt"
    recorder = Recorder(mountpoint, path, "--seconds", "1000")
    use(mountpoint)
    run = run_zbudfs("trace", "record", "-o", tmp_path / "other", mountpoint)
    assert (run.returncode, run.stderr) == (
        1,
        f"zbudfs: {mountpoint} is being recorded already: end the other zbudfs trace record first\n",
    )
    assert not (tmp_path / "other").exists()
    zbudfs("umount", mountpoint)
    out, err = recorder.process.communicate(timeout=LIMIT_SECONDS)
    assert recorder.process.returncode == 0
    assert "records" in out
    assert err == "zbudfs: the daemon has ended, or was handed over to another one\n"
    assert shown(path)["pages"]["write"] == PAGES


@pytest.mark.needs("root", "fuse")
def test_a_full_disk_ends_a_recording(mountpoint: Path, tmp_path: Path) -> None:
    """The message names the place and the reason. The daemon stops recording, and continues."""
    with tmpfs(tmp_path, 4096) as folder:
        recorder = Recorder(mountpoint, folder / "trace")
        with (mountpoint / "swapfile").open("r+b", buffering=0) as file:
            for number in random.Random(1).choices(range(PAGES), k=PAGES):
                os.pwrite(file.fileno(), make_page(number, 0, 1), number * 4096)
        status, out, err = recorder.end()
    assert (status, out) == (1, "")
    assert err == f"zbudfs: {folder}/trace cannot be written: No space left on device\n"
    assert (mountpoint / "control/trace").read_text() == "0\n"
    use(mountpoint)


@pytest.mark.needs("root", "fuse")
def test_for_some_time(mountpoint: Path, tmp_path: Path) -> None:
    """The recording ends by itself."""
    assert "0 records" in zbudfs("trace", "record", "--seconds", "0.2", "-o", tmp_path / "it", mountpoint)
    run = run_zbudfs("trace", "show", tmp_path / "it")
    assert (run.returncode, run.stderr) == (1, f"zbudfs: {tmp_path / 'it'}: the trace is empty\n")


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Return a trace made by hand."""
    path = tmp_path / "sample.zbt"
    records = [(at * 1000, 1 + at % 2, at % 40, at * 16 % 1600, 16) for at in range(500)]
    path.write_bytes(trace_file(sorted(records), started="2026-01-01T00:00:00+00:00", kernel="6.18", zbudfs="1"))
    return path


def test_a_page_for_people(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page has figures, the working set over time, and sizes."""
    assert main(["trace", "show", str(sample)]) == 0
    text = capsys.readouterr().out
    assert "recorded   on 2026-01-01T00:00:00+00:00 by zbudfs 1 on Linux 6.18" in text
    assert "mount      16 MiB, pool of 1 MiB, level -1" in text
    assert "written    4,000 pages (15.6 MiB), 8,016 a second" in text
    assert "touched    1,600 different pages (6.3 MiB)" in text
    assert "each column is 0.00832 s" in text
    assert "same-filled" in text


def test_a_picture(sample: Path) -> None:
    """The picture has the working set over time."""
    path = sample.parent / "it.svg"
    zbudfs("trace", "show", "--plot", path, sample)
    assert "working set; 6.3 MiB of different pages in all" in path.read_text()


def test_settings_side_by_side(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each combination has a line, and no page is wrong."""
    options = ["--pool", "1M,2M", "--level", "-1,3", "--watermark", "2%:5%,25%:50%"]
    assert main(["trace", "replay", *options, "--backing", str(sample.parent), str(sample)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{sample}: 4,000 pages written, 4,000 read, 1,600 different ones (6.3 MiB)"
    assert len(lines) == 3 + 8
    assert [line.split()[:3] for line in lines[3:5]] == [["1", "MiB", "zbud"], ["1", "MiB", "zbud"]]
    assert "256KiB:512KiB" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["show"], 2, "required: FILE"),
        ([], 2, "required: COMMAND"),
        (["record", "/x"], 2, "required: -o/--output"),
        (["record", "-o", "x", "--seconds", "0", "/x"], 2, "'0' is not a number of seconds"),
        (["record", "-o", "x", "--seconds", "nan", "/x"], 2, "'nan' is not a number of seconds"),
        (["record", "-o", "x", "--max", "0", "/x"], 2, "'0' is a size of zero bytes"),
        (["replay", "--watermark", "5%", "x"], 2, "write LOW:HIGH"),
        (["replay", "--watermark", "5%:x", "x"], 2, "'x' is not a size"),
        (["replay", "--pool", "1M,,2M", "x"], 2, "'' is not a size"),
        (["replay", "--level", "0", "x"], 2, "there is no level 0"),
        (["replay", "--packing", "zbud,tight", "x"], 2, "'tight' is not a packing"),
        (["show", "none"], 1, "No such file"),
        (["show", "/dev/zero"], 1, "/dev/zero is not a file"),
        (["show", "garbage"], 1, "garbage: it is not a trace"),
        (["replay", "garbage"], 1, "garbage: it is not a trace"),
        (["replay", "--pool", "1K", "sample.zbt"], 1, "write a size from 1M"),
        (["replay", "--watermark", "9M:1M", "sample.zbt"], 1, "write a low of at least one frame"),
        (["replay", "--backing", "none/such", "sample.zbt"], 1, "none/such is not a folder"),
        (
            ["replay", "--level", ",".join(map(str, range(1, 20))), "--pool", "1M,2M,3M,4M", "sample.zbt"],
            1,
            "write at most 64",
        ),
    ],
)
def test_refusals(arguments: list[str], status: int, reason: str, sample: Path) -> None:
    """Each refusal is one line."""
    (sample.parent / "garbage").write_bytes(b"garbage" * 100)
    run = run_zbudfs("trace", *arguments, cwd=sample.parent)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (status, "", 1)
    assert reason in run.stderr


@pytest.mark.needs("root")
def test_record_what_is_not_mounted(tmp_path: Path) -> None:
    """A path without a mount is refused before a file is made."""
    run = run_zbudfs("trace", "record", "-o", tmp_path / "it", tmp_path)
    assert (run.returncode, run.stderr) == (1, f"zbudfs: {not_mounted(str(tmp_path))}\n")
    assert list(tmp_path.iterdir()) == []


def test_hostile_traces_are_replayed_safely(tmp_path: Path) -> None:
    """A trace that claims a huge device and pool costs only the pages that it touches, or is refused in a line."""
    path = tmp_path / "huge.zbt"
    records = [(0, int(Kind.WRITE), 5, (1 << 32) - 5, 4), (1, int(Kind.DISCARD), 0, 0, (1 << 32) - 1)]
    path.write_bytes(trace_file(records, size_bytes=1 << 44, pool_limit_bytes=1 << 60))
    run = run_zbudfs("trace", "replay", path)
    assert run.returncode == 1
    assert "more than this machine's" in run.stderr
    assert "4 pages written" in zbudfs("trace", "replay", "--pool", "1M", "--backing", "none", path)
