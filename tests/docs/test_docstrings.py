# SPDX-License-Identifier: MIT
"""Each public module, class and function has a docstring, and each error has an errno."""

from __future__ import annotations

import ast
import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT

SOURCES: Final = sorted((ROOT / "zbudfs").rglob("*.py"))
LICENCE_LINE: Final = "# SPDX-License-Identifier: MIT\n"

Named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public_names(tree: ast.Module | ast.ClassDef, above: str = "") -> Iterator[tuple[str, Named]]:
    """Yield each public class and function with the classes around it, but not those inside functions."""
    for node in statements(tree.body):
        if isinstance(node, Named) and not node.name.startswith("_"):
            yield f"{above}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_names(node, f"{above}{node.name}.")


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, including those inside `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            for block in (node.body, node.orelse, *([node.finalbody] if isinstance(node, ast.Try) else [])):
                yield from statements(block)


def undocumented(source: str) -> list[str]:
    """Return the public names of a module that have no docstring; "" for the module itself."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else [""]
    return found + [name for name, node in public_names(tree) if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    """A module begins with its licence and a docstring. Each public class, method and function has a docstring."""
    source = path.read_text()
    assert source.startswith(LICENCE_LINE)
    assert undocumented(source) == []


def test_a_missing_docstring_is_found() -> None:
    """The check finds methods, properties, coroutines and code in an `if`, and ignores private and inner functions."""
    source = '''
class Public:
    async def method(self): pass
    @property
    def value(self): pass
    def _private(self): pass
    def fine(self):
        """Said."""
        def inner(): pass
    class Inner: pass
class _Private:
    def method(self): pass
if True:
    def function(): pass
try:
    pass
finally:
    def another(): pass
'''
    assert undocumented(source) == [
        *("", "Public", "Public.method", "Public.value", "Public.Inner", "function", "another"),
    ]


def errors_and_errnos() -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return each class below ZbudfsError with its subclasses, and the errno of each that has one.

    A fresh interpreter loads all of the daemon, since the shim must come before pyfuse3.
    """
    code = (
        "import json, zbudfs.service.daemon\n"
        "from zbudfs.core.errors import ZbudfsError\n"
        "from zbudfs.fuse.operations import ERRNO_OF\n"
        "def tree(kind):\n"
        "    for below in kind.__subclasses__():\n"
        "        yield below.__name__, [other.__name__ for other in below.__subclasses__()]\n"
        "        yield from tree(below)\n"
        "print(json.dumps([dict(tree(ZbudfsError)), {kind.__name__: code for kind, code in ERRNO_OF.items()}]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert run.returncode == 0, run.stderr
    tree, codes = json.loads(run.stdout)
    return tree, codes


def test_every_error_has_an_errno() -> None:
    """Each error that core and store may raise has an errno that exists, and the table lists no other class."""
    tree, codes = errors_and_errnos()
    assert len(tree) >= 6
    assert set(codes) == set(tree)
    assert [name for name, code in codes.items() if code not in errno.errorcode] == []


def test_errnos_mean_what_they_say() -> None:
    """Full is ENOSPC and lost is EIO. None is ENOSYS, after which the kernel would never ask again."""
    _, codes = errors_and_errnos()
    assert (codes["PoolFull"], codes["BackingFull"], codes["PageLost"]) == (errno.ENOSPC, errno.ENOSPC, errno.EIO)
    assert errno.ENOSYS not in codes.values()


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    """The picture at the head of core/errors.py names each class."""
    tree, _ = errors_and_errnos()
    picture = ast.get_docstring(ast.parse((ROOT / "zbudfs/core/errors.py").read_text()))
    assert picture is not None
    assert [name for name in tree if f"── {name} " not in picture] == []
