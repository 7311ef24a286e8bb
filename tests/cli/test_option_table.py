# SPDX-License-Identifier: MIT
"""Each option of the table is everywhere: a new option needs no other declaration."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from scripts.pages import commands, example, keys, pages
from tests.cli.test_config import make_root
from tests.support import ROOT
from zbudfs.cli import config, option_table
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.main import main
from zbudfs.cli.mount_helper import read_options
from zbudfs.cli.option_table import OPTIONS, Option, as_toml
from zbudfs.cli.parser import build_parser
from zbudfs.service.settings import SettingsError

TYPED = [(command, option) for option in OPTIONS for command in option.commands]
RAM = 8 << 30


def text_of(option: Option) -> str:
    """Return a value of the option as a user types it."""
    return ("no", "yes")[option.example] if isinstance(option.example, bool) else str(option.example)


@pytest.mark.parametrize(("command", "option"), TYPED, ids=lambda each: getattr(each, "name", each))
def test_the_command_line(command: str, option: Option, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line accepts the option, with the same value as a file, and its help explains it."""
    arguments = build_parser().parse_args([command, f"--{option.name}", text_of(option), "/x"], Arguments())
    found = option_table.given_options(arguments)
    assert set(found) == {option.name}
    assert found[option.name] is not None
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    assert re.search(rf"--{option.name} {re.escape(option.metavar)} ", shown)
    assert f"(default: {option.typed_default})".replace("- ", "-") in shown.replace("- ", "-")


@pytest.mark.parametrize(
    "option", [option for command, option in TYPED if command == "swapon"], ids=lambda each: each.name
)
def test_an_option_beside_a_configuration(option: Option, capsys: pytest.CaptureFixture[str]) -> None:
    """An option beside --config is refused, since --config would ignore it."""
    assert main(["swapon", "--config", "swap", f"--{option.name}", text_of(option)]) == 2
    assert f"--{option.name} does not go with --config: write it into the file" in capsys.readouterr().err


@pytest.mark.parametrize("option", OPTIONS, ids=lambda each: each.name)
def test_a_file(option: Option, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration accepts the key, and `zbudfs config` prints its value and explains it."""
    root = make_root(tmp_path, {"x.toml": f"{option.name} = {as_toml(option.example)}"})
    found = config.load("x", root)
    assert (set(found.found), found.warnings) == ({option.name}, ())
    assert main(["config", "--root", root, "x"]) == 0
    assert re.search(rf"^{option.name} = .*  # .*/etc/zbudfs/x.toml", capsys.readouterr().out, re.MULTILINE)
    assert main(["config", "--help"]) == 0
    assert f"  {option.name} " in capsys.readouterr().out


@pytest.mark.parametrize("option", OPTIONS, ids=lambda each: each.name)
def test_a_mount_option(option: Option) -> None:
    """mount(8) accepts the option, or the error names the place where it can be set."""
    text = f"{option.name}={text_of(option)}"
    if option.mount_option:
        assert set(read_options(text, RAM)[0]) == {option.name}
    else:
        with pytest.raises(SettingsError, match=rf"{option.name} is refused: it can only be set in /etc/zbudfs"):
            read_options(text, RAM)


def test_generated_pages() -> None:
    """The manual pages, the completion, the example configuration and the table of the README have all options."""
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `--([\w-]+) ", readme, re.MULTILINE)) == {option.name for _, option in TYPED}
    assert re.findall(r"^\*\*(.*)\*\*$", keys(), re.MULTILINE) == [option.name for option in OPTIONS]
    assert re.findall(r"^# ([\w-]+) = ", example(), re.MULTILINE) == [option.name for option in OPTIONS]
    uncommented = re.sub(r"^# ([\w-]+ = )", r"\1", example(), flags=re.MULTILINE)
    assert tomllib.loads(uncommented) == {option.name: option.example for option in OPTIONS}
    made = pages()
    named = [option.name.replace("-", r"\-") for option in OPTIONS if option.mount_option]
    assert [name for name in named if rf"\fI{name}\fP" not in made["docs/man/zbudfs.8"]] == []
    for command, option in TYPED:
        section = commands().partition(f"zbudfs {command} [")[2].partition("\nzbudfs ")[0]
        assert f"**--{option.name} " in section
        for shell in ("bash", "zsh"):
            (text,) = [text for name, text in made.items() if name.endswith(f"zbudfs.{shell}")]
            assert f"--{option.name}" in text
        (text,) = [text for name, text in made.items() if name.endswith("zbudfs.fish")]
        assert f"-l {option.name}" in text


def test_an_option_that_is_added(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One more entry is enough for the parser, the help and mount(8)."""
    new: Any = dataclasses.replace(option_table.BY_NAME["level"], name="made-up", summary="nothing at all")
    for module in ("parser", "option_table", "mount_helper"):
        monkeypatch.setattr(f"zbudfs.cli.{module}.OPTIONS", (*OPTIONS, new))
    for module in ("parser", "mount_helper"):
        monkeypatch.setattr(f"zbudfs.cli.{module}.BY_NAME", {**option_table.BY_NAME, "made-up": new})
    arguments = build_parser().parse_args(["mount", "--made-up", "3", "/x"], Arguments())
    assert option_table.given_options(arguments) == {"made-up": 3}
    assert main(["mount", "--help"]) == 0
    assert "nothing at all" in capsys.readouterr().out
    assert read_options("made-up=3", RAM) == ({"made-up": 3}, [])
