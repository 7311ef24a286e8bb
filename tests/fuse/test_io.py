# SPDX-License-Identifier: MIT
"""Reads return the written bytes: compared with a plain file on ext4, with a pool far too small and without a disk.

tests/fuse/exercise.py makes the random calls, several of them at once. On failure it prints its seed and the history of
the wrong page.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import (
    MIB,
    PAGE,
    PUNCH,
    ZERO_RANGE,
    aligned,
    all_stats,
    cached_pages,
    fallocate,
    looped,
    opened,
    read_everything,
    stat_of,
)
from tests.fuse.exercise import SECTOR, content, marked_sector, whose_sector
from tests.support import LIMIT_SECONDS, ROOT, mounted, wait_until

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 32 * MIB
BOUNDS: Final = (0, 8 * MIB + 2001, 15 * MIB + 513, 26 * MIB + 1, SIZE)
"""The borders of the workers' ranges. Each is inside a page, which two workers write at once."""


@pytest.fixture
def plain() -> Iterator[Path]:
    """Return a plain file of zeros, of the same size, on a file system that has all the compared functions."""
    with tempfile.TemporaryDirectory(prefix="zbudfs-test-", dir="/var/tmp") as folder:
        file = Path(folder, "plain")
        with file.open("wb") as stream:
            stream.truncate(SIZE)
            try:
                fallocate(stream.fileno(), ZERO_RANGE, 0, PAGE)
            except OSError as error:
                pytest.skip(f"/var/tmp cannot zero a range: {error.strerror} (it takes ext4 or xfs)")
        yield file


def exercise(*arguments: str | Path | int) -> subprocess.Popen[str]:
    """Start one worker."""
    command = [sys.executable, "-m", "tests.fuse.exercise", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def outputs(workers: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for all workers, which must succeed, and return their outputs."""
    try:
        printed = [worker.communicate(timeout=2 * LIMIT_SECONDS)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for worker, output in zip(workers, printed, strict=True):
        assert worker.returncode == 0, output
    return printed


def same_in_ranges(target: Path, plain: Path, bounds: tuple[int, ...], *, unit: int, seed: int, steps: int) -> None:
    """Start one worker for each range between `bounds`, all at once."""
    outputs(
        [
            exercise("same", target, plain, start, end - start, unit, seed + number, steps)
            for number, (start, end) in enumerate(itertools.pairwise(bounds))
        ]
    )


def assert_same(mountpoint: Path, plain: Path) -> None:
    """Compare all of the swapfile with all of the plain file."""
    with opened(mountpoint / "swapfile") as fd:
        found = read_everything(fd, SIZE)
    wanted = plain.read_bytes()
    wrong = [at // PAGE for at in range(0, SIZE, PAGE) if found[at : at + PAGE] != wanted[at : at + PAGE]]
    assert (len(found), wrong) == (SIZE, [])


def assert_all_well(mountpoint: Path) -> None:
    """No page was lost or refused, and a discard of everything frees everything."""
    counts = all_stats(mountpoint)
    troubles = ("lost_pages", "pagein_failures", "writeback_failures", "refused_pool_full")
    assert {name: counts[name] for name in troubles} == dict.fromkeys(troubles, 0)
    assert counts["pool_used_bytes"] <= counts["pool_configured_bytes"]
    with opened(mountpoint / "swapfile") as fd:
        fallocate(fd, PUNCH, 0, SIZE)
        assert not any(read_everything(fd, SIZE))
    empty = dict.fromkeys(("stored_pages", "pool_used_bytes", "backing_used_bytes", "compressed_bytes"), 0)
    # A frame on its way to the disk is free when the write has ended.
    wait_until(lambda: {name: all_stats(mountpoint)[name] for name in empty} == empty, f"an empty store: {empty}")
    assert "error:" not in (mountpoint / "stats/log").read_text()


@pytest.mark.parametrize(
    ("pool", "backing"),
    [
        pytest.param(SIZE // 8, "backing", id="pool of an eighth"),
        pytest.param(2 * SIZE, "none", id="without writeback"),
    ],
)
@pytest.mark.race(15)
def test_several_writers(pool: int, backing: str, plain: Path, tmp_path: Path) -> None:
    """Four processes make thousands of random calls, each in its range, whose first and last pages it shares."""
    disk = backing if backing == "none" else tmp_path / backing
    with mounted(
        tmp_path / "mnt", "--size", str(SIZE), "--pool", str(pool), "--backing", disk, writers=4
    ) as mountpoint:
        same_in_ranges(mountpoint / "swapfile", plain, BOUNDS, unit=1, seed=100, steps=800)
        assert_same(mountpoint, plain)
        counts = all_stats(mountpoint)
        assert (counts["cumul_writeback_pages"] > 0) == (counts["cumul_pagein_pages"] > 0) == (backing != "none")
        assert_all_well(mountpoint)


def test_one_writer_everywhere(plain: Path, tmp_path: Path) -> None:
    """Thousands of calls in sequence overlap one another."""
    options = ("--size", str(SIZE), "--pool", str(SIZE // 8), "--backing", tmp_path / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint:
        same_in_ranges(mountpoint / "swapfile", plain, (0, SIZE), unit=1, seed=7, steps=2500)
        assert_same(mountpoint, plain)
        assert_all_well(mountpoint)


@pytest.mark.needs("loop")
def test_several_writers_through_a_loop_device(plain: Path, tmp_path: Path) -> None:
    """The loop device sends requests in parallel, which no plain file does: two writers change parts of one page at once."""
    bounds = tuple(bound // SECTOR * SECTOR for bound in BOUNDS)
    options = ("--size", str(SIZE), "--pool", str(SIZE // 8), "--backing", tmp_path / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint:
        with looped(mountpoint / "swapfile", sector_bytes=SECTOR) as device:
            same_in_ranges(device, plain, bounds, unit=SECTOR, seed=300, steps=700)
        assert_same(mountpoint, plain)
        assert stat_of(mountpoint, "cumul_writeback_pages") > 0
        assert_all_well(mountpoint)


@pytest.mark.needs("loop")
def test_writers_that_race(tmp_path: Path) -> None:
    """Many writers of the same pages and parts: nothing is mixed, no old content comes back, and the last one stays.

    Most use a loop device, with as many requests at once as the kernel sends. Two write to the file itself.
    """
    pages = 656
    options = ("--size", str(SIZE), "--pool", "1M", "--backing", tmp_path / "backing")
    with mounted(tmp_path / "mnt", *options, writers=3) as mountpoint:
        with looped(mountpoint / "swapfile", sector_bytes=SECTOR) as device:
            targets = [*[device] * 6, *[mountpoint / "swapfile"] * 2]
            workers = [
                exercise("race", target, writer, pages, 500 + writer, 400) for writer, target in enumerate(targets)
            ]
            lasts = [{int(sector): number for sector, number in json.loads(out).items()} for out in outputs(workers)]
        with opened(mountpoint / "swapfile") as fd:
            bytes_found = os.pread(fd, pages * PAGE, 0)
        for sector in range(pages * PAGE // SECTOR):
            found = whose_sector(sector, bytes_found[sector * SECTOR : (sector + 1) * SECTOR])
            possible = {(writer, last[sector]) for writer, last in enumerate(lasts) if sector in last}
            if found is None:
                assert not possible or 0 in {number for _, number in possible}, f"sector {sector} was lost"
            else:
                assert found in possible, f"sector {sector} is an old one: {found}, not of {possible}"
        assert stat_of(mountpoint, "cumul_pagein_pages") > 0
        assert_all_well(mountpoint)


def test_a_mix_is_seen() -> None:
    """A sector of two writes, and one of another place, are not taken for a whole one."""
    one, two = marked_sector(0, 3, 9), marked_sector(1, 3, 9)
    assert whose_sector(9, one) == (0, 3)
    assert whose_sector(9, bytes(SECTOR)) is None
    for wrong in (one[:256] + two[256:], one[:256] + bytes(256), marked_sector(0, 3, 8), one[:-1] + b"\1"):
        with pytest.raises(ValueError, match="mix"):
            whose_sector(9, wrong)


def test_a_request_of_256_kib_arrives_whole(tmp_path: Path) -> None:
    """64 writes and 64 reads of 256 KiB are 128 requests to the daemon, which counts them."""
    calls = 64
    length = 256 << 10
    with mounted(tmp_path / "mnt", "--size", str(SIZE), "--pool", str(SIZE)) as mountpoint:

        def served() -> int:
            return int((mountpoint / "stats/served_requests").read_text())

        with opened(mountpoint / "swapfile") as fd, aligned(bytes(range(256)) * (length // 256)) as buffer:
            before = served()
            for number in range(calls):
                assert os.pwritev(fd, [buffer], number * length) == length
            written = served()
            for number in range(calls):
                assert os.preadv(fd, [buffer], number * length) == length
            read = served()
    assert (written - before, read - written) == (calls, calls)


@pytest.mark.needs("loop")
def test_nothing_stays_in_the_page_cache(tmp_path: Path) -> None:
    """Neither a program's reads and writes nor those of a loop device leave a page of the device in the cache."""
    with mounted(tmp_path / "mnt", writers=2) as mountpoint, opened(mountpoint / "swapfile") as fd:
        os.pwrite(fd, b"cached?" * MIB, 1000)
        assert os.pread(fd, 7, 1000) == b"cached?"
        assert len(read_everything(fd, 16 * MIB)) == 16 * MIB
        assert cached_pages(fd) == 0
        with looped(mountpoint / "swapfile") as device, aligned(b"and now" * 8192) as buffer:
            with opened(device, os.O_RDWR | os.O_DIRECT) as loop_fd:
                assert os.pwritev(loop_fd, [buffer], 8 * MIB) == len(buffer)
                assert os.preadv(loop_fd, [buffer], 8 * MIB) == len(buffer)
            assert cached_pages(fd) == 0
        assert os.pread(fd, 7, 8 * MIB) == b"and now"


def test_cached_pages_are_counted(tmp_path: Path) -> None:
    """The measure of the test before works: the cache has the pages of an ordinary file that was just written."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * MIB)
    with opened(file) as fd:
        assert cached_pages(fd) == MIB // PAGE


@pytest.mark.parametrize("name", ["O_DIRECT", "O_SYNC", "O_DSYNC", "O_APPEND"])
def test_open_flags(name: str, tmp_path: Path) -> None:
    """Files opened with other flags read and write the same bytes, and an append finds the device full."""
    options = ("--size", "8M", "--pool", "1M", "--backing", tmp_path / "backing")
    with (
        mounted(tmp_path / "mnt", *options) as mountpoint,
        opened(mountpoint / "swapfile", os.O_RDWR | getattr(os, name)) as fd,
        aligned(os.urandom(4 * MIB)) as buffer,
        aligned(bytes(8 * MIB)) as back,
    ):
        wanted = bytes(8 * MIB)
        if name == "O_APPEND":
            with pytest.raises(OSError, match="No space left"):
                os.write(fd, buffer)
        else:
            assert os.pwritev(fd, [buffer], 2 * MIB) == len(buffer)
            wanted = bytes(2 * MIB) + buffer[:] + bytes(2 * MIB)
        assert os.preadv(fd, [back], 0) == 8 * MIB
        assert back[:] == wanted


def test_fsync_while_pages_go_to_the_disk(tmp_path: Path) -> None:
    """fsync and fdatasync succeed between writes that overflow the pool, and the written bytes stay."""
    options = ("--size", "32M", "--pool", "1M", "--backing", tmp_path / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint, opened(mountpoint / "swapfile") as fd:
        data = os.urandom(8 * MIB)
        for number, at in enumerate(range(0, len(data), MIB)):
            os.pwrite(fd, data[at : at + MIB], at)
            (os.fsync, os.fdatasync)[number % 2](fd)
        assert read_everything(fd, len(data)) == data
        assert stat_of(mountpoint, "cumul_writeback_pages") > 0


def test_content_is_of_every_kind() -> None:
    """The workers' pages have all forms in which a page may be stored."""
    pages = content(random.Random(3), 4 * MIB)
    sizes = [len(zlib.compress(pages[at : at + PAGE], 1)) for at in range(0, len(pages), PAGE)]
    assert min(sizes) < 64
    assert max(sizes) > PAGE
    assert any(1000 < size < 3000 for size in sizes)
