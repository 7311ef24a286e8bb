# SPDX-License-Identifier: MIT
"""The screen of `zbudfs top`.

    mount, and its state                       normal, near the limit, or failing
    summary      | charts over time:           pool, disk, and the rates in and out of both
    latencies    |
    zpages and   |
    frames by    |
    size         |
    the worst problem, an input line when a value is to be set, keys

All colours are those of the terminal, so that the screen suits a light terminal too. A state has a mark beside its colour.

A thread asks the mount (`Asker`), with a limit; the screen only ever waits for messages. So neither a daemon that hangs nor
one that has died holds the screen up: it says how long there was no answer, and the keys work.
"""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult, ScreenStackError
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Footer, Input, Static

from zbudfs.cli import tuning
from zbudfs.cli.ask import all_numbers, why_silent
from zbudfs.cli.history import History
from zbudfs.cli.remedies import problems
from zbudfs.cli.states import State, states
from zbudfs.cli.top_widgets import STYLES, Axis, Chart, Charts, gauge, plain, shown_time
from zbudfs.core.codec import MAX_LEVEL, MIN_LEVEL
from zbudfs.core.sizes import format_size
from zbudfs.core.units import PAGE_SIZE
from zbudfs.service.mountpoint import printable, shown_path, zbudfs_mounts

ANSWER_LIMIT_SECONDS: Final = 5.0
"""Longest wait for an answer, after which the screen says so. A worker that hangs is replaced within this time."""

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
    "latency": f"latency of {', '.join(f'{percent:g} %' for percent in _PERCENTS)}",
    "sizes": "zpages, frames with room: size",
    "trends": "over time",
}
"""Titles of the panels, by name."""
_ROOT_ONLY: Final = "for root alone"
_ROUNDED: Final = "rounded: exact for root"
_ASKING: Final = "asking ..."
_SIZE_LABELS: Final = ("0", f"{PAGE_SIZE // 2}", f"{PAGE_SIZE} B")
"""Labels of the axis of sizes, in bytes."""
_THEMES: Final = ("textual-ansi", "ansi-dark")
"""Names of the theme with the terminal's own colours: before textual 8, and since."""
_POOL_STEPS: Final = 16
"""Parts of the pool by which + and - change its limit."""


class Answer(Message):
    """The message with the numbers of a mount, or with the reason why there are none."""

    def __init__(
        self, mountpoints: list[str], mountpoint: str | None, numbers: dict[str, Any] | None, why: str
    ) -> None:
        super().__init__()
        self.mountpoints = mountpoints
        """Mountpoints of all zbudfs mounts."""
        self.mountpoint = mountpoint
        """Mountpoint that was asked; None if there is no mount."""
        self.numbers = numbers
        self.why = why


Ask = Callable[[str | None], Answer]
"""Function that asks a mount, or the first mount if it gets None. It may take a while."""


def ask_mount(wanted: str | None) -> Answer:
    """Return the answer of a mount, or the reason why there is none, within ANSWER_LIMIT_SECONDS."""
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
    """A thread that asks one mount again and again, and passes the answers on. It ends with the process."""

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
        """Ask this mount now, and from now on."""
        self._wanted = mountpoint
        self._at_once.set()

    def run(self) -> None:
        """Ask as long as `pass_on` accepts the answers."""
        while self._pass_on(self._ask(self._wanted)):
            self._at_once.wait(self._interval_seconds)
            self._at_once.clear()


class Top(App[None]):
    """The live view of one mount at a time."""

    TITLE = "zbudfs top"
    CSS = """
    #title { dock: top; height: 1; background: ansi_blue; color: ansi_bright_white; text-style: bold; }
    #title.near, #warnings.near { background: ansi_yellow; color: ansi_black; text-style: bold; }
    #title.failing, #warnings.failing { background: ansi_red; color: ansi_bright_white; text-style: bold; }
    #title { text-wrap: nowrap; text-overflow: ellipsis; }
    #panels { height: 1fr; }
    #left { width: 45%; min-width: 36; }
    .panel { border: round ansi_blue; height: 1fr; text-wrap: nowrap; }
    #summary, #latency { height: 7; }
    #left .panel { width: 100%; }
    #trends { width: 1fr; }
    Screen.ascii .panel { border: ascii ansi_blue; }
    #warnings { height: auto; }
    #entry { display: none; height: 3; }
    #entry.shown { display: block; }
    Screen.silent .panel { text-style: dim; }
    """
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = ""  # keys are commands until the input line is shown
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
        super().__init__(ansi_color=True)
        self._unicode = unicode
        self._mountpoint = mountpoint
        self._mountpoints: list[str] = []
        self._histories: dict[str, History] = {}
        self._asker = Asker(ask, mountpoint, interval_seconds, self.post_message)
        self._interval_seconds = interval_seconds
        self._picture: tuple[str, float] | None = None
        self._answered_at: float | None = None
        self._why = _ASKING
        # Held here, not looked up: an answer may come while the screen is on its way out.
        self._title_line = Static(id="title")
        self._problem_line = Static(id="warnings")
        self._texts = {name: Static(id=name, classes="panel") for name in ("summary", "latency")}
        self._charts = {name: Charts(id=name, classes="panel") for name in ("sizes", "trends")}
        for name, panel in {**self._texts, **self._charts}.items():
            panel.border_title = _PANELS[name]
        for charts in self._charts.values():
            charts.unicode = unicode

    def draw_to(self, path: str, seconds: float) -> None:
        """Make the app write its screen to an SVG file after `seconds`, and end. Called before the app runs."""
        self._picture = path, seconds

    # ---- what is on it ---------------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """Yield the panels."""
        yield self._title_line
        with Horizontal(id="panels"):
            with Vertical(id="left"):
                yield from self._texts.values()
                yield self._charts["sizes"]
            yield self._charts["trends"]
        yield self._problem_line
        yield Input(id="entry", placeholder="KEY=VALUE, such as pool_limit_bytes=512M (Enter sets it, Escape leaves)")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to ask."""
        self.theme = next(name for name in _THEMES if name in self.available_themes)
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
            return  # the answer of a mount that is no longer shown
        self._why = answer.why
        if answer.numbers is not None and self._mountpoint is not None:
            self._histories.setdefault(self._mountpoint, History()).add(time.monotonic(), answer.numbers)
        self._answered_at = time.monotonic()
        self._show()

    def _show_silence(self) -> None:
        """Show a message if the asker has waited for long."""
        if self._answered_at is not None and not self._why and self.screen_stack:
            waited = time.monotonic() - self._answered_at
            if waited > 2 * ANSWER_LIMIT_SECONDS:
                self._say(f"no answer for {waited:.0f} s", State.FAILING)

    # ---- showing ---------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        history = self._histories.get(self._mountpoint or "")
        numbers = history.last if history is not None else None
        try:
            self.screen.set_class(bool(self._why), "silent")
        except ScreenStackError:
            return  # it is ending
        found = states(numbers, history.recent) if history is not None and numbers is not None else {}
        worst = max(found.values(), default=State.NORMAL)
        self._show_title(numbers, worst)
        if self._why:
            self._say(self._why, State.NORMAL if self._why == _ASKING else State.FAILING)
        else:
            texts = [problem.text for problem in problems({**(numbers or {}), "mountpoint": self._mountpoint})]
            number = f"(1 of {len(texts)}) " if len(texts) > 1 else ""
            self._say(f"{number}{texts[0]}" if texts else "", worst)
        if history is None or numbers is None:
            return
        summary = self._texts["summary"]
        summary.border_subtitle = _remarks(numbers, found)
        self._put(summary, _summary(numbers, history, found, summary.content_size.width))
        self._put(self._texts["latency"], _latency(history))
        sizes = self._charts["sizes"]
        sizes.border_subtitle = _contents(numbers)
        sizes.show(_sizes(numbers), Axis(lambda _: _SIZE_LABELS, is_time=False))
        interval_seconds = history.interval_seconds() or self._interval_seconds
        axis = Axis(lambda width: _time_labels(width * interval_seconds), is_time=True)
        self._charts["trends"].show(_trends(history, numbers, found), axis)

    def _put(self, panel: Static, text: Text) -> None:
        """Show a text in a panel, with the characters that the terminal has."""
        panel.update(text if self._unicode else plain(text))

    def _show_title(self, numbers: Mapping[str, Any] | None, state: State) -> None:
        self._title_line.update(Text(self._title_text(numbers, state), no_wrap=True))
        _set_state(self._title_line, state)

    def _title_text(self, numbers: Mapping[str, Any] | None, state: State) -> str:
        if self._mountpoint is None:
            return " zbudfs top"
        word = "no answer" if self._why else f"{state.word}{state.mark}"
        parts = [
            f" {'zbudfs top' if numbers is None or self._why == _ASKING else word}  {shown_path(self._mountpoint)}"
        ]
        if len(self._mountpoints) > 1 and self._mountpoint in self._mountpoints:
            parts.append(f" ({self._mountpoints.index(self._mountpoint) + 1} of {len(self._mountpoints)})")
        if numbers is not None:
            standby = "standby ready" if numbers.get("standby_ready") else f"no standby{State.NEAR.mark}"
            parts.append(f"  {format_size(int(numbers['size_bytes']))}, level {numbers['level']}, {standby}")
        return "".join(parts)

    def _say(self, text: str, state: State) -> None:
        """Show a sentence in one or two lines above the keys, or no line if there is none."""
        self._problem_line.display = bool(text)
        head = f" {state.mark or '!'} "
        lines = textwrap.wrap(
            printable(text),
            max(self.size.width, 20),
            initial_indent=head,
            subsequent_indent=" " * len(head),
            max_lines=2,
            placeholder=" ...",
        )
        self._problem_line.update(Text("\n".join(lines), no_wrap=True))
        _set_state(self._problem_line, state)

    # ---- keys --------------------------------------------------------------------------------------------------------

    def action_next_mount(self) -> None:
        """Show the next mount."""
        if not self._mountpoints:
            return
        at = self._mountpoints.index(self._mountpoint) if self._mountpoint in self._mountpoints else -1
        self._mountpoint = self._mountpoints[(at + 1) % len(self._mountpoints)]
        self._why = _ASKING
        self._asker.ask(self._mountpoint)
        self._show()

    def action_enter(self) -> None:
        """Show the input line for KEY=VALUE."""
        entry = self.query_one("#entry", Input)
        entry.add_class("shown")
        entry.value = ""
        entry.focus()

    def action_leave(self) -> None:
        """Hide the input line."""
        self.query_one("#entry", Input).remove_class("shown")
        self.set_focus(None)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Set the typed values."""
        self.action_leave()
        if event.value.strip():
            self._set(event.value.split())

    def action_order(self, name: str, value: str) -> None:
        """Set one value, or give an order."""
        self._set([f"{name}={value}"])

    def action_toggle_writeback(self) -> None:
        """Turn writeback on or off."""
        self._set([f"writeback_enabled={int(not self._number('writeback_enabled'))}"])

    def action_pool(self, direction: int) -> None:
        """Raise or lower the pool's limit by a part of the pool, within the allowed range."""
        whole = self._number("pool_configured_bytes")
        step = max(whole // _POOL_STEPS // PAGE_SIZE, 1) * PAGE_SIZE
        wanted = min(max(self._number("pool_limit_bytes") + direction * step, step), whole)
        self._set([f"pool_limit_bytes={wanted}"])

    def action_level(self, direction: int) -> None:
        """Set the next higher or lower zstd level, without 0."""
        level = self._number("level") + direction
        self._set([f"level={min(max(level or direction, MIN_LEVEL), MAX_LEVEL)}"])

    def _number(self, name: str) -> int:
        history = self._histories.get(self._mountpoint or "")
        return int((history.last or {}).get(name) or 0) if history is not None else 0

    @work(thread=True, exit_on_error=False)
    def _set(self, typed: Sequence[str]) -> None:
        """Set values in a thread, and show the result."""
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


# ---- the content of the panels ---------------------------------------------------------------------------------


def _set_state(panel: Static, state: State) -> None:
    panel.set_class(state is State.NEAR, "near")
    panel.set_class(state is State.FAILING, "failing")


def _summary(numbers: Mapping[str, Any], history: History, found: Mapping[str, State], width: int) -> Text:
    """Return the lines of the first panel: each begins with the name of a figure and the mark of its state."""
    pages = int(numbers.get("stored_pages") or 0)
    stored = pages * PAGE_SIZE
    used, limit = int(numbers.get("pool_used_bytes") or 0), int(numbers.get("pool_limit_bytes") or 0)
    disk, size = int(numbers.get("backing_used_bytes") or 0), int(numbers.get("backing_size_bytes") or 0)
    saved = stored - used - disk
    hits = history.hit_ratio()
    wide = max(width - 27, 4)
    lines = [
        ("stored", f"{format_size(stored):>10}  {pages:,} pages"),
        ("saved", f"{format_size(saved):>10}  {_percent(saved, stored)}"),
        ("pool", f"{format_size(used):>10}  {gauge(used, limit, wide)} {_percent(used, limit)}"),
        (
            "disk",
            f"{format_size(disk):>10}  {gauge(disk, size, wide)} {_percent(disk, size)}" if size else "      none",
        ),
        ("hits", f"{f'{100 * hits:.2f} %':>10} in RAM" if hits is not None else "nothing was read"),
    ]
    text = Text(no_wrap=True)
    for number, (name, rest) in enumerate(lines):
        state = found.get(name, State.NORMAL)
        text.append("\n" if number else "")
        text.append(f"{name + state.mark:<6}", STYLES[state])
        text.append(f" {rest}")
    return text


def _remarks(numbers: Mapping[str, Any], found: Mapping[str, State]) -> str:
    """Return the number of lost pages and refused writes, and the state of writeback."""
    state = found["writeback"]
    if not numbers.get("backing_path"):
        writeback = "no writeback"
    elif state is State.FAILING:
        writeback = "writeback fails" if found["disk"] is State.FAILING else "budget used up"
    elif not numbers.get("writeback_enabled"):
        writeback = "writeback off"
    else:
        writeback = "writeback on" if state is State.NORMAL else "budget nearly used up"
    counts = [
        f"{int(numbers[name]):,} {figure}{found[figure].mark}"
        for figure, name in (("lost", "lost_pages"), ("refused", "refused_pool_full"))
        if numbers.get(name)
    ]
    return ", ".join([*counts, f"{writeback}{state.mark}"])


def _contents(numbers: Mapping[str, Any]) -> str:
    """Return the shares of the pages that are no zpages."""
    if "raw_pages" not in numbers:
        return _ROUNDED
    pages, same, raw = (int(numbers.get(name) or 0) for name in ("stored_pages", "same_filled_pages", "raw_pages"))
    return f"{_percent(same, pages)} same, {_percent(raw, pages)} raw"


def _sizes(numbers: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of zpages by their size, and of frames with room by the size of their content."""
    charts = []
    for name, key, what in (("zpages", "chunk_histogram", "zpages"), ("frames", "unbuddied_lists", "of them")):
        counts = numbers.get(key) or []
        now = f"{sum(counts):,} {what}" if counts else _ROOT_ONLY
        charts.append(Chart(name, counts[1:], lambda value: f"{value:,.0f}", now))
    return charts


def _trends(history: History, numbers: Mapping[str, Any], found: Mapping[str, State]) -> list[Chart]:
    """Return the charts over time: the fill of pool and disk below their limits, and the rates."""
    charts = []
    rates = list(_RATES)
    rooms = [("pool", "pool_used_bytes", "pool_limit_bytes"), ("disk", "backing_used_bytes", "backing_size_bytes")]
    if not numbers.get("backing_size_bytes"):
        rooms, rates = rooms[:1], [rate for rate in rates if "disk" not in rate[0]]
    for name, used, most in rooms:
        now = format_size(int(numbers.get(used) or 0))
        limit = float(numbers.get(most) or 0)
        charts.append(Chart(name, history.values(used), lambda value: format_size(int(value)), now, limit, found[name]))
    for name, counter, size in rates:
        values = [rate * size for rate in history.rates(counter)]
        charts.append(Chart(name, values, _per_second, _per_second(values[-1] if values else 0)))
    return charts


def _per_second(value: float) -> str:
    return f"{format_size(round(value))}/s"


def _time_labels(seconds: float) -> Sequence[str]:
    """Return the labels of a time axis that begins `seconds` ago."""
    return (*(f"-{_shown_seconds(each)}" for each in (seconds, seconds / 2)), "now")


def _shown_seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.3g} min"


def _latency(history: History) -> Text:
    """Return a line for each kind of request with its percentiles."""
    lines = []
    for kind in _LATENCIES:
        found = history.latencies_us(kind, _PERCENTS)
        lines.append(f"{kind:9}" + ("".join(f"{shown_time(us):>8}" for us in found) if found else f"{'-':>8}" * 3))
    return Text("\n".join(lines), no_wrap=True)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
