# SPDX-License-Identifier: MIT
"""The page that `zbudfs status` shows, for a terminal of 80 columns: plain text, no colours, at most MOST_LINES lines.

The problems that need action come first. The other lines say how much is stored, what it takes and saves, how full pool
and backing are, and how fast pages move. If problems need the room, the least important lines are left out, and the last
line names them.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from zbudfs.cli.remedies import problems
from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import printable, shown_path
from zbudfs.swap.loop import SwapError, swaps
from zbudfs.swap.priority import filling_order

WIDTH: Final = 79
MOST_LINES: Final = 20
"""Most lines of a page: it fits a terminal of 24 lines, with the command above and the prompt below it."""
_MOST_PROBLEM_LINES: Final = 4
"""Most lines of one problem; the rest of a longer sentence is left out."""
_BAR: Final = 24
_LABEL: Final = 11
_ROW_LABEL: Final = 15
_COLUMN: Final = 12
_PAGE_BYTES: Final = 4096

_TRAFFIC: Final = (
    ("write", "cumul_written_pages", _PAGE_BYTES, "write"),
    ("read", "cumul_read_pages", _PAGE_BYTES, "read"),
    ("discard", "cumul_discarded_pages", _PAGE_BYTES, "discard"),
    ("to disk", "cumul_writeback_bytes", 1, "writeback"),
    ("from disk", "cumul_pagein_blocks", _PAGE_BYTES, "pagein"),
)
"""Columns of the table of speeds and times: title, counter, bytes of one, prefix of the histogram."""

Numbers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Section:
    """Lines of the page that are shown together, or left out together."""

    name: str
    rank: int
    """Importance: sections of rank 0 are always shown, and a higher rank is left out first."""
    lines: Sequence[str]
    starts_group: bool = False
    """Whether an empty line stands before the section if there is room."""


def page(now: Numbers, before: Numbers | None = None, seconds: float = 0.0, *, blocks: bool = True) -> str:
    """Return the page of one mount, with speeds since `before`, which is `seconds` older; None: since the mount.

    `blocks` says whether the terminal can show block characters.
    """
    if "error" in now:
        error = _wrapped("error", str(now["error"]), MOST_LINES - 1)
        return printable("\n".join([shown_path(str(now["mountpoint"])), *error]))
    return printable("\n".join(_Page(now, before, seconds, blocks=blocks).lines()))


class _Page:
    """The page of one mount that gives numbers."""

    def __init__(self, now: Numbers, before: Numbers | None, seconds: float, *, blocks: bool) -> None:
        self._now = now
        self._before = before
        if before is None:
            seconds = time.time() - float(now.get("mounted_at") or time.time())
        elif "renewed_at" in now and "renewed_at" in before:  # public statistics contain the time of their renewal
            seconds = float(now["renewed_at"]) - float(before["renewed_at"])
        self._seconds = seconds
        self._blocks = blocks

    def _number(self, name: str) -> int:
        return int(self._now.get(name) or 0)

    def _size(self, name: str) -> str:
        return format_size(self._number(name))

    def lines(self) -> list[str]:
        """Return the lines of the page, MOST_LINES at most."""
        header, *sections = [section for section in self._sections() if section.lines]
        found = [
            _wrapped("  !" if problem.needs_action else "  -", problem.text, _MOST_PROBLEM_LINES)
            for problem in problems(self._now)
        ]
        total = sum(len(lines) for lines in [header.lines, *found, *(section.lines for section in sections)])
        room = MOST_LINES - len(header.lines) - sum(len(section.lines) for section in sections if section.rank == 0)
        room -= total > MOST_LINES  # the line that names the rest
        shown_problems: list[str] = []
        left_out: list[str] = []
        for number, lines in enumerate(found):
            if len(lines) > room:
                rest = len(found) - number
                left_out.append(f"{rest} more problem{'s'[: rest != 1]}")
                break
            shown_problems += lines
            room -= len(lines)
        shown = {section.name for section in sections if section.rank == 0}
        for section in sorted(sections, key=lambda section: section.rank):
            if section.rank and len(section.lines) > room:
                left_out.append(section.name)
            elif section.rank:
                shown.add(section.name)
                room -= len(section.lines)
        kept = [section for section in sections if section.name in shown]
        groups = sum(section.starts_group for section in kept)
        result = [*header.lines, *shown_problems]
        for section in kept:
            if section.starts_group and groups <= room:
                result.append("")
            result += section.lines
        if left_out:
            result += _wrapped("more", f"zbudfs status --json: {', '.join(left_out)}", 1)
        return result

    def _sections(self) -> Iterator[_Section]:
        instances = f", {len(self._now['instances'])} instances" if "instances" in self._now else ""
        yield _Section("header", 0, _two_ends(f"{shown_path(str(self._now['mountpoint']))}{instances}", self._daemon()))
        once = "discard once, " if "once" in each(self._now.get("discard")) else ""
        device = f"{self._size('size_bytes')}, {once}{used_by(self._now)}"
        yield _Section("device", 1, _wrapped("device", device, 2), bool(problems(self._now)))
        if order := swap_order(self._now):
            yield _Section("order of swap", 6, _wrapped("filled", order, 2))
        if self._now.get("rounded"):
            as_of = time.strftime("%H:%M:%S", time.localtime(self._number("as_of")))
            text = f"rounded, as of {as_of}; root is shown all of it, exact"
            yield _Section("public", 1, _wrapped("public", text))
        yield _Section("stored", 0, list(self._stored()), starts_group=True)
        if self._number("stored_pages") and "pers_zpages" in self._now:
            yield _Section("places", 4, _wrapped("places", self._places()))
        used, limit = self._number("pool_used_bytes"), self._number("pool_limit_bytes")
        yield _Section(
            "pool",
            0,
            _wrapped("pool", f"{self._bar(used, limit)}  {_percent(used, limit)} of {format_size(limit)}"),
            starts_group=True,
        )
        yield from self._backing()
        yield _Section("speeds and times", 3, self._table(), starts_group=True)

    def _daemon(self) -> str:
        packing = [str(self._now["packing"])] if self._now.get("packing") else []
        version, level = (
            ", ".join(dict.fromkeys(map(str, each(self._now.get(name))))) for name in ("version", "level")
        )
        parts = [f"zbudfs {version}", *packing, f"zstd level {level}"]
        parts.append("standby ready" if self._now.get("standby_ready") else "no standby yet")
        if recoveries := self._number("recoveries"):
            parts.append(f"{recoveries:,} recover{'y' if recoveries == 1 else 'ies'}")
        return ", ".join(parts)

    def _stored(self) -> Iterator[str]:
        pages = self._number("stored_pages")
        stored = pages * _PAGE_BYTES
        taken = self._number("pool_used_bytes") + self._number("backing_used_bytes")
        yield from _wrapped("stored", f"{format_size(stored)} in {pages:,} page{'s'[: pages != 1]}")
        on_disk = f", {self._size('backing_used_bytes')} on disk" if self._now.get("backing_path") else ""
        itself = f"; itself {self._size('own_bytes')} of RAM" if self._number("own_bytes") else ""
        yield from _wrapped("takes", f"{self._size('pool_used_bytes')} of RAM{on_disk}{itself}")
        if stored:
            yield from _wrapped(
                "saved",
                f"{format_size(stored - taken)} ({_percent(stored - taken, stored)}); a page takes"
                f" {taken // pages:,} of {_PAGE_BYTES:,} bytes",
            )

    def _places(self) -> str:
        """Return the shares of the pages by place."""
        total = self._number("stored_pages")
        zpages = self._number("pers_zpages") + self._number("eph_zpages")
        raw = self._number("pers_raw_count") + self._number("eph_raw_count")
        on_disk = self._number("written_back_pages")
        single = self._number("pers_unbuddied_count") + self._number("eph_unbuddied_count")
        packed = [("pairs", zpages - single), ("alone", single)]
        if self._now.get("packing", "zbud") != "zbud":  # a frame with room for more may hold several
            packed = [("packed", zpages)]
        rows = [
            *packed,
            ("raw", raw),
            ("same-filled", max(0, total - zpages - raw - on_disk)),
            *([("disk", on_disk)] if self._now.get("backing_path") else []),
        ]
        return ", ".join(f"{place} {_share(pages, total)}" for place, pages in rows)

    def _backing(self) -> Iterator[_Section]:
        path, *more = each(self._now.get("backing_path"))
        if not path:
            yield _Section("backing", 0, _wrapped("backing", "none: nothing is ever written to disk"))
            return
        used, most = self._number("backing_used_bytes"), self._number("backing_size_bytes")
        secret = "encrypted" if self._now.get("encrypted") else "not encrypted"
        lines = _wrapped("backing", f"{self._bar(used, most)}  {_percent(used, most)} of {format_size(most)}")
        if not self._number("writeback_enabled"):
            lines += _wrapped("", "writeback is off: frames are written on order alone")
        yield _Section("backing", 0, lines)
        others = f" and {len(more)} more" if more else ""
        yield _Section("path of the backing", 5, _wrapped("", f"{shown_path(str(path))}{others}, {secret}", 2))
        if written := self._number("cumul_writeback_pages"):
            text = (
                f"{written:,} pages as {self._size('cumul_writeback_bytes')};"
                f" {self._number('cumul_pagein_blocks'):,} blocks read back,"
                f" {self._number('cumul_refault_blocks'):,} of them too soon"
            )
            yield _Section("written", 4, _wrapped("written", text))
        if budget := self._number("writeback_budget_bytes_per_day"):
            used = self._number("writeback_budget_used_bytes")
            text = f"{self._bar(used, budget)}  {_percent(used, budget)} of {format_size(budget)} a day"
            yield _Section("budget", 2, _wrapped("budget", text))

    def _table(self) -> list[str]:
        """Return the table of speeds and times, with a column for each kind of traffic; times are since the mount."""
        rows = []
        if self._seconds > 0:
            speeds = [
                f"{format_size(int(self._grown(counter) * scale / self._seconds))}/s"
                for _, counter, scale, _ in _TRAFFIC
            ]
            rows.append(_row("mean speed" if self._before is None else f"speed ({_seconds(self._seconds)})", speeds))
        counts = {kind: self._now.get(f"{kind}_latency_us") or [] for *_, kind in _TRAFFIC}
        if any(map(sum, counts.values())):
            for label, percent in (("half within", 50), ("99 % within", 99)):
                rows.append(_row(label, [below(each, percent) if sum(each) else "-" for each in counts.values()]))
            longest = {kind: self._number(f"{kind}_latency_max_us") for kind in counts}
            if any(longest.values()):
                rows.append(_row("longest", [_time(longest[kind]) if longest[kind] else "-" for kind in counts]))
        return [_row("", [title for title, *_ in _TRAFFIC]), *rows] if rows else []

    def _grown(self, name: str) -> int:
        return self._number(name) - int((self._before or {}).get(name) or 0)

    def _bar(self, part: int, whole: int) -> str:
        full = min(_BAR, round(_BAR * part / whole)) if whole and part > 0 else 0
        full = max(full, int(part > 0))
        return ("█" if self._blocks else "#") * full + ("░" if self._blocks else ".") * (_BAR - full)


def each(value: Any) -> list[Any]:
    """Return the values of the instances if they differ, or a list with the one value."""
    return value if isinstance(value, list) else [value]


def below(counts: Sequence[int], percent: int) -> str:
    """Return the time below which `percent` of a latency histogram is, such as "64 us". Buckets are powers of two in us."""
    wanted = -(-sum(counts) * percent // 100)
    seen = bucket = 0
    while (seen := seen + counts[bucket]) < wanted:
        bucket += 1
    return _time(1 << bucket)


def _time(microseconds: int) -> str:
    if microseconds < 1000:
        return f"{microseconds} us"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.3g} ms"
    return f"{microseconds / 1_000_000:.3g} s"


def used_by(report: Numbers) -> str:
    """Return the users of a mount, and how much of its swap is used."""
    names = report.get("users") or []
    try:
        used = {f"swap on {swap.path}": swap.used_bytes for swap in swaps()}
    except (OSError, SwapError):
        used = {}
    return (
        ", ".join(f"{name} ({format_size(used[name])} used)" if name in used else name for name in names)
        or "not in use"
    )


def swap_order(report: Numbers) -> str:
    """Return a text on the swap that the kernel fills first; empty if the mount has the only swap, or none."""
    ours = [
        str(name).removeprefix("swap on ") for name in report.get("users") or () if str(name).startswith("swap on ")
    ]
    try:
        return filling_order(swaps(), ours, "zbudfs") if ours else ""
    except (OSError, SwapError):
        return ""


def _two_ends(left: str, right: str) -> list[str]:
    """Return `left` and `right` on one line, or on two if they are too long for one."""
    gap = WIDTH - len(left) - len(right)
    return [f"{left}{' ' * gap}{right}"] if gap >= 2 else [left, *_broken("  ", right, 1)]


def _row(label: str, cells: Sequence[str]) -> str:
    return f"  {label:{_ROW_LABEL}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _wrapped(label: str, text: str, most: int | None = None) -> list[str]:
    """Return `text` in lines with a label in front, `most` lines at most."""
    return _broken(f"{label} " if label in ("  !", "  -") else f"  {label:{_LABEL}}", text, most)


def _broken(head: str, text: str, most: int | None) -> list[str]:
    """Return `text` in lines with `head` before the first line. A word that is too long gets its own line."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" ...",
    ) or [head.rstrip()]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _share(part: int, whole: int) -> str:
    """Return a percentage without digits after the point; "<1 %" for a small part that is not 0."""
    percent = round(100 * part / whole) if whole else 0
    return "<1 %" if part > 0 and percent == 0 else f"{percent} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
