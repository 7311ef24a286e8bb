# SPDX-License-Identifier: MIT
"""The clause that helps with a word that is not known: the nearest one that is, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def did_you_mean(word: str, known: Collection[str], listed: str | None = None) -> str:
    """Return "did you mean X?" if a known word is near, else a list of what is known, or `listed` for that."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {listed or ', '.join(known)}"
