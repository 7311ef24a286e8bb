# SPDX-License-Identifier: MIT
"""`zbudfs trace replay` replays a trace on a store with several settings, and prints their results in a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError
from zbudfs.cli.progress import progress_bar
from zbudfs.cli.trace_show import load
from zbudfs.core.errors import ZbudfsError
from zbudfs.core.packing import Packing
from zbudfs.core.sizes import format_size, parse_size_or_percent
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.service.mountpoint import shown_path
from zbudfs.service.settings import DEFAULT_PACKING, MIN_POOL_BYTES, ram_bytes
from zbudfs.tracing.file import Trace
from zbudfs.tracing.replay import ReplayResult, ReplaySettings, Script, replay

DEFAULT_FOLDER: Final = "/var/tmp"
"""Default folder of the backing file. It is on a disk, unlike /tmp on many systems."""
MAX_SETTINGS: Final = 64


def replay_trace(arguments: Arguments) -> int:
    """Replay the trace with each combination of settings, and print the results. Return 1 if a page was read wrong."""
    trace = load(arguments.trace)
    ram = ram_bytes()
    pools = [_pool(text, ram) for text in arguments.pools or ()] or [_recorded_pool(trace, ram)]
    wanted = [
        ReplaySettings(pool, level, *_watermarks(text, pool), packing)
        for packing in arguments.packings or [_recorded_packing(trace)]
        for level in arguments.levels or [trace.about["level"]]
        for pool in dict.fromkeys(pools)
        for text in arguments.watermarks or [""]
    ]
    if len(wanted) > MAX_SETTINGS:
        raise CommandError(f"these are {len(wanted)} combinations: write at most {MAX_SETTINGS}")
    folder = _folder(arguments.backing, trace)
    script = Script(trace, arguments.seed)
    _check_memory(max(pools), script)
    results = []
    for number, settings in enumerate(wanted, 1):
        what = f"replay {number} of {len(wanted)}" if len(wanted) > 1 else "replay"
        try:
            with progress_bar(what) as progress:
                results.append(replay(script, settings, folder, arguments.seed, progress))
        except (ZbudfsError, MemoryError) as error:
            raise CommandError(
                str(error) or "the system has no memory for this replay: write a smaller --pool"
            ) from None
    if arguments.json:
        print(json.dumps([_as_json(result) for result in results], indent=2))
    else:
        print("\n".join(_as_table(results, arguments.trace, script)))
    return 1 if any(result.wrong_pages for result in results) else 0


def _pool(text: str, ram: int) -> int:
    pool = parse_size_or_percent(text, ram) // PAGE_SIZE * PAGE_SIZE
    if not MIN_POOL_BYTES <= pool <= ram:
        raise CommandError(
            f"pool of {format_size(pool)} is out of range: write a size from 1M to this machine's {format_size(ram)}"
        )
    return pool


def _recorded_packing(trace: Trace) -> str:
    """Return the packing of the recorded mount. Raises CommandError for one that this version does not know."""
    try:
        return str(Packing.parse(str(trace.about.get("packing", DEFAULT_PACKING))))
    except ValueError as error:
        raise CommandError(f"the trace was recorded with an unknown packing: {error}") from None


def _recorded_pool(trace: Trace, ram: int) -> int:
    pool: int = max(trace.about["pool_limit_bytes"] // PAGE_SIZE * PAGE_SIZE, MIN_POOL_BYTES)
    if pool > ram:
        raise CommandError(
            f"the trace was recorded with a pool of {format_size(pool)}, more than this machine's {format_size(ram)}: write"
            " a smaller one with --pool"
        )
    return pool


def _watermarks(text: str, pool: int) -> tuple[int, int]:
    """Return the low and the high watermark in frames; (0, 0) for those of the daemon, which follow from the pool."""
    if not text:
        return 0, 0
    low, high = (parse_size_or_percent(part, pool) >> PAGE_SHIFT for part in text.split(":"))
    if not 0 < low <= high <= pool >> PAGE_SHIFT:
        raise CommandError(
            f"watermarks {text} are wrong for a pool of {format_size(pool)}: write a low of at least one frame, and a high"
            " from low to the pool"
        )
    return low, high


def _folder(typed: str | None, trace: Trace) -> str | None:
    """Return the folder of the backing file; None for no backing file."""
    if typed == "none" or (typed is None and trace.about.get("backing_size_bytes") == 0):
        return None
    folder = typed or DEFAULT_FOLDER
    if not Path(folder).is_dir():
        raise CommandError(f"{shown_path(folder)} is not a folder: write a folder for the backing file, or none")
    return folder


def _check_memory(pool: int, script: Script) -> None:
    """Raise CommandError if the available RAM has no room for the pool."""
    needed = min(pool, script.nr_pages * PAGE_SIZE)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and needed > int(line.split()[1]) * 1024:
            raise CommandError(
                f"this replay may need {format_size(needed)} of RAM, but {format_size(int(line.split()[1]) * 1024)} are"
                " available: write a smaller --pool"
            )


def _as_json(result: ReplayResult) -> dict[str, Any]:
    found = asdict(result)
    return {
        **found.pop("settings"),
        **found,
        "hit_ratio": result.hit_ratio,
        "cpu_us_per_page": result.cpu_us_per_page,
    }


def _as_table(results: Sequence[ReplayResult], path: str, script: Script) -> list[str]:
    lines = [
        f"{shown_path(path)}: {results[0].written_pages:,} pages written, {results[0].read_pages:,} read,"
        f" {script.nr_pages:,} different ones ({format_size(script.nr_pages * PAGE_SIZE)})",
        "",
        f"{'pool':>9}  {'packing':>7}  {'level':>5}  {'watermarks':>17}  {'hits':>7}  {'to disk':>9}  {'from disk':>9}"
        f"  {'refused':>8}  {'a frame':>7}  {'CPU':>9}  {'time':>7}",
    ]
    for result in results:
        settings = result.settings
        low, high = settings.low_watermark_frames, settings.high_watermark_frames
        marks = (
            f"{format_size(low << PAGE_SHIFT)}:{format_size(high << PAGE_SHIFT)}".replace(" ", "") if low else "auto"
        )
        lines.append(
            f"{format_size(settings.pool_bytes):>9}  {settings.packing:>7}  {settings.level:5}  {marks:>17}"
            f"  {100 * result.hit_ratio:5.1f} %"
            f"  {format_size(result.writeback_frames << PAGE_SHIFT):>9}  {format_size(result.pagein_blocks << PAGE_SHIFT):>9}"
            f"  {result.refused_pages:8,}  {result.pages_per_frame:7.2f}  {result.cpu_us_per_page:6.1f} us"
            f"  {result.seconds:5.1f} s"
        )
        if result.wrong_pages or result.lost_pages:
            lines.append(
                f"  {result.wrong_pages:,} pages were read wrong and {result.lost_pages:,} were lost: please report this bug"
            )
    return lines
