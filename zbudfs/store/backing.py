# SPDX-License-Identifier: MIT
"""The backing: 4096-byte blocks on a real disk, in a file or on a block device. Blocking calls only, for any thread.

    header   | blocks, in segments of 64: copies of frames (several zpages each), or raw pages

Its content is temporary: it means nothing without the page table in RAM. It is emptied when it is opened and when it is
closed. The header only tells a later daemon that the content may be destroyed. store/claim.py opens it, store/space.py
knows how room comes and goes.

With `encrypt` blocks are encrypted on their way out and decrypted on their way in (store/cipher.py), in the thread that
writes or reads. The header and the zeros that make blocks ready are not: they tell nothing.

Writes bypass the page cache (O_DIRECT). Where the file system refuses that, they are buffered, waited for
(RWF_DSYNC) and dropped from the cache at once, so that an error is seen before the frame is freed.
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
    from zbudfs.store.cipher import BlockCipher  # a library, only for those that encrypt

_DIRECT: Final = getattr(os, "O_DIRECT", 0)


class Backing:
    """The file or block device at `path`, claimed for this daemon alone (store/claim.py, also for `force`).

    `direct` tells whether writes bypass the page cache; `warnings` what is wrong with the place. Raises BackingError with
    a sentence for the user, LayoutError for content that is not ours.
    """

    def __init__(
        self, path: str, adopted_fd: int | None = None, *, force: bool = False, is_fixed: bool | None = None
    ) -> None:
        """Claim and empty it; or, with the descriptor of a running mount's, go on with it as it is.

        `is_fixed` is what `is_fixed` of the running mount's is; with it, nothing is asked of the disk.
        """
        self.path = path
        self.written_bytes = 0
        """Bytes of blocks written so far."""
        self._end_bytes = 0
        """Where the last segment ends that this process has made ready, or seen."""
        self._cipher: BlockCipher | None = None
        self._outgoing = memoryview(b"")
        if adopted_fd is None:
            claimed = claim(path, force=force)
        else:
            claimed = Claimed(adopted_fd)
            os.set_inheritable(adopted_fd, False)
        self._fd, self.warnings = claimed.fd, claimed.warnings
        try:
            if adopted_fd is None:
                self.direct = self._try_direct()
            else:
                self.direct = bool(fcntl.fcntl(adopted_fd, fcntl.F_GETFL) & _DIRECT)
            self._space = space_of(self._fd, direct=self.direct, is_fixed=is_fixed)
        except BaseException:
            if adopted_fd is None:
                os.close(self._fd)
            raise
        self.name = f"the backing {self._space.noun} {shown(path)}"
        """For a sentence."""

    @property
    def is_fixed(self) -> bool:
        """Whether it is a file of fixed size."""
        return isinstance(self._space, FixedFile)

    def fileno(self) -> int:
        """Its descriptor."""
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
        offset = start = self.offset_of(block)
        pieces = list(pieces)
        flags = 0 if self.direct else os.RWF_DSYNC
        while pieces:
            try:
                written = os.pwritev(self._fd, pieces, offset, flags)
            except OSError as error:
                raise self._failure("written", error) from None
            if written <= 0 or written % PAGE_SIZE:
                raise BackingError(f"{self.name} took {written} bytes of {sum(map(len, pieces))}")
            self.written_bytes += written
            offset += written
            while pieces and written >= len(pieces[0]):
                written -= len(pieces.pop(0))
            if written:
                pieces[0] = pieces[0][written:]
        if not self.direct:
            self._uncache(start, offset - start)

    def read_blocks(self, block: int, frames: Sequence[memoryview]) -> None:
        """Fill `frames`, 4096 bytes each, from neighbouring blocks from `block` on; BackingError unless all of it was."""
        offset = start = self.offset_of(block)
        pieces = list(frames)
        while pieces:
            try:
                got = os.preadv(self._fd, pieces, offset)
            except OSError as error:
                raise self._failure("read", error) from None
            if got <= 0 or got % PAGE_SIZE:
                raise BackingError(f"{self.name} gave {got} bytes of {len(pieces) * PAGE_SIZE}")
            offset += got
            del pieces[: got >> PAGE_SHIFT]
        if not self.direct:
            self._uncache(start, len(frames) << PAGE_SHIFT)
        self.decrypt(block, frames)

    def offset_of(self, block: int) -> int:
        """Where a block begins, in bytes from the start of the file or device."""
        return self._space.start + (block << PAGE_SHIFT)

    def decrypt(self, block: int, frames: Sequence[memoryview]) -> None:
        """Decrypt `frames`, 4096 bytes each, that were read from neighbouring blocks from `block` on, in their places."""
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
            raise self._failure("synced", error) from None

    # ---- size ------------------------------------------------------------------------------------------------------

    @property
    def nr_segments(self) -> int:
        """Most segments that it can have."""
        return self._space.nr_segments

    @property
    def trim_segments(self) -> int:
        """How many neighbouring segments, aligned to that, can be punched together; 0: none ever."""
        return self._space.trim_segments

    @property
    def zeros_per_segment(self) -> int:
        """Bytes that are written to make a segment ready."""
        return self._space.zeros_per_segment

    @property
    def zeros_written(self) -> int:
        """Bytes written so far to make segments ready."""
        return self._space.zeros_written

    def size_bytes(self, most: int) -> int:
        """What it can hold of `most` bytes."""
        return min(most, self.nr_segments * SEGMENT_BYTES)

    def has_room(self, count: int) -> bool:
        """Whether the disk has room for `count` more segments, beside what is left to others."""
        try:
            return self._space.has_room(count)
        except OSError:
            return True  # growing tells why

    def make_ready(self, first: int, count: int) -> None:
        """Make segments `first` .. `first + count - 1` ready to be written; BackingFull or BackingError.

        After this a write there changes no metadata of the file system, which would need memory.
        """
        try:
            self._space.make_ready(first, count)
        except OSError as error:
            raise self._failure("grown", error) from None
        self._end_bytes = max(self._end_bytes, self._space.start + (first + count) * SEGMENT_BYTES)

    def punch(self, first: int, count: int) -> None:
        """Give segments back to the disk; they must be made ready again before they are written. BackingError."""
        try:
            self._space.give_back(first, count)
        except OSError as error:
            raise self._failure("punched", error) from None

    def damage(self) -> list[str]:
        """Return what others have done to the file or device, one sentence each."""
        try:
            status = os.fstat(self._fd)
            end = self._space.end_bytes()
        except OSError as error:
            return [f"{self.name} cannot be looked at: {error.strerror}"]
        found = []
        if not status.st_nlink and not stat.S_ISBLK(status.st_mode):
            found.append(f"{self.name} has been deleted: it is used on, and its room is free at unmount")
        if end < self._end_bytes:
            found.append(f"{self.name} has been cut short: pages that were there are lost")
        self._end_bytes = max(self._end_bytes, end)
        return found

    def close(self) -> None:
        """Empty it and close it."""
        try:
            with contextlib.suppress(OSError):
                self._space.empty()
        finally:
            os.close(self._fd)
