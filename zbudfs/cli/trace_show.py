# SPDX-License-Identifier: MIT
"""`zbudfs trace show` prints a summary of a trace with its working set over time, as text or JSON, and draws it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError
from zbudfs.cli.plot import check_plot, save_plot
from zbudfs.cli.sparkline import sparkline
from zbudfs.core.sizes import format_size
from zbudfs.core.trace import RAW_CLASS, Kind
from zbudfs.core.trace_file import TraceFileError
from zbudfs.core.units import PAGE_SHIFT, SIZE_CLASS_BYTES
from zbudfs.service.mountpoint import shown_path
from zbudfs.tracing.file import Trace, read_trace
from zbudfs.tracing.summary import READS, Summary, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS: Final = 60
PLOT_INTERVALS: Final = 300
_BAR_COLUMNS: Final = 40
_ROW_CHUNKS: Final = 8


def show(arguments: Arguments) -> int:
    """Print the summary of a trace, and draw it if --plot is given."""
    check_plot(arguments.plot)
    shown = shown_path(arguments.trace)
    trace = load(arguments.trace)
    summary = summarize(trace, COLUMNS)
    if arguments.plot is not None:
        fine = summarize(trace, PLOT_INTERVALS)
        save_plot(arguments.plot, f"zbudfs trace: {shown}", lambda figure: _draw(figure, fine))
    print(json.dumps(_as_json(trace, summary), indent=2) if arguments.json else _as_page(shown, trace, summary))
    return 0


def load(path: str) -> Trace:
    """Return the trace in a file. Raises CommandError with one sentence for a malformed file, and OSError."""
    try:
        return read_trace(path, shown_path(path))
    except TraceFileError as error:
        raise CommandError(str(error)) from None


def _as_json(trace: Trace, summary: Summary) -> dict[str, Any]:
    return {
        "about": trace.about,
        "seconds": summary.seconds,
        "records": len(trace.records),
        "lost_records": trace.gaps,
        "overwritten_blocks": trace.first_block,
        "rest_bytes": trace.rest_bytes,
        "distinct_pages": summary.distinct_pages,
        "hit_ratio": summary.hit_ratio,
        "pages": {kind.name.lower(): summary.pages[kind] for kind in Kind if kind != Kind.GAP},
        "written_by_size_class": dict(sorted(summary.written_classes.items())),
        "interval_seconds": summary.interval_seconds,
        "intervals": [asdict(interval) for interval in summary.intervals],
    }


def _as_page(shown: str, trace: Trace, summary: Summary) -> str:
    about, pages = trace.about, summary.pages
    seconds = summary.seconds
    read = sum(pages[kind] for kind in READS)
    recorded = " ".join(
        f"{word} {about[name]}"
        for word, name in (("on", "started"), ("by zbudfs", "zbudfs"), ("on Linux", "kernel"))
        if isinstance(about.get(name), str)
    )
    rows = [
        (
            "recorded",
            recorded.encode("ascii", "backslashreplace").decode() if recorded.isprintable() else "unknown",
        ),
        (
            "mount",
            f"{format_size(about['size_bytes'])}, pool of {format_size(about['pool_limit_bytes'])}, level {about['level']}",
        ),
        ("length", f"{seconds:,.1f} s, {len(trace.records):,} records"),
        ("written", _pages(pages[Kind.WRITE], seconds)),
        ("read", _pages(read, seconds) + (f", {100 * (summary.hit_ratio or 0):.1f} % from RAM" if read else "")),
        ("discarded", _pages(pages[Kind.DISCARD], seconds) if pages[Kind.DISCARD] else ""),
        ("refused", _pages(pages[Kind.REFUSED], seconds) if pages[Kind.REFUSED] else ""),
        (
            "touched",
            f"{summary.distinct_pages:,} different pages ({format_size(summary.distinct_pages << PAGE_SHIFT)})",
        ),
        ("lost", f"{trace.gaps:,} records, which came faster than they were read" if trace.gaps else ""),
        ("older", "earlier records were replaced (--max)" if trace.first_block else ""),
        ("cut off", f"the last {trace.rest_bytes:,} bytes are not a whole block" if _is_cut(trace) else ""),
    ]
    lines = [shown, *(f"  {name:10} {text}" for name, text in rows if text), ""]
    return "\n".join([*lines, *_over_time(summary), *_class_lines(summary)])


def _is_cut(trace: Trace) -> bool:
    return bool(trace.rest_bytes) and not trace.first_block


def _pages(pages: int, seconds: float) -> str:
    rate = f", {pages / seconds:,.0f} a second" if seconds else ""
    return f"{pages:,} pages ({format_size(pages << PAGE_SHIFT)}){rate}"


def _over_time(summary: Summary) -> list[str]:
    intervals = summary.intervals
    rows = (
        ("written", [interval.written for interval in intervals], True),
        ("read", [interval.read for interval in intervals], True),
        ("from disk", [interval.paged_in for interval in intervals], True),
        ("discarded", [interval.discarded for interval in intervals], True),
        ("different", [interval.distinct for interval in intervals], False),
    )
    width = summary.interval_seconds
    lines = [f"  each column is {width:.3g} s"]
    for name, values, is_rate in rows:
        if most := max(values):
            text = (
                f"{most / width:,.0f} pages a second"
                if is_rate
                else f"{most:,} pages ({format_size(most << PAGE_SHIFT)})"
            )
            lines.append(f"  {name:10} |{sparkline(values)}| at most {text}")
    return lines


def _class_lines(summary: Summary) -> list[str]:
    classes = summary.written_classes
    total = sum(classes.values())
    if not total:
        return []
    rows = [("same-filled", classes[0])]
    for low in range(1, RAW_CLASS, _ROW_CHUNKS):
        high = min(low + _ROW_CHUNKS, RAW_CLASS)
        rows.append((f"to {(high - 1) * SIZE_CLASS_BYTES:4} B", sum(classes[chunks] for chunks in range(low, high))))
    rows.append(("raw", classes[RAW_CLASS]))
    most = max(count for _, count in rows)
    lines = ["", "  pages written, by stored size"]
    for name, count in rows:
        bar = "#" * round(_BAR_COLUMNS * count / most) or ("." if count else "")
        lines.append(f"    {name:11}  {100 * count / total:5.1f} %  {bar}".rstrip())
    return lines


def _draw(figure: Figure, summary: Summary) -> None:
    """Draw the working set over time, and the rates of the requests."""
    top, bottom = figure.subplots(2, 1, sharex=True)
    width = summary.interval_seconds
    times = [number * width for number in range(len(summary.intervals))]
    mib = 1 / 256
    top.fill_between(times, [interval.distinct * mib for interval in summary.intervals], step="post")
    top.set_ylabel(f"different pages in {width:.3g} s, MiB")
    top.set_title(
        f"working set; {format_size(summary.distinct_pages << PAGE_SHIFT)} of different pages in all", fontsize="medium"
    )
    for name, values in (
        ("written", [interval.written for interval in summary.intervals]),
        ("read", [interval.read for interval in summary.intervals]),
        ("read from disk", [interval.paged_in for interval in summary.intervals]),
        ("discarded", [interval.discarded for interval in summary.intervals]),
    ):
        if any(values):
            bottom.step(times, [value * mib / width for value in values], where="post", label=name)
    bottom.set_ylabel("MiB/s")
    bottom.set_xlabel("seconds")
    if bottom.lines:
        bottom.legend()
