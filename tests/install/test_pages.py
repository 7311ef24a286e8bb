# SPDX-License-Identifier: MIT
"""Manual pages, completion and the example are what they should be, and say what the program says."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from scripts.pages import pages, subcommands
from tests.cli.test_config import make_root
from tests.support import LIMIT_SECONDS, ROOT
from zbudfs.cli import config
from zbudfs.cli.config_page import effective
from zbudfs.cli.keys import KEYS
from zbudfs.cli.options import build_parser

MANUAL = (ROOT / "docs/man/zbudfs.toml.5.rst").read_text()
EXAMPLE = (ROOT / "docs/zbudfs.toml.example").read_text()


def test_what_is_generated_is_current() -> None:
    """After a change of options or of a page's source: make pages."""
    made = pages()
    assert len(made) == 5
    stale = [name for name, text in made.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
    assert stale == []


def test_every_key_is_documented() -> None:
    """With what a value looks like and with its default, in these very words, and in the same order."""
    found = re.findall(r"^\*\*([\w-]+)\*\*\n    (.*)$", MANUAL, re.MULTILINE)
    assert found == [(key.name, f"{key.kind}; default: {key.default}") for key in KEYS]


def test_the_example_of_the_manual_works(tmp_path: Path) -> None:
    """It is a configuration."""
    text = MANUAL.partition("\nEXAMPLE\n")[2].partition("::\n")[2].partition("\nSEE ALSO")[0]
    lines = "\n".join(line.strip() for line in text.splitlines())
    assert len(tomllib.loads(lines)) == 4
    assert set(config.load("swap", make_root(tmp_path, {"swap.toml": lines})).found) == set(tomllib.loads(lines))


def test_the_example_file_shows_the_defaults(tmp_path: Path) -> None:
    """As it is it says nothing; with its comment signs taken away every key is there and, but for one, as by default."""
    assert tomllib.loads(EXAMPLE) == {}
    said = re.sub(r"^# ([\w-]+ = )", r"\1", EXAMPLE, flags=re.MULTILINE)
    assert set(tomllib.loads(said)) == {key.name for key in KEYS}
    without = config.load("swap", make_root(tmp_path / "without", {"swap.toml": EXAMPLE}))
    with_all = config.load("swap", make_root(tmp_path / "all", {"swap.toml": said}))
    assert without.settings == with_all.settings
    assert {**effective(without), "priority": 50} == effective(with_all)


def test_manual_pages_have_no_mistakes() -> None:
    """As far as man itself can tell."""
    if shutil.which("groff") is None:
        pytest.skip("no groff")
    for page in ("zbudfs.8", "zbudfs.toml.5"):
        run = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z", ROOT / "docs/man" / page],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(("line", "wanted"), [("zbudfs sw", {"swapon", "swapoff"}), ("zbudfs mount --le", {"--level"})])
def test_completion_in_bash(line: str, wanted: set[str]) -> None:
    """Commands and options, as a real bash gives them."""
    words = line.split()
    script = (
        f"source {ROOT}/completion/zbudfs.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}';"
        f" COMP_POINT={len(line)}; _shtab_zbudfs; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert run.stderr == ""
    assert {word.strip() for word in run.stdout.split()} == wanted


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_can_be_read(shell: str) -> None:
    """By the shell that it is for, where that is installed; every command is in it."""
    path = ROOT / f"completion/zbudfs.{shell}"
    words = {word for name in subcommands(build_parser()) for word in name.split()}
    assert [word for word in sorted(words) if word not in path.read_text()] == []
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    run = subprocess.run([shell, "-n", path], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_completion_in_fish() -> None:
    """As a real fish gives it."""
    if shutil.which("fish") is None:
        pytest.skip("no fish")
    script = f'source {ROOT}/completion/zbudfs.fish; complete -C "zbudfs sw"'
    run = subprocess.run(["fish", "-c", script], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert {line.split("\t")[0] for line in run.stdout.splitlines()} == {"swapon", "swapoff"}
