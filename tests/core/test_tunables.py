# SPDX-License-Identifier: MIT
"""Settings that can change while a mount runs: the right texts, and the errors of the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbudfs.core.tunables import NAMES, ORDERS, TUNABLES, Limits, parse

MIB = 1 << 20
LIMITS = Limits(pool_bytes=16 * MIB, backed=True, low_watermark_frames=64, high_watermark_frames=170)
BARE = Limits(pool_bytes=16 * MIB, backed=False, low_watermark_frames=64, high_watermark_frames=170)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("pool_limit_bytes", "8M\n", 8 * MIB),
        ("pool_limit_bytes", "16777216", 16 * MIB),
        ("pool_limit_bytes", "1.5M", 3 * MIB // 2),
        ("pool_limit_bytes", "1048577", MIB),  # zbudfs does not use a part of a frame
        ("low_watermark_frames", "1", 1),
        ("low_watermark_frames", "170", 170),
        ("low_watermark_frames", "auto", 0),
        ("high_watermark_frames", "64", 64),
        ("high_watermark_frames", "4096", 4096),
        ("high_watermark_frames", " auto \n", 0),
        ("level", "-7", -7),
        ("level", "19\n", 19),
        ("writeback_enabled", "0", 0),
        ("writeback_enabled", "1", 1),
        ("writeback_budget_bytes_per_day", "20G", 20 << 30),
        ("writeback_budget_bytes_per_day", "0", 0),
        ("age_seconds", "3600", 3600),
        ("age_seconds", "0", 0),
        ("writeback", "all", -1),
        ("writeback", "100", 100),
        ("writeback", "0", 0),
        ("drop_ephemeral", "1", 1),
    ],
)
def test_right_values(name: str, text: str, value: int) -> None:
    """Space around a value does not matter, as in sysfs."""
    assert parse(name, text, LIMITS) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            (name, text)
            for name in NAMES
            for text in ("", "x", "1 2", "1\n2", "0x10", "1e3", "--1", "9" * 100, "٣", "²")
        ),
        *((name, "-1") for name in NAMES if name != "level"),
        ("pool_limit_bytes", "17M"),
        ("pool_limit_bytes", "1023K"),
        ("pool_limit_bytes", "50%"),
        ("low_watermark_frames", "0"),
        ("low_watermark_frames", "171"),
        ("high_watermark_frames", "63"),
        ("high_watermark_frames", "4097"),
        ("level", "0"),
        ("level", "-8"),
        ("level", "20"),
        ("writeback_enabled", "2"),
        ("writeback_enabled", "yes"),
        ("writeback_budget_bytes_per_day", "4095"),
        ("writeback_budget_bytes_per_day", "2000000T"),
        ("age_seconds", "10000000000"),
        ("writeback", "4097"),
        ("drop_ephemeral", "0"),
        ("drop_ephemeral", "2"),
    ],
)
def test_wrong_values_say_what_would_be_right(name: str, text: str) -> None:
    """The error is one line that names the key and the right form."""
    with pytest.raises(ValueError, match=name) as caught:
        parse(name, text, LIMITS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "text"),
    [("writeback_enabled", "1"), ("writeback_budget_bytes_per_day", "1G"), ("age_seconds", "9"), ("writeback", "all")],
)
def test_settings_that_need_a_backing_file(name: str, text: str) -> None:
    """Without a backing file the setting is refused with that reason."""
    with pytest.raises(ValueError, match="no backing file"):
        parse(name, text, BARE)


def test_off_needs_no_backing_file() -> None:
    """A script can turn the setting off on any mount."""
    for name in ("writeback_enabled", "writeback_budget_bytes_per_day", "age_seconds"):
        assert parse(name, "0", BARE) == 0


def test_a_small_pool_can_be_its_own_limit() -> None:
    """A pool of less than 1 MiB accepts its own size as the limit."""
    assert parse("pool_limit_bytes", "256K", Limits(256 << 10, False, 1, 2)) == 256 << 10


def test_unknown_names_are_no_values() -> None:
    """Unknown names are left to the caller."""
    with pytest.raises(KeyError):
        parse("none", "1", LIMITS)


@given(st.sampled_from(NAMES), st.text(max_size=80))
def test_any_text_is_a_number_or_a_sentence(name: str, text: str) -> None:
    """Any text gives a number or an error of one sentence."""
    try:
        found: int | str = parse(name, text, LIMITS)
    except ValueError as error:
        found = str(error)
    assert isinstance(found, int) or name in found


def test_every_key_is_explained() -> None:
    """Names are unique, and each has a meaning and a unit."""
    assert len(set(NAMES)) == len(TUNABLES)
    assert {"writeback", "drop_ephemeral"} == ORDERS
    for tunable in TUNABLES:
        assert tunable.unit
        assert 20 < len(tunable.meaning) < 110, tunable.name
