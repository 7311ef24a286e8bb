# SPDX-License-Identifier: MIT
"""Settings: the refused values, their messages, and the way through JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbudfs.service.settings import (
    MAX_SIZE_BYTES,
    MIN_POOL_BYTES,
    MIN_SIZE_BYTES,
    Settings,
    SettingsError,
    default_backing,
    default_pool_bytes,
    default_size_bytes,
    ram_bytes,
)

GOOD: dict[str, Any] = {
    "mountpoint": "/mnt/z",
    "size_bytes": 1 << 30,
    "pool_bytes": 1 << 28,
    "backing": None,
    "level": -1,
    "packing": "zbud",
}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("mountpoint", "mnt", "not an absolute path"),
        ("mountpoint", "/a\0b", "zero byte"),
        ("mountpoint", 5, "must be of type str"),
        ("size_bytes", MIN_SIZE_BYTES - 4096, "must be 1M or more"),
        ("size_bytes", MAX_SIZE_BYTES + 4096, "16T less one page"),
        ("size_bytes", 5_000_000, "the nearest are 4997120 and 5001216"),
        ("size_bytes", 1e9, "must be of type int"),
        ("size_bytes", True, "must be of type int"),
        ("pool_bytes", MIN_POOL_BYTES - 1, "too small: it must be 1M or more"),
        ("backing", "file", "not an absolute path"),
        ("backing", "/mnt/z/file", "lies on the mountpoint"),
        ("backing", 7, "must be a path or none"),
        ("packing", "dense:1", "packing: 'dense:1' is not a packing: write zbud"),
        ("packing", 2, "it must be of type str"),
        ("level", 0, "zstd takes it for"),
        ("level", 20, "does not exist: write one from -7"),
        ("level", -8, "does not exist"),
        ("encrypt", 1, "must be of type bool"),
    ],
)
def test_a_value_that_cannot_work_is_refused(field: str, value: object, reason: str) -> None:
    """The message names the value and the right form."""
    with pytest.raises(SettingsError, match=reason) as caught:
        Settings(**{**GOOD, field: value})
    assert field.removesuffix("_bytes") in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size_bytes", MIN_SIZE_BYTES),
        ("size_bytes", MAX_SIZE_BYTES),
        ("pool_bytes", MIN_POOL_BYTES),
        ("pool_bytes", MIN_POOL_BYTES + 1),
        ("backing", "/mnt/zz"),
        ("level", -7),
        ("level", 19),
        ("encrypt", False),
        ("packing", "dense"),
        ("packing", "dense:2"),
        ("mountpoint", "/"),
    ],
)
def test_the_edges_are_accepted(field: str, value: object) -> None:
    """The smallest and the largest values are accepted."""
    assert getattr(Settings(**{**GOOD, field: value}), field) == value


@given(
    st.binary(max_size=40).filter(lambda path: b"\0" not in path),
    st.none() | st.just("/var/lib/ä\n"),
    st.integers(-7, 19).filter(bool),
)
def test_json_brings_everything_back(path: bytes, backing: str | None, level: int) -> None:
    """Settings survive the way through one line of ASCII, with any bytes in a path."""
    settings = Settings(**{**GOOD, "mountpoint": "/m/" + path.decode("utf-8", "surrogateescape"), "backing": backing})
    text = settings.to_json()
    assert text.isascii()
    assert "\n" not in text
    assert Settings.from_json(text) == Settings.from_json(text.encode()) == settings


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must be a JSON object"),
        (json.dumps({**GOOD, "colour": 1}), "unknown settings: colour"),
        (json.dumps({"mountpoint": "/x"}), "missing settings: backing, pool_bytes, size_bytes"),
        (json.dumps({**GOOD, "level": 0}), "level 0"),
    ],
)
def test_json_that_is_not_settings_is_refused(text: str, reason: str) -> None:
    """JSON of another shape is refused with the wrong names."""
    with pytest.raises(SettingsError, match=reason):
        Settings.from_json(text)


def test_ram_is_read(tmp_path: Path) -> None:
    """MemTotal is in KiB."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemFree: 7 kB\nMemTotal:       24683656 kB\n")
    assert ram_bytes(str(tmp_path)) == 24683656 * 1024
    (tmp_path / "proc/meminfo").write_text("MemFree: 7 kB\n")
    with pytest.raises(ValueError, match="MemTotal"):
        ram_bytes(str(tmp_path))


@given(st.integers(4 << 20, 1 << 46))
def test_defaults_are_valid(ram: int) -> None:
    """The defaults are valid with any RAM: as large as RAM, and a quarter for the pool."""
    settings = Settings(**{**GOOD, "size_bytes": default_size_bytes(ram), "pool_bytes": default_pool_bytes(ram)})
    assert settings.pool_bytes % 4096 == 0
    assert settings.pool_bytes <= max(ram // 4, MIN_POOL_BYTES)


def test_backing_files_are_named_after_mountpoints() -> None:
    """Different mountpoints have different files, also if the name must be cut."""
    assert default_backing("/mnt/my swap") == r"/var/lib/zbudfs/mnt-my\x20swap.backing"
    long = "/" + "ä" * 200
    names = {Path(default_backing(path)).name for path in (long, long + "b", long + "c")}
    assert len(names) == 3
    assert all(len(name) <= 255 for name in names)
