# SPDX-License-Identifier: MIT
"""The stored form of a page gives that page back, and damage is an error and never wrong bytes."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import Any

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from tests.core.samples import BIG, HALF, RAW, SMALL, page, text_page
from zbudfs.core.allocator import max_zpage_size
from zbudfs.core.codec import (
    CHECK_BITS,
    DEFAULT_LEVEL,
    HASH_LOG,
    MAX_LEVEL,
    MIN_LEVEL,
    MIN_MATCH,
    WORD_CHECK,
    WORD_ZPAGE_SIZE,
    Codec,
    CodecError,
    check_of,
    check_of_raw,
    is_word,
    page_of_word,
    word_zpage,
)
from zbudfs.core.dictionary import DICTIONARY
from zbudfs.core.errors import PageLost
from zbudfs.core.units import PAGE_SIZE, PAGE_WORDS, WORD_SIZE
from zbudfs.store.status_area import LAYOUT

LEVELS = [level for level in range(MIN_LEVEL, MAX_LEVEL + 1) if level]
CODEC = Codec()
WORDS = [0, 1, 0xFF, 0x0102030405060708, 0x8000000000000000, (1 << 64) - 1, 0xDEADBEEF, 0xDEADBEEFDEADBEEF]
WORDS += list(struct.unpack("4Q", struct.pack("4d", 0.1, -1.0, float("nan"), float("inf"))))
SAMPLES = {
    "text": text_page(1),
    "half": page(2, HALF),
    "small": page(3, SMALL),
    "nearly nothing": page(4, 1),
    "almost all zeros": bytes(PAGE_SIZE - 1) + b"x",
    "a counter": struct.pack(f"{PAGE_WORDS}Q", *range(PAGE_WORDS)),
    "a period of nine": (b"ninebytes" * PAGE_SIZE)[:PAGE_SIZE],
    "the largest that fits": page(5, 3980),
}


def decoded(zpage: bytes) -> bytes | None:
    """Return the page of a zpage, or None if it is lost. Any other exception fails the test."""
    try:
        return CODEC.decode(zpage)
    except PageLost:
        return None


# ---- there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_goes_there_and_back(level: int) -> None:
    """The zpages of each level give their pages back, with the decompressor of any other level."""
    codec = Codec(level)
    assert codec.level == level
    for content in [*SAMPLES.values(), page(6, RAW)]:
        zpage = codec.encode(content)
        assert codec.decode(zpage) == content
        assert CODEC.decode(zpage) == content
        assert codec.encode(memoryview(content)) == zpage
        assert codec.decode(memoryview(zpage)) == content


@pytest.mark.parametrize("level", [0, MIN_LEVEL - 1, MAX_LEVEL + 1, 100])
def test_other_levels_are_refused(level: int) -> None:
    """A level that zstd would silently read as another level is refused."""
    with pytest.raises(ValueError, match=r"is not one of -7\.\.-1, 1\.\.19"):
        Codec(level)


def test_the_default_level() -> None:
    """The default is the fast level that packs as well in the measurement."""
    assert CODEC.level == DEFAULT_LEVEL == -1


def test_levels_make_a_difference() -> None:
    """The level reaches zstd: a high level gives smaller zpages than a low one."""
    content = text_page(9)
    assert len(Codec(19).encode(content)) < len(Codec(1).encode(content)) < len(Codec(-7).encode(content))


PIECES = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=64),
        st.builds(lambda piece, times: piece * times, st.binary(min_size=1, max_size=16), st.integers(2, 300)),
        st.builds(
            lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 1 << 30), st.integers(1, 3000)
        ),
    ),
    min_size=1,
    max_size=8,
)


@given(PIECES)
@example([bytes(PAGE_SIZE)])
@example([random.Random(0).randbytes(PAGE_SIZE)])
def test_any_page_goes_there_and_back(pieces: list[bytes]) -> None:
    """A page of noise, repetition and any other bytes comes back unchanged."""
    whole = b"".join(pieces)
    content = (whole * (PAGE_SIZE // len(whole) + 1))[:PAGE_SIZE]
    zpage = CODEC.encode(content)
    assert len(zpage) != WORD_ZPAGE_SIZE
    assert CODEC.decode(zpage) == content


def test_noise_is_too_large_for_a_buddy() -> None:
    """A page that does not compress gives a zpage beyond the limit, so it is kept raw."""
    assert len(CODEC.encode(page(1, RAW))) > max_zpage_size()


# ---- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS, ids=hex)
def test_a_word_is_found_and_comes_back(word: int) -> None:
    """A page of one repeated word is the page of that word, also as a zpage."""
    content = page_of_word(word)
    assert content == struct.pack("=Q", word) * PAGE_WORDS
    assert is_word(content, word)
    assert is_word(memoryview(content), word)
    zpage = word_zpage(word)
    assert len(zpage) == WORD_ZPAGE_SIZE
    assert CODEC.decode(zpage) == content
    assert CODEC.decode(memoryview(zpage)) == content


@pytest.mark.parametrize("word", [0, 0x4141414141414141, (1 << 64) - 1], ids=hex)
def test_one_other_byte_makes_it_no_word(word: int) -> None:
    """A page that differs from the repeated word in one bit of any byte is not the page of the word."""
    content = bytearray(page_of_word(word))
    for at in range(PAGE_SIZE):
        content[at] ^= 1 << at % 8
        assert not is_word(content, word), f"byte {at}"
        content[at] ^= 1 << at % 8
    assert is_word(content, word)


def test_another_word_is_not_it() -> None:
    """The page of one word is not the page of another, nor of the same word shifted by a byte."""
    assert not is_word(page_of_word(1), 2)
    assert not is_word(page_of_word(1), 1 << 8)
    assert not is_word(page_of_word(0), 1)


def test_every_flip_of_a_word_zpage_is_seen() -> None:
    """A flip of any bit of the word or of its checksum makes the page lost."""
    for word in WORDS:
        zpage = word_zpage(word)
        for bit in range(len(zpage) * 8):
            assert decoded(flipped(zpage, bit)) is None


# ---- damage -------------------------------------------------------------------------------------------------------


def flipped(zpage: bytes, *bits: int) -> bytes:
    """Return a copy with some bits flipped."""
    damaged = bytearray(zpage)
    for bit in bits:
        damaged[bit >> 3] ^= 1 << (bit & 7)
    return bytes(damaged)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("level", [-7, -1, 1, 19])
def test_every_flipped_bit_is_seen(name: str, level: int) -> None:
    """A flip of any bit makes the page lost or, if the bit has no meaning, gives the right page."""
    content = SAMPLES[name]
    zpage = Codec(level).encode(content)
    harmless = sum(decoded_or_right(flipped(zpage, bit), content) for bit in range(len(zpage) * 8))
    assert harmless <= 64, f"{harmless} bits of {len(zpage)} bytes mean nothing"


def decoded_or_right(zpage: bytes, content: bytes) -> bool:
    """Return whether a damaged zpage gives its page. Another page fails the test."""
    found = decoded(zpage)
    assert found in (None, content), "wrong bytes"
    return found is not None


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_seen(name: str) -> None:
    """A zpage that lacks any part of its end is lost."""
    zpage = CODEC.encode(SAMPLES[name])
    for length in range(len(zpage)):
        assert decoded(zpage[:length]) is None, f"{length} bytes of {len(zpage)}"


@pytest.mark.parametrize("name", ["text", "half"])
def test_no_first_byte_turns_the_checks_off(name: str) -> None:
    """A damaged descriptor, which says whether there is a checksum and how much memory is needed, does no harm.

    With any first byte, damage behind it is found, and the only error is PageLost. There is no MemoryError for the
    gigabytes that a damaged content size asks for.
    """
    content = SAMPLES[name]
    right = CODEC.encode(content)
    generator = random.Random(name)
    for first in range(256):
        zpage = bytes([first]) + right[1:]
        decoded_or_right(zpage, content)
        for _ in range(40):
            decoded_or_right(flipped(zpage, generator.randrange(8, len(zpage) * 8)), content)
        for fill in (b"\xff", b"\x7f"):
            decoded_or_right(zpage[:1] + fill * 9 + zpage[10:], content)
            decoded_or_right(zpage[:2] + fill * 7 + zpage[9:], content)


@given(st.binary(max_size=200))
def test_garbage_is_lost(garbage: bytes) -> None:
    """Bytes that are no zpage are lost, and give no other error."""
    assert decoded(garbage) is None


@given(st.integers(0, 1 << 30), st.sampled_from([64, 512, 1024]), st.data())
def test_a_torn_zpage_is_lost(seed: int, sector: int, data: st.DataObject) -> None:
    """A zpage with some sectors of another zpage is lost."""
    ours, theirs = CODEC.encode(page(seed, BIG)), CODEC.encode(page(seed + 1, BIG))
    first = data.draw(st.integers(0, len(ours) // sector - 1)) * sector
    torn = ours[:first] + theirs[first : first + sector] + ours[first + sector :]
    assert decoded(torn) in (None, page(seed, BIG)) and (torn == ours or decoded(torn) is None)


def magicless(content: bytes, *, checksum: bool) -> bytes:
    """Return a zstd frame as the codec makes it, of content of any length."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_checksum=checksum, write_content_size=False
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 2 * PAGE_SIZE])
def test_less_or_more_than_a_page_is_lost(size: int) -> None:
    """A valid zstd frame of more or fewer than 4096 bytes is no page."""
    assert decoded(magicless(bytes(size), checksum=True)) is None


def test_a_page_without_checksum_is_refused() -> None:
    """A zstd frame without a checksum is refused, since the codec never stores one."""
    content = text_page(3)
    assert decoded(magicless(content, checksum=True)) == content
    assert decoded(magicless(content, checksum=False)) is None


# ---- size and check ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_magicless_saves_bytes(name: str) -> None:
    """Without magic number and content size a zpage is at least four bytes shorter than an ordinary zstd frame."""
    content = SAMPLES[name]
    parameters = zstandard.ZstdCompressionParameters.from_level(
        DEFAULT_LEVEL,
        source_size=PAGE_SIZE,
        hash_log=HASH_LOG,
        min_match=MIN_MATCH,
        force_max_window=True,
        write_checksum=True,
        write_dict_id=False,
    )
    tables = zstandard.ZstdCompressionDict(DICTIONARY)
    tables.precompute_compress(compression_params=parameters)
    ordinary = zstandard.ZstdCompressor(compression_params=parameters, dict_data=tables).compress(content)
    zpage = CODEC.encode(content)
    assert not zpage.startswith(zstandard.MAGIC_NUMBER.to_bytes(4, "little"))
    assert len(ordinary) - len(zpage) >= 4


def test_a_change_of_the_dictionary_is_a_change_of_the_layout() -> None:
    """A change of the dictionary needs another number of the layout, and a change of this test."""
    known = {0x7A627564_000B: "1a4d9677523fe78b6f140ae1b3b43de4e979c809fe1f32583ee6b42e8edad4d3"}
    assert known.get(LAYOUT) == hashlib.sha256(DICTIONARY).hexdigest()


def test_every_page_uses_the_tables_of_the_dictionary() -> None:
    """Without the dictionary a zpage is damaged or another page, and never the same page by chance."""
    zpage = CODEC.encode(text_page(1))
    plain = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    with pytest.raises(zstandard.ZstdError):
        plain.decompress(zpage, PAGE_SIZE)


def test_the_check_is_the_end_of_the_checksum() -> None:
    """The check is 24 bits of the checksum and depends on it alone. A view of the same bytes gives the same check."""
    zpage = CODEC.encode(text_page(4))
    check = check_of(zpage)
    assert check == int.from_bytes(zpage[-4:-1], "little") < 1 << CHECK_BITS
    assert check_of(memoryview(zpage)) == check
    assert check_of(b"x" * 100 + zpage[-4:]) == check


@pytest.mark.parametrize("word", WORDS, ids=hex)
def test_the_check_marks_a_word(word: int) -> None:
    """One bit of the check says that a zpage is a word. No other zpage and no raw page has this bit."""
    assert check_of(word_zpage(word)) & WORD_CHECK
    assert check_of(word_zpage(word)) < 1 << CHECK_BITS
    assert not check_of(CODEC.encode(page_of_word(word))) & WORD_CHECK
    assert not check_of_raw(page_of_word(word)) & WORD_CHECK


def test_versions_of_a_page_have_different_checks() -> None:
    """Pages that differ a little have different checks, as zpages, as words and raw."""
    contents = [bytes([version]) + text_page(5)[1:] for version in range(200)]
    assert len({check_of(CODEC.encode(content)) for content in contents}) == 200
    assert len({check_of_raw(content) for content in contents}) == 200
    assert len({check_of(word_zpage(word)) for word in range(200)}) == 200
    assert check_of_raw(contents[0]) == check_of_raw(memoryview(contents[0])) < 1 << CHECK_BITS


def test_a_word_length_is_no_zstd_length() -> None:
    """No page's zstd frame has the length that marks a word."""
    lengths = {len(CODEC.encode(bytes(at) + b"x" + bytes(PAGE_SIZE - at - 1))) for at in range(0, PAGE_SIZE, 7)}
    lengths |= {
        len(CODEC.encode((bytes([number]) * run + b"y" * PAGE_SIZE)[:PAGE_SIZE]))
        for number in range(16)
        for run in range(16)
    }
    assert WORD_ZPAGE_SIZE not in lengths
    assert WORD_SIZE < WORD_ZPAGE_SIZE


@pytest.mark.parametrize("broken", ["raises", "other bytes"])
def test_a_library_that_does_not_give_pages_back(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with such a library is refused."""

    class Decompressor:
        def __init__(self, **options: object) -> None:
            pass

        def decompress(self, zpage: bytes, size: int) -> bytes:
            if broken == "raises":
                raise zstandard.ZstdError("error determining content size from frame header")
            return bytes(size)

    monkeypatch.setattr(zstandard, "ZstdDecompressor", Decompressor)
    with pytest.raises(CodecError, match=r"cannot decompress what it compresses \(.*\): install another version"):
        Codec()


def test_a_library_that_looks_for_a_magic_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """zstandard before 0.24 always looks for it. The zpages are the same, and damage is found as well."""

    class Decompressor:
        def __init__(self, **options: Any) -> None:
            self._real = real(**options)

        def decompress(self, zpage: bytes | memoryview, size: int) -> bytes:
            if zstandard.frame_content_size(zpage) != -1:
                raise AssertionError("there is a content size")
            return self._real.decompress(zpage, size)

    real = zstandard.ZstdDecompressor
    monkeypatch.setattr(zstandard, "ZstdDecompressor", Decompressor)
    codec = Codec()
    for content in SAMPLES.values():
        zpage = codec.encode(content)
        assert zpage == CODEC.encode(content)
        assert codec.decode(zpage) == codec.decode(memoryview(zpage)) == content
    with pytest.raises(PageLost, match="does not decompress"):
        codec.decode(zpage[:-1] + bytes([zpage[-1] ^ 1]))
