# SPDX-License-Identifier: MIT
"""The open files of swapfile, in slots in the status area, where they outlive the worker.

    slot    0, or the handle of one open file: OPENED | WRITING, if it was opened for writing | number of the open request

The kernel sends a request again when its worker dies without an answer. A repeated open finds its own slot, and a repeated
release finds none, so that neither is counted twice. A plain count would stay wrong for ever after either.

Only one open file at a time may be for writing, unless the tunable `writers` allows more. A loop device keeps such a file
open, so that no program can make a second loop device on swapfile. Two of them, both swap, would mix the pages of programs.
"""

import errno
from typing import Final

from zbudfs.core.tunables import MAX_WRITERS
from zbudfs.store.status_area import FIRST_OPENING, OPENINGS, Field

OPENED: Final = 1 << 63
"""Set in each handle of swapfile, and in no other handle."""

WRITING: Final = 1 << 62
_SENT_AGAIN: Final = 1 << 63
"""FUSE_UNIQUE_RESEND: the bit that the kernel sets in the number of a request that it sends again."""

assert MAX_WRITERS == OPENINGS


class Openings:
    """The open files of swapfile in one mount; `fields` are those of its status area."""

    def __init__(self, fields: memoryview) -> None:
        self._fields = fields

    def open(self, unique: int, *, writing: bool) -> int:
        """Return the handle for the open request with the number `unique`.

        Raises OSError: EBUSY if as many files as are allowed are open for writing, EMFILE if no slot is free.
        """
        fields = self._fields
        handle = OPENED | (WRITING if writing else 0) | (unique & ~_SENT_AGAIN & (WRITING - 1))
        writers = 0
        free = -1
        for slot in range(FIRST_OPENING, FIRST_OPENING + OPENINGS):
            found = fields[slot]
            if found == handle:
                return handle
            if not found:
                free = slot
            elif found & WRITING:
                writers += 1
        if writing and writers >= (fields[Field.WRITERS] or 1):
            raise OSError(errno.EBUSY, "swapfile is open for writing already")
        if free < 0:
            raise OSError(errno.EMFILE, "too many open files")
        fields[free] = handle
        self._count()
        return handle

    def release(self, handle: int) -> None:
        """Free the slot of `handle`, if it has one."""
        fields = self._fields
        for slot in range(FIRST_OPENING, FIRST_OPENING + OPENINGS):
            if fields[slot] == handle:
                fields[slot] = 0
        self._count()

    def _count(self) -> None:
        fields = self._fields
        fields[Field.OPEN_SWAPFILES] = sum(fields[slot] != 0 for slot in range(FIRST_OPENING, FIRST_OPENING + OPENINGS))
