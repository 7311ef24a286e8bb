# SPDX-License-Identifier: MIT
"""One FUSE session: pyfuse3's loop on a file descriptor of /dev/fuse that another process has opened and mounted."""

import os
import struct
from typing import Final

import pyfuse3
import trio

from zbudfs.fuse import shim
from zbudfs.fuse.operations import Operations
from zbudfs.store.files import read_bytes
from zbudfs.store.memory import REQUEST_SLOT_BYTES, REQUEST_SLOTS

MAX_BACKGROUND: Final = REQUEST_SLOTS - 2
"""Most requests that the kernel keeps in flight in the background (all of swap's are). The kernel's default is 12. One thread
serves them, so more in flight take more memory and are not faster."""

MAX_BURST: Final = 64
"""Requests that the worker takes without a sleep before its other tasks get their turn: some 0.3 ms. Guessed."""

SPIN_NS: Final = 100_000
"""Longest time in nanoseconds for which the worker waits awake for the next request, while that pays; 0 on a single core.

No core has to be woken then: random page-ins of a swap storm on two cores go 1.8 times as fast. It only pays if the worker
offers the CPU to other programs meanwhile (shim.c): without that, the same storm was a quarter slower.
"""

MAX_TASKS: Final = 1
"""Number of pyfuse3's tasks. None of its handlers waits, and a second task would only contend for the first one's lock."""

MAX_REQUEST_BYTES: Final = 256 << 10
"""Largest read or write that the kernel sends. Swap sends writes of 226 KiB on average in a storm (/sys/block/loopN/stat)."""

HEAP_BYTES: Final = 2 << 20
"""Heap that requests may need at once, in bytes, which the daemon reserves in advance.

Python takes 1 MiB at a time for small objects. The rest is for the pages of large reads, and for each read in one piece. A
write that waits for a frame stays in its request slot, not here.
"""


FUSE_NOTIFY_RESEND: Final = 7


def open_session(operations: Operations, fuse_fd: int, request_slots: memoryview) -> None:
    """Start the session on `fuse_fd`, which is mounted already. Raises shim.ShimError if pyfuse3 does not call the shim."""
    shim.verify(read_bytes("/proc/self/maps").decode(errors="replace"))
    shim.set_limits(MAX_BACKGROUND, MAX_BURST, SPIN_NS if len(os.sched_getaffinity(0)) > 1 else 0)
    shim.use_slots(request_slots, REQUEST_SLOT_BYTES)
    pyfuse3.init(operations, f"/dev/fd/{fuse_fd}", set())


def resume(first_request: bytes) -> None:
    """Continue a session that another process has begun with `first_request`. Raises shim.ShimError if libfuse refuses."""
    if not shim.replay(first_request):
        raise shim.ShimError("libfuse did not take the session over")


def resend(fuse_fd: int) -> bool:
    """Make the kernel send again all requests that were taken and not answered. False if it cannot (before Linux 6.9)."""
    try:
        os.write(fuse_fd, struct.pack("=IiQ", 16, FUSE_NOTIFY_RESEND, 0))
    except OSError:
        return False
    return True


class Runnable(trio.abc.Instrument):
    """The tasks of trio's loop that can run, and have not run yet.

    trio's own queue does not have all of them: it is empty while a batch of tasks runs, and the task that serves requests is
    one of a batch.
    """

    def __init__(self) -> None:
        self.tasks: set[trio.lowlevel.Task] = set()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """Add a task that can run."""
        self.tasks.add(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Forget a task that runs."""
        self.tasks.discard(task)


def _event_loop() -> int:
    """Return the epoll descriptor of trio's loop; -1 if it is not found.

    The descriptor is readable when an event has happened for which a task waits. trio has no public name for it. Without it
    the worker waits for every request in trio, which is only slower. The shim ignores trio's deadlines: a burst may delay
    them by LONGEST_BURST_NS (shim.c) and some milliseconds.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        fd: int = GLOBAL_RUN_CONTEXT.runner.io_manager._epoll.fileno()  # type: ignore[union-attr,unused-ignore]
    except (ImportError, AttributeError):
        return -1
    return fd


async def serve() -> None:
    """Answer requests until the mount is gone."""
    runnable = Runnable()
    trio.lowlevel.add_instrument(runnable)
    shim.set_linger(_event_loop(), runnable.tasks)
    # pyfuse3 makes tasks when it needs them and then keeps them: making one needs memory.
    await pyfuse3.main(min_tasks=MAX_TASKS, max_tasks=MAX_TASKS)
