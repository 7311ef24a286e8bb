# SPDX-License-Identifier: MIT
"""The real command and the real mount: up, used, refused, killed, down."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import (
    LIMIT_SECONDS,
    is_mounted,
    is_running,
    mounted,
    run_zbudfs,
    status_of,
    wait_until,
    zbudfs,
)
from zbudfs.cli.main import main
from zbudfs.service.mountpoint import unmount
from zbudfs.swap.attach import release
from zbudfs.swap.loop import run_tool

pytestmark = pytest.mark.needs("root", "fuse")

COUNTERS = (
    *("size_bytes", "pool_limit_bytes", "pool_used_bytes", "stored_pages", "same_filled_pages", "raw_pages"),
    *("compressed_bytes", "written_back_pages", "backing_used_bytes", "backing_size_bytes", "cumul_writeback_bytes"),
    *("cumul_writeback_pages", "cumul_writeback_frames", "cumul_pagein_blocks", "refused_pool_full"),
    *("writeback_failures", "pers_zpages", "pid", "level"),
)


def daemon_pid(mountpoint: Path) -> int:
    """Return the process of a mount."""
    return int((mountpoint / "stats/pid").read_text())


def test_up_and_down(tmp_path: Path) -> None:
    """mount returns when the mount is up. umount returns when the daemon has ended, and only the directory is left."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    assert zbudfs("mount", "--size", "8M", "--pool", "2M", "--backing", "none", mountpoint) == ""
    swapfile = (mountpoint / "swapfile").stat()
    assert (swapfile.st_size, stat.filemode(swapfile.st_mode)) == (8 << 20, "-rw-------")
    pid = daemon_pid(mountpoint)
    assert is_running(pid)
    zbudfs("umount", mountpoint)
    assert not is_running(pid)
    assert not is_mounted(mountpoint)
    assert list(mountpoint.iterdir()) == []


def test_written_bytes_are_read_back(tmp_path: Path) -> None:
    """Reads through the mount return the written bytes, in whole pages and odd ranges."""
    source = random.Random(5)
    with mounted(tmp_path / "mnt") as mountpoint:
        model = bytearray(64 << 20)
        fd = os.open(mountpoint / "swapfile", os.O_RDWR)
        try:
            for _ in range(60):
                start = source.randrange(len(model) - (1 << 18))
                data = source.randbytes(source.randrange(1, 5000)) * source.randrange(1, 40)
                assert os.pwrite(fd, data, start) == len(data)
                model[start : start + len(data)] = data
            for start in range(0, len(model), 1 << 20):
                assert os.pread(fd, 1 << 20, start) == model[start : start + (1 << 20)], f"at {start}"
        finally:
            os.close(fd)
        assert status_of(mountpoint)["stored_pages"] > 0


@pytest.mark.parametrize("name", ["with space", "ünïcödé €", "new\nline", "-dash", "quote'\"$`*", "back\\slash\ttab"])
def test_a_mountpoint_may_have_any_name(name: str, tmp_path: Path) -> None:
    """Mount, status and umount accept a relative path in the folder itself."""
    mountpoint = tmp_path / name
    mountpoint.mkdir()
    zbudfs("mount", "--size", "4M", "--pool", "1M", "--backing", "none", "--", name, cwd=tmp_path)
    try:
        assert json.loads(zbudfs("status", "--json", "--", name, cwd=tmp_path))["mountpoint"] == str(mountpoint)
        assert name.isprintable() or name not in zbudfs("status", mountpoint)
    finally:
        zbudfs("umount", f"./{name}", cwd=tmp_path)
    assert not is_mounted(mountpoint)


def test_a_mountpoint_need_not_be_text(tmp_path: Path) -> None:
    """A path with bytes that are no UTF-8 works."""
    mountpoint = tmp_path / os.fsdecode(b"latin \xe4")
    with mounted(mountpoint, "--size", "4M", "--pool", "1M"):
        assert status_of(mountpoint)["mountpoint"] == str(mountpoint)


def test_a_symbolic_link_leads_to_the_mountpoint(tmp_path: Path) -> None:
    """The mount is on the directory that the link leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    zbudfs("mount", "--size", "4M", "--pool", "1M", "--backing", "none", tmp_path / "link")
    assert is_mounted(tmp_path / "real")
    assert zbudfs("status", tmp_path / "link").startswith(str(tmp_path / "real"))
    zbudfs("umount", tmp_path / "link")


def test_two_mounts_at_once(tmp_path: Path) -> None:
    """Each mount keeps its own content, and status without a mountpoint lists both."""
    with mounted(tmp_path / "one", "--size", "4M") as one, mounted(tmp_path / "two", "--size", "8M") as two:
        for mountpoint, byte in ((one, b"1"), (two, b"2")):
            with (mountpoint / "swapfile").open("r+b") as file:
                file.write(byte * 8192)
        assert (one / "swapfile").read_bytes()[:8192] == b"1" * 8192
        assert (two / "swapfile").read_bytes()[:8192] == b"2" * 8192
        # The exit status is 1 if another zbudfs on this machine does not answer.
        reports = json.loads(run_zbudfs("status", "--json").stdout)
        listed = {report["mountpoint"]: report.get("size_bytes") for report in reports}
        assert listed[str(one)] == 4 << 20
        assert listed[str(two)] == 8 << 20
        assert daemon_pid(one) != daemon_pid(two)


def test_one_backing_file_is_not_for_two(tmp_path: Path) -> None:
    """A second daemon on the same backing file is refused, and the first one continues."""
    with mounted(tmp_path / "one", "--backing", tmp_path / "backing") as one:
        (tmp_path / "two").mkdir()
        run = run_zbudfs("mount", "--size", "4M", "--pool", "1M", "--backing", tmp_path / "backing", tmp_path / "two")
        assert run.returncode == 1
        assert "in use" in run.stderr
        assert run.stderr.count("\n") == 1
        assert not is_mounted(tmp_path / "two")
        assert status_of(one)["size_bytes"] == 64 << 20


def test_mounting_twice_is_refused(tmp_path: Path) -> None:
    """A directory can have one zbudfs."""
    with mounted(tmp_path / "mnt") as mountpoint:
        run = run_zbudfs("mount", mountpoint)
        assert (run.returncode, run.stderr) == (1, f"zbudfs: zbudfs is mounted on {mountpoint} already\n")


def test_status_has_every_number(tmp_path: Path) -> None:
    """Status has each promised number, as JSON and as a page."""
    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing") as mountpoint:
        found = status_of(mountpoint)
        for name in COUNTERS:
            assert type(found[name]) is int, name
        for name in ("unbuddied_lists", "chunk_histogram"):
            assert len(found[name]) == 64
        assert all(isinstance(warning, str) for warning in found["warnings"])
        assert found["backing_path"] == str(tmp_path / "backing")
        assert found["users"] == []
        page = zbudfs("status", mountpoint)
        assert page.startswith(f"{mountpoint}\n")
        assert "not in use" in page
        for warning in found["warnings"]:
            assert " ".join(page.split()).count(warning) == 1


def test_nothing_stays_in_the_backing_file(tmp_path: Path) -> None:
    """Pages beyond the pool are written to a private file, and none of them is left after umount."""
    backing = tmp_path / "backing"
    secret = b"somebody's memory "
    source = random.Random(8)
    with mounted(tmp_path / "mnt", "--pool", "2M", "--backing", backing) as mountpoint:
        assert stat.filemode(backing.stat().st_mode) == "-rw-------"
        with (mountpoint / "swapfile").open("r+b", buffering=0) as file:
            for _ in range(16):
                file.write(b"".join(secret + source.randbytes(4096 - len(secret)) for _ in range(256)))
        wait_until(lambda: status_of(mountpoint)["written_back_pages"] > 0, "writeback")
    assert secret not in backing.read_bytes() if backing.exists() else True


def test_a_loop_device_keeps_it_mounted(tmp_path: Path) -> None:
    """umount names the loop device and refuses, and works when the device is gone."""
    with mounted(tmp_path / "mnt") as mountpoint:
        device = run_tool(["losetup", "--find", "--show", str(mountpoint / "swapfile")], limit_seconds=LIMIT_SECONDS)
        try:
            run = run_zbudfs("umount", mountpoint)
            assert run.returncode == 1
            assert f"loop device {device}" in run.stderr
            assert status_of(mountpoint)["users"] == [f"loop device {device}"]
        finally:
            release(device)
        zbudfs("umount", mountpoint)


def test_an_open_file_keeps_it_mounted(tmp_path: Path) -> None:
    """umount refuses, and no page is lost."""
    with mounted(tmp_path / "mnt") as mountpoint, (mountpoint / "swapfile").open("r+b") as file:
        file.write(b"kept")
        file.flush()
        run = run_zbudfs("umount", mountpoint)
        assert run.returncode == 1
        assert "it is in use" in run.stderr
        file.seek(0)
        assert file.read(4) == b"kept"


def test_a_mountpoint_that_is_not_empty(tmp_path: Path) -> None:
    """The mount is made, as mount(8) would, and a message says that the directory is not empty."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    for entries in (0, 1):
        if entries:
            (mountpoint / "file").touch()
        run = run_zbudfs("mount", "--size", "4M", "--pool", "1M", "--backing", "none", mountpoint)
        assert run.returncode == 0
        assert ("is not empty: the mount hides its files" in run.stderr) == bool(entries)
        zbudfs("umount", mountpoint)


def test_umount_from_another_pid_namespace(tmp_path: Path) -> None:
    """A daemon whose pid is unknown here is alive: its used mount stays, and umount waits for its end."""
    command = ["unshare", "--pid", "--fork", sys.executable, "-m", "zbudfs", "umount"]
    with mounted(tmp_path / "mnt") as mountpoint:
        pid = daemon_pid(mountpoint)
        with (mountpoint / "swapfile").open("r+b", buffering=0) as file:
            file.write(b"kept")
            run = subprocess.run(
                [*command, mountpoint], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
            )
            assert run.returncode == 1
            assert "it is in use" in run.stderr
            assert is_mounted(mountpoint)
            file.seek(0)
            assert file.read(4) == b"kept"
        subprocess.run([*command, mountpoint], check=True, timeout=LIMIT_SECONDS)
        assert not is_mounted(mountpoint)
        wait_until(lambda: not is_running(pid), "the keeper's end")


def test_umount_of_the_system_is_understood(tmp_path: Path) -> None:
    """umount(8) ends the daemon as well."""
    with mounted(tmp_path / "mnt") as mountpoint:
        pid = daemon_pid(mountpoint)
        run_tool(["umount", str(mountpoint)], limit_seconds=LIMIT_SECONDS)
        wait_until(lambda: not is_running(pid), "the daemon's end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM and SIGINT unmount if nothing is attached."""
    with mounted(tmp_path / "mnt") as mountpoint:
        pid = daemon_pid(mountpoint)
        os.kill(pid, number)
        wait_until(lambda: not is_running(pid), "the daemon's end")
        assert not is_mounted(mountpoint)


def test_a_signal_does_not_end_it_while_it_is_used(tmp_path: Path) -> None:
    """With a loop device attached, SIGTERM is refused. Without the device, a second SIGTERM unmounts."""
    with mounted(tmp_path / "mnt") as mountpoint:
        pid = daemon_pid(mountpoint)
        device = run_tool(["losetup", "--find", "--show", str(mountpoint / "swapfile")], limit_seconds=LIMIT_SECONDS)
        try:
            os.kill(pid, signal.SIGTERM)
            log = mountpoint / "stats/log"
            wait_until(lambda: not log.exists() or "SIGTERM" in log.read_text(), "the daemon's answer")
            assert is_running(pid)
            assert status_of(mountpoint)["users"] == [f"loop device {device}"]
        finally:
            release(device)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_running(pid), "the daemon's end")


def kill_all(mountpoint: Path) -> None:
    """Kill keeper, worker and standby at once, as the OOM killer might, and wait for their end."""
    wait_until(lambda: bool(status_of(mountpoint)["standby_ready"]), "the standby")
    found = status_of(mountpoint)
    pids = [found[name] for name in ("keeper_pid", "worker_pid", "standby_pid") if found[name]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in pids), "the processes' end")


def test_after_a_daemon_was_killed(tmp_path: Path) -> None:
    """status reports it, mount says what to do, umount cleans up, and the directory can be used again."""
    mountpoint = tmp_path / "mnt"
    with mounted(mountpoint):
        kill_all(mountpoint)
        assert is_mounted(mountpoint)
        for command in ("status", "mount"):
            run = run_zbudfs(command, mountpoint)
            assert run.returncode == 1
            assert "died" in run.stderr
            assert f"zbudfs umount {mountpoint}" in run.stderr
        listing = run_zbudfs("status", "--json")
        assert listing.returncode == 1
        assert [True for report in json.loads(listing.stdout) if "died" in report.get("error", "")]
        zbudfs("umount", mountpoint)
        assert not is_mounted(mountpoint)
    with mounted(mountpoint):
        assert status_of(mountpoint)["stored_pages"] == 0


def test_the_default_backing_file(tmp_path: Path) -> None:
    """The file is below /var/lib/zbudfs, named after the mountpoint, and umount empties it after a crash."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    zbudfs("mount", "--size", "16M", "--pool", "1M", mountpoint)
    backing = Path(status_of(mountpoint)["backing_path"])
    try:
        assert backing.parent == Path("/var/lib/zbudfs")
        assert stat.filemode(backing.parent.stat().st_mode) == "drwx------"
        kill_all(mountpoint)
        zbudfs("umount", mountpoint)
        assert backing.stat().st_size == 0
    finally:
        backing.unlink(missing_ok=True)


def test_ctrl_c_in_the_foreground(tmp_path: Path) -> None:
    """The command stays until Ctrl-C, which unmounts, and has the daemon's exit status."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = ["--foreground", "--size", "4M", "--pool", "1M", "--backing", "none"]
    command = [sys.executable, "-m", "zbudfs", "mount", *options, str(mountpoint)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while not any("Ctrl-C ends it" in line for line in lines):
                lines.append(process.stderr.readline())
                assert lines[-1], f"it ended: {lines}"
            assert is_mounted(mountpoint)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
            _, err = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not is_mounted(mountpoint)


def test_a_mount_taken_away_lazily_is_no_obstacle(tmp_path: Path) -> None:
    """An old mount that another process still uses does not count as a user of the new one."""
    mountpoint = tmp_path / "mnt"
    with mounted(mountpoint):
        pid = daemon_pid(mountpoint)
        with (mountpoint / "swapfile").open("rb"):
            unmount(str(mountpoint), lazy=True)
            with mounted(mountpoint):
                assert status_of(mountpoint)["users"] == []
                assert daemon_pid(mountpoint) != pid
        wait_until(lambda: not is_running(pid), "the first daemon's end")


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize(
    ("ram_mib", "words"), [(256, "does not pay below 288 MiB of RAM"), (512, "which saves"), (4096, "")]
)
def test_a_machine_with_little_ram(
    ram_mib: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says how much RAM zbudfs takes and saves. With more RAM there is no such line."""
    monkeypatch.setattr("zbudfs.cli.plan.ram_bytes", lambda root="/": ram_mib << 20)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    assert main(["mount", "--size", f"{ram_mib}M", "--backing", "none", str(mountpoint)]) == 0
    try:
        lines = [line for line in capsys.readouterr().err.splitlines() if "zbudfs itself takes" in line]
    finally:
        assert main(["umount", str(mountpoint)]) == 0
    assert len(lines) == bool(words)
    assert all(words in line for line in lines)
