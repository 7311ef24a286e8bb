# SPDX-License-Identifier: MIT
"""The end of a mount: by a signal to the keeper, or because the mount is gone from the mount table."""

import signal
import time
from typing import Final

from zbudfs.service.manager import ServiceManager
from zbudfs.service.mount_watch import MountWatch
from zbudfs.service.resources import Resources
from zbudfs.service.worker_monitor import WorkerMonitor
from zbudfs.store.status_area import Field

CLOSE_SECONDS: Final = 1.0
"""Longest time in which an open swapfile may still be on its way to be closed: the kernel does not wait for that. Arbitrary."""

END_RETRY_SECONDS: Final = 1.0
"""Time between two orders to the worker to end, when a service ends: a loop device closes its file a little late. Arbitrary."""

ENDING: Final = frozenset((signal.SIGTERM, signal.SIGINT))
"""The signals that end a keeper. They are blocked until `Ending.listen`: the start looks for them at points where it can be
undone."""


class Ending:
    """Ends one mount through its worker, which decides."""

    def __init__(self, resources: Resources, manager: ServiceManager, worker: WorkerMonitor) -> None:
        self._resources = resources
        self._manager = manager
        self._worker = worker
        self.mount_watch = MountWatch()
        self.is_ordered = False
        """Whether a signal has ordered the end of the service."""
        self._began_at = self._retry_at = 0.0

    @property
    def is_near(self) -> bool:
        """Whether the mount is gone from the mount table, or the end of the service is ordered."""
        return self.is_ordered or self.mount_watch.is_gone

    def listen(self, wake_fd: int, *, foreground: bool) -> None:
        """Handle signals from now on; each writes to `wake_fd`. The signals that have come meanwhile are handled at once."""
        terminal_reaches_worker = False  # before it took over, the worker ignored a signal to the process group

        def handle(number: int, frame: object) -> None:
            if self._manager.is_there:
                self.is_ordered = True
            elif self._worker.child is not None and not (
                number == signal.SIGINT and foreground and terminal_reaches_worker
            ):
                self._worker.child.tell(number)  # the worker decides: it must not end while swap is attached

        signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the signal only has to wake the keeper
        for number in ENDING:
            signal.signal(number, handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        terminal_reaches_worker = True
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def follow_mount(self) -> None:
        """Make the worker end if the mount was removed from the mount table and still exists, perhaps in another namespace."""
        fields = self._resources.fields
        if (
            self.mount_watch.is_due(fields[Field.MOUNT_DEVICE])
            and self._worker.child is not None
            and fields[Field.SERVING]
            and not fields[Field.OPEN_SWAPFILES]
        ):
            self.mount_watch.begin_again()
            self._worker.child.tell(signal.SIGTERM)

    def leaves_alone(self) -> bool:
        """Make the worker unmount if the end is ordered. True with an open swapfile: the keeper has to end alone.

        Nothing happens while a worker takes over: it would end with its keeper.
        """
        worker, fields = self._worker.child, self._resources.fields
        if not self.is_ordered or worker is None or not fields[Field.SERVING]:
            return False
        now = time.monotonic()
        self._began_at = self._began_at or now
        users = fields[Field.OPEN_SWAPFILES]
        if not users and now >= self._retry_at:
            self._retry_at = now + END_RETRY_SECONDS
            self._manager.tell("STOPPING=1", "STATUS=unmounting")
            worker.tell(signal.SIGTERM)
        if not users or now < self._began_at + CLOSE_SECONDS:
            return False
        self._manager.tell("STOPPING=1", "STATUS=the swapfile is open: worker and standby serve on without a keeper")
        self._resources.log.info(
            f"told to end while the swapfile is open ({users} times): worker {worker.pid} serves on"
        )
        return True
