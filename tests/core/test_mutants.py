# SPDX-License-Identifier: MIT
"""The short form of `make mutants`: some mutants must be noticed, and one cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scripts.mutants import EXPLAINED, TESTS, explained, mutants_of
from tests.support import LIMIT_SECONDS, ROOT


def run(*arguments: str) -> tuple[int, str]:
    """Run the script, and return its exit status and its output."""
    command = [sys.executable, "-m", "scripts.mutants", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_mutants_of_lists_are_killed() -> None:
    """The tests of the lists kill the mutants of `append`, such as a missing link back."""
    status, said = run("--module", "lists", "--only", "IndexLists.append")
    assert status == 0, said
    assert "core/lists.py: 5 of 5 killed" in said


def test_an_equivalent_mutant_survives() -> None:
    """A mutant that no test can notice survives, so a killed one was killed by a failing test."""
    status, said = run("--module", "page_table", "--only", "(_WORD_ZPAGES + 2)")
    assert status == 0, said
    assert "killed           0" in said
    assert "survivors        1, 1 explained" in said


def test_mutants_differ_from_their_source() -> None:
    """Each module has mutants, each describes its change, and no two are the same place twice."""
    for module in TESTS:
        mutants = mutants_of(module)
        assert len(mutants) > 20
        assert [mutant.number for mutant in mutants] == list(range(len(mutants)))
        for mutant in mutants:
            before, _, after = mutant.text.partition(": ")[2].partition("  ->  ")
            assert before != after, str(mutant)


def test_the_explained_ones_exist() -> None:
    """Each mutant of scripts/survivors.txt still exists in the source."""
    known = explained()
    assert known, f"{EXPLAINED} explains none"
    assert known <= {str(mutant) for module in TESTS for mutant in mutants_of(module)}


@pytest.mark.parametrize("module", TESTS)
def test_the_tests_of_a_module_are_there(module: str) -> None:
    """Each test file of the table exists."""
    assert TESTS[module]
    assert all((ROOT / "tests/core" / name).is_file() for name in TESTS[module])
