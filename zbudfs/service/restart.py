# SPDX-License-Identifier: MIT
"""The restarts that clients of the control socket order: each hands the mount over to the keeper of another version.

The steps of one are in service/handing_over.py.
"""

import json
import signal

from zbudfs.service.control import Client, Control
from zbudfs.service.forks import Forks
from zbudfs.service.handing_over import HandingOver, Stage, Step, Successor
from zbudfs.service.manager import ServiceManager
from zbudfs.service.mountpoint import is_connected
from zbudfs.service.resources import Resources
from zbudfs.service.stall import Stall
from zbudfs.service.standby_monitor import StandbyMonitor
from zbudfs.service.worker_monitor import WorkerMonitor
from zbudfs.store.status_area import CANNOT_RESEND, Field


class Restart:
    """The restarts of one mount, at most one at a time."""

    def __init__(
        self,
        resources: Resources,
        manager: ServiceManager,
        forks: Forks,
        worker: WorkerMonitor,
        standby: StandbyMonitor,
        *,
        foreground: bool,
    ) -> None:
        self._resources = resources
        self._manager = manager
        self._forks = forks
        self._worker = worker
        self._standby = standby
        self._foreground = foreground
        self._control: Control | None = None
        self._handing_over: HandingOver | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a restart has begun and is neither complete nor abandoned."""
        return self._handing_over is not None

    @property
    def has_ended_worker(self) -> bool:
        """Whether a restart that is under way has killed the worker."""
        return self._handing_over is not None and self._handing_over.stage is not Stage.STARTING

    def listen(self) -> None:
        """Make the control socket. If it cannot be made, no restart is possible."""
        path = f"{self._resources.directory.path}/control"
        try:
            self._control = Control(path)
        except OSError as error:
            self._resources.log.warning(f"`zbudfs restart` will not work: {path}: {error.strerror}")

    def descriptors(self) -> list[int]:
        """Return the descriptors to poll."""
        found = self._control.descriptors() if self._control is not None else []
        return found + (self._handing_over.descriptors() if self._handing_over is not None else [])

    def close(self) -> None:
        """Close the control socket, since the keeper ends."""
        if self._control is not None:
            self._control.close()

    def close_copies(self) -> None:
        """Close the connections in a forked child. The keeper still uses them."""
        if self._control is not None:
            self._control.close_copies()
        if self._handing_over is not None:
            self._handing_over.close_copies()

    def obey(self) -> None:
        """Begin the restart that a client has ordered, or answer why not."""
        for client, data in self._control.orders() if self._control is not None else ():
            try:
                self._begin(client, interpreter_in(data))
            except ValueError as error:
                client.answer({"error": str(error)})

    def _begin(self, client: Client, interpreter: str) -> None:
        """Begin a restart. Raises ValueError with the reason why that is impossible."""
        if self._handing_over is not None:
            raise ValueError("a restart is under way")
        if not self._resources.directory.survives:
            raise ValueError(
                "the pool is in memory without a name, which cannot be handed over. For the new"
                " version: zbudfs swapoff --umount, then zbudfs swapon"
            )
        if self._resources.fields[Field.CAN_RESEND] == CANNOT_RESEND:
            raise ValueError(
                "this kernel does not send requests again (FUSE_NOTIFY_RESEND, Linux 6.9): a hand-over would lose the requests"
                " under way, and the programs that wait for them would wait for ever; nothing was changed. For the new"
                " version: zbudfs swapoff --umount, then zbudfs swapon"
            )
        if self._worker.child is None or not self._worker.serves:
            raise ValueError("no worker serves at the moment: try again")
        arguments = [interpreter, "-I", "-m", "zbudfs.service.daemon"]
        arguments += ["--foreground"] if self._foreground else []
        arguments += ["--service"] if self._manager.is_there else []
        message: dict[str, object] = {
            "settings": self._resources.settings.to_json(),
            "folder": self._resources.directory.path,
            "born_ns": self._resources.born_ns,
        }
        try:
            successor = Successor.start(arguments, message, list(self._resources.descriptors.values()))
        except OSError as error:
            raise ValueError(f"{interpreter} cannot be started: {error.strerror}") from None
        stall = Stall(self._worker.child.pid, self._resources.fields)
        self._handing_over = HandingOver(client, successor, stall)

    def advance(self, *, end_is_ordered: bool) -> bool:
        """Take the next step of a restart. Return whether another keeper has everything now.

        `end_is_ordered`: the new keeper has to end the service.
        """
        handing = self._handing_over
        if handing is None:
            return False
        fields = self._resources.fields
        worker = self._worker.child
        step = handing.advance(
            well=worker is not None and self._worker.serves and not worker.is_stopped,
            getting_ready=fields[Field.READY_BEAT],
            taking_over=fields[Field.TAKING_OVER],
            serving=bool(fields[Field.SERVING]),
            connected=is_connected(self._resources.fuse_fd),
        )
        if step is Step.HAND_OVER:
            handing.end([child for child in (self._standby.child, worker) if child is not None])
            self._worker.child = self._standby.child = None
            fields[Field.SERVING] = fields[Field.TAKING_OVER] = 0
        elif step is Step.DONE:
            self._manager.tell(f"MAINPID={handing.successor.pid}")
            if end_is_ordered:
                handing.successor.tell(signal.SIGTERM)
            handing.client.answer({"pid": handing.successor.pid, "version": handing.version})
            return True
        elif step is Step.FAILED:
            self.abandon(handing.error)
        return False

    def abandon(self, why: str) -> None:
        """Give up the restart that is under way, if there is one, and continue with a worker of this keeper."""
        handing, self._handing_over = self._handing_over, None
        if handing is None:
            return
        self._forks.end(handing.successor)
        self._resources.log.warning(f"the restart has failed: {why}")
        handing.client.answer({"error": why})
        if handing.stage is not Stage.STARTING:
            self._resources.fields[Field.SERVING] = 0
            self._worker.take_over()


def interpreter_in(order: bytes) -> str:
    """Return the interpreter of the new version, from the order of a client. Raises ValueError if it makes no sense."""
    try:
        found = json.loads(order)
        interpreter = str(found["interpreter"])
        if found["order"] != "restart":
            raise ValueError("the only order is restart")
        if "\0" in interpreter:
            raise ValueError("a path has no NUL")
    except Exception as error:  # a client may send anything, and the keeper must not end because of it
        raise ValueError(f"the order was not understood: {error}") from None
    return interpreter
