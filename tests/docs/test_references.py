# SPDX-License-Identifier: MIT
"""Every link, section, file and function that a document or a comment names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Final

import pytest

from tests.docs.test_commands import DOCUMENTS
from tests.support import ROOT

SOURCES: Final = sorted(
    path
    for folder in ("zbudfs", "scripts", "bench", "kit", "tests", "systemd")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".c", ".h", ".sh", ".service", ".conf") and path != Path(__file__)
)
LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)(?:, \"([^\"]+)\")?")
"""A Markdown link, with the title of a section that may follow it: [page](page.md), "Title"."""
HEADING: Final = re.compile(r"^#+ (.+)$", re.MULTILINE)
FILE: Final = re.compile(
    r"(?<![\w/.~<-])((?:[\w.-]+/)*[\w-]+\.(?:py|c|h|md|rst|sh|toml\.example))(?:::(\w+))?\b(?![\w*/(])"
)
"""A file, with or without a folder, and a test in it: tests/store/test_hot.py::test_name."""
DOCUMENT: Final = re.compile(r"\bdocs/[\w/.-]+\.(?:md|rst)\b")
NAME: Final = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?`")
"""A dotted name in code: `module.function`, `Class.method`."""
FOREIGN: Final = frozenset(
    {
        *("cgroup", "init", "memory", "swap", "sysinit", "system", "sleep", "pidfd", "pids", "user", "os"),
        *("backing", "fuse", "lock"),
    }
)
"""First parts of dotted names of other projects: files of the kernel, units of systemd, names of stored descriptors."""
GENERATED: Final = frozenset({"docs/zbudfs.toml.example"})
"""Files that scripts/pages.py makes."""
ELSEWHERE: Final = frozenset(
    {"drivers/staging/zcache/zbud.c", "mm/zbud.c", "mm/zswap.c", "zbud.c", "zswap.c", "contributing.rst"}
)
"""Files of other projects."""


@functools.cache
def all_files() -> frozenset[str]:
    """Return every file of the project, by its path and by each end of the path."""
    found = set()
    for folder in (".", "docs", "zbudfs", "scripts", "bench", "kit", "tests", "systemd"):
        for path in (ROOT / folder).glob("*" if folder == "." else "**/*"):
            parts = path.relative_to(ROOT).parts
            found |= {"/".join(parts[start:]) for start in range(len(parts))}
    return frozenset(found)


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """Return each name that a module defines: functions, classes, methods, attributes and constants."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return frozenset(found)


@functools.cache
def owners() -> dict[str, list[Path]]:
    """Return for each module and class of the project the files that it may be in."""
    found: dict[str, list[Path]] = {}
    for path in (path for path in SOURCES if path.suffix == ".py"):
        found.setdefault(path.stem, []).append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(path)
    return found


def unknown_name(name: str) -> bool:
    """Return whether the owner of a dotted name lacks the next part, or the name has no owner in the project."""
    first, *rest = name.split(".")
    if (
        first in FOREIGN
        or f"{name}" in all_files()
        or rest[-1] in ("py", "md", "json", "toml", "so", "service", "wants")
    ):
        return False
    places = owners().get(first, [])
    if places and places[0].stem == first and rest[0] in owners() and len(rest) > 1:
        return unknown_name(".".join(rest))
    return not any(rest[0] in definitions(path) for path in places)


def slug(heading: str) -> str:
    """Return the anchor that Markdown makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken(document: Path, text: str) -> list[str]:
    """Return the links, sections, files, tests and functions in a document that do not exist."""
    found = []
    for target, title in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        headings = HEADING.findall(path.read_text()) if path.suffix == ".md" and path.exists() else []
        if not path.exists():
            found.append(target)
        elif (anchor and anchor not in map(slug, headings)) or (
            title and path.suffix == ".md" and title not in headings
        ):
            found.append(f"{target} {title}".strip())
    prose = re.sub(r"\]\([^)]*\)", "]", text)
    for name, test in FILE.findall(prose):
        if name not in all_files() and name not in ELSEWHERE:
            found.append(name)
        elif test and not any(test in definitions(path) for path in SOURCES if str(path).endswith(name)):
            found.append(f"{name}::{test}")
    found += [name for name in re.findall(r"(?<!\w)(?:::)?(test_\w+)(?![\w.*])", prose) if not is_test(name)]
    return found + [name for name in NAME.findall(prose) if unknown_name(name)]


@functools.cache
def is_test(name: str) -> bool:
    """Return whether a test of this name, or a file of tests, exists."""
    return f"{name}.py" in all_files() or any(
        name in definitions(path) or (name.endswith("_N") and name.replace("_N", "_1") in str(definitions(path)))
        for path in SOURCES
        if path.name.startswith("test_") and path.suffix == ".py"
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_references_of_documents(document: Path) -> None:
    """The links, anchors, sections, files, tests and dotted names of a document exist."""
    assert broken(document, document.read_text()) == []


def test_documents_named_in_sources() -> None:
    """Each document that a comment, a docstring, a script or a unit names exists."""
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in DOCUMENT.findall(path.read_text())
        if not (ROOT / name).exists() and name not in GENERATED
    }
    assert wrong == set()


def test_files_named_in_comments() -> None:
    """Each source file that a docstring or a comment names with its folder exists."""
    named = re.compile(
        r"\b(?:core|store|fuse|service|swap|cli|tracing|estimate|tests|scripts|bench)/[\w/]+\.(?:py|c|h|sh)\b"
    )
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in named.findall(path.read_text())
        if name not in all_files()
    }
    assert wrong == set()


@pytest.mark.parametrize(
    "text",
    [
        "[a](missing.md)",
        "[a](#no-such-section)",
        '[a](README.md), "No Such Section"',
        "`core/missing.py`",
        "tests/docs/test_references.py::test_missing",
        "see test_nothing_of_this_name",
        "`codec.missing_function`",
        "`PageTable.missing`",
        "`no_such_module.function`",
    ],
)
def test_a_broken_reference_is_found(text: str) -> None:
    """The check finds each kind of broken reference, and accepts the right ones."""
    right = (
        "# Head\n[a](README.md#head) `core/codec.py` `codec.page_of_word` `PageTable.store` [b](LICENSE) test_commands.py"
        " tests/docs/test_commands.py::test_targets_exist\n"
    )
    document = ROOT / "README.md"
    assert broken(document, right) == ["README.md#head"]
    assert len(broken(document, text)) >= 1
