# SPDX-License-Identifier: MIT
"""The public statistics: a file that each user can read, and the information in it about a single page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fuse.calls import PAGE, all_stats, opened, server_of
from tests.support import LIMIT_SECONDS, ROOT, mounted, wait_until, zbudfs
from zbudfs.core.public import NAMES
from zbudfs.service import public
from zbudfs.service.mountpoint import find_mount
from zbudfs.service.pooldir import path_of

NOBODY: Final = 65534
AS_NOBODY: Final = """
import os, sys
import prometheus_client, wsgiref.simple_server
import zbudfs.cli.main, zbudfs.cli.commands, zbudfs.cli.ask, zbudfs.cli.exporter, zbudfs.cli.parser
import zbudfs.cli.status
from zbudfs.cli.main import main
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sys.exit(main(sys.argv[1:]))
"""
"""The command as another user, who may be unable to read the folders of this project and its interpreter."""


def run_as_nobody(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command `zbudfs` as an unprivileged user."""
    command = [sys.executable, "-c", AS_NOBODY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=ROOT, check=False)


def public_path(mountpoint: Path) -> Path:
    """Return the path of a mount's public statistics."""
    return Path(public.FOLDER, f"{Path(path_of(str(mountpoint))).name}.json")


def next_numbers(mountpoint: Path) -> dict[str, Any]:
    """Return the next public numbers, which include everything before this call."""
    mount = find_mount(str(mountpoint))
    assert mount is not None
    path = public_path(mountpoint)
    with opened(mountpoint / "swapfile", os.O_RDONLY) as fd:
        os.fsync(fd)  # a request, so that they come soon
    began = time.monotonic()
    wait_until(lambda: json.loads(path.read_bytes())["as_of_monotonic"] > began + 0.1, "newer public statistics")
    return public.read(mount.device)


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    """Return a mount with public statistics."""
    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing") as mountpoint:
        if not public_path(mountpoint).exists():
            pytest.skip("no tmpfs can be had for /run/zbudfs-stats")
        wait_until(lambda: all_stats(mountpoint)["standby_ready"] is True, "the standby")
        yield mountpoint


PAGES: Final = {
    "same-filled": b"12345678" * (PAGE // 8),
    "small": b"a guess " * 100 + bytes(PAGE - 800),
    "larger": os.urandom(1200) + bytes(PAGE - 1200),
    "incompressible": os.urandom(PAGE),
}
CONTENT_NAMES: Final = ("compressed_bytes", "pers_zbytes", "same_filled_pages", "raw_pages", "chunk_histogram")
"""Numbers of stats/, each of which differs between two of PAGES."""


@pytest.mark.needs("root", "fuse")
def test_one_page_that_is_swapped_out(mnt: Path) -> None:
    """With any content of the page, the public numbers change in the same way. Root sees its size and kind."""
    seen: dict[str, dict[str, Any]] = {"public": {}, "exact": {}}
    with opened(mnt / "swapfile") as fd:
        before = {"public": next_numbers(mnt), "exact": all_stats(mnt)}
        for number, (kind, content) in enumerate(PAGES.items()):
            os.pwrite(fd, content, number * PAGE)
            now = {"public": next_numbers(mnt), "exact": all_stats(mnt)}
            for who, told in now.items():
                seen[who][kind] = {
                    name: value
                    for name, value in told.items()
                    if name not in ("as_of", "renewed_at") and value != before[who].get(name)
                }
            before = now
    assert list(seen["public"].values()) == [{}] * len(PAGES)
    for name in CONTENT_NAMES:
        assert any(name in changed for changed in seen["exact"].values()), name
        assert name not in before["public"], name


@pytest.mark.needs("root", "fuse")
def test_the_file(mnt: Path) -> None:
    """The file is JSON with a fixed size and a lock, readable for all, writable for root, with the public numbers alone."""
    path = public_path(mnt)
    status = path.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o644, 0, 0)
    assert (path.parent.stat().st_mode & 0o7777, path.parent.stat().st_uid) == (0o755, 0)
    numbers = json.loads(path.read_bytes())
    assert numbers.keys() == NAMES | {"as_of", "as_of_monotonic", "device", "crc32"}
    assert abs(numbers["as_of"] - time.time()) < LIMIT_SECONDS
    next_numbers(mnt)
    assert path.stat().st_size == status.st_size == status.st_blocks * 512
    assert (path.stat().st_ino, path.stat().st_blocks) == (status.st_ino, status.st_blocks)
    for name in ("keeper_pid", "worker_pid"):
        maps = Path(f"/proc/{all_stats(mnt)[name]}/smaps").read_text().split(str(path))[1]
        size, resident = (int(maps.split(f"{word}:")[1].split()[0]) for word in ("Size", "Rss"))
        assert size == resident == status.st_size // 1024
        if "CapLck" in maps or "Locked:" in maps:
            assert int(maps.split("Locked:")[1].split()[0]) > 0


@pytest.mark.needs("root", "fuse")
def test_the_file_lives_as_long_as_the_mount(tmp_path: Path) -> None:
    """The same file is renewed after a takeover and a restart, and goes with the mount, also a dead one."""
    for dead in (False, True):
        with mounted(tmp_path / "mnt") as mountpoint:
            path = public_path(mountpoint)
            if not path.exists():
                pytest.skip("no tmpfs can be had for /run/zbudfs-stats")
            with path.open("rb") as held:  # a user with the file open delays nothing
                wait_until(lambda: all_stats(mountpoint)["standby_ready"], "a standby")
                os.kill(server_of(mountpoint), signal.SIGKILL)
                wait_until(lambda: next_numbers(mountpoint)["recoveries"] == 1, "the numbers of the next worker")
                zbudfs("restart", mountpoint)
                keeper = all_stats(mountpoint)["keeper_pid"]
                wait_until(
                    lambda: next_numbers(mountpoint)["keeper_pid"] == keeper,  # noqa: B023
                    "the numbers of the next keeper",
                )
                assert os.path.samestat(path.stat(), os.fstat(held.fileno()))
                if dead:
                    numbers = all_stats(mountpoint)
                    for pid in ("keeper_pid", "standby_pid", "worker_pid"):
                        if numbers[pid]:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(numbers[pid], signal.SIGKILL)
                    zbudfs("umount", mountpoint)
        assert not path.exists()


@pytest.mark.needs("root", "fuse")
def test_the_commands_of_another_user(mnt: Path) -> None:
    """`status` and the exporter show public numbers and say so. Other numbers are absent, and not 0."""
    with opened(mnt / "swapfile") as fd:
        os.pwrite(fd, os.urandom(100 * PAGE), 0)
    next_numbers(mnt)
    run = run_as_nobody("status", "--json", mnt)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert (report["rounded"], report["stored_pages"], report["mountpoint"]) == (True, 96, str(mnt))
    assert not report.keys() & {"pers_zpages", "chunk_histogram", "raw_pages", "write_latency_us", "pool_directory"}
    run = run_as_nobody("status", mnt)
    assert run.returncode == 0, run.stderr
    assert "rounded, as of" in run.stdout
    assert "same-filled" not in run.stdout
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chown(folder, NOBODY, NOBODY)
        target = Path(folder, "zbudfs.prom")
        run = run_as_nobody("exporter", "--textfile", target, mnt)
        assert run.returncode == 0, run.stderr
        text = target.read_text()
        zbudfs("exporter", "--textfile", target, mnt)
        exact = target.read_text()
    label = f'{{mountpoint="{mnt}"}}'
    assert f"zbudfs_up{label} 1.0\nzbudfs_exact" not in text
    assert f"zbudfs_exact{label} 0.0" in text
    assert f"zbudfs_stored_pages{label} 96.0" in text
    assert f"zbudfs_exact{label} 1.0" in exact
    assert f"zbudfs_raw_pages{label} 100.0" in exact
    for missing in ("zbudfs_raw_pages{", "zbudfs_same_filled_pages{", "zbudfs_compressed_bytes{", "zbudfs_zpages{"):
        assert missing in exact, missing
        assert missing not in text, missing


@pytest.mark.needs("root", "fuse")
def test_a_dead_daemon_is_reported(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old numbers of a dead daemon are not shown as new."""
    mount = find_mount(str(mnt))
    assert mount is not None
    monkeypatch.setattr(public, "STALE_SECONDS", -1.0)
    with pytest.raises(public.PublicError, match="the daemon has died, or hangs"):
        public.read(mount.device)
    with pytest.raises(public.PublicError, match="there are no public statistics"):
        public.read("0:0")


def made(folder: Path, name: str = "mnt", device: str = "0:7") -> tuple[public.PublicFile, Path]:
    """Return a public file of a made-up mount with some numbers, and its path."""
    pool = folder / "zbudfs" / name
    pool.mkdir(parents=True, exist_ok=True)
    public.make_folder(str(pool))
    file = public.PublicFile.create(str(pool), device, ["a text"])
    file.renew({"stored_pages": 16, "warnings": ["some"]})
    return file, folder / f"zbudfs-stats/{name}.json"


@pytest.fixture
def memory() -> Iterator[Path]:
    """Return a folder on a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.needs("root")
def test_a_torn_read_is_seen(memory: Path) -> None:
    """Each wrong byte makes the whole file unreadable, and so does an owner other than root."""
    file, path = made(memory)
    folder = str(path.parent)
    assert public.read("0:7", folder) == {
        "as_of": json.loads(path.read_bytes())["as_of"],
        "stored_pages": 16,
        "warnings": ["some"],
        "rounded": True,
        "renewed_at": json.loads(path.read_bytes())["as_of_monotonic"],
    }
    whole = path.read_bytes()
    for at in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:at] + b"#" + whole[at + 1 :])
        assert public._read(str(path)) == {} or whole[at : at + 1] in b"} ", at
    path.write_bytes(whole)
    os.chown(path, NOBODY, 0)
    with pytest.raises(public.PublicError):
        public.read("0:7", folder)
    os.chown(path, 0, 0)
    file.renew({"warnings": ["x" * 1000] * 20, "stored_pages": 32})
    assert public.read("0:7", folder)["warnings"] == ["root can read more warnings"]


@pytest.mark.needs("root")
def test_files_of_mounts_that_are_gone_are_removed(memory: Path) -> None:
    """A new file removes those of dead mounts. Those of mounts with a pool directory stay."""
    _, first = made(memory, "first")
    _, second = made(memory, "second")
    (memory / "zbudfs/first").rmdir()
    _, third = made(memory, "third")
    assert [path.exists() for path in (first, second, third)] == [False, True, True]
    public.remove(str(memory / "zbudfs/second"))
    assert [path.exists() for path in (second, third)] == [False, True]


@pytest.mark.needs("root")
def test_a_folder_of_another_user_is_refused(memory: Path) -> None:
    """The owner of the folder could put any file there."""
    (memory / "zbudfs-stats").mkdir()
    os.chown(memory / "zbudfs-stats", NOBODY, NOBODY)
    with pytest.raises(public.PublicError, match="must be a directory of root's"):
        made(memory)
