# SPDX-License-Identifier: MIT
"""`zbudfs exporter`: the numbers of all mounts for Prometheus, over HTTP or as a file for node_exporter.

It runs beside the daemons, and only reads: as root their stats/, as another user their public statistics, which are fewer
and rounded (`zbudfs_exact 0`). A mount whose daemon is dead or hangs is `zbudfs_up 0`, within a limit of time; while it
hangs it is not asked again, so that nothing piles up. Each mount is asked once a second at most, whoever scrapes.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from zbudfs.cli.ask import snapshot
from zbudfs.cli.metrics import HISTOGRAMS, METRICS, PREFIX, Histogram, Metric, buckets

SCRAPE_SECONDS: Final = 5.0
"""Longest wait for the mounts, all asked at once. Prometheus itself waits for 10 s."""

CACHE_SECONDS: Final = 1.0
"""How long an answer is good for: a snapshot costs the thread that serves swap a third of a millisecond."""

MOST_CONNECTIONS: Final = 16
"""Scrapes at a time; who comes then is not answered. Arbitrary."""

CONNECTION_SECONDS: Final = 10.0
"""Longest wait for a client that sends or takes nothing. Arbitrary."""

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

    def is_good(self, now: float) -> bool:
        """Whether it is not answered yet, or was asked just now."""
        return self.thread.is_alive() or now < self.asked_at + CACHE_SECONDS

    def _ask(self) -> None:
        with suppress(OSError, ValueError):
            found = snapshot(self._mountpoint)
            if "stored_pages" in found:
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
            now = time.monotonic()
            waiting = {at: question for at, question in self._under_way.items() if question.is_good(now)}
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
        exact = GaugeMetricFamily(
            f"{PREFIX}_exact",
            "1 if the numbers are exact, 0 if they are public: rounded, and some are missing.",
            labels=["mountpoint"],
        )
        for mountpoint, numbers in answers.items():
            if numbers is not None:
                exact.add_metric([_text(mountpoint)], float(not numbers.get("rounded")))
        yield exact
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


class _Handler(WSGIRequestHandler):
    timeout = CONNECTION_SECONDS

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the library's name
        """Log nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """An HTTP server with a bounded number of threads, which waits for no client for ever."""

    daemon_threads = True

    def __init__(self, address: str, port: int) -> None:
        """Listen; OSError where that cannot be had."""
        flags = socket.AI_PASSIVE
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
        self.address_family = family
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((str(where[0]), int(where[1])), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread answer; without a thread to spare the connection is closed."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore it: a client that goes away is no error of the exporter."""


def serve(mountpoints: Callable[[], list[str]], address: str, port: int, ready: Callable[[int], None]) -> None:
    """Answer scrapes until SIGTERM or Ctrl-C; `ready` is told the port. OSError if the address cannot be had."""
    from prometheus_client import make_wsgi_app

    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # inherited by the server's threads: only this one takes them
    server = _Server(address, port)
    server.set_app(make_wsgi_app(_registry(mountpoints)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
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
        try:
            write_to_textfile(path, registry)
        except OSError as error:  # it names a temporary file beside it
            raise OSError(error.errno, error.strerror, path) from None
        if interval_seconds is None or stop.wait(interval_seconds):
            return
