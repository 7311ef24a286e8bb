# SPDX-License-Identifier: MIT
"""From a page to what is stored of it, and back.

A page takes one of three forms, tried in this order:

    word    the page is one 8-byte word repeated (30-55 % of writable process memory is): kept as the word
    zpage   a zstd frame with content checksum, or a word too odd for the page table with a checksum of its own
    raw     neither fits a buddy: the page itself

zstd has a dictionary: no content, only tables for its entropy coder (core/dictionary.py). Levels up to 4 then neither make
tables of their own for each page nor write, read and build them again: at level -1 a page takes 0.85 of the time to compress
and 0.8 to decompress, and has 1 to 8 % more bytes, which costs no frame as long as two zpages still fit into one. Higher levels
take those tables where they are the smaller ones, and their zpages are as large as without.

zstd frames are magicless and without content size: 5 of some 840 bytes less, and every zpage decompresses to
4096 bytes anyway. The content checksum is on, so a damaged zpage is an error and never wrong bytes. Level -1
is the default because two zpages share a frame whether they are 840 or 760 bytes long (measured: 1.93 pages a
frame at level -1 and at level 3), and it takes two thirds of the time of level 1.
"""

import sys
from typing import Final
from zlib import crc32

import zstandard

from zbudfs.core.dictionary import DICTIONARY
from zbudfs.core.errors import PageLost
from zbudfs.core.units import PAGE_SIZE, PAGE_WORDS, WORD_SIZE

DEFAULT_LEVEL: Final = -1
MIN_LEVEL: Final = -7
MAX_LEVEL: Final = 19

HASH_LOG: Final = 10
MIN_MATCH: Final = 5
"""Parameters of zstd below level 0. The hash table is copied for every page: a small one costs 4 % less time, and no bytes."""

_DESCRIPTOR: Final = b"\x04"
"""The first byte of every frame made here: a content checksum, no content size, no dictionary. A zpage that says
otherwise is damaged; without this test one bit would turn its checksum off."""

WORD_ZPAGE_SIZE: Final = 12
"""Bytes of a zpage that holds a word: the word and its CRC-32. No zstd frame of a page is taken if it has this length."""

CHECK_BITS: Final = 25
_CHECKSUM_MASK: Final = (1 << (CHECK_BITS - 1)) - 1
WORD_CHECK: Final = 1 << (CHECK_BITS - 1)
"""The highest bit of a check: the zpage is a word."""


def is_word(page: bytes | bytearray | memoryview, word: int) -> bool:
    """Whether the page consists of `word` (8 bytes, in the machine's order) repeated."""
    return bytes(page) == word.to_bytes(WORD_SIZE, sys.byteorder) * PAGE_WORDS


def page_of_word(word: int) -> bytes:
    """The page that consists of `word` repeated."""
    return word.to_bytes(WORD_SIZE, sys.byteorder) * PAGE_WORDS


def word_zpage(word: int) -> bytes:
    """A zpage for a page that consists of `word` repeated."""
    content = word.to_bytes(WORD_SIZE, sys.byteorder)
    return content + crc32(content).to_bytes(4, "little")


def check_of(zpage: bytes | memoryview) -> int:
    """25 bits that tell this zpage from another of the same page: the end of its checksum, and whether it is a word.

    They stand in the page table, so that an old copy of a block, right in itself, is seen to be old.
    """
    check = int.from_bytes(zpage[-4:], "little") & _CHECKSUM_MASK
    return check if len(zpage) != WORD_ZPAGE_SIZE else check | WORD_CHECK


def check_of_raw(page: bytes | memoryview) -> int:
    """The same for a raw page, which carries no checksum of its own."""
    return crc32(page) & _CHECKSUM_MASK


class CodecError(RuntimeError):
    """The zstandard library does not give back what it compressed; the text is for the user."""


class Codec:
    """A zstd compressor at one level and the decompressor for every level.

    Not safe for use by two threads at once.
    """

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        """Raises ValueError for a level outside -7..19, and for 0, which zstd reads as "its default"."""
        if not MIN_LEVEL <= level <= MAX_LEVEL or level == 0:
            raise ValueError(f"zstd level {level} is not one of {MIN_LEVEL}..-1, 1..{MAX_LEVEL}")
        self.level = level
        magicless = zstandard.FORMAT_ZSTD1_MAGICLESS
        fast = {"hash_log": HASH_LOG, "min_match": MIN_MATCH} if level < 0 else {}
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level,
            source_size=PAGE_SIZE,
            format=magicless,
            write_checksum=True,
            write_content_size=False,
            write_dict_id=False,
            force_max_window=True,  # else zstd looks for matches in the dictionary too, and in vain
            **fast,
        )
        tables = zstandard.ZstdCompressionDict(DICTIONARY)
        tables.precompute_compress(compression_params=parameters)
        self.compress = zstandard.ZstdCompressor(compression_params=parameters, dict_data=tables).compress
        """From a page (4096 bytes) to its zstd frame."""
        self.decompress = zstandard.ZstdDecompressor(dict_data=tables, format=magicless).decompress
        """From a zstd frame and 4096 to the page; see `decode`."""
        self._try()

    def _try(self) -> None:
        """Raise CodecError unless a page comes back. zstandard before 0.24 compresses to frames that it cannot decompress."""
        page = DICTIONARY[:PAGE_SIZE].ljust(PAGE_SIZE, b"z")
        try:
            if self.decompress(self.compress(page), PAGE_SIZE) == page:
                return
            why = "it gives other bytes back"
        except zstandard.ZstdError as error:
            why = str(error)
        raise CodecError(
            f"zstandard {zstandard.__version__} cannot decompress what it compresses ({why}): install zstandard 0.24 or later"
        )

    def encode(self, page: bytes | memoryview) -> bytes:
        """The zpage of a page; it may be larger than a buddy can hold, or than the page."""
        zpage = self.compress(page)
        if len(zpage) == WORD_ZPAGE_SIZE:  # cannot happen (the shortest is 10, the next 14): kept apart all the same
            return bytes(page)
        return zpage

    def decode(self, zpage: bytes | memoryview) -> bytes:
        """The 4096 bytes of the page; PageLost if the zpage is damaged."""
        if len(zpage) == WORD_ZPAGE_SIZE:
            content = bytes(zpage[:WORD_SIZE])
            if crc32(content) != int.from_bytes(zpage[WORD_SIZE:], "little"):
                raise PageLost("a same-filled page fails its checksum")
            return content * PAGE_WORDS
        if zpage[:1] != _DESCRIPTOR:
            raise PageLost("a zpage's first byte is damaged")
        try:
            page = self.decompress(zpage, PAGE_SIZE)
        except zstandard.ZstdError as error:
            raise PageLost(f"a zpage of {len(zpage)} bytes does not decompress: {error}") from None
        if len(page) != PAGE_SIZE:
            raise PageLost(f"a zpage decompressed to {len(page)} bytes instead of {PAGE_SIZE}")
        return page
