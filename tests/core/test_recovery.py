# SPDX-License-Identifier: MIT
"""A new process recounts the page table of a dead one, and claims zpages by their handles."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.core.frames import Caller, lru_of, packed_by, size_of
from zbudfs.core.allocator import (
    INDEX_MASK,
    KINDS,
    MAX_CHUNKS,
    PERSISTENT_KIND,
    REF_BITS,
    Allocator,
    Resident,
)
from zbudfs.core.packing import Packing
from zbudfs.core.page_table import (
    ABSENT,
    BLOCK,
    FRAME,
    KIND_MASK,
    RAW_FRAME,
    WORD,
    PageTable,
    entry,
    entry_of_word,
    is_word_zpage,
)
from zbudfs.core.units import PAGE_WORDS, WORD_SIZE

FRAMES = 6
WORD_CHECK = 1 << 24
"""The highest bit of a check marks a same-filled page that is kept as a zpage."""


@pytest.fixture(autouse=True, params=["zbud", "dense:2", "dense:7"])
def packing(request: pytest.FixtureRequest) -> Iterator[Packing]:
    """Return each packing in turn."""
    with packed_by(Packing.parse(request.param)) as packing:
        yield packing


def heir_of(caller: Caller) -> Allocator:
    """Return the allocator of another process over the same memory, ready for claims."""
    heir = caller.packing.allocator(memoryview(caller.buffer), memoryview(caller.table), FRAMES, attach=True)
    heir.reset([(0, FRAMES)])
    return heir


def filled() -> tuple[Caller, dict[int, int]]:
    """Return a caller with zpages of many sizes, alone and in company, and a raw page, and their refs by page."""
    caller = Caller(FRAMES)
    refs = {}
    for number, chunks in enumerate((20, MAX_CHUNKS, 30, 10, 1)):
        refs[100 + number] = caller.store(100 + number, size_of(chunks))
    refs[500] = caller.raw(500)
    caller.allocator.check()
    return caller, refs


def test_everything_is_claimed_and_counts_again() -> None:
    """Each zpage is claimed at its ref and nowhere else. Lists, masks and counters then follow from the frames."""
    caller, refs = filled()
    before = caller.allocator.counters()
    contents = {page: caller.zpage(ref, page) for page, ref in refs.items() if page != 500}
    heir = heir_of(caller)
    for page, ref in refs.items():
        assert (heir.restore_raw if page == 500 else heir.restore)(ref, page)
    for frame in range(FRAMES):
        assert heir.restore_done(frame) == any(ref >> REF_BITS == frame for ref in refs.values())
    heir.check()
    after = heir.counters()
    assert {name: after[name] for name in after if "cumul" not in name} == {
        name: before[name] for name in before if "cumul" not in name
    }
    for page, content in contents.items():
        view = heir.zpage(refs[page], page)
        assert view is not None
        assert bytes(view) == content
    raw = refs[500] >> REF_BITS
    assert heir.residents(raw) == [Resident(refs[500], 500)]
    assert lru_of(heir, PERSISTENT_KIND)[0] == raw, "raw frames go first"
    for ref in refs.values():
        caller.give(heir.free(ref))
        heir.check()
    assert len(caller.free_frames) == FRAMES


def test_counting_goes_on() -> None:
    """Counters that only grow continue in another process from their old value."""
    caller, refs = filled()
    caller.allocator.writeback_begin(refs[100] >> REF_BITS)
    caller.give(caller.allocator.writeback_done(refs[100] >> REF_BITS))
    names = [f"{kind}_{name}" for name in ("cumul_zpages", "cumul_zbytes", "evicted_pageframes") for kind in KINDS]
    before = [caller.allocator.counters()[name] for name in names]
    assert before[0::2] == [5, sum(map(size_of, (20, MAX_CHUNKS, 30, 10, 1))), 1]
    heir = heir_of(caller)
    assert [heir.counters()[name] for name in names] == before
    heir.create_finish(heir.create_prep(caller.take(), 100), 9, bytes(100))
    assert [heir.counters()[name] for name in names] == [before[0] + 1, before[1], before[2] + 100, *before[3:]]


def test_attaching_writes_nothing() -> None:
    """Attaching changes no byte of table or frames until `reset`, since another process may still use the memory."""
    caller, _ = filled()
    before = bytes(caller.table), bytes(caller.buffer)
    caller.packing.allocator(memoryview(caller.buffer), memoryview(caller.table), FRAMES, attach=True)
    assert (bytes(caller.table), bytes(caller.buffer)) == before
    junk = bytearray(b"\xa5" * len(caller.table))
    caller.packing.allocator(memoryview(caller.buffer), memoryview(junk), FRAMES, attach=True)
    assert junk == b"\xa5" * len(junk)


def test_wrong_claims_are_refused() -> None:
    """Another page's zpage, a claimed one, one beyond the frames, a wrong index and a raw frame are refused."""
    caller, refs = filled()
    heir = heir_of(caller)
    ref = refs[100]
    assert not heir.restore(ref, 101)
    assert heir.restore(ref, 100)
    assert not heir.restore(ref, 100)
    assert not heir.restore_raw(ref, 100), "zpages are in there"
    assert not heir.restore(FRAMES << REF_BITS, 100)
    assert not heir.restore_raw(FRAMES << REF_BITS, 100)
    assert not heir.restore(ref | INDEX_MASK, 100)
    raw = refs[500]
    assert not heir.restore_raw(raw | 1, 500)
    assert heir.restore_raw(raw, 500)
    assert not heir.restore_raw(raw, 500)
    assert not heir.restore(raw, 500)
    for frame in range(FRAMES):
        heir.restore_done(frame)
    heir.check()
    assert heir.counters()["pers_zpages"] == 1
    assert heir.counters()["pers_raw_count"] == 1


def test_a_size_that_cannot_be_is_not_claimed() -> None:
    """A size of zero or more than the room of a frame is refused."""
    for size in (0, size_of(MAX_CHUNKS) + 1, 4095):
        caller, refs = filled()
        words = memoryview(caller.buffer).cast("Q")
        at = (refs[101] >> REF_BITS) * PAGE_WORDS
        words[at] = words[at] & ~0xFFF | size
        heir = heir_of(caller)
        assert not heir.restore(refs[101], 101)
        assert not heir.restore_done(refs[101] >> REF_BITS)
        heir.check()


# ---- the page table ---------------------------------------------------------------------------------------------------


def some_table(nr_pages: int, stored: dict[int, int]) -> PageTable:
    """Return a table over a buffer with entries of another process."""
    buffer = memoryview(bytearray(nr_pages * WORD_SIZE))
    words = buffer.cast("Q")
    for page, value in stored.items():
        words[page] = value
    return PageTable(buffer, nr_pages)


@pytest.mark.parametrize("nr_pages", [1, 511, 512, 513, 1024, 2000])
def test_recount(nr_pages: int) -> None:
    """Counts equal those of a walk over the entries, at any place of a stretch."""
    source = random.Random(nr_pages)
    kinds = [
        entry(FRAME, 5, 7),
        entry(RAW_FRAME, 8, 1),
        entry(BLOCK, 9, 2),
        entry(BLOCK, 9, WORD_CHECK),
        entry(FRAME, 3, WORD_CHECK | 5),
        entry(RAW_FRAME, 3, WORD_CHECK),
    ]
    word = entry_of_word(1 << 60)
    assert word is not None
    for pages in ([], [0], [nr_pages - 1], list(range(nr_pages)), source.sample(range(nr_pages), nr_pages // 3)):
        stored = {page: source.choice([*kinds, word]) for page in pages}
        table = some_table(nr_pages, stored)
        for number in range(len(table.numbers)):
            table.numbers[number] = 77
        table.recount()
        table.check()
        expected = [0] * (KIND_MASK + 1)
        for page in range(nr_pages):
            expected[stored.get(page, ABSENT) & KIND_MASK] += 1
        assert table.counts == expected
        assert table.word_zpages == sum(map(is_word_zpage, stored.values()))
        assert table.stored_pages == len(stored)


@pytest.mark.parametrize("nr_pages", [1, 512, 700, 1024, 2000])
def test_stretches_have_everything_that_is_stored(nr_pages: int) -> None:
    """Each stored page is in one of the stretches, at its number. Empty stretches are left out."""
    word = entry(WORD, 0, 0)
    for stored in ([0], [nr_pages - 1], [511 % nr_pages], [512 % nr_pages], []):
        table = some_table(nr_pages, dict.fromkeys(stored, word))
        found = list(table.stretches())
        assert len(found) == len({page // 512 for page in stored})
        assert [first + at for first, values in found for at, value in enumerate(values) if value] == stored
        assert all(first % 512 == 0 and first + len(values) <= nr_pages for first, values in found)


def test_a_word_that_is_overwritten_is_no_longer_counted() -> None:
    """`store` counts same-filled pages kept as a zpage, both when they come and when they go."""
    table = some_table(4, {})
    table.store(0, entry(FRAME, 1, WORD_CHECK))
    table.store(1, entry(RAW_FRAME, 1, WORD_CHECK))
    assert table.word_zpages == 1
    table.store(0, entry(FRAME, 1, 1))
    assert table.word_zpages == 0
    table.store(0, entry(BLOCK, 1, WORD_CHECK))
    table.store(0, ABSENT)
    assert table.word_zpages == 0
    table.check()
