# SPDX-License-Identifier: MIT
"""The keeper: makes the mount and its memory, and keeps a worker serving it and a standby ready to.

    keeper ---fork---> worker     serves
           ---fork---> standby    everything done but the last step; waits on an eventfd

Why a standby and not a fresh start: a new worker needs memory just when swap is dead. A fork copies page tables, its
mlockall() every copy-on-write page; starting an interpreter needs more still. All of that is done here while things
are calm. When the worker dies the keeper writes eight bytes to an eventfd, and forks the next standby when swap works
again. If a worker dies before the next standby is there, the keeper gives a ballast of locked memory back to the
system and forks a worker on it.

The keeper has one thread, no event loop, and allocates as little as it can. It waits for: the end of its children
(pidfds), signals, a heartbeat that stands still, and orders on a socket in the pool directory.

As the main process of a service it also tells the manager how things stand (service/notify.py), gives it the descriptors
to keep, and, told to end while the swapfile is open, goes alone: worker and standby serve on until another keeper comes
(service/predecessors.py).
"""

import array
import contextlib
import json
import mmap
import os
import select
import signal
import socket
import time
from typing import Final, NoReturn

from zbudfs import __version__
from zbudfs.core import hot
from zbudfs.core.packing import Packing
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.fuse import shim
from zbudfs.service import hardening
from zbudfs.service.log import Log
from zbudfs.service.mountpoint import MountError, is_connected, open_and_mount, request_timeout_warnings, unmount
from zbudfs.service.notify import WATCHDOG_PARTS, Notifier
from zbudfs.service.pooldir import PoolDirectory
from zbudfs.service.settings import BACKING_FOLDER, Settings
from zbudfs.service.worker import FAILED, Mounted, work
from zbudfs.store.backing import Backing
from zbudfs.store.board import Field
from zbudfs.store.headroom import Headroom
from zbudfs.store.memory import StoreMemory

HANG_SECONDS: Final = 5.0
"""A worker whose heartbeat stands still for so long is killed. Guessed: a whole rebuild takes less than a second a GiB."""

POLL_SECONDS: Final = 0.2
LONGEST_LOOK_SECONDS: Final = 1.0
"""So much of the time between two looks at a heartbeat counts: a keeper that did not run itself, since the machine stood still
or had no time, knows nothing of the worker. Guessed."""
STANDBY_DELAY_SECONDS: Final = 0.2
"""After a worker has begun to serve, before the next standby is forked: what waited for swap goes first. Guessed."""

START_LIMIT_SECONDS: Final = 45.0
"""How long the first worker may take to come up. Arbitrary."""

STATUS_SECONDS: Final = 5.0
"""How often the line of status is renewed, if it has changed. Arbitrary."""

CLOSE_SECONDS: Final = 1.0
"""How long an open swapfile may still be on its way to be closed: the kernel does not wait for that. Arbitrary."""

END_RETRY_SECONDS: Final = 1.0
"""How often the worker is told to end when a service ends: a loop device lets go of its file a little late. Arbitrary."""

MAX_FAILURES: Final = 8
"""Workers in a row that do not come up, before the keeper gives up. With the back-off that is some 25 seconds."""

BALLAST_BYTES: Final = 4 << 20
"""Locked memory that is let go of when a worker must be forked while swap is dead. Guessed: the pages that it writes to."""


ENDING: Final = frozenset((signal.SIGTERM, signal.SIGINT))
"""What tells a keeper to end. Blocked until it is up: one that comes before is looked for where all can be undone, and has
no chance to cut anything off in the middle."""


class StartError(Exception):
    """The mount could not come up; the text is for the user."""


class Child:
    """A worker or standby."""

    def __init__(self, pid: int, order_fd: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._order_fd = order_fd
        self.ordered_at = 0.0

    def order(self) -> None:
        """Have it take over."""
        self.ordered_at = time.monotonic()
        os.eventfd_write(self._order_fd, 1)

    def has_ended(self) -> bool:
        """Whether the process, with all its threads, is gone."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def tell(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """End it."""
        self.tell(signal.SIGKILL)

    def reap(self) -> int:
        """Its exit status (negative: the signal); waits for its end."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        os.close(self._order_fd)
        return os.waitstatus_to_exitcode(status)


class Keeper:
    """The keeper of one mount."""

    def __init__(self, settings: Settings, log: Log, *, foreground: bool, notifier: Notifier | None = None) -> None:
        """Keep a mount with these settings; `notifier` if this is the main process of a service."""
        self._settings = settings
        self._log = log
        self._foreground = foreground
        self._is_service = notifier is not None
        self._notifier = notifier or Notifier()
        self._not_stored: list[str] = []
        self._told_ready = False
        self._told_beat = 0
        self._told_status = ""
        self._tell_alive_at = self._tell_status_at = self._tell_end_at = self._told_to_end_at = 0.0
        self._told_to_end = False
        self._pidfd = os.pidfd_open(os.getpid())
        self._warnings: list[str] = []
        self._worker: Child | None = None
        self._standby: Child | None = None
        self._served_once = False
        self._failures = 0
        self._retry_at = 0.0
        self._heartbeat = (0, 0.0)
        """The worker's, and for how many seconds it has stood still while this process looked."""
        self._looked_at = 0.0
        self._serving_since = 0.0
        self._ballast: mmap.mmap | None = None
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._control: socket.socket | None = None

    @property
    def warnings(self) -> list[str]:
        """What the system refused, and what follows; complete after `serve_first`."""
        return self._warnings

    # ---- coming up -------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make memory, backing file and mount. Raises what they raise, with nothing left behind."""
        settings = self._settings
        self._warnings += hardening.before_threads(0)
        shim.take_arenas_from_malloc()
        self._directory = PoolDirectory.create(settings)
        try:
            self._backing = self._open_backing()
            try:
                self._memory = self._make_memory()
                self._memory.populate()
                self._encrypt()
                self._warnings += request_timeout_warnings()
                if not self._directory.survives:
                    self._warnings.append(
                        "the pool is in memory without a name: `zbudfs restart` cannot hand it to a newer version (it"
                        " needs a tmpfs with noswap: Linux 6.4 or later, and the right to mount)"
                    )
                self._fuse_fd = open_and_mount(settings.mountpoint, settings.source)
            except BaseException:
                if self._backing is not None:
                    self._backing.close()
                raise
        except BaseException:
            self._directory.remove()
            raise
        os.set_blocking(self._fuse_fd, False)
        self._prepare(time.time_ns())

    def adopt(self, folder: str, descriptors: list[int], born_ns: int) -> None:
        """Take over memory, backing file and mount, whose descriptors another keeper has handed over."""
        self._warnings += hardening.before_threads(0)
        shim.take_arenas_from_malloc()
        self._fuse_fd, lock_fd = descriptors[0], descriptors[1]
        self._directory = PoolDirectory.adopt(folder, lock_fd)
        backing = self._settings.backing
        self._backing = Backing(backing, adopted_fd=descriptors[2]) if backing is not None else None
        self._memory = self._make_memory()
        self._encrypt()
        self._prepare(born_ns)

    def _prepare(self, born_ns: int) -> None:
        self._born_ns = born_ns
        self._descriptors = {"fuse": self._fuse_fd, "lock": self._directory.lock_fd}
        if self._backing is not None:
            self._descriptors["backing"] = self._backing.fileno()
        if not hot.BUILT:
            self._warnings.append(f"{hot.NOT_BUILT}; {hot.REMEDY}")
        board = self._memory.board
        for field, value in (
            (Field.KEEPER_PID, os.getpid()),
            (Field.BORN_NS, born_ns),
            (Field.FUSE_FD, self._fuse_fd),
            (Field.LOCK_FD, self._directory.lock_fd),
            (Field.BACKING_FD, self._descriptors.get("backing", 0)),
        ):
            board.fields[field] = value
        self._log.ring = board
        self._mounted = Mounted(
            self._settings,
            self._memory,
            self._backing,
            self._fuse_fd,
            os.getpid(),
            self._pidfd,
            born_ns,
            self._warnings,
            self._log,
            self._directory.path,
        )

    def _make_memory(self) -> StoreMemory:
        settings = self._settings
        memory = StoreMemory(
            settings.size_bytes,
            settings.pool_bytes >> PAGE_SHIFT,
            backed=settings.backing is not None,
            folder=self._directory.memory_folder,
            packing=Packing.parse(settings.packing),
        )
        memory.headroom = Headroom()
        return memory

    def _encrypt(self) -> None:
        """Have blocks encrypted with the key on the board, if that is wanted."""
        if self._settings.encrypt and self._backing is not None and self._memory.outgoing is not None:
            from zbudfs.store.cipher import KEY_BYTES, BlockCipher  # before the first fork, and only where it is used

            self._backing.encrypt(BlockCipher(self._memory.board.key(KEY_BYTES)), self._memory.outgoing.view)

    def _open_backing(self) -> Backing | None:
        path = self._settings.backing
        if path is None:
            return None
        if os.path.dirname(path) == BACKING_FOLDER:  # noqa: PTH120  the path may hold any bytes
            os.makedirs(BACKING_FOLDER, mode=0o700, exist_ok=True)  # noqa: PTH103
        backing = Backing(path)
        if not backing.direct:
            self._warnings.append(
                f"the file system of {path} refuses direct I/O: writeback goes through the page cache, which needs"
                " memory when there is little; put the backing file on ext4, xfs or btrfs"
            )
        return backing

    def start(self) -> list[str]:
        """Fork the first worker and wait until it is ready to serve: the warnings. StartError."""
        self._worker = self._fork(as_standby=True)
        end = time.monotonic() + START_LIMIT_SECONDS
        fields = self._memory.board.fields
        while not fields[Field.STANDBY_READY]:
            if self._worker.has_ended():
                self._worker.reap()
                self._worker = None
                raise StartError(self._memory.board.take_error() or "the worker died before it was ready")
            told_to_end = signal.sigpending() & ENDING
            if told_to_end or time.monotonic() > end:
                self._worker.kill()
                self._worker.reap()
                self._worker = None
                if told_to_end:
                    raise StartError("it was told to end before it was up")
                raise StartError(f"the worker was not ready within {START_LIMIT_SECONDS:g} s")
            time.sleep(0.005)
        self._promote(self._worker)
        return self._warnings

    def start_at_once(self) -> None:
        """Fork the first worker while nobody serves the mount, and swap is dead with it: it gets ready afterwards."""
        self._worker = self._fork(as_standby=False)
        self._promote(self._worker)
        self._memory.board.fields[Field.RECOVERIES] += 1

    def forget_served(self) -> None:
        """Whoever served before is gone."""
        self._memory.board.fields[Field.SERVING] = 0

    def serve_first(self) -> None:
        """Order the first worker to serve and wait until it does. StartError."""
        assert self._worker is not None
        self._worker.order()
        end = time.monotonic() + START_LIMIT_SECONDS
        while not self._memory.board.fields[Field.SERVING]:
            if self._worker.has_ended() or time.monotonic() > end:
                self._worker.kill()
                self._worker.reap()
                self._worker = None
                raise StartError(self._memory.board.take_error() or "the worker died before it served")
            time.sleep(0.005)
        self._served_once = True
        self._serving_since = time.monotonic()
        # The keeper acts when swap is dead: its memory must be there.
        self._warnings += [
            text
            for text in hardening.lock_memory([(arena.address, arena.size) for arena in self._memory.arenas])
            if text not in self._warnings
        ]
        self._load_ballast()
        for warning in self._warnings:
            self._log.warning(warning)
        settings = self._settings
        self._log.info(
            f"zbudfs {__version__} on {settings.mountpoint}: {settings.size_bytes >> 20} MiB, pool of"
            f" {settings.pool_bytes >> 20} MiB, {settings.packing}, {settings.backing or 'no backing file'};"
            f" libfuse {shim.libfuse_version()}"
        )

    def undo(self) -> None:
        """Take away what `make` made, after a start that failed."""
        with contextlib.suppress(MountError):
            unmount(self._settings.mountpoint, lazy=True)
        self._clean_up()

    def _clean_up(self) -> None:
        for name in self._descriptors:
            self._notifier.forget(name)
        os.close(self._fuse_fd)
        if self._backing is not None:
            self._backing.close()
        if self._control is not None:
            self._control.close()
        self._memory.board.forget_key()
        self._directory.remove()

    def _load_ballast(self) -> None:
        self._ballast = mmap.mmap(-1, BALLAST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)

    # ---- children ------------------------------------------------------------------------------------------------

    def _fork(self, *, as_standby: bool) -> Child:
        fields = self._memory.board.fields
        order_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        served_by = self._worker.pidfd if as_standby and self._worker is not None else None
        if as_standby:
            fields[Field.STANDBY_READY] = 0
        pid = os.fork()
        if not pid:
            self._be_child(order_fd, served_by, as_standby=as_standby)
        if as_standby:
            fields[Field.STANDBY_PID] = pid
        return Child(pid, order_fd)

    def _be_child(self, order_fd: int, served_by: int | None, *, as_standby: bool) -> NoReturn:
        """In the forked process: work, and end without any of the keeper's clean-up."""
        status = FAILED
        try:
            signal.set_wakeup_fd(-1)
            if as_standby:
                self._memory.board.fields[Field.STANDBY_PID] = os.getpid()
            if self._ballast is not None:
                self._ballast.close()
            if self._control is not None:
                self._control.close()
            self._notifier.close()
            status = work(self._mounted, order_fd, emergency=not as_standby, served_by=served_by)
        finally:
            os._exit(status)

    def _promote(self, child: Child) -> None:
        """The standby is the worker from now on."""
        fields = self._memory.board.fields
        fields[Field.WORKER_PID] = child.pid
        if fields[Field.STANDBY_PID] == child.pid:
            fields[Field.STANDBY_PID] = 0
            fields[Field.STANDBY_READY] = 0

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Keep the mount served until it is gone, or until this keeper is to go alone: the exit status."""
        self._listen()
        self._not_stored = list(self._descriptors)
        self._tell_manager()
        while True:
            self._wait()
            status = self._look_after_worker()
            if status is not None:
                break
            self._look_after_standby()
            self._tell_manager()
            if self._told_to_end and self._end_or_leave():
                return 0  # handed over to worker and standby
            if self._control is not None and select.select([self._control], [], [], 0)[0] and self._serve_control():
                return 0  # handed over: nothing of this is ours any more
        if self._standby is not None:
            self._standby.kill()
            self._standby.reap()
        self._clean_up()
        return status

    def _listen(self) -> None:
        hears = False  # the worker, what the terminal tells the process group: not before it had taken over

        def wake(number: int, frame: object) -> None:
            if self._is_service:
                self._told_to_end = True
            elif self._worker is not None and not (number == signal.SIGINT and self._foreground and hears):
                self._worker.tell(number)  # it decides: with swap attached it must not end

        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, wake)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # what has come meanwhile is handled before this returns
        hears = True
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        path = f"{self._directory.path}/control"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._control.bind(path)
            os.chmod(path, 0o600)  # noqa: PTH101
            self._control.listen(4)
        except OSError as error:
            self._control.close()
            self._control = None
            self._log.warning(f"`zbudfs restart` will not work: {path}: {error.strerror}")

    def _wait(self) -> None:
        watched = [self._wake, *(child.pidfd for child in (self._worker, self._standby) if child is not None)]
        if self._control is not None:
            watched.append(self._control.fileno())
        ready, _, _ = select.select(watched, [], [], POLL_SECONDS)
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 64)

    def _look_after_worker(self) -> int | None:
        """Replace the worker if it is gone; the exit status when the mount is, or nobody can serve it."""
        fields = self._memory.board.fields
        if self._worker is not None:
            self._watch_heartbeat(self._worker)
            if not self._worker.has_ended():
                return None
            served = fields[Field.SERVING]
            fields[Field.SERVING] = 0
            status = self._worker.reap()
            pid, self._worker = self._worker.pid, None
            if status == 0:
                return 0
            if not is_connected(self._fuse_fd):
                return 0  # it was unmounted while nobody served it
            self._failures = 0 if served else self._failures + 1
            why = self._memory.board.take_error() if status == FAILED else f"status {status}"
            if status < 0:
                names = {int(number): number.name for number in signal.Signals}
                why = names.get(-status, f"signal {-status}")
            self._retry_at = time.monotonic() + (min(0.1 * 2**self._failures, 10.0) if self._failures else 0.0)
            self._take_over()
            self._log.error(f"worker {pid} died ({why or status}); {self._standby_said()}")
        if self._worker is None:
            if self._failures >= MAX_FAILURES and self._is_service and self._directory.survives:
                self._log.error(f"{self._failures} workers in a row did not come up: a new keeper is to try")
                os._exit(1)  # the manager keeps the descriptors, and the memory is in the pool directory
            if self._failures >= MAX_FAILURES:
                self._log.error(
                    f"{self._failures} workers in a row did not come up: giving up, what is swapped out is lost"
                )
                with contextlib.suppress(MountError):
                    unmount(self._settings.mountpoint, lazy=True)
                return 1
            self._take_over()
        return None

    def _standby_said(self) -> str:
        return f"worker {self._worker.pid} takes over" if self._worker is not None else "another is tried soon"

    def _take_over(self) -> None:
        """Make the standby the worker, or fork one. With a failure behind it, not before the back-off is over."""
        if time.monotonic() < self._retry_at:
            return
        child, self._standby = self._standby, None
        if child is not None and child.has_ended():
            child.reap()
            child = None
        if child is None:
            if self._ballast is not None:
                self._ballast.close()
                self._ballast = None
            try:
                child = self._fork(as_standby=False)
            except OSError as error:
                self._failures += 1
                self._retry_at = time.monotonic() + min(0.1 * 2**self._failures, 10.0)
                self._log.error(f"no worker can be forked: {error.strerror}")
                return
        child.order()
        self._worker = child
        self._promote(child)
        fields = self._memory.board.fields
        fields[Field.RECOVERIES] += 1
        self._heartbeat = (fields[Field.HEARTBEAT], 0.0)
        self._serving_since = 0.0

    def _watch_heartbeat(self, worker: Child) -> None:
        fields = self._memory.board.fields
        now = time.monotonic()
        if fields[Field.SERVING] and not self._serving_since:
            self._serving_since = now
            self._failures = 0
        beat, (last, silent) = fields[Field.HEARTBEAT], self._heartbeat
        silent = silent + min(now - self._looked_at, LONGEST_LOOK_SECONDS) if beat == last else 0.0
        self._looked_at = now
        if silent > (HANG_SECONDS if self._serving_since else START_LIMIT_SECONDS):
            self._log.error(f"worker {worker.pid} has not answered for {silent:.0f} s: it is killed")
            silent = 0.0
            worker.kill()
        self._heartbeat = (beat, silent)

    def _look_after_standby(self) -> None:
        now = time.monotonic()
        if self._standby is not None:
            if self._standby.has_ended():
                status = self._standby.reap()
                self._standby = None
                self._memory.board.fields[Field.STANDBY_READY] = self._memory.board.fields[Field.STANDBY_PID] = 0
                why = self._memory.board.take_error() if status == FAILED else f"status {status}"
                self._log.warning(f"the standby died ({why}); another is made")
                self._retry_at = now + 1.0
            return
        if self._worker is None or not self._serving_since or now < self._retry_at:
            return
        if now - self._serving_since >= STANDBY_DELAY_SECONDS:
            try:
                self._standby = self._fork(as_standby=True)
            except OSError as error:
                self._retry_at = now + 1.0
                self._log.warning(f"no standby can be forked: {error.strerror}")
                return
            if self._ballast is None:
                self._load_ballast()

    # ---- as the main process of a service ----------------------------------------------------------------------------

    def _tell_manager(self) -> None:
        """Descriptors, and that this is up, until they were taken; signs of life while the worker gives them; a status."""
        if not self._is_service:
            return
        now = time.monotonic()
        self._not_stored = [
            name for name in self._not_stored if not self._notifier.store(name, self._descriptors[name])
        ]
        self._told_ready = self._told_ready or self._notifier.tell("READY=1")
        # What the worker's event loop counts, and not that this loop turns: a stuck worker is a stuck service.
        beat = self._heartbeat[0]
        due = self._notifier.watchdog_seconds > 0 and now >= self._tell_alive_at
        if due and beat != self._told_beat and self._notifier.tell("WATCHDOG=1"):
            self._told_beat = beat
            self._tell_alive_at = now + self._notifier.watchdog_seconds / WATCHDOG_PARTS
        if now >= self._tell_status_at:
            self._tell_status_at = now + STATUS_SECONDS
            status = self._status()
            if status != self._told_status and self._notifier.tell(f"STATUS={status}"):
                self._told_status = status

    def _status(self) -> str:
        fields = self._memory.board.fields
        if not fields[Field.SERVING]:
            return "no worker serves at the moment; one takes over"
        frames = fields[Field.USED_FRAMES]
        return (
            f"{fields[Field.STORED_PAGES]} pages stored in {frames >> 20 - PAGE_SHIFT} of"
            f" {self._memory.nr_frames >> 20 - PAGE_SHIFT} MiB, {fields[Field.WRITTEN_BACK_PAGES]} of them on disk;"
            f" {'standby ready' if fields[Field.STANDBY_READY] else 'no standby'}, {fields[Field.RECOVERIES]} recoveries"
        )

    def _end_or_leave(self) -> bool:
        """The service is to end: have the worker unmount, or, with the swapfile open, True: this keeper goes alone.

        Not while a worker takes over: it would end with its keeper.
        """
        fields = self._memory.board.fields
        now = time.monotonic()
        if self._worker is None or not fields[Field.SERVING]:
            return False
        if not self._told_to_end_at:
            self._told_to_end_at = now
        users = fields[Field.OPEN_SWAPFILES]
        if not users and now >= self._tell_end_at:
            self._tell_end_at = now + END_RETRY_SECONDS
            self._notifier.tell("STOPPING=1", "STATUS=unmounting")
            self._worker.tell(signal.SIGTERM)
        if not users or now < self._told_to_end_at + CLOSE_SECONDS:
            return False
        self._notifier.tell("STOPPING=1", "STATUS=the swapfile is open: worker and standby serve on without a keeper")
        self._log.info(f"told to end while the swapfile is open ({users} times): worker {self._worker.pid} serves on")
        return True

    # ---- handing over to a newer version -------------------------------------------------------------------------

    def _serve_control(self) -> bool:
        """Answer one order on the socket. True if another keeper has everything now."""
        assert self._control is not None
        connection, _ = self._control.accept()
        with connection:
            connection.settimeout(5.0)
            try:
                order = json.loads(connection.recv(1 << 16))
                interpreter = str(order["interpreter"])
                if order["order"] != "restart":
                    raise ValueError("the only order is restart")
                answer = self._restart(interpreter)
            except Exception as error:  # whatever is sent: the keeper must not end because of it
                answer = {"error": f"the order was not understood: {error}"}
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
            return "pid" in answer

    def _restart(self, interpreter: str) -> dict[str, object]:
        """Have a fresh keeper of the version that `interpreter` has take over; the answer for whoever ordered it."""
        if not self._directory.survives:
            return {
                "error": "the pool is in memory without a name, which cannot be handed over: swapoff, umount, mount"
            }
        fields = self._memory.board.fields
        shared = (Field.KEEPER_PID, Field.STANDBY_PID, Field.STANDBY_READY)
        before = [fields[field] for field in shared]
        self._notifier.tell("WATCHDOG=1")  # nothing is told meanwhile
        answer = self._try_restart(interpreter)
        if "error" in answer:
            for field, value in zip(shared, before, strict=True):
                fields[field] = value
        return answer

    def _try_restart(self, interpreter: str) -> dict[str, object]:
        mine, theirs = socket.socketpair()
        arguments = [interpreter, "-I", "-m", "zbudfs.service.daemon", "--adopt-fd", str(theirs.fileno())]
        arguments += ["--foreground"] if self._foreground else []
        arguments += ["--service"] if self._is_service else []
        os.set_inheritable(theirs.fileno(), True)
        try:
            pid = os.posix_spawn(interpreter, arguments, dict(os.environ))
        except OSError as error:
            return {"error": f"{interpreter} cannot be started: {error.strerror}"}
        finally:
            theirs.close()
        mine.settimeout(START_LIMIT_SECONDS + 5)
        with mine:
            try:
                descriptors = list(self._descriptors.values())
                message: dict[str, object] = {
                    "settings": self._settings.to_json(),
                    "folder": self._directory.path,
                    "born_ns": self._born_ns,
                }
                send_with_descriptors(mine, message, descriptors)
                reply = _receive_line(mine)
                if "ready" not in reply:
                    os.waitpid(pid, 0)
                    return {"error": str(reply.get("error", "the new version died before it was ready"))}
                # From here on there is no way back: the old worker must be gone before the new one takes over.
                for child in (self._standby, self._worker):
                    if child is not None:
                        child.kill()
                        child.reap()
                self._worker = self._standby = None
                self._memory.board.fields[Field.SERVING] = 0
                self._notifier.tell(f"MAINPID={pid}")
                mine.sendall(b'{"go": true}\n')
                return {"pid": pid, "version": reply["version"]}
            except OSError as error:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return {"error": f"the new version did not come up: {error}"}


def send_with_descriptors(channel: socket.socket, message: dict[str, object], descriptors: list[int]) -> None:
    """Send a message, in one line of JSON, with open files."""
    data = json.dumps(message).encode() + b"\n"
    channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def receive_with_descriptors(channel: socket.socket) -> tuple[dict[str, object], list[int]]:
    """What `send_with_descriptors` sent."""
    data, descriptors, _, _ = socket.recv_fds(channel, 65536, 8)
    message: dict[str, object] = json.loads(data)
    return message, descriptors


def _receive_line(channel: socket.socket) -> dict[str, object]:
    data = b""
    while not data.endswith(b"\n"):
        piece = channel.recv(4096)
        if not piece:
            return {}
        data += piece
    message: dict[str, object] = json.loads(data)
    return message


def keep_adopted(channel: socket.socket, log: Log, *, foreground: bool, notifier: Notifier | None = None) -> int:
    """Be the keeper that takes over from the one at the other end of `channel`: the exit status."""
    try:
        handed, descriptors = receive_with_descriptors(channel)
        settings = Settings.from_json(str(handed["settings"]))
        keeper = Keeper(settings, log, foreground=foreground, notifier=notifier)
        keeper.adopt(str(handed["folder"]), descriptors, int(str(handed["born_ns"])))
        keeper.start()
    except Exception as error:
        channel.sendall(json.dumps({"error": str(error) or repr(error)}).encode() + b"\n")
        return 1
    channel.sendall(json.dumps({"ready": True, "version": __version__}).encode() + b"\n")
    if "go" not in _receive_line(channel):
        return 1  # the old one is gone or has thought better of it: it is still the one that serves
    channel.close()
    try:
        keeper.serve_first()
    except StartError as error:
        log.error(f"{error}; another worker is tried")  # there is no way back: the old keeper has gone
    return keeper.run()
