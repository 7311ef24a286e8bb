# SPDX-License-Identifier: MIT
"""Every command that a document shows is one that there is: its options are understood, its files and targets exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import ROOT
from zbudfs.cli.options import build_parser

DOCUMENTS: Final = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCE: Final = re.compile(r"^```.*$")
COMMAND: Final = re.compile(r"^(?:sudo |[#$] )?(?:\S*/)?(zbudfs .*)$")
INLINE: Final = re.compile(r"`((?:zbudfs|make) [^`]+)`")
ABBREVIATED: Final = re.compile(r"\.\.\.|…|\[|\{|<")
"""A command with one of these is a pattern and not a command."""
SHELL: Final = re.compile(r"\s+#.*$|\s*[|>;&].*$")
PLACEHOLDERS: Final = {"PID": "1", "COMMAND": "status", "N": "1"}
"""What stands in a document for something that the parser looks at."""
LINK: Final = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def shown_lines(text: str) -> Iterator[str]:
    """The lines of a document's blocks of code, and what stands in code in its sentences."""
    fenced = False
    for line in text.splitlines():
        if FENCE.match(line.strip()):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()
        else:
            yield from INLINE.findall(line)


def commands(text: str) -> list[str]:
    """Every whole command `zbudfs ...` that the text shows, without what a shell would do with it."""
    found = []
    for line in shown_lines(text):
        match = COMMAND.match(line)
        if match:
            command = SHELL.sub("", match[1])
            if not ABBREVIATED.search(command) and "$(" not in command and not command.startswith("zbudfs /"):  # fstab
                found.append(command)
    return found


def not_understood(command: str) -> str | None:
    """Why the command line is not understood; None if it is. One that lacks an argument is taken for a name of it."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            build_parser().parse_args(words)
    except SystemExit as end:
        return None if end.code == 0 or re.search(r"is required|are required", said.getvalue()) else said.getvalue()
    except Exception as error:
        return str(error)
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document: Path) -> None:
    """Each is parsed by the program's own parser."""
    wrong = {command: why for command in commands(document.read_text()) if (why := not_understood(command))}
    assert wrong == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_targets_exist(document: Path) -> None:
    """Each `make TARGET` has a target in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    named = {
        words[1]
        for line in shown_lines(document.read_text())
        if (words := line.split())[:1] == ["make"] and len(words) > 1 and "=" not in words[1]
    }
    assert [name for name in named if not re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Each file that a document refers to is there."""
    text = document.read_text()
    missing = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    missing += [path for path in re.findall(r"\btests/[\w/]+\.py\b", text) if not (ROOT / path).exists()]
    assert missing == []


def test_a_wrong_command_is_found() -> None:
    """Options and commands that do not exist, in blocks and in sentences; shell and comments are no part of a command."""
    text = "Use `zbudfs mount --sise 4G /mnt` or\n\n    zbudfs nonsense   # no\n    zbudfs status --json /mnt | jq .\n"
    found = commands(text)
    assert found == ["zbudfs mount --sise 4G /mnt", "zbudfs nonsense", "zbudfs status --json /mnt"]
    assert [bool(not_understood(command)) for command in found] == [True, True, False]
