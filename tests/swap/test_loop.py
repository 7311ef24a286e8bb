# SPDX-License-Identifier: MIT
"""Find the users of a mount, with made-up tables and with a real loop device on a plain file."""

import os
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS
from zbudfs.swap.attach import release
from zbudfs.swap.loop import (
    LoopDevice,
    Swap,
    SwapError,
    loop_devices,
    loop_devices_on,
    parse_swaps,
    run_tool,
    swaps,
    users,
)

SWAPS = (
    b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    b"/dev/loop2                              partition\t65532\t\t1024\t\t-2\n"
    b"/my\\040swap\\012file\\134               file\t\t8\t\t0\t\t5\n"
    b"/gone\\040(deleted)                      file\t\t16\t\t4\t\t100\n"
)


def make_loop(root: Path, name: str, backing_file: bytes, dio: str = "1") -> None:
    """Make a fake loop device in /sys."""
    folder = root / "sys/block" / name / "loop"
    folder.mkdir(parents=True)
    (folder / "backing_file").write_bytes(backing_file + b"\n")
    (folder / "dio").write_text(dio + "\n")


@pytest.fixture
def fake_root(tmp_path: Path) -> Path:
    """Return a folder with `proc/swaps` and some loop devices."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/swaps").write_bytes(SWAPS)
    (tmp_path / "sys/block/loop0").mkdir(parents=True)  # never used, so it has no loop/
    (tmp_path / "sys/block/vda").mkdir()
    make_loop(tmp_path, "loop10", b"/mnt/other/swapfile")
    make_loop(tmp_path, "loop2", b"/mnt/z/swapfile")
    make_loop(tmp_path, "loop3", b"/mnt/z/swapfile (deleted)", "0")
    make_loop(tmp_path, "loop4", b"/mnt/zz/swapfile")
    make_loop(tmp_path, "loop5", b"/mnt/new\nline \xe4/swapfile\n")
    return tmp_path


def test_swaps_are_read() -> None:
    """Sizes become bytes, and escapes become characters."""
    assert parse_swaps(SWAPS) == [
        Swap("/dev/loop2", 65532 << 10, 1 << 20, -2),
        Swap("/my swap\nfile\\", 8 << 10, 0, 5),
        Swap("/gone", 16 << 10, 4 << 10, 100),
    ]
    assert parse_swaps(b"") == []


@pytest.mark.parametrize("cut", range(0, len(SWAPS), 5))
def test_a_cut_table_is_no_error(cut: int) -> None:
    """A table that is cut at a line's end or in its last numbers gives the lines that are left."""
    whole = SWAPS[:cut].rpartition(b"\n")[0]
    assert len(parse_swaps(whole)) <= 3


def test_loop_devices_are_read(fake_root: Path) -> None:
    """Loop devices are sorted by number, with the path as it was. Devices without a file are left out."""
    assert loop_devices(str(fake_root)) == [
        LoopDevice("/dev/loop2", "/mnt/z/swapfile", True),
        LoopDevice("/dev/loop3", "/mnt/z/swapfile", False),
        LoopDevice("/dev/loop4", "/mnt/zz/swapfile", True),
        LoopDevice("/dev/loop5", "/mnt/new\nline \udce4/swapfile\n", True),
        LoopDevice("/dev/loop10", "/mnt/other/swapfile", True),
    ]


def test_users_of_a_mount(fake_root: Path) -> None:
    """Only paths below the mountpoint count. If the device number cannot be read, the path decides."""
    root = str(fake_root)
    for st_dev in (None, os.makedev(0, 51)):
        assert users("/mnt/z", st_dev, root) == ["swap on /dev/loop2", "loop device /dev/loop3"]
        assert users("/mnt/other", st_dev, root) == ["loop device /dev/loop10"]
        assert users("/mnt", st_dev, root) != []
        assert users("/mnt/none", st_dev, root) == []


@pytest.mark.needs("root", "loop")
def test_a_real_loop_device_is_found_by_its_device_number(tmp_path: Path) -> None:
    """The device number of the file's file system decides, and not its path."""
    file = tmp_path / "swapfile"
    file.write_bytes(bytes(1 << 20))
    st_dev = file.stat().st_dev
    device = run_tool(["losetup", "--find", "--show", str(file)], limit_seconds=LIMIT_SECONDS)
    try:
        (found,) = [loop for loop in loop_devices_on(str(tmp_path), st_dev) if loop.path == device]
        assert found.backing_file == str(file)
        assert device in [loop.path for loop in loop_devices_on("/another/name/of/it", st_dev)]
        assert device not in [loop.path for loop in loop_devices_on(str(tmp_path), os.makedev(7, 300))]
        file.unlink()
        assert device in [loop.path for loop in loop_devices_on(str(tmp_path), None)]
    finally:
        release(device)
    assert device not in [loop.path for loop in loop_devices()]


def test_this_machines_tables_are_read() -> None:
    """The tables of this machine can be read."""
    assert isinstance(loop_devices(), list)
    if Path("/proc/swaps").exists():
        assert isinstance(swaps(), list)


def test_a_tools_own_words_are_passed_on(tmp_path: Path) -> None:
    """A program that fails, is missing, hangs or is killed gives a message of one sentence."""
    assert run_tool(["echo", "hello"], limit_seconds=LIMIT_SECONDS) == "hello"
    for command, limit_seconds, reason in (
        (["sh", "-c", "echo first >&2; echo the reason >&2; exit 3"], LIMIT_SECONDS, "^the reason$"),
        (["false"], LIMIT_SECONDS, r"false failed \(1\)"),
        (["sh", "-c", "kill -9 $$"], LIMIT_SECONDS, "sh was killed by signal 9"),
        (["no-such-program"], LIMIT_SECONDS, "the program no-such-program is missing: install"),
        (["sleep", "60"], 0.05, "sleep did not end within 0.05 s"),
    ):
        with pytest.raises(SwapError, match=reason):
            run_tool(command, limit_seconds=limit_seconds)


@pytest.mark.parametrize("path", [None, "", "."])
def test_programs_are_those_of_the_system(path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty PATH, or one that names other folders, root runs no program from the current folder."""
    program = tmp_path / "losetup"
    program.write_text("#!/bin/sh\necho another program\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    assert "util-linux" in run_tool(["losetup", "--version"], limit_seconds=LIMIT_SECONDS)
