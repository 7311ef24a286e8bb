# SPDX-License-Identifier: MIT
"""The keeper as the main process of a service, under a manager that stores descriptors like systemd.

After a stop or a kill of keeper, worker or standby, the next keeper continues with the rest, and no reader notices it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.service.test_keeper import PAGE, Served, compare, fill, opened, watched
from tests.support import LIMIT_SECONDS, is_mounted, is_running, wait_until, zbudfs
from zbudfs.service.mountpoint import zbudfs_mounts
from zbudfs.service.settings import Settings
from zbudfs.store.status_area import Field

pytestmark = pytest.mark.needs("root", "fuse")

MIB: Final = 1 << 20
LAUNCH: Final = """
import fcntl, json, os, sys
fds, settings = json.loads(sys.argv[1]), int(sys.argv[2])
high = {name: fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for name, fd in fds.items()}
settings = fcntl.fcntl(settings, fcntl.F_DUPFD, 100)
for number, fd in enumerate(high.values(), 3):
    os.dup2(fd, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=":".join(fds))
command = [sys.executable, "-I", "-m", "zbudfs.service.daemon", "--service", "--settings-fd", str(settings)]
os.execv(command[0], command)
"""
"""The steps of systemd between fork and exec."""


class Manager:
    """A manager that starts the daemon, receives its messages, and keeps descriptors for it."""

    launch = LAUNCH
    """The program that gets the descriptors and the settings."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.said: list[str] = []
        self.stored: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self._settings = settings
        self._path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))
        self._end, self._ender = os.pipe()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while self._end not in select.select([self._socket.fileno(), self._end], [], [])[0]:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            lines = data.decode().split("\n")
            names = [line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")]
            if "FDSTORE=1" in lines:
                assert "FDPOLL=0" in lines
                (fd,) = fds
                os.close(self.stored.pop(names[0], os.open("/dev/null", os.O_RDONLY)))
                self.stored[names[0]] = fd
            if "FDSTOREREMOVE=1" in lines and names[0] in self.stored:
                os.close(self.stored.pop(names[0]))
            self.said += lines

    def start(self, *, keep: bool = True) -> None:
        """Start the daemon with the stored descriptors, and wait until it is ready."""
        ready = self.said.count("READY=1")
        process = self.launch_daemon(keep=keep)
        try:
            wait_until(lambda: self.said.count("READY=1") > ready, "READY=1")
        except AssertionError as error:
            process.kill()
            self.lose()  # programs that wait for an answer get an error
            raise AssertionError(f"{error}; it said {self.said[-5:]}") from None

    def launch_daemon(self, *, keep: bool) -> subprocess.Popen[bytes]:
        """Start the daemon with the stored descriptors, or without."""
        settings_fd, write_fd = os.pipe()
        os.write(write_fd, self._settings.to_json().encode())
        os.close(write_fd)
        if not keep:
            self.lose()
        command = [sys.executable, "-c", self.launch, json.dumps(self.stored), str(settings_fd)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(self._path), "WATCHDOG_USEC": "2000000"}
        fds = (*self.stored.values(), settings_fd)
        self.process = subprocess.Popen(command, env=environment, pass_fds=fds, start_new_session=True)
        os.close(settings_fd)
        return self.process

    def lose(self) -> None:
        """Forget all descriptors, like a manager whose service was stopped."""
        for name in list(self.stored):
            os.close(self.stored.pop(name))

    def wait(self) -> int:
        """Wait for the end of the main process, and return its exit status."""
        assert self.process is not None
        return self.process.wait(LIMIT_SECONDS)

    def close(self) -> None:
        """Stop listening."""
        os.write(self._ender, b"x")
        self._thread.join()
        for fd in (self._end, self._ender):
            os.close(fd)
        self._socket.close()
        self.lose()


class WithoutNames(Manager):
    """A daemon that finds that a pool directory cannot be a tmpfs, as before Linux 6.4."""

    launch = LAUNCH.replace('"-m", "zbudfs.service.daemon"', '"-c", PROGRAM, "zbudfs.service.daemon"').replace(
        "import fcntl",
        "PROGRAM = 'import sys; from zbudfs.service import daemon, pooldir;"
        " pooldir._mount_tmpfs = lambda path, settings: False; sys.exit(daemon.main(sys.argv[2:]))'\nimport fcntl",
    )

    def start_again(self, *, kept: bool) -> int:
        """Start a daemon that fails, and return its exit status."""
        self.launch_daemon(keep=kept)
        return self.wait()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Manager, Served]]:
    """Return a running service with a backing file."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    settings = Settings(
        mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=2 * MIB, backing=str(tmp_path / "backing")
    )
    manager = Manager(tmp_path, settings)
    with contextlib.closing(manager), watched(Served(mountpoint)) as served:
        manager.start()
        served.wait_ready()
        yield manager, served
        manager.lose()
        served.kill_all()
        manager.wait()


@contextlib.contextmanager
def steady_reader(fd: int) -> Iterator[None]:
    """Read and write pages of the swapfile during the block. No call may fail."""
    failures: list[str] = []
    end = threading.Event()

    def read() -> None:
        number = 0
        while not end.is_set():
            page = bytes([number & 255]) * 8 + os.urandom(8) * 511
            try:
                os.pwrite(fd, page, (8192 + number % 64) * PAGE)
                if os.pread(fd, PAGE, (8192 + number % 64) * PAGE) != page:
                    failures.append(f"wrong page {number}")
            except OSError as error:
                failures.append(str(error))
            number += 1
            time.sleep(0.001)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert not failures, failures[:3]


def test_the_manager_gets_the_state(service: tuple[Manager, Served]) -> None:
    """The manager gets READY, the descriptors, a line of status that follows the stored pages, and signs of life."""
    manager, served = service
    wait_until(lambda: set(manager.stored) == {"fuse", "lock", "backing"}, "the descriptors")
    assert Path(f"/proc/self/fd/{manager.stored['fuse']}").readlink() == Path("/dev/fuse")
    alive = manager.said.count("WATCHDOG=1")
    wait_until(lambda: manager.said.count("WATCHDOG=1") >= alive + 2, "signs of life")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 2048)
        wait_until(lambda: any(line.startswith("STATUS=2048 pages stored") for line in manager.said), "a status")
    zbudfs("umount", served.mountpoint)
    assert manager.wait() == 0
    wait_until(lambda: not manager.stored, "the store being emptied")
    assert not served.pool.exists()


def test_told_to_end_with_nothing_open(service: tuple[Manager, Served], tmp_path: Path) -> None:
    """SIGTERM unmounts, and leaves nothing behind."""
    manager, served = service
    with opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
    os.kill(served.keeper, signal.SIGTERM)
    assert manager.wait() == 0
    wait_until(lambda: "STOPPING=1" in manager.said, "STOPPING=1")
    wait_until(lambda: not manager.stored, "the store being emptied")
    assert not is_mounted(served.mountpoint)
    assert not served.pool.exists()
    assert (tmp_path / "backing").stat().st_size == 0


@pytest.mark.parametrize(("number", "kept"), [(signal.SIGTERM, True), (signal.SIGKILL, True), (signal.SIGKILL, False)])
def test_the_keeper_is_replaced(number: signal.Signals, kept: bool, service: tuple[Manager, Served]) -> None:
    """While the swapfile is in use only the keeper ends. The next one has everything, with the store or without."""
    manager, served = service
    with opened(served.swapfile) as fd:
        fill(fd, 0, 4096)
        old = [served.worker, served.standby]
        with steady_reader(fd):
            os.kill(served.keeper, number)
            assert manager.wait() == (0 if number == signal.SIGTERM else -number)
            compare(fd, 0, 512)
            assert all(is_running(pid) for pid in old)
            manager.start(keep=kept)
            wait_until(lambda: not any(is_running(pid) for pid in old), "the end of the former processes")
            served.wait_ready()
        assert manager.process is not None
        assert served.keeper == manager.process.pid
        compare(fd, 0, 4096)
        found = served.stats()
        assert (found["lost_pages"], found["lost_in_recovery"], len(manager.stored)) == (0, 0, 3)


def test_keeper_and_worker_are_killed(service: tuple[Manager, Served]) -> None:
    """The standby takes over by itself, and the next keeper takes over from it."""
    manager, served = service
    with opened(served.swapfile) as fd:
        fill(fd, 0, 4096)
        standby = served.standby
        with steady_reader(fd):
            served.kill(served.keeper, served.worker)
            manager.wait()
            compare(fd, 0, 512)
            assert served.worker == standby
            assert served.field(Field.RECOVERIES) == 1
            manager.start()
            assert not is_running(standby)
        compare(fd, 0, 4096)
        assert served.stats()["lost_pages"] == 0


def test_all_of_them_are_killed(service: tuple[Manager, Served]) -> None:
    """A reader waits for the next keeper, which has the connection from the store and the rest from the pool.

    Only a child has the file open, since a process with the file open waits when it starts a program, which closes it.
    """
    manager, served = service
    wait_until(lambda: len(manager.stored) == 3, "the descriptors")
    mine, its = socket.socketpair()
    reader = os.fork()
    if not reader:
        status = 1
        try:
            with opened(served.swapfile) as fd:
                fill(fd, 0, 4096)
                its.send(b"filled")
                its.recv(1)
                compare(fd, 0, 4096)
            status = 0
        finally:
            os._exit(status)
    mine.settimeout(LIMIT_SECONDS)
    with mine, its:
        assert mine.recv(16) == b"filled"
        served.kill(served.keeper, served.worker, served.standby)
        manager.wait()
        mine.send(b"x")
        manager.start()
        assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0
    found = served.stats()
    assert (found["lost_pages"], found["recoveries"]) == (0, 1)


def test_a_stuck_worker_is_no_sign_of_life(service: tuple[Manager, Served]) -> None:
    """While the heartbeat stands still there are no messages. The keeper kills the worker, and then they come again."""
    manager, served = service
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
        worker = served.worker
        os.kill(worker, signal.SIGSTOP)
        before = manager.said.count("WATCHDOG=1")
        while served.worker == worker and is_running(worker):
            assert manager.said.count("WATCHDOG=1") <= before + 2, "it says that a stopped worker is alive"
            time.sleep(0.05)
        compare(fd, 0, 512)
        alive = manager.said.count("WATCHDOG=1")
        wait_until(lambda: manager.said.count("WATCHDOG=1") > alive, "signs of life")


def test_restart_names_the_new_main_process(service: tuple[Manager, Served]) -> None:
    """`zbudfs restart` hands over to another process: the manager gets its number, and it sends messages and descriptors."""
    manager, served = service
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
        old = served.keeper
        zbudfs("restart", served.mountpoint)
        assert manager.wait() == 0
        assert served.keeper != old
        wait_until(lambda: f"MAINPID={served.keeper}" in manager.said, "MAINPID")
        alive = manager.said.count("WATCHDOG=1")
        wait_until(lambda: manager.said.count("WATCHDOG=1") > alive, "signs of life")
        compare(fd, 0, 512)
        served.wait_ready()
        os.kill(served.keeper, signal.SIGKILL)
        manager.start()
        compare(fd, 0, 512)


def test_the_mount_is_gone(service: tuple[Manager, Served]) -> None:
    """If the mount went away without a keeper, the stored descriptors are useless, and the next keeper mounts again."""
    manager, served = service
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
    served.kill(served.keeper, served.worker, served.standby)
    manager.wait()
    subprocess.run(["umount", "-l", served.mountpoint], check=True)
    manager.start()
    with opened(served.swapfile) as fd:
        assert os.pread(fd, PAGE, 0) == bytes(PAGE)
    served.wait_ready()
    folders = list(served.pool.parent.glob(f"{served.pool.name}*"))
    assert folders == [served.pool]


@pytest.mark.parametrize("kept", [True, False])
def test_memory_without_a_name_is_left_to_its_server(kept: bool, tmp_path: Path) -> None:
    """A keeper that cannot map the memory of a mount ends for good and changes nothing. Then everything is as before."""
    mountpoint, backing = tmp_path / "mnt", tmp_path / "backing"
    mountpoint.mkdir()
    settings = Settings(mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=2 * MIB, backing=str(backing))
    manager = WithoutNames(tmp_path, settings)
    with contextlib.closing(manager):
        manager.start()
        try:
            served = Served(mountpoint)
            wait_until(lambda: served.stats()["standby_ready"], "a standby")
            before = served.stats()
            with opened(served.swapfile) as fd:
                fill(fd, 0, 2000)
                assert manager.process is not None
                os.kill(manager.process.pid, signal.SIGTERM)
                assert manager.wait() == 0
                assert manager.start_again(kept=kept) == 2
                assert any("cannot take over" in line for line in manager.said)
                compare(fd, 0, 2000)
                fill(fd, 2000, 2000)
                compare(fd, 0, 4000)
            assert served.stats()["worker_pid"] == before["worker_pid"]
            assert [mount.mountpoint for mount in zbudfs_mounts()].count(str(mountpoint)) == 1
        finally:
            manager.lose()
            zbudfs("umount", mountpoint)
