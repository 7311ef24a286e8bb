# SPDX-License-Identifier: MIT
"""Sizes: a table of right ones, a table of wrong ones, and rules that hold for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbudfs.core.sizes import SUFFIXES, format_size, parse_size, parse_size_or_percent
from zbudfs.core.units import pages_in


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 64 << 10),
        ("512M", 512 << 20),
        ("4G", 4 << 30),
        ("16T", 16 << 40),
        ("4g", 4 << 30),
        ("1.5G", 3 << 29),
        ("0.5k", 512),
        ("4096.0", 4096),
        ("007M", 7 << 20),
    ],
)
def test_a_size_is_read(text: str, size_bytes: int) -> None:
    """Each form of the grammar gives its exact number of bytes."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", " 4G", "4G ", "4 G", "4GB", "4GiB", "4KB", "-1", "+1", "1_000", "1e3", "0x10", "G", ".5G", "1.G", "4P", "25%"],
)
def test_wrong_sizes_are_refused(text: str) -> None:
    """Any other text is refused with the right form."""
    with pytest.raises(ValueError, match=r"is not a size: write digits with an optional K, M, G or T"):
        parse_size(text)


@pytest.mark.parametrize("text", ["٤G", "4\N{KELVIN SIGN}", "1" * 40, "4G\n"])
def test_texts_that_look_like_a_size_are_refused(text: str) -> None:
    """Digits and letters of other scripts, endless numbers and line ends are no part of the grammar."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_fraction_of_a_byte_is_refused() -> None:
    """A size that is no whole number of bytes is refused, with its neighbours."""
    with pytest.raises(ValueError, match=r"'1\.1G' is not a whole number of bytes: write 1181116006 or 1181116007"):
        parse_size("1.1G")
    with pytest.raises(ValueError, match="write 0 or 1"):
        parse_size("0.5")


@given(st.integers(0, 1 << 50), st.sampled_from(sorted(SUFFIXES)))
def test_every_number_with_every_suffix(number: int, suffix: str) -> None:
    """A number with a suffix is the product, in upper and lower case."""
    assert parse_size(f"{number}{suffix}") == parse_size(f"{number}{suffix.lower()}") == number * SUFFIXES[suffix]


@given(st.text())
def test_no_text_gives_another_error(text: str) -> None:
    """Any text gives a size or a ValueError."""
    for parse in (parse_size, lambda text: parse_size_or_percent(text, 1000)):
        try:
            size_bytes = parse(text)
        except ValueError:
            continue
        assert size_bytes >= 0


@pytest.mark.parametrize(
    ("text", "whole_bytes", "size_bytes"),
    [("25%", 1000, 250), ("100%", 77, 77), ("0%", 77, 0), ("12.5%", 4096, 512), ("33%", 10, 3), ("64K", 10, 65536)],
)
def test_a_percentage_is_read(text: str, whole_bytes: int, size_bytes: int) -> None:
    """A percentage is a share of the whole, rounded down. A size is still a size."""
    assert parse_size_or_percent(text, whole_bytes) == size_bytes


@pytest.mark.parametrize(
    ("text", "reason"), [("%", "not a perc"), ("x%", "not a perc"), ("100.1%", "more than"), ("x", "or a")]
)
def test_wrong_percentages_are_refused(text: str, reason: str) -> None:
    """A wrong share is refused with the right form."""
    with pytest.raises(ValueError, match=reason):
        parse_size_or_percent(text, 1000)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 50, "1024 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_a_size_is_shown(size_bytes: int, text: str) -> None:
    """A size is shown with one digit after the point at most."""
    assert format_size(size_bytes) == text


@given(st.integers(1, 1 << 60))
def test_the_shown_size_is_near(size_bytes: int) -> None:
    """The shown size is within a twentieth of its unit."""
    number, unit = format_size(size_bytes).split()
    per = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]
    assert abs(float(number) * per - size_bytes) <= per / 20 * 1.0001


@pytest.mark.parametrize(("size", "pages"), [(0, 0), (1, 1), (4095, 1), (4096, 1), (4097, 2), (1 << 40, 1 << 28)])
def test_bytes_in_whole_pages(size: int, pages: int) -> None:
    """Bytes are rounded up to whole pages."""
    assert pages_in(size) == pages
