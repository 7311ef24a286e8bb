# SPDX-License-Identifier: MIT
"""Tests declare their needs, and leave nothing behind.

    @pytest.mark.needs("root", "fuse")     skipped, with the reason, where the machine lacks one of them

A test that leaves a mount, loop device, swap, cgroup or daemon behind fails, and this module removes the remains.

`make test` runs two tests at a time (pytest-xdist). Each process has its own folder, so most tests do not meet. Swap is
shared: the kernel may send the memory of a full cgroup to any swap of the machine. So all tests of the files that turn
swap on or fill a cgroup run in one process, one at a time. The choice is by file, since the process that distributes
the tests does not know their marks.
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

from kit.needs import NEEDS, why_not
from tests.support import ROOT, RUN_VARIABLE, sweep

WITH_SWAP: Final = re.compile(r'needs\([^)]*"(swap|cell)"')
"""The source of a file contains one of these if its tests use the swap of the machine."""
MADE_ONCE: Final = ("test_install.py", "test_exporter.py", "test_crash_points.py")
"""Files whose tests share an expensive fixture, which each process makes once."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and put temporary files on a disk, since /tmp is often memory, which cannot do as much."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")
    # A shell lets its background processes ignore SIGINT, but tests press Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "race(*numbers): the races of docs/understand/concurrency.md that the test shows"
    )
    config.addinivalue_line("markers", f"needs(*names): what of {', '.join(NEEDS)} the machine must have")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """Distribute the tests one by one, except for those that must run in one process."""
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
    """Return whether a file of tests, named from the project's folder, has a test that uses swap or fills a cgroup."""
    return WITH_SWAP.search((ROOT / file).read_text()) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose needs are not met."""
    for marker in item.iter_markers("needs"):
        for need in marker.args:
            if reason := why_not(need):
                pytest.skip(f"needs {need}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder that holds all files of this run. Its name marks each process that the run starts."""
    folder = tmp_path_factory.getbasetemp().resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RUN_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_process_a_signal() -> Iterator[None]:
    """Refuse kill(0). A `standby_pid` of 0 means that no standby exists. A signal to process 0 reaches the whole test run."""
    kill = os.kill

    def guarded(pid: int, number: int) -> None:
        assert pid > 0, f"signal {number} to process {pid}: a process was expected that is not there"
        kill(pid, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", guarded)
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(run_folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test with needs if it leaves something on the machine, and clean up."""
    yield
    if request.node.get_closest_marker("needs") and (left := sweep(run_folder)):
        pytest.fail(f"left behind: {', '.join(left)}")
