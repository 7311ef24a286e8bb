# SPDX-License-Identifier: MIT
"""Attach and detach a plain file in the place of a zbudfs: if a step fails, the steps before it are undone."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import LIMIT_SECONDS, wait_until
from zbudfs.swap.attach import attach
from zbudfs.swap.detach import detach
from zbudfs.swap.discard import kept_discard
from zbudfs.swap.loop import SwapError, loop_devices, run_tool, swaps

pytestmark = pytest.mark.needs("root", "loop", "swap")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a swapfile on an ordinary disk that accepts direct I/O."""
    swapfile = tmp_path / "swapfile"
    swapfile.write_bytes(bytes(4 << 20))
    try:
        os.close(os.open(swapfile, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary directory takes no direct I/O")
    yield tmp_path
    assert attached_to(swapfile) == []


def attached_to(swapfile: Path) -> list[str]:
    """Return the loop devices on a file."""
    return [loop.path for loop in loop_devices() if loop.backing_file == str(swapfile)]


def tuning(device: str) -> dict[str, str]:
    """Return the settings of a device's queue. A setting that this kernel lacks counts as wanted."""
    found = {"rq_affinity": "2\n", "wbt_lat_usec": "0\n"}
    for name in found:
        with contextlib.suppress(OSError):
            found[name] = Path("/sys/block", Path(device).name, "queue", name).read_text()
    return found


def test_there_and_back(folder: Path) -> None:
    """The device is swap with the requested priority after attach, and nothing is left after detach."""
    device = attach(str(folder), priority=7)
    try:
        assert attached_to(folder / "swapfile") == [device]
        (mine,) = [swap for swap in swaps() if swap.path == device]
        assert mine.priority == 7
        assert mine.size_bytes == (4 << 20) - 4096
        block = Path("/sys/block", Path(device).name)
        assert (block / "loop/dio").read_text() == "1\n"
        assert (block / "queue/logical_block_size").read_text() == "4096\n"
        assert tuning(device) == {"rq_affinity": "2\n", "wbt_lat_usec": "0\n"}
    finally:
        assert detach([(str(folder), None)]) == [device]
    assert tuning(device)["rq_affinity"] == "1\n"
    assert tuning(device)["wbt_lat_usec"] != "0\n"
    assert device not in [swap.path for swap in swaps()]


@pytest.mark.parametrize(
    ("discard", "option"), [(None, "--discard"), ("pages", "--discard"), ("once", "--discard=once")]
)
def test_discards(discard: str | None, option: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """swapon(8) gets the choice, and the loop device keeps it until it is detached, also when the swap is off."""
    commands = []

    def run(command: list[str | bytes], **limits: Any) -> str:
        commands.append(command)
        return run_tool(command, **limits)

    monkeypatch.setattr("zbudfs.swap.attach.run_tool", run)
    device = attach(str(folder)) if discard is None else attach(str(folder), discard=discard)
    try:
        assert ["swapon", option, device] in commands
        run_tool(["swapoff", device], limit_seconds=LIMIT_SECONDS)
        assert kept_discard(device) == (discard or "pages")
    finally:
        detach([(str(folder), None)])
    assert kept_discard(device) is None


def test_a_device_that_udev_reads_is_not_detached_meanwhile(folder: Path) -> None:
    """udev locks the device with flock(2) while it reads it. A read of a device without a file would be an I/O error."""
    device = attach(str(folder))
    code = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH); print(flush=True); input()"
    with (
        subprocess.Popen([sys.executable, "-c", code, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader,
        ThreadPoolExecutor() as pool,
    ):
        assert reader.stdin is not None and reader.stdout is not None
        reader.stdout.readline()
        detached = pool.submit(detach, [(str(folder), None)])
        wait_until(lambda: device not in [swap.path for swap in swaps()], "the end of swap")
        time.sleep(0.3)
        assert Path("/sys/block", Path(device).name, "loop/autoclear").read_text() == "0\n"  # losetup has not run
        reader.stdin.close()
        assert detached.result(LIMIT_SECONDS) == [device]


def test_a_step_that_fails_undoes_those_before(folder: Path) -> None:
    """A file that is too small for mkswap leaves no loop device behind."""
    os.truncate(folder / "swapfile", 4096)
    with pytest.raises(SwapError, match="mkswap"):
        attach(str(folder))


def test_a_loop_device_without_swap_is_detached(folder: Path) -> None:
    """A loop device that was attached by hand is detached as well."""
    device = run_tool(["losetup", "--find", "--show", str(folder / "swapfile")], limit_seconds=LIMIT_SECONDS)
    assert kept_discard(device) is None
    assert detach([(str(folder), None)]) == [device]
