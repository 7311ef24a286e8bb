# SPDX-License-Identifier: MIT
"""The backing file: 4096-byte blocks on a real disk. Blocking calls only; who calls them in which thread is not its business.

    block 0: header   | blocks, in segments of 64: copies of frames (two zpages each), or raw pages

The file is temporary by nature: what it holds is meaningless without the page table in RAM. It is emptied when
it is opened and when it is closed. The header only tells a later daemon that the file is its own to empty.

With `encrypt` blocks are encrypted on their way to the file and decrypted on their way back (store/cipher.py), in the
thread that writes or reads. The header and the zeros that make blocks ready are not: they say nothing.

Writes bypass the page cache (O_DIRECT). Where the file system refuses that, they are buffered, waited for
(RWF_DSYNC) and dropped from the cache at once, so that an error is seen before the frame is given up.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from zbudfs.core.block_map import SEGMENT_BLOCKS
from zbudfs.core.errors import BackingError, BackingFull, LayoutError
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.arena import fallocate, punch_hole

if TYPE_CHECKING:
    from zbudfs.store.cipher import BlockCipher  # a library, for whoever does not encrypt

SEGMENT_BYTES: Final = SEGMENT_BLOCKS << PAGE_SHIFT
MAGIC: Final = b"zbudfs backing file 1\n"
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def _failure(action: str, error: OSError) -> BackingError:
    kind = BackingFull if error.errno in _FULL else BackingError
    return kind(f"the backing file cannot be {action}: {error.strerror}")


class Backing:
    """The file at `path`, created if need be: mode 0600, never through a symbolic link, locked against a second daemon.

    `direct` tells whether writes bypass the page cache. Raises BackingError with a sentence for the user, LayoutError
    for a file with content that is not a backing file of this version.
    """

    def __init__(self, path: str, adopted_fd: int | None = None) -> None:
        """Open the file and empty it; or, with the descriptor of a running mount's, go on with it as it is."""
        self.path = path
        self.ready_bytes = 0
        """Bytes allocated and written over."""
        self._end_bytes = 0
        """Where the last segment ends that this process has made ready, or seen."""
        self._cipher: BlockCipher | None = None
        self._outgoing = memoryview(b"")
        # Aligned, as O_DIRECT wants it, and populated: a read of it from the disk's side must find pages.
        segment = mmap.mmap(-1, SEGMENT_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._zeros = memoryview(segment)
        if adopted_fd is not None:
            self._fd = adopted_fd
            os.set_inheritable(adopted_fd, False)
            self.direct = bool(fcntl.fcntl(adopted_fd, fcntl.F_GETFL) & _DIRECT)
            return
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise BackingError(f"cannot open the backing file {path}: {reason}") from None
        try:
            self._claim()
            self.direct = self._try_direct()
        except BaseException:
            os.close(self._fd)
            raise

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._fd

    def _claim(self) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise BackingError(f"the backing file {self.path} is not a regular file")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BackingError(f"the backing file {self.path} is in use by another zbudfs") from None
        start = os.pread(self._fd, len(MAGIC), 0)
        if status.st_size and start != MAGIC:
            raise LayoutError(
                f"{self.path} exists and is not a backing file of this version of zbudfs: "
                "remove it, or name another file, if nobody needs what it holds"
            )
        try:
            os.fchmod(self._fd, 0o600)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, MAGIC.ljust(PAGE_SIZE, b"\0"), 0)
            os.fsync(self._fd)
        except OSError as error:
            raise _failure("prepared", error) from None

    def _try_direct(self) -> bool:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_NONBLOCK
        page = mmap.mmap(-1, PAGE_SIZE)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | _DIRECT)
            os.preadv(self._fd, [page], 0)
            os.pwritev(self._fd, [page], 0)
        except OSError:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            return False
        return bool(_DIRECT)

    # ---- blocks --------------------------------------------------------------------------------------------------

    def encrypt(self, cipher: "BlockCipher", outgoing: memoryview) -> None:
        """Encrypt and decrypt blocks from now on. `outgoing`: whole pages, aligned, that hold what is being written."""
        self._cipher = cipher
        self._outgoing = outgoing

    def warm_up(self) -> None:
        """Use once what is used later, in the process that will: nothing of it is loaded then."""
        if self._cipher is not None:
            self._cipher.warm_up()

    def write_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Write `frames`, 4096 bytes each, to neighbouring blocks from `block` on; BackingError unless all of it was.

        One call at a time: encrypted frames lie in one buffer.
        """
        if self._cipher is None:
            self._write(block, frames)
            return
        most = len(self._outgoing) >> PAGE_SHIFT
        for at in range(0, len(frames), most):
            some = frames[at : at + most]
            self._cipher.encrypt(block + at, some, self._outgoing)
            self._write(block + at, [self._outgoing[: len(some) << PAGE_SHIFT]])

    def _write(self, block: int, pieces: Sequence[memoryview]) -> None:
        """Write pieces, each of whole blocks, one after the other."""
        offset = start = block << PAGE_SHIFT
        pieces = list(pieces)
        flags = 0 if self.direct else os.RWF_DSYNC
        while pieces:
            try:
                written = os.pwritev(self._fd, pieces, offset, flags)
            except OSError as error:
                raise _failure("written", error) from None
            if written <= 0 or written % PAGE_SIZE:
                raise BackingError(f"the backing file took {written} bytes of {sum(map(len, pieces))}")
            offset += written
            while pieces and written >= len(pieces[0]):
                written -= len(pieces.pop(0))
            if written:
                pieces[0] = pieces[0][written:]
        if not self.direct:
            self._uncache(start, offset - start)

    def read_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Fill `frames`, 4096 bytes each, from neighbouring blocks from `block` on; BackingError unless all of it was."""
        offset = block << PAGE_SHIFT
        pieces = list(frames)
        while pieces:
            try:
                got = os.preadv(self._fd, pieces, offset)
            except OSError as error:
                raise _failure("read", error) from None
            if got <= 0 or got % PAGE_SIZE:
                raise BackingError(f"the backing file gave {got} bytes of {len(pieces) * PAGE_SIZE}")
            offset += got
            del pieces[: got >> PAGE_SHIFT]
        if not self.direct:
            self._uncache(block << PAGE_SHIFT, len(frames) << PAGE_SHIFT)
        if self._cipher is not None:
            self._cipher.decrypt(block, frames)

    def _uncache(self, offset: int, length: int) -> None:
        with contextlib.suppress(OSError):  # advice: it changes how much memory is used, nothing else
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """fdatasync(2): what was written is on the disk."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise _failure("synced", error) from None

    # ---- size ------------------------------------------------------------------------------------------------------

    def make_ready(self, first: int, count: int) -> None:
        """Allocate segments `first` .. `first + count - 1` and write them over; BackingFull or BackingError.

        After this a write there changes no metadata of the file system, which would need memory.
        """
        offset = first * SEGMENT_BYTES
        try:
            with contextlib.suppress(OSError):  # not every file system has it, and writing allocates as well
                fallocate(self._fd, 0, offset, count * SEGMENT_BYTES)
            for segment in range(first, first + count):
                skip = PAGE_SIZE if segment == 0 else 0  # the header
                self._write_zeros(segment * SEGMENT_BYTES + skip, SEGMENT_BYTES - skip)
        except OSError as error:
            with contextlib.suppress(OSError):
                if first:
                    punch_hole(self._fd, offset, count * SEGMENT_BYTES)
            raise _failure("grown", error) from None
        self.ready_bytes += count * SEGMENT_BYTES
        self._end_bytes = max(self._end_bytes, (first + count) * SEGMENT_BYTES)

    def _write_zeros(self, offset: int, length: int) -> None:
        flags = 0 if self.direct else os.RWF_DSYNC
        done = 0
        while done < length:
            written = os.pwritev(self._fd, [self._zeros[: length - done]], offset + done, flags)
            if written <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += written
        if not self.direct:
            self._uncache(offset, length)

    def punch(self, first: int, count: int) -> None:
        """Give segments back to the file system; they must be made ready again before they are written. BackingError."""
        try:
            punch_hole(self._fd, first * SEGMENT_BYTES, count * SEGMENT_BYTES)
        except OSError as error:
            raise _failure("punched", error) from None
        self.ready_bytes -= count * SEGMENT_BYTES

    def damage(self) -> list[str]:
        """What somebody has done to the file behind our back, one sentence each."""
        try:
            status = os.fstat(self._fd)
        except OSError as error:
            return [f"the backing file {self.path} cannot be looked at: {error.strerror}"]
        found = []
        if not status.st_nlink:
            found.append(
                f"the backing file {self.path} has been deleted: it is used on, and its room is free at unmount"
            )
        if status.st_size < self._end_bytes:
            found.append(f"the backing file {self.path} has been cut short: pages that were there are lost")
        self._end_bytes = max(self._end_bytes, status.st_size)
        return found

    def close(self) -> None:
        """Empty the file and let go of it."""
        try:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
        finally:
            os.close(self._fd)
