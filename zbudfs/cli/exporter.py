# SPDX-License-Identifier: MIT
"""`zbudfs exporter`: the numbers of all mounts for Prometheus, over HTTP or as a file for node_exporter.

It runs beside the daemons, as anybody, and only reads their stats/. A mount whose daemon is dead or hangs is
`zbudfs_up 0`, within a limit of time; while it hangs it is not asked again, so that nothing piles up.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from zbudfs.cli.ask import once_more_if_stale
from zbudfs.cli.metrics import HISTOGRAMS, METRICS, PREFIX, Histogram, Metric, buckets

SCRAPE_SECONDS: Final = 5.0
"""Longest wait for the mounts, all asked at once. Prometheus itself waits for 10 s."""

DEFAULT_LISTEN: Final = ("localhost", 9824)

MISSING: Final = "the exporter needs the package prometheus-client: pip install 'zbudfs[exporter]'"


class _Question:
    """One mount, being asked in a thread of its own."""

    def __init__(self, mountpoint: str) -> None:
        self.numbers: dict[str, Any] | None = None
        self.asked_at = time.monotonic()
        self._mountpoint = mountpoint
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self) -> None:
        with suppress(OSError, ValueError):
            found = json.loads(once_more_if_stale(Path(self._mountpoint, "stats/all.json").read_bytes))
            if isinstance(found, dict) and "stored_pages" in found:
                self.numbers = found


class Asker:
    """Asks mounts for their numbers, all at once, and none of them while it has not answered yet."""

    def __init__(self, limit_seconds: float = SCRAPE_SECONDS) -> None:
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._under_way: dict[str, _Question] = {}

    def ask(self, mountpoints: list[str]) -> dict[str, dict[str, Any] | None]:
        """Return the numbers of each mount, None for one that gives none within the limit."""
        with self._lock:
            waiting = {at: question for at, question in self._under_way.items() if question.thread.is_alive()}
            questions = {at: waiting[at] if at in waiting else _Question(at) for at in mountpoints}
            self._under_way = waiting | questions
        for question in questions.values():
            question.thread.join(max(0.0, question.asked_at + self._limit_seconds - time.monotonic()))
        return {at: question.numbers for at, question in questions.items()}


class Collector:
    """What prometheus-client asks at each scrape. `mountpoints` gives the mounts that there are."""

    def __init__(self, mountpoints: Callable[[], list[str]], asker: Asker | None = None) -> None:
        self._mountpoints = mountpoints
        self._asker = asker or Asker()

    def describe(self) -> list[Any]:
        """Nothing: otherwise the mounts would be asked when this is registered."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the families of samples, of one moment for each mount."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        answers = self._asker.ask(self._mountpoints())
        up = GaugeMetricFamily(f"{PREFIX}_up", "1 if the daemon of the mount answers.", labels=["mountpoint"])
        for mountpoint, numbers in answers.items():
            up.add_metric([_text(mountpoint)], float(numbers is not None))
        yield up
        alive = {_text(mountpoint): numbers for mountpoint, numbers in answers.items() if numbers is not None}

        def counted(metric: Metric) -> Any:
            kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            family = kind(f"{PREFIX}_{metric.name}", metric.help, labels=["mountpoint", *metric.labels])
            for mountpoint, numbers in alive.items():
                try:
                    samples = list(metric.samples(numbers))
                except KeyError:
                    continue  # the daemon is of an older version
                for values, value in samples:
                    family.add_metric([mountpoint, *map(_text, values)], value)
            return family

        def timed(histogram: Histogram) -> Any:
            family = HistogramMetricFamily(
                f"{PREFIX}_{histogram.name}", histogram.help, labels=["mountpoint", "operation"]
            )
            for mountpoint, numbers in alive.items():
                for operation, name in histogram.kinds:
                    if f"{name}_latency_us" in numbers:
                        family.add_metric(
                            [mountpoint, operation],
                            buckets(numbers[f"{name}_latency_us"]),
                            numbers[f"{name}_latency_sum_us"] / 1_000_000,
                        )
            return family

        yield from map(counted, METRICS)
        yield from map(timed, HISTOGRAMS)


def _text(value: str) -> str:
    """Return a label's value: UTF-8, whatever bytes a path has."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listen_address(text: str) -> tuple[str, int]:
    """Return ADDR:PORT as address and port; ADDR may be empty (all) or in brackets. ValueError."""
    address, separator, port = text.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not ADDR:PORT, such as localhost:9824 or [::]:9824")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    elif ":" in address:
        raise ValueError(f"{text!r} is not ADDR:PORT: write an IPv6 address in brackets")
    return address or "::", int(port)


def _registry(mountpoints: Callable[[], list[str]]) -> Any:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(mountpoints))
    return registry


def serve(mountpoints: Callable[[], list[str]], address: str, port: int, ready: Callable[[int], None]) -> None:
    """Answer scrapes until SIGTERM or Ctrl-C; `ready` is told the port. OSError if the address cannot be had."""
    from prometheus_client import start_http_server

    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # inherited by the server's threads: only this one takes them
    server, thread = start_http_server(port, address, _registry(mountpoints))
    ready(server.server_port)
    try:
        signal.sigwait(signals)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write(mountpoints: Callable[[], list[str]], path: str, interval_seconds: float | None) -> None:
    """Write a file for node_exporter's textfile collector, complete at every moment; again and again with an interval."""
    from prometheus_client import write_to_textfile

    registry = _registry(mountpoints)
    stop = threading.Event()
    if interval_seconds is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    while True:
        write_to_textfile(path, registry)
        if interval_seconds is None or stop.wait(interval_seconds):
            return
