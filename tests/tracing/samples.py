# SPDX-License-Identifier: MIT
"""Traces made by hand."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, Final

from zbudfs.core.trace import first_word, second_word
from zbudfs.core.trace_file import encode_block, encode_header
from zbudfs.tracing.file import Trace, parse_trace

ABOUT: Final[dict[str, Any]] = {
    "size_bytes": 1 << 24,
    "pool_limit_bytes": 1 << 20,
    "level": -1,
    "backing_size_bytes": 0,
}

Record = tuple[int, int, int, int, int]
"""Time in microseconds, kind, size class, first page, pages."""


def words(records: Iterable[Record]) -> array[int]:
    """Return records as they come from the ring."""
    found = array("Q")
    for time_us, kind, size_class, page, pages in records:
        found.append(first_word(time_us, size_class, kind))
        found.append(second_word(page, pages))
    return found


def trace_file(records: Iterable[Record], **about: object) -> bytes:
    """Return the content of a file with these records in one block."""
    return encode_header({**ABOUT, **about}) + encode_block(0, words(records))


def trace_of(records: Iterable[Record], **about: object) -> Trace:
    """Return a trace with these records."""
    return parse_trace(trace_file(records, **about))


def records_of(trace: Trace) -> list[Record]:
    """Return the records of a trace."""
    found = trace.records
    return list(zip(found.times_us, found.kinds, found.classes, found.pages, found.counts, strict=True))
