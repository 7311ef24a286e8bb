# SPDX-License-Identifier: MIT
"""Handing a mount over to the keeper of another version, one step at a time.

    STARTING    the new keeper starts, and its worker gets ready; the old worker serves, and its disk answers
    ENDING      the old standby and worker are killed, and must end
    GOING       the new keeper orders its worker to take over
    GIVING_UP   the new keeper and its worker are killed, and must end

    old keeper                                  new keeper
    settings, folder, descriptors           ->
                                            <-  {"ready": true, "version": V, "worker": PID}  or  {"error": "..."}
    {"ending": true}                        ->  from here on the end of the old keeper is the order to go
    {"go": true}                            ->  orders its worker

No step waits: the old keeper looks after its worker meanwhile, and takes a step each time that it wakes. In STARTING it gives
the new keeper up as soon as the old worker dies or is stopped. Later it stays until the new worker serves. If the new keeper
dies or is stopped before that, the old keeper forks a worker.
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
from zbudfs.service.stall import Stall

START_SECONDS: Final = 50.0
"""A new keeper that gives no sign of life for so long is given up. Its worker may take any time to get ready. Arbitrary."""
DISK_SECONDS: Final = 5.0
"""Longest time for which a new keeper that is ready waits for a disk that does not answer. Arbitrary."""
GO_SECONDS: Final = 3.0
"""Longest time from the order to go until the worker of the new keeper begins to take over. Guessed."""


class Stage(Enum):
    """The stage of a restart."""

    STARTING = auto()
    ENDING = auto()
    GOING = auto()
    GIVING_UP = auto()


class Step(Enum):
    """The next action of the old keeper."""

    NOTHING = auto()
    HAND_OVER = auto()
    """Call `end` with standby and worker, since the new keeper is ready."""
    DONE = auto()
    """End, since the new keeper has everything."""
    FAILED = auto()
    """Continue with the old worker, or with a new one if the old one was killed; `error` has the reason."""


class Successor(Process):
    """A keeper of another version, and the socket to it."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        super().__init__(pid)
        self.channel = channel
        self._data = b""

    @classmethod
    def start(cls, arguments: list[str], message: dict[str, object], descriptors: list[int]) -> "Successor":
        """Start a program, and add the descriptor of its end of the socket to its arguments. OSError.

        This uses fork and exec, since posix_spawn returns only when exec has read the program from the disk.
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
        with contextlib.suppress(OSError):  # it has ended already, which is noticed later
            send_with_descriptors(mine, message, descriptors)
        return successor

    def next_message(self) -> dict[str, object] | None:
        """Return its next message: an empty one if it has closed the socket, None if there is none now."""
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
        """Send {word: true}. The end of the successor is noticed later."""
        with contextlib.suppress(OSError):
            self.channel.send(json.dumps({word: True}).encode() + b"\n", socket.MSG_NOSIGNAL)

    def _close(self) -> None:
        super()._close()
        self.channel.close()


class HandingOver:
    """One restart: `client` has ordered it, `successor` is the new keeper, and `stall` watches the old worker."""

    def __init__(self, client: Client, successor: Successor, stall: Stall) -> None:
        self.client = client
        self.successor = successor
        self._stall = stall
        self._is_ready = False
        self.stage = Stage.STARTING
        self.version = ""
        self.error = ""
        self._worker_pid = 0
        self._old: list[Child] = []
        self._strangers: list[int] = []
        self._pulse = Pulse()

    def descriptors(self) -> list[int]:
        """Return the descriptors to poll."""
        found = [self.successor.pidfd, *(child.pidfd for child in self._old)]
        return [*found, self.successor.channel.fileno()] if self.stage is Stage.STARTING else found

    def close_copies(self) -> None:
        """Close the connections in a forked child. The client reads its answer up to the end of the connection."""
        self.client.close()
        self.successor.channel.close()

    def advance(self, *, well: bool, getting_ready: int, taking_over: int, serving: bool, connected: bool) -> Step:
        """Take the next step, if it is possible, and return the action of the old keeper.

        `well`: the old worker serves. `getting_ready`, `taking_over` and `serving` are numbers of the status area.
        `connected`: the mount exists.
        """
        if self.stage is Stage.STARTING:
            return self._start(well=well, silent_seconds=self._pulse.look(0 if self._is_ready else getting_ready))
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
            said = self.successor.next_message() or {}  # its last message may give the reason
            return self._fail(str(said.get("error", problem)))
        if self._is_ready:
            if not self._stall.look():
                return Step.HAND_OVER
            if self._pulse.silent_seconds > DISK_SECONDS:
                return self._fail(
                    "the disk of the backing file does not answer: without the old worker the mount would be dead until it"
                    " does. Try again when the disk answers"
                )
            return Step.NOTHING
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
        self._is_ready = True
        self._pulse.restart(0)
        return Step.NOTHING

    def _problem(self) -> str:
        if self.successor.has_ended():
            return "the new version died before it served"
        if self.successor.is_stopped_for_good():
            return "the new version was stopped (SIGSTOP)"
        return ""

    def _fail(self, why: str) -> Step:
        self.successor.kill()  # its worker, which has not served yet, ends with it
        self.error = why
        return Step.FAILED

    def end(self, old: Sequence[Child]) -> None:
        """Kill the old standby and worker. They cannot serve again if the restart fails."""
        if self._worker_pid:  # if not, the version of the new keeper does not know the word
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
    """Become another program in the forked process, or report the reason why that is impossible."""
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
    """Return the message and the files of `send_with_descriptors`."""
    data, descriptors, _, _ = socket.recv_fds(channel, 65536, 8)
    message: dict[str, object] = json.loads(data)
    return message, descriptors


def receive_line(channel: socket.socket) -> dict[str, object]:
    """Wait for the next message and return it; an empty one if the other end is closed."""
    data = b""
    while not data.endswith(b"\n"):
        try:
            piece = channel.recv(1)  # not more than this line: the next line is another message
        except OSError:
            piece = b""
        if not piece:
            return {}
        data += piece
    message: dict[str, object] = json.loads(data)
    return message
