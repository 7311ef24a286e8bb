# SPDX-License-Identifier: MIT
"""Made-up pages that compress to a wanted size class: what a replay writes, since a trace holds no content.

    class 0        one word repeated
    class 1..63    noise, text and zeros, or noise and zeros where text is too small; cut to the class by trying
    RAW_CLASS      noise

The class is right at the level at which the trace was recorded. At another level the page compresses as such a page does,
which says something about time and little about size: for that, `zbudfs estimate` has real pages.
"""

from __future__ import annotations

import random
from typing import Final

from zbudfs.core.allocator import chunks_for, max_zpage_size
from zbudfs.core.codec import Codec
from zbudfs.core.trace import RAW_CLASS
from zbudfs.core.units import PAGE_SIZE, SIZE_CLASS_BYTES

VARIANTS: Final = 8
"""Different pages of each class: so many that two neighbours are hardly ever the same."""

_WORDS: Final = 400
_NOISE_SHARE: Final = 0.3
"""Share of the noise in a zpage. Guessed."""


_SHORTEST_BYTES: Final = 24
"""Bytes of content at the least: a page of nothing but zeros is same-filled."""


class PageMaker:
    """Makes pages for one recording level. The same seed makes the same pages."""

    def __init__(self, level: int, seed: int) -> None:
        self._codec = Codec(level)
        self._random = random.Random(seed)
        letters = "etaoinshrdlucmfw"
        self._vocabulary = [
            "".join(self._random.choices(letters, k=self._random.randint(2, 10))).encode() for _ in range(_WORDS)
        ]
        self._weights = [1 / (rank + 1) for rank in range(_WORDS)]
        self._made: dict[int, list[bytes]] = {}

    def page(self, size_class: int, variant: int) -> bytes:
        """Return variant number `variant` (any number) of the pages of a class."""
        made = self._made.get(size_class)
        if made is None:
            made = self._made[size_class] = [self._make(size_class) for _ in range(VARIANTS)]
        return made[variant % VARIANTS]

    def _make(self, size_class: int) -> bytes:
        if size_class <= 0:
            return self._random.randrange(1 << 32).to_bytes(8, "little") * (PAGE_SIZE // 8)
        if size_class >= RAW_CLASS:
            return self._random.randbytes(PAGE_SIZE)
        noise = self._random.randbytes(PAGE_SIZE)
        rich = (noise[: int(size_class * SIZE_CLASS_BYTES * _NOISE_SHARE)] + self._text())[:PAGE_SIZE]
        # How a large zpage of text grows is not smooth, and beyond some size there is none: noise alone is always right.
        page = self._cut(rich, size_class)
        return page if self._class_of(page) == size_class else self._cut(noise, size_class)

    def _cut(self, content: bytes, size_class: int) -> bytes:
        """Zeros from where on the page is of the class."""
        low, high = _SHORTEST_BYTES, PAGE_SIZE
        while low < high:
            middle = (low + high) // 2
            if self._class_of(content[:middle].ljust(PAGE_SIZE, b"\0")) < size_class:
                low = middle + 1
            else:
                high = middle
        return content[:low].ljust(PAGE_SIZE, b"\0")

    def _class_of(self, page: bytes) -> int:
        size = len(self._codec.encode(page))
        return chunks_for(size) if size <= max_zpage_size() else RAW_CLASS

    def _text(self) -> bytes:
        return b" ".join(self._random.choices(self._vocabulary, self._weights, k=PAGE_SIZE // 3))[:PAGE_SIZE].ljust(
            PAGE_SIZE, b" "
        )
