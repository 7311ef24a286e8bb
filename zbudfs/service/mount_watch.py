# SPDX-License-Identifier: MIT
"""A watch on the mount table: a mount that was removed from it may still exist in another mount namespace."""

import os
import time
from typing import Final

from zbudfs.service.mountpoint import device_name, places_of

UNMOUNTED_SECONDS: Final = 0.5
"""Longest time after an unmount in which the connection should end, before the worker is asked to end it. Guessed."""

_PIECE_BYTES: Final = 1 << 16


class MountWatch:
    """Watches whether one mount is in the mount table, and since when it is not."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        """The descriptor of the table. It has an exceptional condition, for select(2), when the table has changed."""
        self.has_changed = True
        """Whether the table has changed since the last check."""
        self._gone_since = 0.0

    @property
    def is_gone(self) -> bool:
        """Whether the mount was missing at the last check."""
        return bool(self._gone_since)

    def is_due(self, st_dev: int) -> bool:
        """Check for the mount `st_dev`. Return whether it has been gone for UNMOUNTED_SECONDS. 0: no mount is known."""
        now = time.monotonic()
        if self.has_changed:
            gone = st_dev and not places_of(device_name(st_dev), self._read())
            self._gone_since = (self._gone_since or now) if gone else 0.0
        return self.is_gone and now >= self._gone_since + UNMOUNTED_SECONDS

    def begin_again(self) -> None:
        """Start the time again from now."""
        self._gone_since = time.monotonic()

    def _read(self) -> bytes:
        """Return the mount table. No file is opened for it: the keeper may have no descriptor left."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        return b"".join(iter(lambda: os.read(self.fd, _PIECE_BYTES), b""))
