# SPDX-License-Identifier: MIT
"""Memory that comes and goes only on request."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbudfs.core.errors import LayoutError
from zbudfs.store.arena import Arena, fallocate, punch_hole

PAGE = mmap.PAGESIZE
SPAN = st.integers(0, 20 * PAGE)


def test_an_arena_is_large_and_empty() -> None:
    """A gibibyte costs nothing until it is populated, reads as zeros, and is in the view to the byte."""
    arena = Arena("test", 1 << 30)
    assert arena.size == len(arena.view) == 1 << 30
    assert arena.resident_bytes == 0
    arena.populate(5 * PAGE, 3 * PAGE)
    assert arena.resident_bytes == 3 * PAGE
    assert bytes(arena.view[5 * PAGE : 8 * PAGE]) == bytes(3 * PAGE)
    assert not arena.view.readonly


def test_its_file_goes_with_it(tmp_path: Path) -> None:
    """A process that makes many stores, or fails to make them, does not run out of descriptors."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    view = Arena("test", PAGE, str(tmp_path)).view
    view[:4] = b"seen"
    with pytest.raises(LayoutError):
        Arena("test", 2 * PAGE, str(tmp_path))
    del view
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    assert (tmp_path / "test").read_bytes() == b"seen".ljust(PAGE, b"\0")


@pytest.mark.parametrize(("size", "rounded"), [(0, PAGE), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_the_size_is_rounded_up(size: int, rounded: int) -> None:
    """An arena has whole pages, and at least one."""
    assert Arena("test", size).size == rounded


def test_the_address_is_where_the_view_is() -> None:
    """Bytes written at the address are in the view."""
    arena = Arena("test", 2 * PAGE)
    arena.populate(0, 2 * PAGE)
    ctypes.memmove(arena.address + PAGE, b"seen", 4)
    assert bytes(arena.view[PAGE : PAGE + 4]) == b"seen"


@given(SPAN, st.integers(1, 5 * PAGE))
def test_populate_covers_every_byte(offset: int, length: int) -> None:
    """All pages that a span touches get memory, and no others. A write there takes no more memory."""
    arena = Arena("test", 32 * PAGE)
    arena.populate(offset, length)
    pages = (offset + length - 1) // PAGE - offset // PAGE + 1
    assert arena.resident_bytes == pages * PAGE
    arena.view[offset : offset + length] = b"x" * length
    assert arena.resident_bytes == pages * PAGE


@given(SPAN, st.integers(0, 5 * PAGE))
def test_release_gives_whole_pages_back(offset: int, length: int) -> None:
    """Pages wholly inside the span go and read as zeros. No other byte changes."""
    arena = Arena("test", 32 * PAGE)
    arena.populate(0, 32 * PAGE)
    arena.view[:] = b"x" * (32 * PAGE)
    arena.release(offset, length)
    start = -(-offset // PAGE) * PAGE
    end = max(start, (offset + length) // PAGE * PAGE)
    assert arena.resident_bytes == 32 * PAGE - (end - start)
    assert bytes(arena.view) == b"x" * start + bytes(end - start) + b"x" * (32 * PAGE - end)


def test_populating_again_keeps_what_is_there() -> None:
    """Populated memory is not changed."""
    arena = Arena("test", 4 * PAGE)
    arena.populate(0, PAGE)
    arena.view[:4] = b"kept"
    arena.populate(0, 4 * PAGE)
    assert bytes(arena.view[:4]) == b"kept"


def test_an_older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """If madvise does not know MADV_POPULATE_WRITE, fallocate makes the pages."""
    monkeypatch.setattr("zbudfs.store.arena._MADV_POPULATE_WRITE", 9999)
    arena = Arena("test", 8 * PAGE)
    arena.populate(PAGE, 3 * PAGE)
    assert arena.resident_bytes == 3 * PAGE


def test_a_hole_in_a_file(tmp_path: Path) -> None:
    """Punching frees the space and keeps the length. An operation that the file system lacks is an OSError with the reason."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (64 << 10))
    with path.open("r+b") as file:
        punch_hole(file.fileno(), 16 << 10, 32 << 10)
    assert path.read_bytes() == b"x" * (16 << 10) + bytes(32 << 10) + b"x" * (16 << 10)
    with path.open("rb") as file, pytest.raises(OSError, match=r".") as caught:
        punch_hole(file.fileno(), 0, 4096)
    assert caught.value.errno == errno.EBADF
    with path.open("r+b") as file, pytest.raises(OSError, match=r".") as caught:
        fallocate(file.fileno(), 0, 0, 0)
    assert caught.value.errno == errno.EINVAL
