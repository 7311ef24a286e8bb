# SPDX-License-Identifier: MIT
"""A sample: pages drawn at random from a population of pages, whose contents are read only once they are drawn.

    population    all pages that would be swapped out, or all of a file      known by number
    sample        so many of them, each as likely as any other               read, in the order of their addresses

The order matters a little for how zpages pair: neighbours in memory go out together. The seed makes a draw that can be
repeated, as far as the memory is still the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

Progress = Callable[[int, int], None]
"""A function that receives the progress: pages done, pages in all."""


class SampleError(Exception):
    """There is nothing to look at, or it may not be looked at; the text is one sentence for the user."""


@dataclass
class Sample:
    """Pages, and what they stand for."""

    source: str
    """The population, in words for people."""
    population_pages: int = 0
    """Pages from which the sample was drawn."""
    pages: list[bytes] = field(default_factory=list)
    """Their contents, 4096 bytes each."""
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of other observations, by cause: see `processes` and `files`."""

    def count(self, cause: str, number: int = 1) -> None:
        """Count something that was seen or left out."""
        self.counts[cause] = self.counts.get(cause, 0) + number


def draw(population: int, wanted: int, seed: int) -> list[int]:
    """Return `wanted` different numbers below `population` in ascending order; all of them if there are no more."""
    if wanted >= population:
        return list(range(population))
    return sorted(random.Random(seed).sample(range(population), wanted))
