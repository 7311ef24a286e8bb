# SPDX-License-Identifier: MIT
"""Exactly one process serves a mount, and a takeover may take any time, on real mounts.

Sleeps between the steps make a rebuild long, and the limits on silence are short: a rebuild may take longer than any of
them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kit.nbd import nbd_disk
from scripts import faults
from tests.service.test_keeper import Served, compare, fill, opened, watched
from tests.service.test_service import LAUNCH, MIB, Manager, steady_reader
from tests.support import LIMIT_SECONDS, is_running, run_zbudfs, wait_until, zbudfs
from zbudfs.service.log import Log
from zbudfs.service.mountpoint import zbudfs_mounts
from zbudfs.service.resources import Resources, StartError
from zbudfs.service.roster import Roster, is_ending
from zbudfs.service.settings import Settings
from zbudfs.store.status_area import Field

pytestmark = pytest.mark.needs("root", "fuse")

CAP_SYS_PTRACE: Final = 19
PR_CAPBSET_DROP: Final = 24


NO_PATIENCE: Final = """
for module in first_worker, standby_monitor, worker_monitor:
    module.START_LIMIT_SECONDS = module.HANG_SECONDS = 1.5
"""
KEPT_SECONDS: Final = 5.0
"""Several times as long as a worker may be silent with NO_PATIENCE."""


class WithoutPtrace(Manager):
    """A daemon that may not look into other processes, as in most containers."""

    launch = f"import ctypes; ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_PTRACE}, 0, 0, 0)\n{LAUNCH}"


def patched(patch: str) -> str:
    """Return a program that starts a daemon with a replaced part."""
    return LAUNCH.replace('"-m", "zbudfs.service.daemon"', '"-c", PROGRAM, "zbudfs.service.daemon"').replace(
        "import fcntl", f"PROGRAM = {faults.DAEMON.format(patch=patch)!r}\nimport fcntl"
    )


@contextlib.contextmanager
def service(kind: type[Manager], folder: Path, backing: Path) -> Iterator[tuple[Manager, Served]]:
    """Return a running service with a ready standby and stored descriptors."""
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
    """The keeper has the descriptors from the store, finds the processes and ends them. Two never serve at once."""
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
    """The keeper cannot copy them from the worker, says so, ends for good, and changes nothing."""
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
    """The second keeper leaves the mount of the first one alone, with the descriptors and without."""
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


TOGETHER: Final = """
find = daemon.find
def finding(*arguments):
    found = find(*arguments)
    open("{folder}/" + str(os.getpid()), "w").close()
    while len(os.listdir("{folder}")) < 2:
        time.sleep(0.001)
    return found
daemon.find = finding
"""
"""A service that looks for a mount, and continues when another service has looked as well."""


def test_two_services_at_the_same_instant(tmp_path: Path) -> None:
    """Two services start without a mount: one serves, and the other ends with the reason and leaves the mount alone."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    settings = Settings(mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=2 * MIB, backing=None)
    with contextlib.ExitStack() as stack:
        managers = []
        (tmp_path / "looked").mkdir()
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            manager = stack.enter_context(contextlib.closing(Manager(tmp_path / name, settings)))
            manager.launch = patched(TOGETHER.format(folder=tmp_path / "looked"))
            managers.append(manager)
        served = stack.enter_context(watched(Served(mountpoint)))
        for manager in managers:
            stack.callback(manager.lose)
        processes = [manager.launch_daemon(keep=False) for manager in managers]
        wait_until(lambda: any(process.poll() is not None for process in processes), "the end of one")
        loser = [process.poll() is not None for process in processes].index(True)
        winner = managers[1 - loser]
        assert processes[loser].wait() == 2
        wait_until(lambda: "READY=1" in winner.said, "READY=1")
        served.wait_ready()
        assert processes[1 - loser].poll() is None
        assert served.keeper == processes[1 - loser].pid
        assert servers(served) == [served.worker]
        assert len([mount for mount in zbudfs_mounts() if mount.mountpoint == str(mountpoint)]) == 1
        assert re.match("STATUS=(another zbudfs .* is being mounted|zbudfs is mounted) on ", managers[loser].said[-1])
        with opened(served.swapfile) as fd:
            fill(fd, 0, 512)
            compare(fd, 0, 512)
        zbudfs("umount", mountpoint)
        assert winner.wait() == 0


# ---- a disk write that does not end -------------------------------------------------------------------------------------


class Impatient(Manager):
    """A daemon whose keeper allows little silence."""

    launch = patched(NO_PATIENCE)


@pytest.mark.needs("loop", "nbd")
def test_a_killed_worker_whose_write_is_under_way(tmp_path: Path) -> None:
    """All three die while the disk keeps a write. The next worker waits for the end of the write, and nothing is lost.

    Only a child of the test has the swapfile open, since a close waits while no process serves.
    """
    with (
        nbd_disk(tmp_path, 96 * MIB) as disk,
        service(Impatient, tmp_path, disk.mounted / "backing") as (manager, served),
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
        next_one = served.field(Field.TAKING_OVER)
        time.sleep(KEPT_SECONDS)
        assert (process.poll(), served.field(Field.TAKING_OVER)) == (None, next_one)
        still.close()  # the disk continues
        assert os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) == 0
        found = served.stats()
        assert (found["lost_pages"], found["lost_in_recovery"], found["lost_damaged"]) == (0, 0, 0)
        assert servers(served) == [served.worker]


@contextlib.contextmanager
def write_kept(folder: Path) -> Iterator[tuple[Manager, Served, int, contextlib.ExitStack]]:
    """Return a service whose worker waits for a write that the disk keeps until the stack closes, and its swapfile."""
    with (
        nbd_disk(folder, 96 * MIB) as disk,
        service(Manager, folder, disk.mounted / "backing") as (manager, served),
        opened(served.swapfile) as fd,
        contextlib.ExitStack() as still,
    ):
        fill(fd, 0, 1500)
        wait_until(lambda: "D" not in states(served.worker), "the disk")
        still.enter_context(disk.standing_still())
        (served.mountpoint / "control/writeback").write_text("20")
        wait_until(lambda: "D" in states(served.worker), "a write that the disk keeps")
        yield manager, served, fd, still


@pytest.mark.needs("loop", "nbd")
def test_a_new_keeper_spares_a_worker_whose_write_is_under_way(tmp_path: Path) -> None:
    """The service restarts while the disk keeps a write: the old worker serves until the disk answers.

    The first new keeper gets the order to end meanwhile, and the second one takes over.
    """
    with write_kept(tmp_path) as (manager, served, fd, still):
        old = (served.worker, served.standby)
        os.kill(served.keeper, signal.SIGTERM)
        assert manager.wait() == 0
        process = manager.launch_daemon(keep=True)
        wait_until(lambda: "waits for the disk" in served.log(), "the new keeper")
        process.send_signal(signal.SIGTERM)
        assert manager.wait() == 1
        assert (served.worker, served.standby) == old
        said = len(manager.said)
        process = manager.launch_daemon(keep=True)
        wait_until(lambda: served.log().count("waits for the disk") == 2, "the next keeper")
        beats = manager.said.count("WATCHDOG=1")
        wait_until(lambda: manager.said.count("WATCHDOG=1") >= beats + 2, "signs of life")
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in manager.said[said:])
        assert any("waits for the disk" in line for line in manager.said[said:])
        assert (served.worker, served.standby, process.poll()) == (*old, None)
        compare(fd, 1499, 1)
        os.kill(old[0], 0)
        still.close()  # the disk continues
        wait_until(lambda: served.worker != old[0], "the next worker")
        compare(fd, 0, 1500)
        served.wait_ready()
        assert not any(is_running(pid) for pid in old)
        assert "the disk of the backing file answers" in served.log()
        found = served.stats()
        assert (found["lost_pages"], found["lost_in_recovery"], found["lost_damaged"]) == (0, 0, 0)


@pytest.mark.needs("loop", "nbd")
def test_a_restart_spares_a_worker_whose_write_is_under_way(tmp_path: Path) -> None:
    """The restart is refused after a while with the reason, and succeeds when the disk answers."""
    with write_kept(tmp_path) as (_, served, fd, still):
        old = (served.keeper, served.worker)
        run = run_zbudfs("restart", served.mountpoint)
        assert run.returncode == 1
        assert "the disk of the backing file does not answer" in run.stderr
        assert (served.keeper, served.worker) == old
        compare(fd, 1499, 1)
        still.close()
        zbudfs("restart", served.mountpoint)
        assert old[1] != served.worker
        compare(fd, 0, 1500)


def states(pid: int) -> set[str]:
    """Return the states of a process's threads."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            found.add(path.read_text().rpartition(")")[2].split()[0])
    return found


# ---- a long rebuild ------------------------------------------------------------------------------------------------------

SLOW_PAGES: Final = 2048
SLOW: Final = """
for module in first_worker, standby_monitor, worker_monitor:
    module.START_LIMIT_SECONDS = 0.6
handing_over.START_SECONDS = 0.6
from zbudfs.core.page_table import PageTable
stretches = PageTable.stretches
def slowly(self, *beats):
    for found in stretches(self, *beats):
        if self.nr_pages > 4096:
            time.sleep(0.3)
        yield found
PageTable.stretches = slowly
"""
"""A rebuild that takes several times the longest silence. The small store of the self-test is not slowed."""


def test_a_long_rebuild_is_no_hang() -> None:
    """The rebuild takes longer than a worker may be silent, after a death and in a restart, and no process is killed."""
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
    """A daemon that rebuilds slowly."""

    launch = patched(SLOW)


def test_a_long_rebuild_of_a_service(tmp_path: Path) -> None:
    """All three are killed. The manager gets signs of life during the rebuild, and READY only afterwards."""
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
    """Compare the pages in a child process, which waits until the mount is served."""
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


# ---- a kernel that does not resend requests ------------------------------------------------------------------------------


NO_RESEND: Final = "worker.resend = lambda fd: False"
"""Linux before 6.9."""


class OfOldKernel(Manager):
    """A daemon that finds that the kernel does not resend requests."""

    launch = patched(NO_RESEND)


def test_no_restart_that_loses_requests() -> None:
    """The restart is refused with the reason, and nothing changes."""
    with faults.served(NO_RESEND) as served, opened(served.mountpoint / "swapfile") as fd:
        fill(fd, 0, 512)
        before = served.pids
        with served.restart(NO_RESEND) as channel:
            assert b"Linux 6.9" in channel.recv(4096)
        assert served.pids == before
        compare(fd, 0, 512)


@pytest.mark.parametrize("kept", [True, False])
def test_no_new_keeper_that_loses_requests(kept: bool, tmp_path: Path) -> None:
    """The new keeper leaves the serving worker alone. When it is gone there is nothing to lose, and a keeper takes over."""
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
"""A worker that dies as soon as it serves, while a file exists."""


def test_a_worker_that_ends_well_while_the_mount_is_there(tmp_path: Path) -> None:
    """The keeper does not trust the exit status: memory and key stay, and the standby takes over."""
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
        served.wait(lambda: served.field(Field.RECOVERIES) >= 5, "five deaths")
        first = served.field(Field.RECOVERIES)
        time.sleep(0.5)
        assert served.field(Field.RECOVERIES) - first <= 1, "there is no back-off"
        flag.unlink()
        served.wait(lambda: served.is_well, "a worker that stays")
        compare(fd, 0, 512)


def test_a_system_of_32_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The system is refused before anything is made."""
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    settings = Settings(mountpoint=str(tmp_path), size_bytes=64 * MIB, pool_bytes=2 * MIB, backing=None)
    with pytest.raises(StartError, match="64-bit"):
        Resources(settings, Log(foreground=False)).make()
