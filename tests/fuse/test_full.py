# SPDX-License-Identifier: MIT
"""A full pool or disk: new pages get ENOSPC, stored pages stay readable, and freed room is used.

An overwrite needs a frame for the new form before the old one goes. So a full pool refuses it as well, and the old
content stays. Zeros, same-filled pages and discards take no frame, and always work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import (
    MIB,
    PAGE,
    PUNCH,
    aligned,
    all_stats,
    disk_mounted,
    fallocate,
    frozen,
    fuse_control,
    looped,
    opened,
    require_tools,
    stat_of,
    tool,
)
from tests.support import LIMIT_SECONDS, mounted, wait_until

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 64 * MIB
POOL: Final = 4 * MIB
DISK: Final = 16 * MIB
CHUNK: Final = 16 * PAGE


def noise(source: random.Random) -> bytes:
    """Return pages that do not compress, so that each takes a frame."""
    return source.randbytes(CHUNK)


def large_zpages(source: random.Random) -> bytes:
    """Return pages of which each compresses to more than half a frame."""
    return b"".join(source.randbytes(2600) + bytes(PAGE - 2600) for _ in range(CHUNK // PAGE))


def fill(fd: int, source: random.Random, data_of: Callable[[random.Random], bytes] = noise) -> list[bytes]:
    """Write from the start until a write is refused, and return all accepted pages."""
    taken: list[bytes] = []
    for at in range(0, SIZE, CHUNK):
        data = data_of(source)
        error = refusal(fd, data, at)
        if error:
            assert error == errno.ENOSPC
            return taken
        taken.append(data)
    pytest.fail("the device never was full")


def assert_still_there(fd: int, taken: list[bytes]) -> None:
    """All accepted pages read back. Each page of the refused write is old (zeros) or new."""
    wrong = [number for number, data in enumerate(taken) if os.pread(fd, CHUNK, number * CHUNK) != data]
    assert wrong == []
    behind = (len(taken) + 1) * CHUNK
    assert os.pread(fd, MIB, behind) == bytes(MIB)


def refusal(fd: int, data: bytes, offset: int) -> int:
    """Return the errno of a write, or 0."""
    try:
        assert os.pwrite(fd, data, offset) == len(data)
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Make a real file system that is far too small for the device."""
    require_tools("mkfs.ext4", "losetup")
    image = tmp_path / "image"
    with image.open("wb") as stream:
        stream.truncate(DISK)
    tool("mkfs.ext4", "-q", "-O", "^has_journal", image)
    with looped(image, sector_bytes=512, direct=False) as device, disk_mounted(device, tmp_path / "disk") as folder:
        yield folder


@pytest.mark.parametrize("data_of", [noise, large_zpages])
def test_pool_full_without_a_disk(data_of: Callable[[random.Random], bytes], tmp_path: Path) -> None:
    """The pool takes as much as it has room for, and refuses the rest. Each refusal is counted and does no harm."""
    source = random.Random(11)
    options = ("--size", str(SIZE), "--pool", str(POOL))
    with mounted(tmp_path / "mnt", *options) as mountpoint, opened(mountpoint / "swapfile") as fd:
        taken = fill(fd, source, data_of)
        assert len(taken) == POOL // CHUNK
        counts = all_stats(mountpoint)
        assert counts["pool_used_bytes"] == POOL
        assert counts["refused_pool_full"] == 1
        assert_still_there(fd, taken)

        for offset in (0, 5 * PAGE, POOL + 8 * MIB):  # over a page, and elsewhere; twice, to be sure that it stays so
            assert [refusal(fd, data_of(source)[:PAGE], offset) for _ in range(2)] == [errno.ENOSPC] * 2
        assert refusal(fd, source.randbytes(600), 3 * PAGE + 3000) == errno.ENOSPC  # some bytes more or fewer
        assert all_stats(mountpoint)["refused_pool_full"] == 8
        assert_still_there(fd, taken)

        for word in (bytes(8), b"\xff" * 8, b"\0\0\0\0\0\0\0\7"):
            assert refusal(fd, word * (PAGE // 8), SIZE - PAGE) == 0
            assert os.pread(fd, PAGE, SIZE - PAGE) == word * (PAGE // 8)
        assert all_stats(mountpoint)["lost_pages"] == 0


def test_room_made_in_a_full_pool_is_used(tmp_path: Path) -> None:
    """A punched hole leaves room for as much new data, anywhere. All other pages are still there."""
    source = random.Random(12)
    options = ("--size", str(SIZE), "--pool", str(POOL))
    with mounted(tmp_path / "mnt", *options) as mountpoint, opened(mountpoint / "swapfile") as fd:
        taken = fill(fd, source)
        fallocate(fd, PUNCH, 2 * CHUNK, 4 * CHUNK)
        taken[2:6] = [bytes(CHUNK)] * 4
        assert_still_there(fd, taken)
        data = [source.randbytes(CHUNK) for _ in range(4)]
        assert [refusal(fd, data[at], SIZE - MIB + at * CHUNK) for at in range(4)] == [0] * 4
        assert refusal(fd, source.randbytes(PAGE), SIZE - PAGE) == errno.ENOSPC
        assert_still_there(fd, taken)
        assert os.pread(fd, 4 * CHUNK, SIZE - MIB) == b"".join(data)
        # A page of zeros over one of noise frees a frame as well.
        assert refusal(fd, bytes(CHUNK), 0) == 0
        taken[0] = bytes(CHUNK)
        assert refusal(fd, source.randbytes(CHUNK), SIZE - CHUNK) == 0
        assert_still_there(fd, taken)


@pytest.mark.needs("loop")
def test_disk_too_small(small_disk: Path, tmp_path: Path) -> None:
    """With a disk that fills up, more fits than in the pool. Then writes are refused, and no page is lost."""
    source = random.Random(13)
    options = ("--size", str(SIZE), "--pool", str(POOL), "--backing", small_disk / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint, opened(mountpoint / "swapfile") as fd:
        taken = fill(fd, source)
        assert POOL + DISK // 3 < len(taken) * CHUNK < POOL + DISK
        counts = all_stats(mountpoint)
        assert counts["refused_pool_full"] > 0
        assert counts["written_back_pages"] > 0
        assert_still_there(fd, taken)
        assert (mountpoint / "stats/log").read_text().count("is kept for other programs") == 1
        disk = os.statvfs(small_disk)
        assert disk.f_bavail * disk.f_frsize >= disk.f_blocks * disk.f_frsize // 50
        assert (counts["writeback_failures"], counts["lost_pages"], counts["pagein_failures"]) == (0, 0, 0)

        # Room is freed on the disk and in RAM, and both are used again.
        for first in (0, len(taken) - 32):
            fallocate(fd, PUNCH, first * CHUNK, 16 * CHUNK)
            taken[first : first + 16] = [bytes(CHUNK)] * 16
        data = [source.randbytes(CHUNK) for _ in range(24)]
        assert [refusal(fd, piece, SIZE - 4 * MIB + at * CHUNK) for at, piece in enumerate(data)] == [0] * 24
        assert_still_there(fd, taken)
        assert os.pread(fd, 24 * CHUNK, SIZE - 4 * MIB) == b"".join(data)

        fallocate(fd, PUNCH, 0, SIZE)
        wait_until(lambda: stat_of(mountpoint, "pool_used_bytes") == 0, "an empty pool")
        assert stat_of(mountpoint, "backing_used_bytes") == 0
        again = fill(fd, source)
        assert len(again) > len(taken) - 16
        assert_still_there(fd, again)


@pytest.mark.needs("loop")
def test_a_disk_that_other_programs_fill(small_disk: Path, tmp_path: Path) -> None:
    """Room that other programs take from the file system is lost to the backing file until they give it back."""
    source = random.Random(14)
    options = ("--size", str(SIZE), "--pool", str(POOL), "--backing", small_disk / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint, opened(mountpoint / "swapfile") as fd:
        other = small_disk / "other"
        with opened(other, os.O_WRONLY | os.O_CREAT) as stream, contextlib.suppress(OSError):
            for at in range(0, DISK, MIB):
                os.pwrite(stream, bytes(MIB), at)
        assert os.statvfs(small_disk).f_bavail * PAGE < MIB
        few = fill(fd, source)
        other.unlink()
        for number, data in enumerate(few):
            assert os.pread(fd, CHUNK, number * CHUNK) == data
        offset = len(few) * CHUNK
        data = source.randbytes(CHUNK)
        wait_until(lambda: refusal(fd, data, offset) == 0, "the backing file to grow again")
        more = [*few, data]
        while len(more) * CHUNK < len(few) * CHUNK + 2 * MIB:
            more.append(source.randbytes(CHUNK))
            wait_until(lambda: refusal(fd, more[-1], (len(more) - 1) * CHUNK) == 0, "a write to be taken")
        assert_still_there(fd, more)
        assert stat_of(mountpoint, "lost_pages") == 0


def sectors_written(folder: Path) -> int:
    """Return the number of sectors of 512 bytes that were written to the disk of a file system."""
    device = folder.stat().st_dev
    os.sync()
    counts = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(counts[6])


@pytest.mark.needs("loop")
def test_a_full_disk_is_left_alone(small_disk: Path, tmp_path: Path) -> None:
    """On a disk that others filled, nothing is written, idle or under load, and no budget is spent."""
    source = random.Random(16)
    options = ("--size", str(SIZE), "--pool", str(POOL), "--backing", small_disk / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint, opened(mountpoint / "swapfile") as fd:
        fill(fd, source)
        with (small_disk / "other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
            while True:
                other.write(bytes(PAGE))
        (mountpoint / "control/writeback_budget_bytes_per_day").write_text(str(100 * MIB))
        wait_until(lambda: stat_of(mountpoint, "pers_zombie_count") == 0, "the writeback")
        before, used = sectors_written(small_disk), stat_of(mountpoint, "writeback_budget_used_bytes")
        log = (mountpoint / "stats/log").read_text()
        for number in range(30):
            assert refusal(fd, source.randbytes(PAGE), SIZE - MIB + number * PAGE) == errno.ENOSPC
            time.sleep(0.1)
        assert sectors_written(small_disk) - before < 64  # writes of the file system itself
        assert stat_of(mountpoint, "writeback_budget_used_bytes") <= used
        assert (mountpoint / "stats/log").read_text() == log
        assert stat_of(mountpoint, "backing_full") == 1


@pytest.mark.needs("loop")
def test_a_disk_that_stands_still(small_disk: Path, tmp_path: Path) -> None:
    """Writes that need a frame wait as long as the disk does, others are served, and then all pages are right.

    As many writes wait as the kernel sends at once through a loop device, and one more of a program.
    """
    source = random.Random(15)
    options = ("--size", str(SIZE), "--pool", "1M", "--backing", small_disk / "backing")
    with (
        mounted(tmp_path / "mnt", *options, writers=2) as mountpoint,
        fuse_control(tmp_path / "ctl", mountpoint) as connection,
        looped(mountpoint / "swapfile") as device,
        opened(mountpoint / "swapfile") as fd,
        opened(device, os.O_RDWR | os.O_DIRECT) as loop_fd,
    ):
        first = [source.randbytes(CHUNK) for _ in range(16)]
        for number, data in enumerate(first):
            assert refusal(fd, data, number * CHUNK) == 0
        background = int((connection / "max_background").read_text())
        offsets = [8 * MIB + number * MIB // 2 for number in range(6 * background)]
        second = [b"word" * (2 * PAGE // 4) + source.randbytes(2 * CHUNK - 2 * PAGE) for _ in offsets]
        # A same-filled page takes no frame, so each write begins at once, and its rest waits.
        done: list[int] = []
        writers: list[threading.Thread] = []

        def nr_waiting() -> int:
            return int((connection / "waiting").read_text())

        def write(number: int, target: int) -> None:
            with aligned(second[number]) as buffer:
                assert os.pwritev(target, [buffer], offsets[number]) == len(buffer)
                done.append(number)

        def start_another(target: int) -> None:
            writers.append(threading.Thread(target=write, args=(len(writers), target)))
            writers[-1].start()
            wait_until(lambda: nr_waiting() + len(done) >= len(writers), "a writer to be done or to wait")

        try:
            with frozen(small_disk):
                while nr_waiting() < background:  # the first ones may find frames
                    start_another(loop_fd)
                start_another(fd)
                wait_until(lambda: nr_waiting() > background, "one more")
                assert stat_of(mountpoint, "pool_used_bytes") == MIB
                assert os.pread(fd, CHUNK, 4 * MIB) == bytes(CHUNK)
        finally:
            for writer in writers:
                writer.join(LIMIT_SECONDS)
        assert sorted(done) == list(range(len(writers)))
        for number in done:
            assert os.pread(fd, 2 * CHUNK, offsets[number]) == second[number], f"writer {number}"
        assert b"".join(first) == os.pread(fd, MIB, 0)
        counts = all_stats(mountpoint)
        assert (counts["refused_pool_full"], counts["lost_pages"], counts["writeback_failures"]) == (0, 0, 0)
