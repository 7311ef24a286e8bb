# SPDX-License-Identifier: MIT
"""Handing a mount over to the keeper of another version, one step at a time.

    STARTING    the new keeper starts, and its worker gets ready; the old worker serves
    ENDING      the old standby and worker are killed; both have to be gone
    GOING       the new keeper orders its worker to take over
    GIVING_UP   the new keeper and its worker are killed; both have to be gone

    old keeper                                  new keeper
    settings, folder, descriptors           ->
                                            <-  {"ready": true, "version": V, "worker": PID}  or  {"error": "..."}
    {"ending": true}                        ->  from here on the end of the old keeper is the order to go
    {"go": true}                            ->  orders its worker

No step waits: the old keeper looks after its worker all the while, and takes a step each time that it wakes. In STARTING
the new keeper is given up as soon as the old worker is not well. Later, the old keeper stays until the new worker serves. If
the new keeper dies or is stopped before that, the old keeper forks a worker.
"""

import contextlib
import json
import os
import signal
import socket
from array import array
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final, NoReturn

from zbudfs.service.child import Child, Process, Pulse, is_readable
from zbudfs.service.control import Client

START_SECONDS: Final = 50.0
"""A new keeper that gives no sign of life for so long is given up. Its worker may take any time to get ready. Arbitrary."""
GO_SECONDS: Final = 3.0
"""How long a new keeper may take from the order to go until its worker begins to take over. Guessed."""


class Stage(Enum):
    """How far it has come."""

    STARTING = auto()
    ENDING = auto()
    GOING = auto()
    GIVING_UP = auto()


class Step(Enum):
    """What the old keeper has to do."""

    NOTHING = auto()
    HAND_OVER = auto()
    """The new keeper is ready: call `end` with standby and worker."""
    DONE = auto()
    """The new keeper has everything: end."""
    FAILED = auto()
    """Go on as before, or without a worker if that had been ended; `error` says why."""


class Successor(Process):
    """A keeper of another version, and the socket to it."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        super().__init__(pid)
        self.channel = channel
        self._data = b""

    @classmethod
    def start(cls, arguments: list[str], message: dict[str, object], descriptors: list[int]) -> "Successor":
        """Start a program; the descriptor of its end of the socket is added to the arguments. OSError, ValueError.

        With fork and exec, since posix_spawn returns only when exec has read the program from the disk.
        """
        mine, theirs = socket.socketpair()
        try:
            with theirs:
                os.set_inheritable(theirs.fileno(), True)
                pid = os.fork()
                if not pid:
                    _become([*arguments, "--adopt-fd", str(theirs.fileno())], theirs)
            mine.setblocking(False)
            successor = cls(pid, mine)
        except OSError:
            mine.close()
            raise
        with contextlib.suppress(OSError):  # it has ended already: that is noticed later
            send_with_descriptors(mine, message, descriptors)
        return successor

    def next_message(self) -> dict[str, object] | None:
        """Return what it says next: an empty message if it has closed the socket, None if it says nothing now."""
        while b"\n" not in self._data:
            try:
                piece = self.channel.recv(4096)
            except BlockingIOError:
                return None
            except OSError:
                piece = b""
            if not piece:
                return {}
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        try:
            found: dict[str, object] = json.loads(line)
        except ValueError:
            return {}
        return found

    def say(self, word: str) -> None:
        """Send {word: true}; one that has gone is noticed later."""
        with contextlib.suppress(OSError):
            self.channel.send(json.dumps({word: True}).encode() + b"\n", socket.MSG_NOSIGNAL)

    def _close(self) -> None:
        super()._close()
        self.channel.close()


class HandingOver:
    """One restart: `client` has ordered it and `successor` is the new keeper."""

    def __init__(self, client: Client, successor: Successor) -> None:
        self.client = client
        self.successor = successor
        self.stage = Stage.STARTING
        self.version = ""
        self.error = ""
        self._worker_pid = 0
        self._old: list[Child] = []
        self._strangers: list[int] = []
        self._pulse = Pulse()

    def descriptors(self) -> list[int]:
        """Return what is to be polled."""
        found = [self.successor.pidfd, *(child.pidfd for child in self._old)]
        return [*found, self.successor.channel.fileno()] if self.stage is Stage.STARTING else found

    def advance(self, *, well: bool, getting_ready: int, taking_over: int, serving: bool, connected: bool) -> Step:
        """Take the next step, if it can be taken. `well`: the old worker serves.

        `getting_ready`, `taking_over` and `serving` are what the board says; `connected`: the mount is there.
        """
        if self.stage is Stage.STARTING:
            return self._start(well=well, silent_seconds=self._pulse.look(getting_ready))
        self._old = [child for child in self._old if child.reap() is None]
        if self.stage is Stage.ENDING:
            if problem := self._problem():
                self._give_up(problem)
            elif not self._old:
                self.successor.say("go")
                self._pulse.restart(0)
                self.stage = Stage.GOING
        elif self.stage is Stage.GOING:
            problem = self._problem()
            if not connected and self.successor.has_ended():
                return Step.DONE
            if serving and not problem and not self.successor.is_stopped:
                return Step.DONE
            if self._pulse.look(taking_over) > GO_SECONDS and self._worker_pid and not taking_over:
                self._give_up(f"the new version has not begun to serve within {GO_SECONDS:g} s")
            elif problem:
                self._give_up(problem)
        elif not self._old and self.successor.has_ended() and all(map(is_readable, self._strangers)):
            for pidfd in self._strangers:
                os.close(pidfd)
            self._strangers.clear()
            return Step.FAILED
        return Step.NOTHING

    def _start(self, *, well: bool, silent_seconds: float) -> Step:
        if not well:
            return self._fail("the worker died meanwhile")
        if problem := self._problem():
            said = self.successor.next_message() or {}  # its last word may say why
            return self._fail(str(said.get("error", problem)))
        if silent_seconds > START_SECONDS:
            return self._fail(f"the new version has given no sign of life for {START_SECONDS:g} s")
        said_now = self.successor.next_message()
        if said_now is None:
            return Step.NOTHING
        if "ready" not in said_now:
            return self._fail(str(said_now.get("error", "the new version died before it was ready")))
        self.version = str(said_now.get("version", ""))
        worker = said_now.get("worker", 0)
        self._worker_pid = worker if isinstance(worker, int) else 0
        return Step.HAND_OVER

    def _problem(self) -> str:
        if self.successor.has_ended():
            return "the new version died before it served"
        if self.successor.is_stopped_for_good():
            return "the new version was stopped (SIGSTOP)"
        return ""

    def _fail(self, why: str) -> Step:
        self.successor.kill()  # and its worker with it, which has served nothing yet
        self.error = why
        return Step.FAILED

    def end(self, old: Sequence[Child]) -> None:
        """Kill standby and worker: from here on there is no way back to them."""
        if self._worker_pid:  # else the new keeper is of a version that does not know the word
            self.successor.say("ending")
        for child in old:
            child.kill()
        self._old = list(old)
        self.stage = Stage.ENDING

    def _give_up(self, why: str) -> None:
        """Kill the new keeper and its worker."""
        self.error = why
        self.successor.kill()
        if self._worker_pid:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(self._worker_pid)
                self._strangers.append(pidfd)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self.stage = Stage.GIVING_UP


def _become(arguments: list[str], channel: socket.socket) -> NoReturn:
    """In the forked process: be another program, or say why not."""
    try:
        os.execve(arguments[0], arguments, dict(os.environ))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        text = f"{arguments[0]} cannot be started: {why}"
        with contextlib.suppress(OSError):
            channel.send(json.dumps({"error": text}).encode() + b"\n", socket.MSG_NOSIGNAL)
    finally:
        os._exit(127)


def send_with_descriptors(channel: socket.socket, message: dict[str, object], descriptors: list[int]) -> None:
    """Send a message, in one line of JSON, with open files."""
    data = json.dumps(message).encode() + b"\n"
    channel.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))])


def receive_with_descriptors(channel: socket.socket) -> tuple[dict[str, object], list[int]]:
    """Return what `send_with_descriptors` sent."""
    data, descriptors, _, _ = socket.recv_fds(channel, 65536, 8)
    message: dict[str, object] = json.loads(data)
    return message, descriptors


def receive_line(channel: socket.socket) -> dict[str, object]:
    """Return the next message; an empty one if the other end is closed. Waits."""
    data = b""
    while not data.endswith(b"\n"):
        try:
            piece = channel.recv(1)  # one line and no more: the next one is asked for later
        except OSError:
            piece = b""
        if not piece:
            return {}
        data += piece
    message: dict[str, object] = json.loads(data)
    return message
