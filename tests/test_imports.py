# SPDX-License-Identifier: MIT
"""Imports point one way, core only decides, and the daemon loads nothing that it does not need.

    cli -> swap, service -> fuse -> store -> core

The rules are a table. Made-up modules that break each rule show that the checks find a wrong import.
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
"""Each package, and the packages that it may import besides itself. `swap` needs no mount, only loop devices."""

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
"""The modules that core may import. None of them waits, reads the clock, or changes anything outside the process."""

PURE_PARTS: Final = {"sys": frozenset({"byteorder", "maxsize", "hash_info"})}
"""Modules that are pure in part, and the names in them that core may use."""

ONLY_IN: Final = {
    "pyfuse3": frozenset({"fuse"}),
    "argparse": frozenset({"cli"}),
    "rich": frozenset({"cli"}),
    "matplotlib": frozenset({"cli"}),
    "textual": frozenset({"cli"}),
    "zstandard": frozenset({"core"}),
    "mmap": frozenset({"store", "service", "tracing"}),
}
"""Modules that only one file may import."""

ONLY_COMMANDS: Final = ("rich", "matplotlib", "textual")
"""Large modules, each of which only the command that needs it may import."""
NOT_IN_THE_DAEMON: Final = (
    "zbudfs.cli",
    "zbudfs.swap",
    "zbudfs.service.launch",
    "zbudfs.service.supervisor",
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
    """Yield the full name of each module that a source imports, at any place and in any form."""
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
                yield _named(node.args[0] if node.args else None)
            elif called == "Later":  # the function of a command, whose module is imported when it runs
                first, second = (ast.literal_eval(each) for each in node.args)
                yield f"zbudfs.cli.{first}.{second}"


def _named(name: ast.expr | None) -> str:
    """Return the module that a call imports: by its name, or by the package that the name begins with."""
    if isinstance(name, ast.JoinedStr):
        name = name.values[0]
        package = str(name.value).rpartition(".")[0] if isinstance(name, ast.Constant) else ""
        return package or UNKNOWN
    return str(name.value) if isinstance(name, ast.Constant) else UNKNOWN


def parts_used(source: str, module: str) -> Iterator[str]:
    """Yield the names of `module` that a source uses: those behind the dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == module:
            yield from (alias.name for alias in node.names)


def wrong_imports(source: str, module: str) -> list[str]:
    """Return the imports of a module `zbudfs.PACKAGE...` that break a rule."""
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
    """Return the name of the module in a file. That of a package ends in `__init__`, so that its parent is itself."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES: Final = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE}

COMPILED: Final = {module_of(path): path for path in sorted(PACKAGE.rglob("*.pyi"))}
"""The stubs of the modules that are written in C."""


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    """A module imports only from its own package and from those below, and keeps the rules for single modules."""
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
def test_each_broken_rule_is_found(module: str, source: str) -> None:
    """The check finds a break of each rule."""
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
def test_right_imports_are_accepted(module: str, source: str) -> None:
    """The rules do not forbid the imports that the design needs."""
    assert wrong_imports(source, module) == []


def test_every_room_has_a_rule() -> None:
    """Each folder of the package is in the table, and there are no other modules but the package and its entry."""
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(BELOW)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    top = {name for path in PACKAGE.glob("*.py") for name in imports_of(path.read_text(), "zbudfs.top")}
    assert {name.split(".")[1] for name in top if name.startswith("zbudfs.")} <= {"cli"}
    assert list(imports_of((PACKAGE / "__init__.py").read_text(), "zbudfs.top")) == []


def graph_of(modules: dict[str, str]) -> dict[str, set[str]]:
    """Return for each of `modules` (name -> source) the others that it imports, in functions as well.

    `from package import module` imports that module, and not the package.
    """
    names = {name.removesuffix(".__init__") for name in modules}
    graph = {}
    for name, source in modules.items():
        found = set()
        for imported in imports_of(source, name):
            while imported and imported not in names:
                imported = imported.rpartition(".")[0]
            found.add(imported)
        graph[name.removesuffix(".__init__")] = found - {""}
    return graph


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a cycle in the order of their imports, or an empty list."""
    finished: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in finished:
            for imported in sorted(graph[module]):
                if found := walk(imported, [*path, module]):
                    return found
            finished.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


def test_there_is_no_cycle() -> None:
    """No module imports itself through others, not even in a function or within a package."""
    graph = graph_of({module: path.read_text() for module, path in (MODULES | COMPILED).items()})
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > 300
    assert cycle_in(graph) == []


def test_a_cycle_is_found() -> None:
    """The search finds a cycle within a package and a cycle through a function."""
    modules = {
        "zbudfs.cli.__init__": "",
        "zbudfs.cli.one": "from zbudfs.cli import two",
        "zbudfs.cli.two": "def late():\n    from zbudfs.cli.three import name",
        "zbudfs.cli.three": "import os, zbudfs.cli.one",
        "zbudfs.cli.four": "from zbudfs import cli\nimport zbudfs.cli.one",
    }
    assert cycle_in(graph_of(modules)) == ["zbudfs.cli.one", "zbudfs.cli.two", "zbudfs.cli.three"]
    assert cycle_in(graph_of({**modules, "zbudfs.cli.three": "import os"})) == []


PROOFS: Final = ("kit", "bench", "scripts", "tests")
"""The folders beside the product. Each may import from the product and from the folders before it."""


def test_proofs_have_an_order() -> None:
    """The kit imports none of its users, the product imports none of the folders, and there is no cycle among them."""
    modules = {module_of(path): path.read_text() for name in PROOFS for path in (ROOT / name).rglob("*.py")}
    wrong = [
        f"{module} imports {name}"
        for module, source in modules.items()
        for name in imports_of(source, module)
        if name.partition(".")[0] in PROOFS[PROOFS.index(module.partition(".")[0]) + 1 :]
    ]
    assert wrong == []
    assert cycle_in(graph_of(modules)) == []
    for module, path in MODULES.items():
        assert not [name for name in imports_of(path.read_text(), module) if name.partition(".")[0] in PROOFS], module


def test_the_rules_have_an_order() -> None:
    """The table has no cycle: each package comes after all packages that it may import."""
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


def test_imports_of_the_daemon() -> None:
    """The daemon loads no command line, no programs and no frameworks, since all its memory is locked."""
    loaded = loaded_by("import zbudfs.service.daemon")
    assert "zbudfs.service.daemon" in loaded
    assert "pyfuse3" in loaded
    unwanted = (*NOT_IN_THE_DAEMON, *NEVER)
    assert [name for name in sorted(loaded) if name.startswith(tuple(f"{start}." for start in unwanted))] == []
    assert sorted(loaded & set(unwanted)) == []
    # trio imports the standard library's subprocess; no module of ours may use it there.
    ours = [path for module, path in MODULES.items() if module.removesuffix(".__init__") in loaded]
    assert len(ours) > 20
    assert [path for path in ours if "subprocess" in imports_of(path.read_text(), module_of(path))] == []


def test_the_daemon_loads_none_of_the_modules_that_it_can_do_without() -> None:
    """The stand-ins of the guard are gone, nothing has loaded the modules, and pathlib is not loaded either."""
    code = """
import sys
before = set(sys.modules)
import zbudfs.service.daemon
from zbudfs.service.import_guard import NOT_NEEDED
assert "ssl" in NOT_NEEDED
print([name for name in ("pathlib", *NOT_NEEDED) if name in sys.modules and name not in before])
"""
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_the_daemon_loads_with_an_old_trio() -> None:
    """No module uses trio.TaskStatus when it is imported: trio 0.22, which Debian 12 has, has no such name."""
    code = "import trio; vars(trio).pop('TaskStatus', None); import zbudfs.service.daemon"
    assert "zbudfs.store.reclaimer" in loaded_by(code)


def test_imports_of_core() -> None:
    """An import of all of core loads no event loop and no other package."""
    names = [module for module in MODULES if module.startswith("zbudfs.core.") and not module.endswith("__init__")]
    loaded = loaded_by(f"import {', '.join(names)}")
    assert set(names) <= loaded
    compiled = "zbudfs.core._hot"  # these have no Python source
    assert {name for name in loaded if name.startswith("zbudfs.")} == {"zbudfs.core", compiled, *names}
    assert not loaded & {"trio", "pyfuse3", "asyncio", "socket", "subprocess", "mmap"}
