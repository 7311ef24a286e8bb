# SPDX-License-Identifier: MIT
"""A trace file gives the records that were written to it. Any other content is an error of one sentence."""

from __future__ import annotations

import random
import struct
import zlib
from array import array
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tracing.samples import ABOUT, Record, records_of, trace_file, trace_of, words
from zbudfs.core.trace import RAW_CLASS, UNKNOWN_CLASS, Kind
from zbudfs.core.trace_file import BLOCK_RECORDS, TraceFileError, encode_block, encode_header
from zbudfs.tracing.file import MIN_FILE_BYTES, Trace, TraceWriter, parse_trace, read_trace

PAGES = ABOUT["size_bytes"] // 4096
CLASSES = st.one_of(st.integers(0, RAW_CLASS), st.just(UNKNOWN_CLASS))


@st.composite
def some_records(draw: st.DrawFn) -> list[Record]:
    """Return records that a daemon could make."""
    found = []
    time_us = draw(st.integers(0, 1 << 40))
    for _ in range(draw(st.integers(0, 30))):
        time_us += draw(st.integers(0, 1 << 30))
        kind = draw(st.sampled_from(list(Kind)))
        page = draw(st.integers(0, PAGES - 1)) if kind != Kind.GAP else 0
        most = 0xFFFFFFFF if kind == Kind.GAP else min(PAGES - page, 300)
        found.append((time_us, int(kind), draw(CLASSES), page, draw(st.integers(1, most))))
    return found


@given(some_records())
def test_there_and_back(records: list[Record]) -> None:
    """Each record survives encoding and decoding."""
    trace = trace_of(records)
    assert records_of(trace) == records
    assert trace.about == ABOUT
    assert trace.gaps == sum(count for _, kind, _, _, count in records if kind == Kind.GAP)


def many(number: int) -> list[Record]:
    """Return records that do not compress well."""
    chance = random.Random(1)
    return [
        (at << 20 | chance.getrandbits(20), 1 + at % 3, chance.randrange(65), chance.randrange(PAGES), 1)
        for at in range(number)
    ]


def write(path: Path, records: list[Record], max_bytes: int, step: int = 1000) -> TraceWriter:
    """Write a file in several steps."""
    writer = TraceWriter(str(path), max_bytes, ABOUT)
    for at in range(0, len(records), step):
        writer.add(words(records[at : at + step]), 0)
        if at % (5 * step) == 0:
            writer.flush()
    writer.close()
    return writer


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    """A file has several blocks, and only its owner may read it."""
    path = tmp_path / "trace"
    records = many(3 * BLOCK_RECORDS)
    writer = write(path, records, 1 << 30)
    trace = read_trace(str(path), "it")
    assert records_of(trace) == records
    assert (trace.rest_bytes, trace.first_block, writer.rounds) == (0, 0, 0)
    assert writer.file_bytes == path.stat().st_size < 16 * len(records)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_bound_makes_a_ring(tmp_path: Path) -> None:
    """The file always holds the newest records without a gap, and is no larger than its limit."""
    path = tmp_path / "trace"
    records = many(100_000)
    bound = 200_000
    writer = TraceWriter(str(path), bound, ABOUT)
    for at in range(0, len(records), 5_000):
        writer.add(words(records[at : at + 5_000]), 0)
        writer.flush()
        found = records_of(parse_trace(path.read_bytes()))
        assert found == records[at + 5_000 - len(found) : at + 5_000]
        assert path.stat().st_size <= bound
    writer.close()
    assert writer.rounds > 1
    assert len(found) > 10_000
    assert read_trace(str(path), "it").first_block > 0


def test_lost_records_are_counted_in_place(tmp_path: Path) -> None:
    """A record stands for the lost ones, with the time of the record after it."""
    writer = TraceWriter(str(tmp_path / "trace"), MIN_FILE_BYTES, ABOUT)
    writer.add(words([(5, Kind.READ, 3, 9, 1)]), 0)
    writer.add(words([(70, Kind.READ, 3, 9, 1)]), 12)
    writer.add(array("Q"), 7)
    writer.close()
    trace = read_trace(str(tmp_path / "trace"), "it")
    gap = [(time_us, count) for time_us, kind, _, _, count in records_of(trace) if kind == Kind.GAP]
    assert gap == [(70, 12), (70, 7)]
    assert trace.gaps == writer.lost_records == 19


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    """A cut at any byte leaves the whole blocks, and is reported. A file without a header is an error."""
    path = tmp_path / "trace"
    write(path, many(600), 1 << 30, step=100)
    whole = path.read_bytes()
    counts = set()
    for length in range(0, len(whole), 7):
        try:
            trace = parse_trace(whole[:length])
        except TraceFileError:
            assert length < 256
            continue
        found = records_of(trace)
        assert found == many(600)[: len(found)]
        counts.add(len(found))
    assert len(counts) > 2


@given(st.binary(max_size=500))
@example(b"zbtrace\n")
@example(b"zbtrace\n" + struct.pack("<IIII8x", 1, 64, 2, zlib.crc32(b"{}")) + b"{}" + b"\n" * 30)
def test_garbage(data: bytes) -> None:
    """Any bytes are a trace or an error of one sentence."""
    for content in (data, b"zbtrace\n" + data, encode_header(ABOUT) + data):
        told = outcome(content)
        assert told is None or told.count("\n") == 0


@given(st.data(), some_records())
def test_damage(data: st.DataObject, records: list[Record]) -> None:
    """A changed byte is found or has no effect: it never gives other records."""
    content = bytearray(trace_file(records))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    try:
        found = records_of(parse_trace(bytes(content)))
    except TraceFileError:
        return
    assert found in (records, [])  # a lone damaged block looks like one that was cut off


def outcome(content: bytes) -> str | None:
    """Return the error of a file's content, or None."""
    try:
        parse_trace(content)
    except TraceFileError as error:
        return str(error)
    return None


def block_of(payload: bytes, records: int, number: int = 0) -> bytes:
    """Return a block with any content and a right checksum."""
    fields = (b"zbtb", number, len(payload), records)
    head = struct.pack("<4sIIII4xQ", *fields, 0, 0)
    check = zlib.crc32(payload, zlib.crc32(head))
    whole = struct.pack("<4sIIII4xQ", *fields, check, 0) + payload
    return whole.ljust(-(-len(whole) // 64) * 64, b"\0")


@pytest.mark.parametrize(
    "block",
    [
        block_of(b"", 5),
        block_of(b"no zstd at all", 5),
        block_of(zstandard.compress(bytes(14 * 5)), 6),
        block_of(zstandard.compress(bytes(1 << 28)), 1),  # a bomb: small in the file, large when unpacked
        block_of(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(14 * 5)), 5),
        encode_block(0, words([(0, 0, 0, 0, 1)])),  # an unknown kind
        encode_block(0, words([(0, 9, 0, 0, 1)])),
        encode_block(0, words([(0, Kind.WRITE, 99, 0, 1)])),  # an unknown class
        encode_block(0, words([(0, Kind.WRITE, 0, PAGES, 1)])),  # beyond the device
        encode_block(0, words([(0, Kind.DISCARD, 0, 0, PAGES + 1)])),
        encode_block(0, words([(0, Kind.READ, 0, 0, 0)])),  # no pages
        encode_block(0, words([(0, Kind.READ, 0, 0, 1 << 13)])),  # more than the kernel asks for
    ],
)
def test_records_that_cannot_be(block: bytes) -> None:
    """Records that cannot be are refused, even if their checksum is right."""
    assert outcome(encode_header(ABOUT) + block) == "the trace is damaged: block 0 holds no records"


def test_blocks_that_are_missing() -> None:
    """A gap between blocks is damage, at any place in the file."""
    blocks = [encode_block(number, words(many(10))) for number in range(4)]
    head = encode_header(ABOUT)
    assert outcome(head + b"".join(blocks)) is None
    assert outcome(head + blocks[2] + blocks[3] + blocks[0] + blocks[1]) is None
    assert outcome(head + blocks[0] + blocks[2]) == "the trace is damaged: block 1 is missing"
    assert outcome(head + blocks[0] + bytes(64) + blocks[1]) == f"the trace is damaged at byte {len(head + blocks[0])}"
    assert outcome(head + blocks[1] + bytes(64) + blocks[0]) is None  # a ring: the rest of overwritten blocks


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"size_bytes": "1"}, "does not say size_bytes"),
        ({"size_bytes": True}, "does not say size_bytes"),
        ({"size_bytes": 0}, "describes an impossible device"),
        ({"size_bytes": 1 << 60}, "describes an impossible device"),
        ({"pool_limit_bytes": -1}, "describes an impossible device"),
        ({"level": None}, "does not say level"),
        ({"level": 1.5}, "does not say level"),
        ({"level": 0}, "describes an impossible device"),
        ({"level": 99}, "describes an impossible device"),
    ],
)
def test_headers_that_cannot_be(about: dict[str, object], reason: str) -> None:
    """A header may only have numbers that a mount can have."""
    told = outcome(encode_header({**ABOUT, **about}))
    assert told is not None
    assert reason in told


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b"[" * 5000])
def test_a_header_that_is_no_object(text: bytes) -> None:
    """A header that is no JSON object is refused, even if its checksum is right."""
    length = -(-(32 + len(text)) // 64) * 64
    head = struct.pack("<8sIIII8x", b"zbtrace\n", 1, length, len(text), zlib.crc32(text))
    assert outcome((head + text).ljust(length, b"\n")) == "the header of the trace is damaged"


def test_two_holes_side_by_side_are_one() -> None:
    """Bytes in the middle of damage that look like the start of a block begin no second gap."""
    head, block = encode_header(ABOUT), encode_block(1, words(many(10)))
    nonsense = bytes(64) + b"zbtb".ljust(64, b"\0") + b"zbtb".ljust(64, b"\0")
    data = head + encode_block(0, words(many(10))) + nonsense + block
    assert outcome(data) == f"the trace is damaged at byte {data.index(nonsense)}"


def test_a_newer_format() -> None:
    """The message says that the format is newer."""
    content = bytearray(trace_file([]))
    content[8] = 2
    assert outcome(bytes(content)) == "the trace has format 2, and this zbudfs knows format 1"


def test_paths_that_are_no_trace(tmp_path: Path) -> None:
    """A folder, an empty file and a trace without records are errors."""
    with pytest.raises(TraceFileError, match="it is not a file"):
        read_trace(str(tmp_path), "it")
    path = tmp_path / "trace"
    path.touch()
    with pytest.raises(TraceFileError, match="it: it is not a trace"):
        read_trace(str(path), "it")
    path.write_bytes(trace_file([]))
    with pytest.raises(TraceFileError, match="it: the trace is empty"):
        read_trace(str(path), "it")
    with pytest.raises(TraceFileError, match="is not a file"):
        TraceWriter("/dev/null", MIN_FILE_BYTES, ABOUT)


def test_length_of_a_trace() -> None:
    """The length is from the first record to the last, and 0 without records."""
    assert trace_of([(5, 1, 0, 0, 1), (1_500_005, 1, 0, 0, 1)]).seconds == 1.5
    assert isinstance(trace_of([]), Trace)
    assert trace_of([]).seconds == 0.0
