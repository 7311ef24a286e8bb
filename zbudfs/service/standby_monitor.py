# SPDX-License-Identifier: MIT
"""The keeper's care for the standby: it forks one while a worker serves, and kills one that hangs."""

import errno
import time
from typing import Final

from zbudfs.service.backoff import StandbyBackOff
from zbudfs.service.child import HANG_SECONDS, START_LIMIT_SECONDS, Child, Pulse
from zbudfs.service.forks import Forks
from zbudfs.service.log import Lasting
from zbudfs.service.resources import Resources
from zbudfs.service.worker import FAILED
from zbudfs.store.status_area import Field

STANDBY_DELAY_SECONDS: Final = 0.2
"""Time from the start of a worker's service to the fork of the next standby: requests that wait for swap go first. Guessed."""


class StandbyMonitor:
    """Looks after the standby of one mount."""

    def __init__(self, resources: Resources, forks: Forks) -> None:
        self._resources = resources
        self._forks = forks
        self.child: Child | None = None
        self._pulse = Pulse()
        self._back_off = StandbyBackOff()
        self._trouble = Lasting(resources.log.warning, resources.log.info)

    def look_after(self, worker: Child | None, serving_since: float) -> None:
        """Fork a standby if the worker serves and has none; otherwise check the standby. `serving_since` 0: no service."""
        if self.child is not None:
            if self.child.has_ended():
                self._bury(self.child)
            else:
                self._check(self.child)
            return
        if worker is None or not serving_since or self._back_off.lasts:
            return
        if time.monotonic() - serving_since >= STANDBY_DELAY_SECONDS:
            try:
                self.child = self._forks.fork(served_by=worker.pidfd)
            except OSError as error:
                fault = error.errno or errno.EAGAIN
                self._failed(fault, f"no standby can be forked: {error.strerror}; it is tried again")
                return
            self._pulse.restart(self._resources.fields[Field.STANDBY_BEAT])
            self._back_off.forked()

    def take(self) -> Child | None:
        """Give the standby away to take over. None if there is none, or if it cannot do so at once: it is killed then."""
        child, self.child = self.child, None
        if child is not None and (child.has_ended() or child.is_stopped or not child.is_ready):
            # A standby that is not ready yet needs more memory than a child that is forked to serve at once.
            self._forks.end(child)
            return None
        return child

    def none_is_left(self, fault: int) -> None:
        """Write in the status area that there is no standby, and since when. `fault` is an errno, or 0."""
        fields = self._resources.fields
        fields[Field.STANDBY_PID] = fields[Field.STANDBY_READY] = 0
        fields[Field.NO_STANDBY_FAULT] = fault
        if not fields[Field.NO_STANDBY_SINCE]:
            fields[Field.NO_STANDBY_SINCE] = int(time.time())

    def _check(self, standby: Child) -> None:
        """Write in the status area whether the standby is ready, and kill it if it hangs."""
        fields = self._resources.fields
        silent = self._pulse.look(fields[Field.STANDBY_BEAT])
        for_good = standby.is_stopped_for_good()
        ready = standby.is_ready and not standby.is_stopped and not standby.is_killed
        fields[Field.STANDBY_READY] = ready
        if standby.is_killed:
            return
        if ready:
            is_new, failures = self._back_off.ready()
            if is_new:
                fields[Field.NO_STANDBY_SINCE] = fields[Field.NO_STANDBY_FAULT] = 0
            if failures:
                self._trouble.end(f"a standby is ready, after {failures} failures")
        if for_good:
            why = "it is stopped (SIGSTOP)"
        elif silent > (HANG_SECONDS if standby.is_ready else START_LIMIT_SECONDS):
            why = f"{silent:.0f} s of silence"
        else:
            return
        fields[Field.STANDBY_READY] = 0
        self._trouble.begin(f"the standby has not answered: {why}; it is killed")
        standby.kill()

    def _bury(self, standby: Child) -> None:
        """Reap a standby that has ended."""
        status = standby.reap()
        if status is None:
            return  # a tracer has it
        self.child = None
        why = self._resources.memory.status_area.take_error() if status == FAILED else f"status {status}"
        self._failed(errno.ECHILD, f"the standby died ({why}); another is made")

    def _failed(self, fault: int, text: str) -> None:
        self.none_is_left(fault)
        self._trouble.begin(text)
        self._back_off.failed()
