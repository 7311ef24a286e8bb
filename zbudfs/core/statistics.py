# SPDX-License-Identifier: MIT
"""The statistics of a store, each declared once, with its name, its unit, its meaning and its name in exporters.

    CounterFields         events, which only grow            counters.cumul_read_pages += 1
    PageStoreStatistics   these, and the present state       made by PageStore.statistics

The files of stats/, the metrics of `zbudfs exporter` and the tables of docs/use/reference.md have every statistic that
is declared here; tests/test_statistics.py compares them.

`Counters` is `CounterFields` in memory that outlives the process: a field is an 8-byte word, in the order of the
fields. A kill loses nothing that was counted. A new counter goes to the end. Any other change of the fields makes another
layout (store/status_area.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Final

from zbudfs.core.errors import Loss, Refusal
from zbudfs.core.units import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Stat:
    """The declaration of a statistic. Unit and meaning are read as one phrase: "pages read", "bytes of the swapfile"."""

    unit: str
    meaning: str
    kernel: str = ""
    """The kernel's names of the same number, for readers who know them; in Markdown."""
    metric: str | None = None
    """Name of the metric, without prefix and `_total`; None: the statistic's name without `cumul_`."""
    scale: int = 1
    """Factor from the statistic to the metric."""
    grouped: bool = False
    """Whether the statistic shares one metric, with a label, with others."""


@dataclass
class CounterFields:
    """Events since the mount."""

    cumul_read_pages: Annotated[int, Stat("pages", "read", "`pswpin`")]
    cumul_written_pages: Annotated[int, Stat("pages", "written", "`pswpout`")]
    cumul_discarded_pages: Annotated[
        int, Stat("pages", "that were stored when they were discarded", "`notify_free` (zram)")
    ]
    cumul_raw_pages: Annotated[
        int,
        Stat(
            "pages",
            "written and kept raw, since the zpage is too large for a frame",
            "`reject_compress_poor` (zswap)",
            "incompressible_pages",
        ),
    ]
    cumul_writeback_frames: Annotated[int, Stat("frames", "written back", "`bd_writes` (zram)")]
    cumul_writeback_pages: Annotated[int, Stat("pages", "in the frames written back", "`written_back_pages` (zswap)")]
    cumul_aged_frames: Annotated[int, Stat("frames", "written back because of their age")]
    cumul_grown_bytes: Annotated[int, Stat("bytes", "of zeros, written to make the backing file ready ahead of need")]
    cumul_dropped_frames: Annotated[int, Stat("frames", "that were ephemeral and dropped, without any I/O")]
    cumul_pagein_blocks: Annotated[int, Stat("blocks", "read back, those read ahead included", "`bd_reads` (zram)")]
    cumul_pagein_pages: Annotated[int, Stat("pages", "that a read requested and that came from a block")]
    cumul_readahead_blocks: Annotated[int, Stat("blocks", "read ahead, before a read requested them", "`swap_ra`")]
    cumul_refault_blocks: Annotated[
        int,
        Stat(
            "blocks",
            "read back within 30 s of a write to their segment of 64 blocks: most likely they were still in use",
            "`workingset_refault_anon`",
        ),
    ]
    refused_no_backing: Annotated[
        int, Stat("writes", "refused: the pool was full and there is no backing file", grouped=True)
    ]
    refused_backing_full: Annotated[
        int, Stat("writes", "refused: the pool and the backing file were full", grouped=True)
    ]
    refused_backing_failing: Annotated[
        int,
        Stat(
            "writes",
            "refused: the pool was full and the backing file had just failed",
            "`reject_reclaim_fail` (zswap)",
            grouped=True,
        ),
    ]
    refused_backing_stalled: Annotated[
        int,
        Stat(
            "writes",
            "refused: the pool was full and the backing file had not answered for half a minute",
            grouped=True,
        ),
    ]
    refused_writeback_off: Annotated[
        int, Stat("writes", "refused: the pool was full and writeback turned off", grouped=True)
    ]
    refused_budget: Annotated[int, Stat("writes", "refused: the pool was full and the budget used up", grouped=True)]
    refused_no_memory: Annotated[
        int,
        Stat("writes", "refused: the system gave the pool no memory", "`reject_alloc_fail` (zswap)", grouped=True),
    ]
    refused_busy: Annotated[
        int, Stat("writes", "refused: every frame was being read or written at that moment", grouped=True)
    ]
    writeback_failures: Annotated[
        int,
        Stat(
            "batches",
            "that could not be written to the backing file; their frames stayed in RAM",
            "`failed_writes` (zram)",
        ),
    ]
    pagein_failures: Annotated[
        int, Stat("blocks", "that could not be read from the backing file (EIO)", "`failed_reads` (zram)")
    ]
    lost_damaged: Annotated[int, Stat("reads", "answered with EIO: a checksum failed", grouped=True)]
    lost_foreign: Annotated[int, Stat("reads", "answered with EIO: the place held another page", grouped=True)]
    lost_old: Annotated[
        int, Stat("reads", "answered with EIO: the block held an old version of the page", grouped=True)
    ]
    lost_crash: Annotated[
        int, Stat("pages and reads", "lost: the death of a worker made the page unreadable", grouped=True)
    ]
    pressure_reports: Annotated[int, Stat("reports", "of memory pressure; each lowers the limit for a while")]


COUNTERS: Final = tuple(field.name for field in fields(CounterFields))
"""The names of the counters, in the order of the words."""

_REFUSED: Final = {cause: COUNTERS.index(f"refused_{cause}") for cause in Refusal}
_READ_PAGES: Final = COUNTERS.index("cumul_read_pages")
_PAGEIN_PAGES: Final = COUNTERS.index("cumul_pagein_pages")
PAGE_READ_COUNTERS: Final = (
    COUNTERS.index("cumul_pagein_blocks"),
    COUNTERS.index("cumul_refault_blocks"),
    _READ_PAGES,
    _PAGEIN_PAGES,
)
"""The words of the counters of hot_reads.c, in its order."""
_LOST: Final = {cause: COUNTERS.index(f"lost_{cause}") for cause in Loss}


class Counters(CounterFields):
    """The counters in `words`, a writable memoryview of format "Q" with a word for each."""

    def __init__(self, words: memoryview) -> None:
        self.words = words

    def refused(self, cause: Refusal) -> None:
        """Count a write that was refused."""
        self.words[_REFUSED[cause]] += 1

    def lost(self, cause: Loss, pages: int = 1) -> None:
        """Count pages that could not be read back."""
        self.words[_LOST[cause]] += pages

    def paged_in(self) -> None:
        """Count a page that a read requested and that came from a block: the most frequent page-in, in one call."""
        words = self.words
        words[_READ_PAGES] += 1
        words[_PAGEIN_PAGES] += 1

    def by_name(self) -> dict[str, int]:
        """Return all counters by name."""
        return dict(zip(COUNTERS, self.words.tolist(), strict=False))


def _word(number: int) -> property:
    """Return a property for word `number`."""

    def get(counters: Counters) -> int:
        return counters.words[number]

    def put(counters: Counters, value: int) -> None:
        counters.words[number] = value

    return property(get, put)


for _number, _name in enumerate(COUNTERS):
    setattr(Counters, _name, _word(_number))


@dataclass
class PageStoreStatistics(CounterFields):
    """A snapshot of one moment: the counters, and the present state."""

    refused_pool_full: Annotated[
        int,
        Stat("writes", "answered with ENOSPC; the sum of the causes below", "`pool_limit_hit` (zswap)", grouped=True),
    ]
    lost_pages: Annotated[
        int,
        Stat(
            "reads",
            "answered with EIO, and pages lost in a crash; the sum of the causes below",
            "`decompress_fail` (zswap)",
            grouped=True,
        ),
    ]
    cumul_writeback_bytes: Annotated[int, Stat("bytes", "of frames written back", "`bd_writes` x 4096 (zram)")]
    size_bytes: Annotated[int, Stat("bytes", "of the swapfile", "`disksize` (zram)")]
    stored_pages: Annotated[
        int,
        Stat("pages", "stored: same-filled, raw and written back pages included", "`stored_pages` (zswap)"),
    ]
    same_filled_pages: Annotated[
        int,
        Stat(
            "pages",
            "that are one 8-byte word repeated; kept as the word, in the page table or in a zpage of one chunk",
            "`same_pages` (zram)",
        ),
    ]
    raw_pages: Annotated[
        int,
        Stat(
            "pages",
            "kept uncompressed, in RAM or on disk, since the zpage is too large for a frame",
            "`huge_pages` (zram)",
        ),
    ]
    compressed_bytes: Annotated[
        int, Stat("bytes", "of the zpages in RAM, ephemeral ones included, without handles", "`compr_data_size` (zram)")
    ]
    written_back_pages: Annotated[int, Stat("pages", "in the backing file and not in RAM", grouped=True)]
    level: Annotated[int, Stat("zstd level", "of pages that are compressed now", "`algorithm_params` (zram)")]
    pool_limit_bytes: Annotated[
        int,
        Stat(
            "bytes",
            "that frames may take now: the limit that was set, or less while memory is short",
            "`mem_limit` (zram), `max_pool_percent` (zswap)",
        ),
    ]
    pool_limit_set_bytes: Annotated[int, Stat("bytes", "of the configured limit: the mount's, or the one set since")]
    pool_configured_bytes: Annotated[int, Stat("bytes", "of the mount's pool")]
    pool_used_bytes: Annotated[
        int,
        Stat(
            "bytes",
            "of frames in use, zombies and ephemeral ones included",
            "`mem_used_total` (zram), `pool_total_size` (zswap)",
        ),
    ]
    pool_ready_bytes: Annotated[int, Stat("bytes", "of free frames that have memory: the reserve")]
    low_watermark_frames: Annotated[
        int,
        Stat(
            "frames",
            "that are free, below which writeback starts",
            "`accept_threshold_percent` (zswap)",
            "pool_low_watermark_bytes",
            PAGE_SIZE,
        ),
    ]
    high_watermark_frames: Annotated[
        int, Stat("frames", "that are free, at which writeback stops", "", "pool_high_watermark_bytes", PAGE_SIZE)
    ]
    coldest_age_seconds: Annotated[
        int, Stat("seconds", "since the last store to the coldest frame, which is written back next")
    ]
    writeback_enabled: Annotated[
        int, Stat("0 or 1", "whether frames are written back without an order", "`memory.zswap.writeback`")
    ]
    writeback_failing: Annotated[int, Stat("0 or 1", "whether the last batch could not be written to the backing file")]
    writeback_ordered_frames: Annotated[int, Stat("frames", "still to be written on order")]
    age_seconds: Annotated[
        int, Stat("seconds", "without a store to a frame after which it is written back; 0 is never", "`idle` (zram)")
    ]
    writeback_budget_bytes_per_day: Annotated[
        int,
        Stat(
            "bytes a day",
            "that may be written to the backing file; 0 is no limit",
            "`writeback_limit` (zram)",
            "writeback_budget_bytes",
        ),
    ]
    writeback_budget_used_bytes: Annotated[int, Stat("bytes", "spent of the allowance of a day")]
    writeback_budget_left_bytes: Annotated[int, Stat("bytes", "that may be written now")]
    writeback_budget_full_in_seconds: Annotated[
        int, Stat("seconds", "until the allowance is whole again, if nothing is written")
    ]
    backing_used_bytes: Annotated[int, Stat("bytes", "of blocks in use", "`bd_count` x 4096 (zram)")]
    backing_ready_bytes: Annotated[
        int,
        Stat("bytes", "ready to be written, the free part included: in a file allocated and written over"),
    ]
    backing_full: Annotated[int, Stat("0 or 1", "whether all of it is in use, or it could not grow when it had to")]

    def by_name(self) -> dict[str, int]:
        """Return all statistics by name. `asdict` would take three times as long."""
        return {name: getattr(self, name) for name in _NAMES}


_NAMES: Final = tuple(field.name for field in fields(PageStoreStatistics))
COUNTED: Final = frozenset((*COUNTERS, "refused_pool_full", "lost_pages", "cumul_writeback_bytes"))
"""The statistics that only grow."""


def declared() -> Iterator[tuple[str, Stat]]:
    """Yield each statistic with its name."""
    for field in fields(PageStoreStatistics):
        (stat,) = field.type.__metadata__  # type: ignore[union-attr]
        yield field.name, stat
