# SPDX-License-Identifier: MIT
"""Pages for tests. A seed names a page, so pages with different seeds differ, whatever their sizes."""

from __future__ import annotations

import random
from typing import Final

from zbudfs.core.units import PAGE_SIZE

SMALL: Final = 300
"""Bytes of noise in a page that compresses so well that many would fit in a frame."""
HALF: Final = 1900
"""Bytes of noise in a page of which two fit in a frame."""
BIG: Final = 3000
"""Bytes of noise in a page that needs a frame of its own."""
RAW: Final = PAGE_SIZE
"""Bytes of noise in a page that does not compress."""


def page(seed: int, noise: int = HALF) -> bytes:
    """Return a page with `noise` bytes of noise and then zeros: its zpage is a few bytes longer than the noise."""
    return random.Random(seed).randbytes(noise).ljust(PAGE_SIZE, b"\0")


def text_page(seed: int) -> bytes:
    """Return a page in which zstd finds matches, literals and entropy tables."""
    words = random.Random(seed)
    text = b" ".join(
        b"%s=%d" % (words.choice((b"frame", b"block", b"page", b"zombie")), words.randrange(999)) for _ in range(600)
    )
    return text[:PAGE_SIZE]


def pages(count: int, noise: int = HALF, seed: int = 0) -> bytes:
    """Return `count` neighbouring pages."""
    return b"".join(page(seed + number, noise) for number in range(count))
