# SPDX-License-Identifier: MIT
"""The keeper: it makes the mount and its memory, and keeps a worker that serves and a standby that is ready to.

    keeper ---fork---> worker     serves
           ---fork---> standby    everything done but the last step; waits on an eventfd

A fresh start at the death of a worker would need memory just when swap is dead. A fork copies page tables, its mlockall()
copies every copy-on-write page, and the start of an interpreter needs more still. So a standby does all of that while there is
memory. When the worker dies, the keeper writes eight bytes to an eventfd, and forks the next standby when swap works again. If
a worker dies before the next standby is there, the keeper forks a worker that serves at once. It writes to 10 MiB before it
serves (measured); the end of the dead worker has freed 19 MiB.

The keeper has one thread and no event loop, and allocates as little as it can. It waits in one place (`Keeper._wait`), with a
limit, for all events:

    a child ends, or is stopped (SIGCHLD), or its heartbeat stands still     worker_monitor.py, standby_monitor.py
    a signal orders the end, or the mount is gone from the mount table       ending.py
    a client orders a restart, or the next step of one is possible           restart.py, handing_over.py

As the main process of a service it also reports to the service manager, which keeps its descriptors (manager.py). If a signal
ends it while the swapfile is open, it ends alone: worker and standby continue until another keeper comes (predecessors.py).
"""

import contextlib
import os
import select
import socket
import time
from typing import Final

from zbudfs.core.units import PAGE_SHIFT
from zbudfs.service.child import is_readable
from zbudfs.service.ending import Ending
from zbudfs.service.first_worker import END_SECONDS, FirstWorker
from zbudfs.service.forks import Forks
from zbudfs.service.log import Log
from zbudfs.service.manager import ServiceManager
from zbudfs.service.notify import Notifier
from zbudfs.service.resources import Resources
from zbudfs.service.restart import Restart
from zbudfs.service.settings import Settings
from zbudfs.service.standby_monitor import StandbyMonitor
from zbudfs.service.worker_monitor import WorkerMonitor
from zbudfs.store.status_area import Field

CALM_POLL_SECONDS: Final = 1.0
"""Longest wait between two checks while all is well: deaths, stops, orders and signals end it at once."""
POLL_SECONDS: Final = 0.2
"""Longest wait between two checks while no standby is ready."""
BUSY_POLL_SECONDS: Final = 0.02
"""Longest wait between two checks while no worker serves, a child is stopped, or a restart is under way."""

PREDECESSOR_SECONDS: Final = 1.0
"""Longest wait for the end of the keeper that has handed over. Arbitrary."""


class Keeper:
    """The keeper of one mount.

    After `resources.make` or `resources.adopt`, `first_worker` starts a worker. Then `run` keeps the mount served.
    """

    def __init__(
        self,
        settings: Settings,
        log: Log,
        *,
        foreground: bool = False,
        notifier: Notifier | None = None,
        predecessor: socket.socket | None = None,
    ) -> None:
        """Keep a mount with these settings; `notifier` if this is the main process of a service.

        `predecessor` is the socket to a keeper that stays until the first worker of this one serves.
        """
        resources = self.resources = Resources(settings, log)
        self._foreground = foreground
        self._manager = ServiceManager(notifier)
        self._predecessor = predecessor
        self._forks = Forks(resources, self._close_copies)
        self._standby = StandbyMonitor(resources, self._forks)
        shared = resources, self._manager, self._forks
        self._worker = WorkerMonitor(*shared, self._standby)
        self.first_worker = FirstWorker(*shared, self._worker)
        self._restart = Restart(*shared, self._worker, self._standby, foreground=foreground)
        self._ending = Ending(resources, self._manager, self._worker)
        self._wake_fd, self._waker_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def undo(self) -> None:
        """Undo `resources.make`, after a start that failed."""
        self.resources.unmount()
        self._clean_up()

    def run(self) -> int:
        """Keep the mount served until it is gone, or until this keeper has to end alone. Return the exit status."""
        self._ending.listen(self._waker_fd, foreground=self._foreground)
        self._restart.listen()
        self._manager.store(self.resources.descriptors)
        while True:
            self._look_after_predecessor()
            if self._predecessor is None:  # the manager listens only to its main process
                self._manager.look(self._worker.pulse.beat, self._status, serves=self.first_worker.has_served)
            self._wait()
            self._forks.reap()
            status = None if self._restart.has_ended_worker else self._worker.look_after()
            if status is not None:
                break
            self._standby.look_after(self._worker.child, self._worker.serving_since)
            self._ending.follow_mount()
            if self._ending.leaves_alone():
                self._restart.abandon("the keeper was told to end")
                return 0  # worker and standby continue
            self._restart.obey()
            if self._restart.advance(end_is_ordered=self._ending.is_ordered):
                return 0  # the mount belongs to another keeper
        self._restart.abandon("it was unmounted meanwhile")
        if self._standby.child is not None:
            self._forks.end(self._standby.child)
        self._forks.reap(END_SECONDS)
        self._clean_up()
        return status

    def _wait(self) -> None:
        """Wait until there is something to check, and not for long."""
        children = [child for child in (self._worker.child, self._standby.child) if child is not None]
        watched = [self._wake_fd, *(child.pidfd for child in children), *self._restart.descriptors()]
        standby = self._standby.child
        if standby is not None and not standby.is_ready:
            watched.append(standby.ready_fd)
        if self._predecessor is not None:
            watched.append(self._predecessor.fileno())
        if not self._worker.serves or self._restart.is_under_way or any(child.is_stopped for child in children):
            limit = BUSY_POLL_SECONDS
        elif self._ending.is_near or standby is None or not standby.is_ready or self._predecessor is not None:
            limit = POLL_SECONDS
        else:
            limit = CALM_POLL_SECONDS
        # Not poll(2), which fails while few files may be open.
        mount_watch = self._ending.mount_watch
        _, _, changed = select.select(watched, [], [mount_watch.fd], limit)
        mount_watch.has_changed = bool(changed)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_fd, 64)

    def _look_after_predecessor(self) -> None:
        """Begin when the first worker serves; wait a little for the end of the keeper that has handed over."""
        if not self._worker.serving_since:
            return
        if not self.first_worker.has_served:
            self.first_worker.begin()
        if self._predecessor is not None:
            gone = is_readable(self._predecessor.fileno())
            if gone or time.monotonic() > self._worker.serving_since + PREDECESSOR_SECONDS:
                self._predecessor.close()
                self._predecessor = None
                self.resources.directory.roster.keep()

    def _status(self) -> str:
        """Return a line of status for the service manager."""
        fields = self.resources.fields
        if not fields[Field.SERVING]:
            return "no worker serves at the moment; one takes over"
        frames = fields[Field.USED_FRAMES]
        return (
            f"{fields[Field.STORED_PAGES]} pages stored in {frames >> 20 - PAGE_SHIFT} of"
            f" {self.resources.memory.nr_frames >> 20 - PAGE_SHIFT} MiB, {fields[Field.WRITTEN_BACK_PAGES]} of them on disk;"
            f" {'standby ready' if fields[Field.STANDBY_READY] else 'no standby'}, {fields[Field.RECOVERIES]} recoveries"
        )

    def _close_copies(self) -> None:
        """Close, in a forked child, the copies of descriptors that are the keeper's alone."""
        self._restart.close_copies()
        self._manager.close()
        if self._predecessor is not None:
            self._predecessor.close()

    def _clean_up(self) -> None:
        """Free the parts of a mount that has ended."""
        self._manager.forget(self.resources.descriptors)
        self._restart.close()
        self.resources.free()
