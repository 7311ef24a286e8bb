# SPDX-License-Identifier: MIT
"""Memory that the daemon controls page by page: mapped at its full size at once, populated in steps.

A page fault at the wrong moment can hang a daemon in the swap path: the kernel looks for memory, and the memory that it
finds waits for this daemon. So no page of an arena is touched before `populate` has allocated it, in a thread that may wait.
Only `release` frees pages. The memory is shared, not anonymous, so that holes can be punched while it is locked. It outlives
the process: children of the process that made it have it mapped, and if it is a file, any other process can open it.
"""

import ctypes
import mmap
import os
from typing import Final

from zbudfs.core.errors import LayoutError

_MADV_DONTDUMP: Final = 16
_MADV_POPULATE_WRITE: Final = 23
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)  # calls through it release the GIL
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _page_bounds(offset: int, length: int) -> tuple[int, int]:
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    return start, -(-(offset + length) // mmap.PAGESIZE) * mmap.PAGESIZE - start


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2) with a mode, which the os module lacks. Releases the GIL. OSError."""
    if _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the bytes `offset` .. `offset + length` of a file back to the file system. OSError if it cannot punch holes."""
    fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)


def file_system_number(fd: int) -> int:
    """Return the type number that statfs(2) has for the file system of an open file. OSError."""
    found = (ctypes.c_long * 32)()
    if _libc.fstatfs(fd, found):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found[0]


class Arena:
    """`size` bytes of shared memory called `name`: the file of that name in `folder`, or a file without a name.

    A new arena is zeroed and not populated. A file that exists keeps its content; LayoutError if it has another size.
    `view` is a writable memoryview of the whole arena; `address` is its start.
    """

    _fd = -1

    def __init__(self, name: str, size: int, folder: str | None = None) -> None:
        self.size = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        if folder is None:
            self._fd = os.memfd_create(f"zbudfs-{name}", os.MFD_CLOEXEC)
        else:
            self._fd = os.open(f"{folder}/{name}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        existing = os.fstat(self._fd).st_size
        if existing not in (0, self.size):
            raise LayoutError(f"the table {name} has {existing} bytes instead of {self.size}")
        os.ftruncate(self._fd, self.size)
        self._map = mmap.mmap(self._fd, self.size)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _libc.madvise(self.address, self.size, _MADV_DONTDUMP)  # a core file must not contain memory of other programs

    def __del__(self) -> None:
        """Close the file. The mapping stays as long as a view of it exists."""
        if self._fd >= 0:
            os.close(self._fd)

    def populate(self, offset: int, length: int) -> None:
        """Allocate pages for these bytes now. MemoryError if the system refuses. May wait for memory: for a worker thread."""
        start, length = _page_bounds(offset, length)
        if _libc.madvise(self.address + start, length, _MADV_POPULATE_WRITE):
            try:  # before Linux 5.14: the pages, if not their mapping
                fallocate(self._fd, 0, start, length)
            except OSError as error:
                raise MemoryError(f"no memory for {length} bytes: {error.strerror}") from None

    def release(self, offset: int, length: int) -> None:
        """Free the pages that lie wholly in these bytes; they read as zeros afterwards."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            punch_hole(self._fd, start, end - start)

    def populated(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """Return (offset, length) of the parts that have pages, among those that begin in the given bytes."""
        parts: list[tuple[int, int]] = []
        end, limit = offset, self.size if length is None else offset + length
        while end < limit:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError:  # ENXIO: no further part
                break
            if start >= limit:
                break
            end = min(limit, os.lseek(self._fd, start, os.SEEK_HOLE))
            parts.append((start, end - start))
        return parts

    def map_populated(self, offset: int = 0, length: int | None = None) -> None:
        """Map the populated parts into this process, so that the first access is no page fault. For shared memory."""
        for start, count in self.populated(offset, length):
            _libc.madvise(self.address + start, count, _MADV_POPULATE_WRITE)

    @property
    def resident_bytes(self) -> int:
        """Bytes that have pages."""
        return os.fstat(self._fd).st_blocks * 512
