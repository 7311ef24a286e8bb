# SPDX-License-Identifier: MIT
"""The page that `zbudfs status` shows, for a terminal of 80 columns: plain text, no colours, from two samples of the numbers.

It answers in the order of the questions: what is stored, what does that take, what is saved; where is it; how full is it;
how fast is it; is anything wrong, and what is to be done.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from zbudfs.cli.remedies import remedies
from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import printable, shown_path
from zbudfs.swap.loop import SwapError, swaps
from zbudfs.swap.priority import filling_order

WIDTH: Final = 79
_BAR: Final = 24
_LABEL: Final = 11
_PAGE_BYTES: Final = 4096
_TIGHT: Final = "\xa0"
"""A space at which no line is broken."""

Numbers = Mapping[str, Any]


def page(now: Numbers, before: Numbers | None = None, seconds: float = 0.0, *, blocks: bool = True) -> str:
    """Return the page for one mount; speeds since `before`, which is `seconds` older, or else since the mount.

    `blocks` tells whether the terminal can show block characters.
    """
    if "error" in now:
        return printable("\n".join([shown_path(str(now["mountpoint"])), *_wrapped("error", str(now["error"]))]))
    return printable("\n".join(_Page(now, before, seconds, blocks=blocks).lines()))


class _Page:
    def __init__(self, now: Numbers, before: Numbers | None, seconds: float, *, blocks: bool) -> None:
        self._now = now
        self._before = before
        if before is None:
            seconds = time.time() - float(now.get("mounted_at") or time.time())
        elif "renewed_at" in now and "renewed_at" in before:  # public numbers are those of a moment before
            seconds = float(now["renewed_at"]) - float(before["renewed_at"])
        self._seconds = seconds
        self._blocks = blocks

    def _number(self, name: str) -> int:
        return int(self._now.get(name) or 0)

    def _size(self, name: str) -> str:
        return format_size(self._number(name))

    def lines(self) -> Iterator[str]:
        instances = f", {len(self._now['instances'])} instances" if "instances" in self._now else ""
        yield _two_ends(f"{shown_path(str(self._now['mountpoint']))}{instances}", self._daemon())
        yield from _wrapped("device", f"{self._size('size_bytes')}, {used_by(self._now)}")
        if order := swap_order(self._now):
            yield from _wrapped("filled", order)
        if self._now.get("rounded"):
            as_of = time.strftime("%H:%M:%S", time.localtime(self._number("as_of")))
            yield from _wrapped("public", f"rounded, as of {as_of}; root is shown all of it, exact")
        yield ""
        yield from self._stored()
        if self._number("stored_pages") and "pers_zpages" in self._now:
            yield ""
            yield from self._places()
        yield ""
        yield from self._pool()
        yield from self._backing()
        yield ""
        yield from self._speeds()
        if problems := remedies(self._now):
            yield ""
            for problem in problems:
                yield from _wrapped("  !", problem)

    def _daemon(self) -> str:
        packing = [str(self._now["packing"])] if self._now.get("packing") else []
        version, level = (", ".join(map(str, each(self._now.get(name)))) for name in ("version", "level"))
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
        yield from _wrapped("takes", f"{self._size('pool_used_bytes')} of RAM{on_disk}")
        if self._number("own_bytes"):
            yield from _wrapped("itself", f"{self._size('own_bytes')} of RAM: processes, buffers, tables")
        if stored:
            yield from _wrapped(
                "saved",
                f"{format_size(stored - taken)} ({_percent(stored - taken, stored)}); a page takes"
                f" {taken // pages:,} of {_PAGE_BYTES:,} bytes",
            )

    def _places(self) -> Iterator[str]:
        """Where the pages are, as bars."""
        total = self._number("stored_pages")
        zpages = self._number("pers_zpages") + self._number("eph_zpages")
        raw = self._number("pers_raw_count") + self._number("eph_raw_count")
        on_disk = self._number("written_back_pages")
        single = self._number("pers_unbuddied_count") + self._number("eph_unbuddied_count")
        in_ram: list[tuple[str, int]] = [("RAM, packed in pairs", zpages - single), ("RAM, alone in a frame", single)]
        if self._now.get("packing", "zbud") != "zbud":  # a frame with room for more may hold several
            in_ram = [("RAM, packed", zpages)]
        rows = [
            *in_ram,
            ("RAM, raw: incompressible", raw),
            ("same-filled, in the table", max(0, total - zpages - raw - on_disk)),
            *([("disk alone", on_disk)] if self._now.get("backing_path") else []),
        ]
        digits = max(len(f"{pages:,}") for _, pages in rows)
        for label, pages in rows:
            bar = self._bar(pages, total, fill=" ").rstrip()
            yield f"  {label:26} {pages:>{digits},}  {_percent(pages, total):>7}  {bar}".rstrip()

    def _pool(self) -> Iterator[str]:
        used, limit = self._number("pool_used_bytes"), self._number("pool_limit_bytes")
        yield from _wrapped("pool", f"{self._bar(used, limit)}  {_percent(used, limit)} of {format_size(limit)}")

    def _backing(self) -> Iterator[str]:
        path, *more = each(self._now.get("backing_path"))
        if not path:
            yield from _wrapped("backing", "none: nothing is ever written to disk")
            return
        used, most = self._number("backing_used_bytes"), self._number("backing_size_bytes")
        secret = "encrypted" if self._now.get("encrypted") else "not encrypted"
        yield from _wrapped("backing", f"{self._bar(used, most)}  {_percent(used, most)} of {format_size(most)}")
        others = f" and {len(more)} more" if more else ""
        yield from _wrapped("", f"{shown_path(str(path))}{others}, {secret}")
        if written := self._number("cumul_writeback_pages"):
            yield from _wrapped(
                "written",
                f"{written:,} pages as {self._size('cumul_writeback_bytes')};"
                f" {self._number('cumul_pagein_blocks'):,} blocks read back,"
                f" {self._number('cumul_refault_blocks'):,} of them too soon",
            )
        if budget := self._number("writeback_budget_bytes_per_day"):
            used = self._number("writeback_budget_used_bytes")
            yield from _wrapped(
                "budget", f"{self._bar(used, budget)}  {_percent(used, budget)} of {format_size(budget)} a day"
            )
        if not self._number("writeback_enabled"):
            yield from _wrapped("", "writeback is off: frames are written on order alone")

    def _speeds(self) -> Iterator[str]:
        since = "since the mount" if self._before is None else f"over {self._seconds:.1f} s"
        if self._seconds > 0:
            rates = ", ".join(
                f"{what} {format_size(int(self._grown(name) * scale / self._seconds))}/s".replace(" ", _TIGHT)
                for what, name, scale in (
                    ("in", "cumul_written_pages", _PAGE_BYTES),
                    ("out", "cumul_read_pages", _PAGE_BYTES),
                    ("to disk", "cumul_writeback_bytes", 1),
                    ("from disk", "cumul_pagein_blocks", _PAGE_BYTES),
                )
            )
            yield from _wrapped("speed", f"{rates} ({since.replace(' ', _TIGHT)})")
        rows = []
        for kind in ("read", "write", "discard", "writeback", "pagein"):
            counts = self._now.get(f"{kind}_latency_us") or []
            if sum(counts):
                longest = (
                    _time(self._number(f"{kind}_latency_max_us")) if f"{kind}_latency_max_us" in self._now else "-"
                )
                rows.append((kind, below(counts, 50), below(counts, 99), longest))
        if rows:
            yield f"  {'latency':{_LABEL + 8}} {'half below':>11} {'99 % below':>11} {'longest':>11}"
            for kind, *times in rows:
                yield f"  {'':{_LABEL}}{kind:8} " + " ".join(f"{each:>11}" for each in times)

    def _grown(self, name: str) -> int:
        return self._number(name) - int((self._before or {}).get(name) or 0)

    def _bar(self, part: int, whole: int, fill: str | None = None) -> str:
        full = min(_BAR, round(_BAR * part / whole)) if whole and part > 0 else 0
        full = max(full, int(part > 0))
        return ("█" if self._blocks else "#") * full + (fill or ("░" if self._blocks else ".")) * (_BAR - full)


def each(value: Any) -> list[Any]:
    """Return what the instances say, where they say different things, or the one thing that there is to say."""
    return value if isinstance(value, list) else [value]


def below(counts: Sequence[int], percent: int) -> str:
    """Return the time below which so many percent of a histogram in power-of-two microseconds are: "64 us", "2 ms"."""
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
    """Return who uses a mount, and how much of a swap is used."""
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
    """Return which swap the kernel fills first; empty if that of the mount is the only one, or off."""
    ours = [
        str(name).removeprefix("swap on ") for name in report.get("users") or () if str(name).startswith("swap on ")
    ]
    try:
        return filling_order(swaps(), ours, "zbudfs") if ours else ""
    except (OSError, SwapError):
        return ""


def _two_ends(left: str, right: str) -> str:
    gap = WIDTH - len(left) - len(right)
    return f"{left}{' ' * gap}{right}" if gap >= 2 else f"{left}\n  {right}"


def _wrapped(label: str, text: str) -> list[str]:
    """Return lines with a label in front; a word that is too long for a line has one of its own."""
    head = f"  {label:{_LABEL}}" if label != "  !" else "  ! "
    lines = textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]
    return [line.replace(_TIGHT, " ") for line in lines]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
