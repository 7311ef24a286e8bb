# SPDX-License-Identifier: MIT
"""The screen of `zbudfs top`.

    summary    | pool, backing and hits over time
    rates      | latencies
    sizes      | unbuddied lists
    warnings, an input line when something is to be set, keys

A thread asks the mount (`Asker`), with a limit; the screen only ever waits for messages. So neither a daemon that hangs nor
one that has died holds the screen up: it says how long there was no answer, and the keys work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult, ScreenStackError
from textual.binding import Binding, BindingType
from textual.containers import Grid
from textual.message import Message
from textual.widgets import Footer, Input, Static

from zbudfs.cli import tuning
from zbudfs.cli.ask import all_numbers, why_silent
from zbudfs.cli.history import History
from zbudfs.cli.sparkline import sparkline
from zbudfs.cli.top_widgets import Bars, gauge, plain, shown_time
from zbudfs.core.codec import MAX_LEVEL, MIN_LEVEL
from zbudfs.core.sizes import format_size
from zbudfs.core.units import PAGE_SIZE, SIZE_CLASS_BYTES
from zbudfs.service.mountpoint import printable, shown_path, zbudfs_mounts

ANSWER_LIMIT_SECONDS: Final = 5.0
"""Longest wait for an answer before it is said that there is none; a daemon that hangs is replaced within that time."""

_RATES: Final = (
    ("written", "cumul_written_pages", PAGE_SIZE),
    ("read", "cumul_read_pages", PAGE_SIZE),
    ("discarded", "cumul_discarded_pages", PAGE_SIZE),
    ("to disk", "cumul_writeback_bytes", 1),
    ("from disk", "cumul_pagein_blocks", PAGE_SIZE),
)
"""Name, counter, bytes of one."""
_LATENCIES: Final = ("read", "write", "discard", "pagein", "writeback")
_PERCENTS: Final = (50, 99, 99.9)
_PANELS: Final = {
    "summary": "stored",
    "trends": "over time",
    "rates": "rates",
    "latency": "latency",
    "sizes": "zpages by size",
    "unbuddied": "frames with room, by what they use",
}
"""By the name of a panel: its title."""
_ROOT_ONLY: Final = "for root alone"
_ROUNDED: Final = "       rounded: exact for root"
_POOL_STEPS: Final = 16
"""Parts of the pool by which + and - change its limit."""


class Answer(Message):
    """What a mount said, or why it said nothing."""

    def __init__(
        self, mountpoints: list[str], mountpoint: str | None, numbers: dict[str, Any] | None, why: str
    ) -> None:
        super().__init__()
        self.mountpoints = mountpoints
        """All that are mounted."""
        self.mountpoint = mountpoint
        """The one that was asked; None: there was none to ask."""
        self.numbers = numbers
        self.why = why


Ask = Callable[[str | None], Answer]
"""Asks a mount, or the first there is; may take a while."""


def ask_mount(wanted: str | None) -> Answer:
    """Return what the mount says, or why it says nothing, within ANSWER_LIMIT_SECONDS."""
    try:
        mountpoints = [mount.mountpoint for mount in zbudfs_mounts()]
    except OSError as error:
        return Answer([], wanted, None, str(error))
    mountpoint = wanted if wanted is not None or not mountpoints else mountpoints[0]
    if mountpoint is None:
        return Answer([], None, None, "no zbudfs is mounted")
    if mountpoint not in mountpoints:
        return Answer(mountpoints, mountpoint, None, f"no zbudfs is mounted on {shown_path(mountpoint)}")
    try:
        return Answer(mountpoints, mountpoint, all_numbers(mountpoint, ANSWER_LIMIT_SECONDS), "")
    except (OSError, ValueError) as error:
        return Answer(mountpoints, mountpoint, None, why_silent(mountpoint, error))


class Asker(threading.Thread):
    """Asks one mount again and again, and passes on what it says. Ends with the process."""

    def __init__(
        self, ask: Ask, wanted: str | None, interval_seconds: float, pass_on: Callable[[Answer], bool]
    ) -> None:
        super().__init__(name="asker", daemon=True)
        self._ask = ask
        self._wanted = wanted
        self._interval_seconds = interval_seconds
        self._pass_on = pass_on
        self._at_once = threading.Event()

    def ask(self, mountpoint: str | None) -> None:
        """Ask this mount from now on, and at once."""
        self._wanted = mountpoint
        self._at_once.set()

    def run(self) -> None:
        """Ask as long as there is somebody to pass it on to."""
        while self._pass_on(self._ask(self._wanted)):
            self._at_once.wait(self._interval_seconds)
            self._at_once.clear()


class Top(App[None]):
    """The live view of one mount at a time."""

    TITLE = "zbudfs top"
    CSS = """
    #title { dock: top; height: 1; background: $primary; color: $text; text-style: bold; }
    #title, #warnings { text-wrap: nowrap; text-overflow: ellipsis; }
    #panels { grid-size: 2; grid-columns: 1fr 1fr; grid-rows: 8 8 1fr; height: 1fr; min-height: 19; }
    .panel { border: round $primary; padding: 0 1; height: 100%; text-wrap: nowrap; }
    Screen.ascii .panel { border: ascii $primary; }
    #warnings { height: 1; color: $warning; }
    #warnings.error { color: $error; text-style: bold; }
    #entry { display: none; height: 3; }
    #entry.shown { display: block; }
    Screen.silent .panel { opacity: 50%; }
    """
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = ""  # keys are orders until the input line is asked for
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("tab", "next_mount", "Next mount", priority=True),
        Binding("s", "enter", "Set"),
        Binding("w", "order('writeback', 'all')", "Write back"),
        Binding("d", "order('drop_ephemeral', '1')", "Drop clean"),
        Binding("b", "toggle_writeback", "Writeback on/off"),
        Binding("plus,equals_sign", "pool(1)", "Pool", key_display="+/-"),
        Binding("minus", "pool(-1)", "Pool -", show=False),
        Binding("right_square_bracket", "level(1)", "Level", key_display="[/]"),
        Binding("left_square_bracket", "level(-1)", "Level -", show=False),
        Binding("escape", "leave", "Back", show=False),
    ]

    def __init__(
        self, mountpoint: str | None, interval_seconds: float, ask: Ask = ask_mount, *, unicode: bool = True
    ) -> None:
        super().__init__()
        self._unicode = unicode
        self._mountpoint = mountpoint
        self._mountpoints: list[str] = []
        self._histories: dict[str, History] = {}
        self._asker = Asker(ask, mountpoint, interval_seconds, self.post_message)
        self._picture: tuple[str, float] | None = None
        self._answered_at: float | None = None
        self._why = "asking ..."
        # Held here, not looked up: an answer may come while the screen is on its way out.
        self._panels = {name: Static(id=name) for name in ("title", "warnings")}
        self._panels |= {name: Static(id=name, classes="panel") for name in ("summary", "trends", "rates", "latency")}
        self._bars = {name: Bars(id=name, classes="panel") for name in ("sizes", "unbuddied")}
        for bars in self._bars.values():
            bars.unicode = unicode

    def _drawn(self, lines: Sequence[str]) -> Text:
        """Return the lines of a panel, with the characters that the terminal shows."""
        return _lines(lines if self._unicode else [plain(line) for line in lines])

    def draw_to(self, path: str, seconds: float) -> None:
        """Before it runs: write what is on the screen after so long to an SVG file, and end."""
        self._picture = path, seconds

    # ---- what is on it ---------------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """The panels."""
        yield self._panels["title"]
        with Grid(id="panels"):
            for name, title in _PANELS.items():
                panel = self._panels[name] if name in self._panels else self._bars[name]
                panel.border_title = title
                yield panel
        yield self._panels["warnings"]
        yield Input(id="entry", placeholder="KEY=VALUE, such as pool_limit_bytes=512M (Enter sets it, Escape leaves)")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to ask."""
        self.theme = "textual-dark"
        self.screen.set_class(not self._unicode, "ascii")
        self._asker.start()
        self.set_interval(0.5, self._show_silence)
        if self._picture is not None:
            path, seconds = self._picture
            self.set_timer(seconds, lambda: self._draw(path))
        self._show()

    def _draw(self, path: str) -> None:
        try:
            Path(path).write_text(self.export_screenshot(title="zbudfs top"), encoding="utf-8")
        except OSError as error:
            self.exit(return_code=1, message=f"zbudfs: {error}")
        else:
            self.exit()

    def on_resize(self) -> None:
        """Draw again for the new size."""
        self.call_after_refresh(self._show)

    # ---- what comes in ---------------------------------------------------------------------------------------------

    def on_answer(self, answer: Answer) -> None:
        """Take a mount's numbers, or the reason why there are none."""
        self._mountpoints = answer.mountpoints
        if self._mountpoint is None:
            self._mountpoint = answer.mountpoint
            if self._mountpoint is not None:
                self._asker.ask(self._mountpoint)
        if answer.mountpoint != self._mountpoint:
            return  # asked before another one was chosen
        self._why = answer.why
        if answer.numbers is not None and self._mountpoint is not None:
            self._histories.setdefault(self._mountpoint, History()).add(time.monotonic(), answer.numbers)
        self._answered_at = time.monotonic()
        self._show()

    def _show_silence(self) -> None:
        """Say so when the asker has waited for long."""
        if self._answered_at is not None and not self._why and self.screen_stack:
            waited = time.monotonic() - self._answered_at
            if waited > 2 * ANSWER_LIMIT_SECONDS:
                self._say(f"no answer for {waited:.0f} s", error=True)

    # ---- showing ---------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        history = self._histories.get(self._mountpoint or "")
        numbers = history.last if history is not None else None
        try:
            self.screen.set_class(bool(self._why), "silent")
        except ScreenStackError:
            return  # it is ending
        self._panel("title").update(self._title(numbers or {}))
        if self._why:
            self._say(self._why, error=True)
        else:
            self._say("; ".join((numbers or {}).get("warnings", ())), error=False)
        if history is None or numbers is None:
            return
        self._panel("summary").update(self._drawn(_summary(numbers, self._width("summary"))))
        self._panel("trends").update(self._drawn(_trends(history, self._width("trends"))))
        self._panel("rates").update(self._drawn(_rates(history, self._width("rates"))))
        self._panel("latency").update(self._drawn(_latency(history)))
        sizes = numbers.get("chunk_histogram") or []
        unit = f"0 to {len(sizes) * SIZE_CLASS_BYTES} bytes"
        self._bars["sizes"].show(sizes[1:], f"{unit}; {sum(sizes):,} zpages" if sizes else _ROOT_ONLY)
        lists = numbers.get("unbuddied_lists") or []
        self._bars["unbuddied"].show(lists[1:], f"{unit}; {sum(lists):,} of them" if lists else _ROOT_ONLY)

    def _title(self, numbers: Mapping[str, Any]) -> str:
        if self._mountpoint is None:
            return " zbudfs top"
        parts = [f" zbudfs top  {shown_path(self._mountpoint)}"]
        if len(self._mountpoints) > 1 and self._mountpoint in self._mountpoints:
            parts.append(f" ({self._mountpoints.index(self._mountpoint) + 1} of {len(self._mountpoints)})")
        if numbers:
            standby = "standby ready" if numbers.get("standby_ready") else "no standby"
            parts.append(f"  {format_size(int(numbers['size_bytes']))}, level {numbers['level']}, {standby}")
        return "".join(parts)

    def _say(self, text: str, *, error: bool) -> None:
        panel = self._panel("warnings")
        panel.set_class(error, "error")
        panel.display = bool(text)
        panel.update(Text(printable(f" ! {text}"), no_wrap=True))

    def _panel(self, name: str) -> Static:
        return self._panels[name]

    def _width(self, name: str) -> int:
        return max(self._panel(name).content_size.width, 20)

    # ---- keys --------------------------------------------------------------------------------------------------------

    def action_next_mount(self) -> None:
        """Show the next of the mounts."""
        if not self._mountpoints:
            return
        at = self._mountpoints.index(self._mountpoint) if self._mountpoint in self._mountpoints else -1
        self._mountpoint = self._mountpoints[(at + 1) % len(self._mountpoints)]
        self._why = "asking ..."
        self._asker.ask(self._mountpoint)
        self._show()

    def action_enter(self) -> None:
        """Have the user type what to set."""
        entry = self.query_one("#entry", Input)
        entry.add_class("shown")
        entry.value = ""
        entry.focus()

    def action_leave(self) -> None:
        """Away with the input line."""
        self.query_one("#entry", Input).remove_class("shown")
        self.set_focus(None)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Set what was typed."""
        self.action_leave()
        if event.value.strip():
            self._set(event.value.split())

    def action_order(self, name: str, value: str) -> None:
        """Give an order."""
        self._set([f"{name}={value}"])

    def action_toggle_writeback(self) -> None:
        """Writeback on or off."""
        self._set([f"writeback_enabled={int(not self._number('writeback_enabled'))}"])

    def action_pool(self, direction: int) -> None:
        """Raise or lower the pool's limit by a part of the pool, within what is allowed."""
        whole = self._number("pool_configured_bytes")
        step = max(whole // _POOL_STEPS // PAGE_SIZE, 1) * PAGE_SIZE
        wanted = min(max(self._number("pool_limit_bytes") + direction * step, step), whole)
        self._set([f"pool_limit_bytes={wanted}"])

    def action_level(self, direction: int) -> None:
        """The next zstd level up or down; there is no 0."""
        level = self._number("level") + direction
        self._set([f"level={min(max(level or direction, MIN_LEVEL), MAX_LEVEL)}"])

    def _number(self, name: str) -> int:
        history = self._histories.get(self._mountpoint or "")
        return int((history.last or {}).get(name) or 0) if history is not None else 0

    @work(thread=True, exit_on_error=False)
    def _set(self, typed: Sequence[str]) -> None:
        """Set values, in a thread, and say what came of it."""
        mountpoint = self._mountpoint
        if mountpoint is None:
            return
        try:
            wanted = tuning.pairs(typed)
            tuning.check(wanted, mountpoint)
            tuning.apply(wanted, mountpoint)
        except PermissionError:
            self.call_from_thread(self.notify, "only root may change it", severity="error")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.call_from_thread(self.notify, why, severity="error")
        else:
            self.call_from_thread(self.notify, ", ".join(typed))
            self._asker.ask(mountpoint)


# ---- the panels' texts -------------------------------------------------------------------------------------------


def _lines(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), no_wrap=True)


def _summary(numbers: Mapping[str, Any], width: int) -> list[str]:
    pages = int(numbers.get("stored_pages") or 0)
    stored = pages * PAGE_SIZE
    used, limit = int(numbers.get("pool_used_bytes") or 0), int(numbers.get("pool_limit_bytes") or 0)
    disk, size = int(numbers.get("backing_used_bytes") or 0), int(numbers.get("backing_size_bytes") or 0)
    saved = stored - used - disk
    same, raw = int(numbers.get("same_filled_pages") or 0), int(numbers.get("raw_pages") or 0)
    wide = max(width - 27, 4)
    return [
        f"stored {format_size(stored):>10}  {pages:,} pages",
        f"       {_percent(same, pages)} same, {_percent(raw, pages)} raw" if "raw_pages" in numbers else _ROUNDED,
        f"saved  {format_size(saved):>10}  {_percent(saved, stored)}",
        f"pool   {format_size(used):>10}  {gauge(used, limit, wide)} {_percent(used, limit)}",
        f"disk   {format_size(disk):>10}  " + (f"{gauge(disk, size, wide)} {_percent(disk, size)}" if size else "none"),
        _troubles(numbers) or f"limit  {format_size(limit):>10}  writeback {_writeback(numbers)}",
    ]


def _writeback(numbers: Mapping[str, Any]) -> str:
    if not numbers.get("backing_path"):
        return "impossible"
    return "on" if numbers.get("writeback_enabled") else "off"


def _troubles(numbers: Mapping[str, Any]) -> str:
    found = [
        f"{int(numbers[name]):,} {what}"
        for name, what in (("refused_pool_full", "refused"), ("lost_pages", "lost"), ("writeback_failures", "failed"))
        if numbers.get(name)
    ]
    return ", ".join(found)


def _trends(history: History, width: int) -> list[str]:
    wide = max(width - 6, 4)
    pool, disk = history.values("pool_used_bytes", wide), history.values("backing_used_bytes", wide)
    ratio = history.hit_ratio()
    return [
        f"pool  {sparkline(pool, unicode=True)}",
        f"      at most {format_size(int(max(pool, default=0)))}",
        f"disk  {sparkline(disk, unicode=True)}",
        f"      at most {format_size(int(max(disk, default=0)))}",
        "hits  " + (f"{100 * ratio:.2f} % in RAM" if ratio is not None else "nothing was read"),
    ]


def _rates(history: History, width: int) -> list[str]:
    lines = []
    for name, counter, size in _RATES:
        bars = sparkline(history.rates(counter, max(width - 24, 4)), unicode=True)
        lines.append(f"{name:9} {format_size(round(history.rate(counter) * size)):>11}/s {bars}")
    return lines


def _latency(history: History) -> list[str]:
    lines = [" " * 9 + "".join(f"{f'{percent:g} %':>9}" for percent in _PERCENTS)]
    for kind in _LATENCIES:
        found = history.latencies_us(kind, _PERCENTS)
        lines.append(f"{kind:9}" + ("".join(f"{shown_time(us):>9}" for us in found) if found else f"{'-':>9}" * 3))
    return lines


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
