# SPDX-License-Identifier: MIT
"""Sentences on the memory that zbudfs takes and saves on a machine, for `mount`, `doctor` and `estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from zbudfs.core.packing import DENSE
from zbudfs.core.sizes import format_size
from zbudfs.service.footprint import Footprint
from zbudfs.service.settings import Settings, default_pool_bytes, default_size_bytes

REMEDY: Final = "use zram if the kernel has it, or swap on a disk"
_STEP_BYTES: Final = 16 << 20
"""Step in which `smallest_ram` searches."""


def takes_and_saves(footprint: Footprint) -> str:
    """Return one sentence, without a full stop, on the memory that zbudfs takes and a full pool saves."""
    text = (
        f"zbudfs itself takes {itself(footprint)}, and the pool {format_size(footprint.pool_bytes)}, of this machine's"
        f" {format_size(footprint.ram_bytes)} of RAM; a full pool holds {format_size(footprint.holds_bytes)} of programs'"
        " memory at most"
    )
    if footprint.saves_bytes <= 0:
        return f"{text}: the pool can save nothing"
    usual = format_size(footprint.typically_saves_bytes) if footprint.is_worthwhile else "nothing"
    return f"{text}, which saves {format_size(footprint.saves_bytes)} ({usual} with the memory of typical programs)"


def itself(footprint: Footprint) -> str:
    """Return the memory that zbudfs takes besides the pool, with its parts."""
    return (
        f"{format_size(footprint.own_bytes)} (processes {format_size(footprint.processes_bytes)}, buffers"
        f" {format_size(footprint.buffers_bytes)}, tables {format_size(footprint.tables_bytes)})"
    )


def note(parts: Sequence[Settings], ram: int) -> str | None:
    """Return the line that `mount` prints on a machine with little RAM; None on any other machine."""
    footprint = Footprint.of(parts, ram)
    if not footprint.is_small_machine:
        return None
    text = takes_and_saves(footprint)
    return text if footprint.is_worthwhile else f"{text}; {not_worthwhile(parts)}"


def not_worthwhile(parts: Sequence[Settings]) -> str:
    """Return a clause for settings that do not pay: the RAM from which they pay, and what to do on a smaller machine."""
    with_dense = [replace(part, packing=str(DENSE)) for part in parts]
    remedy = REMEDY
    ram = Footprint.of(parts, 1).pool_bytes * 4
    if parts[0].packing != str(DENSE) and Footprint.of(with_dense, ram).is_worthwhile:
        remedy = f"use --packing dense, {REMEDY[4:]}"
    least = smallest_ram(parts[0])
    return f"with the default size and pool, zbudfs does not pay below {format_size(least)} of RAM: {remedy}"


def smallest_ram(settings: Settings) -> int:
    """Return the smallest RAM, a multiple of 16 MiB, on which these settings with the default size and pool pay."""
    ram = _STEP_BYTES
    while not Footprint.of(
        [replace(settings, size_bytes=default_size_bytes(ram), pool_bytes=default_pool_bytes(ram))], ram
    ).is_worthwhile:
        ram += _STEP_BYTES
    return ram
