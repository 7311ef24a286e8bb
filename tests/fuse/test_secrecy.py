# SPDX-License-Identifier: MIT
"""The tests plant secrets, and search for them on the disk, in the pool directory, the logs and a dump of the memory."""

from __future__ import annotations

import mmap
import os
import random
import stat
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import MIB, PAGE, aligned, all_stats, opened, read_everything, require_tools
from tests.store.disks import small_ext4
from tests.support import mounted, status_of, wait_until, zbudfs
from zbudfs.store.cipher import KEY_BYTES

pytestmark = pytest.mark.needs("root", "fuse", "loop")

SIZE: Final = 8 * MIB
NEEDLE_BYTES: Final = 24
NEEDLES: Final = 30
"""Number of pages that are searched for. Each would be found, but a search takes time."""


def secrets() -> list[bytes]:
    """Return pages of noise (stored as it is), of a little noise (which zstd keeps as literals), and of text."""
    source = random.Random(4)
    found = []
    for number in range(SIZE // PAGE):
        kind = number % 3
        if kind == 0:
            found.append(source.randbytes(PAGE))
        elif kind == 1:
            found.append(source.randbytes(1200).ljust(PAGE, b"\0"))
        else:
            found.append((b"password=%s;" % source.randbytes(200).hex().encode()).ljust(PAGE, b"\0"))
    return found


def seen(pages: list[bytes], haystack: bytes) -> int:
    """Return how many of some pages show: each has a stretch that is nowhere else."""
    # Two of three kinds of page have noise that is there byte for byte, if at all.
    some = pages[: NEEDLES * 40 : 40]
    return sum(page[40 : 40 + NEEDLE_BYTES] in haystack for page in some)


@pytest.mark.parametrize("encrypt", ["yes", "no"])
def test_the_disk_shows_no_page(encrypt: str, tmp_path: Path) -> None:
    """The image of the disk shows no page, during and after. Without encryption it does, so the search works."""
    require_tools("mkfs.ext4", "losetup")
    pages = secrets()
    with small_ext4(tmp_path, 32 * MIB) as disk:
        options = ("--size", str(SIZE), "--pool", "1M", "--backing", disk / "backing", "--encrypt", encrypt)
        with mounted(tmp_path / "mnt", *options) as mountpoint:
            folder = Path(all_stats(mountpoint)["pool_directory"])
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert status_of(mountpoint)["encrypted"] == (encrypt == "yes")
            page = " ".join(zbudfs("status", mountpoint).split())
            assert (", encrypted" in page) == (encrypt == "yes")
            with opened(mountpoint / "swapfile") as fd, opened(folder / "board", os.O_RDONLY) as area:
                for at in range(0, len(pages), 16):
                    buffer = aligned(b"".join(pages[at : at + 16]))
                    assert os.pwritev(fd, [buffer], at * PAGE) == 16 * PAGE
                wait_until(lambda: all_stats(mountpoint)["pool_used_bytes"] <= MIB, "the pool to be written back")
                os.fsync(fd)
                shown = seen(pages, (disk / "backing").read_bytes())
                assert shown == 0 if encrypt == "yes" else shown > NEEDLES // 3
                assert read_everything(fd, SIZE) == b"".join(pages)
                said = b"".join((mountpoint / "stats" / name).read_bytes() for name in ("log", "all.json"))
                assert seen(pages, said) == 0
                key = os.pread(area, KEY_BYTES, 3 << 10)
                assert any(key) == (encrypt == "yes")
                if any(key):
                    assert key not in (tmp_path / "image").read_bytes()
                    assert key.hex().encode() not in said
                area = os.dup(area)
        assert not folder.exists()
        assert os.pread(area, KEY_BYTES, 3 << 10) == bytes(KEY_BYTES), "the key outlived the mount"
        os.close(area)
        os.sync()
        shown = seen(pages, (tmp_path / "image").read_bytes())
        assert shown == 0 if encrypt == "yes" else shown > 0


def test_no_core_dump(tmp_path: Path) -> None:
    """The processes cannot be dumped, and the memory with pages in it is excluded from a dump as well."""
    with mounted(tmp_path / "mnt", "--backing", tmp_path / "backing") as mountpoint:
        counts = all_stats(mountpoint)
        wait_until(lambda: all_stats(mountpoint)["standby_ready"] is True, "the standby")
        counts = all_stats(mountpoint)
        for name in ("keeper_pid", "worker_pid", "standby_pid"):
            pid = counts[name]
            # The files of a process without dumps always belong to root, so the flags of its memory are checked.
            text = Path(f"/proc/{pid}/smaps").read_text()
            arenas = 0
            inside = False
            for line in text.splitlines():
                words = line.split()
                if not words[0].endswith(":"):
                    inside = len(words) > 5 and words[5].rpartition("/")[2] in (
                        "pages",
                        "frames",
                        "requestslots",
                        "board",
                    )
                    arenas += inside
                elif inside and words[0] == "VmFlags:":
                    assert "dd" in words[1:], f"{name}: may be dumped"
            assert arenas >= 4
    assert mmap.PAGESIZE == PAGE
