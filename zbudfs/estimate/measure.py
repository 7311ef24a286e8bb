# SPDX-License-Identifier: MIT
"""Measure a sample: the daemon's own codec compresses it, and its own allocators pack it, with times.

Nothing is modelled. Each page goes the way that it would go in the daemon (same-filled? -> zpage -> raw). Each packing
in PACKINGS gets the zpages in the same order. Only the taken frames are counted. Nothing is freed meanwhile,
as nothing is freed while the kernel swaps memory out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from zbudfs.core.allocator import NO_REF, chunks_for, max_zpage_size
from zbudfs.core.codec import Codec, is_word, word_zpage
from zbudfs.core.packing import DENSE, ZBUD, Packing
from zbudfs.core.page_table import entry_of_word
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE, SIZE_CLASSES

PACKINGS: Final[Mapping[str, Packing]] = {packing.name: packing for packing in (ZBUD, DENSE)}
"""The packings, by their names for `--packing`."""

_ORDER: Final = sys.byteorder
_EVERY_PAGES: Final = 256
"""Pages between two reports of progress."""


@dataclass(frozen=True, slots=True)
class LevelMeasure:
    """A sample at one level."""

    level: int
    pages: int
    same_filled_pages: int
    """One 8-byte word repeated; most of them need no room at all."""
    raw_pages: int
    """No zpage of them fits a buddy: they take a frame each."""
    zpage_bytes: int
    """Size of the zpages, without handles and raw pages."""
    zpages: int
    """Pages that are kept as a zpage."""
    chunk_histogram: tuple[int, ...]
    """Number of zpages that use n chunks, for n from 0 to 63."""
    frames: Mapping[str, int]
    """Frames that the whole sample takes, raw pages included, for each packing."""
    compress_us: float
    """Mean of the pages that were compressed, raw ones included; 0 if there were none."""
    decompress_us: float
    """Mean of the zpages; 0 if there were none."""

    @property
    def ratio(self) -> float:
        """Bytes of the pages that were compressed to bytes of their zpages (a raw page counts whole); 1 if there were none."""
        pages = self.zpages + self.raw_pages
        stored = self.zpage_bytes + (self.raw_pages << PAGE_SHIFT)
        return (pages << PAGE_SHIFT) / stored if stored else 1.0

    def zpages_per_frame(self, packing: str) -> float:
        """Pages that are neither same-filled without room nor raw, to the frames that they take; 0 if there are none."""
        frames = self.frames[packing] - self.raw_pages
        return self.zpages / frames if frames else 0.0

    def frames_per_page(self, packing: str) -> float:
        """Frames that a page takes on average, same-filled and raw ones included."""
        return self.frames[packing] / self.pages


def measure(
    pages: Sequence[bytes], level: int, progress: Callable[[int, int], None], packings: Sequence[str] = tuple(PACKINGS)
) -> LevelMeasure:
    """Return what becomes of the pages at a level. ValueError for a level that does not exist."""
    codec = Codec(level)
    zpages: list[bytes] = []
    same_filled = raw = 0
    compress_ns = 0
    clock = time.perf_counter_ns
    for done, page in enumerate(pages):
        if not done % _EVERY_PAGES:
            progress(done, len(pages))
        word = int.from_bytes(page[:8], _ORDER)
        if is_word(page, word):
            same_filled += 1
            if entry_of_word(word) is None:
                zpages.append(word_zpage(word))
            continue
        began = clock()
        zpage = codec.encode(page)
        compress_ns += clock() - began
        if len(zpage) <= max_zpage_size():
            zpages.append(zpage)
        else:
            raw += 1
    began = clock()
    for zpage in zpages:
        codec.decode(zpage)
    decompress_ns = clock() - began
    histogram = [0] * SIZE_CLASSES
    for zpage in zpages:
        histogram[chunks_for(len(zpage))] += 1
    compressed = len(pages) - same_filled
    progress(len(pages), len(pages))
    return LevelMeasure(
        level=level,
        pages=len(pages),
        same_filled_pages=same_filled,
        raw_pages=raw,
        zpage_bytes=sum(map(len, zpages)),
        zpages=len(zpages),
        chunk_histogram=tuple(histogram),
        frames={name: _frames_taken(PACKINGS[name], zpages) + raw for name in packings},
        compress_us=compress_ns / compressed / 1000 if compressed else 0.0,
        decompress_us=decompress_ns / len(zpages) / 1000 if zpages else 0.0,
    )


def _frames_taken(packing: Packing, zpages: Sequence[bytes]) -> int:
    """Return how many frames an allocator fills with the zpages."""
    nr_frames = max(len(zpages), 1)
    frames = bytearray(nr_frames * PAGE_SIZE)  # untouched ones take no memory
    table = bytearray(packing.kind.table_size(nr_frames))
    allocator = packing.allocator(memoryview(frames), memoryview(table), nr_frames)
    taken = 0
    for number, zpage in enumerate(zpages):
        if allocator.match(number, zpage) == NO_REF:
            allocator.create_finish(allocator.create_prep(taken, len(zpage)), number, zpage)
            taken += 1
    return taken
