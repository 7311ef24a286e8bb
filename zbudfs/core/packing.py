# SPDX-License-Identifier: MIT
"""The packings by name, with the allocator of each. Only code that makes a store or that parses or prints a packing needs it.

The text of a packing is one of these:

    zbud       two zpages to a frame                       core/zbud.py
    dense      up to DEFAULT_ZPAGES zpages to a frame      core/dense.py
    dense:N    up to N zpages to a frame, N from 2 to 7
"""

from dataclasses import dataclass
from typing import Final

from zbudfs.core.allocator import MOST_ZPAGES, Allocator
from zbudfs.core.dense import DEFAULT_ZPAGES, FEWEST_ZPAGES, Dense
from zbudfs.core.zbud import Zbud

GRAMMAR: Final = f"zbud, dense, or dense:N with N from {FEWEST_ZPAGES} to {MOST_ZPAGES} zpages to a frame"
"""The syntax of a packing, for error messages and help texts."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A way to pack zpages into frames. Another packing cannot read the frames."""

    name: str
    """The name: "zbud" or "dense"."""
    zpages: int
    """Most zpages to a frame."""

    @classmethod
    def parse(cls, text: str) -> "Packing":
        """Return the packing that `text` names. Raises ValueError with a sentence that gives the right syntax."""
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
        """Return the packing with this `code`; None if this version knows none."""
        dense = (cls("dense", zpages) for zpages in range(FEWEST_ZPAGES, MOST_ZPAGES + 1))
        return next((packing for packing in (ZBUD, *dense) if packing.code == code), None)

    @property
    def code(self) -> int:
        """The number of the packing and its layout, never 0. Memory that outlives the process holds it."""
        return self.kind.LAYOUT << 8 | self.zpages

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return self.name if self.name == "zbud" else f"{self.name}:{self.zpages}"

    @property
    def kind(self) -> type[Allocator]:
        """The class of the allocator, which knows the layout of the table."""
        return Zbud if self.name == "zbud" else Dense

    def allocator(self, frames: memoryview, table: memoryview, nr_frames: int, *, attach: bool = False) -> Allocator:
        """Return an allocator over frames and table; see Allocator."""
        if self.name == "zbud":
            return Zbud(frames, table, nr_frames, attach=attach)
        return Dense(frames, table, nr_frames, attach=attach, most_zpages=self.zpages)


ZBUD: Final = Packing("zbud", Zbud.most_zpages)
DENSE: Final = Packing("dense", DEFAULT_ZPAGES)
