# SPDX-License-Identifier: MIT
"""The configuration: golden trees, and rules that hold for every file.

A golden tree is a folder with `etc/zbudfs/` and `proc/meminfo`, and with the output of the command in `expected`. To
write the outputs again after an intended change: ZBUDFS_GOLDEN=write pytest tests/cli/test_config.py; then read the
diff.
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
from zbudfs.cli.errors import ConfigError
from zbudfs.cli.expression import parse_amount
from zbudfs.cli.main import main
from zbudfs.cli.option_table import OPTIONS, given_options
from zbudfs.cli.parser import build_parser
from zbudfs.cli.plan import make_plan

TREES = sorted((ROOT / "tests/cli/golden").iterdir())
RAM = 8 << 30


def transcript(root: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Return the outputs of `zbudfs config` and `zbudfs config --check` for a tree, and their exit statuses."""
    text = ""
    for options in ([], ["--check"]):
        status = main(["config", *options, "--root", str(root)])
        out, err = capfd.readouterr()
        text += f"$ {' '.join(['zbudfs config', *options])}\n{out}{err}exit status {status}\n"
    return text


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
def test_a_golden_tree(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """These files give exactly these words."""
    text = transcript(tree, capfd)
    expected = tree / "expected"
    if os.environ.get("ZBUDFS_GOLDEN") == "write":
        expected.write_text(text)
    assert text == expected.read_text()


def test_a_disk_with_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The default size is the room on the disk, and at least the pool. A size in the file stays. The reason is printed."""
    root = make_root(tmp_path, {"a.toml": "", "b.toml": "size = '4G'", "c.toml": "backing = 'none'"})
    free = 3 << 30
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 0, 0, free // 4096, 0, 0, 0, 0, 255))
    )
    sizes = [config.load(name, root).plan.settings.size_bytes for name in "abc"]
    assert sizes == [free, 4 << 30, RAM]
    assert main(["config", "--root", root, "a"]) == 0
    assert "3 GiB; default: less than RAM of 8 GiB: the room on the disk of /var/lib/zbudfs" in capfd.readouterr().out
    free = 1 << 20
    assert config.load("a", root).plan.settings.size_bytes == RAM // 4


def test_the_order_of_swaps_is_printed(tmp_path: Path) -> None:
    """The default priority is above a disk and below zram. The swap of zbudfs itself does not count."""
    root = make_root(tmp_path, {"a.toml": ""})
    lines = ["/dev/zram0 partition 1 0 100", "/dev/sda2 partition 1 0 -2", "/dev/loop3 partition 1 0 50"]
    (tmp_path / "proc/swaps").write_text("\n".join(["Filename Type Size Used Priority", *lines]))
    told = config.load("a", root).reasons["priority"]
    assert told == "50 at present, below /dev/zram0 (100), above /dev/sda2 (-2)"


def make_root(folder: Path, files: dict[str, str], ram: int = RAM) -> str:
    """Make a tree with files under etc/zbudfs and so much RAM, and return its path."""
    (folder / "proc").mkdir(parents=True, exist_ok=True)
    (folder / "proc/meminfo").write_text(f"MemTotal: {ram // 1024} kB\n")
    for name, text in files.items():
        path = folder / "etc/zbudfs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def test_the_output_is_a_configuration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The printed configuration gives the same settings, on a machine of another size."""
    written = (
        'size = "ram / 2"\npool = "10%"\npriority = 7\nbacking = "/x/a \\"b\\" \\u007f \\\\ ä"\nmountpoint = "/mnt/é"\n'
    )
    root = make_root(tmp_path / "one", {"swap.toml": written})
    assert main(["config", "--root", root, "swap"]) == 0
    page = capfd.readouterr().out
    again = make_root(tmp_path / "two", {"swap.toml": page}, ram=64 << 30)
    first, second = config.load("swap", root), config.load("swap", again)
    assert first.plan.settings == second.plan.settings
    assert first.plan.settings.backing == '/x/a "b" \x7f \\ ä'
    assert (first.plan.priority, second.plan.priority) == (7, 7)
    assert set(second.found) == {option.name for option in OPTIONS}


def test_json_says_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """JSON is one object for a name and a list without one. A default has no source."""
    root = make_root(tmp_path, {"a.toml": 'size = "ram / 4"', "b.toml": "nonsense = 1"})
    assert main(["config", "--json", "--root", root, "a"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert found["values"]["size"] == {
        "value": RAM // 4,
        "source": "/etc/zbudfs/a.toml",
        "written": "ram / 4",
        "reason": None,
    }
    assert found["values"]["level"] == {"value": -1, "source": None, "written": None, "reason": None}
    assert main(["config", "--json", "--root", root]) == 0
    out, err = capfd.readouterr()
    assert [each["name"] for each in json.loads(out)] == ["a", "b"]
    assert "nonsense" in json.loads(out)[1]["warnings"][0]
    assert "nonsense" in err


def test_the_same_as_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and the options of the same names give the same daemon."""
    root = make_root(
        tmp_path, {"x.toml": 'mountpoint = "/mnt/x"\nsize = "3G"\npool = "30%"\nbacking = "none"\nlevel = 5'}
    )
    monkeypatch.setattr("zbudfs.cli.parser.ram_bytes", lambda: RAM)
    typed = ["mount", "--size", "3G", "--pool", "30%", "--backing", "none", "--level", "5", "/mnt/x"]
    arguments = build_parser().parse_args(typed, Arguments())
    assert config.load("x", root).plan.settings == make_plan(given_options(arguments), "/mnt/x", root=root).settings


def test_every_option_of_a_mount_is_a_key() -> None:
    """Each option of a mount is a key of the same name."""
    parser = build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    options = {action.dest for action in commands.choices["swapon"]._actions} - {"help", "config"}
    assert options | {"swap"} == {option.field for option in OPTIONS}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "../etc", "x" * 65, "a\n", "ä", ".a"])
def test_wrong_names(name: str, tmp_path: Path) -> None:
    """A name cannot lead out of the folder."""
    with pytest.raises(ConfigError, match="is not a name"):
        config.load(name, make_root(tmp_path, {"x.toml": ""}))


def test_a_name_that_is_not_configured(tmp_path: Path) -> None:
    """The message names the file that would be read, and the names that exist."""
    with pytest.raises(ConfigError) as caught:
        config.load("y", make_root(tmp_path, {"x.toml": ""}))
    assert caught.value.problems == (
        "/etc/zbudfs/y.toml does not exist: create it (an empty file means all defaults), or use one of x",
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nosuch.toml", "/etc/zbudfs/nosuch.toml.toml does not exist: write the name without .toml: nosuch"),
        ("swop", "/etc/zbudfs/swop.toml does not exist: did you mean swap? Otherwise create it"),
    ],
)
def test_a_hint_for_an_unknown_name(name: str, hint: str, tmp_path: Path) -> None:
    """The end of a file name, and a slip of the keyboard."""
    with pytest.raises(ConfigError) as caught:
        config.load(name, make_root(tmp_path, {"swap.toml": "", "other.toml": ""}))
    assert str(caught.value).startswith(hint)


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    """Text that the parser cannot nest is an error of one sentence, without a traceback."""
    with pytest.raises(ConfigError, match=r"^/etc/zbudfs/x\.toml: its lists or tables are nested too deeply"):
        config.load("x", make_root(tmp_path, {"x.toml": "size = " + "[" * 100_000}))


def test_the_mountpoint_is_made(tmp_path: Path) -> None:
    """The mountpoint and the folders above it are made. An existing one stays."""
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
        ("(" * 60 + "ram" + ")" * 60, RAM),
        ("-" * 100 + "1G", 1 << 30),
    ],
)
def test_an_expression(text: str, size_bytes: int) -> None:
    """Precedence, order and case are as in arithmetic, and the result is exact."""
    assert parse_amount(text, RAM) == size_bytes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a size"),
        ("ram /", "a part of the expression is missing, or there is one too many"),
        ("ram ram", "a part of the expression is missing, or there is one too many"),
        ("ram)", "or there is one too many"),
        ("(ram", "a part of the expression is missing"),
        ("min(ram 2)", "a part of the expression is missing, or there is one too many"),
        ("1 2", "or there is one too many"),
        ("min()", "'min' is unknown"),
        ("min(*ram)", "it contains more than numbers"),
        ("ram(2)", "'ram' is unknown"),
        ("ram if ram else ram", "it contains more than numbers"),
        ("ram // 2", "it contains more than numbers"),
        ("n1 + 1", "is not allowed"),
        ("1if ram", "is not allowed"),
        ("min ram", "a part of the expression is missing"),
        ("swap / 2", "'swap' is unknown: known are ram"),
        ("4GB", "is not a size"),
        ("ram ** 2", r"it contains more than numbers, ram, \+ - \* /, min"),
        ("__import__('os')", "is not allowed"),
        ("ram / 0", "divides by zero"),
        ("ram / (1G - 1024M)", "divides by zero"),
        ("1G - ram", "is less than zero"),
        ("ram * ram * ram", "more than any machine has"),
        ("ram / 100000", "write 4096M or 4G rather than 4096"),
        ("min(ram / 2, 4096)", "is 4096 bytes"),
        ("1+" * 100 + "1", "too long"),
    ],
)
def test_wrong_expressions(text: str, reason: str) -> None:
    """The error names the mistake."""
    with pytest.raises(ValueError, match=reason):
        parse_amount(text, RAM)


@given(st.text(alphabet="ram()+-*/,min x0123456789.GMK%", max_size=140) | st.text())
def test_no_text_gives_another_error(text: str) -> None:
    """Any text gives a size or a ValueError."""
    with contextlib.suppress(ValueError):
        assert parse_amount(text, RAM) >= 0


trees_of_sums = st.recursive(
    st.integers(0, 999).map(str) | st.just("ram"),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({' '.join(parts)})"),
    max_leaves=6,
)


@given(trees_of_sums)
def test_arithmetic_is_that_of_fractions(text: str) -> None:
    """The result equals Python's evaluation of the same text with exact numbers."""
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
    """Return the problems of the configuration x, or an empty text if it can be used."""
    try:
        found = config.load("x", root)
    except ConfigError as error:
        return error.problems
    assert found.plan.settings.size_bytes % 4096 == 0
    return ()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | st.just("none"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from([option.name for option in OPTIONS]) | st.text(max_size=8), values, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_values_give_another_error(tmp_path_factory: pytest.TempPathFactory, table: dict[str, object]) -> None:
    """Any values in a file give settings or a ConfigError."""
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
    """Any bytes in a file give settings or a ConfigError."""
    root = make_root(tmp_path_factory.getbasetemp() / "bytes", {"x.toml": ""})
    Path(root, "etc/zbudfs/x.toml").write_bytes(content)
    try:
        tomllib.loads(content.decode())
    except ValueError:
        assert "it is not TOML" in problems_of(root)[0]
