# SPDX-License-Identifier: MIT
"""A mount whose swapfile is closed ends on request, whatever process stands in it, and no other mount ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts import faults
from tests.service.test_keeper import Served, compare, few_files, fill, mount, opened
from tests.service.test_service import Manager, service
from tests.support import is_mounted, is_running, run_zbudfs, wait_until, zbudfs
from zbudfs.service.mountpoint import places_of, unmount
from zbudfs.store.status_area import Field
from zbudfs.swap.loop import run_tool

pytestmark = pytest.mark.needs("root", "fuse")

__all__ = ["mount", "service"]  # fixtures


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[int]:
    """Start a process whose current directory is there."""
    with subprocess.Popen(["sleep", "1000"], cwd=folder) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def another_namespace(command: str = "true") -> Iterator[int]:
    """Start a process with its own copy of all mounts, in which a command was run."""
    program = ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{command}; echo ready; exec sleep 1000"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process.pid
        finally:
            process.kill()


def wait_gone(served: Served, pids: list[int]) -> None:
    """Wait until nothing of a mount is left."""
    wait_until(lambda: not any(map(is_running, pids)), "the end of its processes")
    wait_until(lambda: not served.pool.exists(), "the end of its memory")


# ---- a process stands in it ----------------------------------------------------------------------------------------------


def test_an_order_to_end_while_a_process_stands_in_it(mount: Callable[..., Served], tmp_path: Path) -> None:
    """The mount ends at once, and leaves no memory and no content in the backing file."""
    served = mount("--backing", tmp_path / "backing", "--pool", "1M")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
    wait_until(lambda: not served.field(Field.OPEN_SWAPFILES), "the close")
    pids = [served.keeper, served.worker, served.standby]
    with standing_in(served.mountpoint / "stats"):
        os.kill(served.keeper, signal.SIGTERM)
        wait_gone(served, pids)
        assert not is_mounted(served.mountpoint)
        assert (tmp_path / "backing").stat().st_size == 0


@pytest.mark.parametrize("keeper", [True, False])
def test_umount_while_a_process_stands_in_it(keeper: bool, mount: Callable[..., Served]) -> None:
    """The unmount succeeds, with a keeper and without one, and another mount can be made there."""
    served = mount()
    pids = [served.keeper, served.worker, served.standby]
    with standing_in(served.mountpoint):
        if not keeper:
            served.kill(pids[0])
        zbudfs("umount", served.mountpoint)
        wait_gone(served, pids)
        again = mount()
        assert again.stats()["stored_pages"] == 0


def test_a_service_ends_while_a_process_stands_in_it(service: tuple[Manager, Served]) -> None:
    """The main process ends with status 0, no process is left, and the manager gets the order to remove the descriptors."""
    manager, served = service
    pids = [served.worker, served.standby]
    with standing_in(served.mountpoint):
        os.kill(served.keeper, signal.SIGTERM)
        assert manager.wait() == 0
        wait_gone(served, pids)
    wait_until(lambda: not manager.stored, "the store being emptied")


# ---- another mount namespace has it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["zbudfs", "umount"])
def test_another_namespace_has_it(command: str, mount: Callable[..., Served], tmp_path: Path) -> None:
    """A mount that is unmounted here ends, although another namespace has it. Its backing file can be used again at once."""
    served = mount("--backing", tmp_path / "backing")
    pids = [served.keeper, served.worker, served.standby]
    with another_namespace():
        if command == "zbudfs":
            began = time.monotonic()
            zbudfs("umount", served.mountpoint)
            assert time.monotonic() < began + 20.0  # earlier it gave up after 60 s
        else:
            subprocess.run(["umount", served.mountpoint], check=True)
            wait_gone(served, pids)
        assert not any(map(is_running, pids))
        again = mount("--backing", tmp_path / "backing")
        with opened(again.swapfile) as fd:
            fill(fd, 0, 64)
            compare(fd, 0, 64)


def test_the_swapfile_is_open_in_another_namespace(mount: Callable[..., Served]) -> None:
    """The mount is served until the swapfile is closed, and then ends."""
    served = mount()
    pids = [served.keeper, served.worker, served.standby]
    with another_namespace(f"exec 7<>{served.swapfile}"):
        wait_until(lambda: served.field(Field.OPEN_SWAPFILES) == 1, "the open")
        subprocess.run(["umount", served.mountpoint], check=True)
        time.sleep(1.5)
        os.kill(served.keeper, signal.SIGTERM)
        time.sleep(0.5)
        assert all(map(is_running, pids))
    wait_gone(served, pids)


# ---- other mounts are left alone -----------------------------------------------------------------------------------------


def test_a_mount_over_it_stays(mount: Callable[..., Served]) -> None:
    """An order to end is refused with the reason. When the cover is gone, the mount ends, so it still listens."""
    served = mount()
    pids = [served.keeper, served.worker, served.standby]
    subprocess.run(["mount", "-t", "tmpfs", "none", served.mountpoint], check=True)
    try:
        for _ in range(2):
            os.kill(served.keeper, signal.SIGTERM)
            time.sleep(0.7)
            assert served.mountpoint.is_mount()
            assert not (served.mountpoint / "stats").exists()
        assert all(map(is_running, pids))
    finally:
        run_tool(["umount", str(served.mountpoint)], limit_seconds=10)
    assert served.log().count("SIGTERM: not ending: ") == 1
    os.kill(served.keeper, signal.SIGTERM)
    wait_gone(served, pids)


def test_the_next_mount_there_stays(mount: Callable[..., Served]) -> None:
    """A lazily unmounted mount that ends does not touch the newer one at its place."""
    first = mount()
    pids = [first.keeper, first.worker, first.standby]
    with opened(first.swapfile):
        unmount(str(first.mountpoint), lazy=True)
        second = mount()
        second.pool = second.pool.with_name(f"{second.pool.name}@1")
        for _ in range(2):
            os.kill(pids[0], signal.SIGTERM)  # it refuses, since its swapfile is open
            time.sleep(0.2)
        assert all(map(is_running, pids))
    wait_until(lambda: not any(map(is_running, pids)), "the end of the first")
    assert is_mounted(second.mountpoint)
    with opened(second.swapfile) as fd:
        fill(fd, 0, 64)
        compare(fd, 0, 64)
    zbudfs("umount", second.mountpoint)


def test_one_that_gives_up_takes_no_other_away() -> None:
    """If no worker starts any more, the mount goes away lazily, and the newer one at its place stays."""
    with faults.served("from zbudfs.service import backoff; backoff.MAX_FAILURES = 2") as served:
        fd = os.open(served.mountpoint / "swapfile", os.O_RDWR)
        keeper = served.pids["keeper"]
        unmount(str(served.mountpoint), lazy=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", served.mountpoint], check=True)
        try:
            with few_files(keeper, 0):
                served.send("standby", signal.SIGKILL)
                served.send("worker", signal.SIGKILL)
                served.wait(lambda: not is_running(keeper), "its end")
            assert served.mountpoint.is_mount()
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
            subprocess.run(["umount", served.mountpoint], check=True)


def test_places_of_a_mount() -> None:
    """Mounts are found by device, newest first, and a covered one is known as such."""
    table = rb"""1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:50 / /mnt/my\040swap rw - fuse.zbudfs zbudfs rw
3 1 0:51 / /mnt/other rw - fuse.zbudfs zbudfs rw
4 1 0:50 / /mnt/bound rw - fuse.zbudfs zbudfs rw
5 4 0:60 / /mnt/bound rw - tmpfs none rw
"""
    assert places_of("0:50", table) == [("/mnt/bound", True), ("/mnt/my swap", False)]
    assert places_of("0:51", table) == [("/mnt/other", False)]
    assert places_of("0:52", table) == []


def test_an_open_swapfile_is_no_process_that_stands_there(mount: Callable[..., Served]) -> None:
    """`umount` refuses because of the open file, which continues to work."""
    served = mount()
    with opened(served.swapfile) as fd, standing_in(served.mountpoint):
        fill(fd, 0, 16)
        run = run_zbudfs("umount", served.mountpoint)
        assert (run.returncode, "it is in use" in run.stderr) == (1, True)
        compare(fd, 0, 16)
