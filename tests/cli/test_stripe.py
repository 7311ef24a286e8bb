# SPDX-License-Identifier: MIT
"""Several instances as one: how settings are divided and reports are added up, and the commands on real instances."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_swap import storm
from tests.support import is_mounted, run_zbudfs, status_of, wait_until, zbudfs
from zbudfs.cli.stripe import MAX_INSTANCES, divided, grouped, summed
from zbudfs.service.mountpoint import Mount
from zbudfs.service.settings import Settings, SettingsError
from zbudfs.swap.loop import loop_devices, swaps
from zbudfs.swap.priority import choose_priority

MIB = 1 << 20


def settings(size: int = 100 * MIB, pool: int = 10 * MIB, backing: str | None = "/disk/file") -> Settings:
    """Return settings of a whole."""
    return Settings(mountpoint="/mnt/z", size_bytes=size, pool_bytes=pool, backing=backing)


def test_size_and_pool_are_divided() -> None:
    """Each instance has its own place, file, and part in whole pages. The parts are together no more than the whole."""
    parts = divided(settings(), 3, "/disk/file")
    assert [part.mountpoint for part in parts] == ["/mnt/z/0", "/mnt/z/1", "/mnt/z/2"]
    assert [part.backing for part in parts] == ["/disk/file.0", "/disk/file.1", "/disk/file.2"]
    for part in parts:
        assert part.size_bytes % 4096 == part.pool_bytes % 4096 == 0
    assert 0 <= 100 * MIB - sum(part.size_bytes for part in parts) < 3 * 4096
    assert 0 <= 10 * MIB - sum(part.pool_bytes for part in parts) < 3 * 4096


def test_backing_files_that_are_not_named() -> None:
    """The default file of each instance is that of its mountpoint. none stays none."""
    assert len({part.backing for part in divided(settings(), 2, None)}) == 2
    assert [part.backing for part in divided(settings(backing=None), 2, "none")] == [None, None]


def test_a_device_is_not_divided() -> None:
    """One instance can have a device. Several would each need their own."""
    device = next((str(each) for each in Path("/dev").glob("*") if each.is_block_device()), None)
    if device is None:
        pytest.skip("needs a block device in /dev")
    assert divided(settings(backing=device), 1, device) == [settings(backing=device)]
    with pytest.raises(SettingsError, match="is a device, which instances cannot share: write the path of a file"):
        divided(settings(backing=device), 2, device)


def test_one_instance_is_the_whole() -> None:
    """A single instance has all of it, under its usual names."""
    assert divided(settings(), 1, None) == [settings()]


def test_a_part_that_is_too_small() -> None:
    """The error says that the size is that of a part."""
    with pytest.raises(SettingsError, match="each of 16 instances: pool of"):
        divided(settings(), 16, None)


def test_instances_differ_from_other_mounts() -> None:
    """0 and 1 side by side are a stripe. A lone number is an ordinary name."""
    paths = ["/mnt/z/0", "/mnt/other", "/mnt/z/10", "/mnt/z/1", "/srv/5", "/mnt/z/2"]
    found = grouped(Mount(path, f"0:{number}") for number, path in enumerate(paths, 1))
    assert [(whole, [mount.mountpoint for mount in mounts]) for whole, mounts in found] == [
        ("/mnt/z", ["/mnt/z/0", "/mnt/z/1", "/mnt/z/2", "/mnt/z/10"]),
        ("/mnt/other", ["/mnt/other"]),
        ("/srv/5", ["/srv/5"]),
    ]


def report(number: int, **values: Any) -> dict[str, Any]:
    """Return the report of one instance."""
    return {"mountpoint": f"/mnt/z/{number}", **values}


def test_reports_are_added_up() -> None:
    """Numbers and histograms are sums, times are the largest, yes needs all, and words are listed once or one by one."""
    own = [
        report(
            0,
            stored_pages=1,
            chunk_histogram=[1, 2],
            read_latency_max_us=5,
            standby_ready=True,
            pid=7,
            level=-1,
            version="1",
        ),
        report(
            1,
            stored_pages=2,
            chunk_histogram=[3, 4],
            read_latency_max_us=3,
            standby_ready=False,
            pid=8,
            level=-1,
            version="2",
        ),
    ]
    assert summed("/mnt/z", own) == {
        "mountpoint": "/mnt/z",
        "stored_pages": 3,
        "chunk_histogram": [4, 6],
        "read_latency_max_us": 5,
        "standby_ready": False,
        "pid": [7, 8],
        "level": -1,
        "version": ["1", "2"],
        "warnings": [],
        "instances": own,
    }


def test_lists_of_words_are_joined() -> None:
    """Each warning is listed once, and a user of any instance is a user of the whole."""
    own = [report(0, warnings=["same"], users=["swap on /dev/loop1"]), report(1, warnings=["same"], users=[])]
    whole = summed("/mnt/z", own)
    assert whole["warnings"] == ["same"]
    assert whole["users"] == ["swap on /dev/loop1"]


def test_an_instance_is_missing_or_silent() -> None:
    """A missing number is a warning. An instance that does not answer makes the whole an error."""
    assert "/mnt/z/1" in summed("/mnt/z", [report(0), report(2)])["warnings"][0]
    whole = summed("/mnt/z", [report(0, stored_pages=1), report(1, error="it has died")])
    assert whole["error"] == "it has died"
    assert "stored_pages" not in whole


def test_wrong_numbers_of_instances(tmp_path: Path) -> None:
    """A number that makes no sense is a usage error."""
    for number in ("0", "two", str(MAX_INSTANCES + 1)):
        run = run_zbudfs("mount", "--instances", number, tmp_path)
        assert (run.returncode, f"{number!r} is not a number of instances" in run.stderr) == (2, True)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Return a directory to mount on, which is free again afterwards."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    if is_mounted(folder / "0"):
        zbudfs("swapoff", "--umount", folder)


@pytest.mark.needs("root", "fuse")
def test_mounted_and_unmounted_as_one(mountpoint: Path, tmp_path: Path) -> None:
    """One command makes all instances and one removes all. If one cannot be made, none is."""
    options = ("--size", "64M", "--pool", "16M", "--backing", tmp_path / "backing", "--instances", "2")
    assert "--foreground is for one instance" in run_zbudfs("mount", "--foreground", *options, mountpoint).stderr
    (tmp_path / "backing.1").write_text("somebody else's")
    assert "backing.1 exists" in run_zbudfs("mount", *options, mountpoint).stderr
    assert list(mountpoint.iterdir()) == []
    (tmp_path / "backing.1").unlink()

    zbudfs("mount", *options, mountpoint)
    assert sorted(path.name for path in mountpoint.iterdir()) == ["0", "1"]
    whole = status_of(mountpoint)
    assert (whole["size_bytes"], whole["pool_configured_bytes"], len(whole["instances"])) == (64 * MIB, 16 * MIB, 2)
    assert status_of(mountpoint / "1")["size_bytes"] == 32 * MIB
    assert whole["mountpoint"] in [each["mountpoint"] for each in json.loads(run_zbudfs("status", "--json").stdout)]
    assert f"{mountpoint}, 2 instances" in zbudfs("status", mountpoint)
    assert "name one" in run_zbudfs("set", "level=3", mountpoint).stderr
    assert "mounted on" in run_zbudfs("mount", mountpoint).stderr
    zbudfs("restart", mountpoint)
    zbudfs("umount", mountpoint)
    assert list(mountpoint.iterdir()) == []
    assert run_zbudfs("umount", mountpoint).returncode == 1


@pytest.mark.needs("root", "fuse", "loop", "swap", "cell")
def test_the_kernel_fills_them_in_turns(mountpoint: Path, tmp_path: Path) -> None:
    """Each instance gets its part of the swapped-out pages, a killed worker loses nothing, and every byte comes back."""
    options = ("--size", "64M", "--pool", "4M", "--backing", tmp_path / "backing", "--priority", "32767")
    devices = zbudfs("swapon", "--instances", "2", *options, mountpoint).split()
    assert [swap.priority for swap in swaps() if swap.path in devices] == [32767, 32767]
    run = run_zbudfs("umount", mountpoint)
    assert (run.returncode, "zbudfs swapoff" in run.stderr) == (1, True)
    assert "in use already" in run_zbudfs("swapon", mountpoint).stderr
    os.kill(status_of(mountpoint / "1")["worker_pid"], signal.SIGKILL)
    full, outcome = storm(mountpoint, "stripe", limit_mib=12, needed_mib=32)
    assert outcome == {"pages": 32 * 256, "bad": 0}
    first, second = (each["stored_pages"] for each in full["instances"])
    assert full["stored_pages"] == first + second
    assert 0.5 < first / second < 2
    wait_until(lambda: status_of(mountpoint)["recoveries"] == 1, "the takeover")
    assert full["lost_pages"] == 0
    zbudfs("swapoff", "--umount", mountpoint)
    assert not [loop for loop in loop_devices() if loop.backing_file.startswith(str(mountpoint))]
    assert list(mountpoint.iterdir()) == []


@pytest.mark.needs("root", "fuse", "loop", "swap")
def test_without_a_priority_they_are_equal_all_the_same(mountpoint: Path) -> None:
    """The kernel would choose a different priority for each, and fill the first before it uses the second."""
    devices = zbudfs(
        "swapon", "--instances", "2", "--size", "32M", "--pool", "4M", "--backing", "none", mountpoint
    ).split()
    chosen = choose_priority([swap for swap in swaps() if swap.path not in devices])
    assert [swap.priority for swap in swaps() if swap.path in devices] == [chosen] * 2
    zbudfs("swapoff", mountpoint)
    assert not [loop for loop in loop_devices() if loop.backing_file.startswith(str(mountpoint))]
    assert is_mounted(mountpoint / "1")
