# SPDX-License-Identifier: MIT
"""Real swap: a program in a memory cgroup needs more than it gets, and compares every byte."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.cell import Cell
from tests.cli.test_config import make_root
from tests.fuse.calls import require_tools
from tests.support import LIMIT_SECONDS, ROOT, is_mounted, run_zbudfs, status_of, wait_until, zbudfs
from zbudfs.cli import config
from zbudfs.cli.main import main
from zbudfs.cli.option_table import as_toml
from zbudfs.swap.attach import release
from zbudfs.swap.detach import detach
from zbudfs.swap.loop import SYSTEM_PATH, SwapError, loop_devices, run_tool, swaps
from zbudfs.swap.priority import choose_priority

pytestmark = pytest.mark.needs("root", "fuse", "loop", "swap", "cell")

MIB = 1 << 20


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Return a directory to mount on, which is free again afterwards."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    if is_mounted(folder):
        zbudfs("swapoff", "--umount", folder)


def storm(mountpoint: Path, name: str, *, limit_mib: int, needed_mib: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the hungry program. Return the status at the moment when its memory was full, and its result."""
    with Cell(name, limit_mib * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), str(needed_mib)])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                assert program.stdout is not None
                assert program.stdout.readline() == "filled\n"
                full = status_of(mountpoint)
                said, _ = program.communicate("\n", timeout=4 * LIMIT_SECONDS)
            finally:
                program.kill()
    outcome: dict[str, Any] = json.loads(said)
    return full, outcome


def test_there_and_back(mountpoint: Path) -> None:
    """One command turns swap on, and one removes everything."""
    device = zbudfs(
        "swapon", "--size", "64M", "--pool", "16M", "--backing", "none", "--priority", "5", mountpoint
    ).strip()
    (mine,) = [swap for swap in swaps() if swap.path == device]
    assert mine.priority == 5
    assert [loop.direct_io for loop in loop_devices() if loop.path == device] == [True]
    assert Path("/sys/block", Path(device).name, "queue/logical_block_size").read_text() == "4096\n"
    assert f"device     64 MiB, swap on {device}" in zbudfs("status", mountpoint)
    assert status_of(mountpoint)["discard"] == "pages"
    zbudfs("swapoff", "--umount", mountpoint)
    assert device not in [swap.path for swap in swaps()]
    assert not is_mounted(mountpoint)


def test_step_by_step(mountpoint: Path) -> None:
    """swapon uses an existing mount, swapoff leaves it, and an impossible command is refused."""
    zbudfs("mount", "--size", "64M", "--pool", "16M", "--backing", "none", mountpoint)
    run = run_zbudfs("swapon", "--size", "64M", mountpoint)
    assert run.returncode == 1
    assert "--size can only be set at mount" in run.stderr
    device = zbudfs("swapon", mountpoint).strip()
    for command, reason in (
        ("swapon", f"is in use already: swap on {device}"),
        ("umount", f"is in use: swap on {device}; run zbudfs swapoff"),
    ):
        run = run_zbudfs(command, mountpoint)
        assert run.returncode == 1
        assert reason in run.stderr
    assert device in [swap.path for swap in swaps()]
    zbudfs("swapoff", mountpoint)
    assert is_mounted(mountpoint)
    run = run_zbudfs("swapoff", mountpoint)
    assert (run.returncode, run.stderr) == (1, f"zbudfs: no swap is on {mountpoint}\n")
    zbudfs("umount", mountpoint)


def test_a_step_that_fails_undoes_those_before(
    mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If swapon itself fails, there is no loop device, no mount and no daemon."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "swapon").write_text("#!/bin/sh\necho swapon: not today >&2\nexit 255\n")
    (tools / "swapon").chmod(0o755)
    monkeypatch.setattr("zbudfs.swap.loop.SYSTEM_PATH", f"{tools}:{SYSTEM_PATH}")
    assert main(["swapon", "--size", "64M", "--pool", "16M", "--backing", "none", str(mountpoint)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "zbudfs: swapon: not today"
    assert not is_mounted(mountpoint)
    assert not [loop for loop in loop_devices() if loop.backing_file.startswith(str(mountpoint))]


def test_beside_other_swap(mountpoint: Path, tmp_path: Path) -> None:
    """Without a priority the swap is filled before one with a priority of the kernel, and a message says so."""
    image = tmp_path / "image"
    image.write_bytes(bytes(8 << 20))
    words = ["losetup", "--find", "--show", str(image)]
    other = run_tool(words, limit_seconds=LIMIT_SECONDS)
    try:
        run_tool(["mkswap", other], limit_seconds=LIMIT_SECONDS)
        run_tool(["swapon", other], limit_seconds=LIMIT_SECONDS)
        run = run_zbudfs("swapon", "--size", "64M", "--pool", "16M", "--backing", "none", mountpoint)
        device = run.stdout.strip()
        priorities = {swap.path: swap.priority for swap in swaps()}
        assert priorities[device] > priorities[other]
        order = f"zbudfs ({priorities[device]}) first, then {other} ({priorities[other]})"
        if len(priorities) == 2:  # this machine may have other swap
            assert f"zbudfs: the kernel fills {order}\n" in run.stderr
            assert f"filled     {order}" in zbudfs("status", mountpoint)
        zbudfs("swapoff", "--umount", mountpoint)
    finally:
        if other in [swap.path for swap in swaps()]:
            run_tool(["swapoff", other], limit_seconds=LIMIT_SECONDS)
        release(other)


def test_swap_that_another_program_turns_off(mountpoint: Path) -> None:
    """status says what to do. swapon turns the swap on again, with the same discards, and swapoff detaches the loop device."""
    options = ("--size", "64M", "--pool", "16M", "--backing", "none", "--discard", "once")
    device = zbudfs("swapon", *options, mountpoint).strip()
    assert status_of(mountpoint)["discard"] == "once"
    (mine,) = [swap for swap in swaps() if swap.path == device]
    assert mine.priority == choose_priority([swap for swap in swaps() if swap.path != device])
    for command in ("swapon", "swapoff"):
        run_tool(["swapoff", device], limit_seconds=LIMIT_SECONDS)
        found = status_of(mountpoint)
        assert found["swap_off"] == [device]
        assert "discard" not in found
        assert f"zbudfs swapon {mountpoint} turns it on again" in found["remedies"][0]
        assert f"{mountpoint} is mounted, and its swap is off" in run_zbudfs("doctor").stdout
        refused = run_zbudfs("umount", mountpoint)
        assert (refused.returncode, f"loop device {device}" in refused.stderr) == (1, True)
        zbudfs(command, mountpoint)
        found = status_of(mountpoint)
        assert (found["swap_off"], len(found["users"])) == ([], int(command == "swapon"))
        assert found.get("discard") == ("once" if command == "swapon" else None)
        device = (found["users"] or [device])[0].removeprefix("swap on ")
    assert run_zbudfs("swapoff", mountpoint).returncode == 1


def test_a_loop_device_with_something_else_on_it(mountpoint: Path) -> None:
    """swapon does not overwrite it, and swapoff does not detach it while it is mounted."""
    require_tools("mkfs.ext4")
    zbudfs("mount", "--size", "64M", "--pool", "64M", "--backing", "none", mountpoint)
    words = ["losetup", "--find", "--show", str(mountpoint / "swapfile")]
    device = run_tool(words, limit_seconds=LIMIT_SECONDS)
    disk = mountpoint.parent / "disk"
    disk.mkdir()
    run_tool(["mkfs.ext4", "-q", device], limit_seconds=LIMIT_SECONDS)
    run = run_zbudfs("swapon", mountpoint)
    assert (run.returncode, f"{device} holds ext4, which would be lost" in run.stderr) == (1, True), run.stderr
    run_tool(["mount", device, str(disk)], limit_seconds=LIMIT_SECONDS)
    try:
        for command in ("swapon", "swapoff"):
            run = run_zbudfs(command, mountpoint)
            assert (run.returncode, f"{device} is in use" in run.stderr) == (1, True), run.stderr
    finally:
        run_tool(["umount", str(disk)], limit_seconds=LIMIT_SECONDS)
    zbudfs("swapoff", mountpoint)


def test_a_program_that_has_the_swapfile_open(mountpoint: Path) -> None:
    """swapon names the program that has the swapfile open, and leaves nothing."""
    zbudfs("mount", "--size", "64M", "--pool", "16M", "--backing", "none", mountpoint)
    with (mountpoint / "swapfile").open("r+b"):
        run = run_zbudfs("swapon", mountpoint)
    assert run.returncode == 1
    assert "is open for writing: end the program" in run.stderr
    assert status_of(mountpoint)["users"] == []


def test_swap_that_proc_does_not_show(mountpoint: Path, tmp_path: Path) -> None:
    """If /proc/swaps of a container is empty, swapoff does not guess the memory. --force turns swap off."""
    device = zbudfs("swapon", "--size", "64M", "--pool", "16M", "--backing", "none", mountpoint).strip()
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/swaps").write_text("Filename Type Size Used Priority\n")
    (root / "proc/meminfo").write_text("MemAvailable: 1 kB\n")
    for name in ("dev", "sys"):
        (root / name).symlink_to(f"/{name}")
    mounts = [(str(mountpoint), mountpoint.stat().st_dev)]
    with pytest.raises(SwapError, match=f"{device} is in use, and /proc/swaps does not list it"):
        detach(mounts, root=str(root))
    assert device in [swap.path for swap in swaps()]
    assert detach(mounts, force=True, root=str(root)) == [device]
    assert device not in [swap.path for swap in swaps()]


def test_every_byte_comes_back(mountpoint: Path, tmp_path: Path) -> None:
    """The program is three times as large as its memory. The pool holds a part of it, and the rest is written back."""
    options = ["--size", "256M", "--pool", "16M", "--backing", str(tmp_path / "backing"), "--priority", "32767"]
    zbudfs("swapon", *options, mountpoint)
    full, outcome = storm(mountpoint, "storm", limit_mib=32, needed_mib=96)
    assert outcome == {"pages": 96 * 256, "bad": 0}
    assert full["stored_pages"] > 40 * 256
    assert full["same_filled_pages"] > 0
    assert full["raw_pages"] > 0
    assert full["pool_used_bytes"] <= full["pool_limit_bytes"] == 16 * MIB
    after = status_of(mountpoint)
    assert after["cumul_writeback_pages"] > 0
    assert after["cumul_pagein_blocks"] > 0
    assert after["writeback_failures"] == after["refused_pool_full"] == 0
    zbudfs("swapoff", "--umount", mountpoint)


@pytest.mark.parametrize("discard", ["pages", "once"])
def test_pages_of_a_program_that_has_ended(discard: str, mountpoint: Path) -> None:
    """With `pages` the kernel reports them at once, and the pool gets its room back. With `once` it does not."""
    options = ("--size", "128M", "--pool", "48M", "--backing", "none", "--priority", "32767")
    zbudfs("swapon", *options, "--discard", discard, mountpoint)
    _, outcome = storm(mountpoint, "ended", limit_mib=24, needed_mib=48)
    assert outcome == {"pages": 48 * 256, "bad": 0}
    if discard == "pages":
        wait_until(lambda: int(status_of(mountpoint)["stored_pages"]) < 16 * 256, "the discards")
        assert status_of(mountpoint)["cumul_discarded_pages"] > 16 * 256
    else:
        time.sleep(0.5)  # far longer than `pages` takes
        found = status_of(mountpoint)
        assert (found["cumul_discarded_pages"], found["stored_pages"] > 16 * 256) == (0, True)
        assert "  device     128 MiB, discard once, swap on " in zbudfs("status", mountpoint)


def test_the_discards_of_a_configuration(
    mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the unit turns swap on with the discards that the file has, also on a mount without them."""
    values = {"mountpoint": str(mountpoint), "size": "64M", "pool": "16M", "backing": "none", "discard": "once"}
    file = "".join(f"{name} = {as_toml(value)}\n" for name, value in values.items())
    found = config.load("x", make_root(tmp_path / "root", {"x.toml": file}))
    monkeypatch.setattr(config, "load", lambda name: found)
    for _ in range(2):
        assert main(["swapon", "--config", "x"]) == 0
        assert capsys.readouterr().out.startswith("/dev/loop")
        assert status_of(mountpoint)["discard"] == "once"
        zbudfs("swapoff", mountpoint)


def test_in_memory_alone(mountpoint: Path) -> None:
    """Without a backing file all pages are in the pool, and come back as well."""
    zbudfs("swapon", "--size", "128M", "--pool", "64M", "--backing", "none", "--priority", "32767", mountpoint)
    full, outcome = storm(mountpoint, "memory", limit_mib=32, needed_mib=80)
    assert outcome == {"pages": 80 * 256, "bad": 0}
    assert full["backing_used_bytes"] == 0
    assert 0 < full["pool_used_bytes"] <= 64 * MIB
    assert full["pool_used_bytes"] < full["stored_pages"] * 4096


def test_a_full_pool_loses_nothing(mountpoint: Path) -> None:
    """With a pool that is too small and no backing, the kernel keeps its pages. With more RAM, all are there."""
    zbudfs("swapon", "--size", "128M", "--pool", "2M", "--backing", "none", "--priority", "32767", mountpoint)
    with Cell("full", 32 * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), "48"])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                wait_until(lambda: status_of(mountpoint)["refused_pool_full"] > 0, "a full pool")
                assert status_of(mountpoint)["pool_used_bytes"] <= 2 * MIB
                cell.set_limit(256 * MIB)
                said, _ = program.communicate("\n", timeout=2 * LIMIT_SECONDS)
            finally:
                program.kill()
    assert json.loads(said.splitlines()[-1])["bad"] == 0
    zbudfs("swapoff", "--umount", mountpoint)


@pytest.mark.parametrize("setting", [[], ["--force"]])
def test_swapoff_reads_everything_back(setting: list[str], mountpoint: Path) -> None:
    """swapoff reads back a program's memory, and every byte is right."""
    zbudfs("swapon", "--size", "128M", "--pool", "32M", "--backing", "none", "--priority", "32767", mountpoint)
    with Cell("off", 24 * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), "48"])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                assert program.stdout is not None
                assert program.stdout.readline() == "filled\n"
                cell.set_limit(256 * MIB)
                zbudfs("swapoff", *setting, mountpoint)
                assert status_of(mountpoint)["users"] == []
                said, _ = program.communicate("\n", timeout=2 * LIMIT_SECONDS)
            finally:
                program.kill()
    assert json.loads(said)["bad"] == 0
    zbudfs("umount", mountpoint)


def test_swapoff_in_a_cell_that_is_too_small(mountpoint: Path, tmp_path: Path) -> None:
    """The kernel kills swapoff there and not the program. A message says so, and swap stays on."""
    options = ["--size", "256M", "--pool", "32M", "--backing", str(tmp_path / "backing"), "--priority", "32767"]
    device = zbudfs("swapon", *options, mountpoint).strip()
    with Cell("small", 32 * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), "80"])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                assert program.stdout is not None
                assert program.stdout.readline() == "filled\n"
                swapoff = cell.command([sys.executable, "-m", "zbudfs", "swapoff", "--force", str(mountpoint)])
                run = subprocess.run(
                    swapoff, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=ROOT, check=False
                )
                assert run.returncode == 1
                assert run.stderr.startswith(
                    "zbudfs: swapoff was killed by signal 9, for want of memory: swap is still on"
                )
                assert run.stderr.count("\n") == 1
                assert device in [swap.path for swap in swaps()]
                said, _ = program.communicate("\n", timeout=2 * LIMIT_SECONDS)
            finally:
                program.kill()
    assert json.loads(said) == {"pages": 80 * 256, "bad": 0}
    zbudfs("swapoff", "--umount", mountpoint)


def test_daemon_and_program_in_one_cell(mountpoint: Path, tmp_path: Path) -> None:
    """All pages of a program in its daemon's cgroup go to the disk and come back, and no process is killed."""
    options = ["--size", "256M", "--pool", "64M", "--backing", str(tmp_path / "backing"), "--priority", "32767"]
    with Cell("together", 180 * MIB) as cell:
        swapon = cell.command([sys.executable, "-m", "zbudfs", "swapon", *options, str(mountpoint)])
        subprocess.run(swapon, check=True, timeout=LIMIT_SECONDS, capture_output=True, cwd=ROOT)
        try:
            command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), "144"])
            said = subprocess.run(
                command, check=True, input="\n", capture_output=True, text=True, timeout=4 * LIMIT_SECONDS
            ).stdout
            assert json.loads(said.splitlines()[-1]) == {"pages": 144 * 256, "bad": 0}
            found = status_of(mountpoint)
            assert found["cumul_writeback_pages"] > 20 * 256
            assert found["cumul_pagein_pages"] > 20 * 256
            assert (found["recoveries"], found["lost_pages"]) == (0, 0)
        finally:
            cell.set_limit(1024 * MIB)  # the processes that wait for memory continue
            zbudfs("swapoff", "--umount", mountpoint)
