# SPDX-License-Identifier: MIT
"""A worker: the process that serves the mount, forked by the keeper (service/keeper.py).

Every worker starts as a standby. It gets ready while things are calm:

    threads, event loop     the store's threads start, the session is opened on the descriptor
    warm up                 once around every path, on a small store of its own
    lock memory             whatever exists now stays; "ready" is written on the board
    ... waits for the order, an eventfd ...

and then, when there may be no memory to be had:

    rebuild                 frames, lists, blocks and counters from the page table and the frames (store/recovery.py)
    replay FUSE_INIT        unless it is still to come
    resend                  the kernel sends again what the dead one had taken and not answered
    serve

A worker that is forked while swap is dead (there was no standby) does it the other way round: it takes over with as little
memory as it can, and warms up and locks afterwards.

The exit status is 0 when the mount is gone, FAILED when it could not come up; anything else is a death.
"""

import contextlib
import ctypes
import errno
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from zbudfs import __version__
from zbudfs.core.codec import Codec
from zbudfs.core.packing import Packing
from zbudfs.core.public import Discretion
from zbudfs.core.units import PAGE_SIZE
from zbudfs.fuse import shim
from zbudfs.fuse.nodes import Control, Stats, Value
from zbudfs.fuse.operations import Operations
from zbudfs.fuse.session import HEAP_BYTES, MAX_REQUEST_BYTES, open_session, resend, resume, serve
from zbudfs.service import hardening
from zbudfs.service.child import is_readable
from zbudfs.service.log import Lasting, Log
from zbudfs.service.mountpoint import MountError, is_connected, unmount_all
from zbudfs.service.public import PublicFile
from zbudfs.service.roster import Roster
from zbudfs.service.settings import Settings
from zbudfs.service.urgency import Urgency
from zbudfs.store.backing import Backing
from zbudfs.store.board import CANNOT_RESEND, Field
from zbudfs.store.iothread import IoThread
from zbudfs.store.memory import Follower, StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.pressure import PressureMonitor
from zbudfs.store.reclaimer import next_tick
from zbudfs.store.steering import Steering
from zbudfs.store.wakeup import use_eventfd

FAILED: Final = 3
"""Exit status of a worker that could not come up; why stands on the board."""

READY_BEAT_SECONDS: Final = 0.5
"""Between two signs of life of a process that gets ready, which takes a second or two."""
COLLECT_BEATS: Final = 10
"""Heartbeats between two looks for cyclic garbage: an error that is kept somewhere often is such. What was there before memory
was locked is frozen, so that it takes less than a millisecond, and it allocates nothing."""
IDLE_PUBLISH_BEATS: Final = 4
"""Heartbeats between two renewals of the public statistics while no request is served."""

FOLLOW_SECONDS: Final = 2.0
"""How often a standby maps what the worker has populated meanwhile, and looks at the level."""

CUT_OFF_SECONDS: Final = 0.2
"""How long after the unmount the kernel may take to end the connection by itself. Guessed: it is a matter of microseconds."""

KEEPER_SECONDS: Final = 0.7
"""How long a standby whose worker has ended waits for a keeper that lives and gives no order. Guessed."""

WAIT_SECONDS: Final = 0.01
"""How often a worker tries to become the one that serves, while another process still is. Guessed."""
WAIT_TOLD_SECONDS: Final = 1.0
"""A longer wait is logged."""

SETTLE_SECONDS: Final = 1.0
"""After a takeover in an emergency, before the worker locks its memory: what waited for swap goes first. Guessed."""

SCRATCH_BYTES: Final = 4 << 20
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True)
class Mounted:
    """What the keeper has made and every worker works with."""

    settings: Settings
    memory: StoreMemory
    backing: Backing | None
    fuse_fd: int
    keeper_pid: int
    keeper_pidfd: int
    born_ns: int
    """Times of all files."""
    warnings: list[str]
    """What the system refused, and what follows."""
    log: Log
    pool_directory: str
    lock_fd: int
    """Of the pool directory's lock."""
    roster: Roster
    public: PublicFile | None
    """What other users may read; None where it cannot be had."""

    def write_owners(self, fields: memoryview) -> None:
        """Say on the board which keeper this is, and the numbers of the descriptors in it and in its children."""
        fields[Field.KEEPER_PID] = self.keeper_pid
        fields[Field.FUSE_FD] = self.fuse_fd
        fields[Field.LOCK_FD] = self.lock_fd
        fields[Field.BACKING_FD] = self.backing.fileno() if self.backing is not None else 0


def work(mounted: Mounted, order_fd: int, ready_fd: int, *, emergency: bool, served_by: int | None = None) -> int:
    """Be a worker, in a process of its own; the exit status. `order_fd` and `ready_fd` are eventfds.

    It waits for the order on the one, and says on the other that it is ready. In an emergency swap is dead until this worker
    serves. `served_by` is the pidfd of the worker that serves meanwhile.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a standby ends with its mount
    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-Z is for the keeper in the foreground: swap goes on
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the keeper that is coming up has some blocked
    _die_with_keeper(signal.SIGKILL)
    if os.getppid() != mounted.keeper_pid:
        return FAILED  # it died before that was set
    try:
        mounted.roster.join()
        trio.run(Worker(mounted, order_fd, ready_fd, served_by, emergency=emergency).run)
    except BaseException as error:
        first = _first(error)
        if os.getppid() != mounted.keeper_pid:  # else the keeper tells it
            mounted.log.error(f"a worker failed: {first!r}")
        mounted.memory.board.save_error(str(first) or repr(first))
        return FAILED
    return 0


def _die_with_keeper(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), *[ctypes.c_ulong(0)] * 3)


def _first(error: BaseException) -> BaseException:
    """The first error in a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Worker:
    """One worker's life."""

    def __init__(
        self, mounted: Mounted, order_fd: int, ready_fd: int, served_by: int | None, *, emergency: bool
    ) -> None:
        self._emergency = emergency
        self._served_by = served_by
        self._mounted = mounted
        self._order_fd = order_fd
        self._ready_fd = ready_fd
        self._board = mounted.memory.board
        self._log = mounted.log
        self._by_itself = False
        """Whether this standby has ordered itself."""
        self._active = False
        """Whether this process serves, or is about to: it has the lock of the roster."""
        self._has_settled = False
        self._discretion = Discretion(_random_below)
        self._published = (-1, 0)
        """Requests served, and heartbeats, when the public statistics were renewed last."""
        self._follower = Follower(mounted.memory)
        self._trouble = Lasting(mounted.log.warning, mounted.log.info)

    async def run(self) -> None:
        """Get ready, wait for the order, take over, serve until the mount is gone."""
        use_eventfd()
        mounted = self._mounted
        settings = mounted.settings
        fields = self._board.fields
        helper = IoThread[None]("helper")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat_until_ready)
            if not self._emergency:
                await _warm_up(settings.level, mounted.memory.packing)
            store = PageStore(
                settings.size_bytes, mounted.memory.nr_frames, mounted.backing, Codec(settings.level), mounted.memory
            )
            store.reclaimer.log = self._log.warning
            shim.use_metrics(self._board.latencies.words)
            steering = Steering(store)
            steering.adopt_level()
            stats = Stats(store, lambda: self._facts(store), self._board.lines)
            control = Control(steering, self._log.info)
            operations = Operations(store, stats, control, nursery, mounted.born_ns)
            open_session(operations, mounted.fuse_fd, mounted.memory.parking.view)
            with (
                self._monitor(store),
                _urgency() as urgency,
                trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
            ):
                if self._emergency:
                    nursery.start_soon(self._settle_later, helper, store)
                else:
                    await helper.run(self._settle)
                    _read_with_aio(store)
                if self._served_by is not None:
                    _die_with_keeper(0)  # who has said that it is ready is there also when the keeper is not
                os.eventfd_write(self._ready_fd, 1)
                nursery.start_soon(self._end_on_signals, signals, helper, nursery.cancel_scope)
                nursery.start_soon(store.tracer.run, helper)
                async with trio.open_nursery() as waiting:
                    if not self._emergency:
                        waiting.start_soon(self._follow, helper, steering)
                    waiting.start_soon(self._outlive_keeper)
                    await trio.lowlevel.wait_readable(self._order_fd)
                    fields[Field.TAKING_OVER] = os.getpid()
                    waiting.cancel_scope.cancel()
                nursery.start_soon(self._heartbeat, store, steering, stats)
                is_new = not self._board.init()
                await self._take_over(store, steering, stats, nursery)
                if is_new:
                    nursery.start_soon(helper.run, _ask_for_attribute, settings.mountpoint)
                urgency.begin()
                await serve()
                fields[Field.SERVING] = 0
                self._log.info(f"unmounted from {settings.mountpoint}")
                nursery.cancel_scope.cancel()

    async def _take_over(self, store: PageStore, steering: Steering, stats: Stats, nursery: trio.Nursery) -> None:
        fields, mounted = self._board.fields, self._mounted
        _die_with_keeper(0)  # from here on it may be the only one left
        await self._become_server()
        began = time.monotonic_ns()
        self._active = True
        mounted.write_owners(fields)
        fields[Field.WORKER_PID] = os.getpid()
        fields[Field.SERVING] = 0
        if fields[Field.STANDBY_PID] == os.getpid():
            fields[Field.STANDBY_PID] = fields[Field.STANDBY_READY] = 0
        fields[Field.RECOVERIES] += self._by_itself
        found = store.recover()
        steering.adopt()
        first_request = self._board.init()
        if first_request:
            nursery.start_soon(store.run)
            resume(first_request)
        else:
            await nursery.start(store.run)  # the first of all: the reserves come before the first request
            self._publish(stats)
        fields[Field.CAN_RESEND] = 1 if resend(mounted.fuse_fd) else CANNOT_RESEND
        fields[Field.LAST_RECOVERY_US] = (time.monotonic_ns() - began) // 1000
        fields[Field.LOST_IN_RECOVERY] += found.lost_pages
        fields[Field.SERVING] = 1
        if first_request:
            self._log.info(
                f"worker {os.getpid()} has taken over {found.stored_pages} pages in {found.frames} frames and"
                f" {found.blocks} blocks within {fields[Field.LAST_RECOVERY_US] // 1000} ms"
            )
        if found.lost_pages:
            self._log.error(f"{found.lost_pages} pages were lost: their frames did not confirm the page table")

    async def _become_server(self) -> None:
        """Wait until no other process serves.

        A killed worker serves until its last disk write has ended: the write would land in a block with a new owner.
        Nothing that outlives a worker is read or changed before.
        """
        began = time.monotonic()
        told = False
        while not self._mounted.roster.serve():
            if not told and time.monotonic() - began > WAIT_TOLD_SECONDS:
                told = True
                self._log.warning(
                    f"worker {os.getpid()} waits for the end of worker {self._mounted.roster.server()}, which waits in the"
                    " kernel, for a disk as a rule: see that the disk of the backing file answers"
                )
            await trio.sleep(WAIT_SECONDS)

    def _settle(self) -> None:
        """Have all memory present and locked that this worker will ever need. It may take a while."""
        mounted = self._mounted
        self._follower.follow()
        if mounted.public is not None:
            mounted.public.map_populated()
        if mounted.backing is not None:
            mounted.backing.warm_up()
        hardening.grow_heap(HEAP_BYTES)
        for refused in hardening.lock_memory([(arena.address, arena.size) for arena in mounted.memory.arenas]):
            if refused not in mounted.warnings:
                mounted.warnings.append(refused)
        self._has_settled = True

    async def _settle_later(self, helper: IoThread[None], store: PageStore) -> None:
        await trio.sleep(SETTLE_SECONDS)
        await helper.run(self._settle)
        _read_with_aio(store)

    async def _beat_until_ready(self) -> None:
        """Give signs of life of a process that gets ready."""
        fields = self._board.fields
        while not is_readable(self._ready_fd):
            fields[Field.READY_BEAT] += 1
            if fields[Field.STANDBY_PID] == os.getpid():
                fields[Field.STANDBY_BEAT] += 1
            await trio.sleep(READY_BEAT_SECONDS)

    def _publish(self, stats: Stats) -> None:
        """Renew what other users may read, some 0.4 ms, but seldom while no request is served.

        Not before its pages are mapped here.
        """
        if self._mounted.public is None or not self._has_settled:
            return
        served, beats = self._board.latencies.served_requests, self._board.fields[Field.HEARTBEAT]
        published_served, published_at = self._published
        if served != published_served or not 0 <= beats - published_at < IDLE_PUBLISH_BEATS:
            self._published = served, beats
            self._mounted.public.renew(self._discretion.public(stats.snapshot()))

    async def _heartbeat(self, store: PageStore, steering: Steering, stats: Stats) -> None:
        """Give signs of life of a worker that waits for its turn; once it serves, keep what its successor cannot rebuild."""
        while True:
            self._board.beat()
            if self._board.fields[Field.HEARTBEAT] % COLLECT_BEATS == 0:
                gc.collect()
            if self._active:
                store.save_counters()
                steering.save()
                if self._board.fields[Field.SERVING]:
                    self._publish(stats)
            await trio.sleep_until(next_tick())

    async def _outlive_keeper(self) -> None:
        """Without a keeper there is nobody to order a standby: it waits for the worker's end and orders itself.

        It does so as well if the keeper lives and does nothing, because it is stopped. A process that is not the standby of
        a worker that serves, or whose mount is gone, ends instead.
        """
        mounted = self._mounted
        if self._served_by is None:
            await trio.lowlevel.wait_readable(mounted.keeper_pidfd)
            os._exit(FAILED)
        await trio.lowlevel.wait_readable(self._served_by)
        if self._board.fields[Field.ENDED]:
            os._exit(0)
        with trio.move_on_after(KEEPER_SECONDS):
            await trio.lowlevel.wait_readable(mounted.keeper_pidfd)
        if not is_connected(mounted.fuse_fd):
            os._exit(0)
        self._by_itself = True
        os.eventfd_write(self._order_fd, 1)

    async def _follow(self, helper: IoThread[None], steering: Steering) -> None:
        """As a standby: keep up with what the worker changes and a takeover would need memory for.

        The order to take over waits for none of it.
        """
        fields = self._board.fields
        under_way = False

        def follow() -> None:
            nonlocal under_way
            self._follower.follow()
            under_way = False

        while True:
            await trio.sleep(FOLLOW_SECONDS)
            if fields[Field.STANDBY_PID] == os.getpid():
                fields[Field.STANDBY_BEAT] += 1
            if not under_way and self._follower.is_behind:
                under_way = True
                helper.put(follow)
            steering.adopt_level()

    @contextlib.contextmanager
    def _monitor(self, store: PageStore) -> Iterator[None]:
        def report() -> None:
            if self._active:
                store.reclaimer.pressure()

        try:
            monitor = PressureMonitor(report)
        except OSError as error:
            self._log.info(f"memory pressure is not watched: {error.strerror} (PSI)")
            yield
            return
        try:
            yield
        finally:
            monitor.close()

    async def _end_on_signals(
        self, signals: AsyncIterator[int], helper: IoThread[None], everything: trio.CancelScope
    ) -> None:
        """End when told to, unless the swapfile is open: unmount, and cut off whoever stays on the mount."""
        mounted = self._mounted
        fields = self._board.fields
        async for number in signals:
            if not self._active:
                continue
            name = signal.Signals(number).name
            users = fields[Field.OPEN_SWAPFILES]
            if users:
                self._log.warning(
                    f"{name}: not ending, the swapfile is open ({users} times): zbudfs swapoff comes first"
                )
                continue
            try:
                await helper.run(_unmount, fields[Field.MOUNT_DEVICE])
            except MountError as error:
                self._trouble.begin(f"{name}: not ending: {error}")
                continue
            with trio.move_on_after(CUT_OFF_SECONDS):
                await trio.sleep_forever()  # without other users the session sees that the mount is gone, and ends
            if is_connected(mounted.fuse_fd) and not fields[Field.OPEN_SWAPFILES]:
                # A process stands in it, or another mount namespace has it: nothing there is worth waiting for.
                self._log.info(f"unmounted from {mounted.settings.mountpoint}: what still uses the mount is cut off")
                fields[Field.ENDED] = 1
                fields[Field.SERVING] = 0
                everything.cancel()

    def _facts(self, store: PageStore) -> dict[str, Value]:
        mounted = self._mounted
        settings = mounted.settings
        fields = self._board.fields
        keeper_lives = os.getppid() == mounted.keeper_pid
        return {
            "requests_in_work": shim.in_work(),
            **self._board.latencies.numbers(),
            "mountpoint": settings.mountpoint,
            "mounted_at": mounted.born_ns // 1_000_000_000,
            "pid": mounted.keeper_pid if keeper_lives else os.getpid(),
            "keeper_pid": fields[Field.KEEPER_PID],
            "worker_pid": fields[Field.WORKER_PID],
            "standby_pid": fields[Field.STANDBY_PID],
            "standby_ready": bool(fields[Field.STANDBY_READY]),
            "recoveries": fields[Field.RECOVERIES],
            "last_recovery_us": fields[Field.LAST_RECOVERY_US],
            "lost_in_recovery": fields[Field.LOST_IN_RECOVERY],
            "pool_directory": mounted.pool_directory,
            "survives_crash": self._survives(),
            "version": __version__,
            "packing": settings.packing,
            "page_in_path": store.aio.path,
            "backing_path": settings.backing,
            "encrypted": settings.encrypt and settings.backing is not None,
            "backing_size_bytes": mounted.backing.size_bytes(settings.size_bytes) if mounted.backing is not None else 0,
            "open_swapfiles": fields[Field.OPEN_SWAPFILES],
            "log_dropped": mounted.log.dropped,
            "warnings": [
                *mounted.warnings,
                *self._present_warnings(keeper_lives=keeper_lives),
                *store.reclaimer.warnings(),
            ],
        }

    def _survives(self) -> bool:
        return self._board.fields[Field.CAN_RESEND] == 1

    def _present_warnings(self, *, keeper_lives: bool) -> list[str]:
        found = []
        if not self._survives():
            found.append(
                "a crash of the daemon would lose what is swapped out: the kernel does not send requests again"
                " (FUSE_NOTIFY_RESEND, Linux 6.9 or later)"
            )
        since = self._board.fields[Field.NO_STANDBY_SINCE]
        fault = self._board.fields[Field.NO_STANDBY_FAULT]
        if keeper_lives and since and fault:
            why = "the last one died or hung" if fault == errno.ECHILD else f"no process: {os.strerror(fault)}"
            found.append(
                f"there has been no standby since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(since))} UTC ({why}): if"
                " the worker dies now, swap stands still for longer; the log says more"
            )
        if not keeper_lives:
            found.append(
                "the keeper is gone: the standby would take over once, and nobody after it; start the service again, or"
                " swapoff and mount anew"
            )
        return found


def _ask_for_attribute(mountpoint: str) -> None:
    """Have the kernel learn that there are no extended attributes.

    The kernel passes on getxattr of "security.*" by any user, also to a mount of root alone, until the daemon has refused
    one with ENOSYS.
    """
    with contextlib.suppress(OSError):
        os.getxattr(mountpoint, "security.zbudfs")


def _random_below(limit: int) -> int:
    return int.from_bytes(os.urandom(8), "little") % limit


def _unmount(st_dev: int) -> None:
    """Unmount the file system, also while somebody stands in it. MountError."""
    try:
        unmount_all(st_dev)
    except MountError as error:
        if error.code != errno.EBUSY:
            raise
        unmount_all(st_dev, lazy=True)


def _read_with_aio(store: PageStore) -> None:
    """Have the kernel read blocks beside this thread, and the loop that waits for requests finish the reads."""
    if store.aio.open():
        shim.set_completions(*store.aio.completions(), store.aio.reap)
        store.aio.opened()


@contextlib.contextmanager
def _urgency() -> Iterator[Urgency]:
    """Have this thread watched, which will serve."""
    urgency = Urgency(threading.get_native_id())
    try:
        yield urgency
    finally:
        urgency.close()


async def _warm_up(level: int, packing: Packing) -> None:
    """Use each path once, on a small store: a page that compresses, one that does not, a word; a large request, a part."""
    nr_frames = SCRATCH_BYTES // PAGE_SIZE
    memory = StoreMemory(SCRATCH_BYTES, nr_frames, backed=False, packing=packing)
    memory.populate()
    store = PageStore(SCRATCH_BYTES, nr_frames, None, Codec(level), memory)
    store.recover()
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        compressible = bytes(range(256)) * (PAGE_SIZE // 256)
        samples = [os.urandom(PAGE_SIZE), compressible * (MAX_REQUEST_BYTES // PAGE_SIZE), bytes(PAGE_SIZE), b"zbudfs"]
        for sample in samples:
            await store.write(0, sample)
            if await store.read(0, len(sample)) != sample:
                raise MemoryError("the store does not give back what it was given: this memory cannot be trusted")
        store.recover()
        await store.discard(0, SCRATCH_BYTES)
        nursery.cancel_scope.cancel()
    store.close()
