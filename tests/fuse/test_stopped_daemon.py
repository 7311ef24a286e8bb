# SPDX-License-Identifier: MIT
"""Other users and a mount whose daemon stands still: the kernel answers each call, so none enters the queue of swap."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fuse.calls import all_stats
from tests.support import mounted, stopped

pytestmark = pytest.mark.needs("root", "fuse")

NOBODY: Final = 65534
ANSWER_SECONDS: Final = 10.0
"""Longest time for all calls. They take milliseconds, and a call in the queue never ends."""


def as_nobody(function: Callable[[], Any], folder: Path, limit_seconds: float = ANSWER_SECONDS) -> Any:
    """Call a function in a process of an unprivileged user that stands in `folder`, and return its result."""
    folder.chmod(0o755)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.chdir(folder)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with os.fdopen(writer, "w") as stream:
                stream.write(json.dumps(function()))
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answered = select.select([stream], [], [], limit_seconds)[0]
        if not answered:
            os.kill(pid, signal.SIGKILL)  # a process that waits for the daemon ends with its answer
        assert answered, "the other user's process hangs"
        said = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return json.loads(said)


def answers(at: Path) -> dict[str, Any]:
    """Try each call on the mountpoint `at`, and return its result or error."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(at, os.O_PATH)

    def access() -> None:
        if not os.access(at, os.R_OK):
            raise PermissionError(errno.EACCES, "access")

    def watch() -> None:
        if libc.inotify_add_watch(libc.inotify_init1(0), os.fsencode(at), 0x300) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def opening(path: str | Path, flags: int, below: int | None = None) -> Callable[[], object]:
        return lambda: os.close(os.open(path, flags, dir_fd=below))

    calls: dict[str, Callable[[], object]] = {
        "stat": at.stat,
        "stat through a descriptor": lambda: os.fstat(handle),
        "stat of a file": (at / "stats/all.json").stat,
        "stat of a file that is not there": (at / "nothing").stat,
        "access": access,
        "open the directory": opening(at, os.O_RDONLY | os.O_DIRECTORY),
        "open stats": opening(at / "stats", os.O_RDONLY | os.O_DIRECTORY),
        "open a file": opening(at / "stats/all.json", os.O_RDONLY),
        "open below a descriptor": opening("stats/all.json", os.O_RDONLY, handle),
        "open swapfile": opening(at / "swapfile", os.O_RDONLY),
        "create": opening(at / "new", os.O_CREAT | os.O_RDWR),
        "list": lambda: list(at.iterdir()),
        "stand in it": lambda: os.chdir(at),
        "stand in it through a descriptor": lambda: os.fchdir(handle),
        "make a directory": (at / "new").mkdir,
        "remove": (at / "swapfile").unlink,
        "rename": lambda: (at / "swapfile").rename(at / "x"),
        "mode": lambda: at.chmod(0o777),
        "owner": lambda: os.chown(at, NOBODY, NOBODY),
        "times": lambda: os.utime(at),
        "list attributes": lambda: os.listxattr(at),
        "attribute of a user": lambda: os.getxattr(at, "user.x"),
        "attribute of security": lambda: os.getxattr(at, "security.x"),
        "capability": lambda: os.getxattr(at, "security.capability"),
        "access list": lambda: os.getxattr(at, "system.posix_acl_access"),
        "set an attribute": lambda: os.setxattr(at, "user.x", b"1"),
        "set security": lambda: os.setxattr(at, "security.x", b"1"),
        "remove an attribute": lambda: os.removexattr(at, "user.x"),
        "watch": watch,
        "statfs": lambda: [os.statvfs(at).f_blocks, os.statvfs(handle).f_blocks],
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        os.write(2, f"{name}\n".encode())  # the last one is the call that hung
        try:
            found[name] = call()
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def test_no_call_of_another_user_waits_for_the_daemon(tmp_path: Path) -> None:
    """The kernel answers each call with an error or an empty result, while all processes of the mount are stopped."""
    with mounted(tmp_path / "mnt") as mountpoint:
        with stopped(mountpoint):
            found = as_nobody(lambda: answers(Path("mnt")), tmp_path)
        assert all_stats(mountpoint)["recoveries"] == 0
    assert found.pop("statfs") == [0, 0]
    for name in ("attribute of security", "capability", "access list"):
        assert found.pop(name) in ("ENOTSUP", "ENODATA", "EACCES"), name
    assert {name: answer for name, answer in found.items() if answer not in ("EACCES", "EPERM")} == {}
