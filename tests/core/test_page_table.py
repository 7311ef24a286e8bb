# SPDX-License-Identifier: MIT
"""The page table: entries of each kind, words at the borders of the possible ones, and the scan for stored pages."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zbudfs.core.codec import CHECK_BITS, WORD_CHECK
from zbudfs.core.page_table import (
    ABSENT,
    BLOCK,
    CHECK_SHIFT,
    ENTRY_SIZE,
    FRAME,
    KIND_BITS,
    KIND_MASK,
    RAW_BLOCK,
    RAW_FRAME,
    REF_MASK,
    WORD,
    WORD_HALVES,
    WORD_INVERTED,
    PageTable,
    entry,
    entry_check,
    entry_kind,
    entry_of_word,
    entry_ref,
    touched_size,
    word_of_entry,
)

PLACES = [FRAME, RAW_FRAME, BLOCK, RAW_BLOCK]
LARGEST_CHECK = (1 << CHECK_BITS) - 1
ALL_ONES = (1 << 64) - 1
LIMIT = 1 << 61


def make(nr_pages: int) -> PageTable:
    """Return a table of absent pages."""
    return PageTable(memoryview(bytearray(nr_pages * ENTRY_SIZE)), nr_pages)


# ---- entries ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(PLACES), st.integers(0, REF_MASK), st.integers(0, LARGEST_CHECK))
@example(FRAME, 0, 0)
@example(RAW_BLOCK, REF_MASK, LARGEST_CHECK)
@example(BLOCK, REF_MASK, 0)
@example(FRAME, 0, LARGEST_CHECK)
def test_an_entry_keeps_its_parts(kind: int, ref: int, check: int) -> None:
    """Kind, place and check come out of an entry unchanged, and the entry fits into 8 bytes."""
    value = entry(kind, ref, check)
    assert (value & KIND_MASK, value >> KIND_BITS & REF_MASK, value >> CHECK_SHIFT) == (kind, ref, check)
    assert (entry_kind(value), entry_ref(value), entry_check(value)) == (kind, ref, check)
    assert value < 1 << 64


def test_all_ones_are_the_inverse_of_nothing() -> None:
    """The C code has the same encoding."""
    assert entry_of_word(ALL_ONES) == WORD_INVERTED
    assert entry_of_word(0) == WORD


def test_kinds_are_apart() -> None:
    """All kinds differ and fit their field, and the entry of an absent page is 0."""
    kinds = [ABSENT, WORD, WORD_INVERTED, WORD_HALVES, *PLACES]
    assert sorted(kinds) == list(range(KIND_MASK + 1))
    assert ABSENT == 0


def test_a_device_of_16_tib_has_room() -> None:
    """The place in an entry can hold each ref of 2**32 blocks."""
    assert REF_MASK >= (1 << 32) * 2 + 1


# ---- words --------------------------------------------------------------------------------------------------------

FITTING = [
    (0, WORD),
    (1, WORD),
    (LIMIT - 1, WORD),
    (0xFFFFFFFF, WORD),
    (ALL_ONES, WORD_INVERTED),
    (ALL_ONES - 1, WORD_INVERTED),
    (LIMIT - 1 ^ ALL_ONES, WORD_INVERTED),
    (0xFFFFFFFF_80000000, WORD_INVERTED),
    (0x20000000_20000000, WORD_HALVES),
    (0x7F7F7F7F_7F7F7F7F, WORD_HALVES),
    (0xDEADBEEF_DEADBEEF, WORD_HALVES),
    (0x80000000_80000000, WORD_HALVES),
]
ODD = [LIMIT, LIMIT + 1, LIMIT ^ ALL_ONES, 0x80000000_00000000, 0x7FFFFFFF_FFFFFFFF, 0xDEADBEEF_DEADBEEE]
ODD += [struct.unpack("Q", struct.pack("d", 0.1))[0]]


@pytest.mark.parametrize(("word", "kind"), FITTING, ids=lambda value: f"{value:x}")
def test_a_word_that_fits(word: int, kind: int) -> None:
    """The words next to each border are stored unchanged."""
    value = entry_of_word(word)
    assert value is not None
    assert value < 1 << 64
    assert value & KIND_MASK == kind
    assert word_of_entry(value) == word


@pytest.mark.parametrize("word", ODD, ids=hex)
def test_a_word_that_does_not_fit(word: int) -> None:
    """A word beyond each border is refused, and not cut."""
    assert entry_of_word(word) is None


@given(st.integers(0, ALL_ONES))
@example(LIMIT)
def test_no_word_comes_back_as_another(word: int) -> None:
    """Any word is refused, or comes back whole from an entry that can be stored."""
    value = entry_of_word(word)
    if value is not None:
        table = make(1)
        table.store(0, value)
        assert word_of_entry(table.entries[0]) == word
        assert table.counts[value & KIND_MASK] == 1


@given(st.integers(0, (1 << 32) - 1))
def test_every_pattern_of_32_bits_fits(half: int) -> None:
    """Any 32-bit number needs no frame, whether it is zero-extended, sign-extended or repeated."""
    negative = half | 0xFFFFFFFF_00000000
    for word in (half, negative, half << 32 | half):
        value = entry_of_word(word)
        assert value is not None
        assert word_of_entry(value) == word


# ---- the table ----------------------------------------------------------------------------------------------------


def test_store_gives_what_stood_there() -> None:
    """Each store returns the old entry, and the counts follow."""
    table = make(3)
    one, two = entry(FRAME, 5, 7), entry(RAW_BLOCK, 9, 1)
    assert table.store(1, one) == 0
    assert table.store(1, two) == one
    assert table.store(2, one) == 0
    assert list(table.entries) == [0, two, one]
    assert table.counts == [1, 0, 0, 0, 1, 0, 0, 1]
    assert table.stored_pages == 2
    assert table.store(1, 0) == two
    assert table.stored_pages == 1
    table.check()


def test_words_in_zpages_are_counted() -> None:
    """A zpage of an odd word is known by its check, in a frame and in a block. A word of 61 bits is in the entry."""
    table = make(3)
    table.store(0, entry(FRAME, 1, WORD_CHECK | 5))
    table.store(1, entry(FRAME, 2, WORD_CHECK - 1))
    word = entry_of_word(LIMIT - 1)
    assert word is not None
    table.store(2, word)
    assert table.word_zpages == 1
    table.store(0, entry(BLOCK, 9, WORD_CHECK | 5))
    table.check()
    assert table.word_zpages == 1
    table.store(1, entry(FRAME, 3, WORD_CHECK))
    assert table.word_zpages == 2
    table.store(0, word)
    table.store(1, 0)
    assert table.word_zpages == 0
    table.check()


def test_check_sees_a_wrong_count() -> None:
    """The recount finds an entry that was changed without the table."""
    table = make(2)
    table.entries[0] = entry(FRAME, 1, 1)
    with pytest.raises(AssertionError, match="a recount gives"):
        table.check()


def test_the_entries_lie_in_the_buffer() -> None:
    """An entry is 8 bytes of the caller's buffer, which may be longer than needed."""
    buffer = bytearray(3 * ENTRY_SIZE)
    PageTable(memoryview(buffer), 2).store(1, entry(BLOCK, 3, 4))
    assert buffer == bytes(8) + struct.pack("=Q", entry(BLOCK, 3, 4)) + bytes(8)


SOME = st.integers(0, 1700)


@given(st.sets(SOME | st.sampled_from([0, 511, 512, 513, 1023, 1024, 1535, 1536, 1699]), max_size=6), SOME, SOME)
@example({512}, 0, 512)
@example({511}, 0, 512)
@example({512}, 0, 1700)
@example({1024}, 0, 1700)
@example({1024}, 512, 1700)
@example({1536}, 0, 1700)
@example({1699}, 1, 1700)
@example({1699}, 0, 1699)
def test_next_stored_agrees_with_a_walk(stored: set[int], page: int, stop: int) -> None:
    """The scan finds the first stored page below the stop, with any start and end."""
    table = make(1700)
    for number in stored:
        if number < 1700:
            table.store(number, entry(FRAME, number, 0))
    expected = next((number for number in range(page, stop) if table.entries[number]), stop)
    assert table.next_stored(page, stop) == max(expected, stop if page >= stop else 0)


def test_next_stored_sees_the_last_byte_of_an_entry() -> None:
    """The scan does not skip an entry of which only the highest bits are set."""
    table = make(1024)
    table.entries[700] = 1 << 62
    assert table.next_stored(0, 1024) == 700


def test_a_long_look_gives_signs_of_life() -> None:
    """The scan gives a sign of life for each stretch that may have been used, also if nothing is stored."""
    table = PageTable(memoryview(bytearray(8 * 5000)), 5000)
    table.store(4999, 1 << 3 | 1)
    beats: list[int] = []
    assert len(list(table.stretches(lambda: beats.append(1)))) == 1
    assert len(beats) == 10
    table.recount(lambda: beats.append(1))
    assert (len(beats), table.stored_pages) == (11, 1)  # the other nine are marked as empty


# ---- stretches that were never used ---------------------------------------------------------------------------------------


def with_touched(nr_pages: int) -> tuple[PageTable, memoryview]:
    """Return a table that marks used stretches, and its entries."""
    buffer = memoryview(bytearray(nr_pages * ENTRY_SIZE))
    return PageTable(buffer, nr_pages, memoryview(bytearray(touched_size(nr_pages)))), buffer.cast("Q")


@pytest.mark.parametrize("nr_pages", [1, 512, 513, 5 * 512 + 7])
def test_the_first_store_marks_its_stretch(nr_pages: int) -> None:
    """The scan finds each stretch that has an entry, also the short last one, and forgets one that was emptied."""
    table, _ = with_touched(nr_pages)
    assert list(table.stretches()) == []
    table.store(nr_pages - 1, entry(FRAME, 1, 1))
    assert bytes(table.touched) == bytes(touched_size(nr_pages) - 1) + b"\1"
    ((first, values),) = table.stretches()
    assert (first + len(values), values[-1]) == (nr_pages, entry(FRAME, 1, 1))
    assert table.next_stored(0, nr_pages) == nr_pages - 1
    table.store(nr_pages - 1, 0)
    assert table.next_stored(0, nr_pages) == nr_pages
    assert list(table.stretches()) == []
    assert not any(table.touched)
    table.check()


def test_stretches_that_were_never_used_are_passed_over() -> None:
    """No scan reads such a stretch, so an entry written there without the table is found only by the check."""
    table, entries = with_touched(10_000 * 512)
    table.store(9_000 * 512 + 3, entry(FRAME, 1, 1))
    entries[4_000 * 512] = entry(FRAME, 2, 2)
    assert [first for first, _ in table.stretches()] == [9_000 * 512]
    assert table.next_stored(0, 10_000 * 512) == 9_000 * 512 + 3
    assert table.next_stored(17, 9_000 * 512) == 9_000 * 512
    table.recount()
    assert table.stored_pages == 1
    with pytest.raises(AssertionError, match="stretch 4000 is not touched"):
        table.check()
