# SPDX-License-Identifier: MIT
"""The requests to a store: reads, writes and discards of any byte range of the device.

    write    page -> word / zpage / raw -> place in a frame (wait for one if there is none) -> commit
    read     entry -> zeros / word / frame / block (read, checked, kept as an ephemeral frame if there is room)
    discard  entry -> absent; the edges that are not whole pages are zeroed

The one trio thread changes all state, between two checkpoints. After a checkpoint no earlier result is trusted: the page is
looked up again. docs/understand/concurrency.md numbers the races, and says how each is settled.
"""

from collections.abc import Callable, Iterable
from typing import Final

import trio

from zbudfs.core.codec import Codec
from zbudfs.core.errors import OutOfRange, PageLost, PoolFull, ZbudfsError
from zbudfs.core.page_table import ABSENT
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.contents import Contents
from zbudfs.store.page_in import PageIn, kept
from zbudfs.store.reclaimer import Reclaimer
from zbudfs.store.state import State

DISCARD_STEP_PAGES: Final = 2048
"""Stored pages that a discard frees before other requests get their turn: some 4 ms in Python, 0.4 ms in C."""

_OFFSET_MASK: Final = PAGE_SIZE - 1


class Requests:
    """The requests to a device of `size_bytes`.

    `between` is called after every page of a write, with their number so far: it answers reads that have come meanwhile.
    """

    def __init__(
        self,
        size_bytes: int,
        state: State,
        contents: Contents,
        page_in: PageIn,
        reclaimer: Reclaimer,
        codec: Codec,
        between: Callable[[int], object],
    ) -> None:
        self._size_bytes = size_bytes
        self._state = state
        self._contents = contents
        self._page_in = page_in
        self._reclaimer = reclaimer
        self.codec = codec
        """The codec of pages that are written. Any codec can read them."""
        self.between = between
        self._counters = state.counters
        self._path = state.path

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size_bytes:
            raise OutOfRange(f"bytes {offset} .. {offset + length} of a device of {self._size_bytes}")

    # ---- read ------------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """Do the same as `read`, for pages in RAM. None, and nothing was counted, if the backing file alone has one of them."""
        whole = not (offset | length) & _OFFSET_MASK and 0 <= offset < offset + length <= self._size_bytes
        page, count = offset >> PAGE_SHIFT, length >> PAGE_SHIFT
        if not whole:
            pages = self._pages_of(offset, length)
            if not pages:
                return b""
            page, count = pages.start, len(pages)
        content = self._path.read(page, count, self.codec.decompress)
        if content is None:
            content = self._in_ram(range(page, page + count))
            if content is None:
                return None
        self._counters.cumul_read_pages += len(content) >> PAGE_SHIFT  # fewer than `count` before a lost page
        return content if whole else self._cut(content, offset, length)

    def _in_ram(self, pages: range) -> bytes | None:
        """Return the contents of pages up to a lost one, or raise its error if it is the first. None if one is on disk only."""
        found: list[bytes] = []
        for page in pages:
            try:
                content = self._contents.in_ram(page)
            except PageLost:
                if not found:
                    raise
                break
            if content is None:
                return None
            found.append(content)
        return b"".join(found)

    def make_ready(self) -> bool:
        """Decompress one more page that a reader in order will ask for, while no request waits. False if there is none.

        This has no effect on the content that a read returns.
        """
        return self._path.make_ready(self.codec.decompress)

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes `offset` .. `offset + length`: fewer at the end of the device, or if a page but the first is lost.

        There is a checkpoint only if the backing file alone has a page. PageLost, BackingError.
        """
        pages = self._pages_of(offset, length)
        self._counters.cumul_read_pages += len(pages)
        return self._cut(b"".join(await self._load_until_lost(pages)), offset, length)  # CHECKPOINT

    def _pages_of(self, offset: int, length: int) -> range:
        if offset < 0 or length < 0:
            raise OutOfRange(f"bytes {offset} .. {offset + length}")
        end = min(offset + length, self._size_bytes)
        return range(offset >> PAGE_SHIFT, (end + _OFFSET_MASK) >> PAGE_SHIFT if end > offset else 0)

    def _cut(self, pages: bytes, offset: int, length: int) -> bytes:
        """Return the requested part of neighbouring pages."""
        skip = offset & _OFFSET_MASK
        length = min(length, max(self._size_bytes - offset, 0))
        return pages if not skip and len(pages) <= length else pages[skip : skip + length]

    async def _load(self, page: int) -> bytes:
        """Return the content of a page, with a checkpoint only if the backing file alone has it. PageLost, BackingError."""
        content = self._contents.in_ram(page)
        if content is None:
            loaded = (await self._page_in.page_in([page]))[page]  # CHECKPOINT
            if not isinstance(loaded, bytes):
                try:
                    raise loaded
                finally:
                    del loaded  # see `kept`
            return loaded
        return content

    async def _load_until_lost(self, pages: Iterable[int]) -> list[bytes]:
        """Return the contents of neighbouring pages up to one that cannot be read, whose error it raises if it is the first.

        The loss of a page must not fail its neighbours, since the read-ahead of swap asks for several at once. So the read
        is short, and the request for the rest gets the error.
        """
        found: list[bytes | None] = []
        missing = []
        lost: ZbudfsError | None = None
        for page in pages:
            try:
                content = self._contents.in_ram(page)
            except PageLost as error:
                lost = kept(error)
                break
            found.append(content)
            if content is None:
                missing.append(page)
        contents: list[bytes] = []
        there: bytes | ZbudfsError = b""
        loaded = iter((await self._page_in.page_in(missing)).values()) if missing else iter(())  # CHECKPOINT
        for content in found:
            there = next(loaded) if content is None else content
            if isinstance(there, ZbudfsError):
                lost = there
                break
            contents.append(there)
        if lost is not None and not contents:
            try:
                raise lost
            finally:
                del lost, found, loaded, there  # see `kept`
        return contents

    # ---- write -----------------------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, content: bytes | memoryview) -> int:
        """Store as many whole pages as there are frames for, and return the number of bytes. OutOfRange.

        The rest is for `write`. No reference to `content` is kept.
        """
        length = len(content)
        self._check_range(offset, length)
        if (offset | length) & _OFFSET_MASK:
            return 0
        state = self._state
        done = state.changing_path.write(offset >> PAGE_SHIFT, content, self.codec.compress, state, self.between)
        self._counters.cumul_written_pages += done
        self._reclaimer.kick()
        return done << PAGE_SHIFT

    async def write(self, offset: int, content: bytes | memoryview) -> None:
        """Store `content`, with a checkpoint only if no frame is free, or to patch a page. OutOfRange, PoolFull.

        After an error some of the pages may have the new content. There is no short write, since the loop driver of the
        kernel takes one for a complete write.
        """
        length = len(content)
        self._check_range(offset, length)
        view = memoryview(content)
        at = 0
        while at < length:
            skip = (offset + at) & _OFFSET_MASK
            whole = (length - at) & ~_OFFSET_MASK
            if skip or not whole:
                part = min(PAGE_SIZE - skip, length - at)
                await self._patch((offset + at) >> PAGE_SHIFT, skip, bytes(view[at : at + part]))  # CHECKPOINT
                at += part
                continue
            done = self.write_nowait(offset + at, view[at : at + whole])
            if done < whole:
                await self._wait_frame_free()  # CHECKPOINT
            at += done

    async def _wait_frame_free(self) -> None:
        try:
            await self._reclaimer.queue.wait_frame_free()
        except PoolFull as error:
            self._counters.refused(error.cause)
            raise

    async def _patch(self, page: int, skip: int, piece: bytes) -> None:
        """Replace some bytes of a page.

        The content from before a checkpoint is used only if the page has not changed since. Otherwise it is read again.
        """
        watch = self._state.watched.setdefault(page, [0, 0])
        watch[0] += 1
        try:
            while True:
                changes = watch[1]
                content = await self._load(page)  # CHECKPOINT if it is in the backing file
                if watch[1] != changes:
                    continue
                content = content[:skip] + piece + content[skip + len(piece) :]
                if self.write_nowait(page << PAGE_SHIFT, content):
                    return
                await self._wait_frame_free()  # CHECKPOINT: the page may have changed, so start again
        finally:
            watch[0] -= 1
            if not watch[0]:
                del self._state.watched[page]

    # ---- discard ---------------------------------------------------------------------------------------------------

    async def discard(self, offset: int, length: int) -> None:
        """Make the bytes read as zeros, and free whole pages. The part beyond the end of the device is ignored.

        The time depends on the stored pages, not on the length. Other requests get their turn after every few milliseconds.
        """
        if offset < 0 or length < 0:
            raise OutOfRange(f"bytes {offset} .. {offset + length}")
        end = min(offset + length, self._size_bytes)
        if offset >= end:
            return
        first, skip = divmod(offset, PAGE_SIZE)
        last, tail = divmod(end, PAGE_SIZE)
        if skip and first == last:
            await self._zero(first, skip, tail - skip)
            return
        if skip:
            await self._zero(first, skip, PAGE_SIZE - skip)
            first += 1
        page = self._discard_some(first, last)
        while page < last:
            await trio.lowlevel.checkpoint()  # CHECKPOINT: a write may have stored pages before `page`, which stay
            page = self._discard_some(page, last)
        if tail:
            await self._zero(last, 0, tail)

    def _discard_some(self, page: int, stop: int) -> int:
        """Free up to DISCARD_STEP_PAGES stored pages. Return the page at which to continue; `stop` at the end."""
        page, done = self._state.changing_path.discard(page, stop, DISCARD_STEP_PAGES, self._state)
        self._counters.cumul_discarded_pages += done
        return page

    async def _zero(self, page: int, skip: int, length: int) -> None:
        if self._state.table.entries[page] != ABSENT:
            await self._patch(page, skip, bytes(length))

    async def sync(self) -> None:
        """Sync the backing file: pages that were written back are on the disk then. BackingError."""
        await self._reclaimer.sync()
