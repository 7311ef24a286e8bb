# SPDX-License-Identifier: MIT
"""Packings by name and by code."""

from __future__ import annotations

import pytest

from tests.core.frames import Caller, packed_by
from zbudfs.core.codec import WORD_ZPAGE_SIZE, Codec
from zbudfs.core.packing import DENSE, ZBUD, Packing
from zbudfs.core.page_table import ENTRY_SIZE, PageTable
from zbudfs.core.units import PAGE_SIZE

NAMES = ["zbud", *(f"dense:{zpages}" for zpages in range(2, 8))]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_codes(name: str) -> None:
    """The name and the code give the same packing, which makes an allocator of its own kind."""
    packing = Packing.parse(name)
    assert str(packing) == name
    assert Packing.of_code(packing.code) == packing
    assert 0 < packing.code < 1 << 16
    assert packing.code & 0xFF == packing.zpages
    with packed_by(packing):
        caller = Caller(3)
        caller.store(1, 100)
        caller.allocator.check()
        allocator = caller.allocator
        # hot.c knows each packing by the same number.
        allocator.hot_path(PageTable(memoryview(bytearray(ENTRY_SIZE)), 1), memoryview(bytearray(3 * 4)).cast("I"))
    assert type(allocator) is packing.kind
    assert allocator.most_zpages == packing.zpages


def test_codes_are_apart() -> None:
    """No two packings have the same code, and any other number is no packing."""
    codes = {Packing.parse(name).code for name in NAMES}
    assert len(codes) == len(NAMES)
    assert [code for code in range(1 << 16) if Packing.of_code(code) is not None] == sorted(codes)
    assert (Packing.parse("dense"), Packing.parse("zbud")) == (DENSE, ZBUD)


@pytest.mark.parametrize(
    "text", ["", "zbud:2", "dense:", "dense:1", "dense:8", "dense:02", "dense:7 ", "dense:²", "Dense"]
)
def test_other_words_are_refused(text: str) -> None:
    """The error names the right words."""
    with pytest.raises(ValueError, match=r"is not a packing: write zbud, dense, or dense:N with N from 2 to 7"):
        Packing.parse(text)


def test_a_zpage_as_long_as_a_word_is_not_used() -> None:
    """A zstd frame of this length would look like a same-filled page, so such a page would be kept raw."""
    codec = Codec()
    codec.compress = lambda data: bytes(WORD_ZPAGE_SIZE)
    assert codec.encode(b"x" * PAGE_SIZE) == b"x" * PAGE_SIZE
