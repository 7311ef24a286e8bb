# SPDX-License-Identifier: MIT
"""A block device as the backing of a real mount: filled, read back, taken over, discarded, full, and removed."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from pathlib import Path
from typing import Final

import pytest

from kit.nbd import nbd_disk
from tests.fuse.calls import MIB, PAGE, PUNCH, all_stats, fallocate, looped, opened, stat_of, tool
from tests.fuse.test_full import CHUNK, assert_still_there, fill, refusal
from tests.support import LIMIT_SECONDS, PACKING, mounted, run_zbudfs, status_of, wait_until

pytestmark = pytest.mark.needs("root", "fuse", "loop")

SIZE: Final = 64 * MIB
POOL: Final = 4 * MIB


def image_of(folder: Path, size: int) -> Path:
    """Make the image of a disk."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size)
    return image


def discarded_sectors(device: Path) -> int:
    """Return the number of discarded sectors of a device, of 512 bytes each."""
    return int(Path(f"/sys/block/{device.name}/stat").read_text().split()[13])


@pytest.mark.parametrize(("sector", "packing"), [(512, PACKING), (4096, "dense")])
def test_pages_through_a_takeover(tmp_path: Path, sector: int, packing: str) -> None:
    """Two programs write and read while three workers are killed: each byte is right, and freed room is discarded."""
    image = image_of(tmp_path, 80 * MIB + 3 * 4096)
    options = ("--size", str(SIZE), "--pool", str(POOL), "--packing", packing, "--backing")
    with looped(image, sector_bytes=sector) as device:
        with mounted(tmp_path / "mnt", *options, device) as mountpoint, opened(mountpoint / "swapfile") as fd:
            wrong: list[int] = []
            written = [threading.Event(), threading.Event()]

            def storm(half: int) -> None:
                source = random.Random(half)
                model: dict[int, bytes] = {}
                for step in range(700):
                    at = (source.randrange(SIZE // CHUNK // 2) * 2 + half) * CHUNK
                    if step % 3 or at not in model:
                        model[at] = source.randbytes(CHUNK // 2) + bytes([step & 0xFF]) * (CHUNK // 2)
                        os.pwrite(fd, model[at], at)
                    elif os.pread(fd, CHUNK, at) != model[at]:
                        wrong.append(at)
                    if step == 150:
                        written[half].set()
                wrong.extend(at for at, data in model.items() if os.pread(fd, CHUNK, at) != data)

            threads = [threading.Thread(target=storm, args=(half,)) for half in (0, 1)]
            for thread in threads:
                thread.start()
            for event in written:
                assert event.wait(LIMIT_SECONDS)
            for recoveries in (1, 2, 3):
                wait_until(lambda: bool(all_stats(mountpoint)["standby_ready"]), "a standby")
                os.kill(stat_of(mountpoint, "worker_pid"), signal.SIGKILL)
                wait_until(lambda n=recoveries: stat_of(mountpoint, "recoveries") == n, "the takeover")  # type: ignore[misc]
            for thread in threads:
                thread.join(LIMIT_SECONDS)
            assert wrong == []
            counts = all_stats(mountpoint)
            assert (counts["lost_pages"], counts["pagein_failures"], counts["writeback_failures"]) == (0, 0, 0)
            assert counts["written_back_pages"] > POOL // PAGE
            assert counts["cumul_grown_bytes"] == 0
            assert counts["backing_size_bytes"] == SIZE
            assert (counts["backing_path"], counts["encrypted"]) == (str(device), True)
            before, used = discarded_sectors(device), image.stat().st_blocks
            fallocate(fd, PUNCH, 0, SIZE)
            wait_until(lambda: discarded_sectors(device) > before, "a discard, when things are calm")
            wait_until(lambda: image.stat().st_blocks < used // 2, "the room to be given back")
        assert not any(image.read_bytes())


def test_a_device_that_is_too_small_for_the_size(tmp_path: Path) -> None:
    """Writes to a full device are refused, no page is lost, `status` says so, and freed room is used again."""
    source = random.Random(1)
    options = ("--size", str(SIZE), "--pool", str(POOL), "--backing")
    with (
        looped(image_of(tmp_path, 16 * MIB)) as device,
        mounted(tmp_path / "mnt", *options, device) as mountpoint,
        opened(mountpoint / "swapfile") as fd,
    ):
        assert stat_of(mountpoint, "backing_size_bytes") == 11 * MIB
        taken = fill(fd, source)
        assert 14 * MIB <= len(taken) * CHUNK <= 15 * MIB
        counts = all_stats(mountpoint)
        assert (counts["backing_full"], counts["backing_used_bytes"]) == (1, 11 * MIB - PAGE)
        assert any(f"the backing device {device} is full" in text for text in status_of(mountpoint)["warnings"])
        assert_still_there(fd, taken)
        fallocate(fd, PUNCH, 0, 4 * MIB)
        taken[: 4 * MIB // CHUNK] = [bytes(CHUNK)] * (4 * MIB // CHUNK)
        assert [refusal(fd, source.randbytes(CHUNK), SIZE - MIB + at * CHUNK) for at in range(8)] == [0] * 8
        assert_still_there(fd, taken)
        wait_until(lambda: stat_of(mountpoint, "backing_full") == 0, "free blocks to be noticed")
        log = (mountpoint / "stats/log").read_text()
        assert (log.count("is full: all of its 11 MiB"), log.count("has free blocks again")) == (1, 1)


def test_a_preallocated_file(tmp_path: Path) -> None:
    """The file holds as much as its size, and afterwards has the same size and no content."""
    source = random.Random(2)
    backing = tmp_path / "backing"
    tool("fallocate", "--length", str(8 * MIB), backing)
    with (
        mounted(tmp_path / "mnt", "--size", str(SIZE), "--pool", str(POOL), "--backing", backing) as mountpoint,
        opened(mountpoint / "swapfile") as fd,
    ):
        taken = fill(fd, source)
        assert 11 * MIB <= len(taken) * CHUNK <= 12 * MIB
        os.kill(stat_of(mountpoint, "worker_pid"), signal.SIGKILL)
        assert_still_there(fd, taken)
    assert (backing.stat().st_size, backing.stat().st_blocks * 512 >= 8 * MIB) == (8 * MIB, True)
    assert not any(backing.read_bytes())


@pytest.mark.needs("nbd")
def test_a_device_that_is_removed(tmp_path: Path) -> None:
    """Each request to the removed device fails. Pages in RAM are served, others are EIO, none is wrong, and unmount works."""
    source = random.Random(3)
    with nbd_disk(tmp_path, 48 * MIB) as disk:
        device = tool("findmnt", "--noheadings", "--output", "SOURCE", disk.mounted).strip()
        tool("umount", disk.mounted)
        (tmp_path / "mnt").mkdir()
        tool("wipefs", "--all", "--quiet", device)
        tool("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=48", "oflag=direct", "status=none")
        options = ("--size", "32M", "--pool", str(POOL), "--backing", device)
        run = run_zbudfs("mount", *options, tmp_path / "mnt")
        assert "it lies on fuse" in run.stderr
        with (
            mounted(tmp_path / "mnt", *options, "--force-backing", "yes") as mountpoint,
            opened(mountpoint / "swapfile") as fd,
        ):
            chunks = [source.randbytes(CHUNK) for _ in range(12 * MIB // CHUNK)]
            for number, data in enumerate(chunks):
                os.pwrite(fd, data, number * CHUNK)
            with disk.failing("pread", "pwrite"):
                read = errors = 0
                for number, data in enumerate(chunks):
                    try:
                        got = os.pread(fd, CHUNK, number * CHUNK)
                    except OSError:
                        errors += 1
                    else:
                        assert got == data[: len(got)]  # the bytes before a lost page
                        read += 1
                assert read > 0
                assert errors > 0
                codes = [refusal(fd, source.randbytes(CHUNK), 16 * MIB + at * CHUNK) for at in range(64)]
                assert set(codes) <= {0, errno.ENOSPC}
                assert errno.ENOSPC in codes
                assert f"the backing device {device} cannot be written" in "\n".join(status_of(mountpoint)["warnings"])
        tool("mkfs.ext4", "-q", "-F", device)  # and so it was for the process that unmounts
        tool("mount", device, disk.mounted)
