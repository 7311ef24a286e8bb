# SPDX-License-Identifier: MIT
"""Bad disks under a real mount: a page is right or an error and never wrong, and all works again when the disk does.

The slow tests use one packing. For the other one: ZBUDFS_TEST_PACKING=dense pytest tests/fuse/test_faulty_disk.py
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from kit.nbd import nbd_disk, slow_disk
from tests.fuse.calls import MIB, PAGE, aligned, all_stats, opened, stat_of
from tests.support import LIMIT_SECONDS, PACKING, mounted, status_of, wait_until, zbudfs

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 8 * MIB
POOL: Final = MIB
SIZES: Final = ("--size", str(SIZE), "--pool", str(POOL))
PAGES: Final = SIZE // PAGE // 2
"""Pages that are written first: twice the bytes of the pool, even if each frame holds two of them."""


def content(page: int, version: int = 0) -> bytes:
    """Return a page by its number: noise, half noise, or a word."""
    source = random.Random(page << 16 | version)
    noise = (PAGE, 1500, 8)[page % 3]
    return source.randbytes(noise).ljust(PAGE, b"\0") if noise > 8 else source.randbytes(8) * (PAGE // 8)


class Device:
    """A swapfile, and its expected content."""

    def __init__(self, mountpoint: Path, fd: int) -> None:
        self.mountpoint = mountpoint
        self.fd = fd
        self.model: dict[int, bytes] = {}

    def put(self, page: int, version: int = 0) -> int:
        """Write a page, and return 0 or the errno. A refused page may have the old or the new content."""
        new = content(page, version)
        try:
            with aligned(new) as buffer:
                assert os.pwritev(self.fd, [buffer], page * PAGE) == PAGE
        except OSError as error:
            return error.errno or 0
        self.model[page] = new
        return 0

    def fill(self, version: int = 0) -> None:
        """Write many pages, and wait until those that do not fit the pool are on the disk."""
        for page in range(PAGES):
            assert self.put(page, version) == 0
        wait_until(lambda: stat_of(self.mountpoint, "pers_zombie_count") == 0, "the writeback")
        assert stat_of(self.mountpoint, "written_back_pages") > PAGES // 4

    def errors(self) -> int:
        """Read each page, and return the number of errors. No page may be wrong."""
        found = 0
        for page, expected in self.model.items():
            try:
                got = os.pread(self.fd, PAGE, page * PAGE)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                found += 1
            else:
                assert got == expected, f"page {page} is wrong"
        return found

    @property
    def counted(self) -> int:
        """Return the daemon's count of reads that failed."""
        counts = all_stats(self.mountpoint)
        return int(counts["lost_pages"] + counts["pagein_failures"])

    @property
    def warnings(self) -> str:
        """Return the warnings of `zbudfs status`."""
        return "\n".join(status_of(self.mountpoint)["warnings"])


@contextlib.contextmanager
def device_on(backing: Path, mountpoint: Path, *options: str) -> Iterator[Device]:
    """Make a mount with a small pool and this backing file, which may be on a FUSE filesystem that makes the faults."""
    with (
        mounted(mountpoint, *SIZES, "--backing", backing, "--force-backing", "yes", *options) as where,
        opened(where / "swapfile") as fd,
    ):
        yield Device(where, fd)


# ---- a disk that gives errors ---------------------------------------------------------------------------------------


@pytest.mark.needs("loop", "nbd")
@pytest.mark.parametrize(("rate", "packing"), [("30%", PACKING), ("100%", PACKING), ("30%", "dense")])
def test_reads_that_fail(rate: str, packing: str, tmp_path: Path) -> None:
    """Pages whose block cannot be read are EIO one by one, and are back when the disk works. No other page is affected."""
    with (
        nbd_disk(tmp_path, 48 * MIB, error_rate=rate) as disk,
        device_on(disk.mounted / "backing", tmp_path / "mnt", "--packing", packing) as device,
    ):
        device.fill()
        with disk.failing("pread"):
            failed = device.errors()
            assert 0 < failed < PAGES
            assert device.counted == failed
            assert "reads from the backing file failed" in zbudfs("status", device.mountpoint)
            for page in range(0, PAGES, 7):  # a write needs no read
                assert device.put(page, 1) == 0
        assert device.errors() == 0
        assert device.counted >= failed


@pytest.mark.needs("loop", "nbd")
def test_writes_that_fail(tmp_path: Path) -> None:
    """Writes continue from RAM while it has room, and then are refused. Accepted pages are right all the time."""
    with nbd_disk(tmp_path, 48 * MIB) as disk, device_on(disk.mounted / "backing", tmp_path / "mnt") as device:
        device.fill()
        with disk.failing("pwrite"):
            taken = 0
            while (code := device.put(PAGES + taken, 2)) == 0:
                taken += 1
            assert code == errno.ENOSPC
            assert taken > 0
            wait_until(lambda: stat_of(device.mountpoint, "writeback_failures") > 1, "another try")
            assert "cannot be written: Input/output error: pages stay in RAM" in device.warnings
            assert device.errors() == 0
            assert device.put(0, 3) in (0, errno.ENOSPC)
        wait_until(lambda: device.put(PAGES + taken, 2) == 0, "the disk to be used again")
        assert "pages stay in RAM" not in device.warnings
        for page in range(PAGES + taken, 2 * PAGES):
            assert device.put(page, 2) == 0
        device.model.pop(0)  # it may have either content
        assert device.errors() == 0
        assert device.counted == 0


@pytest.mark.needs("loop", "nbd")
def test_a_disk_that_answers_nothing_for_seconds(tmp_path: Path) -> None:
    """Writes and page-ins wait, pages in RAM are served, `status` warns, no process is killed, and no page is lost."""
    with nbd_disk(tmp_path, 48 * MIB) as disk, device_on(disk.mounted / "backing", tmp_path / "mnt") as device:
        device.fill()
        worker = stat_of(device.mountpoint, "worker_pid")
        codes: list[int] = []

        def write_on() -> None:
            codes.extend(device.put(page, 4) for page in range(PAGES, 2 * PAGES))

        writer = threading.Thread(target=write_on)
        try:
            with disk.standing_still():
                writer.start()
                wait_until(lambda: "the backing file has not answered for" in device.warnings, "a warning")
                assert os.pread(device.fd, PAGE, (2 * PAGES - 1) * PAGE) == bytes(PAGE)
                assert writer.is_alive()
        finally:
            writer.join(LIMIT_SECONDS)
        assert codes == [0] * PAGES
        assert device.errors() == 0
        assert "not answered" not in device.warnings
        counts = all_stats(device.mountpoint)
        assert (counts["worker_pid"], counts["recoveries"], device.counted) == (worker, 0, 0)


@pytest.mark.needs("loop", "nbd")
def test_a_disk_that_takes_seconds(tmp_path: Path) -> None:
    """Each read, then each write takes two seconds. RAM is served at once, writes continue from RAM, and nothing fails."""
    with slow_disk(tmp_path, 48 * MIB) as disk, device_on(disk.mounted / "backing", tmp_path / "mnt") as device:
        device.fill()
        cold = [page for page in range(PAGES) if page % 3 == 0][:2]
        warm = PAGES - 1  # a word stays in RAM
        order: list[str] = []

        def meanwhile(what: str, call: Callable[[], object]) -> None:
            def slowly() -> None:
                call()
                order.append(what)

            slow = threading.Thread(target=slowly)
            slow.start()
            try:
                for _ in range(200):
                    assert os.pread(device.fd, PAGE, warm * PAGE) == device.model[warm]
                    assert all_stats(device.mountpoint)["lost_pages"] == 0
                order.append("RAM")
            finally:
                slow.join(LIMIT_SECONDS)

        with disk.slow("rdelay=2"):
            meanwhile("read", lambda: [os.pread(device.fd, PAGE, page * PAGE) for page in cold])
        assert order == ["RAM", "read"]
        for page in cold:
            assert os.pread(device.fd, PAGE, page * PAGE) == device.model[page]
        with disk.slow("wdelay=2"):
            taken = 0
            (device.mountpoint / "control/writeback").write_text("20")
            while not stat_of(device.mountpoint, "pers_zombie_count"):
                assert device.put(PAGES + taken, 2) == 0
                taken += 1
            meanwhile("nothing", lambda: None)
            for page in range(PAGES + taken, PAGES + taken + 20):  # RAM has room: no write waits for the disk
                assert device.put(page, 2) == 0
            assert stat_of(device.mountpoint, "pers_zombie_count") > 0, "it has answered already"
        wait_until(lambda: stat_of(device.mountpoint, "pers_zombie_count") == 0, "the writeback")
        assert device.errors() == 0
        counts = all_stats(device.mountpoint)
        assert (counts["recoveries"], counts["writeback_failures"], device.counted) == (0, 0, 0)


# ---- a changed file --------------------------------------------------------------------------------------------------


def blocks_of(path: Path) -> int:
    """Return the number of blocks in the file, with the header."""
    return path.stat().st_size // PAGE


def flip_bits(path: Path, source: random.Random, before: bytes) -> None:
    """Flip one bit in each 512 bytes of every third block."""
    with path.open("r+b") as file:
        for block in range(1, blocks_of(path), 3):
            for sector in range(8):
                at = block * PAGE + sector * 512 + source.randrange(512)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << source.randrange(8)]))


def swap_blocks(path: Path, source: random.Random, before: bytes) -> None:
    """Swap every second block with its neighbour."""
    content = bytearray(path.read_bytes())
    for at in range(PAGE, len(content) - 2 * PAGE, 4 * PAGE):
        content[at : at + 2 * PAGE] = content[at + PAGE : at + 2 * PAGE] + content[at : at + PAGE]
    overwrite(path, bytes(content))


def tear(path: Path, source: random.Random, before: bytes) -> None:
    """Give some sectors of each block the content before the last writes."""
    content = bytearray(path.read_bytes())
    for block in range(1, len(before) // PAGE):
        first = source.randrange(8)
        start, end = block * PAGE + first * 512, block * PAGE + source.randrange(first, 9) * 512
        content[start:end] = before[start:end]
    overwrite(path, bytes(content))


def go_back(path: Path, source: random.Random, before: bytes) -> None:
    """Give all blocks the content before the last writes, as if the disk had acknowledged and lost them."""
    overwrite(path, before)


def zero(path: Path, source: random.Random, before: bytes) -> None:
    """Zero every second block."""
    content = bytearray(path.read_bytes())
    for at in range(PAGE, len(content) - PAGE, 2 * PAGE):
        content[at : at + PAGE] = bytes(PAGE)
    overwrite(path, bytes(content))


def overwrite(path: Path, content: bytes) -> None:
    """Overwrite bytes of the file."""
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize(("encrypt", "packing"), [("yes", PACKING), ("no", PACKING), ("no", "dense")])
def test_a_file_that_was_tampered_with(encrypt: str, packing: str, tmp_path: Path) -> None:
    """Changed pages are errors, others are right, each error is counted, and a new write heals the page."""
    backing = tmp_path / "backing"
    with device_on(backing, tmp_path / "mnt", "--encrypt", encrypt, "--packing", packing) as device:
        device.fill()
        version = 0
        for damage in (flip_bits, swap_blocks, tear, go_back, zero):
            before = backing.read_bytes()
            counted = device.counted
            device.fill(version + 1)
            damage(backing, random.Random(9), before)
            failed = device.errors()
            assert failed > 10, damage.__name__
            assert device.counted - counted == failed
            version += 2
            device.fill(version)
            assert device.errors() == 0


def test_a_file_that_is_deleted(tmp_path: Path) -> None:
    """The file is used as before, and `status` warns."""
    backing = tmp_path / "backing"
    with device_on(backing, tmp_path / "mnt") as device:
        device.fill()
        assert "deleted" not in device.warnings
        backing.unlink()
        wait_until(lambda: "has been deleted" in device.warnings, "a warning")
        device.fill(1)
        assert device.errors() == 0


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    """Pages behind the cut are errors, and others are right. Writes continue, also there, and heal."""
    backing = tmp_path / "backing"
    with device_on(backing, tmp_path / "mnt") as device:
        device.fill()
        wait_until(lambda: stat_of(device.mountpoint, "pers_zombie_count") == 0, "the writeback")
        os.truncate(backing, 100 * PAGE)
        wait_until(lambda: "has been truncated" in device.warnings, "a warning")
        failed = device.errors()
        assert 0 < failed < PAGES
        assert device.counted == failed
        for page in range(PAGES):
            assert device.put(page, 1) == 0
        assert device.errors() == 0
