# SPDX-License-Identifier: MIT
"""`zbudfs estimate` measures how the memory of this machine compresses, before zbudfs is mounted.

It samples pages (`estimate.processes`, `estimate.files`), compresses and packs them (`estimate.measure`), and prints the
result as text or as JSON (--json), or draws it (--plot).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError
from zbudfs.cli.footprint_text import REMEDY, itself
from zbudfs.cli.plot import check_plot, save_plot
from zbudfs.cli.progress import progress_bar
from zbudfs.core.codec import DEFAULT_LEVEL
from zbudfs.core.packing import ZBUD
from zbudfs.core.sizes import format_size, parse_size_or_percent
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE, SIZE_CLASS_BYTES, SIZE_CLASSES, pages_in
from zbudfs.estimate.files import sample_file
from zbudfs.estimate.measure import PACKINGS, LevelMeasure, measure
from zbudfs.estimate.pagemap import Proc
from zbudfs.estimate.processes import sample_processes
from zbudfs.estimate.sample import Sample, SampleError
from zbudfs.service.footprint import Footprint
from zbudfs.service.mountpoint import shown_path
from zbudfs.service.settings import DEFAULT_POOL, Settings, default_backing, default_size_bytes, ram_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_SAMPLE_BYTES: Final = 64 << 20
"""16,384 pages: each share is right to within one percent of the whole (twice the standard error). It takes a second."""

_BAR_COLUMNS: Final = 40
_ROW_CHUNKS: Final = 4
"""Chunks in one row of the histogram: 256 bytes."""
_GIB_PAGES: Final = 1 << 18

_LEFT_OUT: Final = (
    ("denied", "processes whose memory this user may not read"),
    ("ended", "processes that ended meanwhile"),
    ("failed", "processes whose memory cannot be read"),
    ("stuck", "processes whose memory the kernel did not return in time"),
    ("cut_off", "processes with more addresses than could be searched in time"),
    ("not_reached", "processes that were not reached in time"),
    ("swapped_pages", "pages that are swapped out already"),
    ("shared_pages", "pages that processes share"),
    ("gone_pages", "pages that were gone before they were read"),
    ("unreadable_pages", "pages that cannot be read"),
)


def estimate(arguments: Arguments) -> int:
    """Compress a sample, print the result, and draw it if --plot is given."""
    check_plot(arguments.plot)
    ram = ram_bytes()
    pool_bytes = parse_size_or_percent(arguments.pool or DEFAULT_POOL, ram)
    footprints = {name: _footprint(name, pool_bytes, ram) for name in PACKINGS}
    try:
        sample = _take_sample(arguments)
    except SampleError as error:
        raise CommandError(str(error)) from None
    measures = []
    for level in arguments.levels or [DEFAULT_LEVEL]:
        with progress_bar(f"compressing at level {level}") as progress:
            measures.append(measure(sample.pages, level, progress))
    if arguments.plot is not None:
        save_plot(arguments.plot, f"zbudfs estimate: {sample.source}", lambda figure: _draw(figure, measures))
    if arguments.json:
        print(json.dumps(_as_json(sample, measures, footprints, arguments.seed), indent=2))
    else:
        print(_as_page(sample, measures, footprints, arguments.seed))
    return 0


def _footprint(packing: str, pool_bytes: int, ram: int) -> Footprint:
    """Return the memory that a daemon with this pool takes. Raises SettingsError for a wrong pool size."""
    settings = Settings(
        mountpoint="/mnt/zswap",
        size_bytes=default_size_bytes(ram),
        pool_bytes=pool_bytes,
        backing=default_backing("/mnt/zswap"),
        packing=str(PACKINGS[packing]),
    )
    return Footprint.of([settings], ram)


def _take_sample(arguments: Arguments) -> Sample:
    wanted = pages_in(DEFAULT_SAMPLE_BYTES if arguments.sample is None else arguments.sample)
    with progress_bar("reading pages") as progress:
        if arguments.file is not None:
            return sample_file(arguments.file, shown_path(arguments.file), wanted, arguments.seed, progress)
        if arguments.all:
            return sample_processes(
                Proc().pids(), wanted, arguments.seed, progress, strict=False, source="all processes"
            )
        pids = list(dict.fromkeys(arguments.pids))
        shown = ", ".join(map(str, pids[:8])) + (f" and {len(pids) - 8} more" if len(pids) > 8 else "")
        source = f"process{'es' if len(pids) > 1 else ''} {shown}"
        return sample_processes(pids, wanted, arguments.seed, progress, strict=True, source=source)


# ---- numbers -----------------------------------------------------------------------------------------------------


def _held_pages(measured: LevelMeasure, packing: str, pool_bytes: int) -> int | None:
    """Return how many of the measured pages a pool holds; None if they take no frames at all."""
    taken = measured.frames_per_page(packing)
    return int((pool_bytes >> PAGE_SHIFT) / taken) if taken else None


def _net(measured: LevelMeasure, packing: str, footprint: Footprint) -> int | None:
    """Return the bytes that a full pool saves, less all that zbudfs takes; None if the pages take no frames at all."""
    held = _held_pages(measured, packing, footprint.pool_bytes)
    return None if held is None else (held << PAGE_SHIFT) - footprint.pool_bytes - footprint.own_bytes


def _as_json(
    sample: Sample, measures: Sequence[LevelMeasure], footprints: Mapping[str, Footprint], seed: int
) -> dict[str, Any]:
    pool_bytes = footprints[ZBUD.name].pool_bytes
    return {
        "source": sample.source,
        "population_bytes": sample.population_pages << PAGE_SHIFT,
        "sample_bytes": len(sample.pages) << PAGE_SHIFT,
        "seed": seed,
        "counts": sample.counts,
        "pool_bytes": pool_bytes,
        "memory": {name: footprint.as_object() for name, footprint in footprints.items()},
        "levels": [_level_json(measured, sample, footprints) for measured in measures],
    }


def _level_json(measured: LevelMeasure, sample: Sample, footprints: Mapping[str, Footprint]) -> dict[str, Any]:
    packings = {}
    for packing in measured.frames:
        pool_bytes = footprints[packing].pool_bytes
        held = _held_pages(measured, packing, pool_bytes)
        packings[packing] = {
            "frames": measured.frames[packing],
            "zpages_per_frame": measured.zpages_per_frame(packing),
            "frames_per_page": measured.frames_per_page(packing),
            "whole_population_bytes": round(measured.frames_per_page(packing) * sample.population_pages) << PAGE_SHIFT,
            "pool_holds_bytes": held << PAGE_SHIFT if held is not None else None,
            "pool_saves_bytes": (held << PAGE_SHIFT) - pool_bytes if held is not None else None,
            "net_saves_bytes": _net(measured, packing, footprints[packing]),
        }
    return {
        "level": measured.level,
        "pages": measured.pages,
        "same_filled_pages": measured.same_filled_pages,
        "raw_pages": measured.raw_pages,
        "zpages": measured.zpages,
        "zpage_bytes": measured.zpage_bytes,
        "ratio": measured.ratio,
        "compress_us_per_page": measured.compress_us,
        "decompress_us_per_page": measured.decompress_us,
        "chunk_histogram": list(measured.chunk_histogram),
        "packings": packings,
    }


# ---- for people --------------------------------------------------------------------------------------------------


def _as_page(sample: Sample, measures: Sequence[LevelMeasure], footprints: Mapping[str, Footprint], seed: int) -> str:
    pool_bytes = footprints[ZBUD.name].pool_bytes
    whole = format_size(sample.population_pages << PAGE_SHIFT)
    looked_at = format_size(len(sample.pages) << PAGE_SHIFT)
    lines = [f"{sample.source}: {whole}, of which {looked_at} were sampled (--seed {seed})"]
    if left := _left_out(sample):
        lines.append(f"left out: {left}")
    lines += ["", *_level_lines(measures[0])]
    if len(measures) > 1:
        lines += ["", *_comparison(measures)]
    lines += ["", *_pool_lines(measures[0], sample, pool_bytes), *_net_lines(measures[0], footprints)]
    return "\n".join(lines)


def _left_out(sample: Sample) -> str:
    counts = sample.counts
    return ", ".join(f"{counts[cause]:,} {text}" for cause, text in _LEFT_OUT if counts.get(cause))


def _level_lines(measured: LevelMeasure) -> list[str]:
    same, raw = measured.same_filled_pages, measured.raw_pages
    compressed = measured.pages - same - raw
    mean = measured.zpage_bytes / measured.zpages if measured.zpages else 0
    rows = [
        ("same-filled", same, "one word repeated: stored as that word"),
        ("compressed", compressed, f"to {mean:,.0f} bytes on average" if measured.zpages else ""),
        ("raw", raw, "too large when compressed: one frame for each page" if raw else ""),
    ]
    lines = [f"level {measured.level}"]
    for name, number, text in rows:
        lines.append(f"  {name:12} {100 * number / measured.pages:5.1f} %  {text}".rstrip())
    lines.append(f"  {'ratio':12} {measured.ratio:5.2f}    of the pages that are not same-filled")
    lines.append(
        f"  {'time':12} {measured.compress_us:5.1f} us to compress a page, {measured.decompress_us:.1f} us to decompress it"
    )
    for packing in measured.frames:
        lines.append(
            f"  {packing:12} {measured.zpages_per_frame(packing):5.2f}    zpages a frame:"
            f" 1 GiB of this memory takes {_taken(measured, packing, _GIB_PAGES)}"
        )
    return lines + _histogram_lines(measured)


def _histogram_lines(measured: LevelMeasure) -> list[str]:
    histogram = measured.chunk_histogram
    if not measured.zpages:
        return []
    rows = [sum(histogram[at : at + _ROW_CHUNKS]) for at in range(1, SIZE_CLASSES, _ROW_CHUNKS)]
    lines = ["  zpages by size, with their handles"]
    for number, count in enumerate(rows):
        most = min((number + 1) * _ROW_CHUNKS, SIZE_CLASSES - 1) * SIZE_CLASS_BYTES
        bar = "#" * round(_BAR_COLUMNS * count / max(rows)) or ("." if count else "")
        lines.append(f"    to {most:4} B  {100 * count / measured.zpages:5.1f} %  {bar}".rstrip())
    return lines


def _comparison(measures: Sequence[LevelMeasure]) -> list[str]:
    packings = list(measures[0].frames)
    head = f"{'level':>5}  {'ratio':>6}  {'raw':>6}"
    head += "".join(f"  {f'{packing}: a frame':>16}  {'of 1 GiB':>9}" for packing in packings)
    lines = [head + f"  {'compress':>9}  {'decompress':>10}"]
    for measured in measures:
        line = f"{measured.level:5}  {measured.ratio:6.2f}  {100 * measured.raw_pages / measured.pages:4.1f} %"
        for packing in packings:
            line += f"  {measured.zpages_per_frame(packing):16.2f}  {_taken(measured, packing, _GIB_PAGES):>9}"
        lines.append(f"{line}  {measured.compress_us:6.1f} us  {measured.decompress_us:7.1f} us")
    return lines


def _taken(measured: LevelMeasure, packing: str, pages: int) -> str:
    return format_size(round(measured.frames_per_page(packing) * pages) << PAGE_SHIFT)


def _pool_lines(measured: LevelMeasure, sample: Sample, pool_bytes: int) -> list[str]:
    lines = []
    for packing in measured.frames:
        held = _held_pages(measured, packing, pool_bytes)
        if held is None:
            lines.append(
                f"pool of {format_size(pool_bytes)}, {packing}: holds any amount of such memory, which takes no frames"
            )
            continue
        held_bytes = held * PAGE_SIZE
        lines.append(
            f"pool of {format_size(pool_bytes)}, {packing}: holds {format_size(held_bytes)} of such memory, which saves"
            f" {format_size(held_bytes - pool_bytes)} of RAM"
        )
        lines.append(
            f"  all {format_size(sample.population_pages << PAGE_SHIFT)} would take"
            f" {_taken(measured, packing, sample.population_pages)}"
            + ("" if held >= sample.population_pages else ": the rest goes to the backing file")
        )
    return lines


def _net_lines(measured: LevelMeasure, footprints: Mapping[str, Footprint]) -> list[str]:
    """Return lines on the memory that zbudfs takes besides the pool, and whether a full pool saves more than that."""
    lines = [f"zbudfs itself takes {itself(footprints[ZBUD.name])}"]
    nets = {name: _net(measured, name, footprints[name]) for name in measured.frames}
    saved = [f"{format_size(net)} with {name}" for name, net in nets.items() if net is not None and net > 0]
    if saved:
        lines.append(f"  after that, a full pool saves {' and '.join(saved)}")
    elif any(net is not None for net in nets.values()):
        lines.append(f"  that is more than a full pool saves, so zbudfs does not pay: {REMEDY}, or try a larger pool")
    return lines


def _draw(figure: Figure, measures: Sequence[LevelMeasure]) -> None:
    """Draw the sizes of zpages on the left, and on the right the shares and the RAM of each level."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    sizes = [chunks * SIZE_CLASS_BYTES for chunks in range(SIZE_CLASSES)]
    for measured in measures:
        shares = [100 * count / max(measured.zpages, 1) for count in measured.chunk_histogram]
        left.step(sizes, shares, where="mid", label=f"level {measured.level}")
    left.set_xlabel("zpage with its handle, bytes")
    left.set_ylabel("share of the zpages, %")
    left.axvline(PAGE_SIZE / 2, color="grey", linestyle=":", label="half a frame")
    left.legend()
    names = [str(measured.level) for measured in measures]
    kinds = (
        ("same-filled", [measured.same_filled_pages for measured in measures]),
        ("compressed", [m.pages - m.same_filled_pages - m.raw_pages for m in measures]),
        ("raw", [measured.raw_pages for measured in measures]),
    )
    bottom = [0.0] * len(measures)
    for name, counts in kinds:
        heights = [100 * count / measured.pages for count, measured in zip(counts, measures, strict=True)]
        right.bar(names, heights, bottom=bottom, label=name)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for packing in measures[0].frames:
        taken = [100 * measured.frames_per_page(packing) for measured in measures]
        right.plot(names, taken, linestyle="", marker="_", markersize=30, label=f"RAM in the pool, {packing}")
    right.set_xlabel("level")
    right.set_ylabel("share of the pages, %")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
