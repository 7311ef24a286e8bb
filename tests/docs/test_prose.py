# SPDX-License-Identifier: MIT
"""The prose linter finds each break of its rules, in each kind of file, and ignores code, pictures and quotations."""

from __future__ import annotations

import pytest

from scripts import prose

LONG = "This sentence has " + "one more word and " * 8 + "an end."
"""A sentence of 37 words: too long for a paragraph, and not for a list."""


def lines(name: str, text: str) -> list[int]:
    """Return the numbers of the lines at which the linter finds something."""
    return [finding.line for finding in prose.findings(name, text)]


def test_long_sentences() -> None:
    """The linter reports a long sentence at its first line, and does not add up short sentences."""
    assert lines("a.md", f"Short one.\n\n{LONG}\n") == [3]
    assert lines("a.md", "A short sentence of seven words follows. " * 20) == []
    assert lines("a.md", f"Short one.\n{LONG.replace(' and', chr(10) + 'and', 3)}\n") == [2]
    assert lines("a.md", f"- {LONG}\n\n| cell | {LONG} |\n") == []
    assert lines("a.md", f"- {LONG[:-1]}, {LONG}\n") == [1]


def test_code_is_no_prose() -> None:
    """The linter ignores blocks of code, code in a sentence, pictures and quotations."""
    text = f'```sh\n{LONG}\n```\n\n    {LONG}\n\nRun `{LONG}` as root. It says "nobody is there".\n'
    assert lines("a.md", text) == []
    assert lines("a.rst", f"Like this::\n\n    {LONG} Whoever.\n\nThen ``{LONG}`` follows.\n") == []


@pytest.mark.parametrize(
    "words",
    [
        "Whoever writes waits.",
        "It is for nobody.",
        "The worker lets go of it.",
        "It tells the size.",
        "It is made anew.",
    ],
)
def test_banned_words(words: str) -> None:
    """The linter finds each banned word in a paragraph, a list, a table and a heading."""
    for text in (words, f"- {words}", f"| a | {words} |", f"# {words}"):
        assert lines("a.md", text) == [1], text


def test_clauses_as_subjects() -> None:
    """The linter finds a sentence that begins with What, unless it is a question."""
    assert lines("a.md", "What was read before the write is compared with it.\n") == [1]
    assert lines("a.md", "What does the program do when the pool is full?\n") == []


def test_small_beginnings() -> None:
    """The linter finds a sentence that begins with a number or a small letter, but not in code or at the start of an item."""
    for text in ("zstd compresses pages.", "It waits. 20 of 20 came back.", "- a page: kept. systemd starts it again."):
        assert lines("a.md", f"{text}\n") == [1], text
    text = "zbudfs is young. `mypyc` gains little.\n\n2026-11-23. It waits.\n\n- a page\n\n| frames | of the pool |\n"
    assert lines("a.md", text) == []
    assert lines("a.py", '"""Return it. zstd is asked."""\n') == []


def test_docstrings_and_comments() -> None:
    """The linter reads docstrings, also below constants, and comments. It ignores code, strings and directives."""
    source = f'''# SPDX-License-Identifier: MIT
"""Of the serving thread.

    {LONG}
"""
name = "whoever"  # noqa: whoever
# A comment that is about nobody
# at all.
LIMIT = 3
"""{LONG}"""
def function():
    """Return the size.

    For each page it is the same: whoever asks.
    """
'''
    assert lines("a.py", source) == [2, 7, 10, 14]


def test_comments_of_c() -> None:
    """The linter reads both kinds of C comments, without the stars at the left, and ignores strings."""
    source = (
        f'/* First line.\n * {LONG}\n */\nchar *name = "/* nobody */"; // Whoever.\n// {LONG[:40]}\n// {LONG[40:]}\n'
    )
    assert lines("a.c", source) == [2, 4, 5]


def test_clean_files_stay_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """The tables name files that exist, and the linter finds nothing in them."""
    assert prose.main(["prose"]) == 0, capsys.readouterr().out


def test_a_wrong_name_is_reported() -> None:
    """A path that does not exist ends the program with a message."""
    with pytest.raises(SystemExit, match="no such folder"):
        prose.main(["prose", "docs/missing"])
