# SPDX-License-Identifier: MIT
"""The numbers of stats/ as metrics of Prometheus, with name, unit, kind and help text by its conventions.

    zbudfs_NAME_bytes, _seconds, _pages, ...     a gauge: the present value
    zbudfs_NAME_total                            a counter, which only grows; a takeover does not reset it
    zbudfs_NAME_seconds                          a histogram

Every metric has the label `mountpoint`. This module imports no library: the exporter turns the metrics into samples.
Most metrics come from the declaration of the statistics (core/statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from zbudfs.core.errors import Loss, Refusal
from zbudfs.core.statistics import COUNTED, declared

PREFIX: Final = "zbudfs"
LE_BUCKETS: Final = 25
"""Buckets of a latency histogram that are exported: up to 16 s. Longer times are in +Inf."""

Numbers = Mapping[str, Any]
Samples = Callable[[Numbers], Iterator[tuple[tuple[str, ...], float]]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family: a gauge or a counter."""

    name: str
    """Name without the prefix, and without the _total of a counter."""
    kind: Literal["gauge", "counter"]
    help: str
    samples: Samples
    """Function that turns the numbers of a mount into samples: (values of `labels`, value)."""
    labels: tuple[str, ...] = ()
    """Labels besides `mountpoint`."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A family of histograms, one for each of `kinds`: (value of the label `operation`, prefix of the numbers)."""

    name: str
    help: str
    kinds: tuple[tuple[str, str], ...]


def _one(name: str, scale: float = 1) -> Samples:
    """Return the samples function for the number `name`, times `scale`."""

    def samples(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
        yield (), float(numbers[name]) * scale

    return samples


def _of(names: Mapping[tuple[str], str] | Mapping[tuple[str, str], str]) -> Samples:
    """Return the samples function for several numbers, each with its own label values."""

    def samples(numbers: Numbers) -> Iterator[tuple[tuple[str, ...], float]]:
        for values, name in names.items():
            yield values, float(numbers[name])

    return samples


def _list(name: str) -> Samples:
    """Return the samples function for a list: element 1 and the following, each with its index as label value."""

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


def _declared() -> Iterator[Metric]:
    """Yield the metric of each declared statistic, except for the statistics that share one metric under a label."""
    for name, stat in declared():
        if not stat.grouped:
            help_text = f"{stat.unit} {stat.meaning}."
            yield Metric(
                name.removeprefix("cumul_") if stat.metric is None else stat.metric,
                "counter" if name in COUNTED else "gauge",
                help_text[0].upper() + help_text[1:],
                _one(name, stat.scale),
            )


METRICS: Final = (
    Metric("info", "gauge", "Version and backing file; always 1.", _info, ("version", "backing")),
    Metric("mount_time_seconds", "gauge", "Unix time of the mount.", _one("mounted_at")),
    Metric("pages", "gauge", "Stored pages, by place.", _places, ("place",)),
    Metric("frames", "gauge", "Frames in use, by kind and state.", _of(_FRAMES), ("kind", "state")),
    Metric(
        "unbuddied_frames",
        "gauge",
        "Frames with room for another zpage, by the number of used chunks of 64 bytes.",
        _list("unbuddied_lists"),
        ("chunks",),
    ),
    Metric("zpages", "gauge", "zpages in RAM, by size in chunks of 64 bytes.", _list("chunk_histogram"), ("chunks",)),
    Metric(
        "backing_size_bytes",
        "gauge",
        "Largest size of the backing file; 0 without one.",
        _one("backing_size_bytes"),
    ),
    *_declared(),
    Metric("requests_in_work", "gauge", "Requests received and not yet answered.", _one("requests_in_work")),
    Metric("open_swapfiles", "gauge", "Open file descriptions of the swapfile.", _one("open_swapfiles")),
    Metric("standby_ready", "gauge", "1 if a standby can take over at once.", _one("standby_ready")),
    Metric("survives_crash", "gauge", "1 if a crash of the worker loses nothing.", _one("survives_crash")),
    Metric("warnings", "gauge", "Protections of the daemon that the system refused.", _warnings),
    Metric("requests", "counter", "Requests for the swapfile.", _one("served_requests")),
    Metric("wakeups", "counter", "Wake-ups that served requests.", _one("wakeups")),
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
        "Reads answered with EIO because the page was lost, by cause.",
        _of({(str(cause),): f"lost_{cause}" for cause in Loss}),
        ("cause",),
    ),
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
        "Time of one batch of writes to the backing file, or of one read from it.",
        (("write", "writeback"), ("read", "pagein")),
    ),
)


def buckets(counts: list[int]) -> list[tuple[str, float]]:
    """Return a histogram of stats/ as pairs of (le in seconds, cumulative count)."""
    found: list[tuple[str, float]] = []
    seen = 0
    for bucket, count in enumerate(counts[:LE_BUCKETS]):
        seen += count
        found.append((repr((1 << bucket) / 1_000_000), float(seen)))
    return [*found, ("+Inf", float(sum(counts)))]
