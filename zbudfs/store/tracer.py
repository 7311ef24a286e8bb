# SPDX-License-Identifier: MIT
"""Turns the trace on and off in the worker. A trace that is off costs nothing: no code checks whether it is on.

The handlers of requests are replaced when that changes (`notify`). Turning a trace on needs memory, and so a thread and a
moment. A reader that has died does not leave it on: without the reader's beat the trace ends by itself.
"""

from collections.abc import Callable
from typing import Final

import trio

from zbudfs.core.allocator import chunks_for
from zbudfs.core.page_table import BLOCK, FRAME, entry_kind, entry_ref
from zbudfs.core.trace import RAW_CLASS, UNKNOWN_CLASS, Kind
from zbudfs.core.units import PAGE_SHIFT, pages_in
from zbudfs.store.iothread import IoThread
from zbudfs.store.memory import StoreMemory
from zbudfs.store.state import State
from zbudfs.store.status_area import Field
from zbudfs.store.trace_ring import TraceRing

UNREAD_SECONDS: Final = 10.0
"""Time without a reader after which a trace ends. Arbitrary: a reader reads many times a second."""

KEEP_SECONDS: Final = 5.0
"""Time after the end for which the last records can be read. Arbitrary: a reader reads them at once."""

_LOOK_SECONDS: Final = 1.0


class Tracer:
    """The trace of one mount. The methods that record may be called only while `active`."""

    def __init__(self, state: State, memory: StoreMemory) -> None:
        self._entries = state.table.entries
        self._allocator = state.pool.allocator
        self._ring = TraceRing(memory.trace)
        self.active = False
        self._on_change: Callable[[], None] = lambda: None
        self._fields = memory.status_area.fields
        self._wanted = False
        self._ordered = trio.Event()
        self._release_at = float("inf")
        """Time at which the memory of an ended trace is released."""

    def order(self, *, on: bool) -> None:
        """Turn the trace on or off, soon. An order to turn on a trace that is on has no effect; its records stay."""
        self._wanted = on
        self._ordered.set()

    def resume(self) -> None:
        """Continue the trace of an earlier worker, if there was one."""
        if self._fields[Field.TRACING]:
            self._ring.resume()
            self._wanted = True
            self._set_active(active=True)
        else:
            self._release_at = trio.current_time() + KEEP_SECONDS  # an earlier worker may have left its memory
        self._ordered.set()

    async def run(self, helper: IoThread[None]) -> None:
        """Carry out orders until it is cancelled; `helper` is the thread that waits for memory."""
        beat, seen_at = 0, trio.current_time()
        while True:
            look_at = trio.current_time() + _LOOK_SECONDS if self.active else self._release_at
            with trio.move_on_at(look_at):
                await self._ordered.wait()
            self._ordered = trio.Event()
            now = trio.current_time()
            if not self.active:
                beat, seen_at = 0, now
            elif self._ring.beat != beat:
                beat, seen_at = self._ring.beat, now
            elif now - seen_at >= UNREAD_SECONDS:
                self._wanted = False
            if self._wanted and not self.active:
                await self._turn_on(helper)
            elif not self._wanted and self.active:
                self._set_active(active=False)
                self._ring.end()
                self._release_at = now + KEEP_SECONDS
            elif not self.active and now >= self._release_at:
                self._release_at = float("inf")
                await helper.run(self._ring.release)

    def notify(self, on_change: Callable[[], None]) -> None:
        """Set the function that is called after each change of `active`."""
        self._on_change = on_change

    async def _turn_on(self, helper: IoThread[None]) -> None:
        self._release_at = float("inf")
        try:
            await helper.run(self._ring.populate)
        except MemoryError:
            self._wanted = False  # the reader sees that the trace is not on
            return
        self._ring.begin()
        self._set_active(active=True)

    def _set_active(self, *, active: bool) -> None:
        self.active = active
        self._fields[Field.TRACING] = int(active)
        self._on_change()

    # ---- records ---------------------------------------------------------------------------------------------------

    def wrote(self, offset: int, length: int) -> None:
        """Record a write, of whole or partial pages, that was stored."""
        self._put(Kind.WRITE, offset, length)

    def read(self, offset: int, length: int) -> None:
        """Record a read that was answered from RAM."""
        self._put(Kind.READ, offset, length)

    def paging_in(self, offset: int, length: int) -> None:
        """Record a read that needs the backing file for some of its pages. Call this before they are read."""
        page, pages = self._pages(offset, length)
        end = page + pages
        while page < end:
            start, on_disk = page, self._on_disk(page)
            while page < end and self._on_disk(page) == on_disk:
                page += 1
            self._ring.put(Kind.PAGEIN if on_disk else Kind.READ, start, page - start, self._size_class)

    def missed(self, kind: int, offset: int, length: int) -> None:
        """Record a discard, or a request that failed."""
        first, pages = self._pages(offset, length)
        if pages > 0:
            self._ring.put_one(kind, first, pages, UNKNOWN_CLASS)

    def _put(self, kind: int, offset: int, length: int) -> None:
        first, pages = self._pages(offset, length)
        if pages > 0:
            self._ring.put(kind, first, pages, self._size_class)

    def _pages(self, offset: int, length: int) -> tuple[int, int]:
        """Return the first page, and the number of pages, of a range of bytes; pages beyond the device do not count."""
        first = offset >> PAGE_SHIFT
        return first, min(pages_in(offset + length), len(self._entries)) - first

    def _on_disk(self, page: int) -> bool:
        return entry_kind(self._entries[page]) >= BLOCK

    def _size_class(self, page: int) -> int:
        """Return the present size class of a page."""
        entry = self._entries[page]
        kind = entry_kind(entry)
        if kind == FRAME:
            zpage = self._allocator.zpage(entry_ref(entry), page)
            return chunks_for(len(zpage)) if zpage is not None else UNKNOWN_CLASS
        if kind < FRAME:
            return 0
        return UNKNOWN_CLASS if kind == BLOCK else RAW_CLASS
