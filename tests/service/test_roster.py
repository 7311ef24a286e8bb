# SPDX-License-Identifier: MIT
"""The roster: one process serves at a time, and its locks show which processes live, without /proc/PID/fd."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

import pytest

from tests.support import LIMIT_SECONDS, wait_until
from zbudfs.service.roster import MAX_PROCESSES, UNSEEN, Roster, is_ending

SYS_EXIT = 60 if os.uname().machine == "x86_64" else 93
HALF_DEAD = f"""
import ctypes, os, sys, threading
from zbudfs.service.roster import Roster
roster = Roster(sys.argv[1])
assert roster.serve()
threading.Thread(target=sys.stdin.read).start()
print("serves", flush=True)
ctypes.CDLL(None).syscall({SYS_EXIT}, 0)
"""
"""A process whose main thread ends before another one, as after SIGKILL during a disk write of that one."""


@contextlib.contextmanager
def child(act: Callable[[], object]) -> Iterator[int]:
    """Start a process that does something, reports it, and stays. Return its process id."""
    done_fd, tell_fd = os.pipe()
    pid = os.fork()
    if not pid:
        _be_child(act, tell_fd)
    os.close(tell_fd)
    try:
        assert select.select([done_fd], [], [], LIMIT_SECONDS)[0]
        assert os.read(done_fd, 1) == b"y"
        yield pid
    finally:
        os.close(done_fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _be_child(act: Callable[[], object], tell_fd: int) -> NoReturn:
    try:
        act()
        os.write(tell_fd, b"y")
        signal.pause()
    finally:
        os._exit(1)


def kill(pid: int) -> None:
    """Kill a process and wait until it is gone, without reaping it."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], LIMIT_SECONDS)[0]
    os.close(pidfd)


@pytest.fixture
def roster(tmp_path: Path) -> Iterator[Roster]:
    """Return this process's copy of a roster."""
    with contextlib.closing(Roster(str(tmp_path))) as roster:
        yield roster


def test_one_serves(roster: Roster) -> None:
    """The second process is refused, knows the number of the first, and succeeds when the first is gone."""
    assert roster.server() is None
    with child(lambda: roster.serve() or os._exit(1)) as pid:
        assert not roster.serve()
        assert roster.server() == pid
        kill(pid)
        assert roster.serve()


def test_a_child_inherits_no_role(roster: Roster) -> None:
    """A child's copy of the descriptor has no effect, nor has its close."""
    assert roster.serve()
    assert roster.keep()

    def ask() -> None:
        assert not roster.serve()
        assert not roster.keep()
        assert roster.server() == roster.keeper() == os.getppid()
        roster.close()

    with child(ask), child(lambda: roster.serve() and os._exit(1)):
        pass


def test_a_process_that_has_not_ended_yet_serves(roster: Roster, tmp_path: Path) -> None:
    """A zombie with living threads has the lock, and is known to do no more work."""
    stdin, write_fd = os.pipe()
    done_fd, stdout = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", HALF_DEAD, str(tmp_path)],
        dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
    )
    os.close(stdout)
    os.close(stdin)
    assert os.read(done_fd, 6) == b"serves"
    wait_until(lambda: is_ending(pid), "the end of its main thread")
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b""
    assert not roster.serve()
    assert roster.server() == pid
    os.close(write_fd)
    wait_until(roster.serve, "the end of its other thread")
    os.waitpid(pid, 0)
    os.close(done_fd)


def test_living_processes(roster: Roster) -> None:
    """All other processes are listed, the server last, and no dead ones."""

    def join_and_serve() -> None:
        roster.join()
        roster.serve()

    roster.join()
    with child(join_and_serve) as server, child(roster.join) as standby:
        assert roster.others() == roster.working() == [standby, server]
        kill(server)
        assert roster.others() == [standby]


def test_others_are_ended(roster: Roster) -> None:
    """All processes but one are killed."""
    with child(roster.join) as first, child(roster.join) as spared, child(roster.serve) as server:
        roster.end_others(spared)
        for pid in (first, server):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert found is not None
            assert (found.si_code, found.si_status) == (os.CLD_KILLED, signal.SIGKILL)
        assert roster.others() == [spared]


BEHIND: Final = """
import sys
from zbudfs.service import predecessors
from zbudfs.service.roster import UNSEEN, Roster
roster = Roster(sys.argv[1], create=False)
assert (roster.server(), roster.others()) == (UNSEEN, [UNSEEN]), roster.others()
try:
    predecessors._check(roster)
except predecessors.Held as held:
    print(held)
"""


@pytest.mark.needs("root")
def test_a_process_of_another_namespace_is_left_alone(roster: Roster, tmp_path: Path) -> None:
    """A keeper in its own PID namespace cannot see the server, and so counts the mount as served."""
    with child(roster.serve):
        command = ["unshare", "--pid", "--fork", sys.executable, "-c", BEHIND, str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert (run.stdout, run.stderr) == ("its processes live in another PID namespace\n", "")


def test_a_full_roster(roster: Roster) -> None:
    """One process too many gets an error, and no hidden place."""
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_PROCESSES):
            stack.enter_context(child(roster.join))
        with pytest.raises(OSError, match="more than 64 processes") as error:
            roster.join()
        assert error.value.errno == errno.EBUSY
        assert len(roster.others()) == MAX_PROCESSES


def test_a_process_that_is_stopped_or_unseen_works() -> None:
    """A process counts as ending only if that is known."""
    assert not is_ending(UNSEEN)
    with child(int) as pid:
        os.kill(pid, signal.SIGSTOP)
        assert not is_ending(pid)
        kill(pid)
        assert is_ending(pid)
    assert is_ending(pid)
