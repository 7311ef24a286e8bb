# SPDX-License-Identifier: MIT
"""Imports point one way: cli -> swap, service -> fuse -> store -> core; and core is pure."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import ROOT

BELOW: Final = {
    "core": set[str](),
    "store": {"core"},
    "fuse": {"core", "store"},
    "service": {"core", "store", "fuse"},
    "swap": {"core"},
    "cli": {"core", "service", "swap"},
}
"""Each room, and the other rooms that it may import from."""

IMPURE: Final = {"os", "io", "pathlib", "trio", "time", "threading", "socket", "subprocess", "select", "pyfuse3"}
"""What core must not know: it decides, and does nothing."""

SOURCES: Final = sorted(path for room in BELOW for path in (ROOT / "zbudfs" / room).rglob("*.py"))


def imported(source: Path) -> Iterator[str]:
    """Yield the full name of everything that `source` imports, wherever it does."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(source: Path) -> None:
    """A room imports from itself and from those below."""
    room = source.relative_to(ROOT / "zbudfs").parts[0]
    for name in imported(source):
        parts = name.split(".")
        if parts[0] == "zbudfs" and len(parts) > 1 and parts[1] in BELOW:
            assert parts[1] in BELOW[room] | {room}, f"{room} imports {name}"
        if room == "core":
            assert parts[0] not in IMPURE, f"core imports {name}"


def test_every_room_is_known() -> None:
    """A new folder of the package needs its place in the order."""
    rooms = {path.parent.name for path in (ROOT / "zbudfs").glob("*/__init__.py")}
    assert rooms == set(BELOW)


def test_what_the_daemon_must_not_import() -> None:
    """All that it imports is locked in memory: no parser of options, no programs, nothing of the command."""
    pytest.importorskip("pyfuse3")
    code = "import sys, zbudfs.service.daemon; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(run.stdout.split())
    assert "zbudfs.service.daemon" in loaded
    heavy = {
        "argparse",
        "numpy",
        "rich",
        "click",
        "zbudfs.cli",
        "zbudfs.swap",
        "zbudfs.service.launch",
        "logging.handlers",
    }
    assert not loaded & heavy
