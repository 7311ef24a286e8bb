# SPDX-License-Identifier: MIT
"""`zbudfs exporter` gives the statistics of all mounts to Prometheus, over HTTP or as a file for node_exporter.

It is a process of its own and only reads: as root the stats/ of each mount, as another user the public statistics, which
are fewer and rounded (`zbudfs_exact 0`). A mount whose daemon is dead, or does not answer within a time limit, is
`zbudfs_up 0`. While a daemon hangs, it gets no further request, so that waiting threads do not pile up. Each mount gets at
most one request a second, however often Prometheus scrapes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.ask import Question, snapshot
from zbudfs.cli.errors import CommandError
from zbudfs.cli.installation import Installation
from zbudfs.cli.metrics import HISTOGRAMS, METRICS, PREFIX, Histogram, Metric, buckets
from zbudfs.cli.target import resolve
from zbudfs.service.mountpoint import zbudfs_mounts

SCRAPE_SECONDS: Final = 5.0
"""Longest wait for the mounts, which are asked at the same time. Prometheus itself waits for 10 s."""

CACHE_SECONDS: Final = 1.0
"""Time for which an answer is used again. A snapshot costs the thread that serves swap a third of a millisecond."""

MOST_CONNECTIONS: Final = 16
"""Most connections at a time; a further one is closed without an answer. Arbitrary."""

CONNECTION_SECONDS: Final = 10.0
"""Longest wait for a client that neither sends nor receives. Arbitrary."""

DEFAULT_LISTEN: Final = ("localhost", 9824)


class Asker:
    """Asks several mounts for their numbers at the same time. A mount that has not answered yet is not asked again."""

    def __init__(self, limit_seconds: float = SCRAPE_SECONDS) -> None:
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._under_way: dict[str, Question[dict[str, Any]]] = {}

    def ask(self, mountpoints: list[str]) -> dict[str, dict[str, Any] | None]:
        """Return the numbers of each mount by its mountpoint; None for a mount that gives none within the limit."""
        with self._lock:
            fresh = time.monotonic() - CACHE_SECONDS
            kept = {at: each for at, each in self._under_way.items() if each.is_open or each.asked_at > fresh}
            questions = {at: kept.get(at) or Question(partial(snapshot, at)) for at in mountpoints}
            self._under_way = kept | questions
        return {at: self._numbers(question) for at, question in questions.items()}

    def _numbers(self, question: Question[dict[str, Any]]) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            found = question.answer(self._limit_seconds)
            return found if "stored_pages" in found else None
        return None


class Collector:
    """The collector that prometheus-client calls at each scrape. `mountpoints` returns the present mountpoints."""

    def __init__(self, mountpoints: Callable[[], list[str]], asker: Asker | None = None) -> None:
        self._mountpoints = mountpoints
        self._asker = asker or Asker()

    def describe(self) -> list[Any]:
        """Return nothing. Otherwise the registration of this collector would ask the mounts."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metric families. All samples of a mount are from one snapshot."""
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
    """Return the value of a label as UTF-8; bytes of a path that are not UTF-8 are escaped."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
    """An HTTP server with a bounded number of threads and a time limit for each client."""

    daemon_threads = True

    def __init__(self, address: str, port: int) -> None:
        """Listen on an address. Raises OSError if it is not available."""
        flags = socket.AI_PASSIVE
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
        self.address_family = family
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((str(where[0]), int(where[1])), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or close the connection if MOST_CONNECTIONS threads are busy."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the request, and free the thread's place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the error: a client that disconnects is no error of the exporter."""


def serve(mountpoints: Callable[[], list[str]], address: str, port: int, ready: Callable[[int], None]) -> None:
    """Answer scrapes until SIGTERM or Ctrl-C. `ready` is called with the port. Raises OSError if the address is not free."""
    from prometheus_client import make_wsgi_app

    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(
        signal.SIG_BLOCK, signals
    )  # the server's threads inherit the mask: only this thread gets them
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
    """Write a file for node_exporter's textfile collector, once or at each interval. The file is complete at every moment."""
    from prometheus_client import write_to_textfile

    registry = _registry(mountpoints)
    stop = threading.Event()
    if interval_seconds is not None:
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    while True:
        try:
            write_to_textfile(path, registry)
        except OSError as error:  # the error names a temporary file, not `path`
            raise OSError(error.errno, error.strerror, path) from None
        if interval_seconds is None or stop.wait(interval_seconds):
            return


def exporter(arguments: Arguments) -> int:
    """Serve the statistics to Prometheus until a signal ends it, or write them to a file."""
    wanted = [resolve(path) for path in arguments.mountpoints]
    try:
        import prometheus_client as prometheus_client
    except ImportError:
        raise CommandError(f"the exporter needs prometheus-client: {Installation().command_for('exporter')}") from None
    if arguments.interval is not None and arguments.textfile is None:
        raise CommandError(
            "--interval is for --textfile FILE: leave --interval out, since Prometheus itself has a scrape_interval"
        )

    def mountpoints() -> list[str]:
        return wanted or list(dict.fromkeys(mount.mountpoint for mount in zbudfs_mounts()))

    if arguments.textfile is not None:
        with suppress(KeyboardInterrupt):
            write(mountpoints, arguments.textfile, arguments.interval)
        return 0
    address, port = arguments.listen or DEFAULT_LISTEN
    if os.geteuid() != 0:
        print("zbudfs: not root: the exported statistics are rounded, and some are missing", file=sys.stderr)

    def ready(port: int) -> None:
        print(f"zbudfs: answering on {address}, port {port}; Ctrl-C ends it", file=sys.stderr, flush=True)

    serve(mountpoints, address, port, ready)
    return 0
