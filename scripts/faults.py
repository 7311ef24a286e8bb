# SPDX-License-Identifier: MIT
"""Measure the wait of a page-in when a process of a mount dies or is stopped, in each state of a restart and a takeover.

    faults.py [--rounds 3] [--disk-seconds 5] [NAME ...]

Each fault gets its own mount. A reader reads a page every few milliseconds. Its longest read is the result. A wrong page, or
a mount that does not recover, is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.nbd import NbdDisk, nbd_disk  # noqa: E402
from zbudfs.service import launch  # noqa: E402  after the path is known
from zbudfs.service.mountpoint import MountError, unmount  # noqa: E402
from zbudfs.service.pooldir import path_of, remove_dead  # noqa: E402
from zbudfs.service.settings import Settings  # noqa: E402
from zbudfs.store.status_area import Field  # noqa: E402

PAGE_BYTES: Final = 4096
PAGES: Final = 1024
LIMIT_SECONDS: Final = 60.0

disk_seconds = 5.0
"""Seconds for which the disk does not answer a write."""

DAEMON: Final = """
import os, signal, sys, time
from zbudfs.service import daemon, first_worker, handing_over, keeper, standby_monitor, worker, worker_monitor
{patch}
sys.exit(daemon.main(sys.argv[2:]))
"""
"""Source of a daemon with a fault, for `python -c`. The first argument is the module name that its command line shows."""

STOP_SELF: Final = "os.kill(os.getpid(), signal.SIGSTOP)"
KILL_SELF: Final = "os.kill(os.getpid(), signal.SIGKILL)"
NEVER_READY: Final = "first_worker.FirstWorker.start = lambda self: time.sleep(100)"


def before_order(action: str) -> str:
    """Return a patch: the new keeper does `action` instead of its order to the worker, after the word "go"."""
    return f"first_worker.FirstWorker.order = lambda self: {action}"


def after_order(action: str) -> str:
    """Return a patch: the new keeper does `action` after it has given the order to its worker."""
    replaced = "first_worker.FirstWorker.order"
    return f"order = {replaced}\n{replaced} = lambda self: (order(self), {action})"


def on_word(word: str, action: str) -> str:
    """Return a patch: the new keeper does `action` when a line of the old keeper contains `word`."""
    return f"""
receive = handing_over.receive_line
def receive_line(channel):
    said = receive(channel)
    if {word!r} in said:
        {action}
    return said
daemon.receive_line = receive_line
"""


def in_takeover(action: str) -> str:
    """Return a patch: a standby that was ready does `action` when it takes over from another worker."""
    return f"""
take_over = worker.Worker._take_over
async def taking_over(self, *arguments):
    if not self._emergency and self._status_area.init():
        {action}
    await take_over(self, *arguments)
worker.Worker._take_over = taking_over
"""


class Served:
    """A mount, with the ids of its processes from its status area."""

    def __init__(self, folder: Path, patch: str = "", disk: NbdDisk | None = None) -> None:
        self.folder = folder
        self.disk = disk
        self.mountpoint = folder / "mnt"
        self.mountpoint.mkdir()
        self.pool = Path(path_of(str(self.mountpoint)))
        self._fault = 0
        command = (sys.executable, "-I", "-c", DAEMON.format(patch=patch), "zbudfs.service.daemon")
        settings = Settings(
            mountpoint=str(self.mountpoint),
            size_bytes=64 << 20,
            pool_bytes=16 << 20,
            backing=str(disk.mounted / "backing") if disk is not None else None,
            force_backing=disk is not None,
        )
        launch.start(settings, command=command)
        self.wait(lambda: self.is_well, "a standby")

    def field(self, field: Field) -> int:
        """Return a number of the status area."""
        with (self.pool / "board").open("rb") as area:
            found: int = struct.unpack("=Q", os.pread(area.fileno(), 8, 8 * field))[0]
            return found

    @property
    def is_well(self) -> bool:
        """Whether a worker serves and a standby is ready."""
        return bool(self.field(Field.SERVING) and self.field(Field.STANDBY_READY))

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of keeper, worker and standby, by name."""
        names = {"keeper": Field.KEEPER_PID, "worker": Field.WORKER_PID, "standby": Field.STANDBY_PID}
        return {name: self.field(field) for name, field in names.items()}

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` is true. Raises TimeoutError."""
        end = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {LIMIT_SECONDS:g} s for {what}")
            time.sleep(0.005)

    def send(self, name: str, number: int) -> int:
        """Send a signal to keeper, worker or standby, and return the process id."""
        pid = self.pids[name]
        assert pid > 1, name
        os.kill(pid, number)
        return pid

    def restart(self, patch: str) -> socket.socket:
        """Order a restart with a version that has a fault, and return the socket for the answer."""
        self._fault += 1
        interpreter = self.folder / f"python{self._fault}"
        program = self.folder / f"daemon{self._fault}.py"
        program.write_text(
            f"sys_path = {str(ROOT)!r}\nimport sys\nsys.path.insert(0, sys_path)\n" + DAEMON.format(patch=patch)
        )
        # python -I -m zbudfs.service.daemon ...
        interpreter.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -I {program} "$@"\n')
        interpreter.chmod(0o755)
        channel = socket.socket(socket.AF_UNIX)
        channel.settimeout(LIMIT_SECONDS)
        channel.connect(str(self.pool / "control"))
        channel.sendall(json.dumps({"order": "restart", "interpreter": str(interpreter)}).encode())
        return channel

    def child_of_keeper(self) -> int:
        """Return the process that a restart has started; 0 if there is none yet."""
        pids = self.pids
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(entry.read_text().rpartition(")")[2].split()[1])
                pid = int(entry.parent.name)
                if parent == pids["keeper"] and pid not in (pids["worker"], pids["standby"]):
                    return pid
        return 0

    def signal_new_keeper(self, number: int) -> None:
        """Send a signal to the process that a restart has started."""
        pid = self.child_of_keeper()
        assert pid > 1, "there is no new keeper"
        os.kill(pid, number)

    def end(self) -> None:
        """Remove the mount and its processes, in whatever state they are."""
        with contextlib.suppress(OSError):
            for pid in self.pids.values():
                if pid and Path(f"/proc/{pid}/comm").read_text() == "zbudfs\n":
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(MountError):
            unmount(str(self.mountpoint), lazy=True)

        def is_gone() -> bool:
            remove_dead(str(self.mountpoint))
            return not self.pool.exists()

        self.wait(is_gone, "the end of the pool directory")


class Reader:
    """A thread that reads and compares pages until it is ended. It keeps the longest time of a read, and the errors."""

    def __init__(self, swapfile: Path) -> None:
        self.longest_seconds = 0.0
        self.errors: list[str] = []
        self._fd = os.open(swapfile, os.O_RDWR)
        self._pages = [struct.pack("<Q", number) * 8 + bytes(4096 - 64) for number in range(PAGES)]
        for number, page in enumerate(self._pages):
            os.pwrite(self._fd, page, number * PAGE_BYTES)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        target = mmap.mmap(-1, PAGE_BYTES)
        number = 0
        while not self._ended.wait(0.002):
            number = (number + 7) % PAGES
            began = time.monotonic()
            try:
                os.preadv(self._fd, [target], number * PAGE_BYTES)
            except OSError as error:
                self.errors.append(str(error))
                return
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            if target[:] != self._pages[number]:
                self.errors.append(f"page {number} is wrong")

    def end(self) -> None:
        """End the thread, and close the swapfile."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.close(self._fd)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. The function `act` causes it, and the mounted daemon has the patch `patch`."""

    state: str
    what: str
    act: Callable[[Served], None]
    patch: str = ""
    has_keeper: bool = True
    """Whether a keeper remains, which starts another standby."""
    has_disk: bool = False
    """Whether the mount has a backing file, on a disk that can be stopped."""


def signalled(*steps: tuple[str, int]) -> Callable[[Served], None]:
    """Return a fault: signals to processes, in this order."""

    def act(served: Served) -> None:
        for name, number in steps:
            served.send(name, number)

    return act


def while_starting(name: str, number: int) -> Callable[[Served], None]:
    """Return a fault: a signal to a process while a new keeper starts."""

    def act(served: Served) -> None:
        with served.restart(NEVER_READY) as channel:
            served.wait(lambda: served.child_of_keeper() > 0, "a new keeper")
            time.sleep(0.3)
            if name == "new keeper":
                served.signal_new_keeper(number)
            else:
                served.send(name, number)
            if name == "standby":
                served.wait(lambda: served.is_well, "another standby")
                served.signal_new_keeper(signal.SIGKILL)
            assert b"error" in channel.recv(4096)

    return act


def restarted(patch: str) -> Callable[[Served], None]:
    """Return a fault: a restart with a version that has a fault."""

    def act(served: Served) -> None:
        with served.restart(patch) as channel, contextlib.suppress(OSError):
            channel.recv(4096)

    return act


def continued_later(served: Served) -> None:
    """Stop the keeper, kill the worker, and continue the keeper two seconds after the takeover."""
    keeper = served.send("keeper", signal.SIGSTOP)
    try:
        served.send("worker", signal.SIGKILL)
        served.wait(lambda: served.field(Field.SERVING) == 1 and served.field(Field.RECOVERIES) == 1, "a takeover")
        time.sleep(2.0)
    finally:
        os.kill(keeper, signal.SIGCONT)


def twice(served: Served) -> None:
    """Kill the worker, and the next worker before another standby is ready."""
    for recoveries in (1, 2):
        served.send("worker", signal.SIGKILL)
        served.wait(lambda: served.field(Field.RECOVERIES) == recoveries and bool(served.field(Field.SERVING)), "it")  # noqa: B023


def while_the_disk_keeps_a_write(*names: str) -> Callable[[Served], None]:
    """Return a fault: processes are killed while the disk does not answer a write of the worker, for `disk_seconds`."""

    def act(served: Served) -> None:
        assert served.disk is not None
        folder = Path(f"/proc/{served.pids['worker']}/task")

        def is_writing() -> bool:
            return any("\nState:\tD" in path.read_text() for path in folder.glob("*/status"))

        with served.disk.standing_still(2 * LIMIT_SECONDS + disk_seconds):
            (served.mountpoint / "control/writeback").write_text("20")
            served.wait(is_writing, "a write that the disk keeps")
            for name in names:
                served.send(name, signal.SIGKILL)
            time.sleep(disk_seconds)

    return act


STOP, KILL = signal.SIGSTOP, signal.SIGKILL
OLD_KEEPER: Final = "os.kill(os.getppid(), signal.SIGKILL)"
FAULTS: Final = {
    "worker-killed": Fault("serving", "worker killed", signalled(("worker", KILL))),
    "worker-stopped": Fault("serving", "worker stopped", signalled(("worker", STOP))),
    "standby-killed": Fault("serving", "standby killed", signalled(("standby", KILL))),
    "standby-stopped": Fault("serving", "standby stopped", signalled(("standby", STOP))),
    "keeper-killed": Fault("serving", "keeper killed", signalled(("keeper", KILL)), has_keeper=False),
    "start-worker-killed": Fault("restart, new keeper starts", "worker killed", while_starting("worker", KILL)),
    "start-worker-stopped": Fault("restart, new keeper starts", "worker stopped", while_starting("worker", STOP)),
    "start-standby-stopped": Fault("restart, new keeper starts", "standby stopped", while_starting("standby", STOP)),
    "start-new-killed": Fault("restart, new keeper starts", "new keeper killed", while_starting("new keeper", KILL)),
    "start-new-stopped": Fault("restart, new keeper starts", "new keeper stopped", while_starting("new keeper", STOP)),
    "end-new-killed": Fault("restart, old worker ends", "new keeper killed", restarted(on_word("ending", KILL_SELF))),
    "end-new-stopped": Fault("restart, old worker ends", "new keeper stopped", restarted(on_word("ending", STOP_SELF))),
    "end-old-killed": Fault("restart, old worker ends", "old keeper killed", restarted(on_word("ending", OLD_KEEPER))),
    "go-new-killed": Fault("restart, told to go", "new keeper killed", restarted(before_order(KILL_SELF))),
    "go-new-stopped": Fault("restart, told to go", "new keeper stopped", restarted(before_order(STOP_SELF))),
    "go-old-killed": Fault("restart, told to go", "old keeper killed", restarted(on_word("go", OLD_KEEPER))),
    "over-new-killed": Fault("restart, new worker takes over", "new keeper killed", restarted(after_order(KILL_SELF))),
    "over-new-stopped": Fault(
        "restart, new worker takes over", "new keeper stopped", restarted(after_order(STOP_SELF))
    ),
    "over-worker-killed": Fault(
        "restart, new worker takes over", "new worker killed", restarted(in_takeover(KILL_SELF))
    ),
    "over-worker-stopped": Fault(
        "restart, new worker takes over", "new worker stopped", restarted(in_takeover(STOP_SELF))
    ),
    "takeover-killed": Fault(
        "takeover", "new worker killed (second fault)", signalled(("worker", KILL)), patch=in_takeover(KILL_SELF)
    ),
    "takeover-stopped": Fault(
        "takeover", "new worker stopped (second fault)", signalled(("worker", KILL)), patch=in_takeover(STOP_SELF)
    ),
    "both-killed": Fault("serving", "standby and worker killed", signalled(("standby", KILL), ("worker", KILL))),
    "standby-stopped-worker-killed": Fault(
        "serving", "standby stopped, worker killed at once", signalled(("standby", STOP), ("worker", KILL))
    ),
    "keeper-stopped-worker-killed": Fault("serving", "keeper stopped, worker killed", continued_later),
    "keeper-worker-killed": Fault(
        "serving", "keeper and worker killed", signalled(("keeper", KILL), ("worker", KILL)), has_keeper=False
    ),
    "twice": Fault("takeover", "worker killed twice, no standby yet", twice),
    "disk-kept": Fault("the disk keeps a write", "no fault", while_the_disk_keeps_a_write(), has_disk=True),
    "disk-kept-worker-killed": Fault(
        "the disk keeps a write", "worker killed", while_the_disk_keeps_a_write("worker"), has_disk=True
    ),
    "disk-kept-both-killed": Fault(
        "the disk keeps a write",
        "standby and worker killed",
        while_the_disk_keeps_a_write("standby", "worker"),
        has_disk=True,
    ),
}


@contextlib.contextmanager
def served(patch: str = "", *, has_disk: bool = False) -> Iterator[Served]:
    """Make a mount for this context."""
    with tempfile.TemporaryDirectory(prefix="zbudfs-faults-") as name, contextlib.ExitStack() as stack:
        folder = Path(name).resolve()
        disk = stack.enter_context(nbd_disk(folder, 96 << 20)) if has_disk else None
        found = Served(folder, patch, disk)
        # After this time, a caller that waits in the kernel for the mount gets an error.
        watch = threading.Timer(1.5 * LIMIT_SECONDS + disk_seconds, found.end)
        watch.start()
        try:
            yield found
        finally:
            watch.cancel()
            found.end()


def measure(name: str) -> dict[str, Any]:
    """Cause a fault, wait until the mount has recovered, and return the longest read and the errors."""
    fault = FAULTS[name]
    with served(fault.patch, has_disk=fault.has_disk) as mount:
        reader = Reader(mount.mountpoint / "swapfile")
        try:
            time.sleep(0.2)
            fault.act(mount)
            time.sleep(1.2)
            if fault.has_keeper:
                mount.wait(lambda: mount.is_well, "the recovery of the mount")
            else:
                mount.wait(lambda: bool(mount.field(Field.SERVING)), "a worker")
            processes = mount.pids
        finally:
            reader.end()
    return {"longest_seconds": reader.longest_seconds, "errors": reader.errors, "pids": processes}


def main() -> int:
    """Measure faults, print a table, and return the exit status."""
    global disk_seconds
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each fault (default: %(default)s)")
    parser.add_argument(
        "--disk-seconds",
        type=float,
        default=disk_seconds,
        help="seconds for which the disk does not answer a write (default: %(default)g)",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"fault, one of {', '.join(FAULTS)} (default: all)")
    arguments = parser.parse_args()
    disk_seconds = arguments.disk_seconds
    failed = 0
    print("| state | fault | longest read, s: median | worst |\n|---|---|---|---|", flush=True)
    for name in arguments.names or FAULTS:
        rounds = []
        for _ in range(arguments.rounds):
            try:
                found = measure(name)
                rounds.append(found["longest_seconds"])
                errors = found["errors"]
            except (TimeoutError, AssertionError, OSError) as error:
                errors = [repr(error)]
            if errors:
                failed += 1
                print(f"{name}: {errors}", file=sys.stderr)
        if rounds:
            fault = FAULTS[name]
            print(f"| {fault.state} | {fault.what} | {statistics.median(rounds):.2f} | {max(rounds):.2f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
