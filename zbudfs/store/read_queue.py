# SPDX-License-Identifier: MIT
"""The kernel's queue of reads (aio.c), with its slots: the way of aio_page_in.py to the disk.

    open --a read of the header--> usable --submit--> reads in flight --reap--> (slot, result)

A block is read into a slot, which is private memory of this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.backing import Backing

if TYPE_CHECKING:
    from zbudfs.store._aio import Queue

SLOTS: Final = 128
"""Blocks that can be read at once: for the eight requests that the kernel keeps in flight, of eight pages each, and as much
again for read-ahead. The slots are 512 KiB of locked memory in the worker and in the standby."""


class ReadQueue:
    """The queue of one backing file. It is usable after `open`, unless the kernel refuses it."""

    def __init__(self, backing: Backing | None) -> None:
        self._backing = backing
        self._kernel: Queue | None = None
        self._is_open = trio.Event()
        self.is_usable = False
        """Whether a read has completed through the queue."""
        self.slots: list[memoryview] = []
        self.free: list[int] = []
        """The slots that no read uses."""

    def open(self) -> bool:
        """Make the queue and submit a read of the header through it. False: the kernel has no queue, so threads read.

        The queue is usable when that read completes without an error. The method never waits for the disk.
        """
        if self._kernel is not None:
            return True
        if self._backing is None or not self._backing.direct:
            return False
        try:
            kernel = new_queue(SLOTS)
        except (ImportError, OSError):
            return False
        if kernel.submit(self._backing.fileno(), [(0, [0])]) != 1:
            kernel.close()
            return False
        self.slots = [kernel.slot(number) for number in range(SLOTS)]
        self.free = list(range(1, SLOTS))
        self._kernel = kernel
        return True

    def opened(self) -> None:
        """Wake `run`, since the queue exists. Call this in trio's thread; `open` may run in any thread."""
        self._is_open.set()

    def header_read(self, slot: int, result: int) -> None:
        """Take the result of the read that `open` submitted."""
        self.is_usable = result == PAGE_SIZE
        self.free.append(slot)

    @property
    def path(self) -> str:
        """The way in which pages come from the disk: "aio", "threads", or "none" without a backing file."""
        if self._backing is None:
            return "none"
        return "aio" if self.is_usable else "threads"

    def completions(self) -> tuple[int, int]:
        """Return the descriptor that is readable after a completion, and the address of the ring (aio.c); (-1, 0): no queue."""
        return (self._kernel.fileno(), self._kernel.ring()) if self._kernel is not None else (-1, 0)

    def submit(self, runs: list[tuple[int, list[int]]]) -> int:
        """Submit reads of runs of neighbouring blocks, (offset, slots), and return how many the kernel took."""
        assert self._kernel is not None and self._backing is not None
        return self._kernel.submit(self._backing.fileno(), runs)

    def submit_one(self, offset: int, slot: int) -> bool:
        """Submit the read of one block. False if the kernel did not take it."""
        assert self._kernel is not None and self._backing is not None
        return self._kernel.submit_one(self._backing.fileno(), offset, slot)

    def submitter(self) -> Callable[[int, int], bool]:
        """Return the function `submit_one`, bound to the open file and the queue."""
        assert self._kernel is not None and self._backing is not None
        return functools.partial(self._kernel.submit_one, self._backing.fileno())

    def reap(self) -> list[tuple[int, int]]:
        """Return the reads that have completed: first slot of the run, and bytes read or -errno. Never waits."""
        return self._kernel.reap() if self._kernel is not None else []

    async def run(self, reap: Callable[[], object]) -> None:
        """Call `reap` whenever the event loop finds a completion first. Runs until it is cancelled."""
        while self._kernel is None:
            await self._is_open.wait()
        while True:
            await trio.lowlevel.wait_readable(self._kernel.fileno())
            reap()

    def close(self) -> None:
        """Wait for the reads in flight and free the queue."""
        if self._kernel is not None:
            self.is_usable = False
            self.slots.clear()
            self._kernel.close()
            self._kernel = None


def new_queue(nr_slots: int) -> Queue:
    """Return a new AIO queue. OSError if the kernel refuses it, ImportError if the extension was not built."""
    from zbudfs.store._aio import Queue

    return Queue(nr_slots)
