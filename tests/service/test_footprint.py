# SPDX-License-Identifier: MIT
"""The memory that a daemon takes and saves with its settings equals that of a real store, and tables have a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from zbudfs.core.packing import Packing
from zbudfs.service.footprint import TABLES_SHARE, Footprint, check_tables, largest_size, memory_sizes
from zbudfs.service.settings import (
    MAX_SIZE_BYTES,
    MIN_POOL_BYTES,
    Settings,
    SettingsError,
    default_pool_bytes,
    default_size_bytes,
)
from zbudfs.store.memory import StoreMemory

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
PACKINGS = ("zbud", "dense:2", "dense:7")


def settings(size: int, pool: int, packing: str = "zbud", backing: str | None = "/var/x") -> Settings:
    """Return settings with these sizes in bytes."""
    return Settings(mountpoint="/mnt/z", size_bytes=size, pool_bytes=pool, packing=packing, backing=backing)


def defaults(ram: int, packing: str = "zbud") -> Settings:
    """Return the default settings of a machine."""
    return settings(default_size_bytes(ram), default_pool_bytes(ram), packing)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("backing", ["/var/x", None])
def test_a_real_store_has_these_sizes(packing: str, backing: str | None, tmp_path: Path) -> None:
    """Each file has the computed size, up to the end of its last page, and no file is missing."""
    wanted = settings(64 * MIB, 8 * MIB, packing, backing)
    sizes = memory_sizes(wanted)
    StoreMemory(
        64 * MIB, 8 * MIB // 4096, backed=backing is not None, folder=str(tmp_path), packing=Packing.parse(packing)
    )
    names = {"board", "pages", "frames", "frametable", "freeframes", "requestslots", "trace"}
    names |= {"blocks", "outgoing"} if backing else set()
    assert {path.name for path in tmp_path.iterdir()} == names
    found = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sizes.total_bytes <= found < sizes.total_bytes + len(names) * 65536
    parts = sizes.tables_bytes + sizes.buffers_bytes + sizes.trace + 8 * MIB
    assert parts == sizes.total_bytes


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ram", [32 * MIB, 256 * MIB, 768 * MIB, 4 * GIB, 1 * TIB, 12 * TIB])
def test_the_default_is_never_refused(ram: int, packing: str) -> None:
    """The default size and a size of RAM are accepted, with any pool that fits into RAM."""
    check_tables(defaults(ram, packing), ram)
    for pool in (MIN_POOL_BYTES, ram):
        check_tables(settings(default_size_bytes(ram), pool, packing), ram)


@pytest.mark.parametrize(
    ("size", "ram", "words"),
    [
        (400 * GIB, 768 * MIB, "size of 400 GiB needs 927.3 MiB of tables locked in RAM, more than a tenth of this"),
        (400 * GIB, 768 * MIB, "this machine's 768 MiB: make it 32G or less"),
        (1 * TIB, 768 * MIB, "2.3 GiB of tables"),
        (MAX_SIZE_BYTES, 256 * GIB, "37.1 GiB of tables"),
    ],
)
def test_tables_that_are_too_large(size: int, ram: int, words: str) -> None:
    """The error has the numbers and the remedy."""
    with pytest.raises(SettingsError) as caught:
        check_tables(settings(size, 64 * MIB), ram)
    assert words in str(caught.value)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ram", [64 * MIB, 768 * MIB, 24 * GIB])
def test_the_largest_size(ram: int, packing: str) -> None:
    """The largest size is accepted, and 1 MiB more is not."""
    pool = default_pool_bytes(ram)
    largest = largest_size(settings(MAX_SIZE_BYTES, pool, packing), ram)
    check_tables(settings(largest, pool, packing), ram)
    with pytest.raises(SettingsError):
        check_tables(settings(largest + MIB, pool, packing), ram)
    assert largest > 10 * ram
    assert memory_sizes(settings(largest, pool, packing)).tables_bytes <= ram / TABLES_SHARE


@pytest.mark.parametrize(
    ("ram", "packing", "worthwhile"),
    [
        (256 * MIB, "zbud", False),
        (272 * MIB, "zbud", False),
        (288 * MIB, "zbud", True),
        (384 * MIB, "zbud", True),
        (512 * MIB, "zbud", True),
        (96 * MIB, "dense:7", False),
        (256 * MIB, "dense:7", True),
        (4 * GIB, "zbud", True),
    ],
)
def test_pools_that_pay(ram: int, packing: str, worthwhile: bool) -> None:
    """A pool that saves less of usual memory than the processes take does not pay."""
    footprint = Footprint.of([defaults(ram, packing)], ram)
    assert footprint.is_worthwhile is worthwhile
    assert footprint.typically_saves_bytes <= footprint.saves_bytes
    assert footprint.holds_bytes <= ram
    assert footprint.own_bytes < 100 * MIB + ram // 200


def test_instances_add_up() -> None:
    """Each instance has its own processes and buffers."""
    one = settings(256 * MIB, 64 * MIB)
    single, double = Footprint.of([one], GIB), Footprint.of([one, one], GIB)
    for name in ("processes_bytes", "tables_bytes", "buffers_bytes", "pool_bytes", "holds_bytes", "own_bytes"):
        assert getattr(double, name) == 2 * getattr(single, name)
    assert double.as_object()["own_bytes"] == double.own_bytes


def test_a_device_smaller_than_the_pool() -> None:
    """A pool holds no more than the device has."""
    assert Footprint.of([settings(8 * MIB, 64 * MIB)], GIB).holds_bytes == 8 * MIB
