# SPDX-License-Identifier: MIT
"""The exit status of a service that cannot start: systemd tries again only if the mount holds pages."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.service.test_service import MIB, Manager
from tests.service.test_supervisor import SupervisedManager
from tests.support import LIMIT_SECONDS, ROOT, is_mounted
from zbudfs.cli import config as configuration
from zbudfs.cli import unit
from zbudfs.cli.arguments import Arguments
from zbudfs.service import hardening, verdict
from zbudfs.service.settings import Settings

UNIT: Final = (ROOT / "systemd/zbudfs@.service").read_text()
FINAL: Final = re.search(r"^RestartPreventExitStatus=(.*)$", UNIT, re.MULTILINE)


def test_the_unit_knows_the_statuses() -> None:
    """systemd starts the service again after RETRY. It does not after GIVE_UP, or if the program is missing."""
    assert FINAL
    statuses = {int(word) for word in FINAL[1].split()}
    assert verdict.GIVE_UP in statuses
    assert verdict.RETRY not in statuses
    assert {0, 127, 203} <= statuses


def run_service(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the daemon's module as a service, in a process whose `zbudfs.fuse.shim` is this code."""
    program = (
        "import runpy, sys, types\n"
        "sys.argv = ['zbudfs.service.daemon', '--service']\n"
        f"{code}\n"
        "runpy.run_module('zbudfs.service.daemon', run_name='__main__', alter_sys=False)\n"
    )
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_SECONDS, check=False)


@pytest.mark.parametrize(("stored", "status"), [("0", verdict.GIVE_UP), ("3", verdict.RETRY)])
@pytest.mark.parametrize("library", ["trio", "pyfuse3", "zstandard"])
def test_a_library_that_is_missing(library: str, stored: str, status: int) -> None:
    """The daemon reports it in one line, and the status depends on the stored descriptors."""
    run = run_service(f"sys.modules['{library}'] = None", LISTEN_FDS=stored)
    assert run.returncode == status, run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert "the daemon cannot start" in run.stderr


@pytest.mark.parametrize(("stored", "status"), [("", verdict.GIVE_UP), ("1", verdict.RETRY)])
def test_an_unexpected_error(stored: str, status: int) -> None:
    """An unexpected error has a traceback, and the boot continues."""
    run = run_service("import zbudfs.service.log as log; log.Log = None", LISTEN_FDS=stored)
    assert run.returncode == status
    assert "Traceback" in run.stderr


def test_a_keeper_that_was_handed_over_to() -> None:
    """The mount of such a keeper holds pages, whatever was stored when the first keeper started."""
    code = "import zbudfs.service.log as log; log.Log = None; sys.argv += ['--adopt-fd', '9']"
    assert run_service(code, LISTEN_FDS="0").returncode == verdict.RETRY


@pytest.mark.parametrize("error", [OSError("no"), ValueError("a bug")])
def test_a_supervisor_that_ends_by_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The supervisor has taken the stored descriptors, and they decide, not the environment afterwards."""

    def supervise(*_: object) -> int:
        monkeypatch.setattr(verdict, "has_stored", lambda: False)
        raise error

    monkeypatch.setattr(verdict, "has_stored", lambda: True)
    monkeypatch.setattr(unit, "_serve", supervise)
    with pytest.raises(type(error)):
        serve(monkeypatch, tmp_path, "")
    monkeypatch.setattr(verdict, "has_stored", lambda: False)
    assert unit.serve(Arguments(name="swap")) == verdict.GIVE_UP


def serve(monkeypatch: pytest.MonkeyPatch, root: Path, text: str) -> int:
    """Run `zbudfs serve swap` with a configuration in this process, up to the start of the daemon."""
    folder = root / "etc/zbudfs"
    folder.mkdir(parents=True)
    (folder / "swap.toml").write_text(text)
    load = configuration.load
    monkeypatch.setattr(configuration, "load", lambda name: load(name, str(root)))
    monkeypatch.setattr(hardening, "before_exec", lambda: None)
    monkeypatch.setattr(unit, "need_root", lambda command: None)
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal: 8388608 kB\n")
    return unit.serve(Arguments(name="swap"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('backing = "/nonexistent/folder/z"\n', "/nonexistent/folder"),
        ("size = \n", "swap.toml"),
        ('level = "high"\n', "level"),
    ],
)
def test_a_configuration_that_cannot_start(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service gives up, with one line."""
    place = f'mountpoint = "{tmp_path}/mnt"\n'
    assert serve(monkeypatch, tmp_path, f"{place}{text}") == verdict.GIVE_UP
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words in said[0]


def test_the_same_with_descriptors_in_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mount that holds pages may need the failed part: the error is passed on, with the status of any failure."""
    monkeypatch.setattr(verdict, "has_stored", lambda: True)
    with pytest.raises(Exception, match="/nonexistent/folder"):
        serve(monkeypatch, tmp_path, f'mountpoint = "{tmp_path}/mnt"\nbacking = "/nonexistent/folder/z"\n')


@pytest.mark.needs("root", "fuse")
@pytest.mark.parametrize("manager_type", [Manager, SupervisedManager])
def test_a_foreign_file_at_the_backing_path(
    manager_type: type[Manager], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A daemon gives up at once, and so does the supervisor of several, whose other instances are unmounted.

    stderr has the reason, since journald does not know the unit of a datagram of an ended process.
    """
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    backing = tmp_path / "backing"
    foreign = tmp_path / ("backing.1" if manager_type is SupervisedManager else "backing")
    foreign.write_text("not ours")
    settings = Settings(mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=4 * MIB, backing=str(backing))
    manager = manager_type(tmp_path, settings)
    with contextlib.closing(manager):
        manager.launch_daemon(keep=True)
        assert manager.wait() == verdict.GIVE_UP
    assert not is_mounted(mountpoint)
    assert not is_mounted(mountpoint / "0")
    assert foreign.read_text() == "not ours"
    said = [line for line in capfd.readouterr().err.splitlines() if str(foreign) in line]
    assert len(said) == 1, said
