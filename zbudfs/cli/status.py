# SPDX-License-Identifier: MIT
"""What `zbudfs status` shows: the daemon's own snapshot, as JSON or as a page for people.

The numbers are those of MOUNTPOINT/stats/all.json and are passed on as they are; added is what the daemon cannot
know, who uses it (`users`). The page answers in the order of the questions: what is stored, what does that take, what
is saved, how full is it, did anything go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from zbudfs.cli.ask import all_numbers, why_silent
from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import Mount, shown_path
from zbudfs.swap.loop import SwapError, swaps, users

Report = dict[str, Any]
"""One mount's numbers by name; or "mountpoint" and "error", if its daemon gives none."""

_PAGE_BYTES: Final = 4096


def report(mount: Mount) -> Report:
    """Return what the daemon of `mount` tells, or why it tells nothing."""
    try:
        found = all_numbers(mount.mountpoint)
    except (OSError, ValueError) as error:
        return {"mountpoint": mount.mountpoint, "error": why_silent(mount.mountpoint, error)}
    found["mountpoint"] = mount.mountpoint
    found["users"] = users(mount.mountpoint, mount.st_dev)
    return found


def as_json(reports: Report | Sequence[Report]) -> str:
    """Return an object for one report, a list of objects for several; ASCII, so that any path survives."""
    return json.dumps(reports, indent=2)


def as_pages(reports: Sequence[Report]) -> str:
    """Return a page for each report, for people."""
    if not reports:
        return "no zbudfs is mounted"
    return "\n\n".join(_page(report) for report in reports)


def _page(report: Report) -> str:
    title = shown_path(str(report["mountpoint"]))
    if "error" in report:
        return f"{title}\n  error     {report['error']}"
    lines = [title, *(f"  {name:9} {text}" for name, text in _rows(report) if text)]
    lines += [f"  warning   {text}" for text in report.get("warnings", ())]
    return "\n".join(lines)


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) of each line; an empty text means that there is nothing to tell."""

    def size(name: str) -> str:
        return format_size(number(name))

    def number(name: str) -> int:
        return int(report.get(name) or 0)

    pages = number("stored_pages")
    stored = pages * _PAGE_BYTES
    taken = number("pool_used_bytes") + number("backing_used_bytes")
    kinds = [
        f"{number(name):,} {kind}"
        for name, kind in (("same_filled_pages", "same-filled"), ("raw_pages", "incompressible"))
        if number(name)
    ]
    troubles = [
        f"{number(name):,} {what}"
        for name, what in (
            ("refused_pool_full", "writes refused for want of room"),
            ("lost_pages", "reads of pages that were lost"),
            ("pagein_failures", "reads that the backing file refused"),
            ("writeback_failures", "writebacks that the backing file did not take"),
        )
        if number(name)
    ]
    backing = report.get("backing_path")
    written = number("cumul_writeback_pages")
    return [
        ("device", f"{size('size_bytes')}, {_packing(report)}zstd level {report.get('level')}, {_used_by(report)}"),
        ("daemon", f"zbudfs {report.get('version')}, pid {report.get('pid')}, {_standby(report)}"),
        ("stored", f"{format_size(stored)} in {pages:,} page{'s'[: pages != 1]}{_listed(kinds)}"),
        ("takes", f"{size('pool_used_bytes')} of RAM, {size('backing_used_bytes')} on disk"),
        ("saved", f"{format_size(stored - taken)} ({_percent(stored - taken, stored)})" if stored else ""),
        ("pool", f"{_percent(number('pool_used_bytes'), number('pool_limit_bytes'))} of {size('pool_limit_bytes')}"),
        (
            "backing",
            f"{shown_path(str(backing))}, {_secrecy(report)}, up to {size('backing_size_bytes')}"
            if backing
            else "none",
        ),
        (
            "written",
            f"{written:,} pages as {size('cumul_writeback_bytes')}, {number('cumul_pagein_blocks'):,} blocks read back"
            if written
            else "",
        ),
        ("trouble", ", ".join(troubles)),
    ]


def _secrecy(report: Mapping[str, Any]) -> str:
    return "encrypted" if report.get("encrypted") else "not encrypted"


def _packing(report: Mapping[str, Any]) -> str:
    """Return the packing and a comma; nothing where the daemon does not tell."""
    return f"{report['packing']}, " if report.get("packing") else ""


def _standby(report: Mapping[str, Any]) -> str:
    """Return who would take over, and how often that has happened."""
    ready = "standby ready" if report.get("standby_ready") else "no standby yet"
    recoveries = int(report.get("recoveries") or 0)
    return f"{ready}, {recoveries:,} recover{'y' if recoveries == 1 else 'ies'}" if recoveries else ready


def _used_by(report: Mapping[str, Any]) -> str:
    """Return who uses it, and how much of a swap is used."""
    names = report.get("users") or []
    try:
        used = {f"swap on {swap.path}": swap.used_bytes for swap in swaps()}
    except (OSError, SwapError):
        used = {}
    return (
        ", ".join(f"{name} ({format_size(used[name])} used)" if name in used else name for name in names)
        or "not in use"
    )


def _listed(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
