# SPDX-License-Identifier: MIT
"""All memory of a store: tables and frames that outlive the process which works with them.

    pages       the page table, the truth; behind it a byte for each stretch of it that was used
    frames      the frames, and the bounce frames behind them
    frametable  the allocator's columns            rebuilt from pages and frames by a new worker
    freeframes  the pool's own columns             rebuilt
    blocks      the block map                      rebuilt, but for which segments are ready
    parking     requests that were received, and above all what is to be written and waits for a frame
    outgoing    blocks on their way to the disk, encrypted
    trace       what was asked, for a reader; without memory unless a trace is on
    board       what the processes tell each other

Made by the keeper before it starts a worker, so that every worker has it mapped. Where there is a pool directory (a tmpfs
that is never swapped out) these are files in it; else memory without a name, which lives as long as one of the
processes does.
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
from zbudfs.store.board import BOARD_BYTES, LAYOUT, Board, Field
from zbudfs.store.headroom import Headroom
from zbudfs.store.trace_ring import RING_BYTES

FRAME_ENTRY_BYTES: Final = 8
"""Of the pool's table: an entry of the stack of free frames; and when a frame was stored to, or the block of its copy."""

BOUNCE_FRAMES: Final = 32
"""Blocks that can be read at once without a frame to keep them in: two requests of 64 KiB. Guessed."""


RESERVE_BYTES: Final = 32 << 20
"""What the pool leaves in the memory cgroup: a new standby needs more, while it gets ready, than a dead worker has left."""
STANDBY_BYTES: Final = 48 << 20
"""And beyond that while there is no standby: 34 MiB of its own, and 13 for a while to try itself out (measured)."""

REMAP_SECONDS: Final = 30.0
"""Least time between two walks of a standby over all memory: 50 ns a page. Guessed."""

PARKING_SLOTS: Final = 10
PARKING_SLOT_BYTES: Final = (1 << 20) + (64 << 10)
"""Requests are received here, and a write waits here for frames: eight that the kernel keeps in flight on its own account,
one that somebody waits for in write(2) (the file's lock lets in no more), and the next to be received. In memory that the
worker and the standby share, since only one of them needs it at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySizes:
    """Bytes of each part of a store's memory. All of it is locked in RAM once the pool is full; `trace` only while used."""

    board: int
    pages: int
    frames: int
    """Those of the pool and the bounce frames."""
    frame_table: int
    free_frames: int
    blocks: int
    """0 without a backing file, as is `outgoing`."""
    parking: int
    outgoing: int
    trace: int

    @classmethod
    def of(cls, size_bytes: int, nr_frames: int, *, backed: bool, packing: Packing) -> "MemorySizes":
        """Return the sizes for a device of `size_bytes` over `nr_frames` frames."""
        return cls(
            board=BOARD_BYTES,
            pages=(size_bytes >> PAGE_SHIFT) * ENTRY_SIZE + touched_size(size_bytes >> PAGE_SHIFT),
            frames=(nr_frames + BOUNCE_FRAMES) << PAGE_SHIFT,
            frame_table=packing.kind.table_size(nr_frames),
            free_frames=FRAME_ENTRY_BYTES * nr_frames,
            blocks=BlockMap.table_size(nr_segments(size_bytes)) if backed else 0,
            parking=PARKING_SLOTS * PARKING_SLOT_BYTES,
            outgoing=BATCH_FRAMES << PAGE_SHIFT if backed else 0,
            trace=RING_BYTES,
        )

    @property
    def tables_bytes(self) -> int:
        """What grows with the device and the pool, without the frames."""
        return self.pages + self.frame_table + self.free_frames + self.blocks

    @property
    def buffers_bytes(self) -> int:
        """What has the same size in every store."""
        return self.board + self.parking + self.outgoing + (BOUNCE_FRAMES << PAGE_SHIFT)

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def nr_segments(size_bytes: int) -> int:
    """Return the segments of a backing file: a block with a live page for each page at worst, and the header."""
    return size_bytes // SEGMENT_BYTES + 2


class StoreMemory:
    """The memory of a device of `size_bytes` over `nr_frames` frames, with a backing file if `backed`.

    In `folder`, or without a name. What is there already is taken; LayoutError if it is not for the same store.
    """

    def __init__(
        self, size_bytes: int, nr_frames: int, *, backed: bool, folder: str | None = None, packing: Packing = ZBUD
    ) -> None:
        self.size_bytes = size_bytes
        self.nr_frames = nr_frames
        self.folder = folder
        self.packing = packing
        self.board = Board(Arena("board", BOARD_BYTES, folder))
        self._check_packing()
        self.board.claim(
            size_bytes=size_bytes,
            pool_frames=nr_frames,
            backed=int(backed),
            persistent=int(folder is not None),
            packing=packing.code,
        )
        self.headroom: Headroom | None = None
        """What the pool must keep within; None: it takes what its limit allows."""
        sizes = MemorySizes.of(size_bytes, nr_frames, backed=backed, packing=packing)
        self.nr_pages = size_bytes >> PAGE_SHIFT
        self.pages = Arena("pages", sizes.pages, folder)
        self.frames = Arena("frames", sizes.frames, folder)
        self.frame_table = Arena("frametable", sizes.frame_table, folder)
        self.free_frames = Arena("freeframes", sizes.free_frames, folder)
        self.nr_segments = nr_segments(size_bytes)
        self.parking = Arena("parking", sizes.parking, folder)
        self.trace = Arena("trace", sizes.trace, folder)
        self.blocks = Arena("blocks", sizes.blocks, folder) if backed else None
        self.outgoing = Arena("outgoing", sizes.outgoing, folder) if backed else None

    def _check_packing(self) -> None:
        """LayoutError if frames of another packing are there: nothing could be found in them."""
        fields = self.board.fields
        if fields[Field.LAYOUT] == LAYOUT and fields[Field.PACKING] != self.packing.code:
            there = Packing.of_code(fields[Field.PACKING])
            raise LayoutError(
                f"the running zbudfs packs its frames as {there or 'a packing that this version does not know'} and cannot"
                f" be handed over to {self.packing}: swapoff and unmount it, then mount it anew with --packing {self.packing}"
            )

    def populate(self) -> None:
        """Populate what has a fixed size; the frames and their tables come in steps. MemoryError."""
        self.pages.populate(0, self.pages.size)
        self.parking.populate(0, self.parking.size)
        for arena in (self.blocks, self.outgoing):
            if arena is not None:
                arena.populate(0, arena.size)
        self.frames.populate(self.nr_frames << PAGE_SHIFT, BOUNCE_FRAMES << PAGE_SHIFT)
        for offset, length in self.packing.kind.fixed_spans(self.nr_frames):
            self.frame_table.populate(offset, length)

    def page_table(self) -> PageTable:
        """Return the page table that lies in `pages`."""
        entries = self.nr_pages * ENTRY_SIZE
        return PageTable(self.pages.view, self.nr_pages, self.pages.view[entries:])

    def check_room(self, wanted_bytes: int) -> None:
        """MemoryError if the memory cgroup has no room for so much: taking it would have the daemon killed."""
        if self.headroom is None:
            return
        reserve = RESERVE_BYTES if self.board.fields[Field.STANDBY_READY] else RESERVE_BYTES + STANDBY_BYTES
        available = self.headroom.available_bytes()
        if available < wanted_bytes + reserve:
            raise MemoryError(
                f"the memory cgroup has room for {max(0, available) >> 20} MiB more, and the daemon keeps"
                f" {reserve >> 20} MiB for itself"
            )

    def populate_frames(self, runs: list[tuple[int, int]]) -> None:
        """Give frames, as runs (first, count), memory, and their parts of the tables. MemoryError."""
        for first, count in runs:
            self.frames.populate(first << PAGE_SHIFT, count << PAGE_SHIFT)
        self._populate_tables(runs)

    def _populate_tables(self, runs: list[tuple[int, int]]) -> None:
        for first, count in runs:
            for offset, length in self.packing.kind.table_spans(self.nr_frames, first, count):
                self.frame_table.populate(offset, length)
            # the pool's column, and the stack of ready frames from the left and that of bare ones from the right
            for entry in (
                first,
                self.nr_frames + first,
                2 * self.nr_frames - first - count,
            ):
                self.free_frames.populate(4 * entry, 4 * count)

    def populated_frames(self) -> list[tuple[int, int]]:
        """The frames that have memory, as runs (first, count)."""
        runs = []
        for offset, length in self.frames.populated():
            first = offset >> PAGE_SHIFT
            count = min(first + (length >> PAGE_SHIFT), self.nr_frames) - first
            if count > 0:
                runs.append((first, count))
        return runs

    def map_populated(self) -> None:
        """Map all that has memory into this process: what another one populated is a page fault here otherwise."""
        for arena in self.arenas:
            arena.map_populated()

    def map_frames(self, first: int, count: int) -> None:
        """Map those of some frames that have memory into this process, and their parts of the tables."""
        self.frames.map_populated(first << PAGE_SHIFT, count << PAGE_SHIFT)
        self._populate_tables([(first, count)])

    @property
    def arenas(self) -> list[Arena]:
        """All but the board."""
        arenas = [self.pages, self.frames, self.frame_table, self.free_frames, self.parking, self.trace]
        return arenas + [arena for arena in (self.blocks, self.outgoing) if arena is not None]


class Follower:
    """Keeps the mappings of one process up with the memory that the worker populates.

    Only what is new is mapped, and nothing is looked at while nothing is populated: what an idle standby costs does not
    depend on the size of the pool. Memory that was given back and populated again has its place in this process's page
    tables already, so that it can be mapped later.
    """

    def __init__(self, memory: StoreMemory) -> None:
        self._memory = memory
        self._fields = memory.board.fields
        self._known = (-1, -1)
        self._mapped_frames = 0
        self._mapped_at = float("-inf")

    @property
    def is_behind(self) -> bool:
        """Whether `follow` may have something to do."""
        return self._known != (self._fields[Field.POPULATED_FRAMES], self._fields[Field.TRACING])

    def follow(self) -> None:
        """Map what is new since the last call; everything if that was never done, or is wanted and was done long ago."""
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
