# SPDX-License-Identifier: MIT
"""All memory of a store: tables and frames that outlive the process that works with them.

    pages           the page table; a byte for each stretch of it that was used follows
    frames          the frames; the bounce frames follow
    frametable      the allocator's columns            a new worker rebuilds them from pages and frames
    freeframes      the pool's own columns             rebuilt too
    blocks          the block map                      rebuilt too, except which segments are ready
    requestslots    requests that were received; a write that waits for a frame stays in its slot
    outgoing        encrypted blocks that are being written
    trace           records of requests, for a reader; it has no memory unless a trace is on
    board           facts that the processes share

The keeper makes the memory before it starts a worker, so that every worker has it mapped. With a pool directory (a tmpfs that
is never swapped out) the parts are files there. Otherwise they are memory without a name, which lives as long as one of the
processes.
"""

import time
from dataclasses import dataclass, fields
from typing import Final

from zbudfs.core.block_map import BlockMap
from zbudfs.core.errors import LayoutError
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.core.page_table import ENTRY_SIZE, PageTable, touched_size
from zbudfs.core.reclaim import BATCH_FRAMES
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.store.arena import Arena
from zbudfs.store.backing import SEGMENT_BYTES
from zbudfs.store.cgroup_limit import CgroupLimit
from zbudfs.store.status_area import LAYOUT, STATUS_AREA_BYTES, Field, StatusArea
from zbudfs.store.trace_ring import RING_BYTES

FRAME_ENTRY_BYTES: Final = 8
"""Bytes of the pool's table for each frame: an entry of the stack of free frames, and the time of a store or a block."""

BOUNCE_FRAMES: Final = 32
"""Blocks that can be read at once without a frame to keep them: two requests of 64 KiB. Guessed."""


RESERVE_BYTES: Final = 32 << 20
"""Bytes that the pool leaves in the memory cgroup. A new standby needs more, while it starts, than a dead worker frees."""
STANDBY_BYTES: Final = 48 << 20
"""Bytes that it also leaves while there is no standby: 34 MiB of its own, and 13 for a while to test itself (measured)."""

REMAP_SECONDS: Final = 30.0
"""Shortest time between two passes of a standby over all memory: 50 ns a page. Guessed."""

REQUEST_SLOTS: Final = 10
REQUEST_SLOT_BYTES: Final = (256 << 10) + (8 << 10)
"""Bytes of a slot in which a request is received, and in which a write waits for frames.

There are slots for eight requests that the kernel keeps in flight in the background, for one of a program that waits in
write(2), and for the next one. The file's lock admits only one such program. The worker and the standby share the memory,
since only one of them needs it at a time.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySizes:
    """Bytes of each part of a store's memory. All of it is locked in RAM once the pool is full; `trace` only while used."""

    status_area: int
    pages: int
    frames: int
    """The frames of the pool and the bounce frames."""
    frame_table: int
    free_frames: int
    blocks: int
    """0 without a backing file. The same holds for `outgoing`."""
    request_slots: int
    outgoing: int
    trace: int

    @classmethod
    def of(cls, size_bytes: int, nr_frames: int, *, backed: bool, packing: Packing) -> "MemorySizes":
        """Return the sizes for a device of `size_bytes` over `nr_frames` frames."""
        return cls(
            status_area=STATUS_AREA_BYTES,
            pages=(size_bytes >> PAGE_SHIFT) * ENTRY_SIZE + touched_size(size_bytes >> PAGE_SHIFT),
            frames=(nr_frames + BOUNCE_FRAMES) << PAGE_SHIFT,
            frame_table=packing.kind.table_size(nr_frames),
            free_frames=FRAME_ENTRY_BYTES * nr_frames,
            blocks=BlockMap.table_size(nr_segments(size_bytes)) if backed else 0,
            request_slots=REQUEST_SLOTS * REQUEST_SLOT_BYTES,
            outgoing=BATCH_FRAMES << PAGE_SHIFT if backed else 0,
            trace=RING_BYTES,
        )

    @property
    def tables_bytes(self) -> int:
        """Bytes of the tables, which grow with the device and the pool, without the frames."""
        return self.pages + self.frame_table + self.free_frames + self.blocks

    @property
    def buffers_bytes(self) -> int:
        """Bytes of the parts that have the same size in every store."""
        return self.status_area + self.request_slots + self.outgoing + (BOUNCE_FRAMES << PAGE_SHIFT)

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def nr_segments(size_bytes: int) -> int:
    """Return the segments of a backing file: in the worst case a block for each page, and the header."""
    return size_bytes // SEGMENT_BYTES + 2


class StoreMemory:
    """The memory of a device of `size_bytes` over `nr_frames` frames, with a backing file if `backed`.

    It lies in `folder`, or has no name. Files that exist there keep their content; LayoutError if they are another store's.
    """

    def __init__(
        self, size_bytes: int, nr_frames: int, *, backed: bool, folder: str | None = None, packing: Packing = ZBUD
    ) -> None:
        self.size_bytes = size_bytes
        self.nr_frames = nr_frames
        self.folder = folder
        self.packing = packing
        self.status_area = StatusArea(Arena("board", STATUS_AREA_BYTES, folder))
        self._check_packing()
        self.status_area.claim(
            size_bytes=size_bytes,
            pool_frames=nr_frames,
            backed=int(backed),
            persistent=int(folder is not None),
            packing=packing.code,
        )
        self.cgroup_limit: CgroupLimit | None = None
        """The cgroup limit that the pool must respect; None: only the pool's own limit counts."""
        sizes = MemorySizes.of(size_bytes, nr_frames, backed=backed, packing=packing)
        self.pages = Arena("pages", sizes.pages, folder)
        self.frames = Arena("frames", sizes.frames, folder)
        self.frame_table = Arena("frametable", sizes.frame_table, folder)
        self.free_frames = Arena("freeframes", sizes.free_frames, folder)
        self.request_slots = Arena("requestslots", sizes.request_slots, folder)
        self.trace = Arena("trace", sizes.trace, folder)
        self.blocks = Arena("blocks", sizes.blocks, folder) if backed else None
        self.outgoing = Arena("outgoing", sizes.outgoing, folder) if backed else None

    @property
    def nr_pages(self) -> int:
        """The pages of the device."""
        return self.size_bytes >> PAGE_SHIFT

    @property
    def nr_segments(self) -> int:
        """The most segments of the backing file."""
        return nr_segments(self.size_bytes)

    def _check_packing(self) -> None:
        """Raise LayoutError if there are frames of another packing, which this allocator could not read."""
        fields = self.status_area.fields
        if fields[Field.LAYOUT] == LAYOUT and fields[Field.PACKING] != self.packing.code:
            there = Packing.of_code(fields[Field.PACKING])
            raise LayoutError(
                f"the running zbudfs packs its frames as {there or 'a packing that this version does not know'} and cannot"
                f" be handed over to {self.packing}: swapoff and unmount it, then mount it again with --packing {self.packing}"
            )

    def populate(self) -> None:
        """Populate the parts of a fixed size; frames and their tables are populated in steps later. MemoryError."""
        self.pages.populate(0, self.pages.size)
        self.request_slots.populate(0, self.request_slots.size)
        for arena in (self.blocks, self.outgoing):
            if arena is not None:
                arena.populate(0, arena.size)
        self.frames.populate(self.nr_frames << PAGE_SHIFT, BOUNCE_FRAMES << PAGE_SHIFT)
        for offset, length in self.packing.kind.fixed_spans(self.nr_frames):
            self.frame_table.populate(offset, length)

    def page_table(self) -> PageTable:
        """Return the page table in `pages`."""
        entries = self.nr_pages * ENTRY_SIZE
        return PageTable(self.pages.view, self.nr_pages, self.pages.view[entries:])

    def check_room(self, wanted_bytes: int) -> None:
        """Raise MemoryError if the memory cgroup has too little room: the kernel would kill the daemon for taking it."""
        if self.cgroup_limit is None:
            return
        reserve = RESERVE_BYTES if self.status_area.fields[Field.STANDBY_READY] else RESERVE_BYTES + STANDBY_BYTES
        available = self.cgroup_limit.available_bytes()
        if available < wanted_bytes + reserve:
            raise MemoryError(
                f"the memory cgroup has room for {max(0, available) >> 20} MiB more, and the daemon keeps"
                f" {reserve >> 20} MiB for itself"
            )

    def populate_frames(self, runs: list[tuple[int, int]]) -> None:
        """Populate frames, as runs (first, count), and their parts of the tables. MemoryError."""
        for first, count in runs:
            self.frames.populate(first << PAGE_SHIFT, count << PAGE_SHIFT)
        self._populate_tables(runs)

    def _populate_tables(self, runs: list[tuple[int, int]]) -> None:
        for first, count in runs:
            for offset, length in self.packing.kind.table_spans(self.nr_frames, first, count):
                self.frame_table.populate(offset, length)
            # The pool's column, the stack of ready frames (from the left), and that of bare frames (from the right).
            for entry in (
                first,
                self.nr_frames + first,
                2 * self.nr_frames - first - count,
            ):
                self.free_frames.populate(4 * entry, 4 * count)

    def populated_frames(self) -> list[tuple[int, int]]:
        """Return the frames that have memory, as runs (first, count)."""
        runs = []
        for offset, length in self.frames.populated():
            first = offset >> PAGE_SHIFT
            count = min(first + (length >> PAGE_SHIFT), self.nr_frames) - first
            if count > 0:
                runs.append((first, count))
        return runs

    def map_populated(self) -> None:
        """Map all populated memory into this process. Without it, memory that another process populated is a page fault."""
        for arena in self.arenas:
            arena.map_populated()

    def map_frames(self, first: int, count: int) -> None:
        """Map the populated ones of some frames into this process, with their parts of the tables."""
        self.frames.map_populated(first << PAGE_SHIFT, count << PAGE_SHIFT)
        self._populate_tables([(first, count)])

    @property
    def arenas(self) -> list[Arena]:
        """All arenas except the status area."""
        arenas = [self.pages, self.frames, self.frame_table, self.free_frames, self.request_slots, self.trace]
        return arenas + [arena for arena in (self.blocks, self.outgoing) if arena is not None]


class Follower:
    """Keeps the mappings of one process up to date with the memory that the worker populates.

    It maps only new memory, and does nothing while the worker populates nothing. So the cost of an idle standby does not
    depend on the size of the pool. Memory that was released and populated again has its place in this process's page tables
    already, so it can be mapped later.
    """

    def __init__(self, memory: StoreMemory) -> None:
        self._memory = memory
        self._fields = memory.status_area.fields
        self._known = (-1, -1)
        self._mapped_frames = 0
        self._mapped_at = float("-inf")

    @property
    def is_behind(self) -> bool:
        """Whether `follow` may have work."""
        return self._known != (self._fields[Field.POPULATED_FRAMES], self._fields[Field.TRACING])

    def follow(self) -> None:
        """Map the memory that is new since the last call, or all of it if that was done REMAP_SECONDS ago or never."""
        if not self.is_behind:
            return
        known = self._fields[Field.POPULATED_FRAMES], self._fields[Field.TRACING]
        fresh = self._fields[Field.FRESH_FRAMES]
        now = time.monotonic()
        if now - self._mapped_at >= REMAP_SECONDS:
            self._memory.map_populated()
            self._known, self._mapped_frames, self._mapped_at = known, fresh, now
        elif fresh > self._mapped_frames:
            self._memory.map_frames(self._mapped_frames, fresh - self._mapped_frames)
            self._mapped_frames = fresh
