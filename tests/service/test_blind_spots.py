# SPDX-License-Identifier: MIT
"""The keeper watches each of its children all the time: no process that dies or hangs leaves swap without an answer.

The faults are those of scripts/faults.py, which measures how long a page-in waits.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from scripts import faults
from tests.cli.test_restart import version_at
from tests.service.test_keeper import Served, compare, fill, mount, opened, watched
from tests.service.test_service import LAUNCH, Manager, service
from tests.support import LIMIT_SECONDS, is_running, status_of, wait_until
from zbudfs.store.status_area import Field

pytestmark = pytest.mark.needs("root", "fuse")

__all__ = ["mount", "service"]  # fixtures

LONG_SECONDS: Final = 8.0
"""Limit of a read across a fault, with a margin for a busy machine. Without the watch each fault cost 19 s and more."""

IN_A_RESTART: Final = (
    "start-worker-killed",
    "start-worker-stopped",
    "end-old-killed",
    "go-new-stopped",
    "over-worker-stopped",
)
IN_A_TAKEOVER: Final = ("standby-stopped-worker-killed", "keeper-stopped-worker-killed")


@pytest.mark.parametrize("name", IN_A_RESTART + IN_A_TAKEOVER)
def test_a_read_is_answered_soon(name: str) -> None:
    """A read is answered and right after any fault, and there is a worker and a standby again."""
    found = faults.measure(name)
    assert found["errors"] == []
    assert found["longest_seconds"] < LONG_SECONDS
    assert len(set(found["pids"].values())) == 3


# ---- a standby that hangs ------------------------------------------------------------------------------------------------


def test_a_standby_that_hangs_is_not_ready(mount: Callable[..., Served]) -> None:
    """A stopped standby is not ready, is replaced, and the log gives the reason. The worker is not disturbed."""
    served = mount()
    worker, standby = served.worker, served.standby
    os.kill(standby, signal.SIGSTOP)
    wait_until(lambda: not served.field(Field.STANDBY_READY), "its silence being noticed")
    wait_until(lambda: not is_running(standby), "its end")
    served.wait_ready()
    assert served.standby not in (0, standby)
    assert (served.worker, served.field(Field.RECOVERIES)) == (worker, 0)
    assert "the standby has not answered: it is stopped (SIGSTOP); it is killed" in served.log()


def test_a_standby_that_is_stopped_for_a_moment(mount: Callable[..., Served]) -> None:
    """The process is not ready meanwhile, and is the standby afterwards."""
    served = mount()
    standby = served.standby
    os.kill(standby, signal.SIGSTOP)
    try:
        wait_until(lambda: not served.field(Field.STANDBY_READY), "its silence being noticed")
    finally:
        os.kill(standby, signal.SIGCONT)
    served.wait_ready()
    assert served.standby == standby


NO_BEATS: Final = """
standby_monitor.HANG_SECONDS = worker_monitor.HANG_SECONDS = 1.0
keeper.CALM_POLL_SECONDS = 0.2
follow = worker.Worker._follow
async def following(self, helper, tuner):
    if os.path.exists({flag!r}):
        await worker.trio.sleep_forever()
    await follow(self, helper, tuner)
worker.Worker._follow = following
worker.FOLLOW_SECONDS = 0.2
"""
"""A standby that runs and does nothing while a file exists."""


def test_a_standby_that_runs_and_does_not_beat(tmp_path: Path) -> None:
    """Such a standby is replaced, and the next one works and stays."""
    flag = tmp_path / "flag"
    flag.touch()
    with faults.served(NO_BEATS.format(flag=str(flag))) as served:
        standby = served.pids["standby"]
        flag.unlink()
        served.wait(lambda: not is_running(standby), "its end")
        served.wait(lambda: served.is_well and served.pids["standby"] not in (0, standby), "the next one")
        following = served.pids["standby"]
        beats = served.field(Field.STANDBY_BEAT)
        served.wait(lambda: served.field(Field.STANDBY_BEAT) > beats + 10, "its beats")
        assert served.pids["standby"] == following
        assert "s of silence; it is killed" in (served.mountpoint / "stats/log").read_text()


def test_ctrl_z_stops_no_server(tmp_path: Path) -> None:
    """Ctrl-Z in a terminal stops the keeper of a foreground daemon, but not worker and standby, and none is replaced."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = ["--foreground", "--size", "64M", "--pool", "8M", "--backing", "none"]
    command = [sys.executable, "-m", "zbudfs", "mount", *options, str(mountpoint)]
    with (
        watched(Served(mountpoint)) as served,
        subprocess.Popen(command, stderr=subprocess.DEVNULL, process_group=0) as process,
    ):
        served.wait_ready()
        before = (served.worker, served.standby)
        os.killpg(process.pid, signal.SIGTSTP)
        try:
            with opened(served.swapfile) as fd:
                fill(fd, 0, 64)
                compare(fd, 0, 64)
        finally:
            os.killpg(process.pid, signal.SIGCONT)
        time.sleep(1.0)
        assert (served.worker, served.standby, served.field(Field.RECOVERIES)) == (*before, 0)
        os.kill(served.keeper, signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 0


def test_the_standby_is_still_getting_ready(mount: Callable[..., Served]) -> None:
    """A standby that is not ready needs memory that may be missing. It is killed, and another process serves at once."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        old = served.standby
        served.kill(old)
        wait_until(lambda: served.standby not in (0, old), "the next one being forked")
        os.kill(served.standby, signal.SIGSTOP)  # so that it is not ready when the keeper needs it
        unready = served.standby
        served.kill(served.worker)
        compare(fd, 0, 64)
        assert served.worker != unready
        wait_until(lambda: not is_running(unready), "its end")


# ---- control connections -------------------------------------------------------------------------------------------------


def test_clients_that_say_nothing() -> None:
    """With many silent clients, a dead worker is replaced at once, and an order is answered in the end."""
    with faults.served("from zbudfs.service import control\ncontrol.CLIENT_SECONDS = 2.0") as served:
        clients = []
        for _ in range(7):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(LIMIT_SECONDS)
            client.connect(str(served.pool / "control"))
            clients.append(client)
        try:
            with opened(served.mountpoint / "swapfile") as fd:
                fill(fd, 0, 64)
                began = time.monotonic()
                served.send("worker", signal.SIGKILL)
                compare(fd, 0, 64)
                assert time.monotonic() < began + 4.0, "they were waited for"  # each of these came first before
            clients[-1].sendall(b'{"order": "nothing"}')
            assert b"not understood" in clients[-1].recv(4096)
            assert b"no order has come" in clients[0].recv(4096)
        finally:
            for client in clients:
                client.close()


def test_a_fork_answers_no_client(mount: Callable[..., Served]) -> None:
    """A connected client gets no answer from the next standby, and its order to the keeper works afterwards."""
    served = mount()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT_SECONDS)
        client.connect(str(served.pool / "control"))
        old = served.standby
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: served.standby not in (0, old), "the next standby")
        client.sendall(b'{"order": "nothing"}')
        answer = b""
        while piece := client.recv(4096):
            answer += piece
    assert answer.count(b"error") == 1
    assert b"not understood" in answer


def test_two_restarts_at_once(mount: Callable[..., Served]) -> None:
    """The second restart is refused because one is under way, and the first continues."""
    served = mount()
    command = [sys.executable, "-m", "zbudfs", "restart", str(served.mountpoint)]
    keeper = served.keeper
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) as first,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) as second,
    ):
        said = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in (first, second)]
    assert 0 in (first.returncode, second.returncode)
    assert served.keeper != keeper
    if 1 in (first.returncode, second.returncode):
        assert any("a restart is under way" in text or "cannot be reached" in text for text in said)


# ---- what a failed start leaves ------------------------------------------------------------------------------------------


def numbers(served: Served) -> dict[str, int]:
    """Return the status area's numbers of processes and descriptors."""
    wanted = ("KEEPER_PID", "WORKER_PID", "STANDBY_PID", "STANDBY_READY", "FUSE_FD", "LOCK_FD", "BACKING_FD", "BORN_NS")
    return {name: served.field(Field[name]) for name in wanted}


def test_a_restart_that_fails_leaves_the_status_area_alone(mount: Callable[..., Served], tmp_path: Path) -> None:
    """A new worker that was ready changes no number, and another keeper can take over without the store."""
    other = version_at(
        tmp_path,
        "service/daemon.py",
        "    try:\n        channel.sendall(json.dumps(ready)",
        "    os._exit(1)\n    try:\n        channel.sendall(json.dumps(ready)",
    )
    served = mount("--backing", tmp_path / "backing", "--pool", "2M")
    before = numbers(served)
    assert 0 not in before.values()
    run = subprocess.run(
        [other, "-I", "-m", "zbudfs", "restart", str(served.mountpoint)], capture_output=True, check=False, text=True
    )
    assert run.returncode == 1, run.stdout
    assert numbers(served) == before
    for name in ("FUSE_FD", "LOCK_FD", "BACKING_FD"):
        target = str(Path(f"/proc/{served.worker}/fd/{before[name]}").readlink())
        assert target.startswith(("/dev/fuse", str(served.pool / "lock"), str(tmp_path / "backing"))), (name, target)


NO_WARM_UP: Final = LAUNCH.replace('"-m", "zbudfs.service.daemon"', '"-c", PROGRAM, "zbudfs.service.daemon"').replace(
    "import fcntl",
    "PROGRAM = 'import sys; from zbudfs.service import daemon, worker; worker._warm_up = None;"
    " sys.exit(daemon.main(sys.argv[2:]))'\nimport fcntl",
)
"""A service whose workers cannot get ready."""


def test_a_service_that_does_not_start_leaves_the_status_area_alone(service: tuple[Manager, Served]) -> None:
    """Its keeper is killed, and the next one fails before it takes over. Worker and standby continue, and a later one works."""
    manager, served = service
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
        served.kill(served.keeper)
        manager.wait()
        before = numbers(served)
        launch_well = manager.launch
        manager.launch = NO_WARM_UP
        manager.launch_daemon(keep=False)
        assert manager.wait() == 1
        assert numbers(served) == before
        compare(fd, 0, 512)
        manager.launch = launch_well
        manager.start(keep=False)
        compare(fd, 0, 512)


# ---- forks that fail ---------------------------------------------------------------------------------------------------


FORKS: Final = """
import os, resource, sys
from zbudfs.service.child import Child

def state():
    children = os.listdir("/proc/self/task"), open(f"/proc/self/task/{os.getpid()}/children").read()
    return sorted(os.listdir("/proc/self/fd")), children

before = state()
for room in (0, 1, 2):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before[0]) - 1 + room, 4096))
    try:
        Child.fork(lambda order, ready: os._exit(0), is_standby=True)
    except OSError as error:
        print(error.strerror)
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
if len(sys.argv) > 1:  # a cgroup in which there is room for this process alone
    open(sys.argv[1] + "/cgroup.procs", "w").write("0")
    for _ in range(50):
        try:
            Child.fork(lambda order, ready: os._exit(0), is_standby=True)
        except OSError as error:
            assert "temporarily unavailable" in str(error), error
        else:
            raise AssertionError("it could fork")
assert state() == before, state()
"""


@contextmanager
def crowded() -> Iterator[list[str]]:
    """Make a cgroup with room for one process, if this system has such."""
    tree = Path("/sys/fs/cgroup/pids")  # version 1
    tree = tree if tree.is_dir() else tree.parent
    folder = tree / f"zbudfs-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "pids.max").write_text("1")
    except OSError:
        if folder.is_dir():
            folder.rmdir()
        yield []
        return
    try:
        yield [str(folder)]
    finally:
        wait_until(lambda: not (folder / "cgroup.procs").read_text(), "it being empty")
        folder.rmdir()


def test_a_fork_that_fails_leaves_nothing() -> None:
    """If the descriptor, the process or its pidfd is refused, no descriptor and no process stays."""
    with crowded() as cgroup:
        run = subprocess.run(
            [sys.executable, "-c", FORKS, *cgroup], capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
        )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "Too many open files\n" * 3


SOON: Final = """
from zbudfs.service import backoff
backoff.STEADY_SECONDS = 0.5
backoff.LONGEST_BACK_OFF_SECONDS = 0.25
fork = os.fork
def failing():
    if os.path.exists({flag!r}):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = failing
"""
"""Forks fail while a file exists, as at a limit on processes, and the keeper tries four times a second."""


def test_a_lasting_fault_is_reported_once(tmp_path: Path) -> None:
    """While no standby can be forked, the log says so once, and `status` says since when. The log reports the end."""
    flag = tmp_path / "flag"
    with faults.served(SOON.format(flag=str(flag))) as served:
        log = served.mountpoint / "stats/log"
        flag.touch()
        served.send("standby", signal.SIGKILL)
        time.sleep(1.2)
        text = log.read_text()
        assert text.count("no standby can be forked: Resource temporarily unavailable; it is tried again") == 1
        found = status_of(served.mountpoint)
        assert (found["standby_ready"], found["standby_pid"]) == (False, 0)
        (warning,) = [line for line in found["warnings"] if "no standby since" in line]
        assert "Resource temporarily unavailable" in warning
        flag.unlink()
        served.wait(lambda: "a standby is ready, after" in log.read_text(), "the end being told")
        assert not [line for line in status_of(served.mountpoint)["warnings"] if "no standby since" in line]
        assert log.read_text().count("no standby can be forked") == 1
