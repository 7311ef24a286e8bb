# SPDX-License-Identifier: MIT
"""Bad disks under a real mount: a page is right or an error, never wrong; RAM goes on; and all is well when the disk is.

What takes long is done with one packing. With the other: ZBUDFS_TEST_PACKING=dense pytest tests/fuse/test_faulty_disk.py
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

from scripts.nbd import nbd_disk, slow_disk
from tests.fuse.calls import MIB, PAGE, aligned, all_stats, opened, stat_of
from tests.support import LIMIT_SECONDS, PACKING, mounted, status_of, wait_until, zbudfs

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 8 * MIB
POOL: Final = MIB
SIZES: Final = ("--size", str(SIZE), "--pool", str(POOL))
PAGES: Final = SIZE // PAGE // 2
"""Pages that are written first: twice as many bytes as the pool even if every two of them share a frame."""


def content(page: int, version: int = 0) -> bytes:
    """Return a page: noise, half noise, or a word, by its number."""
    source = random.Random(page << 16 | version)
    noise = (PAGE, 1500, 8)[page % 3]
    return source.randbytes(noise).ljust(PAGE, b"\0") if noise > 8 else source.randbytes(8) * (PAGE // 8)


class Device:
    """A swapfile, and what must be in it."""

    def __init__(self, mountpoint: Path, fd: int) -> None:
        self.mountpoint = mountpoint
        self.fd = fd
        self.model: dict[int, bytes] = {}

    def put(self, page: int, version: int = 0) -> int:
        """Write a page; 0, or the errno. One that was refused is the old one or the new one."""
        new = content(page, version)
        try:
            with aligned(new) as buffer:
                assert os.pwritev(self.fd, [buffer], page * PAGE) == PAGE
        except OSError as error:
            return error.errno or 0
        self.model[page] = new
        return 0

    def fill(self, version: int = 0) -> None:
        """Write many pages, and wait until what does not fit the pool is on the disk."""
        for page in range(PAGES):
            assert self.put(page, version) == 0
        wait_until(lambda: stat_of(self.mountpoint, "pers_zombie_count") == 0, "the writeback")
        assert stat_of(self.mountpoint, "written_back_pages") > PAGES // 4

    def errors(self) -> int:
        """Read every page: how many are errors. None may be wrong."""
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
        """Reads that were answered with an error, as the daemon counts them."""
        counts = all_stats(self.mountpoint)
        return int(counts["lost_pages"] + counts["pagein_failures"])

    @property
    def warnings(self) -> str:
        """What `zbudfs status` warns of."""
        return "\n".join(status_of(self.mountpoint)["warnings"])


@contextlib.contextmanager
def device_on(backing: Path, mountpoint: Path, *options: str) -> Iterator[Device]:
    """Have a mount with a small pool and this backing file. It may lie on FUSE, which makes the faults."""
    with (
        mounted(mountpoint, *SIZES, "--backing", backing, "--force-backing", "yes", *options) as where,
        opened(where / "swapfile") as fd,
    ):
        yield Device(where, fd)


# ---- a disk that gives errors ---------------------------------------------------------------------------------------


@pytest.mark.needs("loop", "nbd")
@pytest.mark.parametrize(("rate", "packing"), [("30%", PACKING), ("100%", PACKING), ("30%", "dense")])
def test_reads_that_fail(rate: str, packing: str, tmp_path: Path) -> None:
    """Pages whose block cannot be read are EIO, one by one, and are there again when the disk is; no other is touched."""
    with (
        nbd_disk(tmp_path, 48 * MIB, error_rate=rate) as disk,
        device_on(disk.mounted / "backing", tmp_path / "mnt", "--packing", packing) as device,
    ):
        device.fill()
        with disk.failing("pread"):
            failed = device.errors()
            assert 0 < failed < PAGES
            assert device.counted == failed
            assert "reads that the backing file refused" in zbudfs("status", device.mountpoint)
            for page in range(0, PAGES, 7):  # writing needs no reading
                assert device.put(page, 1) == 0
        assert device.errors() == 0
        assert device.counted >= failed


@pytest.mark.needs("loop", "nbd")
def test_writes_that_fail(tmp_path: Path) -> None:
    """Writes go on from RAM as long as there is room, then they are refused; what was taken is right all the time."""
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
        device.model.pop(0)  # it may be either
        assert device.errors() == 0
        assert device.counted == 0


@pytest.mark.needs("loop", "nbd")
def test_a_disk_that_answers_nothing_for_seconds(tmp_path: Path) -> None:
    """Writes and page-ins wait for it, what is in RAM is served, `status` says so, nobody is killed, nothing is lost."""
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
    """Each read, then each write takes two seconds: RAM is served at once meanwhile, writes go on from RAM, nothing fails."""
    with slow_disk(tmp_path, 48 * MIB) as disk, device_on(disk.mounted / "backing", tmp_path / "mnt") as device:
        device.fill()
        cold = [page for page in range(PAGES) if page % 3 == 0][:2]
        warm = PAGES - 1  # a word: in RAM for ever
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
            for page in range(PAGES + taken, PAGES + taken + 20):  # there is room in RAM, and nobody waits for the disk
                assert device.put(page, 2) == 0
            assert stat_of(device.mountpoint, "pers_zombie_count") > 0, "it has answered already"
        wait_until(lambda: stat_of(device.mountpoint, "pers_zombie_count") == 0, "the writeback")
        assert device.errors() == 0
        counts = all_stats(device.mountpoint)
        assert (counts["recoveries"], counts["writeback_failures"], device.counted) == (0, 0, 0)


# ---- a file that somebody has been at -------------------------------------------------------------------------------


def blocks_of(path: Path) -> int:
    """How many blocks the file has, the header included."""
    return path.stat().st_size // PAGE


def flip_bits(path: Path, source: random.Random, before: bytes) -> None:
    """One bit in every 512 bytes of each third block."""
    with path.open("r+b") as file:
        for block in range(1, blocks_of(path), 3):
            for sector in range(8):
                at = block * PAGE + sector * 512 + source.randrange(512)
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << source.randrange(8)]))


def swap_blocks(path: Path, source: random.Random, before: bytes) -> None:
    """Each second block and its neighbour."""
    content = bytearray(path.read_bytes())
    for at in range(PAGE, len(content) - 2 * PAGE, 4 * PAGE):
        content[at : at + 2 * PAGE] = content[at + PAGE : at + 2 * PAGE] + content[at : at + PAGE]
    overwrite(path, bytes(content))


def tear(path: Path, source: random.Random, before: bytes) -> None:
    """Some sectors of each block are as they were before the last writes."""
    content = bytearray(path.read_bytes())
    for block in range(1, len(before) // PAGE):
        first = source.randrange(8)
        start, end = block * PAGE + first * 512, block * PAGE + source.randrange(first, 9) * 512
        content[start:end] = before[start:end]
    overwrite(path, bytes(content))


def go_back(path: Path, source: random.Random, before: bytes) -> None:
    """All blocks are as they were before the last writes: the disk has acknowledged those, and lost them."""
    overwrite(path, before)


def zero(path: Path, source: random.Random, before: bytes) -> None:
    """Each second block is zeros."""
    content = bytearray(path.read_bytes())
    for at in range(PAGE, len(content) - PAGE, 2 * PAGE):
        content[at : at + PAGE] = bytes(PAGE)
    overwrite(path, bytes(content))


def overwrite(path: Path, content: bytes) -> None:
    """Put bytes in the place of those that are there."""
    with path.open("r+b") as file:
        file.write(content)


@pytest.mark.parametrize(("encrypt", "packing"), [("yes", PACKING), ("no", PACKING), ("no", "dense")])
def test_a_file_that_was_tampered_with(encrypt: str, packing: str, tmp_path: Path) -> None:
    """What was changed is an error, what was not is right; each error is counted; a new write heals the page."""
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
    """It is used on as if it were there, and somebody is told."""
    backing = tmp_path / "backing"
    with device_on(backing, tmp_path / "mnt") as device:
        device.fill()
        assert "deleted" not in device.warnings
        backing.unlink()
        wait_until(lambda: "has been deleted" in device.warnings, "a warning")
        device.fill(1)
        assert device.errors() == 0


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    """What was behind the cut is an error, the rest is right; writing goes on, there as well, and heals."""
    backing = tmp_path / "backing"
    with device_on(backing, tmp_path / "mnt") as device:
        device.fill()
        wait_until(lambda: stat_of(device.mountpoint, "pers_zombie_count") == 0, "the writeback")
        os.truncate(backing, 100 * PAGE)
        wait_until(lambda: "has been cut short" in device.warnings, "a warning")
        failed = device.errors()
        assert 0 < failed < PAGES
        assert device.counted == failed
        for page in range(PAGES):
            assert device.put(page, 1) == 0
        assert device.errors() == 0
