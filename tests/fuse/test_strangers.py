# SPDX-License-Identifier: MIT
"""The kernel refuses other users before their requests reach the daemon, so none is in the queue of swap.

Each attack runs as an unprivileged user in its own process. The serving thread must not wake up for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import PAGE, all_stats, looped, opened, server_of, tool
from tests.support import LIMIT_SECONDS, mounted
from zbudfs.service.mountpoint import parse_mountinfo

pytestmark = pytest.mark.needs("root", "fuse")

NOBODY: Final = 65534
O_PATH: Final = os.O_PATH
_IN_ALL_EVENTS: Final = 0xFFF
_FAN_REPORT_FID: Final = 0x200
_FAN_MARK_ADD: Final = 1
_FAN_OPEN: Final = 0x20


def as_nobody(mountpoint: Path, attack: Callable[[Path], object]) -> int:
    """Run `attack` as an unprivileged user in a child process on the mount, and return the number of successful calls.

    An attack returns how many of its calls succeeded, or raises OSError at the first that failed.
    """
    pid = os.fork()
    if not pid:
        status = 255
        try:
            os.chdir(mountpoint)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                status = min(int(bool(attack(mountpoint))), 1)
            except OSError:
                status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def succeeded(call: Callable[[], object], times: int) -> int:
    """Return how many of `times` calls raised no OSError."""
    done = 0
    for _ in range(times):
        with contextlib.suppress(OSError):
            call()
            done += 1
    return done


def in_threads(call: Callable[[], object], threads_nr: int) -> int:
    """Return how many of the calls, all at once in their own threads, raised no OSError."""
    done: list[int] = []
    threads = [threading.Thread(target=lambda: done.append(succeeded(call, 5))) for _ in range(threads_nr)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def map_and_close(path: Path) -> None:
    """Map a file and close it, so that the unmap releases it."""
    with opened(path, os.O_RDONLY) as fd:
        mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ)


def checked(result: int) -> int:
    """Return the result of a C function, or raise OSError for -1."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def watched(mountpoint: Path) -> int:
    """Watch the mountpoint with inotify and fanotify."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(mountpoint)

    def inotify() -> None:
        checked(libc.inotify_add_watch(checked(libc.inotify_init()), path, _IN_ALL_EVENTS))

    def fanotify() -> None:
        group = checked(libc.fanotify_init(_FAN_REPORT_FID, os.O_RDONLY))
        checked(libc.fanotify_mark(group, _FAN_MARK_ADD, ctypes.c_uint64(_FAN_OPEN), -100, path))

    return succeeded(inotify, 3) + succeeded(fanotify, 3)


def by_relative_paths(mountpoint: Path) -> int:
    """Use the paths that can be reached from the current folder of the process."""
    return sum(
        succeeded(call, 5)
        for call in (
            lambda: os.listdir("."),  # noqa: PTH208
            lambda: os.stat("stats"),  # noqa: PTH116
            lambda: Path("stats/all.json").read_bytes(),
            lambda: Path("control/level").read_bytes(),
            lambda: os.open("swapfile", os.O_RDONLY),
            lambda: os.open("swapfile", O_PATH),
            lambda: os.stat("."),  # noqa: PTH116
            lambda: os.open(".", os.O_RDONLY),
        )
    )


ATTACKS: Final[dict[str, Callable[[Path], object]]] = {
    "directories": lambda at: [os.open(at, os.O_RDONLY | os.O_DIRECTORY) for _ in range(100_000)],
    "threads that open all.json": lambda at: in_threads(lambda: os.open(at / "stats/all.json", os.O_RDONLY), 500),
    "open files": lambda at: succeeded(lambda: os.open(at / "stats/all.json", os.O_RDONLY), 40_000),
    "maps": lambda at: succeeded(lambda: map_and_close(at / "stats/all.json"), 5000),
    "stat": lambda at: succeeded(lambda: os.stat(at), 20_000),  # noqa: PTH116
    "stat of a name": lambda at: succeeded(lambda: os.stat(at / "missing"), 20_000),  # noqa: PTH116
    "list": lambda at: succeeded(lambda: os.listdir(at), 20_000),  # noqa: PTH208
    "access": lambda at: sum(os.access(at, os.R_OK) for _ in range(20_000)),
    "statvfs": lambda at: sum(os.statvfs(at).f_bsize != PAGE for _ in range(20_000)) != 20_000,
    "getxattr": lambda at: sum(
        succeeded(lambda name=name: os.getxattr(at, name), 5000)  # type: ignore[misc]
        for name in ("user.x", "security.x", "system.posix_acl_access")
    ),
    "listxattr": lambda at: succeeded(lambda: os.listxattr(at), 5000),
    "utime": lambda at: succeeded(lambda: os.utime(at), 5000),
    "watch": watched,
    "stand in it": lambda at: succeeded(lambda: os.chdir(at), 5),
    "relative paths": by_relative_paths,
}


@pytest.fixture
def mnt() -> Iterator[Path]:
    """Return a mount in a folder that any user may enter, unlike pytest's own folders."""
    with tempfile.TemporaryDirectory(prefix=f"zbudfs-test-{os.getpid()}-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        with mounted(Path(folder, "mnt")) as mountpoint:
            yield mountpoint


def wakeups(pid: int) -> int:
    """Return how often the serving thread has waited: each request that comes alone wakes it."""
    text = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def test_no_request_of_others_reaches_the_daemon(mnt: Path) -> None:
    """No call of theirs succeeds, and the daemon does not wake up."""
    pid = server_of(mnt)
    failed = []
    for name, attack in ATTACKS.items():
        before, began = wakeups(pid), time.monotonic()
        reached = as_nobody(mnt, attack)
        woken = wakeups(pid) - before
        if reached or woken > 300 + 50 * (time.monotonic() - began):  # more often than by itself
            failed.append((name, reached, woken))
    assert failed == []


def test_the_mount_itself_does_what_it_did(mnt: Path) -> None:
    """Root sees everything, and a loop device, whose requests come from a kernel thread, reads and writes."""
    assert all_stats(mnt)["size_bytes"] == 64 << 20
    with looped(mnt / "swapfile") as device:
        with opened(device) as fd:
            assert os.pwrite(fd, b"page" * 1024, PAGE) == PAGE
            os.fsync(fd)
        tool("blkid", "--probe", "--offset", "0", "--info", device)
    with opened(mnt / "swapfile") as fd:
        assert os.pread(fd, PAGE, PAGE) == b"page" * 1024


def test_root_with_another_group(mnt: Path) -> None:
    """The kernel refuses such a process. The commands that need root take the group 0, and work."""
    command = [sys.executable, "-m", "zbudfs", "set", "level=2", str(mnt)]
    run = subprocess.run(
        command, group=NOBODY, extra_groups=(), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert (mnt / "control/level").read_text() == "2\n"
    listed = subprocess.run(
        ["ls", mnt], group=NOBODY, extra_groups=(), capture_output=True, timeout=LIMIT_SECONDS, check=False
    )
    assert listed.returncode != 0


def test_a_mount_of_another_user_is_not_ours() -> None:
    """A FUSE filesystem of the same subtype that a user has mounted is ignored, whatever the name of its source."""
    lines = (
        b"40 22 0:51 / /mnt/ours rw - fuse.zbudfs any\\040name rw,user_id=0,group_id=0,default_permissions\n"
        b"41 22 0:52 / /home/eve/a rw - fuse.zbudfs zbudfs rw,user_id=1000,group_id=1000,allow_other\n"
        b"42 22 0:53 / /home/eve/b rw - fuse.zbudfs user_id=0,x rw,user_id=1000,group_id=0\n"
        b"43 22 0:54 / /mnt/old rw - fuse.zbudfs zbudfs rw,user_id=0,group_id=0,allow_other\n"
    )
    assert [(mount.mountpoint, mount.admits_others) for mount in parse_mountinfo(lines)] == [
        ("/mnt/ours", False),
        ("/mnt/old", True),
    ]
