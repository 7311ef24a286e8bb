# SPDX-License-Identifier: MIT
"""A trace against a page store, without a mount: what the daemon would have done with another pool, level, ...

The store is the daemon's own, with its tasks, threads and a backing file. It gets the requests in their order, as fast as
it takes them. Work that a real daemon does after some time, such as returning memory when the machine is calm, does not happen.
Every page that is read is compared with what was written last.

Pages that are read before they are written existed before the recording, so they are stored first. The device has only the
pages of the trace, in their order. So a replay needs the memory of the pool and not that of the device.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import random
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import trio

from zbudfs.core.codec import Codec
from zbudfs.core.errors import PageLost, PoolFull
from zbudfs.core.packing import Packing
from zbudfs.core.trace import RAW_CLASS, UNKNOWN_CLASS, Kind
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.backing import Backing
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.tracing.file import Trace
from zbudfs.tracing.pages import PageMaker

_TURN_REQUESTS: Final = 16
"""Requests between two chances for the store's tasks, as a burst of the daemon has."""
_LOOK_RECORDS: Final = 1024
"""Records between two looks at how full the store is, and words about progress."""
_NOBODY_KNOWS: Final = -1
"""The content of a page is not known: a write to it was refused in part."""


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """A store to try."""

    pool_bytes: int
    level: int
    low_watermark_frames: int = 0
    high_watermark_frames: int = 0
    """0: they follow the pool, as in the daemon."""
    packing: str = "zbud"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The result of a replay. Numbers are of pages, unless they say otherwise."""

    settings: ReplaySettings
    written_pages: int
    read_pages: int
    """Pages read by requests, absent ones included."""
    pagein_pages: int
    """Pages read that came from the backing file."""
    pagein_blocks: int
    writeback_pages: int
    writeback_frames: int
    refused_pages: int
    """In writes that found no room."""
    lost_pages: int
    """Could not be read back."""
    wrong_pages: int
    """Were read back with another content: a bug."""
    pool_used_max_bytes: int
    backing_used_max_bytes: int
    pages_per_frame: float
    """Stored pages in RAM that are not same-filled, a frame, when the pool was fullest."""
    seconds: float
    cpu_seconds: float
    """CPU time of all threads, without the making of pages."""

    @property
    def hit_ratio(self) -> float:
        """Share of the pages read that needed no backing file; 1 if nothing was read."""
        return 1 - self.pagein_pages / self.read_pages if self.read_pages else 1.0

    @property
    def cpu_us_per_page(self) -> float:
        """Microseconds for a page that was read or written."""
        pages = self.written_pages + self.read_pages
        return self.cpu_seconds * 1e6 / pages if pages else 0.0


class Script:
    """A trace made ready to be replayed: known size classes, a dense device, and what must be there at the start."""

    def __init__(self, trace: Trace, seed: int) -> None:
        self.level: int = trace.about["level"]
        records = trace.records
        chance = random.Random(seed)
        known = [
            size_class
            for size_class, kind in zip(records.classes, records.kinds, strict=True)
            if size_class != UNKNOWN_CLASS and kind in (Kind.WRITE, Kind.READ)
        ] or [0]
        touched: set[int] = set()
        for kind, page, count in zip(records.kinds, records.pages, records.counts, strict=True):
            if kind not in (Kind.DISCARD, Kind.GAP):
                touched.update(range(page, page + count))
        self.touched = array("Q", sorted(touched))
        """The pages of the real device, by their number here."""
        del touched
        self.requests: list[tuple[int, int, int, int]] = []
        """(kind, first page here, pages, size class)."""
        self.initial: list[tuple[int, int]] = []
        """(page here, size class) of what was there at the start, in the order in which it was asked for."""
        seen = bytearray(self.nr_pages)
        classes = array("B", bytes(self.nr_pages))
        for kind, page, count, size_class in zip(
            records.kinds, records.pages, records.counts, records.classes, strict=True
        ):
            if kind == Kind.GAP:
                continue
            first = bisect.bisect_left(self.touched, page)
            pages = bisect.bisect_left(self.touched, page + count, first) - first
            if not pages:
                continue
            if size_class == UNKNOWN_CLASS:
                size_class = chance.choice(known)
            writes = kind in (Kind.WRITE, Kind.REFUSED)
            for number in range(first, first + pages):
                if not seen[number]:
                    seen[number] = 1
                    if kind in (Kind.READ, Kind.PAGEIN, Kind.LOST):
                        self.initial.append((number, size_class))
                if writes:
                    classes[number] = size_class
            self.requests.append((kind, first, pages, min(size_class, RAW_CLASS)))

    @property
    def nr_pages(self) -> int:
        """Pages of the device that is replayed on; at least one."""
        return max(len(self.touched), 1)


def replay(
    script: Script,
    settings: ReplaySettings,
    folder: str | None,
    seed: int,
    progress: Callable[[int, int], None],
) -> ReplayResult:
    """Replay with these settings; the backing file is made in `folder`, None: there is none.

    ZbudfsError, OSError, MemoryError.
    """
    maker = PageMaker(script.level, seed)
    with _backing(folder) as backing:
        return trio.run(_Replay(script, settings, backing, maker, progress).run)


@contextlib.contextmanager
def _backing(folder: str | None) -> Iterator[Backing | None]:
    if folder is None:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="zbudfs-replay-") as place:
        yield Backing(os.path.join(place, "backing"))  # noqa: PTH118  closed by the store


class _Replay:
    def __init__(
        self,
        script: Script,
        settings: ReplaySettings,
        backing: Backing | None,
        maker: PageMaker,
        progress: Callable[[int, int], None],
    ) -> None:
        self._script = script
        self._settings = settings
        self._maker = maker
        self._progress = progress
        size_bytes, nr_frames = script.nr_pages * PAGE_SIZE, settings.pool_bytes >> PAGE_SHIFT
        packing = Packing.parse(settings.packing)
        memory = StoreMemory(size_bytes, nr_frames, backed=backing is not None, packing=packing)
        memory.populate()
        self._store = PageStore(size_bytes, nr_frames, backing, Codec(settings.level), memory)
        self._store.recover()  # of nothing: so begins a store whose memory was made for it
        self._variants = array("i", bytes(4 * script.nr_pages))
        """The variant and class that each page holds, as _stamp makes it; 0 is absent."""
        self._refused = self._lost = self._wrong = 0
        self._fullest = (0, 0.0)
        """Frames in use, and pages in RAM that are not same-filled, a frame."""
        self._backing_max = 0
        self._making_ns = 0

    async def run(self) -> ReplayResult:
        store, settings = self._store, self._settings
        try:
            store.reclaimer.configure(
                limit_frames=settings.pool_bytes >> PAGE_SHIFT,
                watermarks=(settings.low_watermark_frames, settings.high_watermark_frames),
                writeback_enabled=True,
                age_seconds=0,
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                for page, size_class in self._script.initial:
                    await self._write(page, 1, size_class)
                    await self._take_turn(page)
                before, began = store.statistics(), time.perf_counter()
                cpu_began = time.process_time()
                self._making_ns = self._refused = self._lost = self._wrong = 0
                for number, (kind, page, count, size_class) in enumerate(self._script.requests):
                    await self._take_turn(number)
                    if kind in (Kind.WRITE, Kind.REFUSED):
                        await self._write(page, count, size_class)
                    elif kind == Kind.DISCARD:
                        await store.requests.discard(page * PAGE_SIZE, count * PAGE_SIZE)
                        self._variants[page : page + count] = array("i", bytes(4 * count))
                    else:
                        await self._read(page, count)
                cpu_seconds = time.process_time() - cpu_began - self._making_ns / 1e9
                self._look()
                after = store.statistics()
                nursery.cancel_scope.cancel()
        finally:
            store.close()
            for arena in store.memory.arenas:
                arena.release(0, arena.size)
        return ReplayResult(
            settings=settings,
            written_pages=after.cumul_written_pages - before.cumul_written_pages,
            read_pages=after.cumul_read_pages - before.cumul_read_pages,
            pagein_pages=after.cumul_pagein_pages - before.cumul_pagein_pages,
            pagein_blocks=after.cumul_pagein_blocks - before.cumul_pagein_blocks,
            writeback_pages=after.cumul_writeback_pages - before.cumul_writeback_pages,
            writeback_frames=after.cumul_writeback_frames - before.cumul_writeback_frames,
            refused_pages=self._refused,
            lost_pages=self._lost,
            wrong_pages=self._wrong,
            pool_used_max_bytes=self._fullest[0] << PAGE_SHIFT,
            backing_used_max_bytes=self._backing_max,
            pages_per_frame=self._fullest[1],
            seconds=time.perf_counter() - began,
            cpu_seconds=cpu_seconds,
        )

    async def _take_turn(self, number: int) -> None:
        if not number % _TURN_REQUESTS:
            await trio.lowlevel.checkpoint()
        if not number % _LOOK_RECORDS:
            self._progress(number, len(self._script.requests))
            self._look()

    def _look(self) -> None:
        found = self._store.statistics()
        frames = found.pool_used_bytes >> PAGE_SHIFT
        if frames >= self._fullest[0] and frames:
            counters = self._store.zbud_counters()
            held = sum(counters[f"{kind}_{what}"] for kind in ("pers", "eph") for what in ("zpages", "raw_count"))
            self._fullest = (frames, held / frames)
        self._backing_max = max(self._backing_max, found.backing_used_bytes)

    async def _write(self, page: int, count: int, size_class: int) -> None:
        began = time.thread_time_ns()
        stamps = [_stamp(size_class, page + number) for number in range(count)]
        content = b"".join(self._content(stamp) for stamp in stamps)
        self._making_ns += time.thread_time_ns() - began
        offset = page * PAGE_SIZE
        try:
            done = self._store.requests.write_nowait(offset, content)
            if done < len(content):
                await self._store.requests.write(offset + done, content[done:])
        except PoolFull:
            self._refused += count
            stamps = [_NOBODY_KNOWS] * count
        self._variants[page : page + count] = array("i", stamps)

    async def _read(self, page: int, count: int) -> None:
        offset, length = page * PAGE_SIZE, count * PAGE_SIZE
        try:
            content = self._store.requests.read_nowait(offset, length)
            if content is None:
                content = await self._store.requests.read(offset, length)
        except PageLost:
            self._lost += count
            return
        self._lost += (length - len(content)) >> PAGE_SHIFT
        for number, (start, end) in enumerate(pairwise(range(0, len(content) + 1, PAGE_SIZE))):
            stamp = self._variants[page + number]
            if stamp != _NOBODY_KNOWS and content[start:end] != self._content(stamp):
                self._wrong += 1

    def _content(self, stamp: int) -> bytes:
        return self._maker.page(stamp >> 8, stamp & 0xFF) if stamp else bytes(PAGE_SIZE)


def _stamp(size_class: int, page: int) -> int:
    """Which made-up page a page is given: its class, and a variant; never 0."""
    return size_class << 8 | 1 + page % 251
