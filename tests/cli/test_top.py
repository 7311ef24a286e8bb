# SPDX-License-Identifier: MIT
"""`zbudfs top`: its parts, its screen at several sizes and with keys, and the command in a real terminal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.pilot import Pilot
from textual.widgets import Input

from tests.fuse.calls import opened
from tests.support import LIMIT_SECONDS, is_mounted, mounted, run_zbudfs, status_of, wait_until, zbudfs
from zbudfs.cli.installation import Installation
from zbudfs.cli.main import main
from zbudfs.cli.sparkline import sparkline
from zbudfs.cli.top_screen import Answer, Ask, Top
from zbudfs.cli.top_widgets import bar_lines, gauge, round_bytes, round_count, shown_time, spread
from zbudfs.core.public import NAMES as PUBLIC_NAMES

NUMBERS: Final[dict[str, Any]] = {
    "keeper_pid": 7,
    "size_bytes": 8 << 30,
    "level": -1,
    "standby_ready": True,
    "stored_pages": 524288,
    "same_filled_pages": 131072,
    "raw_pages": 5243,
    "pool_used_bytes": 512 << 20,
    "pool_limit_bytes": 1 << 30,
    "pool_configured_bytes": 1 << 30,
    "low_watermark_frames": 100,
    "high_watermark_frames": 200,
    "backing_used_bytes": 256 << 20,
    "backing_size_bytes": 8 << 30,
    "backing_path": "/var/lib/zbudfs/mnt.backing",
    "writeback_enabled": 1,
    "cumul_written_pages": 0,
    "cumul_read_pages": 0,
    "read_latency_us": [0] * 32,
    "chunk_histogram": [0] + [5] * 63,
    "unbuddied_lists": [0, 3] + [0] * 62,
    "warnings": ["something is to be known"],
}


COLUMN_WIDTH: Final = 12.2
"""Width of a column in a picture of the screen."""


class Mounts:
    """Mounts that give the answers of a test."""

    def __init__(self, *mountpoints: str) -> None:
        self.numbers: dict[str, dict[str, Any] | str] = {mountpoint: dict(NUMBERS) for mountpoint in mountpoints}
        """The numbers by mountpoint, or the reason why there are none."""
        self.asked = 0

    def ask(self, wanted: str | None) -> Answer:
        """Answer like real mounts. Between two answers, pages were written and read."""
        self.asked += 1
        mountpoint = wanted or next(iter(self.numbers), None)
        if mountpoint is None:
            return Answer([], None, None, "no zbudfs is mounted")
        found = self.numbers[mountpoint]
        if isinstance(found, str):
            return Answer(list(self.numbers), mountpoint, None, found)
        found["cumul_written_pages"] += 256
        found["cumul_read_pages"] += 256
        found["read_latency_us"] = [count + (bucket == 5) for bucket, count in enumerate(found["read_latency_us"])]
        return Answer(list(self.numbers), mountpoint, dict(found), "")


def on_screen(app: Top) -> str:
    """Return all text on the screen, line by line; each character stands in its column."""
    lines: dict[float, str] = {}
    for node in ElementTree.fromstring(app.export_screenshot()).iter("{http://www.w3.org/2000/svg}text"):
        if (node.get("clip-path") or "").find("-line-") >= 0:
            y, column = float(node.get("y") or 0), round(float(node.get("x") or 0) / COLUMN_WIDTH)
            lines[y] = lines.get(y, "").ljust(column) + "".join(node.itertext()).replace("\xa0", " ").rstrip("\n")
    return "\n".join(line.rstrip() for _, line in sorted(lines.items()))


def drive(
    ask: Ask,
    steps: Callable[[Top, Pilot[None]], Awaitable[None]],
    size: tuple[int, int] = (80, 24),
    mountpoint: str | None = None,
    *,
    unicode: bool = True,
) -> None:
    """Run the screen without a terminal, and do something with it."""

    async def run() -> None:
        app = Top(None, 0.1, ask, unicode=unicode)
        async with app.run_test(size=size, notifications=True) as pilot:
            await asyncio.wait_for(steps(app, pilot), LIMIT_SECONDS)

    asyncio.run(run())


async def until(app: Top, pilot: Pilot[None], *texts: str) -> str:
    """Wait until all of these texts are on the screen, and return all of it."""
    end = time.monotonic() + LIMIT_SECONDS / 2
    while time.monotonic() < end:
        shown = on_screen(app)
        if all(text in shown for text in texts):
            return shown
        await pilot.pause(0.02)
    raise AssertionError(f"not on the screen: {[text for text in texts if text not in shown]}\n{shown}")


@pytest.mark.parametrize("size", [(80, 24), (100, 34), (200, 60)])
def test_everything_is_on_the_screen(size: tuple[int, int]) -> None:
    """Each panel has its figures, at the smallest promised size and at larger ones."""

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        shown = await until(
            app,
            pilot,
            *("/mnt/a", "8 GiB, level -1, standby ready", "stored      2 GiB  524,288 pages", "25.0 % same, 1.0 % raw"),
            *(
                "saved     1.3 GiB  62.5 %",
                "50.0 %",
                "3.1 %",
                "writeback on",
                "512 MiB",
                "hits     100.00 % in RAM",
            ),
            *("315 zpages", "3 of them", "something is to be known", "q Quit", "s Set"),
        )
        written = next(line for line in shown.splitlines() if "written" in line)
        assert "iB/s┤" in written
        assert "32 us" in next(line for line in shown.splitlines() if "read  " in line and "us" in line)
        for panel in app.query(".panel"):
            region = panel.region
            assert region.height >= 4
            assert region.right <= size[0]
            assert region.bottom <= size[1]

    drive(Mounts("/mnt/a").ask, steps, size)


def looks(since: int, **last: Any) -> list[dict[str, Any]]:
    """Return the numbers of 30 looks, a second apart, of a mount that fills; from `since` on they have the values `last`."""
    found = []
    for second in range(30):
        numbers = {
            **NUMBERS,
            "renewed_at": float(second),
            "warnings": [],
            "stored_pages": 17476 * (second + 1),
            "pool_used_bytes": min(second * 20, 500) << 20,
            "pool_limit_set_bytes": 1 << 30,
            "backing_used_bytes": max(second - 20, 0) * 20 << 20,
            "backing_size_bytes": 1 << 30,
            "cumul_written_pages": 256 * second**2,
            "cumul_read_pages": 5000 * second,
            "cumul_pagein_pages": 50 * second,
            "cumul_writeback_bytes": max(second - 20, 0) * 20 << 20,
            "read_latency_us": [0] * 5 + [900 * second, 90 * second, second] + [0] * 24,
            "write_latency_us": [0] * 6 + [900 * second, 90 * second, 2 * second] + [0] * 23,
        }
        if second >= since:
            numbers |= {name: value(second) if callable(value) else value for name, value in last.items()}
        found.append(numbers)
    return found


NEAR: Final = {
    "pool_used_bytes": (1 << 30) - 4096,
    "writeback_enabled": 0,
    "refused_pool_full": 7,
    "refused_writeback_off": 7,
    "standby_ready": False,
}
FAILING: Final = {
    "pool_used_bytes": 1 << 30,
    "backing_used_bytes": 1 << 30,
    "backing_full": 1,
    "refused_pool_full": lambda second: 7 * second,
    "refused_backing_full": lambda second: 7 * second,
    "lost_pages": 3,
}


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize(("name", "since", "last"), [("normal", 0, {}), ("near", 0, NEAR), ("failing", 20, FAILING)])
def test_the_screen_as_text(name: str, since: int, last: dict[str, Any], unicode: bool) -> None:
    """The screen of 80 x 24 is this text, in each state and without colour. The last line is textual's own.

    With ZBUDFS_TEST_RENEW_SCREENS=1 in the environment, the test writes the texts: read them before you commit them.
    """
    path = Path(__file__).parent / f"screens/{name}{'' if unicode else '-ascii'}.txt"
    stuck = threading.Event()

    def ask(wanted: str | None) -> Answer:
        stuck.wait(LIMIT_SECONDS)
        return Answer([], None, None, "late")

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        for numbers in looks(since, **last):
            app.post_message(Answer(["/mnt/zswap"], "/mnt/zswap", numbers, ""))
        await until(app, pilot, "524,280 pages")
        shown = "\n".join(on_screen(app).splitlines()[:23]) + "\n"
        if os.environ.get("ZBUDFS_TEST_RENEW_SCREENS"):
            path.write_text(shown)
        assert shown == path.read_text()

    try:
        drive(ask, steps, unicode=unicode)
    finally:
        stuck.set()


def test_public_numbers() -> None:
    """Numbers for root alone are named so, and not shown as 0. A text from the mount gives the terminal no orders."""
    mounts = Mounts("/mnt/a")
    told = {name: value for name, value in NUMBERS.items() if name in PUBLIC_NAMES}
    mounts.numbers["/mnt/a"] = {**told, "warnings": ["clear \x1b[2J it"]}

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        shown = await until(
            app, pilot, "524,288 pages", "rounded: exact for root", "for root alone", "clear \\x1b[2J it"
        )
        assert "same" not in shown
        assert "zpages\n" not in shown
        assert "of them" not in shown

    drive(mounts.ask, steps)


@pytest.mark.parametrize("unicode", [True, False])
def test_blocks_where_the_terminal_has_them(unicode: bool) -> None:
    """All panels are ASCII if the locale is not one of UTF-8. textual's own line of keys stays as it is."""

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        shown = await until(app, pilot, "50.0 %", "hits     100.00 % in RAM")
        panels = "\n".join(line for line in shown.splitlines() if "Next mount" not in line)
        assert bool(set(panels) & set("█▄░╭│")) is unicode
        assert panels.isascii() is not unicode

    drive(Mounts("/mnt/a").ask, steps, size=(100, 34), unicode=unicode)


def test_a_resize() -> None:
    """The screen is whole after a small size and back."""

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        await until(app, pilot, "315 zpages")
        for size in ((30, 8), (1, 1), (300, 80), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause(0.05)
        await until(app, pilot, "/mnt/a", "315 zpages")

    drive(Mounts("/mnt/a").ask, steps)


def test_several_mounts() -> None:
    """Tab goes through the mounts and starts again."""
    mounts = Mounts("/mnt/a", "/mnt/b")
    mounts.numbers["/mnt/b"] = {**NUMBERS, "size_bytes": 3 << 30}

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        await until(app, pilot, "/mnt/a (1 of 2)  8 GiB")
        await pilot.press("tab")
        await until(app, pilot, "/mnt/b (2 of 2)  3 GiB")
        await pilot.press("tab")
        await until(app, pilot, "/mnt/a (1 of 2)  8 GiB")

    drive(mounts.ask, steps)


def test_a_daemon_that_is_gone() -> None:
    """The screen gives the reason and keeps the last numbers, and continues when a mount answers again."""
    mounts = Mounts("/mnt/a")

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        await until(app, pilot, "524,288 pages")
        before, mounts.numbers["/mnt/a"] = mounts.numbers["/mnt/a"], "the daemon of /mnt/a has died"
        await until(app, pilot, "! the daemon of /mnt/a has died", "524,288 pages")
        assert app.screen.has_class("silent")
        mounts.numbers["/mnt/a"] = before
        await until(app, pilot, "something is to be known")
        assert not app.screen.has_class("silent")

    drive(mounts.ask, steps)


def test_no_mount_yet() -> None:
    """The screen waits for a mount."""
    mounts = Mounts()

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        await until(app, pilot, "! no zbudfs is mounted")
        await pilot.press("tab", "b", "plus")
        mounts.numbers["/mnt/new"] = dict(NUMBERS)
        await until(app, pilot, "/mnt/new", "524,288 pages")

    drive(mounts.ask, steps)


def test_a_mount_that_hangs() -> None:
    """The keys work while a mount hangs."""
    stuck = threading.Event()

    def ask(wanted: str | None) -> Answer:
        stuck.wait(LIMIT_SECONDS)
        return Answer([], None, None, "late")

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        await until(app, pilot, "asking ...")
        await pilot.press("s")
        assert app.query_one("#entry", Input).has_class("shown")
        await pilot.press("escape", "q")
        await pilot.pause()
        assert not app.is_running or app.return_code == 0

    drive(ask, steps)
    stuck.set()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder that looks like a mount to the code that sets values."""
    for folder in ("stats", "control"):
        (tmp_path / folder).mkdir()
    (tmp_path / "stats/all.json").write_text(json.dumps(NUMBERS))
    for name in ("pool_limit_bytes", "level", "writeback_enabled", "writeback", "drop_ephemeral", "age_seconds"):
        (tmp_path / "control" / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [
        (["minus"], "pool_limit_bytes", str((1 << 30) * 15 // 16)),
        (["plus"], "pool_limit_bytes", str(1 << 30)),
        (["right_square_bracket"], "level", "1"),
        (["left_square_bracket"], "level", "-2"),
        (["b"], "writeback_enabled", "0"),
        (["w"], "writeback", "all"),
        (["d"], "drop_ephemeral", "1"),
        (["s", *"age_seconds=77", "enter"], "age_seconds", "77"),
        (["s", *"xyz", "escape", "d"], "drop_ephemeral", "1"),
    ],
)
def test_keys_for_the_controls(keys: list[str], name: str, value: str, files: Path) -> None:
    """Each key writes its file, and the screen says so."""
    mounts = Mounts(str(files))

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        await until(app, pilot, "524,288 pages")
        await pilot.press(*keys)
        await until(app, pilot, f"{name}={value}"[:30])

    drive(mounts.ask, steps, (120, 40))
    assert (files / "control" / name).read_text() == value


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("nonsense", "is not KEY=VALUE"),
        ("frob=1", "cannot be set"),
        ("level=0", "level 0 is refused"),
        ("level=99", "it must be"),
    ],
)
def test_values_that_cannot_be_set(typed: str, reason: str, files: Path) -> None:
    """The screen says that the value cannot be set, and nothing is written."""

    async def steps(app: Top, pilot: Pilot[None]) -> None:
        await until(app, pilot, "524,288 pages")
        await pilot.press("s", *typed, "enter")
        await until(app, pilot, reason)

    drive(Mounts(str(files)).ask, steps, (120, 40))
    assert (files / "control/level").read_text() == ""


# ---- parts -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1 << 40), max_size=80), st.integers(0, 90), st.integers(0, 12))
def test_bars(values: list[int], width: int, height: int) -> None:
    """Bars fill the room and no more; the largest has the full height, and a value that is not 0 is visible."""
    columns = spread(values, width)
    assert len(columns) <= width
    assert sum(columns) >= sum(values) if width and values else not columns
    lines = bar_lines(columns, height, max(columns, default=0))
    assert len(lines) == height
    assert all(len(line) == len(columns) for line in lines)
    if lines and any(columns):
        assert "█" in lines[0]
    if lines and values and len(values) <= width:
        each = width // len(values)
        assert [lines[-1][at * each] != " " for at in range(len(values))] == [bool(value) for value in values]


@given(st.floats(0, 1e18))
def test_tops_of_axes(value: float) -> None:
    """The top of an axis is round, not below the largest value, and at most 2.5 times as high."""
    assert value <= round_bytes(value) <= max(2 * value, 1024)
    assert value <= round_count(value) <= max(2.5 * value, 1)


@given(st.integers(-5, 200), st.integers(0, 100), st.integers(0, 60))
def test_gauge(part: int, whole: int, width: int) -> None:
    """The gauge always has the wanted width."""
    assert len(gauge(part, whole, width)) == width


def test_more_pieces() -> None:
    """Single results are checked by hand."""
    assert gauge(1, 2, 8) == "████░░░░"
    assert gauge(0, 0, 4) == "░░░░"
    assert bar_lines([1, 2, 4], 1, 4) == ["▂▄█"]
    assert bar_lines(spread([1, 1, 2, 2], 2), 1, 4) == ["▄█"]
    assert bar_lines([8], 2, 4) == ["█", "█"]
    assert [shown_time(us) for us in (1, 999, 1024, 1 << 20)] == ["1 us", "999 us", "1.02 ms", "1.05 s"]
    assert sparkline([0, 1, 4, 8], unicode=True) == " ▁▄█"
    assert sparkline([0, 1, 4, 8], unicode=False) == " .=@"
    assert sparkline([], unicode=True) == ""
    assert sparkline([0, 0], unicode=True) == "  "


# ---- the command ---------------------------------------------------------------------------------------------------


def test_without_textual(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line gives the remedy."""
    for name in [name for name in sys.modules if name.startswith("zbudfs.cli.top_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "textual", None)
    assert main(["top"]) == 1
    assert capsys.readouterr().err == f"zbudfs: top needs textual: {Installation().command_for('top')}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ([], 1, "top needs a terminal"),
        (["/none"], 1, "no zbudfs is mounted on /none"),
        (["--interval", "0"], 2, "'0' is not a number of seconds"),
        (["--picture", "it.png"], 2, "write one that ends in .svg"),
    ],
)
def test_refusals(arguments: list[str], status: int, reason: str) -> None:
    """Each refusal is one line."""
    run = run_zbudfs("top", *arguments)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (status, "", 1)
    assert reason in run.stderr


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Return a real mount with some pages."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    zbudfs("mount", "--size", "64M", "--pool", "16M", "--backing", tmp_path / "backing", folder)
    fd = os.open(folder / "swapfile", os.O_RDWR)
    os.pwrite(fd, b"".join(b"%08d" % number * 512 for number in range(256)), 0)
    os.close(fd)
    yield folder
    if is_mounted(folder):
        zbudfs("umount", folder)


@pytest.mark.needs("root", "fuse")
def test_a_picture(mountpoint: Path, tmp_path: Path) -> None:
    """The picture shows a real mount, without a terminal."""
    path = tmp_path / "it.svg"
    zbudfs("top", "--picture", path, "--after", "1", "--interval", "0.1", mountpoint)
    text = "".join(ElementTree.fromstring(path.read_text()).itertext()).replace("\xa0", " ")
    assert "1 MiB  256 pages" in text
    run = run_zbudfs("top", "--picture", tmp_path / "none/it.svg", mountpoint)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)


class Terminal:
    """A real terminal of 80 x 24 in which `zbudfs top` runs. `variables` are added to its environment."""

    def __init__(self, mountpoint: Path, **variables: str) -> None:
        self._tmux = ["tmux", "-L", f"zbudfs-{os.getpid()}", "-f", "/dev/null"]
        command = (
            f"{sys.executable} -m zbudfs top --interval 0.2 {mountpoint}; echo ended with $?; sleep {LIMIT_SECONDS}"
        )
        # The terminal sets the width: pytest-xdist gives its processes another one.
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        subprocess.run(
            [*self._tmux, "-u", "new-session", "-d", "-x", "80", "-y", "24", command],
            env={**environment, "LC_ALL": "C.UTF-8", **variables},
            timeout=LIMIT_SECONDS,
            check=True,
        )

    def capture(self, *options: str) -> str:
        """Return the text on the screen; with the option "-e", with the escape sequences for colours."""
        run = subprocess.run(
            [*self._tmux, "capture-pane", "-p", *options],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        return run.stdout

    def order(self, *words: str) -> None:
        """Run a command of tmux, such as send-keys."""
        subprocess.run([*self._tmux, *words], timeout=LIMIT_SECONDS, check=True)

    def close(self) -> None:
        """End the terminal and the program in it."""
        subprocess.run([*self._tmux, "kill-server"], timeout=LIMIT_SECONDS, check=False)


@pytest.mark.needs("root", "fuse")
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_in_a_real_terminal(mountpoint: Path) -> None:
    """The screen shows the figures, obeys keys, follows the size of the terminal, and reports the death of the daemon."""
    terminal = Terminal(mountpoint)
    capture = terminal.capture
    try:
        wait_until(lambda: "256 pages" in capture() and "q Quit" in capture(), "the figures")
        terminal.order("send-keys", "-")
        wait_until(lambda: status_of(mountpoint)["pool_limit_bytes"] == 15 << 20, "the pool's limit is lowered")
        wait_until(lambda: "pool_limit_bytes=15728640" in capture(), "it is said")
        terminal.order("resize-window", "-x", "120", "-y", "40")
        wait_until(lambda: any(len(line) == 120 for line in capture().splitlines()), "the screen is wider")
        numbers = status_of(mountpoint)
        for name in ("keeper_pid", "standby_pid", "worker_pid"):
            os.kill(numbers[name], signal.SIGKILL)
        wait_until(lambda: "has died: run zbudfs umount" in " ".join(capture().split()), "the daemon's death is said")
        terminal.order("send-keys", "q")
        wait_until(lambda: "ended with 0" in capture(), "the end")
    finally:
        terminal.close()
        zbudfs("umount", mountpoint)


def fill(fd: int) -> None:
    """Write 64 MiB of pages that do not compress."""
    for number in range(64):
        os.pwrite(fd, os.urandom(1 << 20), number << 20)


@pytest.mark.needs("root", "fuse")
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
@pytest.mark.parametrize("coloured", [True, False])
def test_colours_of_a_real_terminal(coloured: bool, tmp_path: Path) -> None:
    """A full pool is failing, in red and as a word. The screen uses the colours of the terminal. With NO_COLOR it uses none."""
    with mounted(tmp_path / "mnt") as mountpoint, opened(mountpoint / "swapfile") as fd:
        with pytest.raises(OSError, match="No space left"):
            fill(fd)
        terminal = Terminal(mountpoint, **({} if coloured else {"NO_COLOR": "1"}))
        try:
            wait_until(lambda: "pool!!" in terminal.capture(), "the state of the pool")
            assert terminal.capture().startswith(" failing!!  /")
            sequences = {
                code
                for sequence in re.findall(r"\x1b\[([\d;:]*)m", terminal.capture("-e"))
                for code in re.split("[;:]", sequence)
            }
        finally:
            terminal.close()
    assert ("41" in sequences) is coloured
    colours = {code for code in sequences if re.fullmatch(r"3[0-8]|4[0-8]|9[0-7]|10[0-7]", code)}
    assert bool(colours) is coloured
    assert not colours & {"38", "48"}
