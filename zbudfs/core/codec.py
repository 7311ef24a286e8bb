# SPDX-License-Identifier: MIT
"""The codec: it makes the stored form of a page, and the page from its stored form.

A page takes one of three forms, tried in this order:

    word    the page is one 8-byte word repeated (30-55 % of writable process memory is): kept as the word
    zpage   a zstd frame with content checksum, or a word too odd for the page table with a checksum of its own
    raw     neither fits a frame with its handle: the page itself

zstd has a dictionary without content, with only the tables of its entropy coder (core/dictionary.py). Levels up to 4 then
make, write, read and build no such tables for each page. At level -1 a page takes 0.85 of the time to compress and 0.8 of
the time to decompress. It has 1 to 8 % more bytes, which costs no frame as long as two zpages still fit into one. Higher
levels use the dictionary's tables where they are the smaller ones, and their zpages are as large as without.

zstd frames are magicless and without content size: 5 of some 840 bytes less, and every zpage decompresses to
4096 bytes anyway. The content checksum is on, so a damaged zpage is an error and never wrong bytes. Level -1 is the
default since it takes two thirds of the time of level 1. Two zpages share a frame whether they are 840 or 760 bytes long:
1.93 pages a frame at level -1 and at level 3 (measured).
"""

import sys
from collections.abc import Callable
from typing import Final
from zlib import crc32

import zstandard

from zbudfs.core.dictionary import DICTIONARY
from zbudfs.core.errors import PageLost
from zbudfs.core.units import PAGE_SIZE, PAGE_WORDS, WORD_SIZE

Decompress = Callable[[memoryview, int], bytes]
"""The type of a function that returns the content of a zpage. The number is the size of a page in bytes."""

DEFAULT_LEVEL: Final = -1
MIN_LEVEL: Final = -7
MAX_LEVEL: Final = 19

HASH_LOG: Final = 10
MIN_MATCH: Final = 5
"""Parameters of zstd below level 0. The hash table is copied for every page: a small one costs 4 % less time, and no bytes."""

_MAGIC: Final = zstandard.MAGIC_NUMBER.to_bytes(4, "little")
_DESCRIPTOR: Final = b"\x04"
"""The first byte of every frame of this codec: a content checksum, no content size, no dictionary. A zpage with another
first byte is damaged. Without this test one wrong bit could turn its checksum off."""

WORD_ZPAGE_SIZE: Final = 12
"""Bytes of a zpage that holds a word: the word and its CRC-32. `encode` never returns a zstd frame of this length."""

CHECK_BITS: Final = 25
_CHECKSUM_MASK: Final = (1 << (CHECK_BITS - 1)) - 1
WORD_CHECK: Final = 1 << (CHECK_BITS - 1)
"""The highest bit of a check: it says that the zpage is a word."""


def is_word(page: bytes | bytearray | memoryview, word: int) -> bool:
    """Return whether the page consists of `word` (8 bytes, in the machine's order) repeated."""
    return bytes(page) == word.to_bytes(WORD_SIZE, sys.byteorder) * PAGE_WORDS


def page_of_word(word: int) -> bytes:
    """Return the page that consists of `word` repeated."""
    return word.to_bytes(WORD_SIZE, sys.byteorder) * PAGE_WORDS


def word_zpage(word: int) -> bytes:
    """Return the zpage of a page that consists of `word` repeated."""
    content = word.to_bytes(WORD_SIZE, sys.byteorder)
    return content + crc32(content).to_bytes(4, "little")


def check_of(zpage: bytes | memoryview) -> int:
    """Return 25 bits that distinguish this zpage from others of its page: the end of its checksum, and "it is a word".

    The page table holds them, so that a reader recognises an old copy of a block, which is valid in itself.
    """
    check = int.from_bytes(zpage[-4:], "little") & _CHECKSUM_MASK
    return check if len(zpage) != WORD_ZPAGE_SIZE else check | WORD_CHECK


def check_of_raw(page: bytes | memoryview) -> int:
    """Return the check of a raw page, which carries no checksum of its own: 24 bits of its CRC-32."""
    return crc32(page) & _CHECKSUM_MASK


class CodecError(RuntimeError):
    """The zstandard library does not return the bytes that it compressed; the text is for the user."""


class Codec:
    """A zstd compressor at one level and the decompressor for every level.

    Not safe for use by two threads at once.
    """

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        """Make a codec. Raises ValueError for a level outside -7..19, and for 0, which zstd reads as "its default"."""
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
            force_max_window=True,  # otherwise zstd looks for matches in the dictionary too, without any success
            **fast,
        )
        tables = zstandard.ZstdCompressionDict(DICTIONARY)
        tables.precompute_compress(compression_params=parameters)
        self.compress = zstandard.ZstdCompressor(compression_params=parameters, dict_data=tables).compress
        """The function that makes a zstd frame of a page (4096 bytes)."""
        self.decompress = self._choose_decompress(tables)
        """The function that makes a page of a zstd frame and 4096; see `decode`."""

    def _choose_decompress(self, tables: zstandard.ZstdCompressionDict) -> Callable[[bytes | memoryview, int], bytes]:
        """Return the fastest function of this zstandard that returns a page intact. Raises CodecError if none does.

        zstandard before 0.24 looks for the magic number of a frame even in magicless mode. For it the function copies the
        zpage behind a magic number: 0.3 us more for each page.
        """
        direct = zstandard.ZstdDecompressor(dict_data=tables, format=zstandard.FORMAT_ZSTD1_MAGICLESS).decompress
        with_magic = zstandard.ZstdDecompressor(dict_data=tables).decompress

        def decompress_copy(zpage: bytes | memoryview, size: int) -> bytes:
            return with_magic(_MAGIC + zpage, size)

        page = DICTIONARY[:PAGE_SIZE].ljust(PAGE_SIZE, b"z")
        zpage = self.compress(page)
        why = "it returns other bytes"
        for decompress in (direct, decompress_copy):
            try:
                if decompress(zpage, PAGE_SIZE) == page:
                    return decompress
            except zstandard.ZstdError as error:
                why = str(error)
        raise CodecError(
            f"zstandard {zstandard.__version__} cannot decompress what it compresses ({why}): install another version of it"
        )

    def encode(self, page: bytes | memoryview) -> bytes:
        """Return the zpage of a page. It may be larger than a frame can hold, and larger than the page."""
        zpage = self.compress(page)
        if len(zpage) == WORD_ZPAGE_SIZE:  # impossible (the shortest is 10, the next 14), but never a word
            return bytes(page)
        return zpage

    def decode(self, zpage: bytes | memoryview) -> bytes:
        """Return the 4096 bytes of the page. Raises PageLost if the zpage is damaged."""
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
