# SPDX-License-Identifier: MIT
"""The backing file on real file systems. The first part is the contract, for the real file and the faulty one."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.core.samples import BIG, page, pages
from tests.store.disks import ramfs, small_ext4
from tests.store.faulty import Call, FaultyBacking, about
from tests.store.rig import drop, get, push, put, quiet, run, running
from tests.store.test_writeback import fill_up
from zbudfs.core.block_map import SEGMENT_BLOCKS
from zbudfs.core.codec import Codec
from zbudfs.core.errors import BackingError, BackingFull, LayoutError
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store.backing import MAGIC, SEGMENT_BYTES, Backing
from zbudfs.store.page_store import PageStore

Make = Callable[[str], Backing]
MAKES = [Backing, FaultyBacking]


class Frames:
    """Aligned memory, like the frames of a pool."""

    def __init__(self, count: int) -> None:
        self._map = mmap.mmap(-1, count * PAGE_SIZE)
        view = memoryview(self._map)
        self.views = [view[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] for number in range(count)]

    def fill(self, content: bytes) -> list[memoryview]:
        """Put pages into the frames."""
        for number, view in enumerate(self.views):
            view[:] = content[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
        return self.views

    @property
    def content(self) -> bytes:
        """Return the content of the frames."""
        return b"".join(self.views)


def write(backing: Backing, block: int, content: bytes) -> None:
    """Write blocks."""
    backing.write_blocks(block, Frames(len(content) // PAGE_SIZE).fill(content))


def read(backing: Backing, block: int, count: int) -> bytes:
    """Read blocks into memory with other content."""
    frames = Frames(count)
    backing.read_blocks(block, frames.fill(b"\xee" * (count * PAGE_SIZE)))
    return frames.content


@contextlib.contextmanager
def opened(make: Make, path: Path) -> Iterator[Backing]:
    """Open a backing file for the block."""
    backing = make(str(path))
    try:
        yield backing
    finally:
        backing.close()


@pytest.fixture(params=["disk", "shm", "ramfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Return a folder on each sort of file system: a disk, a tmpfs, and one that refuses O_DIRECT and holes."""
    if request.param == "disk":
        yield tmp_path
    elif request.param == "shm":
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("needs /dev/shm")
        with TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        if os.geteuid() != 0:
            pytest.skip("needs root: not root: run it with sudo")
        with ramfs(tmp_path) as folder:
            yield folder


# ---- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
def test_written_blocks_are_read(place: Path, make: Make) -> None:
    """Single blocks and runs, many times and in any order: each read returns the last write."""
    with opened(make, place / "backing") as backing:
        backing.make_ready(0, 3)
        generator = random.Random(1)
        model = {block: bytes(PAGE_SIZE) for block in range(1, 3 * SEGMENT_BLOCKS)}
        for step in range(60):
            count = generator.choice([1, 1, 2, 17, 64])
            first = generator.randrange(1, 3 * SEGMENT_BLOCKS - count)
            if generator.random() < 0.6:
                content = pages(count, BIG, step * 100)
                write(backing, first, content)
                model |= {first + at: content[at * PAGE_SIZE : (at + 1) * PAGE_SIZE] for at in range(count)}
            else:
                assert read(backing, first, count) == b"".join(model[first + at] for at in range(count))
        backing.sync()
        assert read(backing, 1, 150) == b"".join(model[block] for block in range(1, 151))


@pytest.mark.parametrize("make", MAKES)
def test_frames_may_lie_anywhere(place: Path, make: Make) -> None:
    """The frames of one write or one read need not be neighbours in memory."""
    with opened(make, place / "backing") as backing:
        backing.make_ready(0, 1)
        frames = Frames(9)
        frames.fill(pages(9, BIG))
        backing.write_blocks(5, [frames.views[number] for number in (7, 2, 4)])
        assert read(backing, 5, 3) == page(7, BIG) + page(2, BIG) + page(4, BIG)
        backing.read_blocks(5, [frames.views[number] for number in (0, 8, 3)])
        assert [bytes(frames.views[number]) for number in (0, 8, 3)] == [page(number, BIG) for number in (7, 2, 4)]
        assert bytes(frames.views[1]) == page(1, BIG)


@pytest.mark.parametrize("make", MAKES)
def test_a_disk_that_takes_less_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    """If a system call moves fewer blocks than requested, the rest follows, at the right places."""
    for name in ("pwritev", "preadv"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, views, *rest, real=real: real(fd, views[: len(views) // 3 + 1], *rest))
    with opened(make, tmp_path / "backing") as backing:
        backing.make_ready(0, 1)
        write(backing, 3, pages(20, BIG))
        assert read(backing, 3, 20) == pages(20, BIG)
        assert read(backing, 1, 2) == read(backing, 23, 2) == bytes(2 * PAGE_SIZE)
        monkeypatch.undo()
        assert read(backing, 3, 20) == pages(20, BIG)


@pytest.mark.parametrize("make", MAKES)
def test_reading_beyond_the_end_is_an_error(place: Path, make: Make) -> None:
    """A read of blocks beyond the end is an error, and not zeros or the old content of the frames."""
    with opened(make, place / "backing") as backing:
        backing.make_ready(0, 1)
        for first, count in ((SEGMENT_BLOCKS, 1), (SEGMENT_BLOCKS - 1, 2), (1000, 3)):
            with pytest.raises(BackingError):
                read(backing, first, count)
        assert read(backing, SEGMENT_BLOCKS - 1, 1) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("make", MAKES)
def test_growing_keeps_what_is_there(place: Path, make: Make) -> None:
    """New segments are zeros, the header and other segments do not change, and the bytes are counted."""
    with opened(make, place / "backing") as backing:
        backing.make_ready(0, 1)
        write(backing, 1, page(1, BIG))
        backing.make_ready(4, 2)
        assert read(backing, 1, 1) == page(1, BIG)
        assert read(backing, 4 * SEGMENT_BLOCKS, 2 * SEGMENT_BLOCKS) == bytes(2 * SEGMENT_BYTES)
        assert read(backing, 0, 1).startswith(MAGIC)


@pytest.mark.parametrize("make", MAKES)
def test_a_refused_call_is_a_backing_error(tmp_path: Path, make: Make) -> None:
    """Each OSError becomes a BackingError with its reason, for example if a file may not grow."""
    limited = os.path.join(tmp_path, "backing")  # noqa: PTH118

    def in_child() -> None:
        import resource

        backing = make(limited)
        backing.make_ready(0, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES, SEGMENT_BYTES))
        with pytest.raises(BackingFull, match="cannot be grown: File too large"):
            backing.make_ready(1, 1)
        with pytest.raises(BackingFull, match="cannot be written: File too large"):
            write(backing, SEGMENT_BLOCKS, page(1, BIG))
        write(backing, 1, page(1, BIG))
        assert read(backing, 1, 1) == page(1, BIG)

    child = os.fork()
    if child == 0:
        try:
            in_child()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
def test_a_new_file_is_for_its_owner_alone(tmp_path: Path, make: Make) -> None:
    """The file has mode 0600 with any umask, and its header names its owner."""
    before = os.umask(0)
    try:
        with opened(make, tmp_path / "backing"):
            assert stat.S_IMODE((tmp_path / "backing").stat().st_mode) == 0o600
            assert (tmp_path / "backing").read_bytes()[: len(MAGIC)] == MAGIC
    finally:
        os.umask(before)


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    """An existing file of ours with a wider mode gets mode 0600."""
    path = tmp_path / "backing"
    path.write_bytes(MAGIC)
    path.chmod(0o644)
    with opened(Backing, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    """A user who can put a link there must not choose the file that is emptied."""
    victim, link = tmp_path / "victim", tmp_path / "backing"
    victim.write_bytes(MAGIC + b"precious")
    link.symlink_to(victim)
    with pytest.raises(BackingError, match="it is a symbolic link"):
        Backing(str(link))
    assert victim.read_bytes() == MAGIC + b"precious"
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BackingError, match="it is a symbolic link"):
        Backing(str(link))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("what", ["folder", "pipe", "device", "missing folder"])
def test_only_a_regular_file_will_do(tmp_path: Path, what: str) -> None:
    """Anything but a regular file is refused at once, and nothing stays open."""
    path = tmp_path / "backing"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path = Path("/dev/null")
    else:
        path = tmp_path / "missing" / "backing"
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BackingError):
        Backing(str(path))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("make", MAKES)
def test_a_second_daemon_is_refused(tmp_path: Path, make: Make) -> None:
    """While one daemon has the file, another cannot open it, and the content stays. Afterwards it can."""
    path = tmp_path / "backing"
    with opened(make, path) as first:
        first.make_ready(0, 1)
        write(first, 3, page(3, BIG))
        with pytest.raises(BackingError, match="in use by another zbudfs"):
            make(str(path))
        assert read(first, 3, 1) == page(3, BIG)
    with opened(make, path):
        pass


@pytest.mark.parametrize(
    "content", [b"x", b"#!/bin/sh\n" * 100, bytes(PAGE_SIZE), b"zbudfs backing file 2\n".ljust(PAGE_SIZE), MAGIC[:-1]]
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file with foreign content does not change, neither bytes nor mode, and gets no lock."""
    path = tmp_path / "backing"
    path.write_bytes(content)
    path.chmod(0o640)
    for _ in range(2):
        with pytest.raises(LayoutError, match="is not a backing file of this version"):
            Backing(str(path))
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_old_content_of_ours_is_emptied(tmp_path: Path) -> None:
    """The content that a killed daemon left is gone as soon as the next one has the file."""
    path = tmp_path / "backing"
    path.write_bytes(MAGIC.ljust(PAGE_SIZE, b"\0") + b"secret" * 100_000)
    with opened(Backing, path) as backing:
        assert path.stat().st_size == PAGE_SIZE
        assert b"secret" not in path.read_bytes()
        backing.make_ready(0, 3)
        assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize("make", MAKES)
def test_the_file_is_emptied_at_close(place: Path, make: Make) -> None:
    """A closed file has no page of any program."""
    path = place / "backing"
    with opened(make, path) as backing:
        backing.make_ready(0, 2)
        write(backing, 70, page(1, BIG))
        assert path.stat().st_size == 2 * SEGMENT_BYTES
    assert path.stat().st_size == path.stat().st_blocks == 0


def test_another_process_goes_on_with_the_file(tmp_path: Path) -> None:
    """With the descriptor of a running mount nothing is emptied, and writes work in the same way."""
    path = tmp_path / "backing"
    first = Backing(str(path))
    first.make_ready(0, 1)
    write(first, 9, page(9, BIG))
    second = Backing(str(path), os.dup(first.fileno()))
    assert second.direct == first.direct
    assert not os.get_inheritable(second.fileno())
    assert read(second, 9, 1) == page(9, BIG)
    write(second, 10, page(10, BIG))
    assert read(first, 9, 2) == pages(2, BIG, 9)
    os.close(first.fileno())
    with pytest.raises(BackingError, match="in use"):
        Backing(str(path))
    second.close()
    assert path.stat().st_size == 0


# ---- room -------------------------------------------------------------------------------------------------------------


def test_growing_allocates_and_punching_gives_back(tmp_path: Path) -> None:
    """The file has room for ready segments before any write, and loses the room of punched ones."""
    path = tmp_path / "backing"
    with opened(Backing, path) as backing:
        backing.make_ready(0, 8)
        allocated = path.stat().st_blocks * 512
        assert 8 * SEGMENT_BYTES <= allocated <= 9 * SEGMENT_BYTES
        write(backing, 100, pages(64, BIG))
        write(backing, 7 * SEGMENT_BLOCKS, page(7, BIG))
        assert path.stat().st_blocks * 512 == allocated
        backing.punch(1, 4)
        assert path.stat().st_blocks * 512 == allocated - 4 * SEGMENT_BYTES
        assert path.stat().st_size == 8 * SEGMENT_BYTES
        assert read(backing, 100, 64) == bytes(64 * PAGE_SIZE)
        assert read(backing, 7 * SEGMENT_BLOCKS, 1) == page(7, BIG)
        backing.make_ready(1, 4)
        assert path.stat().st_blocks * 512 == allocated


def test_ready_blocks_are_initialised(tmp_path: Path) -> None:
    """Ready segments have been written over: no unwritten extent is left that a write would have to convert."""
    path = tmp_path / "backing"
    with opened(Backing, path) as backing:
        backing.make_ready(0, 4)
        backing.sync()
        with contextlib.suppress(OSError):
            assert not any(flags & 0x800 for flags in extent_flags(backing.fileno()))


def extent_flags(fd: int) -> list[int]:
    """Return the flags of a file's extents (FIEMAP). 0x800 is "unwritten". OSError if the file system lacks it."""
    header = 32
    buffer = bytearray(header + 56 * 64)
    buffer[8:16] = (1 << 62).to_bytes(8, "little")
    buffer[16:20] = (1).to_bytes(4, "little")  # FIEMAP_FLAG_SYNC
    buffer[24:28] = (64).to_bytes(4, "little")
    fcntl.ioctl(fd, 0xC020660B, buffer)
    mapped = int.from_bytes(buffer[20:24], "little")
    return [
        int.from_bytes(buffer[header + 56 * number + 40 : header + 56 * number + 44], "little")
        for number in range(mapped)
    ]


def test_a_file_system_that_refuses_direct_io(tmp_path: Path) -> None:
    """On such a file system writes are buffered, and a message says so. On a disk they are not."""
    if os.geteuid() != 0:
        pytest.skip("needs root: not root: run it with sudo")
    with ramfs(tmp_path) as folder, opened(Backing, folder / "backing") as backing:
        assert not backing.direct
        assert not fcntl.fcntl(backing.fileno(), fcntl.F_GETFL) & os.O_DIRECT
        backing.make_ready(0, 1)
        with pytest.raises(BackingError, match="cannot be punched"):
            backing.punch(0, 1)


def test_direct_io_is_what_it_says(place: Path) -> None:
    """`direct` is the flag of the open file."""
    with opened(Backing, place / "backing") as backing:
        assert backing.direct == bool(fcntl.fcntl(backing.fileno(), fcntl.F_GETFL) & os.O_DIRECT)


def cached_pages(path: Path) -> int:
    """Return the number of a file's pages in the page cache."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        found = (ctypes.c_ubyte * (len(mapped) // PAGE_SIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
        return sum(entry & 1 for entry in found)


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Pages that left RAM are not in the page cache, with direct I/O or without.

    This holds for growth, writes and reads, also on a system without O_DIRECT.
    """
    path = tmp_path / "backing"
    if not direct:
        monkeypatch.setattr("zbudfs.store.backing._DIRECT", 0)
    with opened(Backing, path) as backing:
        if backing.direct != direct:
            pytest.skip("needs a temporary folder on a disk: this file system refuses O_DIRECT")
        backing.make_ready(0, 4)
        if not direct and cached_pages(path) == 4 * SEGMENT_BLOCKS and filesystem_is_memory(path):
            pytest.skip("needs a temporary folder on a disk: this is memory itself")
        assert cached_pages(path) <= 1
        write(backing, 64, pages(64, BIG))
        assert cached_pages(path) <= 1
        assert read(backing, 64, 64) == pages(64, BIG)
        assert cached_pages(path) <= SEGMENT_BLOCKS  # the system may read ahead


def filesystem_is_memory(path: Path) -> bool:
    """Return whether a file is on a tmpfs or the like, whose page cache is the file."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    below = [mount for mount in mounts if path.is_relative_to(mount[1])]
    return max(below, key=lambda mount: len(mount[1]))[2] in ("tmpfs", "ramfs")


# ---- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.needs("root", "loop")
def test_a_full_file_system(tmp_path: Path) -> None:
    """On a full disk growth is BackingFull, its partial room is returned, and the rest works."""
    with small_ext4(tmp_path, 8 << 20) as folder, opened(Backing, folder / "backing") as backing:
        first = 0
        with contextlib.suppress(BackingFull):
            while first < 1000:
                backing.make_ready(first, 1)
                first += 1
        assert 16 <= first <= 32
        with pytest.raises(BackingFull, match="No space left on device"):
            backing.make_ready(first, 1)
        assert (folder / "backing").stat().st_blocks * 512 <= (first + 1) * SEGMENT_BYTES
        with pytest.raises(BackingFull):
            backing.make_ready(first, 4)
        for block in (1, first * SEGMENT_BLOCKS - 10):
            write(backing, block, pages(10, BIG, block))
        for block in (1, first * SEGMENT_BLOCKS - 10):
            assert read(backing, block, 10) == pages(10, BIG, block)
        backing.punch(3, 2)
        backing.make_ready(first, 1)
        write(backing, first * SEGMENT_BLOCKS, page(1, BIG))
        assert read(backing, first * SEGMENT_BLOCKS, 1) == page(1, BIG)


@pytest.mark.needs("root", "loop")
def test_a_store_on_a_full_file_system(tmp_path: Path) -> None:
    """A device larger than its disk refuses writes when both are full, loses nothing, and works after a discard."""

    async def main(folder: Path) -> None:
        store = PageStore(4096 * PAGE_SIZE, 64, Backing(str(folder / "backing")), Codec())
        async with running(store):
            stored = await fill_up(store)
            assert stored > 1024
            for number in range(stored):
                assert await get(store, number) == page(number, BIG)
            await quiet(store)
            await drop(store, 0, 500)
            push(2.0)
            for number in range(4000, 4096):
                await put(store, number, page(number, BIG))
            for number in [*range(500, stored), *range(4000, 4096)]:
                assert await get(store, number) == page(number, BIG)
            await quiet(store)

    with small_ext4(tmp_path, 8 << 20) as folder:
        run(lambda: main(folder))


# ---- the faulty file ------------------------------------------------------------------------------------------------


def test_the_faulty_one_holds_and_fails(tmp_path: Path) -> None:
    """A held call waits in its thread and then continues. A failing call does nothing. All calls are recorded."""
    with contextlib.closing(FaultyBacking(str(tmp_path / "backing"))) as backing:
        backing.make_ready(0, 1)
        with backing.held("write_blocks") as gate:
            thread = threading.Thread(target=write, args=(backing, 3, page(3, BIG)))
            thread.start()
            while not gate.held:
                pass
            assert read(backing, 3, 1) == bytes(PAGE_SIZE)
            assert thread.is_alive()
        thread.join()
        assert read(backing, 3, 1) == page(3, BIG)
        backing.fail("write_blocks", about({4}))
        with pytest.raises(BackingError):
            write(backing, 3, pages(2, BIG, 50))
        assert read(backing, 3, 2) == page(3, BIG) + bytes(PAGE_SIZE)
        write(backing, 5, page(5, BIG))
        backing.recover()
        write(backing, 4, page(4, BIG))
        assert read(backing, 3, 3) == pages(3, BIG, 3)
        assert backing.calls_of("write_blocks") == [
            Call("write_blocks", 3, 1),
            Call("write_blocks", 3, 2),
            Call("write_blocks", 5, 1),
            Call("write_blocks", 4, 1),
        ]
