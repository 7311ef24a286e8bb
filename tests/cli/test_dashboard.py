# SPDX-License-Identifier: MIT
"""The dashboard for Grafana and the alerts of the documents: each query runs in a real Prometheus that scrapes the exporter.

The test needs the program `prometheus` (apt-get install prometheus). It starts one on a free port of this machine, which
scrapes a real mount each second, while pages are written, written back and read back.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fuse.calls import aligned, opened
from tests.support import LIMIT_SECONDS, ROOT, mounted

DASHBOARD: Final = json.loads((ROOT / "docs/grafana-dashboard.json").read_text())
TOOLS: Final = (ROOT / "docs/use/tools.md").read_text()
PROMETHEUS: Final = shutil.which("prometheus")
ALERTS: Final = re.findall(r"- alert: (\w+)\n +expr: (.+)\n", TOOLS)
"""Name and query of each alert."""
VARIABLES: Final = {"$mountpoint": ".*", "$__rate_interval": "20s"}
"""Values that Grafana would fill in: the mountpoint "All", and a time of several scrapes."""

pytestmark = [
    pytest.mark.needs("root", "fuse"),
    pytest.mark.skipif(PROMETHEUS is None, reason="no program prometheus (apt-get install prometheus)"),
]


def panel_queries() -> list[tuple[str, str]]:
    """Return the title and the query of each target of the dashboard, with the variables filled in."""
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            found.append((panel["title"], query))
    return found


class Server:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of the HTTP API. Fails with Prometheus's own text if it reports an error."""
        try:
            with urllib.request.urlopen(
                f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=LIMIT_SECONDS
            ) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            pytest.fail(f"{parameters}: {error.read().decode()}")
        assert found["status"] == "success", found
        return found["data"]

    def values(self, query: str) -> list[float]:
        """Return the present value of each series of a query."""
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]


@contextlib.contextmanager
def started(command: list[str], port: str) -> Iterator[int]:
    """Run a program that prints the number of its port to standard error, in the group of the pattern `port`."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stderr is not None
            for line in program.stderr:
                if match := re.search(port, line):
                    break
            else:
                pytest.fail(f"{command[0]} ended without a port")
            yield int(match[1])
        finally:
            program.terminate()
            program.communicate(timeout=LIMIT_SECONDS)


@contextlib.contextmanager
def prometheus(folder: Path, exporter_port: int) -> Iterator[Server]:
    """Run a Prometheus that scrapes the exporter each second."""
    configuration = folder / "prometheus.yml"
    configuration.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        "scrape_configs:\n"
        "  - job_name: zbudfs\n"
        f'    static_configs: [{{targets: ["127.0.0.1:{exporter_port}"]}}]\n'
    )
    command = [str(PROMETHEUS), f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}"]
    command += ["--web.listen-address=127.0.0.1:0"]
    with started(command, r'msg="Listening on" address=\S+?:(\d+)') as port:
        yield Server(f"http://127.0.0.1:{port}")


@dataclass
class Answers:
    """The answers of Prometheus, taken while the mount was in use."""

    values: dict[str, list[float]]
    """Value of each series, by query of the dashboard."""
    points: dict[str, int]
    """Number of points in the last ten seconds, by query of the dashboard."""
    mountpoints: list[str]
    """Values that the dashboard offers for its variable."""
    firing: dict[str, list[float]]
    """Values of each alert, by name."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The answers for a mount that is in use, as soon as each query of the dashboard has a value, or after a while."""
    folder = tmp_path_factory.mktemp("dashboard").resolve()
    exporter = [sys.executable, "-m", "zbudfs", "exporter", "--listen", "127.0.0.1:0"]
    with (
        mounted(folder / "mnt", "--backing", folder / "backing") as mountpoint,
        started([*exporter, str(mountpoint)], r"port (\d+)") as port,
        prometheus(folder, port) as server,
        opened(mountpoint / "swapfile") as fd,
    ):
        end = time.monotonic() + LIMIT_SECONDS
        while True:
            os.pwrite(fd, aligned(os.urandom(1 << 20)), 0)
            (mountpoint / "control/writeback").write_text("all")
            (mountpoint / "control/drop_ephemeral").write_text("1")
            os.preadv(fd, [aligned(bytes(1 << 20))], 0)
            values = {query: server.values(query) for _, query in panel_queries()}
            if all(map(has_value, values.values())) or time.monotonic() > end:
                break
            time.sleep(0.5)
        now = time.time()
        points = {}
        for query in values:
            found = server.get("query_range", query=query, start=str(now - 10), end=str(now), step="1")["result"]
            points[query] = sum(len(series["values"]) for series in found)
        label, metric = variable()
        mountpoints = server.get(f"label/{label}/values", **{"match[]": metric})
        return Answers(values, points, mountpoints, {name: server.values(query) for name, query in ALERTS})


def variable() -> tuple[str, str]:
    """Return the label and the metric of the variable that selects the mountpoint."""
    (found,) = [each for each in DASHBOARD["templating"]["list"] if "definition" in each]
    match = re.fullmatch(r"label_values\((\w+), (\w+)\)", found["definition"])
    assert match is not None
    return match[2], match[1]


def has_value(values: list[float]) -> bool:
    """Whether one of the values is a number: a quantile of no requests is NaN."""
    return any(not math.isnan(value) for value in values)


@pytest.mark.parametrize(("title", "query"), panel_queries())
def test_each_query_has_a_series(answers: Answers, title: str, query: str) -> None:
    """Prometheus accepts the query, and returns a series with a number for it, now and for a range of time."""
    assert has_value(answers.values[query]), f"the panel {title!r} is empty: {query}"
    assert answers.points[query], f"the chart {title!r} is empty: {query}"


def test_the_variable_lists_the_mount(answers: Answers) -> None:
    """The selection of the mountpoint offers the mount."""
    assert [Path(mountpoint).name for mountpoint in answers.mountpoints] == ["mnt"]


def test_the_alerts_are_queries(answers: Answers) -> None:
    """Prometheus accepts each alert of the documents, and none of them fires on a mount that is well."""
    assert len(answers.firing) == TOOLS.count("- alert:") >= 6
    no_standby = answers.firing.pop("ZbudfsNoStandby")  # it may begin as true, which its "for: 5m" covers
    assert no_standby in ([], [0.0])
    assert not any(answers.firing.values()), answers.firing
