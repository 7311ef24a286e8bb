# SPDX-License-Identifier: MIT
"""Helpers that tests share: run the command, wait with a limit, and find what a test left on the machine.

A test works below pytest's temporary directory, or marks its things with the id of this process. So the clean-up finds
the things of this run, and touches no others on the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from kit.cell import PREFIX, CellError, find_tree
from zbudfs.service.mountpoint import MountError, unmount, zbudfs_mounts
from zbudfs.swap.attach import release
from zbudfs.swap.loop import SwapError, loop_devices, run_tool, swaps

ROOT: Final = Path(__file__).resolve().parent.parent
LIMIT_SECONDS: Final = 60.0
"""The longest wait for any event. Its end is a failure: apart from this, no test depends on the clock."""
RUN_VARIABLE: Final = "ZBUDFS_TEST_RUN"
"""The environment variable that marks each process that a test run has started, daemons included."""
PACKING: Final = os.environ.get("ZBUDFS_TEST_PACKING", "zbud")
"""The packing of each mount for which a test names none."""


def run_zbudfs(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command `zbudfs` to its end and return what it printed and its exit status."""
    command = [sys.executable, "-m", "zbudfs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, cwd=cwd, check=False)


def zbudfs(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run the command `zbudfs`, which must succeed; return what it printed."""
    run = run_zbudfs(*arguments, cwd=cwd)
    assert run.returncode == 0, f"zbudfs {arguments} failed: {run.stderr}"
    return run.stdout


def printed_by(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module of tests as a program, which must succeed, and return the JSON object that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=4 * LIMIT_SECONDS, cwd=ROOT, check=True)
    found = json.loads(run.stdout)
    assert isinstance(found, dict)
    return found


def status_of(mountpoint: Path) -> dict[str, Any]:
    """Return `zbudfs status --json` of one mount."""
    found = json.loads(zbudfs("status", "--json", mountpoint))
    assert isinstance(found, dict)
    return found


@contextlib.contextmanager
def mounted(mountpoint: Path, *options: str | Path, writers: int = 1) -> Iterator[Path]:
    """Mount a zbudfs for the block: 64 MiB, a pool of 16 MiB, no backing file, unless `options` say otherwise.

    `writers` is the number of files that may have its swapfile open for writing at the same moment.
    """
    mountpoint.mkdir(exist_ok=True)
    zbudfs("mount", "--size", "64M", "--pool", "16M", "--packing", PACKING, "--backing", "none", *options, mountpoint)
    try:
        if writers > 1:
            (mountpoint / "control/writers").write_text(str(writers))
        yield mountpoint
    finally:
        if is_mounted(mountpoint):
            zbudfs("umount", mountpoint)


def is_mounted(mountpoint: Path) -> bool:
    """Return whether a zbudfs is mounted there, alive or dead."""
    return any(mount.mountpoint == str(mountpoint) for mount in zbudfs_mounts())


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds. Fail the test if it does not hold within `LIMIT_SECONDS`."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT_SECONDS:g} s for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended. A zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def stop(pid: int) -> None:
    """Stop a process with SIGSTOP, and wait until each of its threads has stopped."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(_state(task) == "T" for task in Path(f"/proc/{pid}/task").iterdir()), "the stop")


@contextlib.contextmanager
def stopped(mountpoint: Path) -> Iterator[None]:
    """Stop all processes of a mount for the block, so that none serves it."""
    wait_until(lambda: status_of(mountpoint)["standby_ready"] is True, "the standby")
    status = status_of(mountpoint)
    pids = [status[name] for name in ("keeper_pid", "standby_pid", "worker_pid")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)


def _state(task: Path) -> str:
    """Return the state of a task, one letter, as in /proc/PID/stat."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def detach(device: str) -> None:
    """Detach a loop device, and wait until the last program has closed it. A failure names the processes that have it open."""
    try:
        release(device)
    except SwapError as error:
        raise AssertionError(f"{error}; open in {_users_of(device)}") from None


def _users_of(device: str) -> str:
    """Return the processes that have a device open, by name and id, for a message."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(fd.is_symlink() and str(fd.readlink()) == device for fd in (entry / "fd").iterdir()):
                found.append(f"{(entry / 'comm').read_text().strip()} ({entry.name})")
    return ", ".join(found) or "no process"


def sweep(folder: Path) -> list[str]:
    """Remove what tests left behind, and return a list of it.

    Swap, loop devices and mounts count if their path is below `folder`. Cgroups count if their names have the id of
    this process. Daemons count if `folder` is in their environment.
    """
    inside = f"{folder}/"
    found = []
    loops = [loop for loop in loop_devices() if loop.backing_file.startswith(inside)]
    active = {swap.path for swap in swaps()}
    for loop in loops:
        if loop.path in active:
            found.append(f"swap on {loop.path}")
            with contextlib.suppress(SwapError):
                run_tool(["swapoff", loop.path], limit_seconds=LIMIT_SECONDS)
        found.append(f"loop device {loop.path} ({loop.backing_file}), open in {_users_of(loop.path)}")
        with contextlib.suppress(AssertionError):
            detach(loop.path)
    for mount in zbudfs_mounts():
        if mount.mountpoint.startswith(inside):
            found.append(f"mount on {mount.mountpoint}")
            with contextlib.suppress(MountError):
                unmount(mount.mountpoint, lazy=True)
    for pid in _daemons(folder):
        # One that has just got the order to end, or lost its mount above, may be about to end.
        with contextlib.suppress(AssertionError):
            wait_until(lambda pid=pid: not is_running(pid), "a daemon's end")  # type: ignore[misc]
            continue
        found.append(f"daemon {pid}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(CellError):
        for cell in find_tree().path.glob(f"{PREFIX}*-{os.getpid()}"):
            found.append(f"cgroup {cell}")
            with contextlib.suppress(OSError):
                cell.rmdir()
    return found


def _daemons(folder: Path) -> list[int]:
    """Return the processes called zbudfs that this test run started."""
    mark = f"{RUN_VARIABLE}={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() == "zbudfs" and mark in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(entry.name))
    return found
