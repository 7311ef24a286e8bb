# SPDX-License-Identifier: MIT
"""Needs are declared by tests, and nothing is left behind by them.

    @pytest.mark.needs("root", "fuse")     skipped, with the reason, where the machine has not got that

A test that leaves a mount, loop device, swap, cgroup or daemon behind fails, and what it left is taken away.

`make test` runs two tests at a time (pytest-xdist). What one of them makes lies in its process's own folder, so they do
not meet; but swap is the whole machine's, and the memory of a full cgroup goes to any that is on: tests that turn swap on or
fill a cgroup are, with all of their files, one group, which has one process and therefore one at a time. (By the file, since
the marks are not known to the process that deals the tests out.)
"""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from scripts.needs import NEEDS, why_not
from tests.support import ROOT, RUN_VARIABLE, sweep

WITH_SWAP: Final = re.compile(r'needs\([^)]*"(swap|cell)"')
"""What a file says whose tests would meet others in the machine's swap."""
MADE_ONCE: Final = ("test_install.py", "test_exporter.py", "test_crash_points.py")
"""Files whose tests look at something dear that is made once for all of them, in each process that runs any."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known; have temporary files on a disk: /tmp is often memory, which cannot do all that a disk can."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as shells have it for what runs behind them: tests press Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", f"needs(*names): what of {', '.join(NEEDS)} the machine must have")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Deal the tests out: one by one, but for those that have to be in one process."""
    return InGroups(config, log)


class InGroups(LoadScopeScheduling):  # type: ignore[misc]
    """Groups of tests; each is run in one process, the largest first."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if shares_swap(file):
            return "swap"
        return file if file.endswith(MADE_ONCE) else nodeid


@functools.cache
def shares_swap(file: str) -> bool:
    """Whether a file of tests, named from the project's folder, has one that uses swap or fills a cgroup."""
    return WITH_SWAP.search((ROOT / file).read_text()) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are not met."""
    for marker in item.iter_markers("needs"):
        for need in marker.args:
            if reason := why_not(need):
                pytest.skip(f"needs {need}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that holds everything this run makes; its name marks every process that is started."""
    folder = tmp_path_factory.getbasetemp().resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RUN_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_process_a_signal() -> Iterator[None]:
    """Refuse kill(0): a `standby_pid` of 0 means that there is none, and the signal would reach the whole test run."""
    kill = os.kill

    def guarded(pid: int, number: int) -> None:
        assert pid > 0, f"signal {number} to process {pid}: a process was expected that is not there"
        kill(pid, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", guarded)
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(run_folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test with needs that leaves something on the machine, and clean up after it."""
    yield
    if request.node.get_closest_marker("needs") and (left := sweep(run_folder)):
        pytest.fail(f"left behind: {', '.join(left)}")
