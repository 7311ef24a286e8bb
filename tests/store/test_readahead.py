# SPDX-License-Identifier: MIT
"""Blocks that are read ahead: the readers that get them, changes of their pages meanwhile, and their cost for others."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.core.samples import BIG, page, pages
from tests.store.faulty import FaultyBacking, about
from tests.store.rig import backed_store, block_of, drop, get, in_block, in_ram, put, quiet, trio_test, until
from tests.store.test_writeback import Task, held_at, new
from zbudfs.core.errors import BackingError, PageLost
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.page_store import PageStore

pytestmark = pytest.mark.usefixtures("packing")

STORED: Final = 160
STEP: Final = 4
"""Pages of a request, and so blocks."""


@contextlib.asynccontextmanager
async def on_disk(folder: Path) -> AsyncIterator[tuple[PageStore, FaultyBacking]]:
    """Put pages 0 .. 159 into neighbouring blocks, one in each, and none into RAM."""
    async with backed_store(folder, nr_frames=256) as (store, backing):
        for number in range(STORED):
            await put(store, number, page(number, BIG))
        store.reclaimer.writeback.order(STORED)
        await until(lambda: all(in_block(store, number) for number in range(STORED)), "all is on the disk")
        await quiet(store)
        blocks = [block_of(store, number) for number in range(STORED)]
        assert blocks == list(range(blocks[0], blocks[0] + STORED))
        yield store, backing


@trio_test
async def test_a_reader_in_order(tmp_path: Path) -> None:
    """The reader waits for the disk a few times, each block is read once, and the statistics separate both kinds."""
    async with on_disk(tmp_path) as (store, backing):
        for at in range(0, STORED, STEP):
            assert await get(store, at, STEP) == pages(STORED, BIG)[at * PAGE_SIZE : (at + STEP) * PAGE_SIZE]
        counts = store.statistics()
        reads = backing.calls_of("read_blocks")
        assert len(reads) <= 8
        assert counts.cumul_pagein_blocks == sum(call.count for call in reads) == STORED
        assert counts.cumul_readahead_blocks == STORED - STEP * len(reads)
        assert counts.cumul_pagein_pages == STEP * len(reads)
        assert counts.cumul_read_pages == STORED
        assert counts.cumul_refault_blocks == STEP * len(reads)
        await quiet(store)


@trio_test
async def test_a_reader_here_and_there(tmp_path: Path) -> None:
    """Such a reader gets only its own blocks, and so does one that asks for single pages in order."""
    async with on_disk(tmp_path) as (store, backing):
        for at in (64, 0, 32, 96, 16, 80, 48, 112):
            assert await get(store, at, STEP) == b"".join(page(number, BIG) for number in range(at, at + STEP))
        for number in range(120, 140):
            assert await get(store, number) == page(number, BIG)
        counts = store.statistics()
        assert counts.cumul_readahead_blocks == 0
        assert counts.cumul_pagein_blocks == sum(call.count for call in backing.calls_of("read_blocks")) == 52


@pytest.mark.race(16)
@trio_test
async def test_pages_that_change_while_they_are_read_along(tmp_path: Path) -> None:
    """16. A page that is overwritten or discarded meanwhile stays so, and readers of the others wait for that read."""
    async with on_disk(tmp_path) as (store, backing), trio.open_nursery() as nursery:
        await get(store, 0, STEP)
        with backing.held("read_blocks") as gate:
            read = Task(nursery, lambda: get(store, STEP, STEP))
            await held_at(gate)
            assert gate.held[0].count == 3 * STEP
            await put(store, 9, new(9))
            await drop(store, 10)
            waits = Task(nursery, lambda: get(store, 11))
            await waits.still_waits()
            store.reclaimer.writeback.order(1)
            await until(lambda: in_block(store, 9), "the new page 9 is on the disk")
        assert await read.outcome() == b"".join(page(number, BIG) for number in range(STEP, 2 * STEP))
        assert await waits.outcome() == page(11, BIG)
        assert len(gate.held) == 1
        await quiet(store)
        assert in_ram(store, 8) and in_ram(store, 11) and in_block(store, 9)
        assert await get(store, 8, 4) == page(8, BIG) + new(9) + bytes(PAGE_SIZE) + page(11, BIG)
        await quiet(store)


@trio_test
async def test_without_room(tmp_path: Path) -> None:
    """Nothing is read ahead if no frame can keep it, or none would be left for writes."""
    async with on_disk(tmp_path) as (store, _):
        store.reclaimer.writeback.enabled = False
        low = store.statistics().low_watermark_frames
        for number in range(256 - low):
            await put(store, 200 + number, page(number, BIG))
        for at in range(0, STORED, STEP):
            assert await get(store, at, STEP) == b"".join(page(number, BIG) for number in range(at, at + STEP))
        assert store.statistics().cumul_readahead_blocks == 0
        assert store.statistics().pool_used_bytes == (256 - low) * PAGE_SIZE
        await quiet(store)


@trio_test
async def test_blocks_read_ahead_that_fail(tmp_path: Path) -> None:
    """Only a reader of its page notices a block that the disk refuses, or a damaged one."""
    async with on_disk(tmp_path) as (store, backing):
        await get(store, 0, STEP)
        with (tmp_path / "backing").open("r+b") as file:
            file.seek(block_of(store, 10) * PAGE_SIZE + PAGE_SIZE // 2)
            file.write(b"another's")
            file.seek(block_of(store, 11) * PAGE_SIZE)
            file.write(bytes(PAGE_SIZE))
        backing.fail("read_blocks", about({block_of(store, 9)}))
        assert await get(store, STEP, STEP) == b"".join(page(number, BIG) for number in range(STEP, 2 * STEP))
        assert store.statistics().pagein_failures == store.statistics().lost_pages == 0
        assert await get(store, 8) == page(8, BIG)
        with pytest.raises(BackingError):
            await get(store, 9)
        for number in (10, 11):
            with pytest.raises(PageLost):
                await get(store, number)
        backing.recover()
        assert await get(store, 9) == page(9, BIG)
        await quiet(store)
