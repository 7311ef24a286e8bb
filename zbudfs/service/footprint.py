# SPDX-License-Identifier: MIT
"""The RAM that a daemon takes for itself, and the RAM that its pool can save, computed from its settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from zbudfs.core.packing import Packing
from zbudfs.core.sizes import format_size
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.service.settings import MIN_SIZE_BYTES, Settings, SettingsError
from zbudfs.store.memory import MemorySizes

PROCESSES_BYTES: Final = 60 << 20
"""RAM of keeper, worker and standby of an empty daemon, without the store's memory: 15 + 17 + 17 MiB of their own, and 11 MiB
of libraries that they share. Measured: `grep -E '^(Pss_Anon|Shared_Clean)' /proc/PID/smaps_rollup` of the three."""

TYPICAL_ZPAGES: Final = {"zbud": 1.93, "dense": 3.18}
"""Zpages in a frame with the memory of common programs at level -1; see docs/understand/packing.md."""

TABLES_SHARE: Final = 10
"""Tables may take one part in this many of RAM. Chosen: the default takes one part in 237."""

SMALL_RAM_BYTES: Final = 1 << 30
"""On machines with this much RAM or less, `zbudfs mount` always reports what zbudfs takes."""


def memory_sizes(settings: Settings) -> MemorySizes:
    """Return the sizes of the memory that a daemon with these settings makes."""
    return MemorySizes.of(
        settings.size_bytes,
        settings.pool_bytes >> PAGE_SHIFT,
        backed=settings.backing is not None,
        packing=Packing.parse(settings.packing),
    )


def check_tables(settings: Settings, ram: int) -> None:
    """Raise SettingsError if the tables for these settings take too much of `ram` bytes of RAM."""
    tables = memory_sizes(settings).tables_bytes
    if tables * TABLES_SHARE <= ram:
        return
    raise SettingsError(
        f"size of {format_size(settings.size_bytes)} needs {format_size(tables)} of tables locked in RAM, more than a tenth"
        f" of this machine's {format_size(ram)}: make it {_typed(largest_size(settings, ram))} or less"
    )


def largest_size(settings: Settings, ram: int) -> int:
    """Return the largest size in bytes, a multiple of 1 MiB, whose tables are not too large; the other settings stay."""
    low, high = 1, settings.size_bytes // MIN_SIZE_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        sizes = memory_sizes(replace(settings, size_bytes=middle * MIN_SIZE_BYTES))
        low, high = (middle, high) if sizes.tables_bytes * TABLES_SHARE <= ram else (low, middle - 1)
    return low * MIN_SIZE_BYTES


def _typed(size_bytes: int) -> str:
    """Return a size in the syntax of the options, rounded down to two digits or more."""
    mib = size_bytes >> 20
    return f"{mib >> 10}G" if mib >= 16 << 10 else f"{mib}M"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The RAM that one daemon, or all instances of one, take and save; all in bytes."""

    ram_bytes: int
    processes_bytes: int
    tables_bytes: int
    """The size once the pool is full."""
    buffers_bytes: int
    pool_bytes: int
    holds_bytes: int
    """Most memory of programs that the pool can hold, not counting pages of one repeated word."""
    typical_bytes: int
    """The same for memory that compresses like that of common programs."""

    @classmethod
    def of(cls, parts: Sequence[Settings], ram: int) -> Footprint:
        """Return the footprint of daemons with these settings on a machine with `ram` bytes of RAM."""
        sizes = [memory_sizes(part) for part in parts]
        holds, typical = 0, 0
        for part in parts:
            packing, frames = Packing.parse(part.packing), part.pool_bytes >> PAGE_SHIFT
            usual = min(TYPICAL_ZPAGES[packing.name], packing.zpages)
            holds += min(part.size_bytes, frames * packing.zpages * PAGE_SIZE)
            typical += min(part.size_bytes, int(frames * usual) * PAGE_SIZE)
        return cls(
            ram_bytes=ram,
            processes_bytes=PROCESSES_BYTES * len(parts),
            tables_bytes=sum(each.tables_bytes for each in sizes),
            buffers_bytes=sum(each.buffers_bytes for each in sizes),
            pool_bytes=sum(part.pool_bytes for part in parts),
            holds_bytes=holds,
            typical_bytes=typical,
        )

    @property
    def own_bytes(self) -> int:
        """RAM that zbudfs takes besides the pool."""
        return self.processes_bytes + self.tables_bytes + self.buffers_bytes

    @property
    def saves_bytes(self) -> int:
        """Most RAM that the pool can save; negative if zbudfs takes more than it saves."""
        return self.holds_bytes - self.pool_bytes - self.own_bytes

    @property
    def typically_saves_bytes(self) -> int:
        """RAM that a full pool saves with common memory; may be negative."""
        return self.typical_bytes - self.pool_bytes - self.own_bytes

    @property
    def is_worthwhile(self) -> bool:
        """Whether a full pool saves more of common memory than zbudfs takes."""
        return self.typically_saves_bytes > 0

    @property
    def is_small_machine(self) -> bool:
        """Whether the RAM that zbudfs takes for itself matters on this machine."""
        return self.ram_bytes <= SMALL_RAM_BYTES

    def as_object(self) -> dict[str, int | bool]:
        """Return all numbers for JSON."""
        return {
            **asdict(self),
            "own_bytes": self.own_bytes,
            "saves_bytes": self.saves_bytes,
            "typically_saves_bytes": self.typically_saves_bytes,
            "is_worthwhile": self.is_worthwhile,
        }
