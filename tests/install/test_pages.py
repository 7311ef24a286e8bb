# SPDX-License-Identifier: MIT
"""The manual pages, the completion and the example are valid, and agree with the program."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.pages import example, keys, pages, subcommands
from tests.cli.test_config import make_root
from tests.support import LIMIT_SECONDS, ROOT
from zbudfs.cli import config
from zbudfs.cli.config_page import effective
from zbudfs.cli.option_table import OPTIONS
from zbudfs.cli.parser import build_parser

MANUAL = (ROOT / "docs/man/zbudfs.toml.5.rst").read_text().replace("@KEYS@", keys())
EXAMPLE = example()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the generated files."""
    folder = tmp_path_factory.mktemp("pages")
    subprocess.run([sys.executable, ROOT / "scripts/pages.py", folder], check=True, timeout=LIMIT_SECONDS)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(pages())
    return folder


def test_generated_files_are_not_committed() -> None:
    """git has no copy of them, since a copy would become outdated."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    run = subprocess.run(["git", "ls-files", *pages()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == ""


def test_every_key_is_documented() -> None:
    """The manual has each key, with the form of its value and its default, in the words and order of the program."""
    found = re.findall(r"^\*\*([\w-]+)\*\*\n    (.*)$", MANUAL, re.MULTILINE)
    assert found == [(option.name, f"{option.kind}; default: {option.default}") for option in OPTIONS]


def test_forms_of_commands(made: Path) -> None:
    """The manual shows each command in the form of its help."""
    text = (made / "docs/man/zbudfs.8").read_text().replace("\\-", "-").replace("\\&", "")
    assert ".SS zbudfs set [--json] [KEY=VALUE ...] MOUNTPOINT\n" in text
    assert ".SS zbudfs hibernate prepare|finish\n" in text


def test_the_example_of_the_manual_works(tmp_path: Path) -> None:
    """The example of the manual is a valid configuration."""
    text = MANUAL.partition("\nEXAMPLE\n")[2].partition("::\n")[2].partition("\nSEE ALSO")[0]
    lines = "\n".join(line.strip() for line in text.splitlines())
    assert len(tomllib.loads(lines)) == 4
    assert set(config.load("swap", make_root(tmp_path, {"swap.toml": lines})).found) == set(tomllib.loads(lines))


def test_the_example_file_shows_the_defaults(tmp_path: Path) -> None:
    """The example file sets nothing. Without its comment signs it sets each key, except for one, to its default."""
    assert tomllib.loads(EXAMPLE) == {}
    said = re.sub(r"^# ([\w-]+ = )", r"\1", EXAMPLE, flags=re.MULTILINE)
    assert set(tomllib.loads(said)) == {option.name for option in OPTIONS}
    without = config.load("swap", make_root(tmp_path / "without", {"swap.toml": EXAMPLE}))
    with_all = config.load("swap", make_root(tmp_path / "all", {"swap.toml": said}))
    assert without.plan.settings == with_all.plan.settings
    assert {**effective(without.plan), "priority": 50} == effective(with_all.plan)


def test_manual_pages_have_no_mistakes(made: Path) -> None:
    """man itself finds no mistake in the pages."""
    if shutil.which("groff") is None:
        pytest.skip("no groff")
    for page in ("zbudfs.8", "zbudfs.toml.5"):
        run = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z", made / "docs/man" / page],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(("line", "wanted"), [("zbudfs sw", {"swapon", "swapoff"}), ("zbudfs mount --le", {"--level"})])
def test_completion_in_bash(line: str, wanted: set[str], made: Path) -> None:
    """A real bash completes commands and options."""
    words = line.split()
    script = (
        f"source {made}/completion/zbudfs.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}';"
        f" COMP_POINT={len(line)}; _shtab_zbudfs; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert run.stderr == ""
    assert {word.strip() for word in run.stdout.split()} == wanted


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_can_be_read(shell: str, made: Path) -> None:
    """Each installed shell can read its completion, which has every command."""
    path = made / f"completion/zbudfs.{shell}"
    words = {word for name in subcommands(build_parser()) for word in name.split()}
    assert [word for word in sorted(words) if word not in path.read_text()] == []
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    run = subprocess.run([shell, "-n", path], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_completion_in_fish(made: Path) -> None:
    """A real fish completes commands and options."""
    if shutil.which("fish") is None:
        pytest.skip("no fish")
    script = f'source {made}/completion/zbudfs.fish; complete -C "zbudfs sw"'
    run = subprocess.run(["fish", "-c", script], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert {line.split("\t")[0] for line in run.stdout.splitlines()} == {"swapon", "swapoff"}
