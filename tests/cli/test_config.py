# SPDX-License-Identifier: MIT
"""The configuration: golden trees, and what must hold for every file.

A golden tree is a folder with `etc/zbudfs/` and `proc/meminfo`, and in `expected` what the command prints there. To
make the transcripts anew after a wanted change: ZBUDFS_GOLDEN=write pytest tests/cli/test_config.py; then read the diff.
"""

import argparse
import contextlib
import json
import os
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import ROOT
from zbudfs.cli import config
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.expression import parse_amount
from zbudfs.cli.keys import KEYS
from zbudfs.cli.main import main
from zbudfs.cli.options import build_parser

TREES = sorted((ROOT / "tests/cli/golden").iterdir())
RAM = 8 << 30


def transcript(root: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Return what `zbudfs config` and `zbudfs config --check` print for a tree, and their exit statuses."""
    text = ""
    for options in ([], ["--check"]):
        status = main(["config", *options, "--root", str(root)])
        out, err = capfd.readouterr()
        text += f"$ {' '.join(['zbudfs config', *options])}\n{out}{err}exit status {status}\n"
    return text


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
def test_a_golden_tree(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exactly these words, for exactly these files."""
    text = transcript(tree, capfd)
    expected = tree / "expected"
    if os.environ.get("ZBUDFS_GOLDEN") == "write":
        expected.write_text(text)
    assert text == expected.read_text()


def make_root(folder: Path, files: dict[str, str], ram: int = RAM) -> str:
    """Make a tree with files under etc/zbudfs and that much RAM; return its path."""
    (folder / "proc").mkdir(parents=True, exist_ok=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: {ram // 1024} kB\n")
    for name, text in files.items():
        path = folder / "etc/zbudfs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def test_what_is_printed_is_a_configuration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Read again, on a machine of another size, it comes to the same settings."""
    written = (
        'size = "ram / 2"\npool = "10%"\npriority = 7\nbacking = "/x/a \\"b\\" \\u007f \\\\ ä"\nmountpoint = "/mnt/é"\n'
    )
    root = make_root(tmp_path / "one", {"swap.toml": written})
    assert main(["config", "--root", root, "swap"]) == 0
    page = capfd.readouterr().out
    again = make_root(tmp_path / "two", {"swap.toml": page}, ram=64 << 30)
    first, second = config.load("swap", root), config.load("swap", again)
    assert first.settings == second.settings
    assert first.settings.backing == '/x/a "b" \x7f \\ ä'
    assert (first.arguments.priority, second.arguments.priority) == (7, 7)
    assert set(second.found) == {key.name for key in KEYS}


def test_json_says_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One object for a name, a list without one; a default has no source."""
    root = make_root(tmp_path, {"a.toml": 'size = "ram / 4"', "b.toml": "nonsense = 1"})
    assert main(["config", "--json", "--root", root, "a"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert found["values"]["size"] == {"value": RAM // 4, "source": "/etc/zbudfs/a.toml", "written": "ram / 4"}
    assert found["values"]["level"] == {"value": -1, "source": None, "written": None}
    assert main(["config", "--json", "--root", root]) == 0
    out, err = capfd.readouterr()
    assert [each["name"] for each in json.loads(out)] == ["a", "b"]
    assert "nonsense" in json.loads(out)[1]["warnings"][0]
    assert "nonsense" in err


def test_the_same_as_the_command(tmp_path: Path) -> None:
    """A file and the options of the same names come to the same daemon."""
    from zbudfs.cli.commands import make_settings

    root = make_root(
        tmp_path, {"x.toml": 'mountpoint = "/mnt/x"\nsize = "3G"\npool = "30%"\nbacking = "none"\nlevel = 5'}
    )
    typed = ["mount", "--size", "3G", "--pool", "30%", "--backing", "none", "--level", "5", "/mnt/x"]
    arguments = build_parser().parse_args(typed, Arguments())
    assert config.load("x", root).settings == make_settings(arguments, "/mnt/x", root)


def test_every_option_of_a_mount_is_a_key() -> None:
    """What can be typed can be configured, under the same name."""
    parser = build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    options = {action.dest for action in commands.choices["swapon"]._actions} - {"help", "config"}
    assert options | {"swap"} == {key.field for key in KEYS}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "../etc", "x" * 65, "a\n", "ä", ".a"])
def test_what_cannot_be_a_name(name: str, tmp_path: Path) -> None:
    """A name is never a way out of the folder."""
    with pytest.raises(config.ConfigError, match="is not a name"):
        config.load(name, make_root(tmp_path, {"x.toml": ""}))


def test_a_name_that_is_not_configured(tmp_path: Path) -> None:
    """It is said which file would be read, and what there is."""
    with pytest.raises(config.ConfigError) as caught:
        config.load("y", make_root(tmp_path, {"x.toml": ""}))
    assert caught.value.problems == (
        "/etc/zbudfs/y.toml does not exist (an empty file means all defaults); there is x",
    )


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    """Where the parser gives up, that is one sentence and not a traceback."""
    with pytest.raises(config.ConfigError, match=r"^/etc/zbudfs/x\.toml: it is not "):
        config.load("x", make_root(tmp_path, {"x.toml": "size = " + "[" * 100_000}))


def test_the_mountpoint_is_made(tmp_path: Path) -> None:
    """With the folders above it; one that is there is left alone."""
    mountpoint = tmp_path / "some/where"
    found = config.load("x", make_root(tmp_path / "root", {"x.toml": f'mountpoint = "{mountpoint}"'}))
    config.make_mountpoint(found)
    (mountpoint / "file").touch()
    config.make_mountpoint(found)
    assert (mountpoint / "file").exists()


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("ram", RAM),
        ("RAM/2", RAM // 2),
        ("min(ram / 2, 2G)", 2 << 30),
        ("min(2G)", 2 << 30),
        ("max( 1M,2M , 3M )", 3 << 20),
        ("ram - 1G - 1G", RAM - (2 << 30)),
        ("ram / 2 / 2", RAM // 4),
        ("2 + 2 * 1M", 2 << 20),
        ("(2 + 2) * 1M", 4 << 20),
        ("-1 * -4M", 4 << 20),
        ("0.1 * ram", RAM // 10 // 4096 * 4096),
        ("ram / 3 * 3", RAM),
        ("1.5g", 3 << 29),
        ("50%", RAM // 2),
        ("5000000", 5000000),
    ],
)
def test_an_expression(text: str, size_bytes: int) -> None:
    """Precedence, order and case as everybody expects, and exact."""
    assert parse_amount(text, RAM) == size_bytes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ends too early"),
        ("ram /", "ends too early"),
        ("ram ram", "'ram' is not expected there"),
        ("ram)", r"'\)' is not expected there"),
        ("(ram", r"'\)' is missing at the end"),
        ("min(ram 2)", r"'\)' is missing before '2'"),
        ("min ram", r"'\(' is missing before 'ram'"),
        ("swap / 2", "'swap' is unknown there: known are ram"),
        ("4GB", "makes no sense"),
        ("ram ** 2", r"'\*' is unknown there"),
        ("__import__('os')", "makes no sense"),
        ("ram / 0", "divides by zero"),
        ("ram / (1G - 1024M)", "divides by zero"),
        ("1G - ram", "less than nothing"),
        ("ram * ram * ram", "more than any machine has"),
        ("ram / 100000", "write 4096M or 4G rather than 4096"),
        ("min(ram / 2, 4096)", "comes to 4096 bytes"),
        ("(" * 20 + "ram" + ")" * 20, "more than 16 levels deep"),
        ("-" * 100 + "1G", "levels deep"),
        ("1+" * 100 + "1", "too long"),
    ],
)
def test_what_is_no_expression(text: str, reason: str) -> None:
    """It is said what is wrong."""
    with pytest.raises(ValueError, match=reason):
        parse_amount(text, RAM)


@given(st.text(alphabet="ram()+-*/,min x0123456789.GMK%", max_size=140) | st.text())
def test_no_text_gives_another_error(text: str) -> None:
    """Whatever is written, the answer is a size or a ValueError."""
    with contextlib.suppress(ValueError):
        assert parse_amount(text, RAM) >= 0


trees_of_sums = st.recursive(
    st.integers(0, 999).map(str) | st.just("ram"),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({' '.join(parts)})"),
    max_leaves=6,
)


@given(trees_of_sums)
def test_arithmetic_is_that_of_fractions(text: str) -> None:
    """Against Python's own reading of the same text, with exact numbers."""
    import re

    model = re.sub(r"\d+", r"F(\g<0>)", text)
    try:
        exact = eval(model, {"F": Fraction, "ram": Fraction(RAM)})
    except ZeroDivisionError:
        exact = None
    if exact is None or exact < 1 << 20 or exact > 1 << 60:
        with pytest.raises(ValueError, match=r"by zero|less than|more than"):
            parse_amount(f"{text} + 0", RAM)
    else:
        assert parse_amount(f"{text} + 0", RAM) == int(exact) // 4096 * 4096


def problems_of(root: str) -> tuple[str, ...]:
    """Return what is wrong with the configuration x; nothing if it can be used."""
    try:
        found = config.load("x", root)
    except config.ConfigError as error:
        return error.problems
    assert found.settings.size_bytes % 4096 == 0
    return ()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | st.just("none"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from([key.name for key in KEYS]) | st.text(max_size=8), values, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_values_give_another_error(tmp_path_factory: pytest.TempPathFactory, table: dict[str, object]) -> None:
    """Whatever values a file has, the answer is settings or a ConfigError."""
    lines = []
    for key, value in table.items():
        try:
            line = f"{json.dumps(key)} = {json.dumps(value)}"
            tomllib.loads(line)
        except ValueError:
            continue
        lines.append(line)
    root = make_root(tmp_path_factory.getbasetemp() / "any", {"x.toml": "\n".join(lines)})
    problems = problems_of(root)
    assert all(problem.startswith("/etc/zbudfs/x.toml: ") for problem in problems)


@given(st.binary(max_size=64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_bytes_give_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Nor does anything else that a file may hold."""
    root = make_root(tmp_path_factory.getbasetemp() / "bytes", {"x.toml": ""})
    Path(root, "etc/zbudfs/x.toml").write_bytes(content)
    try:
        tomllib.loads(content.decode())
    except ValueError:
        assert "it is not TOML" in problems_of(root)[0]
