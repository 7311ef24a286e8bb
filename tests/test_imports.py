# SPDX-License-Identifier: MIT
"""Imports point one way, core decides and does nothing, and the daemon carries nothing that it does not need.

    cli -> swap, service -> fuse -> store -> core

The rules are a table. They are tried on made-up modules that break each of them as well as on the real ones: a test
that reads imports and never finds anything would look just the same.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT

PACKAGE: Final = ROOT / "zbudfs"

BELOW: Final[dict[str, frozenset[str]]] = {
    "core": frozenset(),
    "store": frozenset({"core"}),
    "fuse": frozenset({"core", "store"}),
    "service": frozenset({"core", "store", "fuse"}),
    "swap": frozenset({"core"}),
    "estimate": frozenset({"core"}),
    "tracing": frozenset({"core", "store"}),
    "cli": frozenset({"core", "store", "fuse", "service", "swap", "estimate", "tracing"}),
}
"""Each room, and the rooms that it may import from besides itself. `swap` needs no mount, only loop devices."""

PURE: Final = frozenset(
    {
        *("__future__", "abc", "array", "bisect", "collections", "contextlib", "dataclasses", "enum", "functools"),
        *(
            "heapq",
            "itertools",
            "json",
            "math",
            "operator",
            "re",
            "string",
            "struct",
            "types",
            "typing",
            "warnings",
            "zlib",
        ),
        *("sys", "zstandard"),
    }
)
"""All that core may import: nothing that can wait, look at the clock, or change anything outside the process."""

PURE_PARTS: Final = {"sys": frozenset({"byteorder", "maxsize", "hash_info"})}
"""Of what is only partly pure, the names that core may use."""

ONLY_IN: Final = {
    "pyfuse3": frozenset({"fuse"}),
    "argparse": frozenset({"cli"}),
    "rich": frozenset({"cli"}),
    "matplotlib": frozenset({"cli"}),
    "textual": frozenset({"cli"}),
    "zstandard": frozenset({"core"}),
    "mmap": frozenset({"store", "service", "tracing"}),
}
"""What has one place in the design."""

ONLY_COMMANDS: Final = ("rich", "matplotlib", "textual")
"""Large, and not needed for anything but the command that wants it."""
NOT_IN_THE_DAEMON: Final = (
    "zbudfs.cli",
    "zbudfs.swap",
    "zbudfs.service.launch",
    "zbudfs.estimate",
    "zbudfs.tracing",
    "zbudfs.core.trace_file",
    "argparse",
    *ONLY_COMMANDS,
)
NEVER: Final = ("numpy", "click", "typer", "prompt_toolkit", "pkg_resources", "setuptools", "asyncio")


IMPURE_CALLS: Final = frozenset({"open", "print", "input", "exec", "eval", "breakpoint"})
UNKNOWN: Final = "a module whose name nobody knows before it runs"


def imports_of(source: str, module: str) -> Iterator[str]:
    """Yield the full name of everything that a module imports, wherever in it and in whatever way."""
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("__import__", "importlib.import_module", "import_module", "runpy.run_module"):
                name = node.args[0] if node.args else None
                yield str(name.value) if isinstance(name, ast.Constant) else UNKNOWN


def parts_used(source: str, module: str) -> Iterator[str]:
    """Yield what a source uses of `module`: the names behind the dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == module:
            yield from (alias.name for alias in node.names)


def wrong_imports(source: str, module: str) -> list[str]:
    """Return what a module `zbudfs.ROOM...` must not import and does."""
    room = module.split(".")[1]
    wrong = []
    for name in imports_of(source, module):
        parts = name.split(".")
        if parts[0] == "zbudfs":
            other = parts[1] if len(parts) > 1 else ""
            if other in BELOW and other not in BELOW[room] | {room}:
                wrong.append(f"{module} ({room}) imports {name} ({other})")
        elif room == "core" and parts[0] not in PURE:
            wrong.append(f"{module} is pure, and imports {name}")
        elif room not in ONLY_IN.get(parts[0], {room}):
            wrong.append(f"{module} imports {name}, which belongs to {', '.join(sorted(ONLY_IN[parts[0]]))}")
        elif name == UNKNOWN or parts[0] in NEVER:
            wrong.append(f"{module} imports {name}")
    if room == "core":
        for whole, parts_allowed in PURE_PARTS.items():
            wrong += [
                f"{module} uses {whole}.{part}" for part in parts_used(source, whole) if part not in parts_allowed
            ]
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        wrong += [
            f"{module} calls {ast.unparse(call.func)}" for call in calls if ast.unparse(call.func) in IMPURE_CALLS
        ]
    return wrong


def module_of(path: Path) -> str:
    """Return the name of the module in a file; that of a package ends in `__init__`, so that its parent is itself."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES: Final = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    """A module imports from its own room and from those below, and what belongs elsewhere not at all."""
    assert wrong_imports(MODULES[module].read_text(), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("zbudfs.core.made_up", "import os"),
        ("zbudfs.core.made_up", "from time import monotonic"),
        ("zbudfs.core.made_up", "import trio.lowlevel"),
        ("zbudfs.core.made_up", "import mmap"),
        ("zbudfs.core.made_up", "import threading"),
        ("zbudfs.core.made_up", "import sys; sys.stderr"),
        ("zbudfs.core.made_up", "from sys import argv"),
        ("zbudfs.core.made_up", "open('/etc/passwd')"),
        ("zbudfs.core.made_up", "from zbudfs.store.pool import Pool"),
        ("zbudfs.core.made_up", "from ..store import pool"),
        ("zbudfs.core.made_up", "from .. import store"),
        ("zbudfs.core.made_up", "import zbudfs.cli.main"),
        ("zbudfs.core.made_up", "def late():\n    from zbudfs.fuse import nodes"),
        ("zbudfs.core.made_up", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zbudfs.store.pool"),
        ("zbudfs.core.made_up", "__import__('os')"),
        ("zbudfs.store.made_up", "from zbudfs.fuse.nodes import Stats"),
        ("zbudfs.store.made_up", "from zbudfs.service import log"),
        ("zbudfs.store.made_up", "import pyfuse3"),
        ("zbudfs.store.made_up", "import importlib\nimportlib.import_module(name)"),
        ("zbudfs.store.made_up", "from zbudfs import cli"),
        ("zbudfs.fuse.made_up", "import zbudfs.service.settings"),
        ("zbudfs.service.made_up", "import zbudfs.swap.loop"),
        ("zbudfs.service.made_up", "from zbudfs.cli import options"),
        ("zbudfs.service.made_up", "import numpy"),
        ("zbudfs.service.made_up", "import argparse"),
        ("zbudfs.swap.made_up", "from zbudfs.service.mountpoint import find_mount"),
        ("zbudfs.swap.made_up", "import zbudfs.store.pool"),
        ("zbudfs.cli.made_up", "import pyfuse3"),
    ],
)
def test_what_is_wrong_is_found(module: str, source: str) -> None:
    """Each rule is broken once, and that is noticed."""
    assert wrong_imports(source, module) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "zbudfs.core.made_up",
            "import sys, struct, zstandard\nfrom zbudfs.core.units import PAGE_SIZE\nsys.byteorder",
        ),
        ("zbudfs.core.made_up", "from . import units\nfrom .units import PAGE_SIZE\nimport collections.abc"),
        (
            "zbudfs.store.made_up",
            "import mmap, os, trio\nfrom zbudfs.core import units\nfrom zbudfs import __version__",
        ),
        ("zbudfs.fuse.made_up", "import pyfuse3\nfrom zbudfs.store.page_store import PageStore"),
        ("zbudfs.service.made_up", "from zbudfs.fuse import shim\nfrom zbudfs.store.backing import Backing"),
        (
            "zbudfs.cli.made_up",
            "import argparse\nfrom zbudfs.swap.loop import swaps\nfrom zbudfs.service import launch",
        ),
    ],
)
def test_what_is_right_is_let_pass(module: str, source: str) -> None:
    """The rules do not forbid what the design needs."""
    assert wrong_imports(source, module) == []


def test_every_room_has_a_rule() -> None:
    """A new folder needs its place in the order; beside the rooms there are only the package and its way in."""
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(BELOW)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    top = {name for path in PACKAGE.glob("*.py") for name in imports_of(path.read_text(), "zbudfs.top")}
    assert {name.split(".")[1] for name in top if name.startswith("zbudfs.")} <= {"cli"}
    assert list(imports_of((PACKAGE / "__init__.py").read_text(), "zbudfs.top")) == []


def test_the_rules_have_an_order() -> None:
    """There is no way round in a circle: every room comes after all that it may import from."""
    order = list(BELOW)
    for room, below in BELOW.items():
        assert all(order.index(other) < order.index(room) for other in below), room


def loaded_by(code: str) -> set[str]:
    """Return the names of all modules that are loaded after some code has run in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    names = json.loads(run.stdout)
    assert isinstance(names, list)
    return set(names)


def test_what_the_daemon_imports() -> None:
    """All of it is locked in memory for ever: no command line, no programs, no frameworks."""
    loaded = loaded_by("import zbudfs.service.daemon")
    assert "zbudfs.service.daemon" in loaded
    assert "pyfuse3" in loaded
    unwanted = (*NOT_IN_THE_DAEMON, *NEVER)
    assert [name for name in sorted(loaded) if name.startswith(tuple(f"{start}." for start in unwanted))] == []
    assert sorted(loaded & set(unwanted)) == []
    # trio brings the standard library's subprocess along; no module of ours may use it there.
    ours = [path for module, path in MODULES.items() if module.removesuffix(".__init__") in loaded]
    assert len(ours) > 20
    assert [path for path in ours if "subprocess" in imports_of(path.read_text(), module_of(path))] == []


def test_what_core_imports() -> None:
    """Nothing of core, imported whole, brings in an event loop or any other room."""
    names = [module for module in MODULES if module.startswith("zbudfs.core.") and not module.endswith("__init__")]
    loaded = loaded_by(f"import {', '.join(names)}")
    assert set(names) <= loaded
    compiled = "zbudfs.core._hot"  # no Python source: not among the modules
    assert {name for name in loaded if name.startswith("zbudfs.")} == {"zbudfs.core", compiled, *names}
    assert not loaded & {"trio", "pyfuse3", "asyncio", "socket", "subprocess", "mmap"}
