# SPDX-License-Identifier: MIT
"""In a replay, made-up pages have the wanted sizes, and the store gets the requests of the trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tracing.samples import Record, trace_of
from zbudfs.core.allocator import chunks_for, max_zpage_size
from zbudfs.core.codec import Codec, is_word
from zbudfs.core.trace import RAW_CLASS, UNKNOWN_CLASS, Kind
from zbudfs.store.requests import Requests
from zbudfs.tracing.pages import VARIANTS, PageMaker
from zbudfs.tracing.replay import ReplayResult, ReplaySettings, Script, replay

MIB = 1 << 20


def class_of(page: bytes, codec: Codec) -> int:
    """Return the size class of a page."""
    if is_word(page, int.from_bytes(page[:8], "little")):
        return 0
    size = len(codec.encode(page))
    return chunks_for(size) if size <= max_zpage_size() else RAW_CLASS


@pytest.mark.parametrize("level", [-7, -1, 3])
def test_pages_have_the_wanted_size(level: int) -> None:
    """A page of each size class can be made, in several variants, and the same seed makes the same page."""
    maker, again, codec = PageMaker(level, 1), PageMaker(level, 1), Codec(level)
    for size_class in range(RAW_CLASS + 1):
        made = [maker.page(size_class, variant) for variant in range(VARIANTS)]
        assert [class_of(page, codec) for page in made] == [size_class] * VARIANTS
        assert {len(page) for page in made} == {4096}
        assert len(set(made)) == VARIANTS
        assert [again.page(size_class, variant) for variant in range(VARIANTS)] == made


def outcome(records: list[Record], folder: Path | None = None, pool_bytes: int = MIB, **settings: Any) -> ReplayResult:
    """Replay records."""
    script = Script(trace_of(records), 1)
    wanted = ReplaySettings(pool_bytes, settings.pop("level", -1), **settings)
    return replay(script, wanted, None if folder is None else str(folder), 1, lambda done, total: None)


def test_requests_are_repeated() -> None:
    """Pages are written, overwritten, read and discarded, and all reads are right."""
    found = outcome(
        [
            (0, Kind.WRITE, 20, 0, 8),
            (1, Kind.WRITE, 0, 4, 8),
            (2, Kind.WRITE, RAW_CLASS, 100, 2),
            (3, Kind.READ, 20, 0, 12),
            (4, Kind.DISCARD, UNKNOWN_CLASS, 2, 4),
            (5, Kind.READ, 20, 0, 8),
            (6, Kind.READ, RAW_CLASS, 100, 2),
            (7, Kind.GAP, 0, 0, 5),
        ]
    )
    assert (found.written_pages, found.read_pages, found.refused_pages) == (18, 22, 0)
    assert (found.wrong_pages, found.lost_pages, found.pagein_pages) == (0, 0, 0)
    assert found.hit_ratio == 1.0
    # Two raw pages have a frame each. Two pages of the first write are left, in one frame or two.
    assert found.pool_used_max_bytes in (3 * 4096, 4 * 4096)
    assert found.cpu_seconds > 0


def test_earlier_pages_are_stored_first() -> None:
    """A page that is read before any write is stored first, and does not count as written."""
    found = outcome([(0, Kind.READ, 30, 50, 4), (1, Kind.PAGEIN, UNKNOWN_CLASS, 60, 1), (2, Kind.READ, 30, 50, 4)])
    assert (found.written_pages, found.read_pages, found.wrong_pages) == (0, 9, 0)
    assert found.pool_used_max_bytes >= 2 * 4096


def test_a_large_device_is_made_small() -> None:
    """The replay's device has only the pages that the trace touches, in their order."""
    far = (1 << 32) - 10
    script = Script(
        trace_of(
            [
                (0, Kind.WRITE, 5, far, 4),
                (1, Kind.WRITE, 5, 7, 1),
                (2, Kind.DISCARD, UNKNOWN_CLASS, 0, far + 2),
                (3, Kind.DISCARD, UNKNOWN_CLASS, 8, 100),
            ],
            size_bytes=1 << 44,
        ),
        1,
    )
    assert script.nr_pages == 5
    assert [(kind, first, pages) for kind, first, pages, _ in script.requests] == [
        (Kind.WRITE, 1, 4),
        (Kind.WRITE, 0, 1),
        (Kind.DISCARD, 0, 3),
    ]


def storm(pages: int) -> list[Record]:
    """Write pages, then read all of them twice."""
    return [
        (at, kind, 25, at * 8 % pages, 8)
        for at, kind in enumerate([Kind.WRITE] * (pages // 8) + [Kind.READ] * (pages // 4))
    ]


def test_more_than_the_pool_holds(tmp_path: Path) -> None:
    """With a backing file all pages come back from the disk. A larger pool needs the disk less, or not at all."""
    small, large = (outcome(storm(1600), tmp_path, pool_bytes=size) for size in (MIB, 8 * MIB))
    assert small.wrong_pages == small.lost_pages == small.refused_pages == 0
    assert small.writeback_pages > 800
    assert 0 < small.pagein_pages <= small.read_pages == 3200
    assert 0 < small.backing_used_max_bytes <= 1600 * 4096
    assert small.hit_ratio < large.hit_ratio == 1.0
    assert small.pool_used_max_bytes <= MIB < large.pool_used_max_bytes
    assert 1.9 < large.pages_per_frame <= 2.0
    assert list(tmp_path.iterdir()) == []


def test_without_a_backing_file_pages_are_refused() -> None:
    """Refused pages are counted, and the replay does not read them."""
    found = outcome(storm(1600))
    assert 0 < found.refused_pages < 1600
    assert (found.wrong_pages, found.lost_pages, found.writeback_pages) == (0, 0, 0)


def test_watermarks_are_obeyed(tmp_path: Path) -> None:
    """Higher watermarks write back earlier, and so take blocks. (A replay does not wait for the disk.)"""
    late = outcome(storm(560), tmp_path, pool_bytes=2 * MIB, low_watermark_frames=1, high_watermark_frames=1)
    early = outcome(storm(560), tmp_path, pool_bytes=2 * MIB, low_watermark_frames=400, high_watermark_frames=500)
    assert late.backing_used_max_bytes == late.writeback_frames == 0
    assert early.backing_used_max_bytes > 0


def test_a_wrong_page_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay notices a store that returns another content."""
    real: Callable[[Requests, int, int], bytes | None] = Requests.read_nowait

    def bad(requests: Requests, offset: int, length: int) -> bytes | None:
        content = real(requests, offset, length)
        return content if content is None or offset else b"x" + content[1:]

    monkeypatch.setattr(Requests, "read_nowait", bad)
    assert outcome(storm(80)).wrong_pages == 2


def test_packings_side_by_side() -> None:
    """A denser packing needs fewer frames for small zpages, and frees all of them."""
    records: list[Record] = [
        (at, kind, 12, at % 100 * 8, 8) for at, kind in enumerate([Kind.WRITE] * 100 + [Kind.READ] * 100)
    ]
    zbud, dense = (outcome(records, pool_bytes=8 * MIB, packing=packing) for packing in ("zbud", "dense"))
    assert zbud.wrong_pages == dense.wrong_pages == 0
    assert zbud.read_pages == dense.read_pages == 800
    assert zbud.pages_per_frame <= 2.0
    assert dense.pages_per_frame > 3.0
