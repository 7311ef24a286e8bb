# SPDX-License-Identifier: MIT
"""The keeper on real mounts: whichever process dies, and when, the written pages are there and no read waits for ever.

The tests kill processes by the numbers of the mount, and compare them with /proc. The status area in the pool directory has
the messages of the processes: it can be read while no process serves the mount.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kit.cell import Cell
from kit.storm import make_page
from tests.fuse.calls import PUNCH, fallocate
from tests.store.disks import small_ext4
from tests.support import LIMIT_SECONDS, ROOT, is_mounted, is_running, run_zbudfs, status_of, wait_until, zbudfs
from zbudfs.cli.ask import once_more_if_stale
from zbudfs.service.child import HANG_SECONDS as SILENT_SECONDS
from zbudfs.service.mountpoint import MountError, unmount
from zbudfs.service.pooldir import path_of, pool_directories, remove_dead
from zbudfs.service.settings import Settings
from zbudfs.store.status_area import Field
from zbudfs.swap.loop import loop_devices, swaps

pytestmark = pytest.mark.needs("root", "fuse")

PAGE: Final = 4096
MIB: Final = 1 << 20
HANG_SECONDS: Final = 1.5 * LIMIT_SECONDS
"""Longest life of a mount. No test needs as much."""
FIFREEZE: Final = 0xC0045877
FITHAW: Final = 0xC0045878
DEFAULT: Final = "default"
"""Name of a mountpoint with the default backing file."""


class Served:
    """A mount of this test, and its processes."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self.pool = Path(path_of(str(mountpoint)))
        self.swapfile = mountpoint / "swapfile"

    def field(self, field: Field) -> int:
        """Return a number of the status area, or 0 if there is no status area any more."""
        try:
            with (self.pool / "board").open("rb") as area:
                found: int = struct.unpack_from("=Q", os.pread(area.fileno(), 8, 8 * field))[0]
                return found
        except FileNotFoundError:
            return 0

    @property
    def keeper(self) -> int:
        """Return the keeper's process id."""
        return self.field(Field.KEEPER_PID)

    @property
    def worker(self) -> int:
        """Return the worker's process id."""
        return self.field(Field.WORKER_PID)

    @property
    def standby(self) -> int:
        """Return the standby's process id, 0 without one."""
        return self.field(Field.STANDBY_PID)

    def stats(self) -> dict[str, Any]:
        """Return the statistics, even if a worker dies meanwhile."""
        end = time.monotonic() + LIMIT_SECONDS
        while True:
            try:
                found: dict[str, Any] = json.loads((self.mountpoint / "stats/all.json").read_bytes())
                return found
            except (OSError, ValueError):
                assert time.monotonic() < end, "the mount does not answer"
                time.sleep(0.02)

    def log(self) -> str:
        """Return the log."""
        return (self.mountpoint / "stats/log").read_text()

    def wait_ready(self) -> None:
        """Wait until a worker serves and a standby is ready."""

        def ready() -> bool:
            return bool(self.field(Field.SERVING) and self.field(Field.STANDBY_READY) and is_running(self.standby))

        wait_until(ready, "a standby")

    def kill(self, *pids: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to all of them at once, and wait until they have ended."""
        ends = [os.pidfd_open(pid) for pid in pids]  # readable when a process is gone with all its threads
        for pid in pids:
            os.kill(pid, number)
        for pid, end in zip(pids, ends, strict=True):
            poll = select.poll()
            poll.register(end, select.POLLIN)
            assert poll.poll(LIMIT_SECONDS * 1000), f"{pid} has not ended"
            os.close(end)

    def wait_taken_over(self, recoveries: int) -> None:
        """Wait until the mount is served after so many takeovers."""

        def taken_over() -> bool:
            return self.field(Field.RECOVERIES) >= recoveries and self.field(Field.SERVING) == 1

        wait_until(taken_over, f"takeover {recoveries}")

    def kill_all(self) -> None:
        """Kill all processes of the mount. Programs that wait for an answer get an error."""
        for field in (Field.KEEPER_PID, Field.WORKER_PID, Field.STANDBY_PID):
            pid = self.field(field)
            with contextlib.suppress(OSError):
                if pid and Path(f"/proc/{pid}/comm").read_text() == "zbudfs\n":
                    self.kill(pid)

    def end(self) -> None:
        """Remove the rest of the mount, in any state."""
        if any(loop.backing_file == str(self.swapfile) for loop in loop_devices()):
            run_zbudfs("swapoff", "--force", "--umount", self.mountpoint)
        self.kill_all()
        with contextlib.suppress(MountError):
            unmount(str(self.mountpoint), lazy=True)
        mountpoint = str(self.mountpoint)  # a killed process may not have ended yet

        def is_gone() -> bool:
            remove_dead(mountpoint)
            return not pool_directories(mountpoint)

        wait_until(is_gone, "the end of the pool directory")


@contextlib.contextmanager
def watched(served: Served) -> Iterator[Served]:
    """Kill the mount after a while if it hangs, since a test that waits for it in the kernel could not be stopped."""
    watch = threading.Timer(HANG_SECONDS, served.kill_all)
    watch.start()
    try:
        yield served
    finally:
        watch.cancel()
        watch.join()
        served.end()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Mount a zbudfs, and wait for its standby. Afterwards nothing is left."""
    stack = contextlib.ExitStack()

    def mount(*options: str | Path, name: str = "mnt", command: str = "mount") -> Served:
        mountpoint = tmp_path / name
        mountpoint.mkdir(exist_ok=True)
        served = stack.enter_context(watched(Served(mountpoint)))
        where = [] if "--backing" in options or name == DEFAULT else ["--backing", "none"]
        zbudfs(command, "--size", "64M", "--pool", "16M", *where, *options, mountpoint)
        served.wait_ready()
        return served

    with stack:
        yield mount


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """Open a file for the block."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):  # there may be no server to answer the close
            os.close(fd)


def fill(fd: int, first: int, count: int, generation: int = 1) -> None:
    """Write pages of all kinds."""
    for start in range(first, first + count, 64):
        pages = [make_page(number, generation, 7) for number in range(start, min(start + 64, first + count))]
        assert os.pwrite(fd, b"".join(pages), start * PAGE) == len(pages) * PAGE


def compare(fd: int, first: int, count: int, generation: int = 1) -> None:
    """Compare them."""
    for number in range(first, first + count):
        assert os.pread(fd, PAGE, number * PAGE) == make_page(number, generation, 7), f"page {number}"


def parent_of(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# ---- who is who --------------------------------------------------------------------------------------------------------


def test_three_processes(mount: Callable[..., Served]) -> None:
    """stats/ and status name the three processes, and agree with /proc."""
    served = mount()
    found = served.stats()
    keeper, worker, standby = found["keeper_pid"], found["worker_pid"], found["standby_pid"]
    assert len({keeper, worker, standby}) == 3
    for pid in (keeper, worker, standby):
        assert is_running(pid)
        assert Path(f"/proc/{pid}/comm").read_text() == "zbudfs\n"
        assert b"zbudfs.service.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert parent_of(worker) == parent_of(standby) == keeper
    assert (found["pid"], found["standby_ready"], found["recoveries"]) == (keeper, True, 0)
    assert (found["last_recovery_us"] > 0, found["lost_in_recovery"]) == (True, 0)
    status = status_of(served.mountpoint)
    for name in ("keeper_pid", "worker_pid", "standby_pid", "standby_ready", "recoveries"):
        assert status[name] == found[name]
    assert "standby ready" in zbudfs("status", served.mountpoint)


# ---- the worker dies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["none", "backing"])
def test_a_killed_worker_is_replaced(backing: str, mount: Callable[..., Served], tmp_path: Path) -> None:
    """The standby serves all stored pages, in RAM and on disk, and the next standby becomes ready."""
    options = ["--pool", "2M", "--backing", tmp_path / backing] if backing != "none" else []
    served = mount(*options)
    before = served.stats()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 2048)
        stored = served.stats()
        assert (stored["written_back_pages"] > 0) == (backing != "none")
        served.kill(served.worker)
        compare(fd, 0, 2048)
        served.wait_ready()
        after = served.stats()
        assert after["keeper_pid"] == before["keeper_pid"]
        assert after["worker_pid"] == before["standby_pid"]
        assert after["standby_pid"] not in (0, before["standby_pid"], before["worker_pid"])
        assert parent_of(after["worker_pid"]) == parent_of(after["standby_pid"]) == after["keeper_pid"]
        assert (after["recoveries"], after["lost_pages"], after["lost_in_recovery"]) == (1, 0, 0)
        assert after["last_recovery_us"] > 0
        assert after["stored_pages"] == stored["stored_pages"]
        assert f"worker {before['worker_pid']} died (SIGKILL)" in served.log()
        fill(fd, 1000, 500, generation=2)
        compare(fd, 1000, 500, generation=2)
    assert "1 recovery" in zbudfs("status", served.mountpoint)
    zbudfs("umount", served.mountpoint)
    assert not served.pool.exists()


def test_any_signal_may_kill_it(mount: Callable[..., Served]) -> None:
    """The standby takes over after the worker's death by any signal, with or without a name."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        for recoveries, number in enumerate((signal.SIGUSR1, signal.SIGALRM, signal.SIGRTMIN + 3), 1):
            served.kill(served.worker, number=number)
            served.wait_taken_over(recoveries)
            compare(fd, 0, 64)
        for name in ("SIGUSR1", "SIGALRM", f"signal {signal.SIGRTMIN + 3}"):
            assert f"died ({name})" in served.log()


def test_two_kills_in_quick_succession(mount: Callable[..., Served]) -> None:
    """The second worker dies before there is another standby: a worker is forked at once, and has all pages."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
        served.kill(served.worker)
        served.wait_taken_over(1)
        assert not served.field(Field.STANDBY_READY)
        served.kill(served.worker)
        served.wait_taken_over(2)
        compare(fd, 0, 1024)
        served.wait_ready()
        found = served.stats()
        assert (found["recoveries"], found["lost_pages"], found["stored_pages"]) == (2, 0, 1024)
        served.kill(served.worker)
        compare(fd, 0, 1024)


def test_worker_and_standby_die_at_once(mount: Callable[..., Served]) -> None:
    """The keeper does not wait for a dead standby."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
        served.kill(served.standby, served.worker)
        compare(fd, 0, 1024)
        served.wait_ready()
        assert served.stats()["recoveries"] == 1


def test_a_killed_standby_is_replaced(mount: Callable[..., Served]) -> None:
    """The worker continues undisturbed, no takeover is counted, and the next standby gets ready."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        before = served.stats()
        served.kill(served.standby)
        wait_until(lambda: served.standby != before["standby_pid"], "its end being noticed")
        served.wait_ready()
        after = served.stats()
        assert (after["worker_pid"], after["recoveries"]) == (before["worker_pid"], 0)
        assert after["standby_pid"] not in (0, before["standby_pid"])
        assert "the standby died" in served.log()
        served.kill(served.worker)
        compare(fd, 0, 64)


def test_a_worker_that_does_not_answer(mount: Callable[..., Served]) -> None:
    """A stopped worker is noticed, killed and replaced, and each waiting program gets an answer."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        worker = served.worker
        os.kill(worker, signal.SIGSTOP)
        try:
            compare(fd, 0, 64)
        finally:
            if is_running(worker):
                os.kill(worker, signal.SIGCONT)
        assert not is_running(worker)
        found = served.stats()
        assert (found["recoveries"], found["worker_pid"] != worker) == (1, True)
        assert f"worker {worker} has not answered" in served.log()


def test_a_machine_that_stood_still(mount: Callable[..., Served]) -> None:
    """Keeper and worker stop for longer than a worker may be silent, like in a paused machine, and none is killed."""
    served = mount()
    keeper, worker = served.keeper, served.worker
    for pid in (keeper, worker):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(SILENT_SECONDS + 0.5)
    os.kill(keeper, signal.SIGCONT)  # the keeper looks first
    time.sleep(0.3)
    os.kill(worker, signal.SIGCONT)
    beat = served.field(Field.HEARTBEAT)
    wait_until(lambda: served.field(Field.HEARTBEAT) > beat + 1, "the worker being looked at")
    assert (served.worker, served.stats()["recoveries"]) == (worker, 0)


def test_counters_go_on(mount: Callable[..., Served], tmp_path: Path) -> None:
    """Counts since the mount continue."""
    served = mount("--pool", "1M", "--backing", tmp_path / "backing")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
        compare(fd, 0, 1024)
        beat = served.field(Field.HEARTBEAT)
        wait_until(lambda: served.field(Field.HEARTBEAT) > beat + 1, "the counters being kept")
        before = served.stats()
        served.kill(served.worker)
        after = served.stats()
        names = [name for name in before if name.startswith("cumul_")]
        assert len(names) > 5
        assert {name: after[name] for name in names} == {name: before[name] for name in names}


# ---- requests, handles and swap meanwhile --------------------------------------------------------------------------------


def test_open_files_stay_open(mount: Callable[..., Served]) -> None:
    """Open files of the swapfile continue to work, are still counted, and their close still lets the mount end."""
    served = mount()
    with opened(served.swapfile) as one, opened(served.swapfile, os.O_RDONLY) as two:
        os.pwrite(one, b"before" * 700, 12345)
        served.kill(served.worker)
        os.pwrite(one, b"after", 99999)
        assert os.pread(two, 4200, 12345) == b"before" * 700
        assert os.pread(two, 5, 99999) == b"after"
        os.fsync(one)
        assert served.stats()["open_swapfiles"] == 2
    wait_until(lambda: served.stats()["open_swapfiles"] == 0, "both being closed")
    zbudfs("umount", served.mountpoint)


def test_an_old_handle_of_a_statistic(mount: Callable[..., Served]) -> None:
    """An open file of stats/ is stale after a takeover and is no newer file. Its close closes no other."""
    served = mount()
    with contextlib.ExitStack() as stack:
        old = os.open(served.mountpoint / "stats/version", os.O_RDONLY)
        served.kill(served.worker)
        path = served.mountpoint / "stats/level"
        new = [stack.enter_context(opened(path, os.O_RDONLY)) for _ in range(200)]
        try:
            with pytest.raises(OSError, match="Stale file handle") as failure:
                os.pread(old, 100, 0)
        finally:
            os.close(old)
        assert failure.value.errno == errno.ESTALE
        served.stats()  # the close has arrived
        assert {os.pread(fd, 100, 0) for fd in new} == {b"-1\n"}


def test_commands_open_a_stale_file_again(mount: Callable[..., Served]) -> None:
    """The commands open a file again that was opened before a takeover, and not a third time."""
    served = mount()
    asked = 0

    def read() -> bytes:
        nonlocal asked
        asked += 1
        with opened(served.mountpoint / "stats/level", os.O_RDONLY) as fd:
            if asked == 1:
                served.kill(served.worker)
            return os.pread(fd, 100, 0)

    assert once_more_if_stale(read) == b"-1\n"
    assert asked == 2
    with pytest.raises(OSError, match="Is a directory"):
        once_more_if_stale(lambda: (served.mountpoint / "stats").read_bytes())


class Load:
    """Threads that read, write and punch, each in its own part of the swapfile, and compare each read."""

    PAGES: Final = 512

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ended = threading.Event()
        self.rounds = [0, 0, 0]
        self.errors: list[str] = []
        fill(fd, 0, self.PAGES)
        self._threads = [
            threading.Thread(target=self._run, args=(number, act))
            for number, act in enumerate((self._read, self._write, self._punch))
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, act: Callable[[random.Random, int], bool]) -> None:
        source = random.Random(number)
        while not self._ended.is_set():
            try:
                if not act(source, number * self.PAGES):
                    self.errors.append(f"{act.__name__}: wrong bytes in round {self.rounds[number]}")
            except OSError as error:
                self.errors.append(f"{act.__name__}: {error}")
                return
            self.rounds[number] += 1

    def _read(self, source: random.Random, first: int) -> bool:
        page = first + source.randrange(self.PAGES)
        return os.pread(self._fd, PAGE, page * PAGE) == make_page(page, 1, 7)

    def _write(self, source: random.Random, first: int) -> bool:
        start = (first + source.randrange(self.PAGES - 8)) * PAGE + source.choice((0, 0, 0, 1111))
        content = source.randbytes(1000) * source.randrange(1, 30)
        written = os.pwrite(self._fd, content, start)
        return written == len(content) and os.pread(self._fd, len(content), start) == content

    def _punch(self, source: random.Random, first: int) -> bool:
        page, count = first + source.randrange(self.PAGES - 65), source.randrange(1, 64)
        fill(self._fd, page, count + 1)
        fallocate(self._fd, PUNCH, page * PAGE, count * PAGE)
        content = os.pread(self._fd, (count + 1) * PAGE, page * PAGE)
        return content == bytes(count * PAGE) + make_page(page + count, 1, 7)

    def wait_rounds(self, more: int) -> None:
        """Wait until each thread has done so many more rounds."""
        before = list(self.rounds)

        def further() -> bool:
            return all(now >= then + more for now, then in zip(self.rounds, before, strict=True)) or bool(self.errors)

        wait_until(further, "every thread's progress")

    def stuck(self) -> bool:
        """Return whether no thread has moved for a while."""
        before = list(self.rounds)
        time.sleep(0.1)
        return self.rounds == before

    def end(self) -> None:
        """Stop, and compare once more."""
        self._ended.set()
        for thread in self._threads:
            thread.join()  # a request without an answer fails when the mount is killed
        assert self.errors == []
        compare(self._fd, 0, self.PAGES)


@pytest.mark.parametrize("backing", ["none", "backing"])
def test_requests_in_flight(backing: str, mount: Callable[..., Served], tmp_path: Path) -> None:
    """Reads, writes and punches that a worker has received, or that wait for it, when it dies, are answered and right."""
    options = ["--pool", "1M", "--backing", tmp_path / backing] if backing != "none" else []
    served = mount(*options)
    with opened(served.swapfile) as fd:
        load = Load(fd)
        try:
            for recoveries in (1, 2, 3):
                load.wait_rounds(5)
                if recoveries == 2:  # all of them wait: some were received and never answered
                    os.kill(served.worker, signal.SIGSTOP)
                    wait_until(load.stuck, "every thread waiting")
                served.kill(served.worker)
                served.wait_taken_over(recoveries)
            load.wait_rounds(5)
        finally:
            load.end()
        found = served.stats()
        assert (found["recoveries"], found["lost_pages"], found["lost_in_recovery"]) == (3, 0, 0)


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Freeze the disk of a file system for the block.

    This needs no program: a forked one closes its copies of our files, and a mount must answer that.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.ioctl(fd, FIFREEZE, 0)
    try:
        yield
    finally:
        fcntl.ioctl(fd, FITHAW, 0)
        os.close(fd)


@pytest.mark.needs("loop")
def test_writes_that_a_worker_had_taken(mount: Callable[..., Served], tmp_path: Path) -> None:
    """The disk hangs, so a worker has writes that it cannot store. It is killed, and the next one stores them."""
    noise = random.Random(3).randbytes(MIB)
    with small_ext4(tmp_path, 64 * MIB) as disk:
        served = mount("--size", "16M", "--pool", "2M", "--backing", disk / "backing")
        done: list[int] = []

        def write() -> None:
            with contextlib.suppress(OSError):
                done.extend(os.pwrite(fd, noise, at * MIB) for at in range(6))

        with opened(served.swapfile) as fd:
            writer = threading.Thread(target=write)
            with frozen(disk):
                writer.start()
                wait_until(lambda: bool(done), "a write")
                before = -1
                while before != len(done):  # until it waits
                    before = len(done)
                    time.sleep(0.3)
                assert before < 6
                os.kill(served.worker, signal.SIGKILL)
            writer.join()
            assert done == [MIB] * 6
            served.wait_taken_over(1)
            for at in range(6):
                assert os.pread(fd, MIB, at * MIB) == noise
            assert served.stats()["lost_pages"] == 0
        served.end()


@pytest.mark.needs("loop", "swap", "cell")
def test_swap_stays_on(mount: Callable[..., Served], tmp_path: Path) -> None:
    """A program that lives on the swap does not notice the kill of the server."""
    served = mount("--priority", "32767", "--backing", tmp_path / "backing", "--pool", "4M", command="swapon")
    with Cell("keeper", 18 * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), "30"])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                wait_until(lambda: served.stats()["stored_pages"] > 1000, "something being swapped out")
                served.kill(served.worker)  # while it fills its memory
                assert program.stdout is not None
                assert program.stdout.readline() == "filled\n"
                served.wait_ready()
                served.kill(served.worker)  # and while all swapped-out pages must come back
                said, _ = program.communicate("\n", timeout=2 * LIMIT_SECONDS)
            finally:
                program.kill()
    assert json.loads(said) == {"pages": 30 * 256, "bad": 0}
    found = status_of(served.mountpoint)
    assert (found["recoveries"], found["lost_pages"]) == (2, 0)
    (user,) = found["users"]
    assert user.removeprefix("swap on ") in [swap.path for swap in swaps()]
    zbudfs("swapoff", "--umount", served.mountpoint)
    assert not served.pool.exists()


# ---- the keeper dies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["custom", "default"])
def test_all_of_them_die(backing: str, mount: Callable[..., Served], tmp_path: Path) -> None:
    """The mount says that no process serves it, nothing hangs, umount leaves nothing, and a new mount works."""
    options = ["--pool", "1M", *(["--backing", tmp_path / "own file"] if backing == "custom" else [])]
    name = DEFAULT if backing == "default" else "mnt"
    served = mount(*options, name=name)
    path = served.stats()["backing_path"]
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512 if path else 128)
        served.kill(served.keeper, served.worker, served.standby)
        for act in (
            lambda: os.pread(fd, PAGE, 0),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: fallocate(fd, PUNCH, 0, PAGE),
            lambda: os.statvfs(served.mountpoint),
        ):
            with pytest.raises(OSError, match="not connected") as failure:
                act()
            assert failure.value.errno == errno.ENOTCONN
        assert run_zbudfs("status", served.mountpoint).returncode == 1
    assert served.pool.exists()
    assert not path or Path(path).stat().st_size > 0
    zbudfs("umount", served.mountpoint)
    assert not is_mounted(served.mountpoint)
    assert not served.pool.exists()
    assert not path or Path(path).stat().st_size == 0
    again = mount(*options, name=name)
    with opened(again.swapfile) as fd:
        assert os.pread(fd, PAGE, 0) == bytes(PAGE)
        fill(fd, 0, 16)
        compare(fd, 0, 16)
    zbudfs("umount", again.mountpoint)
    if backing == "default":
        Path(path).unlink()


def test_the_keeper_dies_alone(mount: Callable[..., Served]) -> None:
    """The worker continues, and the standby takes over once, when it must. status says so."""
    served = mount()
    keeper, worker, standby = served.keeper, served.worker, served.standby
    with opened(served.swapfile) as fd:
        fill(fd, 0, 256)
        served.kill(keeper)
        compare(fd, 0, 256)
        fill(fd, 256, 256)
        compare(fd, 256, 256)
        found = status_of(served.mountpoint)
        assert (found["pid"], found["worker_pid"], found["recoveries"]) == (worker, worker, 0)
        assert (found["standby_pid"], found["standby_ready"]) == (standby, True)
        assert [text for text in found["warnings"] if "the keeper is gone" in text]
        assert "the keeper is gone" in zbudfs("status", served.mountpoint)
        served.kill(worker)
        compare(fd, 0, 512)
        found = served.stats()
        assert (found["pid"], found["worker_pid"], found["recoveries"]) == (standby, standby, 1)
        assert (found["standby_pid"], found["standby_ready"], found["lost_pages"]) == (0, False, 0)
        served.kill(standby)
        with pytest.raises(OSError, match="not connected"):
            os.pread(fd, PAGE, 0)


def test_keeper_and_worker_die_at_once(mount: Callable[..., Served], tmp_path: Path) -> None:
    """The standby takes over by itself. After the unmount no process and no file is left."""
    served = mount("--pool", "1M", "--backing", tmp_path / "backing")
    standby = served.standby
    with opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
        served.kill(served.keeper, served.worker)
        compare(fd, 0, 1024)
    assert served.worker == standby
    zbudfs("umount", served.mountpoint)
    assert not is_running(standby)
    assert not served.pool.exists()
    assert (tmp_path / "backing").stat().st_size == 0


def test_umount_after_the_keepers_death_leaves_nothing(mount: Callable[..., Served], tmp_path: Path) -> None:
    """The process that ends the mount does the keeper's clean-up."""
    served = mount("--pool", "1M", "--backing", tmp_path / "backing")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 1024)
    standby = served.standby
    served.kill(served.keeper)
    zbudfs("umount", served.mountpoint)
    assert not is_running(standby)
    assert not is_mounted(served.mountpoint)
    assert not served.pool.exists()
    assert (tmp_path / "backing").stat().st_size == 0


def test_the_keeper_dies_while_it_forks(mount: Callable[..., Served]) -> None:
    """A child that was not ready when its keeper died does not stay, since no process watches it."""
    served = mount()
    for _ in range(2):
        served.wait_ready()
        keeper, worker, old = served.keeper, served.worker, served.standby
        os.kill(old, signal.SIGKILL)
        new = old
        while new in (0, old):
            new = served.standby
            assert is_running(keeper)
        os.kill(new, signal.SIGSTOP)
        ignored = int(Path(f"/proc/{new}/status").read_text().partition("SigIgn:")[2].split()[0], 16)
        if not ignored >> (signal.SIGTERM - 1) & 1:
            break  # it has not come far
        os.kill(new, signal.SIGCONT)
    try:
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not is_running(keeper), "the keeper's end")
        os.kill(new, signal.SIGCONT)
        served.kill(worker)
        time.sleep(1.0)
        assert not is_running(new), "its child is still there"
    finally:
        if is_running(new):
            served.kill(new)
    with pytest.raises(OSError, match="not connected"):
        os.statvfs(served.mountpoint)


# ---- orders to end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_order_to_end(number: int, mount: Callable[..., Served], tmp_path: Path) -> None:
    """The order is refused while the swapfile is open, also after a takeover. Then the mount ends and leaves nothing."""
    served = mount("--pool", "1M", "--backing", tmp_path / "backing")
    name = signal.Signals(number).name
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
        os.kill(served.keeper, number)
        wait_until(lambda: f"{name}: not ending, the swapfile is open" in served.log(), "its refusal")
        served.kill(served.worker)
        compare(fd, 0, 512)
        os.kill(served.keeper, number)
        wait_until(lambda: served.log().count(f"{name}: not ending") == 2, "its second refusal")
        compare(fd, 0, 512)
        pids = [served.keeper, served.worker]
    wait_until(lambda: served.stats()["open_swapfiles"] == 0, "the file being closed")
    os.kill(served.keeper, number)
    for pid in pids:
        wait_until(lambda pid=pid: not is_running(pid), "the end")  # type: ignore[misc]
    assert not is_mounted(served.mountpoint)
    assert not served.pool.exists()
    assert (tmp_path / "backing").stat().st_size == 0


def test_a_file_that_is_closed_twice(mount: Callable[..., Served]) -> None:
    """If a worker dies between counting a close and answering it, the kernel sends the close again, which does no harm."""
    served = mount()
    fd = os.open(served.swapfile, os.O_RDWR)
    os.pwrite(fd, b"there", 0)
    with (served.pool / "board").open("r+b") as area:  # the first worker has counted it
        os.pwrite(area.fileno(), bytes(8), 8 * Field.OPEN_SWAPFILES)
    worker = served.worker
    os.close(fd)
    time.sleep(1.0)
    assert served.worker == worker
    assert served.stats()["open_swapfiles"] == 0


# ---- no worker starts ------------------------------------------------------------------------------------------------


ENOUGH_FOR_A_KEEPER: Final = 0
"""Files that a keeper must open beyond those of a dead worker and standby, to fork another. A worker needs more."""


@contextlib.contextmanager
def few_files(pid: int, more: int) -> Iterator[None]:
    """Let a process and its children open only so many more files, for the block."""
    highest = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(highest + 1 + more, 3), before[1]))
    try:
        yield
    finally:
        if is_running(pid):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_workers_that_cannot_come_up_are_retried(mount: Callable[..., Served]) -> None:
    """The keeper tries again, later each time, with the reason in the log. When a worker starts, all is well."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 256)
        with few_files(served.keeper, ENOUGH_FOR_A_KEEPER):
            served.kill(served.standby)
            wait_until(lambda: "the standby died ([Errno 24]" in served.log(), "a standby that cannot come up")
            served.kill(served.worker)
            wait_until(lambda: served.field(Field.RECOVERIES) >= 3, "some attempts")
            assert not served.field(Field.SERVING)
        compare(fd, 0, 256)
        served.wait_ready()
        found = served.stats()
        assert found["recoveries"] >= 4
        assert found["lost_pages"] == 0
        log = served.log()
        assert log.count("died ([Errno 24] Too many open files); another is tried soon") >= 2
        served.kill(served.worker)  # the failures are forgotten
        compare(fd, 0, 256)


FEW_FAILURES: Final = """
import sys
from zbudfs.service import backoff, daemon
backoff.MAX_FAILURES = 3
sys.exit(daemon.main(sys.argv[1:]))
"""
"""The daemon with less patience."""

FOREGROUND: Final = """
import sys
from zbudfs.service import launch
from zbudfs.service.settings import Settings
command = (sys.executable, "-I", "-c", sys.argv[2])
sys.exit(launch.run_in_foreground(Settings.from_json(sys.argv[1]), lambda ready: None, command=command))
"""


def test_in_the_end_it_gives_up(tmp_path: Path) -> None:
    """The mount goes away after so many failures in a row, with a last message and an exit status, and leaves nothing."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    settings = Settings(mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=8 * MIB, backing=None)
    command = [sys.executable, "-c", FOREGROUND, settings.to_json(), FEW_FAILURES]
    with (
        watched(Served(mountpoint)) as served,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process,
    ):
        try:
            wait_until(lambda: bool(served.field(Field.STANDBY_READY) and served.field(Field.SERVING)), "a standby")
            with few_files(served.keeper, ENOUGH_FOR_A_KEEPER), opened(served.swapfile) as fd:
                served.kill(served.standby, served.worker)
                with pytest.raises(OSError, match=r"connection abort|not connected"):
                    os.pread(fd, PAGE, 0)
            _, err = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 1
    assert err.count("another is tried soon") == 3
    assert "3 workers in a row did not come up: giving up" in err
    assert "Traceback" not in err
    assert not is_mounted(mountpoint)
    assert not served.pool.exists()


def test_a_keeper_that_cannot_fork_goes_on(mount: Callable[..., Served], tmp_path: Path) -> None:
    """The keeper tries again later, while its worker serves. It opens no file to read a changed mount table."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        keeper, standby = served.keeper, served.standby
        with few_files(keeper, -99):
            served.kill(standby)
            compare(fd, 0, 64)
            other = tmp_path / "other"
            other.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True, timeout=LIMIT_SECONDS)
            subprocess.run(["umount", other], check=True, timeout=LIMIT_SECONDS)
            time.sleep(1.5)  # it tries after a second
            assert is_running(keeper)
        served.wait_ready()
        served.kill(served.worker)
        compare(fd, 0, 64)
