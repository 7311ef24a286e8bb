# SPDX-License-Identifier: MIT
"""Root sees names and modes, sizes, and statistics of one moment."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fuse.calls import (
    MIB,
    PAGE,
    PUNCH,
    all_stats,
    disk_mounted,
    fallocate,
    frozen,
    looped,
    opened,
    stat_of,
    tool,
)
from tests.support import LIMIT_SECONDS, mounted, wait_until
from zbudfs.core.latency import BUCKETS, Timed
from zbudfs.core.tunables import NAMES

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 12 * MIB + 5 * PAGE
"""A size in whole pages that is no power of two."""
NOBODY: Final = 65534
LISTS: Final = {
    "unbuddied_lists": 64,
    "chunk_histogram": 64,
    **{f"{kind.name.lower()}_latency_us": BUCKETS for kind in Timed},
}
"""Files with several numbers, and how many."""
TEXTS: Final = ("mountpoint", "packing", "page_in_path", "version", "backing_path", "pool_directory")
LINES: Final = ("warnings", "log")
_DIRENT: Final = struct.Struct("<QqHB")


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    """Return a small mount without a disk."""
    with mounted(tmp_path / "mnt", "--size", str(SIZE), "--pool", "8M") as mountpoint:
        yield mountpoint


def names_in_steps(folder: Path, step_bytes: int) -> list[tuple[str, int, int]]:
    """List a directory with a buffer so small that it takes many calls. Yield (name, offset behind it, type)."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(step_bytes)
    found = []
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
        while (got := libc.getdents64(fd, buffer, ctypes.c_size_t(step_bytes))) > 0:
            at = 0
            while at < got:
                _, offset, length, kind = _DIRENT.unpack_from(buffer, at)
                name = buffer.raw[at + _DIRENT.size : at + length].split(b"\0")[0]
                found.append((name.decode(), offset, kind))
                at += length
        assert got == 0, os.strerror(ctypes.get_errno())
    return found


def test_names_and_modes(mnt: Path) -> None:
    """The root has a swapfile of mode 0600, a readable stats/ and a writable control/. All belong to root."""
    seen = {entry.name: entry for entry in os.scandir(mnt)}
    assert set(seen) == {"swapfile", "stats", "control"}
    assert stat.filemode((mnt / "control").stat().st_mode) == "drwx------"
    for path in (mnt / "control").iterdir():
        assert stat.filemode(path.lstat().st_mode) == "-rw-------", path
    assert stat.filemode(mnt.stat().st_mode) == "dr-xr-xr-x"
    assert stat.filemode((mnt / "stats").stat().st_mode) == "dr-xr-xr-x"
    assert stat.filemode((mnt / "swapfile").stat().st_mode) == "-rw-------"
    for path in (mnt / "stats").iterdir():
        assert stat.filemode(path.lstat().st_mode) == "-r--r--r--", path
    for path in (mnt, *mnt.rglob("*")):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (0, 0), path
        assert status.st_nlink == {mnt: 4, mnt / "stats": 2, mnt / "control": 2}.get(path, 1), path


def test_sizes(mnt: Path) -> None:
    """The swapfile has the configured size and no holes, for each way to ask, before and after use."""
    for _ in range(2):
        status = (mnt / "swapfile").stat()
        assert (status.st_size, status.st_blocks * 512, status.st_blksize) == (SIZE, SIZE, PAGE)
        with opened(mnt / "swapfile") as fd:
            assert os.fstat(fd).st_size == SIZE
            assert os.lseek(fd, 0, os.SEEK_END) == SIZE
            assert os.lseek(fd, 0, os.SEEK_HOLE) == SIZE
            assert stat_of(mnt, "size_bytes") == SIZE
            os.pwrite(fd, b"x" * MIB, 100)
            fallocate(fd, PUNCH, 0, SIZE)


def test_statfs(mnt: Path) -> None:
    """A mount reports no blocks and no inodes, like a pseudo filesystem, so no tool takes it for a full disk."""
    answer = os.statvfs(mnt)
    assert (answer.f_bsize, answer.f_frsize) == (PAGE, PAGE)
    assert (answer.f_blocks, answer.f_bfree, answer.f_bavail) == (0, 0, 0)
    assert (answer.f_files, answer.f_ffree, answer.f_favail) == (0, 0, 0)
    assert answer.f_namemax == 255
    assert answer.f_flag & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC


def test_df_leaves_it_out(mnt: Path) -> None:
    """`df` leaves the mount out, for blocks and inodes, for root and for another user. `df -a` lists it.

    The mount namespace has no other mounts of the kind, since they may not answer.
    """
    script = (
        'findmnt -rno TARGET -t fuse.zbudfs | grep -vxF "$1" | while read -r other; do umount -l "$other"; done;'
        " for user in 0 $2; do for option in '' -i -a; do"
        ' echo "$user $option: $(setpriv --reuid $user --regid $user --clear-groups df $option -t fuse.zbudfs 2>/dev/null'
        ' | grep -cF "$1")"; done; done'
    )
    out = tool("unshare", "--mount", "sh", "-c", script, "sh", mnt, str(NOBODY))
    assert out.splitlines() == ["0 : 0", "0 -i: 0", "0 -a: 1", "65534 : 0", "65534 -i: 0", "65534 -a: 1"]


@pytest.mark.parametrize("step_bytes", [64, 300, 1 << 16])
def test_directories_are_listed_completely(step_bytes: int, mnt: Path) -> None:
    """Each name is listed once, in any number of steps, with the type and inode number of stat."""
    for folder, wanted in (
        (mnt, {"swapfile", "stats", "control"}),
        (mnt / "stats", {*all_stats(mnt), "all.json", "log"}),
        (mnt / "control", set(NAMES)),
    ):
        found = [entry for entry in names_in_steps(folder, step_bytes) if entry[0] not in (".", "..")]
        assert sorted(name for name, _, _ in found) == sorted(wanted)
        for name, _, kind in found:
            assert kind == stat.S_IFMT((folder / name).stat().st_mode) >> 12, name
        for entry in os.scandir(folder):
            assert entry.inode() == entry.stat().st_ino, entry.name


def test_listing_goes_on_where_it_was_left(mnt: Path) -> None:
    """A directory can be read on from each of its offsets, which gives just the names behind it."""
    listed = names_in_steps(mnt / "stats", 1 << 16)
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(1 << 16)
    with opened(mnt / "stats", os.O_RDONLY | os.O_DIRECTORY) as fd:
        for number, (_, offset, _) in enumerate(listed[:-1]):
            os.lseek(fd, offset, os.SEEK_SET)
            assert libc.getdents64(fd, buffer, ctypes.c_size_t(len(buffer))) > 0
            length = _DIRENT.unpack_from(buffer, 0)[2]
            assert buffer.raw[_DIRENT.size : length].split(b"\0")[0].decode() == listed[number + 1][0]


def test_inode_numbers_are_fixed(tmp_path: Path) -> None:
    """Another mount with other settings has the same numbers, and none of them twice."""
    numbers: list[dict[str, int]] = []
    for options in (("--size", "1M", "--pool", "1M"), ("--size", "8M", "--backing", tmp_path / "backing")):
        with mounted(tmp_path / "mnt", *options) as mountpoint:
            found = [mountpoint, *mountpoint.rglob("*")]
            numbers.append({str(path): path.stat().st_ino for path in found})
            assert len({path.stat().st_dev for path in found}) == 1
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0].values())) == len(numbers[0])
    assert numbers[0][str(tmp_path / "mnt")] == 1


def test_each_file_holds_one_value(mnt: Path) -> None:
    """Each file has a number, yes or no, a list, a line of text, or lines, and ends with a newline, like all.json."""
    before = all_stats(mnt)
    single = {name: (mnt / "stats" / name).read_text() for name in before}
    after = all_stats(mnt)
    for name, text in single.items():
        assert text.endswith("\n") or name in LINES, name
        value: Any = text.removesuffix("\n")
        if name in LISTS:
            value = [int(number) for number in value.split(" ")]
            assert len(value) == LISTS[name]
        elif name in LINES:
            value = text.splitlines()
        elif name not in TEXTS:
            value = json.loads(value.lower())
            assert isinstance(value, int), name
        elif name == "backing_path":
            value = value or None
        # A number may have changed meanwhile, since some count the daemon's own work.
        moving = isinstance(value, int) and min(before[name], after[name]) <= value <= max(before[name], after[name])
        assert moving or value in (before[name], after[name]), name
        assert type(value) is type(before[name]), name
    assert "info: zbudfs" in (mnt / "stats/log").read_text()
    assert before["mountpoint"] == str(mnt)


def test_numbers_count_what_was_done(mnt: Path) -> None:
    """Pages of each form that are written, read and discarded are counted by their form."""
    same, text, noise = 10, 24, 5
    with opened(mnt / "swapfile") as fd:
        empty = all_stats(mnt)
        os.pwrite(fd, bytes(range(8)) * (PAGE // 8 * same), 0)
        os.pwrite(fd, b"".join((b"page %03d of some\n" % number * PAGE)[:PAGE] for number in range(text)), MIB)
        os.pwrite(fd, os.urandom(noise * PAGE), 2 * MIB)
        full = all_stats(mnt)
        os.pread(fd, 16 * PAGE, MIB)
        read = all_stats(mnt)
        fallocate(fd, PUNCH, MIB, 4 * PAGE)
        fallocate(fd, PUNCH, 3 * MIB, MIB)
        punched = all_stats(mnt)
    zeros = ("stored_pages", "pool_used_bytes", "compressed_bytes", "cumul_written_pages", "cumul_read_pages")
    assert {name: empty[name] for name in zeros} == dict.fromkeys(zeros, 0)
    assert (full["stored_pages"], full["same_filled_pages"], full["raw_pages"]) == (same + text + noise, same, noise)
    assert full["cumul_written_pages"] == same + text + noise
    assert full["pers_zpages"] == sum(full["chunk_histogram"]) == text
    assert full["pool_used_bytes"] == (text // 2 + noise) * PAGE
    assert read["cumul_read_pages"] == 16
    assert punched["cumul_discarded_pages"] == 4
    assert punched["stored_pages"] == full["stored_pages"] - 4
    assert punched["written_back_pages"] == punched["refused_pool_full"] == punched["lost_pages"] == 0


def test_an_open_file_is_of_one_moment(mnt: Path) -> None:
    """The content of an open file does not change, byte by byte or from the start. A new open has newer content."""
    with opened(mnt / "swapfile") as fd, opened(mnt / "stats/stored_pages", os.O_RDONLY) as old:
        os.pwrite(fd, b"x" * 20 * PAGE, 0)
        with opened(mnt / "stats/all.json", os.O_RDONLY) as moment:
            fallocate(fd, PUNCH, 0, SIZE)
            text = b"".join(iter(lambda: os.read(moment, 1), b""))
            assert os.pread(moment, 1 << 20, 0) == text
            assert os.pread(moment, 10, len(text)) == os.pread(moment, 10, 1 << 40) == b""
        assert json.loads(text)["stored_pages"] == 20
        assert os.pread(old, 100, 0) == b"0\n"
        assert os.pread(old, 1, 1) == b"\n"
        assert stat_of(mnt, "stored_pages") == 0


def test_a_moment_is_one_while_all_is_moving(tmp_path: Path) -> None:
    """The numbers of each all.json agree with each other, while pages come, go to the disk and vanish."""
    code = (
        "import os, random, sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.fuse.calls import PUNCH, fallocate\n"
        "from tests.fuse.exercise import content\n"
        "fd, source = os.open(sys.argv[1], os.O_RDWR), random.Random(4)\n"
        "for _ in range(600):\n"
        "    at = source.randrange(2500) * 4096\n"
        "    if source.randrange(4): os.pwrite(fd, content(source, 40 * 4096), at)\n"
        "    else: fallocate(fd, PUNCH, at, 80 * 4096)\n"
    )
    options = ("--size", str(SIZE), "--pool", "1M", "--backing", tmp_path / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint:
        command = [sys.executable, "-c", code, str(mountpoint / "swapfile"), os.fspath(Path(__file__).parents[2])]
        with subprocess.Popen(command) as writer:
            try:
                moments = [all_stats(mountpoint)]
                while writer.poll() is None:
                    moments.append(all_stats(mountpoint))
            finally:
                writer.kill()
        assert writer.returncode == 0
    assert moments[-1]["cumul_writeback_pages"] > 0
    for before, now in itertools.pairwise(moments):
        in_pool = now["pers_zpages"] + now["eph_zpages"]
        assert sum(now["chunk_histogram"]) == in_pool
        kept = now["pers_raw_count"] + now["eph_raw_count"]
        stored = now["same_filled_pages"] + now["written_back_pages"] + in_pool + kept
        # A same-filled page whose word needs a zpage counts as both.
        assert 0 <= stored - now["stored_pages"] <= now["same_filled_pages"]
        assert now["pool_used_bytes"] <= now["pool_configured_bytes"]
        for name in now:
            if name.startswith("cumul_"):
                assert now[name] >= before[name], name


def test_open_swapfiles_are_counted(mnt: Path) -> None:
    """Each open of the swapfile counts until its last descriptor is closed."""
    assert stat_of(mnt, "open_swapfiles") == 0
    with opened(mnt / "swapfile") as fd, opened(mnt / "swapfile", os.O_RDONLY):
        with os.fdopen(os.dup(fd), "rb", buffering=0):
            assert stat_of(mnt, "open_swapfiles") == 2
        assert stat_of(mnt, "open_swapfiles") == 2
    wait_until(lambda: stat_of(mnt, "open_swapfiles") == 0, "the kernel to tell that the files are closed")


def test_times_of_what_had_to_wait(mnt: Path) -> None:
    """A discard, a sync and a write that patches a page are answered later, and each is in its histogram once."""
    with opened(mnt / "swapfile") as fd:
        before = all_stats(mnt)
        os.pwrite(fd, b"part of a page", 100)
        os.pread(fd, 10, 100)
        fallocate(fd, PUNCH, 0, MIB)
        os.fsync(fd)
        after = all_stats(mnt)
    for kind in ("read", "write", "discard", "sync"):
        name = f"{kind}_latency"
        assert sum(after[f"{name}_us"]) - sum(before[f"{name}_us"]) == 1, kind
        assert after[f"{name}_sum_us"] > before[f"{name}_sum_us"], kind
        assert after[f"{name}_max_us"] <= after[f"{name}_sum_us"], kind
    assert after["requests_in_work"] == 0 < after["requests_in_work_max"]
    assert after["served_requests"] - before["served_requests"] == 4


@pytest.mark.needs("loop")
def test_a_request_in_work_is_seen(tmp_path: Path) -> None:
    """A read that waits for a frozen disk is in work, and its time is the whole wait."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    with looped(image) as device:
        tool("mkfs.ext4", "-q", device)
        with (
            disk_mounted(device, folder),
            mounted(tmp_path / "mnt", "--backing", folder / "backing") as mountpoint,
            opened(mountpoint / "swapfile") as fd,
        ):
            os.pwrite(fd, os.urandom(MIB), 0)
            with frozen(folder):
                (mountpoint / "control/writeback").write_text("all")
                wait_until(lambda: stat_of(mountpoint, "pers_zombie_count") > 0, "frames on their way")
                syncing = threading.Thread(target=os.fsync, args=(fd,))
                syncing.start()
                wait_until(lambda: stat_of(mountpoint, "requests_in_work") == 1, "a request that waits")
                time.sleep(0.1)
            syncing.join(LIMIT_SECONDS)
            assert stat_of(mountpoint, "requests_in_work") == 0
            assert stat_of(mountpoint, "sync_latency_max_us") >= 100_000
