# SPDX-License-Identifier: MIT
"""The space in which a backing lies: how room for blocks is added and given back. Blocking calls, one thread at a time.

    GrowingFile   grows as needed and gives room back. New room is allocated and then written over with zeros, so that a
                  later write changes no metadata of the file system
    FixedFile     keeps the size with which it was made
    BlockDevice   a partition, a volume, a whole disk; all of it is there from the start, and it can be discarded

A block device has room at both ends that holds zeros and no blocks. So no tool takes the content of a page for the label of
a file system.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import time
from typing import Final

from zbudfs.core.block_map import SEGMENT_BLOCKS
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.arena import fallocate, punch_hole

SEGMENT_BYTES: Final = SEGMENT_BLOCKS << PAGE_SHIFT
NO_LIMIT: Final = 1 << 40
"""Most segments of a file that grows."""
MAGIC: Final = b"zbudfs backing file 1\n"
FIXED_MARK: Final = b"fixed size\n"
"""The text after MAGIC of a file that keeps its size."""

DEVICE_START: Final = 4 << 20
"""Bytes without blocks at the start of a device: no label that blkid knows lies behind them."""
DEVICE_END: Final = 1 << 20
"""Bytes without blocks at its end, where RAID, GPT and ZFS keep copies of their labels."""

RESERVE_PART: Final = 50
RESERVE_MOST_BYTES: Final = 1 << 30
"""A file that grows leaves a fiftieth of its file system to other programs, and 1 GiB at most."""

DISCARD_SECONDS: Final = 10.0
"""Longest time for discarding a whole device, at mount and at unmount. Arbitrary: the discard is optional."""
_DISCARD_STEP_BYTES: Final = 1 << 30

_FALLOC_FL_ZERO_RANGE: Final = 0x10
_BLKGETSIZE64: Final = 0x80081272
_BLKDISCARD: Final = 0x1277
_NOT_SUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


class GrowingFile:
    """A file that grows. The base class of the other spaces."""

    noun = "file"
    start = 0
    """Offset of block 0, in bytes."""
    trim_segments = 1
    """Number of neighbouring segments that must be free before room can be given back; 0: never."""
    zeros_per_segment = SEGMENT_BYTES
    """Bytes that are written to make a segment ready."""

    def __init__(self, fd: int, *, direct: bool) -> None:
        self._fd = fd
        self._direct = direct
        self.nr_segments = NO_LIMIT
        """Most segments that the space can have."""
        self.zeros_written = 0
        """Bytes of zeros written so far."""
        # Aligned, as O_DIRECT requires, and populated: a write must not wait for memory.
        self._zeros = memoryview(mmap.mmap(-1, SEGMENT_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))

    def has_room(self, count: int) -> bool:
        """Return whether the file system has room for `count` more segments, beside the reserve for other programs."""
        system = os.fstatvfs(self._fd)
        whole = system.f_blocks * system.f_frsize
        reserve = min(whole // RESERVE_PART, RESERVE_MOST_BYTES)
        return not whole or system.f_bavail * system.f_frsize >= reserve + count * SEGMENT_BYTES

    def make_ready(self, first: int, count: int) -> None:
        """Allocate segments and write them over. OSError; then the allocated room is given back."""
        offset, length = first * SEGMENT_BYTES, count * SEGMENT_BYTES
        try:
            try:
                fallocate(self._fd, 0, offset, length)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise  # the disk is full: zeros would take the rest of it from other programs
            skip = PAGE_SIZE if first == 0 else 0  # for the header
            self._write_zeros(offset + skip, length - skip)
        except OSError:
            if first:
                with contextlib.suppress(OSError):
                    self._undo(offset, length)
            raise

    def _undo(self, offset: int, length: int) -> None:
        punch_hole(self._fd, offset, length)

    def _write_zeros(self, offset: int, length: int) -> None:
        flags = 0 if self._direct else os.RWF_DSYNC
        end = offset + length
        while offset < end:
            written = os.pwritev(self._fd, [self._zeros[: end - offset]], offset, flags)
            if written <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if not self._direct:
                with contextlib.suppress(OSError):  # the call is advice
                    os.posix_fadvise(self._fd, offset, written, os.POSIX_FADV_DONTNEED)
            self.zeros_written += written
            offset += written

    def give_back(self, first: int, count: int) -> None:
        """Give segments back: a multiple of `trim_segments`, aligned to it. OSError."""
        punch_hole(self._fd, first * SEGMENT_BYTES, count * SEGMENT_BYTES)

    def empty(self) -> None:
        """Remove all content, which may be memory of programs. OSError."""
        os.ftruncate(self._fd, 0)

    def end_bytes(self) -> int:
        """Return the present size of the file or device in bytes. OSError."""
        return os.fstat(self._fd).st_size


class FixedFile(GrowingFile):
    """A file of `size_bytes` bytes that keeps its size."""

    trim_segments = 0

    def __init__(self, fd: int, size_bytes: int, *, direct: bool) -> None:
        super().__init__(fd, direct=direct)
        self._size_bytes = size_bytes
        self.nr_segments = size_bytes // SEGMENT_BYTES

    def has_room(self, count: int) -> bool:
        """Return True: all the room of the file is there from the start."""
        return True

    def _undo(self, offset: int, length: int) -> None:
        pass

    def empty(self) -> None:
        """Replace all content by zeros; the room stays allocated."""
        try:
            fallocate(self._fd, _FALLOC_FL_ZERO_RANGE, 0, self._size_bytes)
        except OSError:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self._size_bytes)
            with contextlib.suppress(OSError):
                fallocate(self._fd, 0, 0, self._size_bytes)


class BlockDevice(GrowingFile):
    """A block device, opened for this program alone."""

    noun = "device"
    start = DEVICE_START
    zeros_per_segment = 0

    def __init__(self, fd: int, *, direct: bool, sys: str = "/sys") -> None:
        super().__init__(fd, direct=direct)
        self.nr_segments = max(0, (self.end_bytes() - DEVICE_START - DEVICE_END) // SEGMENT_BYTES)
        most, self._granularity = _discard_limits(os.fstat(fd).st_rdev, sys)
        self.trim_segments = -(-self._granularity // SEGMENT_BYTES) if most else 0

    def has_room(self, count: int) -> bool:
        """Return True: all the room of the device is there from the start."""
        return True

    def make_ready(self, first: int, count: int) -> None:
        """Do nothing: a device needs no preparation."""

    def give_back(self, first: int, count: int) -> None:
        """Discard segments."""
        self._discard(DEVICE_START + first * SEGMENT_BYTES, count * SEGMENT_BYTES)

    def _discard(self, offset: int, length: int) -> None:
        start = -(-offset // self._granularity) * self._granularity
        end = (offset + length) // self._granularity * self._granularity
        if end > start:
            fcntl.ioctl(self._fd, _BLKDISCARD, start.to_bytes(8, "little") + (end - start).to_bytes(8, "little"))

    def discard_all(self) -> None:
        """Discard the device, as far as DISCARD_SECONDS allow. A device without discards keeps its content."""
        end = time.monotonic() + DISCARD_SECONDS
        size = self.end_bytes() if self.trim_segments else 0
        with contextlib.suppress(OSError):
            for offset in range(0, size, _DISCARD_STEP_BYTES):
                if time.monotonic() > end:
                    break
                self._discard(offset, min(_DISCARD_STEP_BYTES, size - offset))

    def empty(self) -> None:
        """Discard the whole device, and write zeros over the header."""
        self.discard_all()
        os.pwritev(self._fd, [self._zeros[:PAGE_SIZE]], 0)
        os.fsync(self._fd)

    def end_bytes(self) -> int:
        """Return the present size of the device in bytes."""
        return int.from_bytes(fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8)), "little")

    def clear_ends(self) -> None:
        """Write zeros over the room at both ends, which destroys any labels there. OSError."""
        size = self.end_bytes()
        tail = size - DEVICE_END
        os.pwritev(self._fd, [bytes(DEVICE_START)], 0)
        os.pwritev(self._fd, [bytes(DEVICE_END)], tail)
        os.fsync(self._fd)


def _discard_limits(number: int, sys: str) -> tuple[int, int]:
    """Return (most bytes of a discard, granularity) of a device; (0, PAGE_SIZE) if it has no discards."""
    folder = f"{sys}/dev/block/{os.major(number)}:{os.minor(number)}"
    for queue in (f"{folder}/queue", f"{folder}/../queue"):  # a partition has the queue of its disk
        try:
            with open(f"{queue}/discard_max_bytes") as most, open(f"{queue}/discard_granularity") as granularity:
                return int(most.read()), max(int(granularity.read()), PAGE_SIZE)
        except (OSError, ValueError):
            continue
    return 0, PAGE_SIZE


def space_of(fd: int, *, direct: bool, is_fixed: bool | None = None) -> GrowingFile:
    """Return the space of a backing that is in use. OSError.

    `is_fixed` is whether it is a file of fixed size; None: read its header. A caller that knows it avoids a read, since the
    disk may not answer.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return BlockDevice(fd, direct=direct)
    if is_fixed is not None:
        return FixedFile(fd, status.st_size, direct=direct) if is_fixed else GrowingFile(fd, direct=direct)
    page = mmap.mmap(-1, PAGE_SIZE)
    os.preadv(fd, [page], 0)
    if page[: len(MAGIC) + len(FIXED_MARK)] == MAGIC + FIXED_MARK:
        return FixedFile(fd, status.st_size, direct=direct)
    return GrowingFile(fd, direct=direct)
