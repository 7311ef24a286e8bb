# SPDX-License-Identifier: MIT
"""The hint for an unknown word: the nearest known word, or a list of all known words."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(word: str, known: Collection[str]) -> str | None:
    """Return the known word that is most similar to `word`; None if none is similar."""
    return next(iter(difflib.get_close_matches(word.lower(), known, n=1)), None)


def did_you_mean(word: str, known: Collection[str], listed: str | None = None) -> str:
    """Return "did you mean X?" if a known word is similar, else "known are ..." with all known words, or with `listed`."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near else f"known are {listed or ', '.join(known)}"
