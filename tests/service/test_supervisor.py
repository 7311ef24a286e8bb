# SPDX-License-Identifier: MIT
"""The supervisor of several instances, under a manager that acts like systemd: each instance survives any kill."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.test_service import MIB, Manager
from tests.support import is_mounted, is_running, status_of, wait_until, zbudfs
from zbudfs.cli import config as configuration
from zbudfs.cli import unit
from zbudfs.service.settings import Settings
from zbudfs.service.supervisor import forget_dead, split_stored

PAGE = 4096
SUPERVISE = """
import fcntl, json, os, sys
from zbudfs.cli import stripe
from zbudfs.service import supervisor
from zbudfs.service.notify import Notifier, take_stored
from zbudfs.service.settings import Settings
fds = json.loads(sys.argv[1])
whole = Settings.from_json(os.read(int(sys.argv[2]), 65536))
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds.values()]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=":".join(fds))
parts = stripe.divided(whole, 2, whole.backing)
stripe.make_folders(parts)
raise SystemExit(supervisor.supervise(dict(enumerate(parts)), take_stored(), Notifier.from_environment()))
"""
"""The call of `zbudfs serve` with a configuration of two instances."""


class SupervisedManager(Manager):
    """A manager of a service of two instances."""

    launch = SUPERVISE


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[tuple[SupervisedManager, Path]]:
    """Return a running service of two instances, and the mountpoint of the whole."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    settings = Settings(
        mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=4 * MIB, backing=str(tmp_path / "backing")
    )
    manager = SupervisedManager(tmp_path, settings)
    with contextlib.closing(manager):
        manager.start()
        yield manager, mountpoint
        if is_mounted(mountpoint / "0"):
            zbudfs("umount", mountpoint)
        assert manager.process is not None
        manager.process.kill()
        manager.wait()


@contextlib.contextmanager
def in_use(mountpoint: Path) -> Iterator[None]:
    """Store a page in each instance and open the swapfiles. The pages must be there at the end."""
    fds = [os.open(mountpoint / name / "swapfile", os.O_RDWR) for name in "01"]
    try:
        for number, fd in enumerate(fds):
            os.pwrite(fd, bytes([number + 1]) * PAGE, 0)
        yield
        for number, fd in enumerate(fds):
            assert os.pread(fd, PAGE, 0) == bytes([number + 1]) * PAGE
    finally:
        for fd in fds:
            os.close(fd)


def test_sockets_of_the_dead_are_removed(tmp_path: Path) -> None:
    """The sockets of running supervisors stay, and so do all other files."""
    gone = os.fork()
    if not gone:
        os._exit(0)
    os.waitpid(gone, 0)
    names = [f"notify-{gone}-0", f"notify-{os.getpid()}-1", "swap"]
    for name in names:
        (tmp_path / name).touch()
    forget_dead(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


@pytest.mark.needs("root", "fuse")
def test_all_of_them_as_one_service(supervised: tuple[SupervisedManager, Path], tmp_path: Path) -> None:
    """The service is ready when both instances are, their descriptors are stored, and after the unmount nothing is left."""
    manager, mountpoint = supervised
    names = {f"{name}.{number}" for name in ("fuse", "lock", "backing") for number in (0, 1)}
    wait_until(lambda: set(manager.stored) == names, "the descriptors")
    assert len(status_of(mountpoint)["instances"]) == 2
    wait_until(lambda: any("0: " in line and "; 1: " in line for line in manager.said), "a status")
    alive = manager.said.count("WATCHDOG=1")
    wait_until(lambda: manager.said.count("WATCHDOG=1") >= alive + 2, "signs of life")
    zbudfs("umount", mountpoint)
    assert manager.wait() == 0
    wait_until(lambda: not manager.stored, "the store being emptied")
    assert list(mountpoint.iterdir()) == []


@pytest.mark.needs("root", "fuse")
def test_a_keeper_is_killed(supervised: tuple[SupervisedManager, Path]) -> None:
    """The supervisor starts another keeper, which continues. The other instance is not affected."""
    manager, mountpoint = supervised
    with in_use(mountpoint):
        first, second = status_of(mountpoint)["keeper_pid"]
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: status_of(mountpoint)["keeper_pid"][1] not in (second, 0), "another keeper")
        assert status_of(mountpoint)["keeper_pid"][0] == first
    assert manager.said.count("READY=1") == 1


@pytest.mark.needs("root", "fuse")
def test_a_hand_over(supervised: tuple[SupervisedManager, Path]) -> None:
    """`zbudfs restart` gives each instance a keeper that is no child of the supervisor, which watches it as well."""
    manager, mountpoint = supervised
    with in_use(mountpoint):
        before = status_of(mountpoint)["keeper_pid"]
        zbudfs("restart", mountpoint)
        between = status_of(mountpoint)["keeper_pid"]
        assert not set(before) & set(between)
        os.kill(between[0], signal.SIGKILL)
        wait_until(lambda: status_of(mountpoint)["keeper_pid"][0] not in (between[0], 0), "another keeper")
    assert manager.process is not None
    assert manager.process.poll() is None


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_supervisor_is_replaced(number: signal.Signals, supervised: tuple[SupervisedManager, Path]) -> None:
    """A supervisor that ends or is killed leaves the workers to serve, and the next one has everything."""
    manager, mountpoint = supervised
    wait_until(lambda: len(manager.stored) == 6, "the descriptors")
    with in_use(mountpoint):
        keepers = status_of(mountpoint)["keeper_pid"]
        assert manager.process is not None
        manager.process.send_signal(number)
        assert manager.wait() == (0 if number == signal.SIGTERM else -number)
        wait_until(lambda: not any(is_running(pid) for pid in keepers), "the keepers' end")
        manager.start()
        assert not set(status_of(mountpoint)["keeper_pid"]) & set(keepers)


@pytest.mark.needs("root", "fuse")
def test_told_to_end_with_nothing_open(supervised: tuple[SupervisedManager, Path]) -> None:
    """All instances are unmounted."""
    manager, mountpoint = supervised
    assert manager.process is not None
    manager.process.terminate()
    assert manager.wait() == 0
    assert not is_mounted(mountpoint / "0")
    assert not is_mounted(mountpoint / "1")


def test_descriptors_by_instance(tmp_path: Path) -> None:
    """The stored name ends with the number of the instance. A descriptor without one is closed."""
    lone = os.open("/dev/null", os.O_RDONLY)
    assert split_stored({"fuse.0": 10, "lock.0": 11, "fuse.11": 12, "fuse": lone}) == {
        0: {"fuse": 10, "lock": 11},
        11: {"fuse": 12},
    }
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(lone)


def test_which_instances_there_are(tmp_path: Path) -> None:
    """The instances that an earlier process left count more than the present configuration."""
    for folder, text in (
        ("etc/zbudfs", 'mountpoint = "/mnt/z"\ninstances = 2\nsize = "64M"\npool = "8M"\n'),
        ("proc", ""),
    ):
        (tmp_path / folder).mkdir(parents=True)
        if text:
            (tmp_path / folder / "s.toml").write_text(text)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8388608 kB\n")
    config = configuration.load("s", str(tmp_path))
    two = unit._parts(config, [])
    assert [part and part.mountpoint for part in two.values()] == ["/mnt/z/0", "/mnt/z/1"]
    assert set(unit._parts(config, ["fuse", "lock"])) == {unit.WHOLE}
    three = unit._parts(config, ["fuse.0", "lock.0", "fuse.1", "fuse.2"])
    assert (set(three), three[2]) == ({0, 1, 2}, None)
    assert unit._parts(None, ["fuse.0", "fuse.1"]) == {0: None, 1: None}
