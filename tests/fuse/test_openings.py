# SPDX-License-Identifier: MIT
"""Opens of swapfile: each counts once, even if its request comes again, and only one file may write at a time."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, mounted, status_of, wait_until, zbudfs
from zbudfs.fuse.openings import OPENED, WRITING, Openings
from zbudfs.store.status_area import FIRST_OPENING, OPENINGS, Field
from zbudfs.swap.attach import release
from zbudfs.swap.loop import loop_devices_on, run_tool

AGAIN: Final = 1 << 63
LOSETUP_SECONDS: Final = 0.5
"""Time for which losetup is watched. It tries a busy file again for 13 s."""

ATTACH: Final = ("losetup", "--find", "--show", "--direct-io=on")


@pytest.fixture
def fields() -> memoryview:
    """Return the fields of an empty status area."""
    return memoryview(array.array("Q", bytes(8 * 128)))


def test_an_open_and_its_release(fields: memoryview) -> None:
    """Each open file has its own handle and counts until its release. A repeated release changes nothing."""
    openings = Openings(fields)
    first, second = openings.open(10, writing=False), openings.open(12, writing=True)
    assert first != second
    assert all(handle & OPENED for handle in (first, second))
    assert [bool(handle & WRITING) for handle in (first, second)] == [False, True]
    assert fields[Field.OPEN_SWAPFILES] == 2
    for _ in range(2):
        openings.release(second)
        assert fields[Field.OPEN_SWAPFILES] == 1
    openings.release(first)
    assert fields[Field.OPEN_SWAPFILES] == 0
    assert not any(fields)


def test_an_open_that_comes_again(fields: memoryview) -> None:
    """The next worker gives a request that the dead worker had counted the same handle, and does not count it again."""
    handle = Openings(fields).open(10, writing=True)
    assert Openings(fields).open(10 | AGAIN, writing=True) == handle
    assert fields[Field.OPEN_SWAPFILES] == 1
    Openings(fields).release(handle)
    assert fields[Field.OPEN_SWAPFILES] == 0


def test_one_writes(fields: memoryview) -> None:
    """A second open for writing is refused until the first file is released. Readers are free, and `writers` allows more."""
    openings = Openings(fields)
    writer = openings.open(2, writing=True)
    for unique in (4, 6):
        with pytest.raises(OSError, match="open for writing already") as caught:
            openings.open(unique, writing=True)
        assert caught.value.errno == errno.EBUSY
    openings.open(8, writing=False)
    fields[Field.WRITERS] = 2
    openings.open(10, writing=True)
    with pytest.raises(OSError, match="open for writing already"):
        openings.open(12, writing=True)
    fields[Field.WRITERS] = 0
    openings.release(writer)
    with pytest.raises(OSError, match="open for writing already"):
        openings.open(14, writing=True)


def test_more_than_there_are_slots_for(fields: memoryview) -> None:
    """An open without a free slot is refused, and a release makes room."""
    openings = Openings(fields)
    handles = [openings.open(2 * number, writing=False) for number in range(1, OPENINGS + 1)]
    with pytest.raises(OSError, match="too many") as caught:
        openings.open(2 * OPENINGS + 2, writing=False)
    assert caught.value.errno == errno.EMFILE
    openings.release(handles[7])
    openings.open(2 * OPENINGS + 2, writing=False)
    assert fields[Field.OPEN_SWAPFILES] == OPENINGS


def test_the_slots_are_no_fields_of_something_else() -> None:
    """The slots overlap no number of the status area, and lie in the status area."""
    assert max(Field) < FIRST_OPENING
    assert FIRST_OPENING + OPENINGS <= 128


def loops_on(mountpoint: Path) -> list[str]:
    """Return the loop devices on swapfile."""
    return [loop.path for loop in loop_devices_on(str(mountpoint), mountpoint.stat().st_dev)]


@contextlib.contextmanager
def attached(mountpoint: Path) -> Iterator[str]:
    """Attach a loop device to swapfile by hand."""
    device = run_tool([*ATTACH, str(mountpoint / "swapfile")], limit_seconds=LIMIT_SECONDS)
    try:
        yield device
    finally:
        release(device)


@pytest.mark.needs("root", "fuse", "loop")
def test_a_second_loop_device_by_hand(tmp_path: Path) -> None:
    """losetup is refused, also after the death of a worker, and works when the first device is gone. Reading is allowed."""
    with mounted(tmp_path / "mnt") as mountpoint:
        swapfile = mountpoint / "swapfile"
        with attached(mountpoint):
            for kill in (False, True):
                if kill:
                    found = status_of(mountpoint)
                    os.kill(found["worker_pid"], signal.SIGKILL)
                    wait_until(lambda then=found: status_of(mountpoint)["recoveries"] > then["recoveries"], "takeover")  # type: ignore[misc]
                with subprocess.Popen([*ATTACH, str(swapfile)], stdout=subprocess.DEVNULL) as second:
                    time.sleep(LOSETUP_SECONDS)
                    second.kill()
                assert len(loops_on(mountpoint)) == 1
                with pytest.raises(OSError, match="busy"):
                    os.open(swapfile, os.O_WRONLY)
                with swapfile.open("rb") as reader:
                    assert reader.read(4096) == bytes(4096)
            wait_until(lambda: status_of(mountpoint)["open_swapfiles"] == 1, "the readers' end")
        with attached(mountpoint):
            pass
        wait_until(lambda: status_of(mountpoint)["open_swapfiles"] == 0, "the loop device's end")


@pytest.mark.needs("root", "fuse", "loop")
def test_many_at_once(tmp_path: Path) -> None:
    """One of eight losetup at the same moment gets a loop device."""
    with mounted(tmp_path / "mnt") as mountpoint:
        for _ in range(3):
            command = [*ATTACH, str(mountpoint / "swapfile")]
            started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(8)]
            try:
                wait_until(lambda: bool(loops_on(mountpoint)), "a loop device")
                time.sleep(LOSETUP_SECONDS)
                assert len(loops_on(mountpoint)) == 1
            finally:
                for process in started:
                    process.kill()
                    process.wait()
                for device in loops_on(mountpoint):
                    release(device)


@pytest.mark.needs("root", "fuse")
def test_more_writers_where_they_are_wanted(tmp_path: Path) -> None:
    """`zbudfs set writers=2` allows a second file that is open for writing."""
    with mounted(tmp_path / "mnt") as mountpoint, (mountpoint / "swapfile").open("r+b"):
        with pytest.raises(OSError, match="busy"):
            (mountpoint / "swapfile").open("r+b")
        zbudfs("set", "writers=2", mountpoint)
        with (mountpoint / "swapfile").open("r+b") as second:
            second.write(b"x")
