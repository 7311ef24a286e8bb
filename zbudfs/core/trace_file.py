# SPDX-License-Identifier: MIT
"""The bytes of a trace file. docs/use/reference.md describes them for readers that are not part of zbudfs.

    header      magic, version, lengths, CRC, and JSON about the mount; filled up to a multiple of 64 bytes
    blocks      each at a multiple of 64 bytes: 32 bytes of header, then records as zstd-compressed columns

A file with a maximum size is a ring: after the last place, writing continues at the first, over the oldest blocks. So a
reader orders blocks by their numbers, not by their places. The bytes between the newest block and the next whole one are
the rest of an overwritten block. Any user may have made a file: the reader checks each value before it uses it.
"""

import json
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final
from zlib import crc32

import zstandard

from zbudfs.core.codec import MAX_LEVEL, MIN_LEVEL
from zbudfs.core.trace import (
    CLASS_MASK,
    KIND_BITS,
    KIND_MASK,
    RAW_CLASS,
    TIME_SHIFT,
    UNKNOWN_CLASS,
    Kind,
)
from zbudfs.core.units import PAGE_SHIFT

MAGIC: Final = b"zbtrace\n"
VERSION: Final = 1
ALIGNMENT: Final = 64
MAX_HEADER_BYTES: Final = 1 << 16
BLOCK_RECORDS: Final = 1 << 15
"""Most records of a block; a writer may make smaller ones."""
MAX_REQUEST_PAGES: Final = 1 << 12
"""Most pages of a read or write; the kernel asks for 256 at most."""
MAX_DEVICE_PAGES: Final = 1 << 32

_HEADER: Final = struct.Struct("<8sIIII8x")
_BLOCK: Final = struct.Struct("<4sIIII4xQ")
_BLOCK_MAGIC: Final = b"zbtb"
_WIDTHS: Final = (("H", 2), ("I", 4), ("I", 4), ("I", 4))
"""Columns: kind and size class; microseconds since the record before; first page since the end of the record before; pages."""
_RECORD_BYTES: Final = sum(width for _, width in _WIDTHS)
_MASK32: Final = 0xFFFFFFFF
_KINDS: Final = frozenset(map(int, Kind))
_REQUESTS: Final = frozenset({Kind.WRITE, Kind.READ, Kind.PAGEIN, Kind.REFUSED, Kind.LOST})

BLOCK_HEADER_BYTES: Final = _BLOCK.size


class TraceFileError(Exception):
    """The file is no trace file, or a damaged one; the text is one sentence for the user."""


@dataclass
class Records:
    """Records as columns of the same length."""

    times_us: "array[int]"
    kinds: "array[int]"
    classes: "array[int]"
    pages: "array[int]"
    counts: "array[int]"

    @classmethod
    def none(cls) -> "Records":
        """Return columns without a record."""
        return cls(array("Q"), array("B"), array("B"), array("Q"), array("Q"))

    def __len__(self) -> int:
        return len(self.kinds)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a file, whose checksum was right."""

    number: int
    offset: int
    end: int
    """Offset at which the next block may start."""
    records: int
    payload: bytes
    started_us: int


def aligned(size: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


# ---- writing -----------------------------------------------------------------------------------------------------


def encode_header(about: Mapping[str, Any]) -> bytes:
    """Return the header of a file about a mount. `about` must fit into JSON and contain "size_bytes"."""
    text = json.dumps(about, sort_keys=True).encode()
    length = aligned(_HEADER.size + len(text))
    head = _HEADER.pack(MAGIC, VERSION, length, len(text), crc32(text))
    return (head + text).ljust(length, b"\n")


def encode_block(number: int, words: "array[int]") -> bytes:
    """Return the block with this number. `words` are the records of the ring: two words each, BLOCK_RECORDS records at most."""
    firsts, seconds = words[::2], words[1::2]
    times = [word >> TIME_SHIFT for word in firsts]
    pages = [word & _MASK32 for word in seconds]
    counts = [word >> 32 for word in seconds]
    started = times[0] if times else 0
    kinds = array("H", [word & (1 << TIME_SHIFT) - 1 for word in firsts])
    gaps = array("I", [min(max(b - a, 0), _MASK32) for a, b in zip([started, *times], times, strict=False)])
    ends = [page + count for page, count in zip(pages, counts, strict=True)]
    steps = array("I", [(page - end) & _MASK32 for page, end in zip(pages, [0, *ends], strict=False)])
    columns = b"".join(column.tobytes() for column in (kinds, gaps, steps, array("I", counts)))
    payload = zstandard.ZstdCompressor(level=3).compress(columns)
    head = _BLOCK.pack(_BLOCK_MAGIC, number, len(payload), len(times), 0, started)
    head = _BLOCK.pack(_BLOCK_MAGIC, number, len(payload), len(times), crc32(payload, crc32(head)), started)
    return (head + payload).ljust(aligned(len(head) + len(payload)), b"\0")


# ---- reading -----------------------------------------------------------------------------------------------------


def decode_header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the description of the mount, and the offset of the first block. Raises TraceFileError."""
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise TraceFileError("it is not a trace: record one with zbudfs trace record")
    _, version, length, text_length, check = _HEADER.unpack_from(data)
    if version != VERSION:
        raise TraceFileError(f"the trace has format {version}, and this zbudfs knows format {VERSION}")
    text = data[_HEADER.size : _HEADER.size + text_length]
    if length > MAX_HEADER_BYTES or length % ALIGNMENT or _HEADER.size + text_length > length or crc32(text) != check:
        raise TraceFileError("the header of the trace is damaged")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise TraceFileError("the header of the trace is damaged")
    for name in ("size_bytes", "pool_limit_bytes", "level"):
        if type(about.get(name)) is not int:
            raise TraceFileError(f"the header of the trace does not say {name}")
    size, pool, level = about["size_bytes"], about["pool_limit_bytes"], about["level"]
    if not 0 < size <= MAX_DEVICE_PAGES << PAGE_SHIFT or pool < 0 or not MIN_LEVEL <= level <= MAX_LEVEL or not level:
        raise TraceFileError("the header of the trace describes an impossible device")
    return about, length


def find_blocks(data: bytes, start: int) -> tuple[list[Block], int]:
    """Return the blocks in the order of their numbers, and the bytes outside them. TraceFileError if a block is missing."""
    blocks: list[Block] = []
    holes: list[tuple[int, int]] = []
    at = start
    while at < len(data):
        block = _block_at(data, at)
        if block is not None:
            blocks.append(block)
            at = block.end
            continue
        found = data.find(_BLOCK_MAGIC, at + ALIGNMENT)
        following = found // ALIGNMENT * ALIGNMENT if found >= 0 else len(data)
        if holes and holes[-1][1] == at:
            holes[-1] = (holes[-1][0], following)
        else:
            holes.append((at, following))
        at = following
    blocks.sort(key=lambda block: block.number)
    for before, after in pairwise(blocks):
        if after.number != before.number + 1:
            raise TraceFileError(f"the trace is damaged: block {before.number + 1} is missing")
    # Only the block that was written last, or the one that was being overwritten, may be incomplete.
    for hole, _ in holes:
        if blocks and hole != blocks[-1].end:
            raise TraceFileError(f"the trace is damaged at byte {hole}")
    return blocks, sum(end - hole for hole, end in holes)


def _block_at(data: bytes, at: int) -> Block | None:
    if data[at : at + 4] != _BLOCK_MAGIC or at + _BLOCK.size > len(data):
        return None
    magic, number, length, records, check, started = _BLOCK.unpack_from(data, at)
    payload = data[at + _BLOCK.size : at + _BLOCK.size + length]
    head = _BLOCK.pack(magic, number, length, records, 0, started)
    if len(payload) != length or records > BLOCK_RECORDS or crc32(payload, crc32(head)) != check:
        return None
    return Block(number, at, aligned(at + _BLOCK.size + length), records, payload, started)


def decode_block(block: Block, device_pages: int, into: Records) -> None:
    """Add the records of a block to `into`. Raises TraceFileError if no daemon can have written them."""
    wrong = TraceFileError(f"the trace is damaged: block {block.number} holds no records")
    wanted = block.records * _RECORD_BYTES
    try:
        if zstandard.frame_content_size(block.payload) != wanted:  # before the decompressor allocates memory
            raise wrong
        columns = zstandard.ZstdDecompressor().decompress(block.payload, max_output_size=wanted)
    except zstandard.ZstdError:
        raise wrong from None
    if len(columns) != wanted:  # pragma: no cover  zstd checks the size of a frame
        raise wrong
    read: list[array[int]] = []
    at = 0
    for form, width in _WIDTHS:
        column = array(form)
        column.frombytes(columns[at : at + width * block.records])
        read.append(column)
        at += width * block.records
    time_us, end = block.started_us, 0
    for what, gap, step, count in zip(*read, strict=True):
        kind, size_class = what & KIND_MASK, what >> KIND_BITS
        time_us += gap
        page = (end + step) & _MASK32
        end = page + count
        if kind not in _KINDS or (size_class > RAW_CLASS and size_class != UNKNOWN_CLASS) or time_us >> 53:
            raise wrong
        if kind != Kind.GAP and (end > device_pages or not count or (kind in _REQUESTS and count > MAX_REQUEST_PAGES)):
            raise wrong
        into.times_us.append(time_us)
        into.kinds.append(kind)
        into.classes.append(size_class & CLASS_MASK)
        into.pages.append(page)
        into.counts.append(count)
