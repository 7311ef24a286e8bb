# SPDX-License-Identifier: MIT
"""The ring that a worker writes and another process reads, and its switch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kit.storm import make_page
from tests.store.rig import backed_store, in_block, push, put, quiet, running, trio_test, until
from tests.support import LIMIT_SECONDS
from zbudfs.core.codec import Codec
from zbudfs.core.trace import CLASS_MASK, KIND_BITS, KIND_MASK, RAW_CLASS, UNKNOWN_CLASS, Kind
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.arena import Arena
from zbudfs.store.iothread import IoThread
from zbudfs.store.memory import StoreMemory
from zbudfs.store.page_store import PageStore
from zbudfs.store.trace_ring import HEADER_BYTES, RING_BYTES, RING_RECORDS, TraceRing, Word
from zbudfs.store.tracer import KEEP_SECONDS, UNREAD_SECONDS
from zbudfs.tracing.ring import RingReader, open_ring


def read_all(reader: RingReader) -> tuple[list[tuple[int, int, int, int]], int]:
    """Return (kind, class, first page, pages) of new records, and the number of lost ones."""
    words, lost = reader.read()
    pairs = zip(words[::2], words[1::2], strict=True)
    return [(a & KIND_MASK, a >> KIND_BITS & CLASS_MASK, b & 0xFFFFFFFF, b >> 32) for a, b in pairs], lost


def one_class(page: int) -> int:
    """Return the size class of any page."""
    return 9


@pytest.fixture
def both(tmp_path: Path) -> tuple[TraceRing, RingReader]:
    """Return a ring and its reader."""
    ring = TraceRing(Arena("trace", RING_BYTES, str(tmp_path)))
    ring.populate()
    ring.begin()
    return ring, open_ring(str(tmp_path), os.getpid())


def test_neighbours_of_one_class_are_one_record(both: tuple[TraceRing, RingReader]) -> None:
    """Pages of several classes are several records, which together are the whole request."""
    ring, reader = both
    classes = [3, 3, 3, 0, 64, 64]
    ring.put(Kind.WRITE, 100, 6, lambda page: classes[page - 100])
    ring.put_one(Kind.DISCARD, 5, 1 << 40, UNKNOWN_CLASS)
    assert read_all(reader) == (
        [
            (Kind.WRITE, 3, 100, 3),
            (Kind.WRITE, 0, 103, 1),
            (Kind.WRITE, 64, 104, 2),
            (Kind.DISCARD, UNKNOWN_CLASS, 5, 0xFFFFFFFF),
        ],
        0,
    )
    assert read_all(reader) == ([], 0)
    reader.close()


@pytest.mark.parametrize("written", [RING_RECORDS - 1, RING_RECORDS + 500, 3 * RING_RECORDS + 7])
def test_a_slow_reader_loses_the_oldest_records(both: tuple[TraceRing, RingReader], written: int) -> None:
    """The ring has the newest records, and lost ones are counted."""
    ring, reader = both
    ring.put(Kind.READ, 0, 1, one_class)
    assert len(read_all(reader)[0]) == 1
    for page in range(written):
        ring.put(Kind.READ, page, 1, one_class)
    found, lost = read_all(reader)
    assert len(found) + lost == written
    assert len(found) == min(written, RING_RECORDS - 1)  # one may be about to be overwritten
    assert [page for _, _, page, _ in found] == list(range(lost, written))
    reader.close()


def test_another_worker_goes_on(both: tuple[TraceRing, RingReader], tmp_path: Path) -> None:
    """The next worker continues in the same ring, with the same clock, after the last record."""
    ring, reader = both
    ring.put(Kind.READ, 1, 1, one_class)
    following = TraceRing(Arena("trace", RING_BYTES, str(tmp_path)))
    following.resume()
    following.put(Kind.READ, 2, 1, one_class)
    words, lost = reader.read()
    assert (len(words), lost) == (4, 0)
    assert words[0] >> 11 <= words[2] >> 11 < 60_000_000
    before = reader.active
    following.end()
    assert (before, reader.active) == (True, False)
    reader.close()


def test_a_ring_without_a_name() -> None:
    """The ring is found among the worker's open files. Without one, the error says so."""
    program = (
        "import sys\n"
        "from zbudfs.store.memory import StoreMemory\n"
        "from zbudfs.store.trace_ring import TraceRing\n"
        "ring = TraceRing(StoreMemory(1 << 20, 256, backed=False).trace)\n"
        "ring.populate(), ring.begin(), ring.put(2, 77, 1, lambda page: 9)\n"
        "print('ready', flush=True), sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        reader = open_ring("/none", worker.pid)
        assert reader.active
        assert read_all(reader) == ([(Kind.READ, 9, 77, 1)], 0)
        reader.close()
        worker.communicate(timeout=LIMIT_SECONDS)
    with pytest.raises(FileNotFoundError, match="has no ring"):
        open_ring("/none", os.getppid())


@asynccontextmanager
async def traced_store(folder: Path) -> AsyncIterator[tuple[PageStore, Callable[[], RingReader]]]:
    """Run a store with a tracer, and return a way to its ring."""
    memory = StoreMemory(1 << 20, 256, backed=False, folder=str(folder))
    memory.populate()
    store = PageStore(1 << 20, 256, None, Codec(), memory)
    store.recover()
    helper = IoThread[None]("helper")
    async with running(store), trio.open_nursery() as nursery:
        nursery.start_soon(store.tracer.run, helper)
        yield store, lambda: open_ring(str(folder), os.getpid())
        nursery.cancel_scope.cancel()
    helper.close()


@trio_test
async def test_on_and_off(tmp_path: Path) -> None:
    """The trace takes memory only while it is on, and each change is reported to the server."""
    async with traced_store(tmp_path) as (store, open_reader):
        changes: list[bool] = []
        tracer = store.tracer
        tracer.notify(lambda: changes.append(tracer.active))
        assert store.memory.trace.resident_bytes == 0
        tracer.order(on=True)
        await until(lambda: tracer.active, "the trace is on")
        assert store.memory.trace.resident_bytes >= RING_BYTES
        await put(store, 0, b"".join(make_page(number, 0, 1) for number in range(8)))
        tracer.wrote(0, 8 * PAGE_SIZE)
        tracer.read(8 * PAGE_SIZE + 5, 10)
        tracer.missed(Kind.DISCARD, 0, 1 << 62)
        tracer.read(1 << 20, 4096)  # beyond the end
        tracer.missed(Kind.DISCARD, 1 << 62, 5)
        reader = open_reader()
        found, lost = read_all(reader)
        assert lost == 0
        assert found[0] == (Kind.WRITE, 0, 0, 1)
        assert sum(pages for kind, _, _, pages in found if kind == Kind.WRITE) == 8
        assert found[-3:] == [
            (Kind.WRITE, RAW_CLASS, 7, 1),
            (Kind.READ, 0, 8, 1),
            (Kind.DISCARD, UNKNOWN_CLASS, 0, 256),
        ]
        reader.close()
        tracer.order(on=False)
        await until(lambda: not tracer.active, "the trace is off")
        assert store.memory.trace.resident_bytes > 0  # the last records can still be read
        push(KEEP_SECONDS * 1.5)
        await until(lambda: store.memory.trace.resident_bytes == 0, "its memory is given back")
        assert changes == [True, False]
        await quiet(store)


@trio_test
async def test_a_trace_without_a_reader_ends(tmp_path: Path) -> None:
    """A dead reader cannot turn the trace off, so it ends by itself. A living one keeps it on."""
    async with traced_store(tmp_path) as (store, open_reader):
        tracer = store.tracer
        tracer.order(on=True)
        await until(lambda: tracer.active, "the trace is on")
        reader = open_reader()
        for _ in range(3):
            reader.read()
            await trio.sleep(0.01)
            push(UNREAD_SECONDS * 0.7)
            await trio.sleep(0.01)
            assert tracer.active
        reader.close()
        push(UNREAD_SECONDS * 1.5)
        await until(lambda: not tracer.active, "the trace has ended")


@trio_test
async def test_a_takeover_goes_on_with_the_trace(tmp_path: Path) -> None:
    """The status area says that there is a trace."""
    async with traced_store(tmp_path) as (store, open_reader):
        store.tracer.order(on=True)
        await until(lambda: store.tracer.active, "the trace is on")
        store.tracer.missed(Kind.DISCARD, 0, PAGE_SIZE)
        following = PageStore(
            1 << 20, 256, None, Codec(), StoreMemory(1 << 20, 256, backed=False, folder=str(tmp_path))
        )
        following.recover()
        following.tracer.resume()
        assert following.tracer.active
        following.tracer.missed(Kind.DISCARD, PAGE_SIZE, PAGE_SIZE)
        reader = open_reader()
        assert [page for _, _, page, _ in read_all(reader)[0]] == [0, 1]
        reader.close()
        following.close()


@trio_test
async def test_a_read_that_needs_the_disk_for_a_part(tmp_path: Path) -> None:
    """Pages that only the backing file has are separate records."""
    async with backed_store(tmp_path, nr_pages=256) as (store, _):
        memory = store.memory
        tracer = store.tracer
        tracer._ring.populate()
        tracer._ring.begin()
        for page in range(120):
            await put(store, page, make_page(7, page, 1))  # does not compress: many go to the disk
        await quiet(store)
        disk = [in_block(store, page) for page in range(120)]
        assert any(disk) and not all(disk)
        tracer.paging_in(0, 120 * PAGE_SIZE)
        words = memory.trace.view.cast("Q")
        head = words[Word.HEAD]
        start = HEADER_BYTES // 8
        pairs = [(words[start + 2 * at], words[start + 2 * at + 1]) for at in range(head)]
        told = [a & KIND_MASK == Kind.PAGEIN for a, b in pairs for _ in range(b >> 32)]
        assert told == disk
