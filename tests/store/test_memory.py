# SPDX-License-Identifier: MIT
"""The memory of a store: with a name or without, populated in parts, and found by another process."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import LIMIT_SECONDS, ROOT
from zbudfs.core.allocator import REF_BITS
from zbudfs.core.errors import LayoutError
from zbudfs.core.packing import ZBUD, Packing
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.memory import BOUNCE_FRAMES, REQUEST_SLOT_BYTES, REQUEST_SLOTS, StoreMemory
from zbudfs.store.pool import Pool
from zbudfs.store.status_area import Field

MIB = 1 << 20
NAMES = {"board", "pages", "frames", "frametable", "freeframes", "requestslots", "trace", "blocks", "outgoing"}


def make(
    folder: Path | None = None,
    *,
    size: int = 4 * MIB,
    frames: int = 100,
    backed: bool = True,
    packing: Packing = ZBUD,
) -> StoreMemory:
    """Return the memory of a small store."""
    return StoreMemory(size, frames, backed=backed, folder=None if folder is None else str(folder), packing=packing)


def with_pages(memory: StoreMemory) -> dict[str, int]:
    """Return the populated bytes by arena."""
    names = ("pages", "frames", "frame_table", "free_frames", "request_slots", "blocks")
    return {name: getattr(memory, name).resident_bytes for name in names}


def test_the_files(tmp_path: Path) -> None:
    """Each part is a private file of the right size."""
    memory = make(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == NAMES
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert file.stat().st_size % PAGE_SIZE == 0
    assert (tmp_path / "frames").stat().st_size == (100 + BOUNCE_FRAMES) * PAGE_SIZE
    entries = 4 * MIB // PAGE_SIZE * 8  # and a page for the marks of used stretches
    assert (tmp_path / "pages").stat().st_size == entries + PAGE_SIZE
    assert (tmp_path / "requestslots").stat().st_size == REQUEST_SLOTS * REQUEST_SLOT_BYTES
    assert memory.status_area.fields[Field.PERSISTENT] == 1


def test_without_a_backing_file_there_is_no_block_map(tmp_path: Path) -> None:
    """There is no arena for a block map either."""
    memory = make(tmp_path, backed=False)
    assert memory.blocks is None
    assert {file.name for file in tmp_path.iterdir()} == NAMES - {"blocks", "outgoing"}
    assert len(memory.arenas) == 6
    memory.populate()


def test_without_a_folder_there_are_no_files(tmp_path: Path) -> None:
    """The memory has no name, and says so."""
    memory = make()
    assert list(tmp_path.iterdir()) == []
    assert memory.status_area.fields[Field.PERSISTENT] == 0
    memory.pages.view[:5] = b"there"
    assert bytes(make().pages.view[:5]) == bytes(5), "it was another's"


def test_another_process_finds_it(tmp_path: Path) -> None:
    """Another process that opens the folder sees the writes, and the reverse."""
    memory = make(tmp_path)
    memory.pages.view[:5] = b"pages"
    memory.frames.view[99 * PAGE_SIZE : 99 * PAGE_SIZE + 6] = b"frames"
    program = (
        "import sys; from zbudfs.store.memory import StoreMemory\n"
        f"memory = StoreMemory({4 * MIB}, 100, backed=True, folder=sys.argv[1])\n"
        "print(bytes(memory.pages.view[:5]), bytes(memory.frames.view[99 * 4096:][:6]))\n"
        "memory.frames.view[:4] = b'back'\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=ROOT, check=False)
    assert (run.stdout, run.stderr) == ("b'pages' b'frames'\n", "")
    assert bytes(memory.frames.view[:4]) == b"back"


def test_another_packing_is_refused(tmp_path: Path) -> None:
    """Frames of another packing mean nothing: the error is one sentence, and the memory does not change."""
    for number, (there, wanted) in enumerate((("zbud", "dense:6"), ("dense:6", "zbud"), ("dense:6", "dense:7"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        memory = make(folder, packing=Packing.parse(there))
        memory.frames.view[:5] = b"there"
        with pytest.raises(LayoutError) as caught:
            make(folder, packing=Packing.parse(wanted))
        assert f"packs its frames as {there} and cannot be handed over to {wanted}: swapoff and" in str(caught.value)
        again = make(folder, packing=Packing.parse(there))
        assert bytes(again.frames.view[:5]) == b"there"
        assert again.status_area.fields[Field.PACKING] == Packing.parse(there).code


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """A user who could put a link there could have another file overwritten."""
    (tmp_path / "victim").write_bytes(b"x" * PAGE_SIZE)
    folder = tmp_path / "pool"
    folder.mkdir()
    (folder / "pages").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        make(folder)
    assert (tmp_path / "victim").read_bytes() == b"x" * PAGE_SIZE


def test_only_what_has_a_fixed_size_is_populated() -> None:
    """The tables of pages and blocks, the request slots and the bounce frames are populated, and the frames are not."""
    memory = make(frames=5000)
    assert sum(with_pages(memory).values()) == 0
    memory.populate()
    found = with_pages(memory)
    assert memory.blocks is not None
    assert found["pages"] == memory.pages.size
    assert found["blocks"] == memory.blocks.size
    assert found["request_slots"] == memory.request_slots.size
    assert found["frames"] == BOUNCE_FRAMES * PAGE_SIZE
    assert found["frame_table"] < memory.frame_table.size / 4
    assert found["free_frames"] == 0
    assert memory.populated_frames() == []


def test_frames_come_with_their_part_of_the_tables() -> None:
    """A populated frame has memory for its table entries, so that neither use nor release needs more."""
    memory = make(frames=20_000)
    memory.populate()
    pool = Pool(memory)
    before = with_pages(memory)
    taken: list[int] = []
    while len(taken) < 5000:
        runs = pool.take_bare()
        pool.populate(runs)
        populated = with_pages(memory)
        pool.add_ready(runs)
        while (frame := pool.take_frame()) != -1:
            taken.append(frame)
            pool.allocator.create_raw(frame, frame, b"x" * PAGE_SIZE)
            pool.block_of[frame] = 1
        assert with_pages(memory) == populated, "using a ready frame took memory"
    assert populated["frames"] == before["frames"] + len(taken) * PAGE_SIZE
    assert populated["frame_table"] - before["frame_table"] < 60 * PAGE_SIZE
    for frame in taken:
        pool.give_frame(pool.allocator.free(frame << REF_BITS))
    surplus = pool.take_surplus(1000, len(taken))
    pool.release(surplus)
    released = with_pages(memory)
    assert released["frames"] < populated["frames"]
    pool.add_bare(surplus)
    assert with_pages(memory) == released, "giving frames back took memory"


def test_runs_of_populated_frames() -> None:
    """Runs are those of the kernel. The bounce frames behind the last frame are not frames."""
    memory = make()
    memory.populate()
    runs = [(0, 3), (10, 1), (90, 10)]
    memory.populate_frames(runs)
    assert memory.populated_frames() == runs
    memory.frames.release(91 * PAGE_SIZE, 9 * PAGE_SIZE)
    assert memory.populated_frames() == [(0, 3), (10, 1), (90, 1)]


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 99)))
def test_populated_frames_are_found(frames: set[int]) -> None:
    """All populated frames are found, and no others."""
    memory = make()
    memory.populate()
    memory.populate_frames([(frame, 1) for frame in sorted(frames)])
    runs = memory.populated_frames()
    assert [frame for first, count in runs for frame in range(first, first + count)] == sorted(frames)
    assert all(first + count < after for (first, count), (after, _) in pairwise(runs))


def faults_of_a_child(memory: StoreMemory, *, mapped: bool) -> int:
    """Return the number of page faults of a child that reads all frames with memory."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        if mapped:
            memory.map_populated()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        total = 0
        for first, count in memory.populated_frames():
            for frame in range(first, first + count):
                total += memory.frames.view[frame * PAGE_SIZE]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        os.write(writer, str(faults).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        return int(stream.read())


def test_populated_memory_can_be_mapped_by_others() -> None:
    """A process that has mapped the memory touches it without a fault for each few pages."""
    memory = make(size=64 * MIB, frames=4096)
    memory.populate()
    memory.populate_frames([(0, 1000), (2000, 1000)])
    assert faults_of_a_child(memory, mapped=True) + 40 < faults_of_a_child(memory, mapped=False)


def test_mapping_gives_nothing_new_memory() -> None:
    """Only existing pages are mapped."""
    memory = make(frames=2000)
    memory.populate()
    memory.populate_frames([(7, 5)])
    before = with_pages(memory)
    memory.map_populated()
    assert with_pages(memory) == before
