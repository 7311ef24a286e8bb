# SPDX-License-Identifier: MIT
"""Attaching for real, to a plain file in the place of a zbudfs: what was done is undone when a step fails."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS
from zbudfs.swap.attach import attach
from zbudfs.swap.detach import detach
from zbudfs.swap.loop import SwapError, loop_devices, run_tool, swaps

pytestmark = pytest.mark.needs("root", "loop", "swap")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a swapfile on an ordinary disk, which must take direct I/O."""
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
    """Return how the queue of a device is set; what this kernel has not got is as wanted."""
    found = {"rq_affinity": "2\n", "wbt_lat_usec": "0\n"}
    for name in found:
        with contextlib.suppress(OSError):
            found[name] = Path("/sys/block", Path(device).name, "queue", name).read_text()
    return found


def test_there_and_back(folder: Path) -> None:
    """After attach the device is swap with the priority asked for; after detach nothing is left."""
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


def test_a_step_that_fails_undoes_those_before(folder: Path) -> None:
    """A file too small for mkswap leaves no loop device behind."""
    os.truncate(folder / "swapfile", 4096)
    with pytest.raises(SwapError, match="mkswap"):
        attach(str(folder))


def test_a_loop_device_without_swap_is_detached(folder: Path) -> None:
    """What somebody has attached by hand is taken away as well."""
    device = run_tool(["losetup", "--find", "--show", str(folder / "swapfile")], limit_seconds=LIMIT_SECONDS)
    assert detach([(str(folder), None)]) == [device]
