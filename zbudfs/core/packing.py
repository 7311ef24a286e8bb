# SPDX-License-Identifier: MIT
"""The packings there are, by name, and the allocator of each. Only who makes a store or talks to people needs this.

zbud       two zpages to a frame                       core/zbud.py
dense      up to DEFAULT_ZPAGES of them                core/dense.py
dense:N    up to N of them, N from 2 to 7
"""

from dataclasses import dataclass
from typing import Final

from zbudfs.core.allocator import MOST_ZPAGES, Allocator
from zbudfs.core.dense import DEFAULT_ZPAGES, FEWEST_ZPAGES, Dense
from zbudfs.core.zbud import Zbud

GRAMMAR: Final = f"zbud, dense, or dense:N with N from {FEWEST_ZPAGES} to {MOST_ZPAGES} zpages to a frame"
"""What a packing looks like, for error messages and for help texts."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How zpages are packed into frames. Frames of one packing mean nothing to another."""

    name: str
    """zbud or dense."""
    zpages: int
    """Most zpages to a frame."""

    @classmethod
    def parse(cls, text: str) -> "Packing":
        """The packing that `text` names; ValueError with a sentence that says what would be right."""
        name, colon, number = text.partition(":")
        if text == "zbud":
            return ZBUD
        if name == "dense" and not colon:
            return cls("dense", DEFAULT_ZPAGES)
        if name == "dense" and len(number) == 1 and number.isascii() and number.isdigit():
            zpages = int(number)
            if FEWEST_ZPAGES <= zpages <= MOST_ZPAGES:
                return cls("dense", zpages)
        raise ValueError(f"{text[:32]!r} is not a packing: write {GRAMMAR}")

    @classmethod
    def of_code(cls, code: int) -> "Packing | None":
        """The packing whose `code` this is; None if this version knows none."""
        dense = (cls("dense", zpages) for zpages in range(FEWEST_ZPAGES, MOST_ZPAGES + 1))
        return next((packing for packing in (ZBUD, *dense) if packing.code == code), None)

    @property
    def code(self) -> int:
        """A number for it and its layout, never 0, for what outlives a process."""
        return self.kind.LAYOUT << 8 | self.zpages

    def __str__(self) -> str:
        """As `parse` reads it."""
        return self.name if self.name == "zbud" else f"{self.name}:{self.zpages}"

    @property
    def kind(self) -> type[Allocator]:
        """The class of its allocator, which knows the layout of the table."""
        return Zbud if self.name == "zbud" else Dense

    def allocator(self, frames: memoryview, table: memoryview, nr_frames: int, *, attach: bool = False) -> Allocator:
        """An allocator over frames and table; see Allocator."""
        if self.name == "zbud":
            return Zbud(frames, table, nr_frames, attach=attach)
        return Dense(frames, table, nr_frames, attach=attach, most_zpages=self.zpages)


ZBUD: Final = Packing("zbud", Zbud.most_zpages)
DENSE: Final = Packing("dense", DEFAULT_ZPAGES)
