# SPDX-License-Identifier: MIT
"""Two commands on one mountpoint: one waits for the other, for each pair of commands, and nothing is mixed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS, ROOT, is_mounted, run_zbudfs, status_of, zbudfs
from zbudfs.cli.alone import alone
from zbudfs.cli.errors import CommandError
from zbudfs.service.launch import LaunchError, start
from zbudfs.service.locks import COMMANDS, LockHeld, MountpointLock, coming_up
from zbudfs.service.mountpoint import MountError
from zbudfs.service.pooldir import RUN_FOLDER, path_of
from zbudfs.service.settings import Settings
from zbudfs.swap.loop import loop_devices, swaps

pytestmark = pytest.mark.needs("root", "fuse", "loop", "swap")

OPTIONS = ("--size", "64M", "--pool", "8M", "--backing", "none")


def started(*words: str | Path) -> subprocess.Popen[str]:
    """Start a command of zbudfs."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command, and return its exit status and its stderr."""
    try:
        _, err = process.communicate(timeout=2 * LIMIT_SECONDS)
    finally:
        process.kill()
    return process.returncode, err


def locks_left(mountpoint: Path) -> list[str]:
    """Return the lock files of a mountpoint."""
    return [str(path) for path in Path(RUN_FOLDER).glob(".*/*") if path.name == Path(path_of(str(mountpoint))).name]


@pytest.mark.parametrize("command", ["mount", "umount", "swapon", "swapoff", "restart"])
def test_every_command_takes_the_lock(command: str, tmp_path: Path) -> None:
    """Each command waits until the lock is free, says whom it waits for, and then acts or refuses."""
    place = tmp_path / "not there"
    with alone("made-up", str(place)):
        process = started("zbudfs", command, place)
        try:
            assert process.stderr is not None
            first = process.stderr.readline()
        except BaseException:
            process.kill()
            raise
        assert first.startswith(
            f"zbudfs: waiting for another zbudfs command (made-up, pid {os.getpid()}), which works on"
        )
    status, err = ended(process)
    assert status == 1
    assert "no zbudfs is mounted" in err or "does not exist" in err


def test_a_wait_has_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that waits in vain says which command is at work, and what to do."""
    with (
        alone("swapoff", str(tmp_path)),
        pytest.raises(
            CommandError,
            match=rf"another zbudfs command \(swapoff, pid {os.getpid()}\) works on .*: run this command again",
        ),
        alone("swapon", str(tmp_path), 0.1),
    ):
        pass
    with alone("swapon", str(tmp_path), 0.0):
        assert len(locks_left(tmp_path)) == 1
    assert locks_left(tmp_path) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [("", "/1", True), ("/1", "", True), ("/1", "/1", True), ("/1", "/2", False), ("/99", "", False), ("", "x", False)],
)
def test_instances_and_the_whole(first: str, second: str, meet: bool, tmp_path: Path) -> None:
    """A command on all instances excludes those on one of them, and the reverse. Two instances do not exclude each other."""
    with alone("first", f"{tmp_path}/z{first}"), contextlib.ExitStack() as stack:
        if meet:
            with pytest.raises(CommandError, match="first, pid"):
                stack.enter_context(alone("second", f"{tmp_path}/z{second}", 0.0))
        else:
            stack.enter_context(alone("second", f"{tmp_path}/z{second}", 0.0))


def test_a_killed_holder_and_the_program_it_started(tmp_path: Path) -> None:
    """The lock is free when both have ended, and not before, since the program of the dead command still works."""
    code = (
        "import sys; from zbudfs.cli.alone import alone; from zbudfs.swap.loop import run_tool\n"
        "with alone('swapon', sys.argv[1]): print('has it', flush=True); run_tool(['sleep', '60'], limit_seconds=None)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "has it\n"
            children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
            end = time.monotonic() + LIMIT_SECONDS
            while not children.read_text():
                assert time.monotonic() < end
            holder.kill()
            holder.wait()
            with pytest.raises(LockHeld, match=f"swapon, pid {holder.pid}"):
                MountpointLock.take(COMMANDS, str(tmp_path), "test")
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
    with alone("test", str(tmp_path), LIMIT_SECONDS):
        pass


def test_two_daemons_that_come_up(tmp_path: Path) -> None:
    """The second daemon is refused, whichever command starts it."""
    place = tmp_path / "mnt"
    place.mkdir()
    with coming_up(str(place)):
        with pytest.raises(MountError, match=f"another zbudfs .pid {os.getpid()}. is being"), coming_up(str(place)):
            pass
        with pytest.raises(LaunchError, match="is being mounted"):
            start(Settings(mountpoint=str(place), size_bytes=4 << 20, pool_bytes=1 << 20, backing=None))
        with pytest.raises(CommandError, match="a daemon that starts up"), alone("mount", str(place), 0.1):
            pass
    assert not is_mounted(place)
    with coming_up(str(place)):
        pass


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Return a directory to mount on. Nothing is mounted there afterwards."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    if is_mounted(folder):
        zbudfs("swapoff", "--umount", folder)


def state_of(mountpoint: Path) -> tuple[int, int, int]:
    """Return the number of mounts, loop devices and swaps."""
    mounts = sum(f" {mountpoint} " in line for line in Path("/proc/self/mountinfo").read_text().splitlines())
    loops = [loop.path for loop in loop_devices() if loop.backing_file == f"{mountpoint}/swapfile"]
    return mounts, len(loops), len([swap for swap in swaps() if swap.path in loops])


@pytest.mark.parametrize(
    ("before", "first", "second", "possible"),
    [
        ("mounted", "swapon", "swapon", {(1, 1, 1)}),
        ("mounted", "swapon", "umount", {(1, 1, 1), (0, 0, 0)}),
        ("", "mount", "mount", {(1, 0, 0)}),
        ("swap", "swapoff", "swapon", {(1, 0, 0), (1, 1, 1)}),
        ("mounted", "swapon", "restart", {(1, 1, 1)}),
        ("mounted", "umount", "mount", {(1, 0, 0), (0, 0, 0)}),
    ],
)
def test_a_race(before: str, first: str, second: str, possible: set[tuple[int, int, int]], mountpoint: Path) -> None:
    """Two commands at once leave the same state as one after the other, and the one that fails gives the reason."""
    if before:
        zbudfs("mount", *OPTIONS, mountpoint)
    if before == "swap":
        zbudfs("swapon", mountpoint)
    options = {"mount": OPTIONS}
    both = [started("zbudfs", command, *options.get(command, ()), mountpoint) for command in (first, second)]
    said = [ended(process) for process in both]
    assert state_of(mountpoint) in possible, said
    statuses = sorted(status for status, _ in said)
    assert statuses in ([0, 0], [0, 1]), said
    assert first != second or statuses == [0, 1], said
    for status, err in said:
        if status:
            assert err.splitlines()[-1].startswith("zbudfs: ")
            assert str(mountpoint) in err
    if is_mounted(mountpoint):
        assert status_of(mountpoint)["recoveries"] <= 1
    assert locks_left(mountpoint) == []


def test_swapon_that_is_killed(mountpoint: Path) -> None:
    """The next swapon takes over the remains of one that was killed at any moment, and each thing is there once."""
    for step in range(8):
        first = started("zbudfs", "swapon", *OPTIONS, mountpoint)
        time.sleep(0.15 + 0.08 * step)
        first.kill()
        ended(first)
        second = run_zbudfs("swapon", *OPTIONS, mountpoint)
        if "can only be set at mount" in second.stderr:
            second = run_zbudfs("swapon", mountpoint)
        assert second.returncode == 0 or "is in use already: swap on" in second.stderr, second.stderr
        assert state_of(mountpoint) == (1, 1, 1), f"at step {step}"
        zbudfs("swapoff", "--umount", mountpoint)
