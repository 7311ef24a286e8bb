# SPDX-License-Identifier: MIT
"""The exporter keeps Prometheus's conventions, over HTTP and as a file, in any state of the mounts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fuse.calls import aligned, all_stats, opened, stat_of
from tests.support import LIMIT_SECONDS, ROOT, mounted, run_zbudfs, wait_until, zbudfs
from zbudfs.cli import exporter
from zbudfs.cli.exporter import Asker, Collector
from zbudfs.cli.installation import Installation
from zbudfs.cli.metrics import HISTOGRAMS, METRICS, PREFIX, buckets
from zbudfs.cli.values import listen_address

DASHBOARD: Final = ROOT / "docs/grafana-dashboard.json"
_SAMPLE: Final = re.compile(r"([a-z_:][a-z0-9_:]*)(?:\{(.*)\})? (\S+)")
_LABEL: Final = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


def exposed(*mountpoints: Path, folder: Path) -> str:
    """Return the output of the command for these mounts."""
    target = folder / "zbudfs.prom"
    zbudfs("exporter", "--textfile", target, *mountpoints)
    return target.read_text()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the samples in a text, by name and labels."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = _SAMPLE.fullmatch(line)
            assert match is not None, line
            key = (match[1], frozenset(_LABEL.findall(match[2] or "")))
            assert key not in found, line
            found[key] = float(match[3])
    return found


def types(text: str) -> dict[str, str]:
    """Return the type of each family."""
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the metrics of two mounts. One of them has a backing file with pages."""
    folder = tmp_path_factory.mktemp("exporter").resolve()
    with (
        mounted(folder / "one", "--backing", folder / "backing") as one,
        mounted(folder / "two with a space") as two,
        opened(one / "swapfile") as fd,
    ):
        os.pwrite(fd, aligned(os.urandom(1 << 20)), 0)
        zbudfs("set", "writeback=all", one)
        wait_until(lambda: stat_of(one, "written_back_pages") == 256, "everything to be written back")
        os.preadv(fd, [aligned(bytes(1 << 20))], 0)
        return exposed(one, two, folder=folder)


@pytest.mark.needs("root", "fuse")
def test_names_and_units_keep_to_the_conventions(text: str) -> None:
    """Names have one prefix, base units as suffixes, _total for counters alone, and each metric has help."""
    found = types(text)
    assert len(found) == len(METRICS) + len(HISTOGRAMS) + 2
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    for name, kind in found.items():
        assert re.fullmatch(r"zbudfs(_[a-z0-9]+)+", name), name
        assert (kind == "counter") == name.endswith("_total"), name
        assert helps[name].endswith("."), name
        assert not re.search(r"_(kb|mb|gb|kib|mib|ms|us|ns|milliseconds|microseconds|percent)(_|$)", name), name
        assert kind in ("counter", "gauge", "histogram"), name
        if kind == "histogram":
            assert name.endswith("_seconds"), name
    for (name, labels), _ in samples(text).items():
        assert "mountpoint" in dict(labels), name


@pytest.mark.needs("root", "fuse")
def test_promtool_finds_nothing(text: str) -> None:
    """Prometheus's own tool finds no mistake."""
    if shutil.which("promtool") is None:
        pytest.skip("no promtool (apt-get install prometheus)")
    run = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.needs("root", "fuse")
def test_the_numbers_are_those_of_the_mount(text: str) -> None:
    """The metrics show a page that was written, written back and read back, and the histogram adds up."""
    found = samples(text)
    one = next(dict(labels)["mountpoint"] for name, labels in found if name == "zbudfs_up" and "one" in str(labels))

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset({("mountpoint", one), *labels.items()})]

    assert value("zbudfs_up") == 1
    assert (
        value("zbudfs_stored_pages") == value("zbudfs_written_pages_total") == value("zbudfs_read_pages_total") == 256
    )
    assert value("zbudfs_writeback_bytes_total") == 1 << 20
    assert value("zbudfs_size_bytes") == 64 << 20
    assert sum(value("zbudfs_pages", place=place) for place in ("ram_packed", "ram_raw", "disk", "table")) == 256
    name = "zbudfs_request_duration_seconds"
    counts = {
        float(dict(labels)["le"]): number
        for (sample, labels), number in found.items()
        if sample == f"{name}_bucket" and ("operation", "read") in labels and ("mountpoint", one) in labels
    }
    assert sorted(counts) == [*((1 << n) / 1e6 for n in range(25)), float("inf")]
    assert [counts[bound] for bound in sorted(counts)] == sorted(counts.values())
    assert counts[float("inf")] == value(f"{name}_count", operation="read") > 0
    assert 0 < value(f"{name}_sum", operation="read") < LIMIT_SECONDS


@pytest.mark.needs("root", "fuse")
def test_the_dashboard_uses_what_there_is(text: str) -> None:
    """Each name and each label value in the dashboard exists in the metrics."""
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    assert len(expressions) > 30
    known = {name for name, _ in samples(text)}
    used = {name for expression in expressions for name in re.findall(rf"\b{PREFIX}_[a-z0-9_]+", expression)}
    assert used - known == set()
    values = {pair for _, labels in samples(text) for pair in labels}
    for expression in expressions:
        for label, matched in re.findall(r'([a-z_]+)="([^"]*)"', expression):
            assert (label, matched) in values, expression
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.needs("root", "fuse")
def test_over_http(tmp_path: Path) -> None:
    """Scrapes are answered until SIGTERM. An unmounted zbudfs disappears, and a dead one is down."""
    with mounted(tmp_path / "mnt") as mountpoint:
        command = [sys.executable, "-m", "zbudfs", "exporter", "--listen", "127.0.0.1:0"]
        command += [str(mountpoint), str(tmp_path / "none")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as exporter:
            try:
                assert exporter.stderr is not None
                port = int(re.search(r"port (\d+)", exporter.stderr.readline())[1])  # type: ignore[index]

                def scraped() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT_SECONDS) as answer:
                        return samples(answer.read().decode())

                found = scraped()
                assert found["zbudfs_up", frozenset({("mountpoint", str(mountpoint))})] == 1
                assert found["zbudfs_up", frozenset({("mountpoint", str(tmp_path / "none"))})] == 0
                for pid in ("keeper_pid", "standby_pid", "worker_pid"):
                    if number := all_stats(mountpoint)[pid]:
                        os.kill(number, signal.SIGKILL)
                    if pid == "keeper_pid":
                        time.sleep(0.1)
                wait_until(lambda: scraped()["zbudfs_up", frozenset({("mountpoint", str(mountpoint))})] == 0, "its end")
                exporter.send_signal(signal.SIGTERM)
                assert exporter.wait(LIMIT_SECONDS) == 0
            finally:
                exporter.kill()


@pytest.mark.needs("root", "fuse")
def test_a_file_again_and_again(tmp_path: Path) -> None:
    """The file is whole at each moment, and all users can read it. SIGTERM ends the command."""
    target = tmp_path / "zbudfs.prom"
    with mounted(tmp_path / "mnt") as mountpoint:
        command = [sys.executable, "-m", "zbudfs", "exporter", "--textfile", str(target), "--interval", "0.1"]
        with subprocess.Popen([*command, str(mountpoint)]) as exporter:
            try:
                wait_until(target.exists, "the file")
                first = target.stat().st_ino
                wait_until(lambda: target.stat().st_ino != first, "another file in its place")
                lines = target.read_text().splitlines()
                assert lines[-1].startswith("zbudfs_backing_duration_seconds")
                assert target.stat().st_mode & 0o777 == 0o644
                exporter.send_signal(signal.SIGTERM)
                assert exporter.wait(LIMIT_SECONDS) == 0
            finally:
                exporter.kill()
    assert {path.name for path in tmp_path.iterdir()} == {"zbudfs.prom", "mnt"}


def test_a_mount_that_hangs_is_down_and_asked_once(tmp_path: Path) -> None:
    """The other mounts answer within the limit, and the hung one gets no second question meanwhile."""
    for name in ("good", "hanging"):
        (tmp_path / name / "stats").mkdir(parents=True)
    (tmp_path / "good/stats/all.json").write_text('{"stored_pages": 1}')
    os.mkfifo(tmp_path / "hanging/stats/all.json")  # the open waits for a writer
    asker = Asker(limit_seconds=0.2)
    before = threading.active_count()
    both = [str(tmp_path / "good"), str(tmp_path / "hanging")]
    for _ in range(5):
        answers = asker.ask(both)
        assert answers == {both[0]: {"stored_pages": 1}, both[1]: None}
    assert threading.active_count() == before + 1
    (tmp_path / "hanging/stats/all.json").write_text('{"stored_pages": 2}')  # it answers now
    wait_until(lambda: threading.active_count() == before, "the thread's end")


def test_two_scrapes_at_once_share_one_answer(tmp_path: Path) -> None:
    """A scrape that comes while another one waits gets the same answer."""
    (tmp_path / "slow/stats").mkdir(parents=True)
    fifo = tmp_path / "slow/stats/all.json"
    os.mkfifo(fifo)
    asker = Asker(limit_seconds=LIMIT_SECONDS)
    answers: list[Any] = []

    def start() -> None:
        thread = threading.Thread(target=lambda: answers.append(asker.ask([str(tmp_path / "slow")])))
        thread.start()
        wait_until(lambda: is_joining(thread), "a thread that waits for the answer")

    start()
    with opened(fifo, os.O_WRONLY) as fd:  # after the question has opened it
        start()
        os.write(fd, b'{"stored_pages": 7}')
    wait_until(lambda: len(answers) == 2, "both answers")
    assert answers == [{str(tmp_path / "slow"): {"stored_pages": 7}}] * 2


def test_a_mount_is_asked_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scrapes within a second get the same answer."""
    (tmp_path / "stats").mkdir()
    numbers = tmp_path / "stats/all.json"
    asker = Asker(limit_seconds=LIMIT_SECONDS)

    def answered(value: int) -> Any:
        numbers.write_text(f'{{"stored_pages": {value}}}')
        return asker.ask([str(tmp_path)])[str(tmp_path)]

    monkeypatch.setattr(exporter, "CACHE_SECONDS", LIMIT_SECONDS)
    assert [answered(value) for value in (1, 2, 3)] == [{"stored_pages": 1}] * 3
    monkeypatch.setattr(exporter, "CACHE_SECONDS", 0.0)
    assert answered(4) == {"stored_pages": 4}


def test_clients_that_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle clients get a limited number of threads for a limited time. Then others are answered again."""
    monkeypatch.setattr(exporter._Handler, "timeout", 2.0)
    server = exporter._Server("127.0.0.1", 0)

    def application(environment: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"numbers"]

    server.set_app(application)
    before = threading.active_count()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = ("127.0.0.1", server.server_port)

    def scraped() -> bool:
        try:
            with urllib.request.urlopen("http://{}:{}/".format(*address), timeout=LIMIT_SECONDS) as answer:
                return bool(answer.read() == b"numbers")
        except OSError:
            return False

    try:
        assert scraped()
        idle = [socket.create_connection(address) for _ in range(3 * exporter.MOST_CONNECTIONS)]
        wait_until(lambda: threading.active_count() > before + 1, "threads for them")
        assert threading.active_count() <= before + 1 + exporter.MOST_CONNECTIONS
        wait_until(scraped, "a thread that is free again")
        for connection in idle:
            connection.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_joining(thread: threading.Thread) -> bool:
    """Return whether a thread waits for the end of another."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "join":
            return True
        frame = frame.f_back
    return False


def test_no_mount_at_all(tmp_path: Path) -> None:
    """Without mounts there are no metrics, and that is no error."""
    families = list(Collector(list).collect())
    assert [family.samples for family in families] == [[]] * len(families)


def test_an_older_daemon_gives_what_it_has() -> None:
    """Statistics that the daemon does not have are left out."""

    class Old(Asker):
        def ask(self, mountpoints: list[str]) -> dict[str, dict[str, Any] | None]:
            return {"/mnt": {"stored_pages": 3}}

    given = {
        sample.name: sample.value
        for family in Collector(lambda: ["/mnt"], Old()).collect()
        for sample in family.samples
    }
    assert given == {"zbudfs_up": 1.0, "zbudfs_exact": 1.0, "zbudfs_stored_pages": 3.0}


def test_a_path_of_any_bytes_is_a_label() -> None:
    """Bytes that are no UTF-8 are escaped."""

    class One(Asker):
        def ask(self, mountpoints: list[str]) -> dict[str, dict[str, Any] | None]:
            return dict.fromkeys(mountpoints)

    families = list(Collector(lambda: ["/ä\udcff"], One()).collect())
    assert families[0].samples[0].labels == {"mountpoint": "/ä\\xff"}


def test_buckets_are_cumulative() -> None:
    """Buckets are in seconds, each contains all below it, and the longest times are in +Inf alone."""
    counts = [1, 2, 0, 4, *[0] * 27, 5]
    found = buckets(counts)
    assert found[:5] == [("1e-06", 1), ("2e-06", 3), ("4e-06", 3), ("8e-06", 7), ("1.6e-05", 7)]
    assert found[-2:] == [("16.777216", 7), ("+Inf", 12)]


@pytest.mark.parametrize(
    ("text_", "address"),
    [
        ("localhost:9824", ("localhost", 9824)),
        (":9824", ("::", 9824)),
        ("[::1]:80", ("::1", 80)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_addresses(text_: str, address: tuple[str, int]) -> None:
    """Each usual form of an address is understood."""
    assert listen_address(text_) == address


@pytest.mark.parametrize(
    "words", [["--listen", "9824"], ["--listen", "::1:80"], ["--listen", "a:65536"], ["--listen", "a:x"]]
)
def test_wrong_addresses(words: list[str]) -> None:
    """Wrong addresses are usage errors."""
    run = run_zbudfs("exporter", *words)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "is not ADDR:PORT" in run.stderr


def test_without_the_library(tmp_path: Path) -> None:
    """The message names the missing library and how to install it."""
    (tmp_path / "prometheus_client.py").write_text("raise ImportError")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from zbudfs.cli.main import main; sys.exit(main(['exporter']))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False, cwd=ROOT
    )
    assert (run.returncode, run.stderr) == (
        1,
        f"zbudfs: the exporter needs prometheus-client: {Installation().command_for('exporter')}\n",
    )
