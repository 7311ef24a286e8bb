# SPDX-License-Identifier: MIT
"""The claim of a backing: the daemon must be its only user, and must not destroy data of another program.

    owner, links, folders    root's (or the daemon's), one name, and no other user can put another file in its place
    users                    no other zbudfs, no mount, no swap, no driver
    content                  none, or an earlier backing; any other content is named and refused

`force` overrides the first and the last check, never the second.

An existing file is replaced by a new one of the same kind, created with O_EXCL, so that no other program can have it open.
"""

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field
from typing import Final

from zbudfs.core.errors import BackingError, BackingFull, LayoutError
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.arena import fallocate, file_system_number
from zbudfs.store.files import read_text
from zbudfs.store.foreign import describe
from zbudfs.store.space import DEVICE_END, DEVICE_START, FIXED_MARK, MAGIC, SEGMENT_BYTES, BlockDevice, space_of

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
INSIST: Final = "insist with --force-backing yes"
LEAST_SEGMENTS: Final = 4
"""Fewest segments of a backing of a fixed size: 1 MiB."""

SWAPS: Final = "/proc/swaps"
_BTRFS: Final = 0x9123683E
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW_FL: Final = 0x00800000
_BLKSSZGET: Final = 0x1268


@dataclass
class Claimed:
    """An open file or device that is claimed, with its header written."""

    fd: int
    warnings: list[str] = field(default_factory=list)


def shown(path: str) -> str:
    """Return a path for a message of one line."""
    return path if path.isprintable() else repr(path)


def claim(path: str, *, force: bool = False) -> Claimed:
    """Open and claim the file or block device at `path`; a missing file is created. BackingError, LayoutError."""
    real = path
    try:
        status: os.stat_result | None = os.lstat(path)
        if status is not None and stat.S_ISLNK(status.st_mode):
            real = os.path.realpath(path)
            status = os.stat(real) if os.path.exists(real) else None
            if status is None or not stat.S_ISBLK(status.st_mode):
                raise BackingError(
                    f"cannot open the backing file {shown(path)}: it is a symbolic link; name the file itself"
                )
    except FileNotFoundError:
        status = None
    except OSError as error:
        raise BackingError(f"cannot open the backing file {shown(path)}: {error.strerror}") from None
    doubt = _doubt(path, status) or (_doubt(real, status) if real != path else None)
    if doubt and not force:
        raise BackingError(f"the backing {shown(path)} is refused: {doubt}; name another place, or {INSIST}")
    if status is not None and stat.S_ISBLK(status.st_mode):
        return _claim_device(path, real, status, force=force)
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise BackingError(f"the backing {shown(path)} is neither a regular file nor a block device")
    return _claim_file(path, status, force=force)


def empty_left(path: str) -> None:
    """Empty a backing that a dead daemon has left at `path`; do nothing if it is no backing, or in use again. OSError."""
    with contextlib.suppress(BackingError):
        mode = os.stat(path).st_mode
        is_device = stat.S_ISBLK(mode)
        if not is_device and not stat.S_ISREG(mode):
            return
        options = os.O_EXCL if is_device else os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | options)
        try:
            if not is_device:
                _lock(fd, path)
            if os.pread(fd, len(MAGIC), 0) == MAGIC:
                space_of(fd, direct=False).empty()
        finally:
            os.close(fd)


# ---- owners ------------------------------------------------------------------------------------------------------------


def _doubt(path: str, status: os.stat_result | None) -> str | None:
    """Return why other users could control the content of the file or device; None if they cannot."""
    ours = (0, os.geteuid())
    if status is not None:
        if status.st_uid not in ours:
            return f"it belongs to user {status.st_uid}, who could read and change what is stored"
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            return f"the file has {status.st_nlink} names (hard links), and one of them may be another user's"
        if stat.S_ISBLK(status.st_mode) and status.st_mode & stat.S_IWOTH:
            return "every user may write to the device"
    folder = os.path.dirname(os.path.realpath(os.path.dirname(path)) + "/x")
    while True:
        try:
            found = os.stat(folder)
        except OSError as error:
            raise BackingError(f"cannot examine the folder {shown(folder)} of the backing: {error.strerror}") from None
        if found.st_uid not in ours:
            return f"the folder {shown(folder)} belongs to user {found.st_uid}, who could put another file in its place"
        others = stat.S_IWOTH | (stat.S_IWGRP if found.st_gid != 0 else 0)
        if found.st_mode & others and not found.st_mode & stat.S_ISVTX:
            return f"other users may write to the folder {shown(folder)}, and could put another file in its place"
        if folder == "/":
            return None
        folder = os.path.dirname(folder)


# ---- users -------------------------------------------------------------------------------------------------------------


def _refuse_swap(path: str, status: os.stat_result) -> None:
    """Raise BackingError if the file or device is active swap: the kernel keeps pages of programs there."""
    with contextlib.suppress(OSError):
        for line in read_text(SWAPS).splitlines()[1:]:
            with contextlib.suppress(OSError):
                found = os.stat(line.split()[0].encode().decode("unicode_escape"))
                same = (
                    found.st_rdev == status.st_rdev if stat.S_ISBLK(status.st_mode) else os.path.samestat(found, status)
                )
                if same:
                    raise BackingError(f"the backing {shown(path)} is active swap: swapoff it first")


def _user_of_device(number: int) -> str:
    """Return the user of a busy block device, for a sentence. The result is a guess."""
    name = f"{os.major(number)}:{os.minor(number)}"
    with contextlib.suppress(OSError):
        for line in read_text("/proc/self/mountinfo").splitlines():
            if line.split()[2] == name:
                return f"it is mounted on {line.split()[4]}"
    with contextlib.suppress(OSError):
        holders = sorted(os.listdir(f"/sys/dev/block/{name}/holders"))
        if holders:
            return f"it is part of {', '.join(f'/dev/{each}' for each in holders)}"
    return "it is in use: another zbudfs, a mount in another namespace, or another driver uses it, or a part of it"


# ---- a file ------------------------------------------------------------------------------------------------------------


def _claim_file(path: str, status: os.stat_result | None, *, force: bool) -> Claimed:
    if status is None:
        return _create(path, None)
    try:
        old_fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BackingError(f"cannot open the backing file {shown(path)}: {error.strerror}") from None
    try:
        status = os.fstat(old_fd)
        _lock(old_fd, path)
        _refuse_swap(path, status)
        size = _fixed_size(old_fd, path, status, force=force)
        try:
            os.unlink(path)
        except OSError:  # the file is a mount of its own, as in containers, and cannot be replaced
            return _prepare(os.dup(old_fd), path, size, created=False)
        return _create(path, size)
    finally:
        os.close(old_fd)


def _lock(fd: int, path: str) -> None:
    """Lock the file that is at `path` now. BackingError if another zbudfs has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        locked = False
    if not locked:
        raise BackingError(f"the backing file {shown(path)} is in use by another zbudfs") from None


def _fixed_size(fd: int, path: str, status: os.stat_result, *, force: bool) -> int | None:
    """Return the size that a file keeps, None if it grows. LayoutError if it holds data of another program."""
    start = os.pread(fd, len(MAGIC) + len(FIXED_MARK), 0)
    if not status.st_size or start.startswith(MAGIC):
        return status.st_size if start == MAGIC + FIXED_MARK else None
    if not force and _holds_data(fd):
        raise LayoutError(
            f"{shown(path)} exists and is not a backing file of this version of zbudfs: it holds"
            f" {describe(path, device=False)}; remove it or name another file, or {INSIST}, which destroys what it holds"
        )
    if status.st_size < LEAST_SEGMENTS * SEGMENT_BYTES:
        raise BackingError(
            f"the backing file {shown(path)} has {status.st_size} bytes and keeps that size: make it 1 MiB or more, or"
            " remove it, and zbudfs creates one that grows"
        )
    return status.st_size


def _holds_data(fd: int) -> bool:
    """Return whether anything was ever written to a file. Room that was only allocated is no data.

    Pages of it that another program has read are in the page cache, and would count as data; so they are dropped first.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def _create(path: str, size: int | None) -> Claimed:
    """Create a file that no other program can have open; of `size` bytes, or one that grows. BackingError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackingError(f"the backing file {shown(path)} cannot be created: {error.strerror}") from None
    return _prepare(fd, path, size, created=True)


def _prepare(fd: int, path: str, size: int | None, *, created: bool) -> Claimed:
    """Give a file its mode, its size and its header. If that fails, a file that was created is removed. BackingError."""
    claimed = Claimed(fd)
    try:
        _lock(fd, path)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 0)
        _without_copy_on_write(claimed, path)
        if size is not None:
            os.ftruncate(fd, size)
            try:
                fallocate(fd, 0, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        os.pwrite(fd, (MAGIC + (FIXED_MARK if size is not None else b"")).ljust(PAGE_SIZE, b"\0"), 0)
        os.fsync(fd)
    except BaseException as error:
        if created:
            with contextlib.suppress(OSError):
                os.unlink(path)
        os.close(fd)
        if isinstance(error, OSError):
            kind = BackingFull if error.errno in FULL else BackingError
            raise kind(f"the backing file {shown(path)} cannot be prepared: {error.strerror}") from None
        raise
    return claimed


def _without_copy_on_write(claimed: Claimed, path: str) -> None:
    """Make btrfs write in place: its copies and checksums use the page cache, also with direct I/O."""
    if file_system_number(claimed.fd) != _BTRFS:
        return
    try:
        flags = int.from_bytes(fcntl.ioctl(claimed.fd, _FS_IOC_GETFLAGS, bytes(8))[:4], "little")
        fcntl.ioctl(claimed.fd, _FS_IOC_SETFLAGS, (flags | _FS_NOCOW_FL).to_bytes(8, "little"))
    except OSError as error:
        claimed.warnings.append(
            f"the file system of {shown(path)} is btrfs, which refuses to write the file in place (NOCOW:"
            f" {error.strerror}): writeback goes through the page cache, which needs memory when there is little;"
            " put the backing file on ext4 or xfs"
        )


# ---- a device ----------------------------------------------------------------------------------------------------------


def _claim_device(path: str, real: str, status: os.stat_result, *, force: bool) -> Claimed:
    name = f"the backing device {shown(path)}"
    _refuse_swap(path, status)
    try:
        fd = os.open(real, os.O_RDWR | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        why = _user_of_device(status.st_rdev) if error.errno == errno.EBUSY else error.strerror
        raise BackingError(f"{name} cannot be used: {why}") from None
    try:
        if os.fstat(fd).st_rdev != status.st_rdev:
            raise BackingError(f"{name} was replaced meanwhile: try again")
        sector = int.from_bytes(fcntl.ioctl(fd, _BLKSSZGET, bytes(4)), "little")
        if sector > PAGE_SIZE:
            raise BackingError(f"{name} has sectors of {sector} bytes: zbudfs writes blocks of {PAGE_SIZE}")
        device = BlockDevice(fd, direct=False)
        if device.nr_segments < LEAST_SEGMENTS:
            least = DEVICE_START + DEVICE_END + LEAST_SEGMENTS * SEGMENT_BYTES
            raise BackingError(f"{name} has {device.end_bytes() >> 20} MiB: it must have {least >> 20} or more")
        if _is_foreign(fd, device.end_bytes()):
            if not force:
                raise LayoutError(
                    f"{name} holds {describe(real, device=True)}: name another one, or, if that is not needed, {INSIST},"
                    " which destroys it"
                )
            device.clear_ends()
        device.discard_all()
        os.pwrite(fd, MAGIC.ljust(PAGE_SIZE, b"\0"), 0)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise BackingError(f"{name} cannot be prepared: {error.strerror}") from None
        raise
    return Claimed(fd)


def _is_foreign(fd: int, size: int) -> bool:
    """Return whether a device has data at its ends, other than the header of an earlier backing."""
    header = os.pread(fd, PAGE_SIZE, 0)
    ends = [os.pread(fd, DEVICE_START - PAGE_SIZE, PAGE_SIZE), os.pread(fd, DEVICE_END, size - DEVICE_END)]
    if header.rstrip(b"\0") not in (MAGIC, b""):
        return True
    return any(each.count(0) != len(each) for each in ends)
