# SPDX-License-Identifier: MIT
"""One FUSE session: pyfuse3's loop on a file descriptor of /dev/fuse that somebody else has opened and mounted."""

from pathlib import Path
from typing import Final

import pyfuse3

from zbudfs.fuse import shim
from zbudfs.fuse.operations import Operations

MAX_BACKGROUND: Final = 12
"""Requests that the kernel keeps in flight on its own account (swap is all of these): the kernel's default."""

MAX_BURST: Final = 32
"""Requests taken without a sleep before the other tasks get their turn: some 0.3 ms. Guessed."""

MAX_TASKS: Final = 4
"""pyfuse3's tasks: requests other than for the swapfile's data that are in work at once."""

MAX_REQUEST_BYTES: Final = 1 << 20
"""Largest read or write that the kernel sends."""

HEAP_BYTES: Final = (MAX_BACKGROUND + 4) * MAX_REQUEST_BYTES
"""Memory that all requests in work may need at once, set aside in advance: the data of each that has to wait, and more."""


def open_session(operations: Operations, fuse_fd: int) -> None:
    """Start the session on `fuse_fd`, which is mounted already. shim.ShimError if pyfuse3 does not go through the shim."""
    shim.verify(Path("/proc/self/maps").read_text(errors="replace"))
    shim.set_limits(MAX_BACKGROUND, MAX_BURST)
    pyfuse3.init(operations, f"/dev/fd/{fuse_fd}", set())


async def serve() -> None:
    """Answer requests until the mount is gone."""
    # Tasks are made as they are needed and then kept: making one needs memory.
    await pyfuse3.main(min_tasks=MAX_TASKS, max_tasks=MAX_TASKS)
