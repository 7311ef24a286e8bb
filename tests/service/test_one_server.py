# SPDX-License-Identifier: MIT
"""Exactly one process serves a mount, and a takeover may take any time, on real mounts.

A rebuild that takes long is made by sleeps between its steps, and the limits on silence are small: what counts is that a
rebuild may take longer than any of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from scripts import faults
from scripts.nbd import nbd_disk
from tests.service.test_keeper import Served, compare, fill, opened, watched
from tests.service.test_service import LAUNCH, MIB, Manager, steady_reader
from tests.support import LIMIT_SECONDS, is_running, wait_until
from zbudfs.service.keeper import Keeper, StartError
from zbudfs.service.log import Log
from zbudfs.service.roster import Roster, is_ending
from zbudfs.service.settings import Settings
from zbudfs.store.board import Field

pytestmark = pytest.mark.needs("root", "fuse")

CAP_SYS_PTRACE: Final = 19
PR_CAPBSET_DROP: Final = 24


class WithoutPtrace(Manager):
    """Its daemon may not look into other processes, as in most containers."""

    launch = f"import ctypes; ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_PTRACE}, 0, 0, 0)\n{LAUNCH}"


@contextlib.contextmanager
def service(kind: type[Manager], folder: Path, backing: Path) -> Iterator[tuple[Manager, Served]]:
    """A service that runs, its standby ready and its descriptors stored."""
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    settings = Settings(
        mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=2 * MIB, backing=str(backing), force_backing=True
    )
    manager = kind(folder, settings)
    with contextlib.closing(manager), watched(Served(mountpoint)) as served:
        manager.start()
        served.wait_ready()
        wait_until(lambda: len(manager.stored) == 3, "the descriptors")
        yield manager, served
        manager.lose()
        served.kill_all()
        manager.wait()


def servers(served: Served) -> list[int]:
    """Return the processes of the roster that have the lock of the server: none, or one."""
    with contextlib.closing(Roster(str(served.pool), create=False)) as roster:
        pid = roster.server()
        return [] if pid is None else [pid]


# ---- without CAP_SYS_PTRACE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_keeper_may_not_look(number: signal.Signals, tmp_path: Path) -> None:
    """It has the descriptors from the store, finds those who serve, and ends them: never do two of them serve."""
    with service(WithoutPtrace, tmp_path, tmp_path / "backing") as (manager, served), opened(served.swapfile) as fd:
        status = Path(f"/proc/{served.worker}/status").read_text()
        capabilities = int(status.split("CapEff:")[1].split()[0], 16)
        assert not capabilities >> CAP_SYS_PTRACE & 1
        fill(fd, 0, 4096)
        old = [served.worker, served.standby]
        with steady_reader(fd):
            os.kill(served.keeper, number)
            manager.wait()
            manager.start()
            wait_until(lambda: not any(is_running(pid) for pid in old), "the end of the former worker and standby")
            served.wait_ready()
        assert servers(served) == [served.worker]
        compare(fd, 0, 4096)
        found = served.stats()
        assert (found["lost_pages"], found["lost_in_recovery"]) == (0, 0)


def test_the_next_keeper_has_no_descriptors(tmp_path: Path) -> None:
    """It cannot copy them out of the worker: it says so, ends for good, and touches nothing."""
    with service(WithoutPtrace, tmp_path, tmp_path / "backing") as (manager, served), opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
        old = (served.worker, served.standby)
        os.kill(served.keeper, signal.SIGKILL)
        manager.wait()
        manager.launch_daemon(keep=False)
        assert manager.wait() == 2
        assert any("cannot take over" in line and "CAP_SYS_PTRACE" in line for line in manager.said)
        assert (served.worker, served.standby) == old
        assert servers(served) == [old[0]]
        compare(fd, 0, 1024)


# ---- a second service --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_a_second_keeper_beside_one_that_lives(kept: bool, tmp_path: Path) -> None:
    """It leaves the first one's mount alone, with the descriptors and without."""
    with service(Manager, tmp_path, tmp_path / "backing") as (manager, served), opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
        first = manager.process
        assert first is not None
        old = (served.keeper, served.worker, served.standby)
        stored = dict(manager.stored)
        if not kept:
            manager.stored.clear()
        try:
            manager.launch_daemon(keep=True)
            assert manager.wait() == 2
        finally:
            manager.process = first
            manager.stored.update(stored)
        assert any("its keeper, process" in line for line in manager.said)
        assert (served.keeper, served.worker, served.standby) == old
        compare(fd, 0, 1024)


# ---- a disk write that does not end -------------------------------------------------------------------------------------


@pytest.mark.needs("loop", "nbd")
def test_a_killed_worker_whose_write_is_under_way(tmp_path: Path) -> None:
    """All three are killed while the disk keeps a write: the next keeper's worker waits for its end, and nothing is lost.

    Only a child of the test has the swapfile open: closing it waits while nobody serves.
    """
    with (
        nbd_disk(tmp_path, 96 * MIB) as disk,
        service(Manager, tmp_path, disk.mounted / "backing") as (manager, served),
        contextlib.ExitStack() as stack,
    ):
        mine, its = socket.socketpair()
        mine.settimeout(LIMIT_SECONDS)
        stack.enter_context(mine)
        stack.enter_context(its)
        program = os.fork()
        if not program:
            status = 1
            try:
                with opened(served.swapfile) as fd:
                    fill(fd, 0, 1500)
                    its.send(b"filled")
                    its.recv(1)
                    fill(fd, 1500, 64)
                    compare(fd, 0, 1564)
                    status = 0
            finally:
                os._exit(status)
        assert mine.recv(16) == b"filled"
        control = served.mountpoint / "control/writeback"
        still = stack.enter_context(contextlib.ExitStack())
        still.enter_context(disk.standing_still())
        control.write_text("20")
        old = served.worker
        wait_until(lambda: "D" in states(old), "a write that the disk keeps")
        keeper, standby = served.keeper, served.standby
        for pid in (keeper, old, standby):
            os.kill(pid, signal.SIGKILL)
        manager.wait()
        wait_until(lambda: is_ending(old) and not is_running(standby), "their deaths")
        mine.send(b"x")
        process = manager.launch_daemon(keep=True)
        wait_until(lambda: served.field(Field.TAKING_OVER) not in (0, old, standby), "the new worker")
        beat = served.field(Field.HEARTBEAT)
        wait_until(lambda: served.field(Field.HEARTBEAT) > beat + 3, "its signs of life")
        assert servers(served) == [old]
        assert served.field(Field.SERVING) == 0
        assert served.field(Field.WORKER_PID) != old  # the keeper has named the next one, which waits
        assert process.poll() is None
        still.close()  # the disk goes on
        assert os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) == 0
        found = served.stats()
        assert (found["lost_pages"], found["lost_in_recovery"], found["lost_damaged"]) == (0, 0, 0)
        assert servers(served) == [served.worker]


def states(pid: int) -> set[str]:
    """Return the states of a process's threads."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            found.add(path.read_text().rpartition(")")[2].split()[0])
    return found


# ---- a rebuild that takes long ------------------------------------------------------------------------------------------

SLOW_PAGES: Final = 2048
SLOW: Final = """
keeper.START_LIMIT_SECONDS = handing_over.START_SECONDS = 0.6
from zbudfs.core.page_table import PageTable
stretches = PageTable.stretches
def slowly(self, *beats):
    for found in stretches(self, *beats):
        if self.nr_pages > 4096:
            time.sleep(0.3)
        yield found
PageTable.stretches = slowly
"""
"""A rebuild of the test's pages takes several times the longest silence. The small store that tries itself out is spared."""


def test_a_long_rebuild_is_no_hang() -> None:
    """It takes longer than a worker may be silent, at the death of a worker and at a restart, and nobody is killed."""
    with faults.served(SLOW) as served:
        with opened(served.mountpoint / "swapfile") as fd:
            fill(fd, 0, SLOW_PAGES)
            for number in range(2):
                began = time.monotonic()
                if number:
                    with served.restart(SLOW) as channel:
                        assert b'"pid"' in channel.recv(4096)
                else:
                    old = served.send("worker", signal.SIGKILL)
                    served.wait(lambda: served.field(Field.WORKER_PID) != old, "the next worker")  # noqa: B023
                compare(fd, 0, 1)
                assert time.monotonic() - began > 1.0, "the rebuild was not slow"
                compare(fd, 0, SLOW_PAGES)
                served.wait(lambda: served.is_well, "a standby")
        log = (served.mountpoint / "stats/log").read_text()
        assert "killed" not in log
        assert served.field(Field.RECOVERIES) == 1


class Slow(Manager):
    """Its daemon rebuilds slowly."""

    launch = LAUNCH.replace('"-m", "zbudfs.service.daemon"', '"-c", PROGRAM, "zbudfs.service.daemon"').replace(
        "import fcntl", f"PROGRAM = {faults.DAEMON.format(patch=SLOW)!r}\nimport fcntl"
    )


def test_a_long_rebuild_of_a_service(tmp_path: Path) -> None:
    """All three are killed: the manager hears signs of life during the rebuild, and that it is ready only afterwards."""
    with service(Slow, tmp_path, tmp_path / "backing") as (manager, served):
        reader = threading.Thread(target=lambda: compare_in_child(served))
        with opened(served.swapfile) as fd:
            fill(fd, 0, SLOW_PAGES)
        served.kill(served.keeper, served.worker, served.standby)
        manager.wait()
        said = len(manager.said)
        ready = manager.said.count("READY=1")
        manager.launch_daemon(keep=True)
        reader.start()
        wait_until(lambda: manager.said.count("READY=1") > ready, "READY=1")
        reader.join()
        meanwhile = manager.said[said:]
        meanwhile = meanwhile[: meanwhile.index("READY=1")]
        assert meanwhile.count("WATCHDOG=1") >= 3
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in meanwhile)
        assert served.field(Field.RECOVERIES) == 1
        assert served.stats()["lost_pages"] == 0


def compare_in_child(served: Served, pages: int = SLOW_PAGES) -> None:
    """Compare the pages, in a process of its own: it waits until the mount is served."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with opened(served.swapfile, os.O_RDONLY) as fd:
                compare(fd, 0, pages)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# ---- a kernel that does not send requests again ---------------------------------------------------------------------------


NO_RESEND: Final = "worker.resend = lambda fd: False"
"""Linux before 6.9."""


class OfOldKernel(Manager):
    """Its daemon finds that the kernel does not send requests again."""

    launch = LAUNCH.replace('"-m", "zbudfs.service.daemon"', '"-c", PROGRAM, "zbudfs.service.daemon"').replace(
        "import fcntl", f"PROGRAM = {faults.DAEMON.format(patch=NO_RESEND)!r}\nimport fcntl"
    )


def test_no_restart_that_loses_requests() -> None:
    """It is refused, with the reason, and nothing changes."""
    with faults.served(NO_RESEND) as served, opened(served.mountpoint / "swapfile") as fd:
        fill(fd, 0, 512)
        before = served.pids
        with served.restart(NO_RESEND) as channel:
            assert b"Linux 6.9" in channel.recv(4096)
        assert served.pids == before
        compare(fd, 0, 512)


@pytest.mark.parametrize("kept", [True, False])
def test_no_new_keeper_that_loses_requests(kept: bool, tmp_path: Path) -> None:
    """It leaves the worker that serves; once that one is gone there is nothing to lose, and the next keeper takes over."""
    with service(OfOldKernel, tmp_path, tmp_path / "backing") as (manager, served):
        with opened(served.swapfile) as fd:
            fill(fd, 0, 512)
            old = (served.worker, served.standby)
            os.kill(served.keeper, signal.SIGKILL)
            manager.wait()
            stored = {} if kept else {name: os.dup(number) for name, number in manager.stored.items()}
            manager.launch_daemon(keep=kept)
            assert manager.wait() == 2
            assert any("Linux 6.9" in line for line in manager.said)
            assert (served.worker, served.standby) == old
            compare(fd, 0, 512)
        manager.stored.update(stored)
        served.kill(served.standby, served.worker)
        manager.start()
        compare_in_child(served, 512)


# ---- workers that end without a reason ------------------------------------------------------------------------------------

LEAVES: Final = """
serve = worker.serve
async def leaving():
    async with worker.trio.open_nursery() as nursery:
        async def watch():
            while not os.path.exists({flag!r}):
                await worker.trio.sleep(0.02)
            os.unlink({flag!r})
            nursery.cancel_scope.cancel()
        nursery.start_soon(watch)
        await serve()
worker.serve = leaving
"""
"""A worker that ends with status 0 when a file appears."""

DIES: Final = """
serve = worker.serve
async def dying():
    if os.path.exists({flag!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    await serve()
worker.serve = dying
"""
"""A worker that dies as soon as it serves, while a file is there."""


def test_a_worker_that_ends_well_while_the_mount_is_there(tmp_path: Path) -> None:
    """Its exit status is not believed: memory and key are kept, and the standby takes over."""
    flag = tmp_path / "flag"
    with faults.served(LEAVES.format(flag=str(flag))) as served, opened(served.mountpoint / "swapfile") as fd:
        fill(fd, 0, 512)
        old = served.pids["worker"]
        flag.touch()
        served.wait(lambda: served.pids["worker"] != old and served.is_well, "another worker")
        compare(fd, 0, 512)
        assert served.field(Field.RECOVERIES) == 1


def test_workers_that_die_as_soon_as_they_serve(tmp_path: Path) -> None:
    """The keeper replaces them at longer and longer intervals, and does not give up."""
    flag = tmp_path / "flag"
    with faults.served(DIES.format(flag=str(flag))) as served, opened(served.mountpoint / "swapfile") as fd:
        fill(fd, 0, 512)
        flag.touch()
        served.send("worker", signal.SIGKILL)
        served.wait(lambda: served.field(Field.RECOVERIES) >= 6, "six deaths")
        first = served.field(Field.RECOVERIES)
        time.sleep(0.5)
        assert served.field(Field.RECOVERIES) - first <= 1, "there is no back-off"
        flag.unlink()
        served.wait(lambda: served.is_well, "a worker that stays")
        compare(fd, 0, 512)


def test_a_system_of_32_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is refused before anything is made."""
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    settings = Settings(mountpoint=str(tmp_path), size_bytes=64 * MIB, pool_bytes=2 * MIB, backing=None)
    with pytest.raises(StartError, match="64-bit"):
        Keeper(settings, Log(foreground=False), foreground=False).make()
