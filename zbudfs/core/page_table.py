# SPDX-License-Identifier: MIT
"""The page table: one 8-byte entry for each page of the device, which alone says where the page is.

    63                  39 38                                3 2    0
    | check, 25 bits      |  ref in a frame or a block        | kind |
    | word, 61 bits                                           | kind |

One 8-byte store of an entry is the commit of a change. The check is the end of the checksum of the stored form, so that
a reader recognises an outdated copy of the same page. A block is a copy of a frame, so a place in a block is a ref with
the block number instead of the frame number.

A same-filled page has a word of 64 bits, and an entry has room for 61. Words that are a zero-extended, sign-extended or
twice repeated 32-bit word fit into the entry. Any other word (a double such as 0.1) becomes a zpage of one chunk; the
highest bit of its check distinguishes it from other zpages.
"""

from collections.abc import Callable, Iterator
from typing import Final

from zbudfs.core.codec import CHECK_BITS
from zbudfs.core.units import WORD_SIZE

ENTRY_SIZE: Final = 8

ABSENT: Final = 0
"""Never written, or discarded: a read returns zeros. The whole entry is 0."""
WORD: Final = 1
"""Same-filled: the word itself, below 2**61."""
WORD_INVERTED: Final = 2
"""Same-filled: all bits of the word inverted."""
WORD_HALVES: Final = 3
"""Same-filled: both halves of the word are this 32-bit pattern."""
FRAME: Final = 4
"""A zpage in a frame of the pool."""
RAW_FRAME: Final = 5
"""The page itself, in a frame of the pool."""
BLOCK: Final = 6
"""A zpage in a block of the backing file."""
RAW_BLOCK: Final = 7
"""The page itself, in a block of the backing file."""

LOST: Final = RAW_BLOCK
"""The entry of a page that was lost: a raw page in block 0, which is the backing file's header and holds none."""

KIND_BITS: Final = 3
KIND_MASK: Final = (1 << KIND_BITS) - 1
REF_WIDTH: Final = 36
REF_MASK: Final = (1 << REF_WIDTH) - 1
CHECK_SHIFT: Final = KIND_BITS + REF_WIDTH

_WORD_ZPAGES: Final = KIND_MASK + 1
"""Index in `PageTable.numbers` of the same-filled pages that are kept as a zpage. The kinds are before it."""

_WORD_LIMIT: Final = 1 << (64 - KIND_BITS)
_ALL_ONES: Final = (1 << 64) - 1
STRETCH_PAGES: Final = 512
"""Pages that share a byte of `touched`. hot.h has STRETCH_SHIFT for it."""
_EMPTY_STRETCH: Final = bytes(STRETCH_PAGES * ENTRY_SIZE)
_LOOK_STRETCHES: Final = 4096
"""Bytes of `touched` that one search reads."""

assert CHECK_SHIFT + CHECK_BITS <= 64


def entry(kind: int, ref: int, check: int) -> int:
    """Return the entry of a page kept at `ref`; kind is one of FRAME, RAW_FRAME, BLOCK, RAW_BLOCK."""
    return check << CHECK_SHIFT | ref << KIND_BITS | kind


def entry_kind(entry: int) -> int:
    """Return the kind of an entry: ABSENT, WORD, ... RAW_BLOCK."""
    return entry & KIND_MASK


def entry_ref(entry: int) -> int:
    """Return the ref of an entry of one of the kinds FRAME, RAW_FRAME, BLOCK, RAW_BLOCK."""
    return entry >> KIND_BITS & REF_MASK


def entry_check(entry: int) -> int:
    """Return the check of an entry of one of the kinds FRAME, RAW_FRAME, BLOCK, RAW_BLOCK."""
    return entry >> CHECK_SHIFT


def moved_entry(old: int, kind: int, ref: int) -> int:
    """Return the new entry of a page whose stored form is copied unchanged from the place in `old` to `ref`."""
    return entry(kind, ref, entry_check(old))


def entry_of_word(word: int) -> int | None:
    """Return the entry of a same-filled page, or None if its word does not fit."""
    if word < _WORD_LIMIT:
        return word << KIND_BITS | WORD
    inverted = word ^ _ALL_ONES
    if inverted < _WORD_LIMIT:
        return inverted << KIND_BITS | WORD_INVERTED
    if word >> 32 == word & 0xFFFFFFFF:
        return word >> 32 << KIND_BITS | WORD_HALVES
    return None


def word_of_entry(entry: int) -> int:
    """Return the word of a same-filled page's entry."""
    payload = entry >> KIND_BITS
    kind = entry & KIND_MASK
    if kind == WORD:
        return payload
    if kind == WORD_INVERTED:
        return payload ^ _ALL_ONES
    return payload << 32 | payload


def is_word_zpage(entry: int) -> bool:
    """Return whether the entry is of a same-filled page that is kept as a zpage."""
    return entry >> 63 == 1 and entry & KIND_MASK in (FRAME, BLOCK)


def touched_size(nr_pages: int) -> int:
    """Return the bytes of `touched` of a page table."""
    return -(-nr_pages // STRETCH_PAGES)


class PageTable:
    """The entries of `nr_pages` pages in `buffer`, a zeroed writable memoryview of bytes.

    `touched` is a zeroed writable memoryview of `touched_size(nr_pages)` bytes. It has a byte for each stretch of
    STRETCH_PAGES pages: 1 if an entry of the stretch may be stored. The byte is set before the first entry is stored, so
    that a scan of the table can skip stretches that were never used. So the cost of a scan follows the stored pages and not
    the size of the device. Without `touched` a scan reads every stretch.

    `counts[kind]` is the number of entries of each kind, `word_zpages` the number of same-filled pages kept as a zpage.
    `numbers` holds both, one after the other, for the hot path in C, which counts there too.
    """

    def __init__(self, buffer: memoryview, nr_pages: int, touched: memoryview | None = None) -> None:
        self.nr_pages = nr_pages
        if touched is None:
            touched = memoryview(bytearray(b"\1" * touched_size(nr_pages)))
        self.touched = touched[: touched_size(nr_pages)]
        self._bytes = buffer[: nr_pages * ENTRY_SIZE]
        self.entries = self._bytes.cast("Q")
        self.numbers = memoryview(bytearray(WORD_SIZE * (_WORD_ZPAGES + 1))).cast("q")
        self.numbers[ABSENT] = nr_pages

    def store(self, page: int, entry: int) -> int:
        """Commit `entry` as the state of the page. Return the old entry."""
        entries = self.entries
        old: int = entries[page]
        if not old:
            self.touched[page // STRETCH_PAGES] = 1  # first: a process may be killed between the two
        entries[page] = entry
        numbers = self.numbers
        numbers[old & KIND_MASK] -= 1
        numbers[entry & KIND_MASK] += 1
        if (old | entry) >> 63:
            numbers[_WORD_ZPAGES] += is_word_zpage(entry) - is_word_zpage(old)
        return old

    def stretches(self, beat: Callable[[], None] | None = None) -> Iterator[tuple[int, list[int]]]:
        """Yield (first page, entries) of each stretch that has a stored page; `entries` has the absent pages too.

        The method calls `beat` for each stretch that was ever used, also for an empty one.
        """
        number, end = 0, len(self.touched)
        while (number := self._next_touched(number, end)) < end:
            if beat is not None:
                beat()
            first = number * STRETCH_PAGES
            stretch = self.entries[first : first + STRETCH_PAGES]
            if bytes(stretch) != _EMPTY_STRETCH[: len(stretch) * ENTRY_SIZE]:
                yield first, stretch.tolist()
            else:
                self.touched[number] = 0
            number += 1

    def _next_touched(self, number: int, end: int) -> int:
        """Return the first touched stretch from `number` on, below `end`; `end` if there is none."""
        while number < end:
            piece = bytes(self.touched[number : min(number + _LOOK_STRETCHES, end)])
            at = piece.find(1)
            if at >= 0:
                return number + at
            number += len(piece)
        return end

    def recount(self, beat: Callable[[], None] | None = None) -> None:
        """Set `counts` and `word_zpages` from the entries; `beat` as for `stretches`."""
        counts = [0] * (KIND_MASK + 1)
        word_zpages = 0
        for _, values in self.stretches(beat):
            for value in values:
                counts[value & KIND_MASK] += 1
                if value >> 63:
                    word_zpages += is_word_zpage(value)
        counts[ABSENT] = self.nr_pages - sum(counts[1:])
        for number, value in enumerate((*counts, word_zpages)):
            self.numbers[number] = value

    def next_stored(self, page: int, stop: int) -> int:
        """Return the first page from `page` on, below `stop`, that is not absent; `stop` if there is none.

        The method skips stretches that were never used, and compares a stretch without a stored page as a whole.
        """
        entries = self.entries
        while page < stop:
            if not page % STRETCH_PAGES:
                page = self._next_touched(page // STRETCH_PAGES, touched_size(stop)) * STRETCH_PAGES
                if page + STRETCH_PAGES <= stop and (
                    bytes(self._bytes[page * WORD_SIZE : (page + STRETCH_PAGES) * WORD_SIZE]) == _EMPTY_STRETCH
                ):
                    page += STRETCH_PAGES
                    continue
                if page >= stop:
                    break
            if entries[page]:
                return page
            page += 1
        return stop

    @property
    def counts(self) -> list[int]:
        """The number of entries of each kind."""
        return self.numbers[:_WORD_ZPAGES].tolist()

    @property
    def word_zpages(self) -> int:
        """The number of same-filled pages that are kept as a zpage."""
        return self.numbers[_WORD_ZPAGES]

    @property
    def stored_pages(self) -> int:
        """The number of pages that are not absent."""
        return self.nr_pages - self.numbers[ABSENT]

    def check(self) -> None:
        """Raise AssertionError if the counts differ from a recount. O(pages)."""
        recount = [0] * (KIND_MASK + 1)
        word_zpages = 0
        for number, touched in enumerate(self.touched):
            first = number * STRETCH_PAGES
            assert touched or not any(self.entries[first : first + STRETCH_PAGES]), f"stretch {number} is not touched"
        for value in self.entries:
            recount[value & KIND_MASK] += 1
            word_zpages += is_word_zpage(value)
        assert word_zpages == self.word_zpages, f"{self.word_zpages} words in zpages, a recount gives {word_zpages}"
        assert recount == self.counts, f"kinds are {self.counts}, a recount gives {recount}"
