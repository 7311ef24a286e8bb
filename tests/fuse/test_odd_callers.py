# SPDX-License-Identifier: MIT
"""Each call on each node of the mount, by root and another user, in random order, has an answer and does no harm."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import MIB, PAGE, PUNCH, all_stats, fallocate, opened, read_everything
from tests.support import mounted

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 4 * MIB
NOBODY: Final = 65534
CALLS_NR: Final = 3000

_libc: Final = ctypes.CDLL(None, use_errno=True)


def with_fd(flags: int, call: Callable[[int], object]) -> Callable[[Path], object]:
    """Return a function that opens a path and calls `call` with the descriptor."""

    def act(path: Path) -> object:
        with opened(path, flags | os.O_NONBLOCK) as fd:
            return call(fd)

    return act


def map_it(path: Path, flags: int, protection: int) -> bytes:
    """Map a file and read from the mapping."""
    how = os.O_RDWR if protection & mmap.PROT_WRITE else os.O_RDONLY
    with opened(path, how) as fd, mmap.mmap(fd, PAGE, flags, protection) as memory:
        return memory[:10]


def ioctl(number: int) -> Callable[[int], object]:
    """Return a call of ioctl with a buffer."""
    return lambda fd: fcntl.ioctl(fd, number, bytes(128))


def calls(source: random.Random, outside: Path) -> dict[str, Callable[[Path], object]]:
    """Return all calls on a path. The test ignores their results, but each must end."""
    number = source.choice((0, 1, PAGE, SIZE - 1, SIZE, SIZE + 1, 1 << 40, (1 << 63) - 1))
    mode = source.choice((0, 1, 2, PUNCH, 0x08, 0x10, 0x11, 0x20, 0x40, 0x7F, PUNCH | 0x10))
    name = f"user.{source.randrange(3)}"
    other = source.choice((outside / "other", outside))
    return {
        "stat": lambda path: (path.stat(), path.lstat()),
        "access": lambda path: os.access(path, source.randrange(8)),
        "chmod": lambda path: path.chmod(source.randrange(0o7777)),
        "chown": lambda path: os.chown(path, source.choice((0, NOBODY)), source.choice((0, NOBODY))),
        "utime": lambda path: os.utime(path, (number % (1 << 31), 0)),
        "truncate": lambda path: os.truncate(path, number),
        "rename": lambda path: path.rename(other / "x"),
        "rename here": lambda path: path.rename(path.parent / "renamed"),
        "link": lambda path: os.link(path, path.parent / "link"),
        "link out": lambda path: os.link(path, outside / "link"),
        "symlink": lambda path: (path / "symlink").symlink_to(path),
        "readlink": os.readlink,
        "unlink": os.unlink,
        "rmdir": os.rmdir,
        "mkdir": lambda path: (path / "folder").mkdir(),
        "mknod": lambda path: os.mknod(path / "node", 0o600 | source.choice((0o100000, 0o010000, 0o020000)), 0x103),
        "create": lambda path: os.close(os.open(path / "new", os.O_CREAT | os.O_RDWR, 0o600)),
        "tmpfile": lambda path: os.close(os.open(path, os.O_TMPFILE | os.O_RDWR, 0o600)),
        "getxattr": lambda path: os.getxattr(path, name),
        "setxattr": lambda path: os.setxattr(path, name, b"value"),
        "capability": lambda path: os.setxattr(path, "security.capability", b"\1\0\0\2" + bytes(16)),
        "listxattr": os.listxattr,
        "removexattr": lambda path: os.removexattr(path, name),
        "statvfs": os.statvfs,
        "listdir": lambda path: sorted(os.listdir(path)),  # noqa: PTH208
        "open": lambda path: os.close(os.open(path, source.randrange(1 << 22) & ~os.O_CREAT & ~os.O_ASYNC, 0o600)),
        "read": with_fd(os.O_RDONLY, lambda fd: os.pread(fd, PAGE, number)),
        "hole": with_fd(os.O_RDONLY, lambda fd: os.lseek(fd, number, os.SEEK_HOLE)),
        "data": with_fd(os.O_RDONLY, lambda fd: os.lseek(fd, number, os.SEEK_DATA)),
        "end": with_fd(os.O_RDONLY, lambda fd: os.lseek(fd, 0, os.SEEK_END)),
        "write behind": with_fd(os.O_WRONLY, lambda fd: os.pwrite(fd, b"x" * 100, SIZE + number % (1 << 40))),
        "append": with_fd(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"x" * 100)),
        "fallocate": with_fd(os.O_RDWR, lambda fd: fallocate(fd, mode, SIZE, max(1, number % (1 << 40)))),
        "fsync": with_fd(os.O_RDONLY, os.fsync),
        "lock": with_fd(os.O_RDWR, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)),
        "record lock": with_fd(
            os.O_RDWR, lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, number % 1000)
        ),
        "lease": with_fd(os.O_RDONLY, lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
        "map shared": lambda path: map_it(path, mmap.MAP_SHARED, mmap.PROT_READ),
        "map to write": lambda path: map_it(path, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        "map private": lambda path: map_it(path, mmap.MAP_PRIVATE, mmap.PROT_READ),
        **{
            f"ioctl {each:#x}": with_fd(os.O_RDONLY, ioctl(each))
            for each in (0x80086601, 0x40086602, 0x1277, 0x80081272, 0xC0045877, 0x5421, 0x40049409, 0xC020660B)
        },
    }


def all_nodes(mountpoint: Path) -> list[Path]:
    """Return the mountpoint, all nodes below it, and names that do not exist."""
    found = [mountpoint, *sorted(mountpoint.rglob("*"))]
    return [*found, mountpoint / "missing", mountpoint / "swapfile/missing", mountpoint / ("n" * 300)]


def try_all(mountpoint: Path, outside: Path, seed: int, user: int) -> None:
    """Make random calls on random nodes in a process of this user. An unexpected exception gives a status other than 0."""
    source = random.Random(seed)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # the signal of a broken lease
    nodes = all_nodes(mountpoint)
    heavy = [path for path in nodes if path.name == "swapfile"] * 10 + [mountpoint] * 5
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for _ in range(CALLS_NR):
        path = source.choice(nodes + heavy)
        possible = calls(source, outside)
        name = source.choice(sorted(possible))
        try:
            possible[name](path)
        except (OSError, ValueError, OverflowError) as error:
            code = getattr(error, "errno", None)
            if code in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENOSYS, errno.ETIMEDOUT):
                raise AssertionError(f"{name} on {path}: {error}") from error
        else:
            if user and path.name == "swapfile" and name in ("read", "write behind", "map private", "fsync"):
                raise AssertionError(f"{name}: nobody may do that")


def test_every_call_on_every_node(tmp_path: Path) -> None:
    """The daemon, its tree and the content of the swapfile are the same as before, to the byte."""
    outside = tmp_path / "outside"
    (outside / "other").mkdir(parents=True)
    with mounted(tmp_path / "mnt", "--size", str(SIZE), "--backing", tmp_path / "backing") as mountpoint:
        content = random.Random(5).randbytes(SIZE)
        with opened(mountpoint / "swapfile") as fd:
            for at in range(0, SIZE, MIB):
                os.pwrite(fd, content[at : at + MIB], at)
        before = all_stats(mountpoint)
        tree = [
            (str(path), path.stat().st_mode, path.stat().st_uid, path.stat().st_ino) for path in mountpoint.rglob("*")
        ]
        children = []
        for seed, user in enumerate((0, NOBODY, 0, NOBODY)):
            pid = os.fork()
            if not pid:
                status = 1
                try:
                    with contextlib.suppress(BrokenPipeError):
                        try_all(mountpoint, outside, seed, user)
                    status = 0
                except BaseException as error:
                    os.write(2, f"{error!r}\n".encode())
                finally:
                    os._exit(status)
            children.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
        after = all_stats(mountpoint)
        for name in ("worker_pid", "recoveries", "lost_pages", "size_bytes", "open_swapfiles", "stored_pages"):
            assert after[name] == before[name], name
        assert tree == [
            (str(path), path.stat().st_mode, path.stat().st_uid, path.stat().st_ino) for path in mountpoint.rglob("*")
        ]
        with opened(mountpoint / "swapfile") as fd:
            assert read_everything(fd, SIZE) == content
        assert "Traceback" not in (mountpoint / "stats/log").read_text()
