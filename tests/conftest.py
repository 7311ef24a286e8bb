# SPDX-License-Identifier: MIT
"""Needs are declared by tests, and nothing is left behind by them.

    @pytest.mark.needs("root", "fuse")     skipped, with the reason, where the machine has not got that

A test that leaves a mount, loop device, swap, cgroup or daemon behind fails, and what it left is taken away.

`make test` runs two tests at a time (pytest-xdist). What one of them makes lies in its process's own folder, so they do
not meet; but swap is the whole machine's, and the memory of a full cgroup goes to any that is on: tests that turn swap on or
fill a cgroup are one group, which has one process and therefore one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from scripts.needs import NEEDS, why_not
from tests.support import RUN_VARIABLE, sweep

WITH_SWAP: Final = frozenset({"swap", "cell"})
"""Needs of tests that would meet in the machine's swap."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", f"needs(*names): what of {', '.join(NEEDS)} the machine must have")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests that share the machine's swap run one after the other."""
    for item in items:
        if WITH_SWAP & {need for marker in item.iter_markers("needs") for need in marker.args}:
            item.add_marker(pytest.mark.xdist_group("swap"))


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


@pytest.fixture(autouse=True)
def nothing_left_behind(run_folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test with needs that leaves something on the machine, and clean up after it."""
    yield
    if request.node.get_closest_marker("needs") and (left := sweep(run_folder)):
        pytest.fail(f"left behind: {', '.join(left)}")
