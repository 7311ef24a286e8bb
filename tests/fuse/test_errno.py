# SPDX-License-Identifier: MIT
"""Calls other than reading, writing and discarding the swapfile are refused with the right error.

One mount answers the whole table, and the test shows all wrong answers together. Afterwards nothing has changed, and a
hole can still be punched: a single ENOSYS would have turned that off for the life of the mount.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    MIB,
    PAGE,
    PUNCH,
    PUNCH_HOLE,
    UNSHARE_RANGE,
    ZERO_RANGE,
    aligned,
    fallocate,
    looped,
    opened,
    renameat2,
    stat_of,
)
from tests.support import mounted

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 8 * MIB
START: Final = b"the start of the swapfile"
FS_IOC_GETFLAGS: Final = 0x80086601
FICLONE: Final = 0x40049409
BLKGETSIZE64: Final = 0x80081272
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Place:
    """One mount and its swapfile."""

    mnt: Path
    swapfile: Path
    fd: int
    outside: Path
    """A folder on another file system."""

    def open(self, name: str, flags: int) -> int:
        """Open a file on the mount and close it, and return its size."""
        with opened(self.mnt / name, flags) as fd:
            return os.fstat(fd).st_size


@dataclass(frozen=True, slots=True)
class Error:
    """The expected error of a call."""

    code: int

    def __repr__(self) -> str:
        """Return the name of the error, for the message of a failed test."""
        return errno.errorcode[self.code]


Call = Callable[[Place], object]
"""One system call. The test compares its result, or the OSError that it raises."""


def write(place: Place, length: int, offset: int) -> int:
    """Write some bytes with pwrite(2)."""
    return os.pwrite(place.fd, b"w" * length, offset)


def read(place: Place, length: int, offset: int) -> int:
    """Return the number of bytes that pread(2) reads."""
    return len(os.pread(place.fd, length, offset))


def on_read_only(place: Place, call: Callable[[int], object], name: str = "swapfile") -> object:
    """Call something with a descriptor that is open for reading."""
    with opened(place.mnt / name, os.O_RDONLY) as fd:
        return call(fd)


def copy_out(place: Place) -> int:
    """Copy to another file system with copy_file_range(2)."""
    with opened(place.outside / "copy", os.O_RDWR | os.O_CREAT) as fd:
        return os.copy_file_range(place.fd, fd, PAGE, 0, 0)


def send_out(place: Place) -> bytes:
    """Copy to another file system with sendfile(2)."""
    with opened(place.outside / "sent", os.O_RDWR | os.O_CREAT) as fd:
        assert os.sendfile(fd, place.fd, 0, len(START)) == len(START)
        return os.pread(fd, PAGE, 0)


def copy_within(place: Place) -> bytes:
    """Copy within the swapfile with copy_file_range(2), for which the kernel reads and writes."""
    assert os.copy_file_range(place.fd, place.fd, PAGE, 0, MIB) == PAGE
    copied = os.pread(place.fd, len(START), MIB)
    fallocate(place.fd, PUNCH, MIB, PAGE)
    return copied


def private_map(place: Place) -> tuple[bytes, bytes]:
    """Read a private mapping, then change the file and map it again."""
    with mmap.mmap(place.fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        first = mapping[: len(START)]
    os.pwrite(place.fd, START.upper(), 0)
    with mmap.mmap(place.fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        second = mapping[: len(START)]
    os.pwrite(place.fd, START, 0)
    return first, second


def shared_map(place: Place, protection: int) -> None:
    """Make a shared mapping."""
    mmap.mmap(place.fd, PAGE, mmap.MAP_SHARED, protection).close()


NAMES: Final[dict[str, tuple[Call, object]]] = {
    "truncate to less": (lambda at: os.truncate(at.swapfile, PAGE), Error(errno.EPERM)),
    "truncate to nothing": (lambda at: os.truncate(at.swapfile, 0), Error(errno.EPERM)),
    "truncate to more": (lambda at: os.truncate(at.swapfile, SIZE + PAGE), Error(errno.EPERM)),
    "truncate to what it is": (lambda at: os.truncate(at.swapfile, SIZE), None),
    "ftruncate": (lambda at: os.ftruncate(at.fd, PAGE), Error(errno.EPERM)),
    "truncate stats": (lambda at: os.truncate(at.mnt / "stats/pid", 1), Error(errno.EPERM)),
    "rename": (lambda at: at.swapfile.rename(at.mnt / "other"), Error(errno.EPERM)),
    "rename over": (lambda at: at.swapfile.rename(at.mnt / "stats/pid"), Error(errno.EPERM)),
    "rename directory": (lambda at: (at.mnt / "stats").rename(at.mnt / "other"), Error(errno.EPERM)),
    "rename out": (lambda at: at.swapfile.rename(at.outside / "other"), Error(errno.EXDEV)),
    "rename exchange": (lambda at: renameat2(at.swapfile, at.mnt / "stats", RENAME_EXCHANGE), Error(errno.EPERM)),
    "rename noreplace": (lambda at: renameat2(at.swapfile, at.mnt / "other", RENAME_NOREPLACE), Error(errno.EPERM)),
    "rename whiteout": (lambda at: renameat2(at.swapfile, at.mnt / "other", RENAME_WHITEOUT), Error(errno.EPERM)),
    "link": (lambda at: (at.mnt / "other").hardlink_to(at.swapfile), Error(errno.EPERM)),
    "symlink": (lambda at: (at.mnt / "other").symlink_to("swapfile"), Error(errno.EPERM)),
    "mkdir": (lambda at: (at.mnt / "other").mkdir(), Error(errno.EPERM)),
    "mkdir in stats": (lambda at: (at.mnt / "stats/other").mkdir(), Error(errno.EPERM)),
    "mkdir of what is there": (lambda at: (at.mnt / "stats").mkdir(), Error(errno.EEXIST)),
    "mknod": (lambda at: os.mknod(at.mnt / "other"), Error(errno.EPERM)),
    "mkfifo": (lambda at: os.mkfifo(at.mnt / "other"), Error(errno.EPERM)),
    "unlink": (lambda at: at.swapfile.unlink(), Error(errno.EPERM)),
    "unlink stats": (lambda at: (at.mnt / "stats/pid").unlink(), Error(errno.EPERM)),
    "unlink directory": (lambda at: (at.mnt / "stats").unlink(), Error(errno.EISDIR)),
    "rmdir": (lambda at: (at.mnt / "stats").rmdir(), Error(errno.EPERM)),
    "rmdir of a file": (lambda at: at.swapfile.rmdir(), Error(errno.ENOTDIR)),
    "chmod": (lambda at: at.swapfile.chmod(0o644), Error(errno.EPERM)),
    "chmod stats": (lambda at: (at.mnt / "stats/pid").chmod(0o644), Error(errno.EPERM)),
    "chown": (lambda at: os.chown(at.swapfile, 1, 1), Error(errno.EPERM)),
    "chown to nobody new": (lambda at: os.chown(at.swapfile, -1, -1), None),
    "utime": (lambda at: os.utime(at.swapfile, (1, 2)), None),
    "create": (lambda at: at.open("other", os.O_CREAT | os.O_RDWR), Error(errno.EPERM)),
    "create in stats": (lambda at: at.open("stats/other", os.O_CREAT | os.O_RDWR), Error(errno.EPERM)),
    "create what is there": (lambda at: at.open("swapfile", os.O_CREAT | os.O_RDWR), SIZE),
    "create exclusively": (lambda at: at.open("swapfile", os.O_CREAT | os.O_EXCL | os.O_RDWR), Error(errno.EEXIST)),
    "create without a name": (lambda at: at.open("", os.O_TMPFILE | os.O_RDWR), Error(errno.EOPNOTSUPP)),
    "getxattr": (lambda at: os.getxattr(at.swapfile, "user.other"), Error(errno.EOPNOTSUPP)),
    "getxattr of a capability": (lambda at: os.getxattr(at.swapfile, "security.capability"), Error(errno.EOPNOTSUPP)),
    "setxattr": (lambda at: os.setxattr(at.swapfile, "user.other", b"value"), Error(errno.EOPNOTSUPP)),
    "removexattr": (lambda at: os.removexattr(at.swapfile, "user.other"), Error(errno.EOPNOTSUPP)),
    "listxattr": (lambda at: os.listxattr(at.swapfile), Error(errno.EOPNOTSUPP)),
    "no such file": (lambda at: (at.mnt / "other").stat(), Error(errno.ENOENT)),
    "no such statistic": (lambda at: (at.mnt / "stats/other").stat(), Error(errno.ENOENT)),
    "below a file": (lambda at: (at.mnt / "swapfile/other").stat(), Error(errno.ENOTDIR)),
    "readlink": (lambda at: at.swapfile.readlink(), Error(errno.EINVAL)),
    "execute": (lambda at: os.execv(at.swapfile, ["swapfile"]), Error(errno.EACCES)),
}
"""Calls on names, with the expected result or error."""

OPENING: Final[dict[str, tuple[Call, object]]] = {
    "open stats to write": (lambda at: at.open("stats/pid", os.O_WRONLY), Error(errno.EACCES)),
    "open stats to read and write": (lambda at: at.open("stats/all.json", os.O_RDWR), Error(errno.EACCES)),
    "open stats to append": (lambda at: at.open("stats/pid", os.O_WRONLY | os.O_APPEND), Error(errno.EACCES)),
    "open a directory to write": (lambda at: at.open("stats", os.O_WRONLY), Error(errno.EISDIR)),
    "open the swapfile as a directory": (
        lambda at: at.open("swapfile", os.O_RDONLY | os.O_DIRECTORY),
        Error(errno.ENOTDIR),
    ),
    "open and truncate": (lambda at: at.open("swapfile", os.O_RDWR | os.O_TRUNC), Error(errno.EPERM)),
    "create and truncate": (lambda at: at.open("swapfile", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), Error(errno.EPERM)),
    "the size afterwards": (lambda at: at.open("swapfile", os.O_RDONLY), SIZE),
}
"""Flags with which files are opened."""

DATA: Final[dict[str, tuple[Call, object]]] = {
    "write at the end": (lambda at: write(at, 1, SIZE), Error(errno.ENOSPC)),
    "write a page at the end": (lambda at: write(at, PAGE, SIZE), Error(errno.ENOSPC)),
    "write across the end": (lambda at: write(at, PAGE, SIZE - PAGE // 2), Error(errno.ENOSPC)),
    "write far beyond the end": (lambda at: write(at, 1, 1 << 62), Error(errno.ENOSPC)),
    "write up to the end": (lambda at: write(at, PAGE, SIZE - PAGE), PAGE),
    "write nothing at the end": (lambda at: write(at, 0, SIZE), 0),
    "write before the start": (lambda at: write(at, 1, -1), Error(errno.EINVAL)),
    "write where no number reaches": (lambda at: write(at, 2, (1 << 63) - 1), Error(errno.EINVAL)),
    "write to a descriptor for reading": (
        lambda at: on_read_only(at, lambda fd: os.pwrite(fd, b"w", 0)),
        Error(errno.EBADF),
    ),
    "read at the end": (lambda at: read(at, 100, SIZE), 0),
    "read across the end": (lambda at: read(at, PAGE, SIZE - 100), 100),
    "read all and more": (lambda at: read(at, SIZE + PAGE, 0), SIZE),
    "read far beyond the end": (lambda at: read(at, 100, 1 << 62), 0),
    "read nothing": (lambda at: read(at, 0, 0), 0),
    "read before the start": (lambda at: read(at, 1, -1), Error(errno.EINVAL)),
    "read a directory": (lambda at: on_read_only(at, lambda fd: os.read(fd, 1), "stats"), Error(errno.EISDIR)),
    "seek to data": (lambda at: os.lseek(at.fd, 5000, os.SEEK_DATA), 5000),
    "seek to a hole": (lambda at: os.lseek(at.fd, 5000, os.SEEK_HOLE), SIZE),
    "seek to data at the end": (lambda at: os.lseek(at.fd, SIZE, os.SEEK_DATA), Error(errno.ENXIO)),
    "seek to a hole at the end": (lambda at: os.lseek(at.fd, SIZE, os.SEEK_HOLE), Error(errno.ENXIO)),
    "seek to the end": (lambda at: os.lseek(at.fd, 0, os.SEEK_END), SIZE),
    "seek before the start": (lambda at: os.lseek(at.fd, -1, os.SEEK_SET), Error(errno.EINVAL)),
    "map shared": (lambda at: shared_map(at, mmap.PROT_READ), Error(errno.ENODEV)),
    "map shared to write": (lambda at: shared_map(at, mmap.PROT_READ | mmap.PROT_WRITE), Error(errno.ENODEV)),
    "map private": (private_map, (START, START.upper())),
    "copy_file_range out": (copy_out, Error(errno.EXDEV)),
    "copy_file_range within": (copy_within, START),
    "copy_file_range over itself": (lambda at: os.copy_file_range(at.fd, at.fd, PAGE, 0, 100), Error(errno.EINVAL)),
    "sendfile": (send_out, START),
    "ioctl": (lambda at: fcntl.ioctl(at.fd, 0x1234), Error(errno.ENOTTY)),
    "ioctl of file flags": (lambda at: fcntl.ioctl(at.fd, FS_IOC_GETFLAGS, bytes(8)), Error(errno.ENOTTY)),
    "ioctl of block devices": (lambda at: fcntl.ioctl(at.fd, BLKGETSIZE64, bytes(8)), Error(errno.ENOTTY)),
    "ioctl to clone": (lambda at: fcntl.ioctl(at.fd, FICLONE, at.fd), Error(errno.EOPNOTSUPP)),
    "fsync": (lambda at: os.fsync(at.fd), None),
    "fdatasync": (lambda at: os.fdatasync(at.fd), None),
    "fsync of a directory": (lambda at: on_read_only(at, os.fsync, "stats"), None),
    "flock": (lambda at: fcntl.flock(at.fd, fcntl.LOCK_EX | fcntl.LOCK_NB), None),
}
"""Calls on an open swapfile."""


def refused(mode: int) -> tuple[Call, object]:
    """Return a call of fallocate(2) with a mode that is not supported."""
    return lambda at: fallocate(at.fd, mode, 0, PAGE), Error(errno.EOPNOTSUPP)


def discard(mode: int, offset: int, length: int, expected: object = None) -> tuple[Call, object]:
    """Return a call of fallocate(2) with a supported mode."""
    return lambda at: fallocate(at.fd, mode, offset, length), expected


FALLOCATE: Final[dict[str, tuple[Call, object]]] = {
    "allocate": refused(0),
    "allocate and keep the size": refused(KEEP_SIZE),
    "punch and change the size": refused(PUNCH_HOLE),
    "collapse": refused(COLLAPSE_RANGE),
    "insert": refused(INSERT_RANGE),
    "unshare": refused(UNSHARE_RANGE),
    "unshare and keep the size": refused(UNSHARE_RANGE | KEEP_SIZE),
    "punch and zero": refused(PUNCH | ZERO_RANGE),
    "a mode of tomorrow": refused(0x4000_0000),
    "punch nothing": discard(PUNCH, 0, 0, Error(errno.EINVAL)),
    "punch before the start": discard(PUNCH, -1, 10, Error(errno.EINVAL)),
    "punch backwards": discard(PUNCH, PAGE, -1, Error(errno.EINVAL)),
    "punch where no number reaches": discard(PUNCH, (1 << 63) - PAGE, 2 * PAGE, Error(errno.EFBIG)),
    "punch across the end": discard(PUNCH, SIZE - PAGE, 8 * PAGE),
    "punch beyond the end": discard(PUNCH, SIZE, PAGE),
    "punch far beyond the end": discard(PUNCH, 1 << 60, 1 << 60),
    "punch one byte": discard(PUNCH, SIZE - 1, 1),
    "zero across the end": discard(ZERO_RANGE, SIZE - PAGE, 2 * PAGE, Error(errno.EFBIG)),
    "zero beyond the end": discard(ZERO_RANGE, SIZE, 1, Error(errno.EFBIG)),
    "zero up to the end": discard(ZERO_RANGE, SIZE - PAGE, PAGE),
    "zero across the end and keep the size": discard(ZERO_RANGE | KEEP_SIZE, SIZE - PAGE, 2 * PAGE),
    "zero beyond the end and keep the size": discard(ZERO_RANGE | KEEP_SIZE, SIZE, PAGE),
    "on a descriptor for reading": (
        lambda at: on_read_only(at, lambda fd: fallocate(fd, PUNCH, 0, 1)),
        Error(errno.EBADF),
    ),
    "on stats": (lambda at: on_read_only(at, lambda fd: fallocate(fd, PUNCH, 0, 1), "stats/pid"), Error(errno.EBADF)),
}
"""The modes and ranges of fallocate(2)."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return a small mount. After the test it must be unchanged, and punching holes must still work."""
    outside = tmp_path / "outside"
    outside.mkdir()
    with (
        mounted(tmp_path / "mnt", "--size", str(SIZE), "--pool", "4M", writers=2) as mnt,
        opened(mnt / "swapfile") as fd,
    ):
        os.pwrite(fd, START, 0)
        yield Place(mnt, mnt / "swapfile", fd, outside)
        assert os.pread(fd, len(START), 0) == START
        assert os.fstat(fd).st_size == SIZE
        assert {path.name for path in mnt.iterdir()} == {"control", "stats", "swapfile"}
        assert_punching_works(mnt, fd)
        assert "error:" not in (mnt / "stats/log").read_text()


def assert_punching_works(mnt: Path, fd: int) -> None:
    """Punch and zero, and check that the pages are free."""
    for mode in (PUNCH, ZERO_RANGE):
        os.pwrite(fd, b"0123456789abcdef" * (16 * PAGE // 16), MIB)
        before = stat_of(mnt, "stored_pages")
        fallocate(fd, mode, MIB, 16 * PAGE)
        assert stat_of(mnt, "stored_pages") == before - 16
        assert os.pread(fd, 16 * PAGE, MIB) == bytes(16 * PAGE)


def outcome(call: Call, place: Place) -> object:
    """Return the result of a call, or its error."""
    try:
        return call(place)
    except OSError as error:
        return Error(error.errno or 0)


def assert_answers(table: dict[str, tuple[Call, object]], place: Place) -> None:
    """Make all calls of a table, and compare all results together."""
    found = {name: outcome(call, place) for name, (call, _) in table.items()}
    assert found == {name: expected for name, (_, expected) in table.items()}


@pytest.mark.parametrize("table", [NAMES, OPENING, DATA], ids=["names", "opening", "data"])
def test_calls(table: dict[str, tuple[Call, object]], place: Place) -> None:
    """Each call of the table gives the expected result, and nothing has changed afterwards."""
    assert_answers(table, place)


def test_fallocate(place: Place) -> None:
    """Each mode and range gives the expected result, and fallocate still works after each single call."""
    for name, row in FALLOCATE.items():
        assert_answers({name: row}, place)
        assert_punching_works(place.mnt, place.fd)


def test_a_refused_write_changes_nothing(place: Place) -> None:
    """A write across the end stores no byte, not even those that would fit."""
    os.pwrite(place.fd, b"a" * PAGE, SIZE - PAGE)
    with pytest.raises(OSError, match="No space left"):
        os.pwrite(place.fd, b"b" * PAGE, SIZE - 100)
    assert os.pread(place.fd, PAGE, SIZE - PAGE) == b"a" * PAGE


@pytest.mark.needs("loop")
def test_a_truncation_does_not_disturb_readers(place: Place) -> None:
    """An attempt to truncate the swapfile, like that of `dd of=swapfile`, does not disturb a loop device on it."""
    with (
        looped(place.swapfile) as device,
        opened(device, os.O_RDONLY | os.O_DIRECT) as fd,
        aligned(bytes(PAGE)) as page,
    ):
        assert os.preadv(fd, [page], 0) == PAGE
        for flags in (os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
            with contextlib.suppress(OSError):
                os.close(os.open(place.swapfile, flags))
            assert os.preadv(fd, [page], 0) == PAGE
            assert page[: len(START)] == START
