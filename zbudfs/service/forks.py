# SPDX-License-Identifier: MIT
"""The children of the keeper: their fork, and the end of those that it has killed."""

import os
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from zbudfs.service.child import Child, Process
from zbudfs.service.resources import Resources
from zbudfs.service.worker import FAILED, work
from zbudfs.store.status_area import Field


class Forks:
    """Forks workers and standbys of one mount, and reaps the processes that were killed.

    A child calls `close_copies` first: it closes the copies of descriptors that are the keeper's alone.
    """

    def __init__(self, resources: Resources, close_copies: Callable[[], None]) -> None:
        self._resources = resources
        self._close_copies = close_copies
        self._dying: list[Process] = []
        """The killed processes that are not reaped yet. Nothing depends on their end."""

    def fork(self, *, emergency: bool = False, served_by: int | None = None) -> Child:
        """Fork a child. OSError, and then nothing is left of it.

        In an emergency swap does not work until the child serves. A standby has `served_by`, the pidfd of the worker.
        """

        def be_child(order_fd: int, ready_fd: int) -> NoReturn:
            self._be_child(order_fd, ready_fd, served_by, emergency=emergency)

        child = Child.fork(be_child, is_standby=not emergency)
        if served_by is not None:
            self._resources.fields[Field.STANDBY_PID] = child.pid
        return child

    def _be_child(self, order_fd: int, ready_fd: int, served_by: int | None, *, emergency: bool) -> NoReturn:
        """Work in the forked process, and end without any clean-up of the keeper."""
        status = FAILED
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if served_by is not None:
                self._resources.fields[Field.STANDBY_PID] = os.getpid()
            self._close_copies()
            status = work(self._resources, order_fd, ready_fd, emergency=emergency, served_by=served_by)
        finally:
            os._exit(status)

    def end(self, process: Process) -> None:
        """Kill a process, without waiting for its end."""
        process.kill()
        self._dying.append(process)

    def reap(self, seconds: float = 0.0) -> None:
        """Reap the killed processes that have ended. Wait up to `seconds` for the others."""
        end = time.monotonic() + seconds
        while self._dying:
            self._dying = [process for process in self._dying if process.reap() is None]
            if time.monotonic() >= end:
                break
            time.sleep(0.002)
