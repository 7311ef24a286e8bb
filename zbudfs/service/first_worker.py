# SPDX-License-Identifier: MIT
"""The first worker of a keeper: it gets ready before any other process of the mount is touched."""

import signal
import time
from typing import Final, NoReturn

from zbudfs import __version__
from zbudfs.fuse import shim
from zbudfs.service import hardening
from zbudfs.service.child import HANG_SECONDS, START_LIMIT_SECONDS, Pulse
from zbudfs.service.ending import ENDING
from zbudfs.service.forks import Forks
from zbudfs.service.log import Lasting
from zbudfs.service.manager import ServiceManager
from zbudfs.service.resources import Resources, StartError
from zbudfs.service.roster import is_ending
from zbudfs.service.stall import STALL_SECONDS, Stall
from zbudfs.service.worker_monitor import WorkerMonitor
from zbudfs.store.status_area import Field

POLL_SECONDS: Final = 0.005
DISK_POLL_SECONDS: Final = 0.02
END_SECONDS: Final = 5.0
"""Longest wait for the end of a killed process. Arbitrary: nothing depends on it."""


class FirstWorker:
    """Starts the first worker of one keeper. `worker` looks after it from `order` on."""

    def __init__(self, resources: Resources, manager: ServiceManager, forks: Forks, worker: WorkerMonitor) -> None:
        self._resources = resources
        self._manager = manager
        self._forks = forks
        self._worker = worker
        self.has_served = False
        """Whether `begin` was called."""

    @property
    def pid(self) -> int:
        """The process id of the first worker; 0 if there is none."""
        return self._worker.child.pid if self._worker.child is not None else 0

    def start(self) -> None:
        """Fork the first worker and wait until it is ready to serve. StartError.

        Nothing in the status area changes: another process may serve.
        """
        worker = self._worker.child = self._forks.fork()
        fields = self._resources.fields
        pulse = Pulse()
        pulse.restart(fields[Field.READY_BEAT])
        while not worker.is_ready:
            self._check_lives("was ready")
            if signal.sigpending() & ENDING:
                self._fail("it was told to end before it was up")
            if worker.is_stopped_for_good():
                self._fail("the worker was stopped (SIGSTOP) before it was ready")
            if pulse.look(fields[Field.READY_BEAT]) > START_LIMIT_SECONDS:
                self._fail(f"the worker has given no sign of life for {START_LIMIT_SECONDS:g} s while it got ready")
            self._manager.show_life(pulse.beat)
            time.sleep(POLL_SECONDS)

    def start_at_once(self) -> None:
        """Fork the first worker while no process serves the mount, so that swap is dead: it gets ready afterwards."""
        self._worker.child = self._forks.fork(emergency=True)
        self._resources.fields[Field.RECOVERIES] += 1

    def wait_for_disk(self) -> None:
        """Wait while the worker that serves has a request at a disk that does not answer. StartError.

        It serves the pages in RAM. If it were killed, the mount would be dead until the disk answers. A worker that hangs
        is not spared.
        """
        roster, fields = self._resources.directory.roster, self._resources.fields
        pulse = Pulse()
        pulse.restart(fields[Field.HEARTBEAT])
        stall = None
        began = time.monotonic()

        def report(text: str) -> None:
            self._resources.log.warning(text)
            self._manager.tell(f"STATUS={text}")

        trouble = Lasting(report, self._resources.log.info)
        while (server := roster.server()) and not is_ending(server) and fields[Field.SERVING]:
            if stall is None or stall.pid != server:
                stall = Stall(server, fields)
            if not stall.look() or pulse.look(fields[Field.HEARTBEAT]) > HANG_SECONDS:
                break
            if time.monotonic() - began > STALL_SECONDS:
                trouble.begin(
                    f"worker {server} serves what is in RAM and waits for the disk of the backing file, which does not"
                    " answer; it is replaced when the disk has answered"
                )
            self._check_lives("served")
            if signal.sigpending() & ENDING:
                self._fail("it was told to end")
            self._manager.show_life(pulse.beat)
            time.sleep(DISK_POLL_SECONDS)
        trouble.end("the disk of the backing file answers")

    def end_others(self) -> None:
        """Kill all other processes of this mount but the first worker.

        It does not wait for their end: the first worker does that, before it touches the memory.
        """
        self._resources.directory.roster.end_others(self.pid)
        self._resources.fields[Field.SERVING] = 0

    def order(self) -> None:
        """Order the first worker to serve."""
        assert self._worker.child is not None
        fields = self._resources.fields
        fields[Field.STANDBY_PID] = fields[Field.STANDBY_READY] = 0
        self._worker.order(self._worker.child)

    def serve(self) -> None:
        """Order the first worker of a new mount to serve and wait until it does. StartError."""
        self.order()
        assert self._worker.child is not None
        while not self._resources.fields[Field.SERVING]:
            self._check_lives("served")
            self._worker.check(self._worker.child)
            self._manager.show_life(self._worker.pulse.beat)
            time.sleep(POLL_SECONDS)
        self._worker.check(self._worker.child)
        self.begin()

    def begin(self) -> None:
        """Get ready for the death of the first worker, which serves. The keeper acts when swap is dead: lock its memory."""
        self.has_served = True
        warnings = self._resources.warnings
        hardening.drop_unused_code()
        if self._resources.backing is not None:
            self._resources.backing.warm_up()  # a worker that is forked while swap is dead finds this code in RAM
        refused = hardening.lock_memory([(arena.address, arena.size) for arena in self._resources.memory.arenas])
        warnings += [text for text in refused if text not in warnings]
        for warning in warnings:
            self._resources.log.warning(warning)
        settings = self._resources.settings
        self._resources.log.info(
            f"zbudfs {__version__} on {settings.mountpoint}: {settings.size_bytes >> 20} MiB, pool of"
            f" {settings.pool_bytes >> 20} MiB, {settings.packing}, {settings.backing or 'no backing file'};"
            f" libfuse {shim.libfuse_version()}"
        )

    def _check_lives(self, before: str) -> None:
        """Raise StartError if the first worker has ended before it did what `before` says."""
        assert self._worker.child is not None
        if self._worker.child.has_ended():
            self._fail(self._resources.memory.status_area.take_error() or f"the worker died before it {before}")

    def _fail(self, why: str) -> NoReturn:
        """Kill the first worker, which is of no use."""
        assert self._worker.child is not None
        self._forks.end(self._worker.child)
        self._worker.child = None
        self._forks.reap(END_SECONDS)
        raise StartError(why)
