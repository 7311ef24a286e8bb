# SPDX-License-Identifier: MIT
"""docs/understand/concurrency.md names every task and thread of the daemon, and each of its races has a test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support import ROOT

PAGE: Final = ROOT / "docs/understand/concurrency.md"
DAEMON: Final = ("store", "fuse", "service")
"""The packages that run in the daemon."""
TASK: Final = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)
THREAD: Final = re.compile(r"^\| (`[\w-]+`(?:, `[\w-]+`)*) \|", re.MULTILINE)
RACE: Final = re.compile(r"^(\d+)\. ", re.MULTILINE)
MARK: Final = re.compile(r"pytest\.mark\.race\(([\d, ]+)\)")


def section(number: int) -> str:
    """Return the text of a numbered section of the page."""
    parts = re.split(r"^## (\d)\. .*$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[str(number)]


def calls(source: str) -> Iterator[ast.Call]:
    """Yield every call in a module."""
    yield from (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))


def tasks(module: str, source: str) -> set[str]:
    """Return `module.function` for each task that a module starts in a nursery."""
    return {
        f"{module}.{ast.unparse(call.args[0]).removeprefix('self.')}"
        for call in calls(source)
        if isinstance(call.func, ast.Attribute)
        and (
            call.func.attr == "start_soon" or (call.func.attr == "start" and "nursery" in ast.unparse(call.func.value))
        )
    }


def threads(source: str) -> set[str]:
    """Return the names of the threads that a module makes."""
    found: set[str] = set()
    for call in calls(source):
        made = ast.unparse(call.func).partition("[")[0]
        names = call.args[:1] if made == "IoThread" else [word.value for word in call.keywords if word.arg == "name"]
        if made in ("IoThread", "threading.Thread"):
            found |= {str(name.value) for name in names if isinstance(name, ast.Constant)}
    return found


def sources() -> Iterator[Path]:
    """Yield the modules of the daemon."""
    for package in DAEMON:
        yield from sorted((ROOT / "zbudfs" / package).rglob("*.py"))


def test_tasks() -> None:
    """The table of tasks has each task that the daemon starts, and no other."""
    started = {task for path in sources() for task in tasks(path.stem, path.read_text())}
    assert set(TASK.findall(section(1))) == started


def test_threads() -> None:
    """The table of threads has each thread that the daemon makes, and no other."""
    made = {name for path in sources() for name in threads(path.read_text())}
    named = {name.strip("` ") for row in THREAD.findall(section(2)) for name in row.split(",")}
    assert named == made


def test_races() -> None:
    """Each race of the page has at least one test that carries its number, and each number is one of the page."""
    numbered = [int(number) for number in RACE.findall(section(4))]
    assert numbered == list(range(1, len(numbered) + 1))
    marked = {
        int(number)
        for path in (ROOT / "tests").rglob("test_*.py")
        for mark in MARK.findall(path.read_text())
        for number in mark.split(",")
        if path != Path(__file__)
    }
    assert marked == set(numbered)


def test_a_task_and_a_thread_are_found() -> None:
    """The searches find the tasks and threads of a made-up module."""
    source = """
async def run(self, nursery, other):
    nursery.start_soon(self._beat, 1)
    await nursery.start(store.run)
    other.start(1)
    self.thread = IoThread[None]("writeback")
    threading.Thread(target=run, name="watch", daemon=True)
"""
    assert tasks("worker", source) == {"worker._beat", "worker.store.run"}
    assert threads(source) == {"writeback", "watch"}
