# SPDX-License-Identifier: MIT
"""Check the English of documents, docstrings and comments against a few rules. `make lint` runs it.

    python -m scripts.prose                     # everything that the tables CLEAN_DOCUMENTS and CLEAN_CODE name
    python -m scripts.prose docs/use zbudfs/core/codec.py     # these files and folders, in a table or not

The rules are few, so that each finding is worth a change:

- A sentence has at most 30 words. In a list or a table it has at most 40.
- The words of BANNED do not occur. Each entry names better ones.
- No sentence begins with "What" or "Who", unless it is a question.
- A sentence of a Markdown document begins with a capital letter, code, or the name of this program. The first one of a
  list item or a table cell may begin with anything.
- A docstring begins with the thing or with a verb, not with a word of FRAGMENTS ("Of the serving thread ...").

Blocks of code, `code` in a sentence and text in double quotation marks are not checked. In a docstring, lines that are
indented by four columns or more are a picture or code. Add a package that is clean to CLEAN_CODE, so that it stays clean.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CLEAN_DOCUMENTS: Final = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "docs",
)
"""Documents and folders of documents in which this script finds nothing."""
CLEAN_CODE: Final = ("bench", "kit", "scripts", "tests", "zbudfs")
"""Files and packages in which this script finds nothing."""
GENERATED: Final = ("docs/evidence/vm-report.md",)
"""Documents that a script writes: their language is that script's."""
MAX_WORDS: Final = 30
MAX_WORDS_IN_LIST: Final = 40
BANNED: Final = {
    r"whoever|whomever": "name the process, program or user",
    r"somebody|someone|anybody|anyone": "name the process, program or user",
    r"nobody|no one": "name the process, program or user: `no other process`",
    r"anew": "again, new",
    r"lets? go of|letting go of": "release, free, close",
    r"tells?|told|telling": "print, report, show, say, explain",
    r"of late": "recently",
    r"whosever|therefrom|thereof|wherefore": "a shorter sentence",
    r"is to be had|to be had": "is available",
    r"no matter to|nothing to it": "does not affect",
}
"""Regular expressions of words, and what to write instead."""
FRAGMENTS: Final = frozenset(
    {"Of", "By", "Between", "From", "As", "After", "At", "For", "How", "What", "Where", "Who", "Whose"}
)
_BANNED: Final = [(re.compile(rf"\b(?:{words})\b", re.IGNORECASE), better) for words, better in BANNED.items()]
_HEADLESS: Final = re.compile(r"^(?:What|Who)\b")
_SMALL: Final = re.compile(r"^(?!zbudfs\b)[a-z0-9]")
_CODE: Final = re.compile(r"``.+?``|`[^`]*`")
_QUOTED: Final = re.compile(r'"[^"]*"')
_LINK: Final = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_WORD: Final = re.compile(r"[^\W_][\w.,'/:%+*=-]*")
_END: Final = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\.\.)[.!?][)*_]*\s+(?=\S)")
_LIST_ITEM: Final = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
_DIRECTIVE: Final = re.compile(r"SPDX-License|^\s*(?:noqa|type:|pragma|mypy:|ruff:|fmt:|shellcheck)|^!")


@dataclass
class Piece:
    """A paragraph, list item or table cell; `lines` has the number and the text of each of its lines."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    max_words: int = MAX_WORDS
    docstring: bool = False


@dataclass(frozen=True, order=True)
class Finding:
    """A place where the text breaks a rule."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def paragraphs(lines: list[tuple[int, str]], *, docstring: bool = False) -> Iterator[Piece]:
    """Split numbered lines of text into paragraphs, list items and table cells; skip what is indented as code."""
    piece = Piece(docstring=docstring)
    in_list = False
    for number, line in [*lines, (0, "")]:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        item = _LIST_ITEM.match(line)
        ends = not stripped or item or stripped.startswith("|") or stripped[0] == "#"
        if ends and piece.lines:
            yield piece
            piece = Piece()
        if not stripped:
            continue
        if item:
            in_list = True
            piece = Piece([(number, line[item.end() :])], MAX_WORDS_IN_LIST)
        elif stripped.startswith("|"):
            in_list = False
            yield from (Piece([(number, cell)], MAX_WORDS_IN_LIST) for cell in stripped.strip("|").split(" | "))
        elif stripped[0] == "#":
            in_list = False
            yield Piece([(number, stripped.lstrip("# "))])
        elif piece.lines:
            piece.lines.append((number, stripped))
        elif indent < 4 or (in_list and indent < 6):
            in_list = in_list and indent > 0
            piece = Piece([(number, stripped)], MAX_WORDS_IN_LIST if in_list else MAX_WORDS, docstring and not in_list)
            docstring = False  # the next paragraph does not begin the docstring


def markdown(text: str) -> Iterator[Piece]:
    """The prose of a Markdown document: without blocks of code and without comments."""
    kept: list[tuple[int, str]] = []
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        kept.append((number, "" if fenced or line.startswith("<!--") else line))
    yield from paragraphs(kept)


def restructured(text: str) -> Iterator[Piece]:
    """The prose of a reStructuredText document: without literal blocks, rulers, fields and substitutions."""
    kept: list[tuple[int, str]] = []
    literal_indent: int | None = None
    for number, line in enumerate(text.splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        if literal_indent is not None and line.strip() and indent <= literal_indent:
            literal_indent = None
        skipped = literal_indent is not None or re.match(r"^\s*(?:([=~^-])\1{2,}\s*$|:\w[\w ]*:|\.\. |@)", line)
        kept.append((number, "" if skipped else line.strip()))
        if literal_indent is None and line.rstrip().endswith("::"):
            literal_indent = indent
    yield from paragraphs(kept)


def python(text: str) -> Iterator[Piece]:
    """The docstrings of a module (those below a constant too), and its comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines = node.value.value.splitlines()
            margin = node.col_offset
            numbered = [
                (node.lineno + index, line if index == 0 else line[margin:]) for index, line in enumerate(lines)
            ]
            yield from paragraphs(numbered, docstring=True)
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            own_line = not token.line[: token.start[1]].strip()
            comment = re.sub(r"^#+:? ?", "", token.string)
            if not own_line or (comments and comments[-1][0] != token.start[0] - 1):
                comments.append((0, ""))
            comments.append((token.start[0], "" if _DIRECTIVE.search(comment) else comment.split("  # ")[0]))
            if not own_line:
                comments.append((0, ""))
    yield from paragraphs(comments)


def c(text: str) -> Iterator[Piece]:
    """The comments of a C source."""
    kept: list[tuple[int, str]] = []
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"'
    for match in re.finditer(pattern, text, re.DOTALL):
        if match[0].startswith('"'):
            continue
        first = text.count("\n", 0, match.start()) + 1
        if not match[0].startswith("//") or not kept or kept[-1][0] != first - 1:
            kept.append((0, ""))
        inside = match[0][2:-2] if match[0].startswith("/*") else match[0][2:]
        for index, line in enumerate(inside.splitlines()):
            shown = re.sub(r"^\s*\* ?| ", "", line, count=1) if index else line.strip(" *")
            kept.append((first + index, "" if _DIRECTIVE.search(shown) else shown))
    yield from paragraphs(kept)


READERS: Final = {".md": markdown, ".rst": restructured, ".py": python, ".c": c, ".h": c}


def sentences(piece: Piece) -> Iterator[tuple[int, str]]:
    """Yield each sentence of a paragraph with the number of its first line; code and quotations are shortened."""
    text = ""
    starts: list[tuple[int, int]] = []
    for number, line in piece.lines:
        starts.append((len(text), number))
        text += line + " "

    def blank(match: re.Match[str]) -> str:
        """A word as long as the match, so that places in the text stay as they are."""
        return "X" * len(match[0])

    text = _QUOTED.sub(blank, _CODE.sub(blank, text))
    text = _LINK.sub(lambda match: match[1].ljust(len(match[0])), text)
    begin = 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        sentence = text[begin:end]
        place = begin + len(sentence) - len(sentence.lstrip())
        if sentence.strip():
            yield max(number for start, number in starts if start <= place), sentence.strip()
        begin = end


def findings(path: str, text: str) -> list[Finding]:
    """Return the places where a text breaks a rule; the reader is chosen by the suffix of the path."""
    found = []
    for piece in READERS[Path(path).suffix](text):
        first = True
        for line, sentence in sentences(piece):
            words = len(_WORD.findall(sentence))
            if words > piece.max_words:
                found.append(
                    Finding(path, line, f"a sentence of {words} words (limit {piece.max_words}): {sentence[:60]}...")
                )
            for pattern, better in _BANNED:
                found += [Finding(path, line, f'"{match[0]}": write {better}') for match in pattern.finditer(sentence)]
            if (
                _HEADLESS.match(sentence.lstrip("*_("))
                and not sentence.rstrip("*_) ").endswith(("?", ":"))
                and words > 6
            ):
                found.append(Finding(path, line, f"a clause as the subject, name the subject: {sentence[:60]}..."))
            exempt = words <= 2 or (first and piece.max_words != MAX_WORDS)
            if path.endswith(".md") and not exempt and _SMALL.match(sentence.lstrip("*_(")):
                found.append(Finding(path, line, f"begin with a capital letter: {sentence[:60]}..."))
            if first and piece.docstring and sentence.split()[0] in FRAGMENTS:
                found.append(
                    Finding(path, line, f'a docstring that begins with "{sentence.split()[0]}": {sentence[:60]}')
                )
            first = False
    return sorted(set(found))


def files(named: tuple[str, ...] | list[str]) -> list[Path]:
    """Return the files that paths and folders stand for, below ROOT or absolute."""
    found: list[Path] = []
    for name in named:
        path = ROOT / name
        if path.is_dir():
            found += [below for below in sorted(path.rglob("*")) if below.suffix in READERS and below.is_file()]
        elif path.suffix in READERS and path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"prose: {name}: no such folder, or not one of {' '.join(READERS)}")
    return [path for path in found if not str(path).endswith(GENERATED)]


def main(argv: list[str]) -> int:
    """Print what breaks a rule; return 1 if something does."""
    chosen = files(argv[1:] or [*CLEAN_DOCUMENTS, *CLEAN_CODE])
    found = []
    for path in chosen:
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        found += findings(name, path.read_text())
    for finding in found:
        print(finding)
    if found:
        print(f"prose: {len(found)} findings. The rules are at the head of scripts/prose.py.", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
