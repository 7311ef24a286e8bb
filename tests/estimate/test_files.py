# SPDX-License-Identifier: MIT
"""Samples of files and core dumps, whole and damaged."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbudfs.estimate.files import sample_file
from zbudfs.estimate.sample import Sample, SampleError

PAGE = 4096
WRITABLE, READABLE = 6, 4


def sample_of(path: Path, wanted: int = 1 << 20, seed: int = 1) -> Sample:
    """Take a sample of a file."""
    return sample_file(str(path), path.name, wanted, seed, lambda done, total: None)


def pages(first: int, count: int) -> bytes:
    """Return pages whose content shows their numbers."""
    return b"".join(b"%08d" % number * (PAGE // 8) for number in range(first, first + count))


def core_dump(segments: list[tuple[int, int, bytes]], *, wide: bool = True, order: str = "<", kind: int = 4) -> bytes:
    """Return a core dump with segments (type, flags, content), in the kernel's format."""
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]).ljust(12, b"\0")
    head_size, entry_size = (64, 56) if wide else (52, 32)
    form = order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH")
    many = len(segments) >= 0xFFFF
    sections_at = head_size + entry_size * len(segments) if many else 0
    number = 0xFFFF if many else len(segments)
    head = struct.pack(form, kind, 62, 1, 0, head_size, sections_at, 0, head_size, entry_size, number, 0, int(many), 0)
    section = b""
    if many:
        section = struct.pack(order + ("IIQQQQIIQQ" if wide else "IIIIIIIIII"), *[0] * 7, len(segments), 0, 0)
    offset = head_size + entry_size * len(segments) + len(section)
    table, body = bytearray(), bytearray()
    for segment, flags, content in segments:
        at = offset + len(body)
        if wide:
            table += struct.pack(order + "IIQQQQQQ", segment, flags, at, 0, 0, len(content), len(content), PAGE)
        else:
            table += struct.pack(order + "IIIIIIII", segment, at, 0, 0, len(content), len(content), flags, PAGE)
        body += content
    return bytes(ident + head + table + section + body)


def test_a_plain_file(tmp_path: Path) -> None:
    """The sample of a plain file has all its pages in order, and zeros fill the last one."""
    path = tmp_path / "file"
    path.write_bytes(pages(0, 5) + b"end")
    sample = sample_of(path)
    assert sample.population_pages == 6
    assert b"".join(sample.pages) == (pages(0, 5) + b"end").ljust(6 * PAGE, b"\0")


def test_a_sample_is_drawn_by_its_seed(tmp_path: Path) -> None:
    """The sample has the wanted size and the order of the file, and the same seed chooses the same pages."""
    path = tmp_path / "file"
    path.write_bytes(pages(0, 300))
    first, again, other = (sample_of(path, wanted=100, seed=seed).pages for seed in (1, 1, 2))
    assert len(first) == 100
    assert first == again == sorted(set(first))
    assert first != other


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_core_dump(tmp_path: Path, order: str, *, wide: bool) -> None:
    """Only the segments of writable memory count."""
    path = tmp_path / "core"
    segments = [(4, 0, b"notes"), (1, READABLE, pages(0, 2)), (1, WRITABLE, pages(2, 3)), (1, WRITABLE, pages(5, 1))]
    path.write_bytes(core_dump(segments, wide=wide, order=order))
    sample = sample_of(path)
    assert b"".join(sample.pages) == pages(2, 4)
    assert sample.counts == {"segments": 2}
    assert sample.source == "core dump core"


def test_a_core_dump_with_very_many_segments(tmp_path: Path) -> None:
    """A number of segments that does not fit its field is read from the other place that ELF has for it."""
    path = tmp_path / "core"
    path.write_bytes(core_dump([(1, READABLE, b"")] * 70000 + [(1, WRITABLE, pages(0, 1))]))
    assert sample_of(path).pages == [pages(0, 1)]


def test_other_elf_files_are_plain(tmp_path: Path) -> None:
    """An ELF file that is no core dump is read as plain pages."""
    path = tmp_path / "program"
    path.write_bytes(core_dump([(1, WRITABLE, pages(0, 1))], kind=2))
    assert sample_of(path).population_pages == 2


def test_a_core_dump_that_was_cut_off(tmp_path: Path) -> None:
    """A cut within the memory leaves the pages before it. A cut within the headers is an error."""
    path = tmp_path / "core"
    whole = core_dump([(1, WRITABLE, pages(0, 4))])
    path.write_bytes(whole[: -2 * PAGE])
    assert b"".join(sample_of(path).pages) == pages(0, 2)
    path.write_bytes(whole[:100])
    with pytest.raises(SampleError, match="damaged or cut off"):
        sample_of(path)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "is empty"), (core_dump([(1, READABLE, b"x")]), "without writable memory")]
)
def test_nothing_to_look_at(content: bytes, reason: str, tmp_path: Path) -> None:
    """A file without pages gives a message of one sentence."""
    path = tmp_path / "it"
    path.write_bytes(content)
    with pytest.raises(SampleError, match=reason):
        sample_of(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    """A pipe and a directory are refused: a read of the pipe would wait, and the directory has no pages."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(SampleError, match="neither a file nor a block device"):
            sample_of(path)
    with pytest.raises(FileNotFoundError):
        sample_of(tmp_path / "none")


@given(st.binary(max_size=200), st.integers(0, 200), st.booleans())
def test_hostile_core_dumps(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int, wide: bool) -> None:
    """Any headers give either pages or a message of one sentence."""
    path = tmp_path_factory.getbasetemp() / "hostile"
    content = bytearray(core_dump([(1, WRITABLE, pages(0, 1)), (1, WRITABLE, pages(1, 1))], wide=wide))
    content[16 + at : 16 + at + len(noise)] = noise
    path.write_bytes(content)
    try:
        sample = sample_of(path, wanted=50)
    except SampleError as error:
        told = str(error)
    else:
        assert 0 < len(sample.pages) <= 50
        assert {len(page) for page in sample.pages} == {PAGE}
        return
    assert told.count("\n") == 0
