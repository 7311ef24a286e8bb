# SPDX-License-Identifier: MIT
"""One FUSE session: pyfuse3's loop on a file descriptor of /dev/fuse that somebody else has opened and mounted."""

import os
import struct
from collections.abc import Sized
from pathlib import Path
from typing import Final

import pyfuse3

from zbudfs.fuse import shim
from zbudfs.fuse.operations import Operations
from zbudfs.store.memory import PARKING_SLOT_BYTES, PARKING_SLOTS

MAX_BACKGROUND: Final = PARKING_SLOTS - 2
"""Requests that the kernel keeps in flight on its own account (swap is all of these). Its default is 12; one thread
serves them, so more in flight is more memory and no more speed."""

MAX_BURST: Final = 64
"""Requests taken without a sleep before the other tasks get their turn: some 0.3 ms. Guessed."""

SPIN_NS: Final = 100_000
"""How long the next request is waited for awake, while that pays; not at all on a single core.

No core has to be woken then: random page-ins of a swap storm on two cores go 1.8 times as fast. It only pays if the CPU is
offered to others meanwhile (shim.c): without that, the same storm was a quarter slower.
"""

MAX_TASKS: Final = 1
"""pyfuse3's tasks. None of its handlers waits for anything, and a second task would only contend for the first's lock."""

MAX_REQUEST_BYTES: Final = 1 << 20
"""Largest read or write that the kernel sends."""

HEAP_BYTES: Final = 3 * MAX_REQUEST_BYTES
"""Heap that requests may need at once, set aside in advance: the pages of a large read, and all of it in one piece.

What waits to be written lies in the store's parking, not here.
"""


FUSE_NOTIFY_RESEND: Final = 7


def open_session(operations: Operations, fuse_fd: int, parking: memoryview) -> None:
    """Start the session on `fuse_fd`, which is mounted already. shim.ShimError if pyfuse3 does not go through the shim."""
    shim.verify(Path("/proc/self/maps").read_text(errors="replace"))
    shim.set_limits(MAX_BACKGROUND, MAX_BURST, SPIN_NS if len(os.sched_getaffinity(0)) > 1 else 0)
    shim.use_slots(parking, PARKING_SLOT_BYTES)
    pyfuse3.init(operations, f"/dev/fd/{fuse_fd}", set())


def resume(first_request: bytes) -> None:
    """Go on with a session that another process has begun, of which this is the first request."""
    if not shim.replay(first_request):
        raise shim.ShimError("libfuse did not take the session over")


def resend(fuse_fd: int) -> bool:
    """Have the kernel send again what was taken and not answered. False if it cannot (before Linux 6.9)."""
    try:
        os.write(fuse_fd, struct.pack("=IiQ", 16, FUSE_NOTIFY_RESEND, 0))
    except OSError:
        return False
    return True


def _event_loop() -> tuple[int, Sized]:
    """Of trio's loop: the epoll descriptor, readable when anything that a task waits for has happened, and the tasks that
    are to run now. (-1, ()) if they are not found.

    trio has no public names for them, and its statistics cost 2 us a request. Without them every request is waited for in
    trio, which is slower and nothing else. Deadlines are not asked for: a burst keeps them waiting for 6 ms at most.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        runner = GLOBAL_RUN_CONTEXT.runner
        fd: int = runner.io_manager._epoll.fileno()  # type: ignore[union-attr,unused-ignore]
        runnable: Sized = runner.runq
    except (ImportError, AttributeError):
        return -1, ()
    return fd, runnable


async def serve() -> None:
    """Answer requests until the mount is gone."""
    shim.set_linger(*_event_loop())
    # Tasks are made as they are needed and then kept: making one needs memory.
    await pyfuse3.main(min_tasks=MAX_TASKS, max_tasks=MAX_TASKS)
