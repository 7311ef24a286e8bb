# SPDX-License-Identifier: MIT
"""The keeper's care for the worker: it kills one that hangs, and replaces one that has ended."""

import os
import signal
import time
from typing import Final

from zbudfs.service.backoff import WorkerBackOff
from zbudfs.service.child import HANG_SECONDS, START_LIMIT_SECONDS, Child, Pulse
from zbudfs.service.forks import Forks
from zbudfs.service.log import Lasting
from zbudfs.service.manager import ServiceManager
from zbudfs.service.mountpoint import is_connected
from zbudfs.service.resources import Resources
from zbudfs.service.standby_monitor import StandbyMonitor
from zbudfs.service.worker import FAILED
from zbudfs.store.status_area import Field

ANSWER_SECONDS: Final = 2.0
"""Longest time in which a ready standby must begin to take over after the order. Guessed: it needs a millisecond."""


class WorkerMonitor:
    """Looks after the worker of one mount. The successor of a dead worker is the standby of `standby`, or a new child."""

    def __init__(self, resources: Resources, manager: ServiceManager, forks: Forks, standby: StandbyMonitor) -> None:
        self._resources = resources
        self._manager = manager
        self._forks = forks
        self._standby = standby
        self.child: Child | None = None
        self.pulse = Pulse()
        self.serving_since = 0.0
        """Time at which the worker began to serve, as far as this keeper has seen; 0 before that."""
        self._back_off = WorkerBackOff()
        self._fork_trouble = Lasting(resources.log.error, resources.log.info)

    @property
    def serves(self) -> bool:
        """Whether there is a worker that has begun to serve."""
        return self.child is not None and self.serving_since > 0

    def order(self, worker: Child) -> None:
        """Order a child to take over. It is the worker from now on."""
        self.child = worker
        fields = self._resources.fields
        worker.order()
        self.serving_since = 0.0
        self.pulse.restart(fields[Field.HEARTBEAT])
        fields[Field.WORKER_PID] = worker.pid
        if fields[Field.STANDBY_PID] == worker.pid:
            self._standby.none_is_left(0)

    def look_after(self) -> int | None:
        """Replace the worker if it has ended. Return the exit status if the mount is gone, or no worker can serve it."""
        if self.child is not None:
            self.check(self.child)
            if not self.child.has_ended():
                return None
            status = self._bury(self.child)
            if status is not None:
                return status
        if self.child is None:
            failures = f"{self._back_off.failures} workers in a row did not come up"
            if self._back_off.gives_up and self._manager.is_there and self._resources.directory.survives:
                self._resources.log.error(f"{failures}: a new keeper is to try")
                os._exit(1)  # the manager keeps the descriptors, and the memory is in the pool directory
            if self._back_off.gives_up:
                self._resources.log.error(f"{failures}: giving up, what is swapped out is lost")
                self._resources.unmount()
                return 1
            self.take_over()
        return None

    def check(self, worker: Child) -> None:
        """Kill the worker if it hangs."""
        fields = self._resources.fields
        if fields[Field.SERVING] and not self.serving_since:
            self.serving_since = time.monotonic()
            self._back_off.worker_serves()
        silent = self.pulse.look(fields[Field.HEARTBEAT])
        if worker.is_killed:
            return
        if self.serving_since:
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
        self._resources.log.error(f"worker {worker.pid} has not answered: {why}")
        worker.kill()

    def _bury(self, worker: Child) -> int | None:
        """Reap a worker that has ended, and replace it. Return the exit status if the mount is gone."""
        status = worker.reap()
        if status is None:
            return None  # a tracer has it
        self.child = None
        fields = self._resources.fields
        served = fields[Field.SERVING]
        if not self._takes_over_by_itself(self._standby.child):
            fields[Field.SERVING] = 0
        if not is_connected(self._resources.fuse_fd) or (status == 0 and fields[Field.ENDED]):
            return 0  # unmounted, perhaps while no worker served
        self._back_off.worker_died(time.monotonic() - self.serving_since if served else None)
        why = self._resources.memory.status_area.take_error() if status == FAILED else f"status {status}"
        if status < 0:
            names = {int(number): number.name for number in signal.Signals}
            why = names.get(-status, f"signal {-status}")
        self.take_over()
        then = f"worker {self.child.pid} takes over" if self.child is not None else "another is tried soon"
        self._resources.log.error(f"worker {worker.pid} died ({why or status}); {then}")
        return None

    def take_over(self) -> None:
        """Make the standby the worker, or fork one. After a failure nothing happens until the back-off is over."""
        if self._back_off.lasts:
            return
        child = self._standby.take()
        by_itself = self._takes_over_by_itself(child)
        if child is None:
            try:
                child = self._forks.fork(emergency=True)
            except OSError as error:
                self._back_off.fork_failed()
                self._fork_trouble.begin(f"no worker can be forked: {error.strerror}; it is tried again")
                return
            self._fork_trouble.end("workers can be forked again")
        self.order(child)
        if not by_itself:
            self._resources.fields[Field.RECOVERIES] += 1

    def _takes_over_by_itself(self, standby: Child | None) -> bool:
        """Return whether the standby takes over without an order of this keeper."""
        return standby is not None and self._resources.fields[Field.TAKING_OVER] == standby.pid
