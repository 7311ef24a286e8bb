# SPDX-License-Identifier: MIT
"""The figures of a sample equal those of a real store with the same pages."""

from __future__ import annotations

import random
import struct

import pytest

from kit.storm import make_page
from tests.store.rig import put, run, running
from zbudfs.core.codec import Codec
from zbudfs.core.statistics import PageStoreStatistics
from zbudfs.core.units import PAGE_SIZE
from zbudfs.estimate.measure import PACKINGS, measure
from zbudfs.store.page_store import PageStore

PAGES = [make_page(number, 0, 1) for number in range(800)]


def quiet(done: int, total: int) -> None:
    """Ignore a message of progress."""
    assert 0 <= done <= total


@pytest.mark.parametrize("level", [-5, -1, 3])
def test_the_figures_are_those_of_a_store(level: int) -> None:
    """Frames, kinds and sizes equal those of a page store that was given the same pages."""
    found = measure(PAGES, level, quiet)
    figures: list[PageStoreStatistics] = []
    histograms: list[list[int]] = []

    async def main() -> None:
        store = PageStore(len(PAGES) * PAGE_SIZE, len(PAGES), None, Codec(level))
        async with running(store):
            await put(store, 0, b"".join(PAGES))
            figures.append(store.statistics())
            histograms.append(store.state.allocator.chunk_histogram())

    run(main)
    (store,) = figures
    assert found.same_filled_pages == store.same_filled_pages == 300
    assert found.raw_pages == store.raw_pages == 100
    assert found.zpage_bytes == store.compressed_bytes
    assert list(found.chunk_histogram) == histograms[0]
    assert found.frames["zbud"] * PAGE_SIZE == store.pool_used_bytes
    assert found.zpages == sum(found.chunk_histogram)
    assert found.compress_us > 0 < found.decompress_us


def test_only_same_filled_pages() -> None:
    """A sample of same-filled pages takes no frames and causes no division by zero. Odd words become zpages."""
    found = measure([bytes(PAGE_SIZE)] * 3, -1, quiet)
    assert (found.frames["zbud"], found.ratio, found.zpages_per_frame("zbud"), found.compress_us) == (0, 1.0, 0.0, 0.0)
    odd = measure([struct.pack("d", 0.1) * (PAGE_SIZE // 8)], -1, quiet)
    assert (odd.same_filled_pages, odd.zpages, odd.frames["zbud"]) == (1, 1, 1)


def test_pages_that_do_not_compress() -> None:
    """A page that does not compress takes a frame, with each packing."""
    noise = [random.Random(number).randbytes(PAGE_SIZE) for number in range(9)]
    found = measure(noise, -1, quiet)
    assert found.raw_pages == 9
    assert all(found.frames[packing] == 9 for packing in PACKINGS)
    assert found.ratio == 1.0
