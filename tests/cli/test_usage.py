# SPDX-License-Identifier: MIT
"""Wrong words give one line and the right exit status, and nothing happens. Help and defaults are complete."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT, mounted, run_zbudfs
from zbudfs import __version__
from zbudfs.cli.arguments import Arguments, Later
from zbudfs.cli.main import main
from zbudfs.cli.option_table import given_options
from zbudfs.cli.parser import build_parser
from zbudfs.cli.plan import make_plan
from zbudfs.cli.stdio import shows_unicode
from zbudfs.cli.target import resolve
from zbudfs.service.mountpoint import zbudfs_mounts
from zbudfs.service.settings import SettingsError

COMMANDS = (
    *(
        "mount",
        "umount",
        "swapon",
        "swapoff",
        "restart",
        "status",
        "set",
        "exporter",
        "serve",
        "hibernate",
        "config",
        "doctor",
        "estimate",
        "trace",
        "top",
    ),
)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: COMMAND"),
        (["frob"], "'frob' is not a command of zbudfs: known are mount, umount"),
        (["mount"], "required: MOUNTPOINT"),
        (["mount", "--size", "5x", "/x"], "argument --size: '5x' is not a size: write digits"),
        (["mount", "--size", "4GB", "/x"], "is not a size"),
        (["mount", "--size", "-1", "/x"], "argument --size: '-1' is less than zero: write a positive size (see zbudfs"),
        (["mount", "--size", "1G-ram", "/x"], "is less than zero on this machine, whose RAM is"),
        (
            ["mount", "--size", "5000", "/x"],
            "argument --size: size of 5000 bytes is too small: it must be 1M or more (see",
        ),
        (["swapon", "--size", "0", "/x"], "argument --size: size of 0 bytes is too small: it must be 1M or more (see"),
        (["mount", "--pool", "1K", "/x"], "argument --pool: pool of 1 KiB (1024 bytes) is too small"),
        (["mount", "--level", "0", "/x"], "argument --level: level 0 is refused"),
        (["mount", "--pool", "101%", "/x"], "argument --pool: '101%' is more than the whole"),
        (["mount", "--pool", "", "/x"], "argument --pool: '' is not a size"),
        (["mount", "--level", "20", "/x"], "argument --level: '20' is not a level: write a whole number from -7 to 19"),
        (["mount", "--level", "-8", "/x"], "'-8' is not a level"),
        (["mount", "--encrypt", "maybe", "/x"], "'maybe' is neither yes nor no"),
        (
            ["mount", "--packing", "dense:8", "/x"],
            "argument --packing: 'dense:8' is not a packing: write zbud, dense, or",
        ),
        (["mount", "--level", "fast", "/x"], "'fast' is not a level"),
        (["swapon", "--priority", "-1", "/x"], "'-1' is not a priority: write a whole number from 0 to 32767"),
        (
            ["swapon", "--discard", "never", "/x"],
            'argument --discard: \'never\' is neither pages nor once: write "pages" or "once"',
        ),
        (
            ["mount", "--siz", "4G", "/x"],
            "'--siz' is not an option of zbudfs mount: did you mean --size? (see zbudfs mount --help)",
        ),
        (["swapon"], "write either MOUNTPOINT or --config NAME"),
        (["swapoff", "--config", "swap", "/x"], "write either MOUNTPOINT or --config NAME"),
        (["swapon", "--config", "swap", "--size", "4G"], "--size does not go with --config: write it into the file"),
        *(
            (["swapon", "--config", "swap", f"--{name}", value], f"--{name} does not go with --config: write it into")
            for name, value in (("instances", "4"), ("level", "3"), ("backing", "none"), ("priority", "5"))
        ),
        (["serve"], "required: NAME"),
        (["hibernate"], "required: prepare|finish"),
        *((command, "'../x' is not a name") for command in (["config", "../x"], ["doctor", "../x"])),
        *(([word, "--config", "../x"], "'../x' is not a name") for word in ("swapon", "swapoff")),
        (["set"], "required: [KEY=VALUE ...] MOUNTPOINT (see zbudfs set --help)"),
        (["set", "foo"], "'foo' is neither KEY=VALUE nor a MOUNTPOINT: write KEY=VALUE ..., and the MOUNTPOINT as the"),
        (["set", "level"], "'level' is neither KEY=VALUE nor a MOUNTPOINT"),
        (["set", "foo=3"], "'foo' cannot be set"),
        (["set", "level=3"], "the MOUNTPOINT is missing: write it after 'level=3'"),
        (["set", "level=3", "level=4"], "level is set twice"),
        (["status", "/x", "/y"], "this command does not take so many arguments: /y"),
    ],
)
def test_wrong_words_are_usage_errors(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong word gives exit status 2 and one line with the mistake and the right form."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zbudfs: ")
    assert err.count("\n") == 1
    assert reason in err


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--level", "0"], "zstd takes it for"),
        (["--size", "5000000"], "the nearest are 4997120 and 5001216"),
        (["--size", "4096"], "must be 1M or more"),
        (["--size", "17T"], "16T less one page"),
        (["--size", "16000G"], "of tables locked in RAM, more than a tenth of this machine's"),
        (["--pool", "1K"], "must be 1M or more"),
        (["--pool", "0%"], "must be 1M or more"),
        (["--pool", "1000T"], "more than this machine's RAM"),
        (["--backing", ""], "is not a file name"),
        (["--backing", "/tmp/"], "is not a file name"),
    ],
)
@pytest.mark.parametrize("command", ["mount", "swapon"])
def test_values_that_cannot_work_are_usage_errors(
    command: str, options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that cannot work gives exit status 2, and nothing is mounted."""
    assert main([command, *options, str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1
    assert str(tmp_path) not in [mount.mountpoint for mount in zbudfs_mounts()]


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["mount", "none"], "does not exist: create the directory first"),
        (["mount", "file"], "is not a directory"),
        (["mount", ""], "'' is not a path"),
        (["mount", "--backing", "/none/at/all", "."], "for the backing file does not exist"),
        (["umount", "."], "no zbudfs is mounted on"),
        (["swapoff", "."], "no zbudfs is mounted on"),
        (["swapon", "none"], "does not exist: create the directory first"),
        (["status", "."], ": zbudfs status lists the mounts"),
        (["set", "."], ": zbudfs status lists the mounts"),
        (["set", "level=3", "./none"], ": zbudfs status lists the mounts"),
        (["umount", "--", "-x"], "no zbudfs is mounted on"),
        (["exporter", "--textfile", "none/at/all"], "none/at/all: No such file or directory"),
        (["estimate", "--file", "none"], "zbudfs: none: No such file or directory"),
        (["trace", "show", "none"], "zbudfs: none: No such file or directory"),
        (["status", "new\nline"], r"$'/"),
    ],
)
def test_failures(arguments: list[str], reason: str, tmp_path: Path) -> None:
    """A failure gives exit status 1 and one line on stderr, from the real command, in any folder."""
    (tmp_path / "file").touch()
    run = run_zbudfs(*arguments, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("zbudfs: ")
    assert run.stderr.count("\n") == 1
    assert reason in run.stderr


@pytest.mark.parametrize("command", ["mount", "umount", "swapon", "swapoff", "restart"])
def test_root_is_needed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user other than root gets that message before anything else."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([command, str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == f"zbudfs: {command} needs root: run it with sudo\n"


@pytest.mark.needs("root")
def test_a_service_without_a_configuration(tmp_path: Path) -> None:
    """`serve` ends with the status that makes a service manager give up. The other commands end with 1."""
    name = f"none-{os.getpid()}"
    for status, words in ((2, ["serve", name]), (1, ["swapon", "--config", name]), (1, ["swapoff", "--config", name])):
        run = run_zbudfs(*words, cwd=tmp_path)
        assert (run.returncode, run.stdout) == (status, "")
        assert run.stderr.startswith(f"zbudfs: /etc/zbudfs/{name}.toml does not exist")


def test_the_version() -> None:
    """--version prints the version."""
    run = run_zbudfs("--version")
    assert (run.returncode, run.stdout) == (0, f"zbudfs {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help of each command explains each option."""
    assert main([command, "--help"]) == 0
    metavars = {
        "serve": "NAME",
        "hibernate": "prepare|finish",
        "config": "NAME",
        "doctor": "NAME",
        "estimate": "PID",
        "trace": "COMMAND",
    }
    assert metavars.get(command, "MOUNTPOINT") in capsys.readouterr().out
    parser = build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    assert tuple(commands.choices) == COMMANDS
    assert all(action.help for action in commands.choices[command]._actions)


def test_a_switch_has_one_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    """The default of an option is one of the words that the help offers."""
    assert main(["mount", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "memory only (default: yes)" in text
    assert not re.search(r"default: (true|false)", text)


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """The parser accepts each example in the help."""
    assert main(["--help"]) == 0
    lines = [
        line.split("   ")[0].split() for line in capsys.readouterr().out.splitlines() if line.startswith("  zbudfs ")
    ]
    assert len(lines) >= 5
    for words in lines:
        build_parser().parse_args(words[1:], Arguments())


def test_status_without_a_mount(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The status of no mount is no failure."""
    monkeypatch.setattr("zbudfs.cli.status.zbudfs_mounts", list)  # other processes may have a mount at the moment
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no zbudfs is mounted\n"
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def settings_for(*options: str) -> dict[str, object]:
    """Return the settings for the daemon of `zbudfs mount OPTIONS /mnt/z`."""
    arguments = build_parser().parse_args(["mount", *options, "/mnt/z"], Arguments())
    loaded = json.loads(make_plan(given_options(arguments), "/mnt/z").settings.to_json())
    assert isinstance(loaded, dict)
    return loaded


def test_defaults() -> None:
    """The size is RAM, the pool a quarter of it, the level -1, and the backing file has the mountpoint's name."""
    found = settings_for()
    size, pool = found["size_bytes"], found["pool_bytes"]
    assert isinstance(size, int)
    assert isinstance(pool, int)
    assert 0 <= size // 4 - pool <= 4096
    assert found["level"] == -1
    assert found["encrypt"] is True
    assert found["packing"] == "zbud"
    assert found["backing"] == "/var/lib/zbudfs/mnt-z.backing"


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option arrives, and a relative path becomes absolute."""
    monkeypatch.chdir(tmp_path)
    found = settings_for(
        *("--size", "1.5G", "--pool", "64M", "--backing", "some file"),
        *("--level", "-7", "--encrypt", "no", "--packing", "dense"),
    )
    assert found == {
        "mountpoint": "/mnt/z",
        "size_bytes": 3 << 29,
        "pool_bytes": 64 << 20,
        "backing": str(tmp_path.resolve() / "some file"),
        "level": -7,
        "encrypt": False,
        "force_backing": False,
        "source": "zbudfs",
        "packing": "dense:7",
    }
    assert settings_for("--backing", "none")["backing"] is None
    assert settings_for("--backing", "./none")["backing"] == str(tmp_path.resolve() / "none")


def test_a_symbolic_link_to_a_backing_file_is_left_to_be_refused(tmp_path: Path) -> None:
    """Folders of the path are resolved, and its last part is not, so that the daemon refuses the link."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to("folder")
    (tmp_path / "folder/link").symlink_to("/etc/passwd")
    assert settings_for("--backing", f"{tmp_path}/way/link")["backing"] == f"{tmp_path.resolve()}/folder/link"


def test_a_backing_file_on_the_mountpoint_is_refused() -> None:
    """A backing file on its own mountpoint would wait for itself."""
    with pytest.raises(SettingsError, match="lies on the mountpoint"):
        settings_for("--backing", "/mnt/z/backing")


def test_paths_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths and symbolic links lead to the directory itself."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert resolve("link/.") == resolve("./real/../link") == str(tmp_path.resolve() / "real")


def test_the_daemons_own_modules_stay_lean() -> None:
    """The parts of `service` that the daemon imports load no programs and no parsers, since all of them would be locked."""
    for name in ("settings", "hardening", "mountpoint", "log"):
        source = (ROOT / "zbudfs/service" / f"{name}.py").read_text()
        for heavy in ("argparse", "subprocess", "launch", "zbudfs.cli", "zbudfs.swap"):
            assert f"import {heavy}" not in source
            assert f"from {heavy}" not in source


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["moutn", "/x"], "'moutn' is not a command of zbudfs: did you mean mount? (see zbudfs mount --help)"),
        (["swap-on"], "'swap-on' is not a command of zbudfs: did you mean swapon?"),
        (
            ["trace", "recrod"],
            "'recrod' is not a command of zbudfs trace: did you mean record? (see zbudfs trace record --help)",
        ),
        (["set", "level=1"], "the MOUNTPOINT is missing: write it after 'level=1', as the last word"),
        (["exporter", "--textfile", ""], "argument --textfile: '' is not a file name: write the path of a file"),
        (["estimate", "--file", ""], "argument --file: '' is not a file name"),
        (["trace", "record", "-o", "", "/x"], "argument -o/--output: '' is not a file name"),
        (["trace", "show", ""], "argument FILE: '' is not a file name"),
        (["config", "--root", "/nonexistent"], "argument --root: '/nonexistent' is not a directory"),
        (["doctor", "--root", ""], "argument --root: '' is not a directory: write the path of one that exists"),
        (["hibernate", "prepar"], "'prepar' is not one of the words prepare, finish (see zbudfs hibernate --help)"),
        (["--sise", "1G"], "'--sise' is not an option of zbudfs: known are --help, --version"),
        (["mount", "--siez", "64M", "/x"], "'--siez' is not an option of zbudfs mount: did you mean --size?"),
        (["mount", "--siez=64M", "/x"], "'--siez' is not an option of zbudfs mount: did you mean --size?"),
        (["mount", "/x", "--poool"], "'--poool' is not an option of zbudfs mount: did you mean --pool?"),
        (["swapon", "-s", "/x"], "'-s' is not an option of zbudfs swapon: known are --help, --size"),
        (["trace", "replay", "--watermarks", "1%:2%", "x"], "did you mean --watermark?"),
        (["umount", "--force", "/x"], "'--force' is not an option of zbudfs umount: known are --help"),
        (["set", "pool-limit-bytes=1M", "/x"], "'pool-limit-bytes' cannot be set: did you mean pool_limit_bytes?"),
        (["set", "nonsense=1", "/x"], "'nonsense' cannot be set: known are pool_limit_bytes, "),
        (["mount", "--size", "\u0664G", "/x"], "is not a size: write digits"),
        (["mount", "--level", "\u0663", "/x"], "is not a level: write a whole number from -7 to 19"),
        (["mount", "--level", "1_0", "/x"], "'1_0' is not a level"),
        (["mount", "--level", "9" * 5000, "/x"], "is not a level"),
        (["mount", "--instances", "", "/x"], "'' is not a number of instances: write a whole number from 1 to"),
        (["mount", "--encrypt", "", "/x"], "'' is neither yes nor no: write yes or no"),
        (["status", "--watch", "nan"], "'nan' is not a number of seconds: write one from 0.1 to 86400"),
        (["status", "--watch", "1e3"], "'1e3' is not a number of seconds"),
        (["trace", "record", "--seconds", "0", "-o", "x", "/x"], "'0' is not a number of seconds: write one above 0"),
        (["estimate", "--sample", "0", "1"], "'0' is a size of zero bytes: write a size above 0, such as 64M"),
        (["top", "--after", "5"], "--after is for --picture FILE: write both, or neither"),
        (["config", "--check", "--json"], "argument --json: not allowed with argument --check"),
        (["estimate", "--levels", "0", "1"], "there is no level 0: write levels from -7 to -1 and from 1 to 19"),
        (["trace", "replay", "--watermark", "5%", "x"], "'5%' is not a pair of watermarks: write LOW:HIGH"),
    ],
)
def test_the_right_word_is_named(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the wrong word and no other, and the right one."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"{error}" in err
    assert "/x" not in err


FULL: Final = "/dev/full"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["mount", "--help"], ["status", "--json"], ["config"]])
def test_output_that_cannot_be_written(words: list[str]) -> None:
    """A full disk behind stdout, or no stdout, is an error of one line. A reader that has gone is no error."""
    command = shlex.join([sys.executable, "-m", "zbudfs", *words])
    for redirection, why in ((f">{FULL}", "No space left on device"), (">&-", "it is closed")):
        run = subprocess.run(
            ["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_SECONDS
        )
        assert run.returncode == 1
        assert run.stderr == f"zbudfs: standard output cannot be written, so the output is lost: {why}\n"
    run = subprocess.run(
        ["bash", "-c", f"({command}; echo $? >&2) | true"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=LIMIT_SECONDS,
    )
    assert run.stderr in ("1\n", "0\n")  # 0 if the pipe took everything before it was closed


@pytest.mark.parametrize("redirection", [f"2>{FULL}", "2>&-", "<&- 2>&-"])
def test_errors_that_cannot_be_written(redirection: str) -> None:
    """Only the exit status is left, and nothing goes to stdout instead."""
    for words, status in (("umount /nonexistent/x", 1), ("mount --level 99 /x", 2), ("frob", 2)):
        command = f"{shlex.quote(sys.executable)} -m zbudfs {words} {redirection}"
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT_SECONDS)
        assert (run.returncode, run.stdout) == (status, "")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"LANG": "C"}, False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False),
        ({"LC_CTYPE": "C.UTF-8"}, False),
        ({"LC_ALL": "POSIX", "LANG": "en_US.UTF-8"}, False),
        ({"LANG": "de_DE.ISO-8859-1"}, False),
        ({"LANG": "de_DE"}, False),
        ({"LANG": "de_DE.UTF-8"}, True),
        ({"LANG": "C.UTF-8"}, True),
        ({"LANG": "C", "LC_ALL": "C.utf8"}, True),
        ({"LANG": "C", "LC_CTYPE": "de_DE.UTF-8"}, True),
        ({"LC_ALL": "", "LANG": "en_GB.utf8"}, True),
    ],
)
def test_the_locale_decides(environment: dict[str, str], expected: bool) -> None:
    """The first of LC_ALL, LC_CTYPE and LANG decides, and not Python's own setting."""
    assert shows_unicode(environment, "utf-8") is expected
    assert not shows_unicode(environment, "ascii")


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize(
    ("name", "value", "ascii_only"), [("LANG", "C", True), ("LC_ALL", "POSIX", True), ("LC_ALL", "C.UTF-8", False)]
)
def test_no_characters_that_the_locale_lacks(name: str, value: str, ascii_only: bool, tmp_path: Path) -> None:
    """Bars are ASCII if the locale is not one of UTF-8."""
    environment = {key: text for key, text in os.environ.items() if key not in ("LANG", "LC_ALL", "LC_CTYPE")}
    with mounted(tmp_path / "mnt") as mountpoint:
        run = subprocess.run(
            [sys.executable, "-m", "zbudfs", "status", mountpoint],
            capture_output=True,
            cwd=ROOT,
            timeout=LIMIT_SECONDS,
            env={**environment, name: value},
        )
    assert run.returncode == 0
    assert run.stdout.isascii() is ascii_only
    assert b"  pool " in run.stdout


def later(parser: argparse.ArgumentParser) -> Iterator[Later]:
    """The functions of a parser's commands, and of theirs."""
    if isinstance(run := parser.get_default("run"), Later):
        yield run
    for action in parser._actions:
        for each in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from later(each)


def test_each_command_has_its_function() -> None:
    """A command names its function as text, since the module is imported only when the command runs."""
    found = list(later(build_parser()))
    assert len(found) >= 14
    for each in found:
        assert callable(each.function()), each


def test_a_command_imports_what_it_needs() -> None:
    """`zbudfs --version` and a usage error need neither the code of the commands nor that of the daemon."""
    code = "import sys; from zbudfs.cli.main import main; main(['--version']); print(*sorted(sys.modules))"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "zbudfs.cli.parser" in modules
    assert not modules & {"zbudfs.cli.commands", "zbudfs.cli.exporter", "zbudfs.service.launch", "http.server", "trio"}
