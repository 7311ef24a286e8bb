# SPDX-License-Identifier: MIT
"""Would the tests notice? Single changes to the allocator and the page table, each tried against the tests of its module.

A mutant is the module with one thing changed: `<` is `<=`, `+` is `-`, a number is one more, a condition is its contrary,
a statement is gone. It is killed when a test fails or the tests do not end; one that survives shows a test that is missing,
or code that says the same in two ways. Survivors that are understood stand in docs/mutants.md, as this script prints them;
any other is a failure.

Nothing is written: each mutant lives in a process of its own, forked from one that has imported what tests import, in which
the module is compiled from the changed tree. Not changed are assertions and what is there for them (`check`), texts and
annotations: no behaviour is in them.
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
EXPLAINED: Final = ROOT / "docs/mutants.md"
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
"""By module of zbudfs/core: the files in tests/core that are about it, the quickest first."""

CPU_SHARE: Final = 2
CPU_EXTRA_SECONDS: Final = 2
"""Each test has so much of the processor time that all take without a mutant (half of it), and so much more: two or three
times what the dearest one needs, and a mutant that never ends is seen within seconds."""
WAIT_SECONDS: Final = 10
WAITS: Final = 60
"""Longest wait for a mutant, which may sleep, or be one of many on a busy machine. In parts, of which each can pass while
all of this is stopped."""
MEMORY_BYTES: Final = 4 << 30
"""Address space of a mutant, which may well fill a list for ever."""

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
    """One change that can be made to a tree."""

    scope: str
    """Class and function."""
    statement: ast.stmt
    owner: ast.AST
    field: str
    index: int | None
    """Which of a list of children; None if the field is one child."""
    new: ast.AST

    def swap(self) -> None:
        """Make the change; once more, and it is undone."""
        children = getattr(self.owner, self.field)
        if self.index is None:
            setattr(self.owner, self.field, self.new)
            self.new = children
        else:
            children[self.index], self.new = self.new, children[self.index]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change, in words: the same as long as nobody edits the statement."""

    module: str
    number: int
    """Which of the module's."""
    line: int
    text: str

    def __str__(self) -> str:
        """As it stands in docs/mutants.md."""
        return f"{self.module} {self.text}"


def _alternatives(node: ast.AST) -> Iterator[ast.AST]:
    """What a node could be instead."""
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
    """Whether it is a statement without which the rest still makes sense."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def _sites(node: ast.AST, scope: str = "", statement: ast.stmt | None = None) -> Iterator[Site]:
    """All changes below a node."""
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
    """A statement in one line; of a compound one its head."""
    if isinstance(statement, ast.Pass):
        return "(gone)"
    text = ast.unparse(statement)
    if isinstance(statement, ast.If | ast.While | ast.For | ast.With | ast.FunctionDef | ast.ClassDef):
        return text.split(":\n", 1)[0]
    return " ".join(text.split())


def path_of(module: str) -> Path:
    """The source of a module of core/."""
    return ROOT / "zbudfs/core" / f"{module}.py"


def mutants_of(module: str) -> list[Mutant]:
    """All of a module."""
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
    """The module, changed."""
    tree = ast.parse(path_of(mutant.module).read_text())
    next(site for number, site in enumerate(_sites(tree)) if number == mutant.number).swap()
    return ast.fix_missing_locations(tree)


class _Changed(importlib.machinery.SourceFileLoader):
    """Has one module be compiled from a tree instead of its file."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        super().__init__(f"zbudfs.core.{module}", str(path_of(module)))
        self._tree = tree

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """It, if it is asked for."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        """Of the tree."""
        code: CodeType = compile(self._tree, self.path, "exec")
        return code


class _Limit:
    """For pytest: each test is ended, and its process with it, when it has used so many seconds of the processor."""

    def __init__(self, cpu_seconds: int) -> None:
        self._cpu_seconds = cpu_seconds
        self.pytest_runtest_setup()

    def pytest_runtest_setup(self) -> None:
        """Begin to count."""
        limit = math.ceil(time.process_time()) + self._cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _run_tests(module: str, mutant: Mutant | None, cpu_seconds: int) -> None:
    """Be the process of a mutant."""
    import hypothesis
    import pytest

    status = FAILED
    try:
        with tempfile.TemporaryFile() as output:
            for fd in (1, 2):
                os.dup2(output.fileno(), fd)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            # The same examples for each, none kept, and none made small: that it fails is enough.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile(
                "mutants", derandomize=True, database=None, deadline=None, phases=phases
            )
            hypothesis.settings.load_profile("mutants")
            if mutant is not None:
                sys.meta_path.insert(0, _Changed(module, tree_of(mutant)))
            tests = [str(ROOT / _CORE / name) for name in TESTS[module]]
            early = "ignore::pytest.PytestAssertRewriteWarning"  # what tests import is there already, on purpose
            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", early, f"--rootdir={ROOT}"]
            status = int(pytest.main([*options, *tests], plugins=[_Limit(cpu_seconds)]))
    finally:
        os._exit(PASSED if status == PASSED else FAILED)


def try_out(module: str, mutant: Mutant | None, cpu_seconds: int) -> tuple[int | None, float]:
    """Whether the tests pass (0) with the mutant, or without one; None if they did not end. And their processor time.

    `cpu_seconds` of it are for each test.
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
    """The mutants that docs/mutants.md names."""
    lines = EXPLAINED.read_text().splitlines()
    return {line.strip() for line in lines if line.startswith("    ") and "  ->  " in line}


def _chosen(options: argparse.Namespace) -> dict[str, list[Mutant]]:
    """The mutants to be tried, by module."""
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
    """Try mutants; 1 if one survived that docs/mutants.md does not explain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20, help="of each module, chosen at random (default: 20)")
    parser.add_argument("--all", action="store_true", help="all there are: an hour or two")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    parser.add_argument("--module", action="append", choices=list(TESTS), help="this one alone; may be repeated")
    parser.add_argument("--only", metavar="TEXT", help="all whose text has this in it")
    parser.add_argument("--list", action="store_true", help="say which, and try none")
    options = parser.parse_args(arguments)
    chosen = _chosen(options)
    if options.list:
        for mutants in chosen.values():
            for mutant in mutants:
                print(f"{mutant.line:5} {mutant}")
        return 0
    for name in ("hypothesis.stateful", "pytest", "pytest_trio", "trio.testing", "zstandard"):
        importlib.import_module(name)  # so that no mutant has to
    os.chdir(ROOT)
    known = explained()
    began = time.monotonic()
    tried = killed = endless = 0
    survivors: list[Mutant] = []
    for module, mutants in chosen.items():
        passed, seconds = try_out(module, None, 600)
        if passed != PASSED:
            print(f"mutants: the tests of core/{module}.py fail without any", file=sys.stderr)
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
    print(f"  survivors        {len(survivors):,}, {len(survivors) - len(unexplained):,} explained in docs/mutants.md")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
