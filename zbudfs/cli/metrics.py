# SPDX-License-Identifier: MIT
"""The numbers of stats/ as Prometheus knows them: names, units and kinds by its conventions, each with its help.

    zbudfs_NAME_bytes, _seconds, _pages, ...     a gauge: how it is now
    zbudfs_NAME_total                            a counter, which only grows; takeovers do not set it back
    zbudfs_NAME_seconds                          a histogram

Every metric has the label `mountpoint`. This module knows no library: whoever exports makes samples of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from zbudfs.core.errors import Loss, Refusal

PREFIX: Final = "zbudfs"
FRAME_BYTES: Final = 4096
LE_BUCKETS: Final = 25
"""Buckets of a latency histogram that are exported: up to 16 s; what took longer is in +Inf."""

Numbers = Mapping[str, Any]
Samples = Callable[[Numbers], Iterator[tuple[tuple[str, ...], float]]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of samples."""

    name: str
    """Without prefix, and for a counter without _total."""
    kind: Literal["gauge", "counter"]
    help: str
    samples: Samples
    """From one mount's numbers: (values of `labels`, value)."""
    labels: tuple[str, ...] = ()
    """Besides mountpoint."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A family of histograms, one for each of `kinds`: (value of the label `operation`, prefix of the numbers)."""

    name: str
    help: str
    kinds: tuple[tuple[str, str], ...]


def _one(name: str, scale: float = 1) -> Samples:
    """The number `name`, times `scale`."""

    def samples(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
        yield (), float(numbers[name]) * scale

    return samples


def _of(names: Mapping[tuple[str], str] | Mapping[tuple[str, str], str]) -> Samples:
    """A number for each set of label values."""

    def samples(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
        for values, name in names.items():
            yield values, float(numbers[name])

    return samples


def _list(name: str) -> Samples:
    """The numbers of a list, from 1 on, by their place in it."""

    def samples(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
        for index, number in enumerate(numbers[name]):
            if index:
                yield (str(index),), float(number)

    return samples


def _places(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
    zpages = numbers["pers_zpages"] + numbers["eph_zpages"]
    raw = numbers["pers_raw_count"] + numbers["eph_raw_count"]
    yield ("ram_packed",), zpages
    yield ("ram_raw",), raw
    yield ("disk",), numbers["written_back_pages"]
    yield ("table",), max(0, numbers["stored_pages"] - zpages - raw - numbers["written_back_pages"])


def _info(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
    yield (str(numbers["version"]), str(numbers["backing_path"] or "")), 1


def _warnings(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
    yield (), float(len(numbers["warnings"]))


_FRAMES: Final = {
    (kind, state): f"{prefix}_{counter}"
    for kind, prefix in (("persistent", "pers"), ("ephemeral", "eph"))
    for state, counter in (
        ("buddied", "buddied_count"),
        ("unbuddied", "unbuddied_count"),
        ("raw", "raw_count"),
        ("zombie", "zombie_count"),
    )
}

METRICS: Final = (
    Metric("info", "gauge", "Version and backing file; always 1.", _info, ("version", "backing")),
    Metric("mount_time_seconds", "gauge", "Unix time of the mount.", _one("mounted_at")),
    Metric("size_bytes", "gauge", "Size of the swapfile.", _one("size_bytes")),
    Metric("level", "gauge", "zstd level of what is compressed now.", _one("level")),
    Metric("stored_pages", "gauge", "Pages stored, wherever they are.", _one("stored_pages")),
    Metric("same_filled_pages", "gauge", "Pages that are one word repeated.", _one("same_filled_pages")),
    Metric("raw_pages", "gauge", "Pages kept uncompressed, in RAM or on disk.", _one("raw_pages")),
    Metric("pages", "gauge", "Pages stored, by where they are.", _places, ("place",)),
    Metric("compressed_bytes", "gauge", "Bytes of the zpages in RAM, without handles.", _one("compressed_bytes")),
    Metric("pool_limit_bytes", "gauge", "Limit of the pool in force.", _one("pool_limit_bytes")),
    Metric("pool_limit_set_bytes", "gauge", "Limit of the pool that is wanted.", _one("pool_limit_set_bytes")),
    Metric("pool_configured_bytes", "gauge", "Pool of the mount.", _one("pool_configured_bytes")),
    Metric("pool_used_bytes", "gauge", "Frames that hold something.", _one("pool_used_bytes")),
    Metric("pool_ready_bytes", "gauge", "Free frames that have memory.", _one("pool_ready_bytes")),
    Metric(
        "pool_low_watermark_bytes",
        "gauge",
        "Free frames below which writeback starts.",
        _one("low_watermark_frames", FRAME_BYTES),
    ),
    Metric(
        "pool_high_watermark_bytes",
        "gauge",
        "Free frames at which writeback stops.",
        _one("high_watermark_frames", FRAME_BYTES),
    ),
    Metric("frames", "gauge", "Frames in use, by kind and state.", _of(_FRAMES), ("kind", "state")),
    Metric(
        "unbuddied_frames",
        "gauge",
        "Frames with room, by chunks of 64 bytes used.",
        _list("unbuddied_lists"),
        ("chunks",),
    ),
    Metric("zpages", "gauge", "zpages in RAM, by chunks of 64 bytes.", _list("chunk_histogram"), ("chunks",)),
    Metric(
        "backing_size_bytes",
        "gauge",
        "Most that the backing file can grow to; 0 without one.",
        _one("backing_size_bytes"),
    ),
    Metric("backing_used_bytes", "gauge", "Blocks that hold something.", _one("backing_used_bytes")),
    Metric("backing_ready_bytes", "gauge", "Bytes allocated to the backing file.", _one("backing_ready_bytes")),
    Metric("backing_full", "gauge", "1 if the backing file could not grow when it had to.", _one("backing_full")),
    Metric("writeback_enabled", "gauge", "1 if frames are written back without an order.", _one("writeback_enabled")),
    Metric(
        "writeback_failing", "gauge", "1 if the backing file did not take the last batch.", _one("writeback_failing")
    ),
    Metric(
        "writeback_budget_bytes",
        "gauge",
        "Most that is written to the backing file a day; 0 is no limit.",
        _one("writeback_budget_bytes_per_day"),
    ),
    Metric("writeback_budget_left_bytes", "gauge", "What is left of the budget.", _one("writeback_budget_left_bytes")),
    Metric("coldest_age_seconds", "gauge", "Age of the frame that goes next.", _one("coldest_age_seconds")),
    Metric("requests_in_work", "gauge", "Requests received and not answered.", _one("requests_in_work")),
    Metric("open_swapfiles", "gauge", "Open files of the swapfile.", _one("open_swapfiles")),
    Metric("standby_ready", "gauge", "1 if a standby can take over at once.", _one("standby_ready")),
    Metric("survives_crash", "gauge", "1 if a crash of the worker loses nothing.", _one("survives_crash")),
    Metric("warnings", "gauge", "Things that the system refused.", _warnings),
    Metric("requests", "counter", "Requests for the swapfile.", _one("served_requests")),
    Metric("wakeups", "counter", "Wake-ups that served requests.", _one("wakeups")),
    Metric("read_pages", "counter", "Pages read.", _one("cumul_read_pages")),
    Metric("written_pages", "counter", "Pages written.", _one("cumul_written_pages")),
    Metric("discarded_pages", "counter", "Stored pages discarded.", _one("cumul_discarded_pages")),
    Metric("incompressible_pages", "counter", "Pages written that were kept raw.", _one("cumul_raw_pages")),
    Metric("writeback_bytes", "counter", "Bytes of frames written back.", _one("cumul_writeback_bytes")),
    Metric("writeback_frames", "counter", "Frames written back.", _one("cumul_writeback_frames")),
    Metric("writeback_pages", "counter", "Pages in the frames written back.", _one("cumul_writeback_pages")),
    Metric("aged_frames", "counter", "Frames written back because of their age.", _one("cumul_aged_frames")),
    Metric("grown_bytes", "counter", "Zeros written to have the backing file ready.", _one("cumul_grown_bytes")),
    Metric("dropped_frames", "counter", "Ephemeral frames dropped.", _one("cumul_dropped_frames")),
    Metric("pagein_blocks", "counter", "Blocks read back.", _one("cumul_pagein_blocks")),
    Metric("pagein_pages", "counter", "Pages asked for that came from a block.", _one("cumul_pagein_pages")),
    Metric("readahead_blocks", "counter", "Blocks of them read along with others.", _one("cumul_readahead_blocks")),
    Metric("refault_blocks", "counter", "Blocks read back soon after they were written.", _one("cumul_refault_blocks")),
    Metric(
        "refused_writes",
        "counter",
        "Writes answered with ENOSPC, by cause.",
        _of({(str(cause),): f"refused_{cause}" for cause in Refusal}),
        ("cause",),
    ),
    Metric(
        "lost_pages",
        "counter",
        "Reads answered with EIO since the page was lost, by cause.",
        _of({(str(cause),): f"lost_{cause}" for cause in Loss}),
        ("cause",),
    ),
    Metric("writeback_failures", "counter", "Batches that the backing file did not take.", _one("writeback_failures")),
    Metric("pagein_failures", "counter", "Blocks that the backing file did not give.", _one("pagein_failures")),
    Metric("pressure_reports", "counter", "Reports of memory pressure.", _one("pressure_reports")),
    Metric("recoveries", "counter", "Takeovers from a worker that died.", _one("recoveries")),
    Metric("log_dropped", "counter", "Lines of the log that were dropped.", _one("log_dropped")),
)

HISTOGRAMS: Final = (
    Histogram(
        "request_duration_seconds",
        "Time from the receipt of a request to its answer.",
        (("read", "read"), ("write", "write"), ("discard", "discard"), ("sync", "sync")),
    ),
    Histogram(
        "backing_duration_seconds",
        "Time of one batch written to, or one read from, the backing file.",
        (("write", "writeback"), ("read", "pagein")),
    ),
)


def buckets(counts: list[int]) -> list[tuple[str, float]]:
    """Return a histogram of stats/ as (le, cumulative count), in seconds."""
    found: list[tuple[str, float]] = []
    seen = 0
    for bucket, count in enumerate(counts[:LE_BUCKETS]):
        seen += count
        found.append((repr((1 << bucket) / 1_000_000), float(seen)))
    return [*found, ("+Inf", float(sum(counts)))]
