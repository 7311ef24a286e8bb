# SPDX-License-Identifier: MIT
"""Each command in a document is valid: the parser knows its options, and its files and targets exist."""

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
from zbudfs.cli.parser import build_parser

DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE: Final = re.compile(r"^```.*$")
COMMAND: Final = re.compile(r"^(?:sudo |[#$] )?(?:\S*/(?<!/system-sleep/))?(zbudfs .*)$")
"""A command, with any folder but that of the sleep hook, whose name is zbudfs too."""
INLINE: Final = re.compile(r"`((?:zbudfs|make) [^`]+)`")
ABBREVIATED: Final = re.compile(r"\.\.\.|…|\[|\{|<")
"""A command with one of these is a pattern and not a command."""
SHELL: Final = re.compile(r"\s+#.*$|\s*[|>;&].*$")
PLACEHOLDERS: Final = {"PID": "1", "COMMAND": "status", "N": "1"}
"""Values for the placeholders of the documents that the parser checks."""
LINK: Final = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def shown_lines(text: str) -> Iterator[str]:
    """Yield the lines of a document's code blocks, and the code in its sentences."""
    fenced = False
    for line in text.splitlines():
        if FENCE.match(line.strip()):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()
        else:
            yield from INLINE.findall(line)


def commands(text: str) -> list[str]:
    """Return each whole command `zbudfs ...` in the text, without pipes, redirections and comments."""
    found = []
    for line in shown_lines(text):
        match = COMMAND.match(line)
        if match:
            command = SHELL.sub("", match[1])
            if not ABBREVIATED.search(command) and "$(" not in command and not command.startswith("zbudfs /"):  # fstab
                found.append(command)
    return found


def not_understood(command: str) -> str | None:
    """Return the error of the parser, or None if it accepts the command. A missing argument is accepted as a name."""
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
    """The parser of the program accepts each command."""
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
    """Each file that a document links to exists."""
    text = document.read_text()
    missing = [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    missing += [path for path in re.findall(r"\btests/[\w/]+\.py\b", text) if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_places_are_those_of_each_installation(document: Path) -> None:
    """A document names no place that the package has elsewhere, except beside `make install`."""
    lines = document.read_text().splitlines()
    assert [line for line in lines if "/usr/local/" in line and "make install" not in line] == []


def test_a_wrong_command_is_found() -> None:
    """The checks find wrong options and commands, in blocks and in sentences, and ignore shell syntax and comments."""
    text = "Use `zbudfs mount --sise 4G /mnt` or\n\n    zbudfs nonsense   # no\n    zbudfs status --json /mnt | jq .\n"
    text += "    /usr/lib/systemd/system-sleep/zbudfs post\n"
    found = commands(text)
    assert found == ["zbudfs mount --sise 4G /mnt", "zbudfs nonsense", "zbudfs status --json /mnt"]
    assert [bool(not_understood(command)) for command in found] == [True, True, False]
