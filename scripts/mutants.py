# SPDX-License-Identifier: MIT
"""Mutation tests: make single changes to the allocator and the page table, and check that the tests notice each.

A mutant is a module with one change: `<` becomes `<=`, `+` becomes `-`, a number is one larger, a condition is negated, a
statement is removed. The mutant is killed if a test of the module fails or does not end. A survivor shows a missing test, or
code that says the same thing twice. scripts/survivors.txt lists the understood survivors, as this script prints them. Any
other survivor is a failure.

No file is written. Each mutant runs in its own process, forked from a process that has imported the libraries of the tests.
There the module is compiled from the changed tree. Assertions, the functions that serve them (`check`), texts and
annotations are not changed, since they have no behaviour.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.machinery
import importlib.util
import math
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
EXPLAINED: Final = ROOT / "scripts/survivors.txt"
_CORE: Final = "tests/core/"
_PACKING_TESTS: Final = ("test_recovery.py", "test_allocator_rules.py", "test_allocator_model.py")
TESTS: Final[dict[str, tuple[str, ...]]] = {
    "zbud": ("test_packing.py", "test_zbud_rules.py", *_PACKING_TESTS),
    "dense": ("test_dense_frame.py", *_PACKING_TESTS),
    "allocator": ("test_zbud_rules.py", "test_dense_frame.py", *_PACKING_TESTS),
    "lists": ("test_lists.py", "test_block_map.py"),
    "page_table": ("test_page_table.py", "test_recovery.py"),
    "block_map": ("test_block_recovery.py", "test_block_map.py"),
    "packing": ("test_packing.py",),
}
"""Test files in tests/core by the module of zbudfs/core that they test, the fastest file first."""

CPU_SHARE: Final = 2
CPU_EXTRA_SECONDS: Final = 2
"""Limit of the CPU time of one test: the time of all tests without a mutant, divided by CPU_SHARE, and these seconds more.
That is two or three times the time of the slowest test, and a mutant that never ends is found within seconds."""
WAIT_SECONDS: Final = 10
WAITS: Final = 60
"""Longest wait for a mutant: WAITS waits of WAIT_SECONDS. A mutant may sleep, or run on a busy machine. While this script is
stopped, at most one wait passes."""
MEMORY_BYTES: Final = 4 << 30
"""Limit of the address space of a mutant, which may fill a list without end."""

PASSED, FAILED = 0, 1

_CONTRARIES: Final[tuple[tuple[type[ast.AST], type[ast.AST]], ...]] = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.In, ast.NotIn),
    (ast.Is, ast.IsNot),
    (ast.And, ast.Or),
    (ast.Add, ast.Sub),
    (ast.LShift, ast.RShift),
    (ast.BitAnd, ast.BitOr),
)
_SWAPS: Final[dict[type[ast.AST], type[ast.AST]]] = {
    **dict(_CONTRARIES),
    **{second: first for first, second in _CONTRARIES},
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitXor: ast.BitOr,
}
_UNTOUCHED: Final = (ast.Assert, ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)
_ORACLES: Final = ("check", "_check_frame")


@dataclass(slots=True)
class Site:
    """One possible change of a tree."""

    scope: str
    """Class and function of the change."""
    statement: ast.stmt
    owner: ast.AST
    field: str
    index: int | None
    """Index in a list of children; None if the field is a single child."""
    new: ast.AST

    def swap(self) -> None:
        """Make the change. A second call undoes it."""
        children = getattr(self.owner, self.field)
        if self.index is None:
            setattr(self.owner, self.field, self.new)
            self.new = children
        else:
            children[self.index], self.new = self.new, children[self.index]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change as text, which stays the same as long as the statement is not edited."""

    module: str
    number: int
    """Number of the change in its module."""
    line: int
    text: str

    def __str__(self) -> str:
        """Return the line of the mutant in scripts/survivors.txt."""
        return f"{self.module} {self.text}"


def _alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the changes of a node."""
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            changed: Any = copy.copy(node)
            changed.ops = [*node.ops]
            changed.ops[number] = _SWAPS[type(operator)]()
            yield changed
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
        other: Any = copy.copy(node)
        other.op = _SWAPS[type(node.op)]()
        yield other
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.copy_location(ast.IfExp(node.test, node.orelse, node.body), node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield ast.copy_location(ast.Constant(value), node)
    elif isinstance(node, ast.If | ast.While):
        negated = copy.copy(node)
        negated.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        yield negated
    if _can_go(node):
        yield ast.copy_location(ast.Pass(), node)


def _can_go(node: ast.AST) -> bool:
    """Return whether a node is a statement that can be removed."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def _sites(node: ast.AST, scope: str = "", statement: ast.stmt | None = None) -> Iterator[Site]:
    """Yield all possible changes below a node."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(child, ast.AST):
                continue
            here, inside = statement, scope
            if isinstance(child, ast.stmt):
                here = child
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                if child.name in _ORACLES:
                    continue
                inside = f"{scope}.{child.name}" if scope else child.name
            if here is not None:
                for new in _alternatives(child):
                    yield Site(scope or "module", here, node, field, index, new)
            if not isinstance(child, _UNTOUCHED):
                yield from _sites(child, inside, here)


def _shown(statement: ast.AST) -> str:
    """Return a statement in one line; for a compound statement, its head."""
    if isinstance(statement, ast.Pass):
        return "(gone)"
    text = ast.unparse(statement)
    if isinstance(statement, ast.If | ast.While | ast.For | ast.With | ast.FunctionDef | ast.ClassDef):
        return text.split(":\n", 1)[0]
    return " ".join(text.split())


def path_of(module: str) -> Path:
    """Return the path of a module of core/."""
    return ROOT / "zbudfs/core" / f"{module}.py"


def mutants_of(module: str) -> list[Mutant]:
    """Return all mutants of a module."""
    tree = ast.parse(path_of(module).read_text())
    found = []
    for number, site in enumerate(_sites(tree)):
        before = _shown(site.statement)
        line = getattr(site.statement, "lineno", 0)
        if isinstance(site.new, ast.stmt):
            after = _shown(site.new)
        else:
            site.swap()
            after = _shown(site.statement)
            site.swap()
        found.append(Mutant(module, number, line, f"{site.scope}: {before}  ->  {after}"))
    return found


def tree_of(mutant: Mutant) -> ast.Module:
    """Return the changed tree of the module of a mutant."""
    tree = ast.parse(path_of(mutant.module).read_text())
    next(site for number, site in enumerate(_sites(tree)) if number == mutant.number).swap()
    return ast.fix_missing_locations(tree)


class _Changed(importlib.machinery.SourceFileLoader):
    """A loader that compiles one module from a tree instead of its file."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        super().__init__(f"zbudfs.core.{module}", str(path_of(module)))
        self._tree = tree

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of the changed module; None for another module."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the changed tree."""
        code: CodeType = compile(self._tree, self.path, "exec")
        return code


class _Limit:
    """A plugin of pytest that ends a test, and its process, after `cpu_seconds` seconds of CPU time."""

    def __init__(self, cpu_seconds: int) -> None:
        self._cpu_seconds = cpu_seconds
        self.pytest_runtest_setup()

    def pytest_runtest_setup(self) -> None:
        """Set the limit for the next test."""
        limit = math.ceil(time.process_time()) + self._cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _run_tests(module: str, mutant: Mutant | None, cpu_seconds: int) -> None:
    """Run the tests of a module in the process of a mutant, and end the process."""
    import hypothesis
    import pytest

    status = FAILED
    try:
        with tempfile.TemporaryFile() as output:
            for fd in (1, 2):
                os.dup2(output.fileno(), fd)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            # Every mutant gets the same examples. They are neither kept nor made small: the failure is enough.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile(
                "mutants", derandomize=True, database=None, deadline=None, phases=phases
            )
            hypothesis.settings.load_profile("mutants")
            if mutant is not None:
                sys.meta_path.insert(0, _Changed(module, tree_of(mutant)))
            tests = [str(ROOT / _CORE / name) for name in TESTS[module]]
            early = "ignore::pytest.PytestAssertRewriteWarning"  # modules of the tests are imported early on purpose
            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", early, f"--rootdir={ROOT}"]
            status = int(pytest.main([*options, *tests], plugins=[_Limit(cpu_seconds)]))
    finally:
        os._exit(PASSED if status == PASSED else FAILED)


def try_out(module: str, mutant: Mutant | None, cpu_seconds: int) -> tuple[int | None, float]:
    """Run the tests of a module with a mutant, or without one. Return the exit status, None without an end, and the CPU time.

    Each test may use `cpu_seconds` seconds of CPU time.
    """
    pid = os.fork()
    if not pid:
        _run_tests(module, mutant, cpu_seconds)
    ended = os.pidfd_open(pid)
    try:
        if not any(select.select([ended], [], [], WAIT_SECONDS)[0] for _ in range(WAITS)):
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(ended)
    _, status, usage = os.wait4(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None, usage.ru_utime + usage.ru_stime


def explained() -> set[str]:
    """Return the mutants that scripts/survivors.txt lists."""
    lines = EXPLAINED.read_text().splitlines()
    return {line.strip() for line in lines if line.startswith("    ") and "  ->  " in line}


def _chosen(options: argparse.Namespace) -> dict[str, list[Mutant]]:
    """Return the mutants to try, by module."""
    source = random.Random(options.seed)
    chosen = {}
    for module in options.module or TESTS:
        every = mutants_of(module)
        if options.only:
            every = [mutant for mutant in every if options.only in mutant.text]
        number = len(every) if options.all or options.only else min(options.number, len(every))
        chosen[module] = sorted(source.sample(every, number), key=lambda mutant: mutant.number)
    return chosen


def main(arguments: Sequence[str]) -> int:
    """Try mutants. Return 1 if one survives that scripts/survivors.txt does not explain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20, help="random mutants of each module (default: 20)")
    parser.add_argument("--all", action="store_true", help="try all mutants, which takes one or two hours")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default: 0)")
    parser.add_argument("--module", action="append", choices=list(TESTS), help="try this module only; may be repeated")
    parser.add_argument("--only", metavar="TEXT", help="try all mutants whose text contains TEXT")
    parser.add_argument("--list", action="store_true", help="list the mutants, and try none")
    options = parser.parse_args(arguments)
    chosen = _chosen(options)
    if options.list:
        for mutants in chosen.values():
            for mutant in mutants:
                print(f"{mutant.line:5} {mutant}")
        return 0
    for name in ("hypothesis.stateful", "pytest", "trio.testing", "zstandard"):
        importlib.import_module(name)  # so that the processes of the mutants need not
    os.chdir(ROOT)
    known = explained()
    began = time.monotonic()
    tried = killed = endless = 0
    survivors: list[Mutant] = []
    for module, mutants in chosen.items():
        passed, seconds = try_out(module, None, 600)
        if passed != PASSED:
            print(f"mutants: the tests of core/{module}.py fail without a mutant: mend them first", file=sys.stderr)
            return 1
        limit = math.ceil(seconds / CPU_SHARE) + CPU_EXTRA_SECONDS
        before = tried, killed
        for mutant in mutants:
            status, _ = try_out(module, mutant, limit)
            tried += 1
            killed += status != PASSED
            endless += status is None
            if status == PASSED:
                survivors.append(mutant)
                if str(mutant) not in known:
                    print(f"  survives: line {mutant.line}: {mutant}", flush=True)
        print(f"  core/{module}.py: {killed - before[1]} of {tried - before[0]} killed", flush=True)
    unexplained = [mutant for mutant in survivors if str(mutant) not in known]
    print(f"  mutants          {tried:,} in {(time.monotonic() - began) / 60:.1f} minutes")
    print(f"  killed           {killed:,}, {endless:,} of them because the tests did not end")
    print(
        f"  survivors        {len(survivors):,}, {len(survivors) - len(unexplained):,} explained in scripts/survivors.txt"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
