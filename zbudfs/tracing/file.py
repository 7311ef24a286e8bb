# SPDX-License-Identifier: MIT
"""Trace files (core/trace_file.py) on a disk: written block by block, whole or as a ring; read whole."""

from __future__ import annotations

import contextlib
import os
import stat
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from zbudfs.core.trace import TIME_SHIFT, Kind, first_word, second_word
from zbudfs.core.trace_file import (
    BLOCK_RECORDS,
    Records,
    TraceFileError,
    decode_block,
    decode_header,
    encode_block,
    encode_header,
    find_blocks,
)
from zbudfs.core.units import PAGE_SHIFT

MIN_FILE_BYTES: Final = 1 << 20
"""Room for the header and for at least two blocks of any content."""
MAX_FILE_BYTES: Final = 1 << 32
"""Longest file that is read: it is read whole."""
_READ_BYTES: Final = 1 << 24


class TraceWriter:
    """A new file at `path` of at most `max_bytes`: when that is reached the oldest blocks make room.

    OSError where it cannot be made; TraceFileError where it cannot be written.
    """

    def __init__(self, path: str, max_bytes: int, about: Mapping[str, Any]) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise TraceFileError(f"{path} is not a file: a trace is written to several places of it in turn")
            header = encode_header(about)
            self._put(header, 0)
        except BaseException:
            os.close(self._fd)
            raise
        self._max_bytes = max_bytes
        self._first = self._at = len(header)
        self._number = 0
        self._waiting: array[int] = array("Q")
        self.records = 0
        self.lost_records = 0
        self.file_bytes = 0
        """Length of the file, once it is closed."""
        self.rounds = 0
        """Times that the file was full and went on at its beginning."""

    def add(self, words: array[int], lost: int) -> None:
        """Add records, two words each; `lost` is the number of records before them that are missing."""
        if lost:
            self.lost_records += lost
            time_word = words[0] if words else (self._waiting[-2] if self._waiting else 0)
            self._waiting.append(first_word(time_word >> TIME_SHIFT, 0, Kind.GAP))
            self._waiting.append(second_word(0, lost))
        self._waiting.extend(words)
        self.records += len(words) // 2
        while len(self._waiting) >= 2 * BLOCK_RECORDS:
            self._write(self._waiting[: 2 * BLOCK_RECORDS])
            self._waiting = self._waiting[2 * BLOCK_RECORDS :]

    def flush(self) -> None:
        """Write what waits for more of its kind."""
        if self._waiting:
            self._write(self._waiting)
            self._waiting = array("Q")

    def _write(self, words: array[int]) -> None:
        block = encode_block(self._number, words)
        self._number += 1
        if self._at + len(block) > self._max_bytes:
            os.ftruncate(self._fd, self._at)  # what an earlier, longer round has left behind this one
            self._at = self._first
            self.rounds += 1
        self._put(block, self._at)
        self._at += len(block)

    def _put(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(self._fd, view, at)
            except OSError as error:
                raise TraceFileError(f"{self._path} cannot be written: {error.strerror}") from None
            at += written
            view = view[written:]

    def close(self) -> None:
        """Write what is left, and close the file."""
        try:
            self.flush()
            self.file_bytes = os.fstat(self._fd).st_size
        finally:
            os.close(self._fd)


@dataclass
class Trace:
    """A trace that was read."""

    about: dict[str, Any]
    """Values of the mount at the start of the recording."""
    records: Records
    rest_bytes: int = 0
    """Bytes of the file that are no block: the last one was cut off, or the first of a ring was being overwritten."""
    first_block: int = 0
    """Number of the oldest block; above 0, what came before it was overwritten."""
    gaps: int = field(init=False)
    """Records that were lost while it was recorded."""

    def __post_init__(self) -> None:
        kinds, counts = self.records.kinds, self.records.counts
        self.gaps = sum(count for kind, count in zip(kinds, counts, strict=True) if kind == Kind.GAP)

    @property
    def seconds(self) -> float:
        """The time between the first record and the last."""
        times = self.records.times_us
        return (times[-1] - times[0]) / 1e6 if times else 0.0


def parse_trace(data: bytes) -> Trace:
    """Return the trace in the content of a file. TraceFileError."""
    about, start = decode_header(data)
    blocks, rest = find_blocks(data, start)
    records = Records.none()
    for block in blocks:
        decode_block(block, about["size_bytes"] >> PAGE_SHIFT, records)
    return Trace(about, records, rest, blocks[0].number if blocks else 0)


def read_trace(path: str, shown: str) -> Trace:
    """Return the trace in a file, which is `shown` in messages. TraceFileError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise TraceFileError(f"{shown} is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise TraceFileError(f"{shown} is larger than any trace")
        data = bytearray()
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(fd, _READ_BYTES):
                data += piece
    finally:
        os.close(fd)
    try:
        trace = parse_trace(bytes(data))
    except TraceFileError as error:
        raise TraceFileError(f"{shown}: {error}") from None
    if not len(trace.records):
        raise TraceFileError(f"{shown}: the trace is empty")
    return trace
