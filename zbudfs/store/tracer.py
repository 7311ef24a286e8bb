# SPDX-License-Identifier: MIT
"""Turning the trace on and off, in the worker. Off is the rule, and costs nothing: nobody looks whether it is on.

Whoever serves requests is told (`on_change`) and serves them with or without a record. That memory is needed is why turning
it on takes a moment and a thread. A reader that has died does not leave it on: without its beat the trace ends by itself.
"""

from collections.abc import Callable
from typing import Final

import trio

from zbudfs.core.allocator import chunks_for
from zbudfs.core.page_table import BLOCK, FRAME, KIND_BITS, KIND_MASK, REF_MASK
from zbudfs.core.trace import RAW_CLASS, UNKNOWN_CLASS, Kind
from zbudfs.core.units import PAGE_SHIFT, pages_in
from zbudfs.store.board import Field
from zbudfs.store.iothread import IoThread
from zbudfs.store.memory import StoreMemory
from zbudfs.store.state import State
from zbudfs.store.trace_ring import TraceRing

UNREAD_SECONDS: Final = 10.0
"""A trace that nobody has read for so long ends. Arbitrary: a reader looks many times a second."""

KEEP_SECONDS: Final = 5.0
"""What was recorded last can be read for so long after the end. Arbitrary: a reader takes it at once."""

_LOOK_SECONDS: Final = 1.0


class Tracer:
    """The trace of one mount. What it is told may be recorded while `active`, and only then."""

    def __init__(self, state: State, memory: StoreMemory) -> None:
        self._entries = state.table.entries
        self._allocator = state.pool.allocator
        self._ring = TraceRing(memory.trace)
        self.active = False
        self.on_change: Callable[[], None] = lambda: None
        self._fields = memory.board.fields
        self._wanted = False
        self._ordered = trio.Event()
        self._release_at = float("inf")
        """When the memory of a trace that has ended goes back to the system."""

    def order(self, *, on: bool) -> None:
        """Have the trace turned on or off, soon. Turning on what is on is nothing; what is in the ring stays."""
        self._wanted = on
        self._ordered.set()

    def adopt(self) -> None:
        """Go on with the trace of an earlier worker, if there was one."""
        if self._fields[Field.TRACING]:
            self._ring.resume()
            self._wanted = True
            self._set_active(active=True)
        else:
            self._release_at = trio.current_time() + KEEP_SECONDS  # what it may have left
        self._ordered.set()

    async def run(self, helper: IoThread[None]) -> None:
        """Do what is ordered, until cancelled; `helper` waits for memory."""
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

    async def _turn_on(self, helper: IoThread[None]) -> None:
        self._release_at = float("inf")
        try:
            await helper.run(self._ring.populate)
        except MemoryError:
            self._wanted = False  # whoever asked sees that it is not on
            return
        self._ring.begin()
        self._set_active(active=True)

    def _set_active(self, *, active: bool) -> None:
        self.active = active
        self._fields[Field.TRACING] = int(active)
        self.on_change()

    # ---- what is recorded ------------------------------------------------------------------------------------------

    def wrote(self, offset: int, length: int) -> None:
        """A write of whole pages, or of parts of them, is stored."""
        self._put(Kind.WRITE, offset, length)

    def read(self, offset: int, length: int) -> None:
        """A read was answered from RAM."""
        self._put(Kind.READ, offset, length)

    def paging_in(self, offset: int, length: int) -> None:
        """A read needs the backing file, for some of its pages at least; to be told before they are read."""
        page, pages = self._pages(offset, length)
        end = page + pages
        while page < end:
            start, on_disk = page, self._on_disk(page)
            while page < end and self._on_disk(page) == on_disk:
                page += 1
            self._ring.put(Kind.PAGEIN if on_disk else Kind.READ, start, page - start, self._size_class)

    def missed(self, kind: int, offset: int, length: int) -> None:
        """Something else was asked, or something else came of it."""
        first, pages = self._pages(offset, length)
        if pages > 0:
            self._ring.put_one(kind, first, pages, UNKNOWN_CLASS)

    def _put(self, kind: int, offset: int, length: int) -> None:
        first, pages = self._pages(offset, length)
        if pages > 0:
            self._ring.put(kind, first, pages, self._size_class)

    def _pages(self, offset: int, length: int) -> tuple[int, int]:
        """The pages of the device that bytes are in: first, and how many; none or fewer beyond its end."""
        first = offset >> PAGE_SHIFT
        return first, min(pages_in(offset + length), len(self._entries)) - first

    def _on_disk(self, page: int) -> bool:
        return self._entries[page] & KIND_MASK >= BLOCK

    def _size_class(self, page: int) -> int:
        """How a page is kept now."""
        entry = self._entries[page]
        kind = entry & KIND_MASK
        if kind == FRAME:
            zpage = self._allocator.zpage(entry >> KIND_BITS & REF_MASK, page)
            return chunks_for(len(zpage)) if zpage is not None else UNKNOWN_CLASS
        if kind < FRAME:
            return 0
        return UNKNOWN_CLASS if kind == BLOCK else RAW_CLASS
