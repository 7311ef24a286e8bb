# SPDX-License-Identifier: MIT
"""The worker: the process that serves the mount, forked by the keeper (service/keeper.py).

Every worker starts as a standby. It prepares while there is memory:

    threads, event loop     the store's threads start, the session is opened on the descriptor
    warm up                 each code path runs once, on a small store of its own
    lock memory             all present memory stays; "ready" is written in the status area
    ... waits for the order, an eventfd ...

It then continues at a time when there may be no free memory:

    rebuild                 frames, lists, blocks and counters from the page table and the frames (store/recovery.py)
    replay FUSE_INIT        unless it has not come yet
    resend                  the kernel sends again the requests that the dead worker had taken and not answered
    serve

A worker that is forked while swap does not work (there was no standby) uses the opposite order. It takes over with as little
memory as possible, and warms up and locks memory afterwards.

The exit status is 0 when the mount is gone, FAILED if the worker could not start. Any other status is a death.
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
from zbudfs.service.log import Lasting
from zbudfs.service.mountpoint import MountError, is_connected, unmount_all
from zbudfs.service.priority_boost import PriorityBoost
from zbudfs.service.resources import Resources
from zbudfs.store.iothread import IoThread
from zbudfs.store.memory import Follower, StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.pressure import PressureMonitor
from zbudfs.store.signals import next_tick
from zbudfs.store.status_area import CANNOT_RESEND, Field
from zbudfs.store.tuner import Tuner
from zbudfs.store.wakeup import use_eventfd

FAILED: Final = 3
"""Exit status of a worker that could not start; the reason is in the status area."""

READY_BEAT_SECONDS: Final = 0.5
"""Time between two heartbeats of a process that prepares to serve, which takes a second or two."""
COLLECT_BEATS: Final = 10
"""Heartbeats between two runs of the cyclic garbage collector: an error that is kept is often a cycle. Objects from before
the lock of memory are frozen, so that a run takes less than a millisecond. It allocates nothing."""
IDLE_PUBLISH_BEATS: Final = 4
"""Heartbeats between two renewals of the public statistics while no request is served."""

FOLLOW_SECONDS: Final = 2.0
"""Period in which a standby maps the memory that the worker has populated, and checks the level."""

CUT_OFF_SECONDS: Final = 0.2
"""Longest time after the unmount in which the kernel should end the connection. Guessed: it takes microseconds."""

KEEPER_SECONDS: Final = 0.7
"""Time for which a standby whose worker has ended waits for a keeper that lives and gives no order. Guessed."""

WAIT_SECONDS: Final = 0.01
"""Period in which a worker tries to become the server while another process still is. Guessed."""
WAIT_TOLD_SECONDS: Final = 1.0
"""Length of a wait after which it is logged."""

SETTLE_SECONDS: Final = 1.0
"""Time after an emergency takeover before the worker locks its memory: requests that wait for swap go first. Guessed."""

SCRATCH_BYTES: Final = 4 << 20
_PR_SET_PDEATHSIG: Final = 1


def work(resources: Resources, order_fd: int, ready_fd: int, *, emergency: bool, served_by: int | None = None) -> int:
    """Run as a worker, in a process of its own, and return the exit status. `order_fd` and `ready_fd` are eventfds.

    The worker waits for the order on the first, and reports on the second that it is ready. In an emergency swap does not work
    until this worker serves. `served_by` is the pidfd of the worker that serves meanwhile.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a standby ends with its mount
    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-Z stops only the keeper in the foreground: swap must continue
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a keeper that starts has some signals blocked
    _die_with_keeper(signal.SIGKILL)
    if os.getppid() != resources.keeper_pid:
        return FAILED  # the keeper died before the death signal was set
    try:
        resources.directory.roster.join()
        trio.run(Worker(resources, order_fd, ready_fd, served_by, emergency=emergency).run)
    except BaseException as error:
        first = _first(error)
        if os.getppid() != resources.keeper_pid:  # otherwise the keeper reports the error
            resources.log.error(f"a worker failed: {first!r}")
        resources.memory.status_area.save_error(str(first) or repr(first))
        return FAILED
    return 0


def _die_with_keeper(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), *[ctypes.c_ulong(0)] * 3)


def _first(error: BaseException) -> BaseException:
    """Return the first error in a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Worker:
    """A worker from its start to its end."""

    def __init__(
        self, resources: Resources, order_fd: int, ready_fd: int, served_by: int | None, *, emergency: bool
    ) -> None:
        self._emergency = emergency
        self._served_by = served_by
        self._resources = resources
        self._order_fd = order_fd
        self._ready_fd = ready_fd
        self._status_area = resources.memory.status_area
        self._log = resources.log
        self._by_itself = False
        """Whether this standby has given itself the order."""
        self._active = False
        """Whether this process serves, or is about to: it has the server's lock of the roster."""
        self._has_settled = False
        self._discretion = Discretion(_random_below)
        self._published = (-1, 0)
        """Requests served, and heartbeats, at the last renewal of the public statistics."""
        self._follower = Follower(resources.memory)
        self._trouble = Lasting(resources.log.warning, resources.log.info)

    async def run(self) -> None:
        """Prepare, wait for the order, take over, and serve until the mount is gone."""
        use_eventfd()
        resources = self._resources
        settings = resources.settings
        fields = self._status_area.fields
        helper = IoThread[None]("helper")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat_until_ready)
            if not self._emergency:
                await _warm_up(settings.level, resources.memory.packing)
            store = PageStore(
                settings.size_bytes,
                resources.memory.nr_frames,
                resources.backing,
                Codec(settings.level),
                resources.memory,
                log=self._log.warning,
                between=shim.serve_reads,
            )
            shim.use_metrics(self._status_area.latencies.words)
            tuner = Tuner(store)
            tuner.resume_level()
            stats = Stats(store, lambda: self._facts(store), self._status_area.lines)
            control = Control(tuner, self._log.info)
            operations = Operations(store, stats, control, nursery, resources.born_ns)
            open_session(operations, resources.fuse_fd, resources.memory.request_slots.view)
            with (
                self._monitor(store),
                _priority_boost() as boost,
                trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
            ):
                if self._emergency:
                    nursery.start_soon(self._settle_later, helper, store)
                else:
                    await helper.run(self._settle)
                    _read_with_aio(store)
                if self._served_by is not None:
                    _die_with_keeper(0)  # a ready standby must outlive the keeper
                os.eventfd_write(self._ready_fd, 1)
                nursery.start_soon(self._end_on_signals, signals, helper, nursery.cancel_scope)
                nursery.start_soon(store.tracer.run, helper)
                async with trio.open_nursery() as waiting:
                    if not self._emergency:
                        waiting.start_soon(self._follow, helper, tuner)
                    waiting.start_soon(self._outlive_keeper)
                    await trio.lowlevel.wait_readable(self._order_fd)
                    fields[Field.TAKING_OVER] = os.getpid()
                    waiting.cancel_scope.cancel()
                nursery.start_soon(self._heartbeat, store, tuner, stats)
                is_new = not self._status_area.init()
                await self._take_over(store, tuner, stats, nursery)
                if is_new:
                    nursery.start_soon(helper.run, _ask_for_attribute, settings.mountpoint)
                boost.begin()
                await serve()
                fields[Field.SERVING] = 0
                self._log.info(f"unmounted from {settings.mountpoint}")
                nursery.cancel_scope.cancel()

    async def _take_over(self, store: PageStore, tuner: Tuner, stats: Stats, nursery: trio.Nursery) -> None:
        fields, resources = self._status_area.fields, self._resources
        _die_with_keeper(0)  # from now on this may be the only process left
        await self._become_server()
        began = time.monotonic_ns()
        self._active = True
        resources.write_owners()
        fields[Field.WORKER_PID] = os.getpid()
        fields[Field.SERVING] = 0
        if fields[Field.STANDBY_PID] == os.getpid():
            fields[Field.STANDBY_PID] = fields[Field.STANDBY_READY] = 0
        fields[Field.RECOVERIES] += self._by_itself
        fields[Field.OLDEST_READ_SECONDS] = 0
        found = store.recover()
        tuner.resume()
        first_request = self._status_area.init()
        if first_request:
            nursery.start_soon(store.run)
            resume(first_request)
        else:
            await nursery.start(store.run)  # for the first worker, the reserves come before the first request
            self._publish(stats)
        fields[Field.CAN_RESEND] = 1 if resend(resources.fuse_fd) else CANNOT_RESEND
        fields[Field.LAST_RECOVERY_US] = (time.monotonic_ns() - began) // 1000
        fields[Field.LOST_IN_RECOVERY] += found.lost_pages
        fields[Field.SERVING] = 1
        if first_request:
            self._log.info(
                f"worker {os.getpid()} has taken over {found.stored_pages} pages in {found.frames} frames and"
                f" {found.blocks} blocks within {fields[Field.LAST_RECOVERY_US] // 1000} ms"
            )
        if found.lost_pages:
            self._log.error(f"{found.lost_pages} pages were lost: their frames did not match the page table")

    async def _become_server(self) -> None:
        """Wait until no other process serves.

        A killed worker serves until its last disk write has ended: the write would reach a block that has a new owner. Before
        that, this process neither reads nor changes anything that outlives a worker.
        """
        began = time.monotonic()
        told = False
        roster = self._resources.directory.roster
        while not roster.serve():
            if not told and time.monotonic() - began > WAIT_TOLD_SECONDS:
                told = True
                self._log.warning(
                    f"worker {os.getpid()} waits for worker {roster.server()} to end, which waits in the kernel,"
                    " usually for a disk: check whether the disk of the backing file answers"
                )
            await trio.sleep(WAIT_SECONDS)

    def _settle(self) -> None:
        """Populate and lock all memory that this worker will ever need. It may take a while."""
        resources = self._resources
        self._follower.follow()
        if resources.public is not None:
            resources.public.map_populated()
        if resources.backing is not None:
            resources.backing.warm_up()
        hardening.pin_heap(HEAP_BYTES)
        for refused in hardening.lock_memory([(arena.address, arena.size) for arena in resources.memory.arenas]):
            if refused not in resources.warnings:
                resources.warnings.append(refused)
        self._has_settled = True

    async def _settle_later(self, helper: IoThread[None], store: PageStore) -> None:
        await trio.sleep(SETTLE_SECONDS)
        await helper.run(self._settle)
        _read_with_aio(store)

    async def _beat_until_ready(self) -> None:
        """Advance the heartbeat of a process that prepares to serve."""
        fields = self._status_area.fields
        while not is_readable(self._ready_fd):
            fields[Field.READY_BEAT] += 1
            if fields[Field.STANDBY_PID] == os.getpid():
                fields[Field.STANDBY_BEAT] += 1
            await trio.sleep(READY_BEAT_SECONDS)

    def _publish(self, stats: Stats) -> None:
        """Renew the public statistics, which takes some 0.4 ms; only seldom while no request is served.

        Do nothing until the pages of the file are mapped in this process.
        """
        if self._resources.public is None or not self._has_settled:
            return
        served, beats = self._status_area.latencies.served_requests, self._status_area.fields[Field.HEARTBEAT]
        published_served, published_at = self._published
        if served != published_served or not 0 <= beats - published_at < IDLE_PUBLISH_BEATS:
            self._published = served, beats
            self._resources.public.renew(self._discretion.public(stats.snapshot()))

    async def _heartbeat(self, store: PageStore, tuner: Tuner, stats: Stats) -> None:
        """Advance the heartbeat of a worker that waits or serves. While it serves, save state that no successor can rebuild."""
        while True:
            self._status_area.beat()
            if self._status_area.fields[Field.HEARTBEAT] % COLLECT_BEATS == 0:
                gc.collect()
            if self._active:
                self._status_area.fields[Field.OLDEST_READ_SECONDS] = store.aio.oldest_seconds()
                store.report_use()
                tuner.save()
                if self._status_area.fields[Field.SERVING]:
                    self._publish(stats)
            await trio.sleep_until(next_tick())

    async def _outlive_keeper(self) -> None:
        """Replace a keeper that cannot order a standby: wait for the worker's end, and give this process the order.

        That also happens if the keeper lives and does nothing, because it is stopped. A process that is not the standby of a
        worker that serves, or whose mount is gone, ends instead.
        """
        resources = self._resources
        if self._served_by is None:
            await trio.lowlevel.wait_readable(resources.keeper_pidfd)
            os._exit(FAILED)
        await trio.lowlevel.wait_readable(self._served_by)
        if self._status_area.fields[Field.ENDED]:
            os._exit(0)
        with trio.move_on_after(KEEPER_SECONDS):
            await trio.lowlevel.wait_readable(resources.keeper_pidfd)
        if not is_connected(resources.fuse_fd):
            os._exit(0)
        self._by_itself = True
        os.eventfd_write(self._order_fd, 1)

    async def _follow(self, helper: IoThread[None], tuner: Tuner) -> None:
        """Follow the worker's changes, as a standby, as far as a takeover would need memory for them.

        The order to take over does not wait for this.
        """
        fields = self._status_area.fields
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
            tuner.resume_level()

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
        """End on a signal, unless the swapfile is open: unmount, and end the connection for programs that stay on the mount."""
        resources = self._resources
        fields = self._status_area.fields
        async for number in signals:
            if not self._active:
                continue
            name = signal.Signals(number).name
            users = fields[Field.OPEN_SWAPFILES]
            if users:
                self._log.warning(f"{name}: not ending, the swapfile is open ({users} times): run zbudfs swapoff first")
                continue
            try:
                await helper.run(_unmount, fields[Field.MOUNT_DEVICE])
            except MountError as error:
                self._trouble.begin(f"{name}: not ending: {error}")
                continue
            with trio.move_on_after(CUT_OFF_SECONDS):
                await trio.sleep_forever()  # without other users the session ends, since the mount is gone
            if is_connected(resources.fuse_fd) and not fields[Field.OPEN_SWAPFILES]:
                # A process has its working directory there, or another mount namespace has it. Neither needs the mount.
                self._log.info(
                    f"unmounted from {resources.settings.mountpoint}: programs that still use it are cut off"
                )
                fields[Field.ENDED] = 1
                fields[Field.SERVING] = 0
                everything.cancel()

    def _facts(self, store: PageStore) -> dict[str, Value]:
        resources = self._resources
        settings, backing = resources.settings, resources.backing
        fields = self._status_area.fields
        keeper_lives = os.getppid() == resources.keeper_pid
        return {
            "requests_in_work": shim.in_work(),
            **self._status_area.latencies.numbers(),
            "mountpoint": settings.mountpoint,
            "mounted_at": resources.born_ns // 1_000_000_000,
            "pid": resources.keeper_pid if keeper_lives else os.getpid(),
            "keeper_pid": fields[Field.KEEPER_PID],
            "worker_pid": fields[Field.WORKER_PID],
            "standby_pid": fields[Field.STANDBY_PID],
            "standby_ready": bool(fields[Field.STANDBY_READY]),
            "recoveries": fields[Field.RECOVERIES],
            "last_recovery_us": fields[Field.LAST_RECOVERY_US],
            "lost_in_recovery": fields[Field.LOST_IN_RECOVERY],
            "pool_directory": resources.directory.path,
            "survives_crash": self._survives(),
            "version": __version__,
            "packing": settings.packing,
            "page_in_path": store.aio.queue.path,
            "backing_path": settings.backing,
            "encrypted": settings.encrypt and settings.backing is not None,
            "backing_size_bytes": backing.size_bytes(settings.size_bytes) if backing is not None else 0,
            "open_swapfiles": fields[Field.OPEN_SWAPFILES],
            "log_dropped": resources.log.dropped,
            "warnings": [
                *store.reclaimer.warnings(),
                *self._present_warnings(keeper_lives=keeper_lives),
                *resources.warnings,
            ],
        }

    def _survives(self) -> bool:
        return self._status_area.fields[Field.CAN_RESEND] == 1

    def _present_warnings(self, *, keeper_lives: bool) -> list[str]:
        found = []
        if not self._survives():
            found.append(
                "a crash of the daemon would lose all swapped-out pages: the kernel does not send requests again"
                " (FUSE_NOTIFY_RESEND); use Linux 6.9 or later"
            )
        since = self._status_area.fields[Field.NO_STANDBY_SINCE]
        fault = self._status_area.fields[Field.NO_STANDBY_FAULT]
        if keeper_lives and since and fault:
            why = "the last one died or hung" if fault == errno.ECHILD else f"fork failed: {os.strerror(fault)}"
            found.append(
                f"there has been no standby since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(since))} UTC ({why}): if"
                " the worker dies now, swap is unavailable for longer; see the log"
            )
        if not keeper_lives:
            found.append(
                "the keeper is gone: the standby can take over once, and no process after it; start the service again, or"
                " swapoff and mount again"
            )
        return found


def _ask_for_attribute(mountpoint: str) -> None:
    """Make the kernel learn that there are no extended attributes.

    The kernel passes on getxattr of "security.*" by any user, even on a mount for root alone, until the daemon has refused
    one with ENOSYS.
    """
    with contextlib.suppress(OSError):
        os.getxattr(mountpoint, "security.zbudfs")


def _random_below(limit: int) -> int:
    return int.from_bytes(os.urandom(8), "little") % limit


def _unmount(st_dev: int) -> None:
    """Unmount the file system, even while a process uses it. MountError."""
    try:
        unmount_all(st_dev)
    except MountError as error:
        if error.code != errno.EBUSY:
            raise
        unmount_all(st_dev, lazy=True)


def _read_with_aio(store: PageStore) -> None:
    """Make the kernel read blocks beside this thread, and the request loop finish the reads."""
    if store.aio.queue.open():
        shim.set_completions(*store.aio.queue.completions(), store.aio.reap)
        store.aio.queue.opened()


@contextlib.contextmanager
def _priority_boost() -> Iterator[PriorityBoost]:
    """Watch this thread, which will serve."""
    boost = PriorityBoost(threading.get_native_id())
    try:
        yield boost
    finally:
        boost.close()


async def _warm_up(level: int, packing: Packing) -> None:
    """Use each path once, on a small store: pages that compress, that do not, and that are a word; large and small requests."""
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
            await store.requests.write(0, sample)
            if await store.requests.read(0, len(sample)) != sample:
                raise MemoryError("the store does not return the pages that it stored: this memory is faulty")
        store.recover()
        await store.requests.discard(0, SCRATCH_BYTES)
        nursery.cancel_scope.cancel()
    store.close()
