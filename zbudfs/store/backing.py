# SPDX-License-Identifier: MIT
"""The backing: 4096-byte blocks on a real disk, in a file or on a block device. Blocking calls only, for any thread.

    header   | blocks, in segments of 64: copies of frames (several zpages each), or raw pages

Its content is temporary: it means nothing without the page table in RAM. It is emptied when it is opened and when it is
closed. The header only shows a later daemon that it may destroy the content. store/claim.py opens the backing, store/space.py
manages its room.

With `encrypt` blocks are encrypted before each write and decrypted after each read (store/cipher.py), in the same thread.
The header and the zeros that make blocks ready are not encrypted: they carry no information.

Writes bypass the page cache (O_DIRECT). If the file system refuses that, each write is synchronous (RWF_DSYNC) and then
dropped from the cache, so that an error is seen before the frame is freed.
"""

import contextlib
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from zbudfs.core.errors import BackingError, BackingFull
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.claim import FULL, Claimed, claim, shown
from zbudfs.store.space import MAGIC as MAGIC
from zbudfs.store.space import SEGMENT_BYTES as SEGMENT_BYTES
from zbudfs.store.space import FixedFile, space_of

if TYPE_CHECKING:
    from zbudfs.store.cipher import BlockCipher  # a library that only an encrypting daemon loads

_DIRECT: Final = getattr(os, "O_DIRECT", 0)


class Backing:
    """The file or block device at `path`, claimed for this daemon alone (store/claim.py, which explains `force` too).

    `direct` is whether writes bypass the page cache; `warnings` are problems of the place. Raises BackingError with a
    sentence for the user, LayoutError for content of another program.
    """

    def __init__(
        self, path: str, open_fd: int | None = None, *, force: bool = False, is_fixed: bool | None = None
    ) -> None:
        """Claim and empty the backing. With the descriptor of a running mount's, continue with it instead.

        `is_fixed` is the running mount's `is_fixed`. If it is given, the constructor does not access the disk.
        """
        self.path = path
        self.written_bytes = 0
        """Bytes of blocks written so far."""
        self._end_bytes = 0
        """End of the last segment that this process has made ready or seen, in bytes."""
        self._cipher: BlockCipher | None = None
        self._outgoing = memoryview(b"")
        if open_fd is None:
            claimed = claim(path, force=force)
        else:
            claimed = Claimed(open_fd)
            os.set_inheritable(open_fd, False)
        self._fd, self.warnings = claimed.fd, claimed.warnings
        try:
            if open_fd is None:
                self.direct = self._try_direct()
            else:
                self.direct = bool(fcntl.fcntl(open_fd, fcntl.F_GETFL) & _DIRECT)
            self._space = space_of(self._fd, direct=self.direct, is_fixed=is_fixed)
        except BaseException:
            if open_fd is None:
                os.close(self._fd)
            raise
        self.name = f"the backing {self._space.noun} {shown(path)}"
        """The backing in a message: its kind and its path."""

    @property
    def is_fixed(self) -> bool:
        """Whether the backing is a file of fixed size."""
        return isinstance(self._space, FixedFile)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def _failure(self, action: str, error: OSError) -> BackingError:
        kind = BackingFull if error.errno in FULL else BackingError
        return kind(f"{self.name} cannot be {action}: {error.strerror}")

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
        """Encrypt and decrypt blocks from now on. `outgoing`: whole pages, aligned, for the encrypted blocks of a write."""
        self._cipher = cipher
        self._outgoing = outgoing

    def warm_up(self) -> None:
        """Use the cipher once in the process that will use it, so that nothing has to be loaded later."""
        if self._cipher is not None:
            self._cipher.warm_up()

    def write_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Write `frames`, 4096 bytes each, to neighbouring blocks from `block` on. BackingError unless all were written.

        Only one call at a time: all calls share the buffer of the encrypted blocks.
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
        """Write pieces, each of whole blocks, one after the other. BackingError."""
        offset = start = self.offset_of(block)
        pieces = list(pieces)
        flags = 0 if self.direct else os.RWF_DSYNC
        while pieces:
            try:
                written = os.pwritev(self._fd, pieces, offset, flags)
            except OSError as error:
                raise self._failure("written", error) from None
            if written <= 0 or written % PAGE_SIZE:
                raise BackingError(f"{self.name} accepted {written} bytes of {sum(map(len, pieces))}")
            self.written_bytes += written
            offset += written
            while pieces and written >= len(pieces[0]):
                written -= len(pieces.pop(0))
            if written:
                pieces[0] = pieces[0][written:]
        if not self.direct:
            self._uncache(start, offset - start)

    def read_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Fill `frames`, 4096 bytes each, from neighbouring blocks from `block` on. BackingError unless all were read."""
        offset = start = self.offset_of(block)
        pieces = list(frames)
        while pieces:
            try:
                got = os.preadv(self._fd, pieces, offset)
            except OSError as error:
                raise self._failure("read", error) from None
            if got <= 0 or got % PAGE_SIZE:
                raise BackingError(f"{self.name} returned {got} bytes of {len(pieces) * PAGE_SIZE}")
            offset += got
            del pieces[: got >> PAGE_SHIFT]
        if not self.direct:
            self._uncache(start, len(frames) << PAGE_SHIFT)
        self.decrypt(block, frames)

    def offset_of(self, block: int) -> int:
        """Return the offset of a block in bytes, from the start of the file or device."""
        return self._space.start + (block << PAGE_SHIFT)

    def decrypt(self, block: int, frames: Sequence[memoryview]) -> None:
        """Decrypt in place `frames`, 4096 bytes each, that were read from neighbouring blocks from `block` on."""
        if self._cipher is not None:
            self._cipher.decrypt(block, frames)

    def _uncache(self, offset: int, length: int) -> None:
        with contextlib.suppress(OSError):  # the call is advice: it only affects how much memory is used
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Call fdatasync(2): all blocks written so far are on the disk then. BackingError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failure("synced", error) from None

    # ---- size ------------------------------------------------------------------------------------------------------

    @property
    def nr_segments(self) -> int:
        """Most segments that the backing can have."""
        return self._space.nr_segments

    @property
    def trim_segments(self) -> int:
        """Number of neighbouring segments, aligned to that number, that can be punched together; 0: none."""
        return self._space.trim_segments

    @property
    def zeros_per_segment(self) -> int:
        """Bytes that are written to make a segment ready."""
        return self._space.zeros_per_segment

    @property
    def zeros_written(self) -> int:
        """Bytes that were written so far to make segments ready."""
        return self._space.zeros_written

    def size_bytes(self, most: int) -> int:
        """Return how many of `most` bytes the backing can hold."""
        return min(most, self.nr_segments * SEGMENT_BYTES)

    def has_room(self, count: int) -> bool:
        """Return whether the disk has room for `count` more segments, and for the reserve of other programs."""
        try:
            return self._space.has_room(count)
        except OSError:
            return True  # `make_ready` reports the error

    def make_ready(self, first: int, count: int) -> None:
        """Make segments `first` .. `first + count - 1` ready for writes. BackingFull or BackingError.

        A write to a ready segment changes no metadata of the file system, which would need memory.
        """
        try:
            self._space.make_ready(first, count)
        except OSError as error:
            raise self._failure("grown", error) from None
        self._end_bytes = max(self._end_bytes, self._space.start + (first + count) * SEGMENT_BYTES)

    def punch(self, first: int, count: int) -> None:
        """Give segments back to the disk; they must be made ready again before the next write. BackingError."""
        try:
            self._space.give_back(first, count)
        except OSError as error:
            raise self._failure("punched", error) from None

    def damage(self) -> list[str]:
        """Return what other programs have done to the file or device, one sentence each."""
        try:
            status = os.fstat(self._fd)
            end = self._space.end_bytes()
        except OSError as error:
            return [f"{self.name} cannot be examined: {error.strerror}; look at its disk (dmesg)"]
        found = []
        if not status.st_nlink and not stat.S_ISBLK(status.st_mode):
            found.append(
                f"{self.name} has been deleted: zbudfs keeps using it, and its room is free after unmount; for a new file, turn"
                " swap off and mount again"
            )
        if end < self._end_bytes:
            found.append(
                f"{self.name} has been truncated: the pages beyond its end are lost; find the program that did it, then turn"
                " swap off and mount again"
            )
        self._end_bytes = max(self._end_bytes, end)
        return found

    def close(self) -> None:
        """Empty the backing and close it."""
        try:
            with contextlib.suppress(OSError):
                self._space.empty()
        finally:
            os.close(self._fd)
