# SPDX-License-Identifier: MIT
"""Any input and any file in the way give one line for the user, no traceback, and no unwanted action."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tracing.samples import trace_file
from zbudfs.cli import exporter, status, top, trace_replay
from zbudfs.cli.main import main
from zbudfs.cli.teardown import _empty
from zbudfs.core.errors import LayoutError
from zbudfs.core.trace import Kind
from zbudfs.estimate.pagemap import Proc
from zbudfs.service import hardening, launch
from zbudfs.service.launch import LaunchError
from zbudfs.service.settings import Settings, SettingsError
from zbudfs.store.arena import Arena
from zbudfs.store.backing import MAGIC
from zbudfs.store.status_area import STATUS_AREA_BYTES, Field, StatusArea

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
    """Stop each step that would start a daemon, or look at other mounts of this machine."""

    def refuse(*_: object, **__: object) -> int:
        raise LaunchError("nothing is started here")

    monkeypatch.setattr(launch, "start", refuse)
    monkeypatch.setattr(launch, "run_in_foreground", refuse)
    monkeypatch.setattr(status, "zbudfs_mounts", list)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(command=st.sampled_from(COMMANDS), words=Words)
def test_any_words(command: str, words: list[str], nothing_is_started: None) -> None:
    """The exit status is a documented one, and each line of stderr is one of ours."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([command, *words])
    assert status in (0, 1, 2)
    said = err.getvalue()
    assert "Traceback" not in said
    assert bool(said) == (status != 0)
    if status:
        assert said.startswith("zbudfs: ")
        assert said.removesuffix("\n").isprintable()


# ---- the commands that look at things, or change them while they run ---------------------------------------------------

LOOKING: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("set",): ("--json", "level=1", "level=", "level=99", "pool_limit_bytes=1G", "nonsense=1", "=", "level=1=2"),
    ("exporter",): ("--listen", ":0", "localhost:0", "[::1]:99999", "::1:1", "--textfile", "--interval", "--listen="),
    ("serve",): ("--json", "../swap", "swap@1"),
    ("doctor",): ("--json", "--backing", "--root"),
    ("estimate",): ("--all", "--file", "--sample", "--seed", "--levels", "--pool", "--plot", "--json", "-3,-1", "1,,2"),
    ("top",): ("--interval", "--picture", "--after", "0.1"),
    ("trace",): ("record", "show", "replay"),
    ("trace", "record"): ("-o", "--output", "--seconds", "--max", "2M"),
    ("trace", "show"): ("--json", "--plot"),
    ("trace", "replay"): (
        *("--pool", "--level", "--packing", "--watermark", "--backing", "--seed", "--json"),
        *("1M,2M", "dense:3", "zbud,dense", "2%:5%", "5%:2%", "1:2:3", ":"),
    ),
}
"""The commands with random words below, and some words that belong to each."""

BEGINNINGS: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("set",): ("level=1", "/nonexistent"),
    ("exporter",): ("--textfile", "new.prom"),
    ("estimate",): ("--file", "pages"),
    ("trace", "record"): ("-o", "new", "/nonexistent"),
    ("trace", "show"): ("trace",),
    ("trace", "replay"): ("trace", "--backing", "none"),
}
"""Right beginnings, with which half of the command lines start."""

SAFE_VALUES: Final = tuple(value for value in VALUES if value not in ("1", "4G", "19"))
"""Values that are safe to use: not process 1, no sample of gigabytes, and no level that takes minutes."""


class Watch:
    """A record of the files that this process writes, makes, moves or removes outside one folder, and of the programs."""

    def __init__(self, folder: Path) -> None:
        self.on = False
        self.folder = folder.resolve()
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # an audit hook cannot be removed

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and flags & os.O_TMPFILE != os.O_TMPFILE:  # that has no name
                self._touched(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.mkfifo"):
            self._touched(event, arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._touched(event, arguments[1])
        elif event in ("subprocess.Popen", "os.exec", "os.system", "os.kill", "socket.bind") and (
            arguments[0] != sys.executable  # doctor loads the libraries in a child
        ):
            self.seen.append(f"{event} {arguments}")

    def _touched(self, event: str, path: str | bytes | int) -> None:
        if isinstance(path, int):
            return  # a descriptor of a file that was open before
        where = Path(os.path.realpath(os.fsdecode(path)))
        allowed = (self.folder, *WRITABLE)
        if not any(each in (where, *where.parents) for each in allowed):
            self.seen.append(f"{event} {where}")


WRITABLE: Final = tuple(map(Path, ("/nonexistent", "/dev/null", "/dev/fuse", "/dev/loop-control")))
"""Places where a write is tried in vain, or that doctor opens to see whether it can write."""


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """Watch for actions outside the working directory, a folder with a trace and other files."""
    folder = tmp_path_factory.mktemp("words")
    records = [(1000 * number, Kind.WRITE, 20, number % 64, 1) for number in range(200)]
    (folder / "trace").write_bytes(trace_file(records))
    (folder / "pages").write_bytes(bytes(range(256)) * 256)
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("MPLCONFIGDIR", str(folder))  # matplotlib keeps a list of the system's fonts,
        importlib.import_module("matplotlib.font_manager")  # and calls fc-list if there is none
        watch = Watch(folder)
        yield watch
        watch.on = False


@pytest.fixture
def nothing_waits(watch: Watch, nothing_is_started: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop each step that serves, becomes a daemon, shows other mounts, reads other programs' memory or uses /var/tmp."""

    def write_once(mountpoints: Callable[[], list[str]], path: str, interval_seconds: float | None) -> None:
        write(mountpoints, path, None)

    write = exporter.write
    monkeypatch.setattr(exporter, "write", write_once)
    monkeypatch.setattr(exporter, "serve", lambda mountpoints, address, port, ready: ready(port))
    monkeypatch.setattr(hardening, "before_exec", lambda: None)
    monkeypatch.setattr(top, "zbudfs_mounts", list)
    monkeypatch.setattr(trace_replay, "DEFAULT_FOLDER", str(watch.folder))
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            monkeypatch.setattr(Proc, "pids", lambda self: [other.pid])
            yield
        finally:
            other.kill()


THERE: Final = ("trace", "pages", "empty", "folder", "new.svg", "new.prom", "new", "/nonexistent/new.svg", "no/new.png")
"""Files in the working directory, and some that could be made."""


@pytest.mark.parametrize("command", list(LOOKING), ids=" ".join)
@settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
@given(drawn=st.data())
def test_any_words_for_what_looks(
    command: tuple[str, ...], drawn: st.DataObject, watch: Watch, nothing_waits: None
) -> None:
    """The same holds as above. Also, nothing is started, and only the named files in the working directory are written."""
    own = st.sampled_from(LOOKING[command])
    there = st.sampled_from(THERE)
    any_word = st.one_of(there, own, st.sampled_from(SAFE_VALUES), st.just("--help"))
    part = st.one_of(st.tuples(there), st.tuples(own), st.tuples(own, any_word))
    parts = drawn.draw(st.tuples(st.just(()) | st.just(BEGINNINGS.get(command, ())), st.lists(part, max_size=4)))
    words = [word for part in (parts[0], *parts[1]) for word in part]
    out, err = io.StringIO(), io.StringIO()
    watch.seen.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        watch.on = True
        try:
            status = main([*command, *words])
        finally:
            watch.on = False
    said = err.getvalue()
    assert status in (0, 1, 2)
    assert all(line.startswith("zbudfs: ") for line in said.splitlines()), said
    if said or command != ("doctor",):  # which prints the problems that it finds
        assert (said.count("\n") == 1) == (status != 0 or "answering on" in said)
    assert said.removesuffix("\n").isprintable()
    assert watch.seen == []


# ---- files in the way ---------------------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.dictionaries(
            st.sampled_from(("mountpoint", "size_bytes", "pool_bytes", "backing", "level", "encrypt")), inner
        ),
    )
)
def test_any_settings(found: object) -> None:
    """Any settings are refused in one line, or are valid."""
    said = ""
    try:
        Settings.from_json(json.dumps(found))
    except SettingsError as error:
        said = str(error)
    assert "\n" not in said


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(min_size=64, max_size=512), at=st.sampled_from((0, 1 << 10, 2 << 10, 3 << 10, 4 << 10, 8 << 10)))
def test_any_status_area(junk: bytes, at: int) -> None:
    """A status area with any content is refused, or gives values of the right length. The only error is LayoutError."""
    arena = Arena("board", STATUS_AREA_BYTES)
    arena.view[at : at + len(junk)] = junk
    area = StatusArea(arena)
    with contextlib.suppress(LayoutError):
        area.claim(size_bytes=1 << 20, pool_frames=100, backed=1, persistent=0)
    assert len(area.init()) < 1 << 10, "the key comes after it"
    assert len(area.take_error()) < 4 << 10
    assert len(area.lines()) <= 128
    assert len(area.key(64)) == 64
    assert all(isinstance(area.fields[field], int) for field in Field)


def test_only_a_backing_file_is_emptied(tmp_path: Path) -> None:
    """The remains of a dead mount may name any file. A file that is no backing file stays as it is."""
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
    _empty(str(link))
    assert ours.read_bytes() == MAGIC
