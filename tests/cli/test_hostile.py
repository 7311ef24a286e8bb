# SPDX-License-Identifier: MIT
"""Whatever is typed, and whatever lies about: one line for the user, never a traceback, and nothing done that should not be."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zbudfs.cli import commands
from zbudfs.cli.commands import _empty
from zbudfs.cli.main import main
from zbudfs.core.errors import LayoutError
from zbudfs.service import launch
from zbudfs.service.launch import LaunchError
from zbudfs.service.settings import Settings, SettingsError
from zbudfs.store.arena import Arena
from zbudfs.store.backing import MAGIC
from zbudfs.store.board import BOARD_BYTES, Board, Field

COMMANDS: Final = ("mount", "umount", "swapon", "swapoff", "restart", "status", "config", "help", "", "-h")
OPTIONS: Final = (
    *(
        "--size",
        "--pool",
        "--backing",
        "--level",
        "--encrypt",
        "--priority",
        "--umount",
        "--force",
        "--json",
        "--check",
    ),
    *("--root", "--foreground", "--version", "--help", "--", "-", "--size=", "-x"),
)
VALUES: Final = (
    *(
        "0",
        "-1",
        "1",
        "4G",
        "99999999999999999999G",
        "1e9",
        "50%",
        "101%",
        "-7",
        "19",
        "yes",
        "no",
        "none",
        "nan",
        "inf",
    ),
    *(
        "/nonexistent/place",
        "relative",
        "/nonexistent/" + "x" * 5000,
        "\udcff",
        "ä",
        "a\nb",
        "%s%n",
        "{0}",
        "\x1b[31m",
        "'",
    ),
)

Words = st.lists(
    st.one_of(
        st.sampled_from(OPTIONS), st.sampled_from(VALUES), st.text(max_size=8).map(lambda text: f"/nonexistent/{text}")
    ),
    max_size=6,
)


@pytest.fixture
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would start a daemon, or look at other mounts of this machine, does not."""

    def refuse(*_: object, **__: object) -> int:
        raise LaunchError("nothing is started here")

    monkeypatch.setattr(launch, "start", refuse)
    monkeypatch.setattr(launch, "run_in_foreground", refuse)
    monkeypatch.setattr(commands, "zbudfs_mounts", list)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(command=st.sampled_from(COMMANDS), words=Words)
def test_any_words(command: str, words: list[str], nothing_is_started: None) -> None:
    """The exit status is one of those that are documented; each line on stderr is one of ours."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([command, *words])
    assert status in (0, 1, 2)
    said = err.getvalue()
    assert "Traceback" not in said
    assert bool(said) == (status != 0)
    if status:
        assert said.startswith("zbudfs: ")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.dictionaries(
            st.sampled_from(("mountpoint", "size_bytes", "pool_bytes", "backing", "level", "encrypt")), inner
        ),
    )
)
def test_any_settings(found: object) -> None:
    """They are refused in one line, or they are settings."""
    said = ""
    try:
        Settings.from_json(json.dumps(found))
    except SettingsError as error:
        said = str(error)
    assert "\n" not in said


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(min_size=64, max_size=512), at=st.sampled_from((0, 1 << 10, 2 << 10, 3 << 10, 4 << 10, 8 << 10)))
def test_any_board(junk: bytes, at: int) -> None:
    """A board with nonsense in it is refused, or gives nonsense of the right length; nothing is raised but LayoutError."""
    arena = Arena("board", BOARD_BYTES)
    arena.view[at : at + len(junk)] = junk
    board = Board(arena)
    with contextlib.suppress(LayoutError):
        board.claim(size_bytes=1 << 20, pool_frames=100, backed=1, persistent=0)
    assert len(board.init()) < 1 << 10, "the key comes after it"
    assert len(board.take_error()) < 4 << 10
    assert len(board.lines()) <= 128
    assert len(board.key(64)) == 64
    assert all(isinstance(board.fields[field], int) for field in Field)


def test_only_a_backing_file_is_emptied(tmp_path: Path) -> None:
    """The remains of a dead mount may name any file: one that is no backing file stays as it is."""
    precious, ours, pipe = tmp_path / "precious", tmp_path / "ours", tmp_path / "pipe"
    precious.write_bytes(b"precious" * 1000)
    ours.write_bytes(MAGIC.ljust(4096, b"\0") + b"pages")
    os.mkfifo(pipe)
    for path in (precious, ours, pipe, tmp_path / "missing"):
        _empty(str(path))
    assert precious.read_bytes() == b"precious" * 1000
    assert ours.read_bytes() == b""
    link = tmp_path / "link"
    ours.write_bytes(MAGIC)
    link.symlink_to(ours)
    with pytest.raises(OSError, match="symbolic"):
        _empty(str(link))
    assert ours.read_bytes() == MAGIC
