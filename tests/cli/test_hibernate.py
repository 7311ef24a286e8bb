# SPDX-License-Identifier: MIT
"""`zbudfs hibernate` turns swap off and on again, or changes nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS, is_mounted, run_zbudfs, status_of, zbudfs
from zbudfs.cli import hibernate
from zbudfs.cli.errors import CommandError
from zbudfs.service.mountpoint import zbudfs_mounts
from zbudfs.swap.loop import Swap, SwapError, loop_devices, swaps


def test_places_of_an_image() -> None:
    """The image may be on a disk, but not in memory and not behind a loop device."""
    paths = ["/dev/zram0", "/dev/loop3", "/dev/ram1", "/dev/sda2", "/swapfile", "/dev/dm-1"]
    found = hibernate.image_places([Swap(path, 1 << 30, 0, -2) for path in paths])
    assert [swap.path for swap in found] == ["/dev/sda2", "/swapfile", "/dev/dm-1"]


def test_the_room_of_an_image(tmp_path: Path) -> None:
    """The kernel swaps out what is above image_size, and compresses the rest."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/power").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable: 200 kB\n")
    for image_size, expected in ((200 << 10, 700 << 10), (2000 << 10, 400 << 10)):
        (tmp_path / "sys/power/image_size").write_text(f"{image_size}\n")
        assert hibernate.image_room_bytes(str(tmp_path)) == expected


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Return a directory with swap on a zbudfs. Both are gone afterwards."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    options = ("--size", "16M", "--pool", "4M", "--backing", "none", "--priority", "7", "--discard", "once")
    zbudfs("swapon", *options, folder)
    yield folder
    if is_mounted(folder):
        zbudfs("swapoff", "--umount", folder)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Path]:
    """Make another swap on a file."""
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
    """Hide each other zbudfs of this machine from the command."""
    mounts = zbudfs_mounts
    monkeypatch.setattr(
        hibernate, "zbudfs_mounts", lambda: [mount for mount in mounts() if mount.mountpoint == str(mountpoint)]
    )


pytestmark = pytest.mark.needs("root", "fuse", "loop", "swap")


def test_off_and_on_again(mountpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The swap comes back with its priority and its discards, and a second `finish` has nothing to do."""
    monkeypatch.setattr(hibernate, "image_room_bytes", lambda: 1 << 20)
    before = on_loops(mountpoint)
    assert [priority for _, priority in before] == [7]
    assert hibernate.prepare() == 0
    assert on_loops(mountpoint) == []
    assert any(swap.path == str(other) for swap in swaps())
    assert hibernate.finish() == 0
    assert [priority for _, priority in on_loops(mountpoint)] == [7]
    assert status_of(mountpoint)["discard"] == "once"
    assert hibernate.finish() == 0
    assert len(on_loops(mountpoint)) == 1


def test_refused_without_a_place_for_the_image(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes, and the message names the swap to add."""
    monkeypatch.setattr(hibernate, "image_places", lambda others: [])
    before = on_loops(mountpoint)
    with pytest.raises(CommandError, match="no swap for the image"):
        hibernate.prepare()
    assert on_loops(mountpoint) == before
    assert not Path("/", hibernate.NOTE).exists()


def test_refused_without_room(mountpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine continues as before, also if a part of the swap was off already."""

    def fail(mounts: object) -> list[str]:
        subprocess.run(["swapoff", before[0][0]], check=True, timeout=LIMIT_SECONDS)
        raise SwapError("not enough memory for swapoff")

    before = on_loops(mountpoint)
    monkeypatch.setattr(hibernate, "detach", fail)
    with pytest.raises(SwapError, match="cannot hibernate: not enough memory"):
        hibernate.prepare()
    assert [priority for _, priority in on_loops(mountpoint)] == [7]
    assert len([loop for loop in loop_devices() if loop.backing_file.startswith(f"{mountpoint}/")]) == 1


def test_refused_without_room_for_the_image(mountpoint: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of zbudfs may fill the swap that systemd had counted on: the swap comes back, and the machine continues."""
    monkeypatch.setattr(hibernate, "image_room_bytes", lambda: 1 << 50)
    monkeypatch.setattr(hibernate, "image_places", lambda swaps: [swap for swap in swaps if swap.path == str(other)])
    with pytest.raises(SwapError, match="need some 1024 TiB of swap on a disk, and 16 MiB is free"):
        hibernate.prepare()
    assert [priority for _, priority in on_loops(mountpoint)] == [7]


def test_the_step_is_asked_for() -> None:
    """A missing or wrong step is a usage error."""
    assert run_zbudfs("hibernate", "now").returncode == 2
