# SPDX-License-Identifier: MIT
"""The keeper: makes the mount and its memory, and keeps a worker serving it and a standby ready to.

    keeper ---fork---> worker     serves
           ---fork---> standby    everything done but the last step; waits on an eventfd

Why a standby and not a fresh start: a new worker needs memory just when swap is dead. A fork copies page tables, its
mlockall() every copy-on-write page; starting an interpreter needs more still. All of that is done here while things
are calm. When the worker dies the keeper writes eight bytes to an eventfd, and forks the next standby when swap works
again. If a worker dies before the next standby is there, the keeper gives a ballast of locked memory back to the
system and forks a worker on it.

The keeper has one thread, no event loop, and allocates as little as it can. It waits in one place (`_wait`), with a limit,
for all of: the end of its children (pidfds), signals (SIGCHLD tells that a child was stopped), a heartbeat that stands
still, orders on a socket in the pool directory (service/control.py), and the next step of a restart
(service/handing_over.py).

As the main process of a service it also tells the manager how things stand (service/notify.py), gives it the descriptors
to keep, and, told to end while the swapfile is open, goes alone: worker and standby serve on until another keeper comes
(service/predecessors.py).
"""

import contextlib
import errno
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from enum import Enum, auto
from typing import Final, NoReturn

from zbudfs import __version__
from zbudfs.core import hot
from zbudfs.core.packing import Packing
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.fuse import shim
from zbudfs.service import disks, hardening, public
from zbudfs.service.child import Child, Process, Pulse, is_readable
from zbudfs.service.control import Client, Control
from zbudfs.service.handing_over import (
    HandingOver,
    Stage,
    Step,
    Successor,
    receive_line,
    receive_with_descriptors,
)
from zbudfs.service.log import Lasting, Log
from zbudfs.service.mountpoint import (
    MountError,
    find_mount,
    is_connected,
    is_mounted,
    open_and_mount,
    request_timeout_warnings,
    unmount_all,
    zbudfs_mounts,
)
from zbudfs.service.notify import WATCHDOG_PARTS, Notifier
from zbudfs.service.pooldir import PoolDirectory
from zbudfs.service.public import PublicFile
from zbudfs.service.session import session_warnings
from zbudfs.service.settings import BACKING_FOLDER, Settings
from zbudfs.service.worker import FAILED, Mounted, work
from zbudfs.store.backing import Backing
from zbudfs.store.board import CANNOT_RESEND, Field
from zbudfs.store.headroom import Headroom
from zbudfs.store.memory import StoreMemory

HANG_SECONDS: Final = 5.0
"""A worker or standby that runs and whose heartbeat stands still for so long is killed. Guessed: the longest stretch without
a beat that is not a fault is a machine that gives this process no time."""

ANSWER_SECONDS: Final = 2.0
"""A ready standby that has not begun to take over so long after the order is killed. Guessed: it needs a millisecond."""

CALM_POLL_SECONDS: Final = 1.0
"""Longest wait between two looks while all is well: deaths, stops, orders and signals end it at once."""
POLL_SECONDS: Final = 0.2
"""The same while there is no standby that is ready."""
BUSY_POLL_SECONDS: Final = 0.02
"""The same while nobody serves, a child is stopped, or a restart is under way."""

STANDBY_DELAY_SECONDS: Final = 0.2
"""After a worker has begun to serve, before the next standby is forked: what waited for swap goes first. Guessed."""

START_LIMIT_SECONDS: Final = 45.0
"""A worker or standby that comes up and gives no sign of life for so long is killed. It may take any time. Arbitrary."""

START_EXTENSION_SECONDS: Final = 60
"""By so much the manager's limit on a start is extended with each sign of life. As long as the unit's watchdog."""

STATUS_SECONDS: Final = 5.0
"""How often the line of status is renewed, if it has changed. Arbitrary."""

CLOSE_SECONDS: Final = 1.0
"""How long an open swapfile may still be on its way to be closed: the kernel does not wait for that. Arbitrary."""

END_RETRY_SECONDS: Final = 1.0
"""How often the worker is told to end when a service ends: a loop device lets go of its file a little late. Arbitrary."""

UNMOUNTED_SECONDS: Final = 0.5
"""How long after an unmount the connection may take to end by itself, before the worker is told to end it. Guessed."""

END_SECONDS: Final = 5.0
"""How long a killed standby may take to be gone when the mount has ended. Arbitrary: nothing depends on it."""

LONGEST_BACK_OFF_SECONDS: Final = 30.0
"""Longest time between two attempts to have a standby. Arbitrary: an attempt that fails takes up to 50 MiB for a moment."""

STEADY_SECONDS: Final = 10.0
"""A standby that has been ready for so long ends a series of failures. Guessed."""

MAX_FAILURES: Final = 8
"""Workers in a row that do not come up, before the keeper gives up. With the back-off that is some 25 seconds."""

SHORT_LIFE_SECONDS: Final = 1.0
"""A worker that dies so soon after it has begun to serve may die of a request, which the next one gets again. Guessed."""
FREE_SHORT_LIVES: Final = 2
"""So many of them in a row are replaced at once; then the back-off begins, but the keeper never gives up because of them."""

BALLAST_BYTES: Final = 4 << 20
"""Locked memory that is let go of when a worker must be forked while swap is dead. Guessed: the pages that it writes to."""


PREDECESSOR_SECONDS: Final = 1.0
"""How long the keeper that has handed over may take to end. Arbitrary."""

ENDING: Final = frozenset((signal.SIGTERM, signal.SIGINT))
"""What tells a keeper to end. Blocked until it is up: one that comes before is looked for where all can be undone, and has
no chance to cut anything off in the middle."""


class StartError(Exception):
    """The mount could not come up; the text is for the user."""


class Role(Enum):
    """What a child is forked for."""

    FIRST = auto()
    """To be the first worker of this keeper, when it is ready and ordered."""
    STANDBY = auto()
    EMERGENCY = auto()
    """To serve at once, since nobody does."""


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
        self._dying: list[Process] = []
        """Killed, and not yet gone: nothing depends on their end."""
        self._handing_over: HandingOver | None = None
        self._predecessor: socket.socket | None = None
        """To the keeper that has handed over and has not ended yet."""
        self._failures = 0
        self._short_lives = 0
        """Workers in a row that died soon after they had begun to serve, or before."""
        self._retry_at = 0.0
        self._standby_failures = 0
        self._standby_retry_at = 0.0
        self._standby_ready_since = 0.0
        self._standby_trouble = Lasting(log.warning, log.info)
        self._fork_trouble = Lasting(log.error, log.info)
        self._pulse = Pulse()
        """The worker's."""
        self._standby_pulse = Pulse()
        self._serving_since = 0.0
        self._has_begun = False
        self._ballast: mmap.mmap | None = None
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._mounts_changed = True
        self._unmounted_since = 0.0
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._control: Control | None = None

    @property
    def warnings(self) -> list[str]:
        """What the system refused, and what follows; complete after `serve_first`."""
        return self._warnings

    # ---- coming up -------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make memory, backing file and mount. Raises what they raise, with nothing left behind."""
        if sys.maxsize < 1 << 32:
            raise StartError(
                "zbudfs needs a 64-bit system and a 64-bit Python: the page table is changed 8 bytes at a time"
            )
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
                self._warnings += session_warnings()
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
        self._directory.roster.keep()
        mount = find_mount(self._settings.mountpoint)
        fields = self._memory.board.fields
        fields[Field.MOUNT_DEVICE] = mount.st_dev if mount is not None else 0
        public.remove(self._directory.path)  # of a mount that has died
        self._prepare(time.time_ns())
        fields[Field.BORN_NS] = self._born_ns
        fields[Field.BACKING_FIXED] = self._backing is not None and self._backing.is_fixed
        self._mounted.write_owners(fields)

    def adopt(
        self,
        directory: PoolDirectory,
        descriptors: list[int],
        born_ns: int,
        predecessor: socket.socket | None = None,
    ) -> None:
        """Take over memory, backing file and mount, whose descriptors another keeper has handed over.

        `predecessor` is the socket to a keeper that stays until the first worker of this one serves.
        """
        self._predecessor = predecessor
        self._warnings += hardening.before_threads(0)
        shim.take_arenas_from_malloc()
        self._fuse_fd = descriptors[0]
        self._directory = directory
        backing = self._settings.backing
        self._memory = self._make_memory()
        is_fixed = bool(self._memory.board.fields[Field.BACKING_FIXED])
        self._backing = Backing(backing, adopted_fd=descriptors[2], is_fixed=is_fixed) if backing is not None else None
        self._encrypt()
        self._prepare(born_ns)

    def _prepare(self, born_ns: int) -> None:
        self._born_ns = born_ns
        self._directory.roster.join()
        self._descriptors = {"fuse": self._fuse_fd, "lock": self._directory.lock_fd}
        if self._backing is not None:
            self._descriptors["backing"] = self._backing.fileno()
        if not hot.BUILT:
            self._warnings.append(f"{hot.NOT_BUILT}; {hot.REMEDY}")
        self._log.ring = self._memory.board
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
            self._directory.lock_fd,
            self._directory.roster,
            self._publish(),
        )
        if any(mount.admits_others for mount in zbudfs_mounts() if mount.st_dev == self._mount_device()):
            self._warnings.append(
                "other users' requests reach the daemon and can slow swap down: an older version has made the mount; swapoff,"
                " umount and mount it again"
            )

    def _mount_device(self) -> int:
        return int(self._memory.board.fields[Field.MOUNT_DEVICE])

    def _publish(self) -> PublicFile | None:
        """Make the file that other users may read. Without one the mount works, and only root can look at it."""
        device = f"{os.major(self._mount_device())}:{os.minor(self._mount_device())}"
        texts = [self._settings.mountpoint, self._settings.backing or ""]
        try:
            return PublicFile.create(self._directory.path, device, texts)
        except (OSError, MemoryError) as error:
            self._log.info(f"no public statistics: {error}")
            return None

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
        force = self._settings.force_backing
        self._warnings += disks.check(path, force=force)
        backing = Backing(path, force=force)
        self._warnings += backing.warnings
        if not backing.direct:
            self._warnings.append(
                f"the file system of {path} refuses direct I/O: writeback goes through the page cache, which needs"
                " memory when there is little; put the backing file on ext4, xfs or btrfs"
            )
        return backing

    def start(self) -> list[str]:
        """Fork the first worker and wait until it is ready to serve: the warnings. StartError.

        Nothing on the board changes: somebody else may serve.
        """
        worker = self._fork(Role.FIRST)
        fields = self._memory.board.fields
        pulse = Pulse()
        pulse.restart(fields[Field.READY_BEAT])
        while not worker.is_ready:
            why = ""
            if worker.has_ended():
                why = self._memory.board.take_error() or "the worker died before it was ready"
            elif signal.sigpending() & ENDING:
                why = "it was told to end before it was up"
            elif worker.is_stopped_for_good():
                why = "the worker was stopped (SIGSTOP) before it was ready"
            elif pulse.look(fields[Field.READY_BEAT]) > START_LIMIT_SECONDS:
                why = f"the worker has given no sign of life for {START_LIMIT_SECONDS:g} s while it got ready"
            if why:
                self._end_first(worker)
                raise StartError(why)
            self._tell_alive(pulse.beat)
            time.sleep(0.005)
        self._worker = worker
        return self._warnings

    def _end_first(self, worker: Child) -> None:
        """Kill the first worker, which is of no use."""
        worker.kill()
        self._worker = None
        self._dying.append(worker)
        self._bury(END_SECONDS)

    def start_at_once(self) -> None:
        """Fork the first worker while nobody serves the mount, and swap is dead with it: it gets ready afterwards."""
        self._worker = self._fork(Role.EMERGENCY)
        self._memory.board.fields[Field.RECOVERIES] += 1

    @property
    def first_worker_pid(self) -> int:
        """The process that `start` has forked."""
        return self._worker.pid if self._worker is not None else 0

    def end_others(self) -> None:
        """Kill all other processes of this mount but the first worker.

        It does not wait for their end: the first worker does that, before it touches the memory.
        """
        self._directory.roster.end_others(self.first_worker_pid)
        self._memory.board.fields[Field.SERVING] = 0

    def order_first(self) -> None:
        """Order the first worker to serve; `run` looks after it from then on."""
        assert self._worker is not None
        fields = self._memory.board.fields
        fields[Field.STANDBY_PID] = fields[Field.STANDBY_READY] = 0
        self._order(self._worker)

    def serve_first(self) -> None:
        """Order the first worker of a new mount to serve and wait until it does. StartError."""
        self.order_first()
        fields = self._memory.board.fields
        while not fields[Field.SERVING]:
            assert self._worker is not None
            if self._worker.has_ended():
                self._end_first(self._worker)
                raise StartError(self._memory.board.take_error() or "the worker died before it served")
            self._look_at_worker(self._worker)
            self._tell_alive(self._pulse.beat)
            time.sleep(0.005)
        self._begin()

    def _begin(self) -> None:
        """The first worker serves: get ready for its death."""
        self._has_begun = True
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
        self._unmount()
        self._clean_up()

    def _unmount(self) -> None:
        """Unmount what is this keeper's, and nothing that was mounted at its place since."""
        with contextlib.suppress(MountError):
            unmount_all(self._memory.board.fields[Field.MOUNT_DEVICE], lazy=True)

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

    def _fork(self, role: Role) -> Child:
        served_by = self._worker.pidfd if role is Role.STANDBY and self._worker is not None else None

        def be_child(order_fd: int, ready_fd: int) -> NoReturn:
            self._be_child(order_fd, ready_fd, served_by, role)

        child = Child.fork(be_child, is_standby=role is not Role.EMERGENCY)
        if role is Role.STANDBY:
            self._memory.board.fields[Field.STANDBY_PID] = child.pid
        return child

    def _be_child(self, order_fd: int, ready_fd: int, served_by: int | None, role: Role) -> NoReturn:
        """In the forked process: work, and end without any of the keeper's clean-up."""
        status = FAILED
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if role is Role.STANDBY:
                self._memory.board.fields[Field.STANDBY_PID] = os.getpid()
            if self._ballast is not None:
                self._ballast.close()
            if self._control is not None:
                self._control.close()
            if self._handing_over is not None:
                self._handing_over.successor.channel.close()
            if self._predecessor is not None:
                self._predecessor.close()
            self._notifier.close()
            status = work(self._mounted, order_fd, ready_fd, emergency=role is Role.EMERGENCY, served_by=served_by)
        finally:
            os._exit(status)

    def _order(self, worker: Child) -> None:
        """Have a worker take over."""
        fields = self._memory.board.fields
        worker.order()
        self._serving_since = 0.0
        self._pulse.restart(fields[Field.HEARTBEAT])
        fields[Field.WORKER_PID] = worker.pid
        if fields[Field.STANDBY_PID] == worker.pid:
            self._no_standby(0)

    def _no_standby(self, fault: int) -> None:
        """Say on the board that there is no standby, and since when; `fault` is an errno, or 0."""
        fields = self._memory.board.fields
        fields[Field.STANDBY_PID] = fields[Field.STANDBY_READY] = 0
        fields[Field.NO_STANDBY_FAULT] = fault
        if not fields[Field.NO_STANDBY_SINCE]:
            fields[Field.NO_STANDBY_SINCE] = int(time.time())

    def _bury(self, seconds: float = 0.0) -> None:
        """Reap what has been killed, as far as it is gone; with `seconds`, wait so long for it."""
        end = time.monotonic() + seconds
        while self._dying:
            self._dying = [process for process in self._dying if process.reap() is None]
            if time.monotonic() >= end:
                break
            time.sleep(0.002)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Keep the mount served until it is gone, or until this keeper is to go alone: the exit status."""
        self._listen()
        self._not_stored = list(self._descriptors)
        while True:
            self._look_after_predecessor()
            self._tell_manager()
            self._wait()
            self._bury()
            status = self._look_after_worker()
            if status is not None:
                break
            self._look_after_standby()
            self._look_after_mount()
            if self._told_to_end and self._end_or_leave():
                if self._handing_over is not None:
                    self._abandon_handing_over("the keeper was told to end")
                return 0  # handed over to worker and standby
            for client, order in self._control.orders() if self._control is not None else ():
                self._obey(client, order)
            if self._advance_handing_over():
                return 0  # handed over: nothing of this is ours any more
        if self._handing_over is not None:
            self._abandon_handing_over("it was unmounted meanwhile")
        if self._standby is not None:
            self._standby.kill()
            self._dying.append(self._standby)
        self._bury(END_SECONDS)
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
        signal.signal(signal.SIGCHLD, lambda *_: None)  # it is to wake `_wait`
        for number in ENDING:
            signal.signal(number, wake)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # what has come meanwhile is handled before this returns
        hears = True
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        path = f"{self._directory.path}/control"
        try:
            self._control = Control(path)
        except OSError as error:
            self._log.warning(f"`zbudfs restart` will not work: {path}: {error.strerror}")

    def _wait(self) -> None:
        """Until there is something to look at, and not for long."""
        watched = [self._wake, *(child.pidfd for child in (self._worker, self._standby) if child is not None)]
        if self._standby is not None and not self._standby.is_ready:
            watched.append(self._standby.ready_fd)
        if self._control is not None:
            watched += self._control.descriptors()
        if self._handing_over is not None:
            watched += self._handing_over.descriptors()
        if self._predecessor is not None:
            watched.append(self._predecessor.fileno())
        _, _, changed = select.select(
            watched, [], [self._mounts], self._patience()
        )  # poll(2) fails where few files may be open
        self._mounts_changed = bool(changed)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 64)

    def _patience(self) -> float:
        children = [child for child in (self._worker, self._standby) if child is not None]
        if self._worker is None or not self._serving_since or any(child.is_stopped for child in children):
            return BUSY_POLL_SECONDS
        if self._handing_over is not None:
            return BUSY_POLL_SECONDS
        if (
            self._unmounted_since
            or self._standby is None
            or not self._standby.is_ready
            or self._told_to_end
            or self._predecessor is not None
        ):
            return POLL_SECONDS
        return CALM_POLL_SECONDS

    def _look_after_worker(self) -> int | None:
        """Replace the worker if it is gone; the exit status when the mount is, or nobody can serve it."""
        if self._handing_over is not None and self._handing_over.stage is not Stage.STARTING:
            return None  # it was ended on purpose
        if self._worker is not None:
            self._look_at_worker(self._worker)
            if not self._worker.has_ended():
                return None
            status = self._bury_worker(self._worker)
            if status is not None:
                return status
        if self._worker is None:
            if self._failures >= MAX_FAILURES and self._is_service and self._directory.survives:
                self._log.error(f"{self._failures} workers in a row did not come up: a new keeper is to try")
                os._exit(1)  # the manager keeps the descriptors, and the memory is in the pool directory
            if self._failures >= MAX_FAILURES:
                self._log.error(
                    f"{self._failures} workers in a row did not come up: giving up, what is swapped out is lost"
                )
                self._unmount()
                return 1
            self._take_over()
        return None

    def _bury_worker(self, worker: Child) -> int | None:
        """Reap a worker that has ended, and replace it; the exit status if the mount is gone."""
        status = worker.reap()
        if status is None:
            return None  # a tracer has it: it is not ours to reap yet
        self._worker = None
        fields = self._memory.board.fields
        by_itself = self._standby is not None and fields[Field.TAKING_OVER] == self._standby.pid
        served = fields[Field.SERVING]
        if not by_itself:
            fields[Field.SERVING] = 0
        if not is_connected(self._fuse_fd) or (status == 0 and fields[Field.ENDED]):
            return 0  # unmounted, perhaps while nobody served it
        self._failures = 0 if served else self._failures + 1
        lived = served and time.monotonic() - self._serving_since >= SHORT_LIFE_SECONDS
        self._short_lives = 0 if lived else self._short_lives + 1
        why = self._memory.board.take_error() if status == FAILED else f"status {status}"
        if status < 0:
            names = {int(number): number.name for number in signal.Signals}
            why = names.get(-status, f"signal {-status}")
        failures = max(self._failures, self._short_lives - FREE_SHORT_LIVES)
        self._retry_at = time.monotonic() + (min(0.1 * 2**failures, 10.0) if failures > 0 else 0.0)
        self._take_over()
        self._log.error(f"worker {worker.pid} died ({why or status}); {self._standby_said()}")
        return None

    def _standby_said(self) -> str:
        return f"worker {self._worker.pid} takes over" if self._worker is not None else "another is tried soon"

    def _take_over(self) -> None:
        """Make the standby the worker, or fork one. With a failure behind it, not before the back-off is over."""
        if time.monotonic() < self._retry_at:
            return
        fields = self._memory.board.fields
        child, self._standby = self._standby, None
        if child is not None and (child.has_ended() or child.is_stopped or not child.is_ready):
            # One that still gets ready wants more memory than one that is forked to serve at once.
            child.kill()
            self._dying.append(child)
            child = None
        by_itself = child is not None and fields[Field.TAKING_OVER] == child.pid
        if child is None:
            if self._ballast is not None:
                self._ballast.close()
                self._ballast = None
            try:
                child = self._fork(Role.EMERGENCY)
            except OSError as error:
                self._failures += 1
                self._retry_at = time.monotonic() + min(0.1 * 2**self._failures, 10.0)
                self._fork_trouble.begin(f"no worker can be forked: {error.strerror}; it is tried again")
                return
            self._fork_trouble.end("workers can be forked again")
        self._worker = child
        self._order(child)
        if not by_itself:
            fields[Field.RECOVERIES] += 1

    def _look_after_mount(self) -> None:
        """Have the worker end when the mount has been taken away and somebody still holds it, in another namespace perhaps."""
        fields = self._memory.board.fields
        now = time.monotonic()
        if self._mounts_changed:
            gone = fields[Field.MOUNT_DEVICE] and not is_mounted(fields[Field.MOUNT_DEVICE])
            self._unmounted_since = (self._unmounted_since or now) if gone else 0.0
        if (
            self._unmounted_since
            and now >= self._unmounted_since + UNMOUNTED_SECONDS
            and self._worker is not None
            and fields[Field.SERVING]
            and not fields[Field.OPEN_SWAPFILES]
        ):
            self._unmounted_since = now
            self._worker.tell(signal.SIGTERM)

    def _look_at_worker(self, worker: Child) -> None:
        """Kill a worker that hangs."""
        fields = self._memory.board.fields
        if fields[Field.SERVING] and not self._serving_since:
            self._serving_since = time.monotonic()
            self._failures = 0
        silent = self._pulse.look(fields[Field.HEARTBEAT])
        if worker.is_killed:
            return
        if self._serving_since:
            limit = HANG_SECONDS
        elif worker.is_standby and fields[Field.TAKING_OVER] != worker.pid:
            limit = ANSWER_SECONDS
        else:
            limit = START_LIMIT_SECONDS
        if worker.is_stopped_for_good():
            why = "it is stopped (SIGSTOP), and is killed"
        elif silent > limit:
            why = f"{silent:.0f} s of silence; it is killed"
        else:
            return
        self._log.error(f"worker {worker.pid} has not answered: {why}")
        worker.kill()

    def _look_after_standby(self) -> None:
        """Have a standby, and know how it is."""
        if self._standby is not None:
            if self._standby.has_ended():
                self._bury_standby(self._standby)
            else:
                self._look_at_standby(self._standby)
            return
        now = time.monotonic()
        if self._worker is None or not self._serving_since or now < self._standby_retry_at:
            return
        if now - self._serving_since >= STANDBY_DELAY_SECONDS:
            try:
                self._standby = self._fork(Role.STANDBY)
            except OSError as error:
                self._standby_failed(
                    error.errno or errno.EAGAIN, f"no standby can be forked: {error.strerror}; it is tried again"
                )
                return
            self._standby_pulse.restart(self._memory.board.fields[Field.STANDBY_BEAT])
            self._standby_ready_since = 0.0
            if self._ballast is None:
                self._load_ballast()

    def _look_at_standby(self, standby: Child) -> None:
        """Say on the board whether the standby is ready, and kill one that hangs."""
        fields = self._memory.board.fields
        silent = self._standby_pulse.look(fields[Field.STANDBY_BEAT])
        now = time.monotonic()
        for_good = standby.is_stopped_for_good()
        ready = standby.is_ready and not standby.is_stopped and not standby.is_killed
        fields[Field.STANDBY_READY] = ready
        if standby.is_killed:
            return
        if ready and not self._standby_ready_since:
            self._standby_ready_since = now
            fields[Field.NO_STANDBY_SINCE] = fields[Field.NO_STANDBY_FAULT] = 0
        if ready and self._standby_failures and now - self._standby_ready_since >= STEADY_SECONDS:
            self._standby_trouble.end(f"a standby is ready, after {self._standby_failures} failures")
            self._standby_failures = 0
        if for_good:
            why = "it is stopped (SIGSTOP)"
        elif silent > (HANG_SECONDS if standby.is_ready else START_LIMIT_SECONDS):
            why = f"{silent:.0f} s of silence"
        else:
            return
        fields[Field.STANDBY_READY] = 0
        self._standby_trouble.begin(f"the standby has not answered: {why}; it is killed")
        standby.kill()

    def _bury_standby(self, standby: Child) -> None:
        status = standby.reap()
        if status is None:
            return
        self._standby = None
        why = self._memory.board.take_error() if status == FAILED else f"status {status}"
        self._standby_failed(errno.ECHILD, f"the standby died ({why}); another is made")

    def _standby_failed(self, fault: int, text: str) -> None:
        self._no_standby(fault)
        self._standby_trouble.begin(text)
        self._standby_retry_at = time.monotonic() + min(2.0**self._standby_failures, LONGEST_BACK_OFF_SECONDS)
        self._standby_failures += 1

    # ---- as the main process of a service ----------------------------------------------------------------------------

    def _tell_manager(self) -> None:
        """Descriptors, and that this is up, until they were taken; signs of life while the worker gives them; a status."""
        if not self._is_service or self._predecessor is not None:  # the manager listens to its main process alone
            return
        now = time.monotonic()
        self._not_stored = [
            name for name in self._not_stored if not self._notifier.store(name, self._descriptors[name])
        ]
        self._told_ready = self._told_ready or (self._has_begun and self._notifier.tell("READY=1"))
        # What the worker counts, and not that this loop turns: a stuck worker is a stuck service.
        self._tell_alive(self._pulse.beat)
        if now >= self._tell_status_at:
            self._tell_status_at = now + STATUS_SECONDS
            status = self._status()
            if status != self._told_status and self._notifier.tell(f"STATUS={status}"):
                self._told_status = status

    def _tell_alive(self, beat: int) -> None:
        """Give the manager a sign of life if a child has given one; a start or a rebuild may take any time then."""
        now = time.monotonic()
        if beat == self._told_beat or now < self._tell_alive_at:
            return
        words = ["WATCHDOG=1"] if self._notifier.watchdog_seconds > 0 else []
        words += [] if self._told_ready else [f"EXTEND_TIMEOUT_USEC={START_EXTENSION_SECONDS * 1_000_000}"]
        if not words or self._notifier.tell(*words):
            self._told_beat = beat
            self._tell_alive_at = now + (self._notifier.watchdog_seconds or START_EXTENSION_SECONDS) / WATCHDOG_PARTS

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

    def _obey(self, client: Client, data: bytes) -> None:
        """Do what a client of the control socket has ordered, and answer it now or later."""
        try:
            order = json.loads(data)
            interpreter = str(order["interpreter"])
            if order["order"] != "restart":
                raise ValueError("the only order is restart")
            if "\0" in interpreter:
                raise ValueError("a path has no NUL")
        except Exception as error:  # whatever is sent: the keeper must not end because of it
            client.answer({"error": f"the order was not understood: {error}"})
            return
        if self._handing_over is not None:
            client.answer({"error": "a restart is under way"})
        elif not self._directory.survives:
            client.answer(
                {"error": "the pool is in memory without a name, which cannot be handed over: swapoff, umount, mount"}
            )
        elif self._memory.board.fields[Field.CAN_RESEND] == CANNOT_RESEND:
            client.answer(
                {
                    "error": "this kernel does not send requests again (FUSE_NOTIFY_RESEND, Linux 6.9): a hand-over would lose"
                    " the requests under way, and the programs that wait for them would wait for ever; nothing was changed."
                    " For the new version: swapoff, umount, mount"
                }
            )
        elif self._worker is None or not self._serving_since:
            client.answer({"error": "no worker serves at the moment: try again"})
        else:
            self._start_handing_over(client, interpreter)

    def _start_handing_over(self, client: Client, interpreter: str) -> None:
        arguments = [interpreter, "-I", "-m", "zbudfs.service.daemon"]
        arguments += ["--foreground"] if self._foreground else []
        arguments += ["--service"] if self._is_service else []
        message: dict[str, object] = {
            "settings": self._settings.to_json(),
            "folder": self._directory.path,
            "born_ns": self._born_ns,
        }
        try:
            successor = Successor.start(arguments, message, list(self._descriptors.values()))
        except OSError as error:
            client.answer({"error": f"{interpreter} cannot be started: {error.strerror}"})
            return
        self._handing_over = HandingOver(client, successor)

    def _advance_handing_over(self) -> bool:
        """Take a restart a step further. True if another keeper has everything now."""
        handing = self._handing_over
        if handing is None:
            return False
        fields = self._memory.board.fields
        step = handing.advance(
            well=self._worker is not None and bool(self._serving_since) and not self._worker.is_stopped,
            getting_ready=fields[Field.READY_BEAT],
            taking_over=fields[Field.TAKING_OVER],
            serving=bool(fields[Field.SERVING]),
            connected=is_connected(self._fuse_fd),
        )
        if step is Step.HAND_OVER:
            handing.end([child for child in (self._standby, self._worker) if child is not None])
            self._worker = self._standby = None
            fields[Field.SERVING] = fields[Field.TAKING_OVER] = 0
        elif step is Step.DONE:
            self._notifier.tell(f"MAINPID={handing.successor.pid}")
            if self._told_to_end:
                handing.successor.tell(signal.SIGTERM)
            handing.client.answer({"pid": handing.successor.pid, "version": handing.version})
            return True
        elif step is Step.FAILED:
            self._abandon_handing_over(handing.error)
        return False

    def _abandon_handing_over(self, why: str) -> None:
        handing, self._handing_over = self._handing_over, None
        assert handing is not None
        handing.successor.kill()
        self._dying.append(handing.successor)
        self._log.warning(f"the restart has failed: {why}")
        handing.client.answer({"error": why})
        if handing.stage is not Stage.STARTING:
            self._memory.board.fields[Field.SERVING] = 0
            self._take_over()

    def _look_after_predecessor(self) -> None:
        """Begin once the first worker serves; wait a little for the end of the keeper that has handed over."""
        if not self._serving_since:
            return
        if not self._has_begun:
            self._begin()
        if self._predecessor is not None:
            gone = is_readable(self._predecessor.fileno())
            if gone or time.monotonic() > self._serving_since + PREDECESSOR_SECONDS:
                self._predecessor.close()
                self._predecessor = None
                self._directory.roster.keep()


def keep_adopted(channel: socket.socket, log: Log, *, foreground: bool, notifier: Notifier | None = None) -> int:
    """Be the keeper that takes over from the one at the other end of `channel`: the exit status."""
    try:
        handed, descriptors = receive_with_descriptors(channel)
        settings = Settings.from_json(str(handed["settings"]))
        keeper = Keeper(settings, log, foreground=foreground, notifier=notifier)
        directory = PoolDirectory.adopt(str(handed["folder"]), descriptors[1])
        keeper.adopt(directory, descriptors, int(str(handed["born_ns"])), channel)
        keeper.start()
    except Exception as error:
        channel.sendall(json.dumps({"error": str(error) or repr(error)}).encode() + b"\n")
        return 1
    ready = {"ready": True, "version": __version__, "worker": keeper.first_worker_pid}
    try:
        channel.sendall(json.dumps(ready).encode() + b"\n")
    except OSError:
        return 1
    said = receive_line(channel)
    if not said:
        return 1  # the old keeper is gone or has thought better of it: its worker is still the one that serves
    if "ending" in said and not receive_line(channel):
        keeper.end_others()  # the old keeper has died after it had killed its worker
    keeper.order_first()
    return keeper.run()
