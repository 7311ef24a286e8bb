# SPDX-License-Identifier: MIT
"""`zbudfs hibernate`: swap goes off and comes back, or nothing is changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS, is_mounted, run_zbudfs, zbudfs
from zbudfs.cli import hibernate
from zbudfs.cli.target import CommandError
from zbudfs.service.mountpoint import zbudfs_mounts
from zbudfs.swap.loop import Swap, SwapError, loop_devices, swaps


def test_where_an_image_has_a_place() -> None:
    """On a disk: not in memory, and not behind a loop device."""
    paths = ["/dev/zram0", "/dev/loop3", "/dev/ram1", "/dev/sda2", "/swapfile", "/dev/dm-1"]
    found = hibernate.image_places([Swap(path, 1 << 30, 0, -2) for path in paths])
    assert [swap.path for swap in found] == ["/dev/sda2", "/swapfile", "/dev/dm-1"]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """A directory with swap on a zbudfs, which is gone afterwards."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    zbudfs("swapon", "--size", "16M", "--pool", "4M", "--backing", "none", "--priority", "7", folder)
    yield folder
    if is_mounted(folder):
        zbudfs("swapoff", "--umount", folder)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """Another swap, on a file."""
    file = tmp_path / "other-swap"
    file.touch(mode=0o600)
    for command in (["fallocate", "-l", "16M"], ["mkswap"], ["swapon", "--priority", "0"]):
        subprocess.run([*command, str(file)], check=True, capture_output=True, timeout=LIMIT_SECONDS)
    yield file
    subprocess.run(["swapoff", file], check=True, timeout=LIMIT_SECONDS)


def on_loops(mountpoint: Path) -> list[tuple[str, int]]:
    """Return the swaps on this zbudfs with their priorities."""
    ours = {loop.path for loop in loop_devices() if loop.backing_file.startswith(f"{mountpoint}/")}
    return [(swap.path, swap.priority) for swap in swaps() if swap.path in ours]


@pytest.fixture(autouse=True)
def only_ours(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command see no other zbudfs of this machine."""
    mounts = zbudfs_mounts
    monkeypatch.setattr(
        hibernate, "zbudfs_mounts", lambda: [mount for mount in mounts() if mount.mountpoint == str(mountpoint)]
    )


pytestmark = pytest.mark.needs("root", "fuse", "loop", "swap")


def test_off_and_on_again(mountpoint: Path, other: Path) -> None:
    """With the priority of before; a second `finish` has nothing to do."""
    before = on_loops(mountpoint)
    assert [priority for _, priority in before] == [7]
    assert hibernate.prepare() == 0
    assert on_loops(mountpoint) == []
    assert any(swap.path == str(other) for swap in swaps())
    assert hibernate.finish() == 0
    assert [priority for _, priority in on_loops(mountpoint)] == [7]
    assert hibernate.finish() == 0
    assert len(on_loops(mountpoint)) == 1


def test_refused_without_a_place_for_the_image(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is changed, and the message says what to add."""
    monkeypatch.setattr(hibernate, "image_places", lambda others: [])
    before = on_loops(mountpoint)
    with pytest.raises(CommandError, match="no swap for the image"):
        hibernate.prepare()
    assert on_loops(mountpoint) == before
    assert not Path("/", hibernate.NOTE).exists()


def test_refused_without_room(mountpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine goes on as it was, also when a part of the swap had gone off already."""

    def fail(mounts: object) -> list[str]:
        subprocess.run(["swapoff", before[0][0]], check=True, timeout=LIMIT_SECONDS)
        raise SwapError("not enough memory for swapoff")

    before = on_loops(mountpoint)
    monkeypatch.setattr(hibernate, "detach", fail)
    with pytest.raises(SwapError, match="cannot hibernate: not enough memory"):
        hibernate.prepare()
    assert [priority for _, priority in on_loops(mountpoint)] == [7]
    assert len([loop for loop in loop_devices() if loop.backing_file.startswith(f"{mountpoint}/")]) == 1


def test_the_step_is_asked_for() -> None:
    """Anything else is a usage error."""
    assert run_zbudfs("hibernate", "now").returncode == 2
