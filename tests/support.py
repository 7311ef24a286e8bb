# SPDX-License-Identifier: MIT
"""What tests of the whole thing share: the command, waiting with a limit, and what is left on the machine.

Everything that a test makes lies under pytest's temporary directory or carries this process's id, so what a test left
behind can be told from what somebody else runs on the same machine, and only the former is ever touched.
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

from scripts.cell import PREFIX, CellError, find_tree
from zbudfs.service.mountpoint import MountError, unmount, zbudfs_mounts
from zbudfs.swap.loop import SwapError, loop_devices, run_tool, swaps

ROOT: Final = Path(__file__).resolve().parent.parent
LIMIT_SECONDS: Final = 60.0
"""Longest wait for anything. A failure, not a measurement: no test passes or fails by the clock otherwise."""
RUN_VARIABLE: Final = "ZBUDFS_TEST_RUN"
"""Environment variable that marks every process that a test run has started, daemons as well."""
PACKING: Final = os.environ.get("ZBUDFS_TEST_PACKING", "zbud")
"""Packing of a mount for which the test says none."""


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
    """Run a module of tests as a program, which must succeed; return the JSON object that it printed."""
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
    """Have a zbudfs of 64 MiB with a pool of 16 MiB and no backing file, or as `options` say, for a while.

    `writers` is how many files may have its swapfile open for writing at the same moment.
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
    """Whether a zbudfs is mounted there, alive or dead."""
    return any(mount.mountpoint == str(mountpoint) for mount in zbudfs_mounts())


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` holds; fail the test when it does not within `LIMIT_SECONDS`."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {LIMIT_SECONDS:g} s for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def sweep(folder: Path) -> list[str]:
    """Take away what tests left behind, and return what that was.

    Swap, loop devices and mounts count if their path lies below `folder`; cgroups if they carry the id of this
    process; daemons if they were started with `folder` in the environment.
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
        found.append(f"loop device {loop.path} ({loop.backing_file})")
        with contextlib.suppress(SwapError):
            run_tool(["losetup", "--detach", loop.path], limit_seconds=LIMIT_SECONDS)
    for mount in zbudfs_mounts():
        if mount.mountpoint.startswith(inside):
            found.append(f"mount on {mount.mountpoint}")
            with contextlib.suppress(MountError):
                unmount(mount.mountpoint, lazy=True)
    for pid in _daemons(folder):
        # One that was just told to end, or lost its mount above, may be on its way.
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
    """Return the processes called zbudfs that were started in this test run."""
    mark = f"{RUN_VARIABLE}={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() == "zbudfs" and mark in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                found.append(int(entry.name))
    return found
