# SPDX-License-Identifier: MIT
"""The owner, the users and the content of a backing: it is refused and unchanged, or ours alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kit.programs import run_tool
from tests.core.samples import BIG, pages
from tests.store.disks import looped, ramfs, small_ext4
from tests.store.test_backing import opened, read, write
from zbudfs.core.block_map import SEGMENT_BLOCKS
from zbudfs.core.errors import BackingError, BackingFull, LayoutError
from zbudfs.core.units import PAGE_SIZE
from zbudfs.store import claim as claiming
from zbudfs.store import foreign, space
from zbudfs.store.backing import MAGIC, SEGMENT_BYTES, Backing
from zbudfs.store.claim import empty_left
from zbudfs.store.space import DEVICE_END, DEVICE_START

MIB: Final = 1 << 20
NOBODY: Final = 65534
as_root: Final = pytest.mark.needs("root")
on_loop: Final = pytest.mark.needs("root", "loop")


def fallocated(path: Path, size: int = 8 * MIB) -> Path:
    """Make a file with room and without content."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


def refused(path: Path, words: str, error: type[Exception] = BackingError) -> None:
    """The path is refused twice with these words, nothing stays locked or open, and nothing changes."""
    before = path.lstat() if path.exists() else None
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2):
        with pytest.raises(error, match=words):
            Backing(str(path))
    after = path.lstat() if path.exists() else None
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert (after.st_ino, after.st_size, after.st_mode) == (before.st_ino, before.st_size, before.st_mode)
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


# ---- the owner ---------------------------------------------------------------------------------------------------------


@as_root
def test_a_file_that_another_user_owns(tmp_path: Path) -> None:
    """Its owner could read and change stored pages. It is refused, and with `force` it becomes ours."""
    path = tmp_path / "backing"
    path.touch()
    os.chown(path, NOBODY, NOBODY)
    refused(path, f"belongs to user {NOBODY}.*--force-backing")
    with contextlib.closing(Backing(str(path), force=True)):
        assert path.stat().st_uid == 0


def test_a_file_with_two_names(tmp_path: Path) -> None:
    """The other name may belong to another user."""
    path = tmp_path / "backing"
    path.touch()
    os.link(path, tmp_path / "other")
    refused(path, "2 names")


@as_root
@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    ("owner", "mode", "words"), [(NOBODY, 0o755, "belongs to user"), (0, 0o777, "other users may write")]
)
def test_a_folder_of_others(tmp_path: Path, owner: int, mode: int, words: str, above: bool) -> None:
    """A user who may rename files there, or in a folder above, could replace the file. Nothing is created."""
    folder = tmp_path / "folder"
    inner = folder / "inner" if above else folder
    inner.mkdir(parents=True)
    os.chown(folder, owner, 1000)
    folder.chmod(mode)
    refused(inner / "backing", f"{words}.*put another file in its place")
    assert list(inner.iterdir()) == []
    folder.chmod(0o775 if owner == 0 else mode)
    refused(inner / "backing", words)
    with contextlib.closing(Backing(str(inner / "backing"), force=True)):
        pass


def test_a_sticky_folder(tmp_path: Path) -> None:
    """In a sticky folder only the owner of a file may rename it."""
    tmp_path.chmod(0o1777)
    with opened(Backing, tmp_path / "backing"):
        pass


def test_a_file_that_was_open_before(tmp_path: Path) -> None:
    """A process with the old file open does not have the new one, which gets the name."""
    path = tmp_path / "backing"
    path.write_bytes(MAGIC)
    path.chmod(0o666)
    with path.open("r+b") as stranger, opened(Backing, path) as backing:
        backing.make_ready(0, 1)
        write(backing, 1, pages(4, BIG))
        assert os.fstat(stranger.fileno()).st_nlink == 0
        stranger.seek(0)
        stranger.write(b"x" * SEGMENT_BYTES)
        stranger.flush()
        assert read(backing, 1, 4) == pages(4, BIG)


def test_a_file_that_another_program_makes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that appears after the check of the path may be open elsewhere. It is refused and unchanged."""
    path = tmp_path / "backing"
    create = claiming._create

    def late(name: str, size: int | None) -> claiming.Claimed:
        path.write_bytes(b"another program's")
        return create(name, size)

    monkeypatch.setattr(claiming, "_create", late)
    with pytest.raises(BackingError, match="cannot be created: File exists"):
        Backing(str(path))
    assert path.read_bytes() == b"another program's"


# ---- the content -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blkid", [True, False])
def test_an_old_swap_file(tmp_path: Path, blkid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the content if blkid knows it. With `force` there is a new file of that size."""
    if blkid and not any(os.access(each, os.X_OK) for each in foreign.BLKID):
        pytest.skip("needs blkid (apt-get install util-linux)")
    if not blkid:
        monkeypatch.setattr(foreign, "BLKID", ())
    path = tmp_path / "swap"
    path.write_bytes(bytes(4 * MIB))
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(PAGE_SIZE - 10)
        file.write(b"SWAPSPACE2")
        file.seek(1024)
        file.write((1).to_bytes(4, "little") + (1023).to_bytes(4, "little"))
    before = path.read_bytes()
    refused(path, "swap .an old swap file" if blkid else "blkid, which could name it, is not installed", LayoutError)
    assert path.read_bytes() == before
    with contextlib.closing(Backing(str(path), force=True)) as backing:
        assert backing.nr_segments == 16
        assert b"SWAPSPACE2" not in path.read_bytes()


def test_a_preallocated_file_keeps_its_size(tmp_path: Path) -> None:
    """The file keeps its size, holds as much as fits, returns no parts, and ends with its room and no content."""
    path = fallocated(tmp_path / "backing")
    for _ in range(2):
        backing = Backing(str(path))
        assert (backing.nr_segments, backing.trim_segments) == (32, 0)
        assert backing.size_bytes(1 << 40) == 8 * MIB
        assert backing.has_room(1000)
        backing.make_ready(0, 32)
        write(backing, 32 * SEGMENT_BLOCKS - 8, pages(8, BIG))
        assert read(backing, 32 * SEGMENT_BLOCKS - 8, 8) == pages(8, BIG)
        second = Backing(str(path), os.dup(backing.fileno()))  # as in a takeover
        assert second.nr_segments == 32
        os.close(second.fileno())
        backing.close()
        status = path.stat()
        assert (status.st_size, status.st_blocks * 512 >= 8 * MIB) == (8 * MIB, True)
        with path.open("rb") as file:
            assert file.read().count(0) == 8 * MIB


def test_a_preallocated_file_after_a_crash(tmp_path: Path) -> None:
    """The header says that the file keeps its size. The clean-up leaves no content and all the room."""
    path = fallocated(tmp_path / "backing")
    backing = Backing(str(path))
    backing.make_ready(0, 1)
    write(backing, 1, pages(4, BIG))
    os.close(backing.fileno())
    with contextlib.closing(Backing(str(path))) as again:
        assert again.nr_segments == 32
        again.make_ready(0, 1)
        write(again, 1, pages(4, BIG))
        empty_left(str(path))  # in use: it stays as it is
        assert read(again, 1, 4) == pages(4, BIG)
        os.dup2(os.open(os.devnull, os.O_RDONLY), again.fileno())  # as killed
    empty_left(str(path))
    assert path.read_bytes() == bytes(8 * MIB)
    for other in (tmp_path, Path("/dev/null")):
        empty_left(str(other))


def test_a_file_that_is_too_small(tmp_path: Path) -> None:
    """A file that is too small to be useful is refused."""
    refused(fallocated(tmp_path / "backing", 64 << 10), "keeps that size: make it 1 MiB or more")


@as_root
def test_room_that_a_file_system_cannot_preallocate(tmp_path: Path) -> None:
    """A sparse file on a file system without fallocate keeps its size as well."""
    with ramfs(tmp_path) as folder:
        path = folder / "backing"
        with path.open("wb") as file:
            file.truncate(2 * MIB)
        with pytest.raises(LayoutError):  # it looks like data there
            Backing(str(path))
        with contextlib.closing(Backing(str(path), force=True)) as backing:
            backing.make_ready(0, 8)
            write(backing, 100, pages(4, BIG))
        assert path.read_bytes() == bytes(2 * MIB)


@on_loop
def test_a_disk_without_any_room(tmp_path: Path) -> None:
    """The error names the file, and no empty file stays behind."""
    with small_ext4(tmp_path, 4 * MIB) as folder:
        with (folder / "other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
            while True:
                other.write(bytes(1024))
        with pytest.raises(BackingFull, match=f"backing file {folder}/backing cannot be prepared: No space left"):
            Backing(str(folder / "backing"))
        assert not (folder / "backing").exists()


def test_a_file_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file, for example one that is a mount, is used in place."""
    path = tmp_path / "backing"
    path.write_bytes(MAGIC + b"old" * 9999)
    inode = path.stat().st_ino

    def refuse(_: str) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "unlink", refuse)
    with opened(Backing, path):
        assert (path.stat().st_ino, path.stat().st_size) == (inode, PAGE_SIZE)


def test_active_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Active swap is refused, even with `force`."""
    path = fallocated(tmp_path / "swap")
    swaps = tmp_path / "swaps"
    swaps.write_text(f"Filename Type Size Used Priority\n/gone file 1 0 -2\n{path} file 8188 0 -2\n")
    monkeypatch.setattr(claiming, "SWAPS", str(swaps))
    for force in (False, True):
        with pytest.raises(BackingError, match="is active swap: swapoff it first"):
            Backing(str(path), force=force)


# ---- block devices -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loop(image: Path, size: int, sector: int = 512) -> Iterator[Path]:
    """Attach a loop device of `size` bytes, whose image accepts discards."""
    with image.open("wb") as file:
        file.truncate(size)
    with looped(image, "--direct-io=on", "--sector-size", str(sector)) as device:
        yield device


@on_loop
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device(tmp_path: Path, sector: int) -> None:
    """The device can be used to the last block, both ends stay zeros, and at the end it is as before."""
    image = tmp_path / "image"
    with loop(image, 32 * MIB + 5 * 4096, sector) as device:
        with opened(Backing, device) as backing:
            assert backing.direct
            assert backing.name == f"the backing device {device}"
            assert backing.nr_segments == (27 * MIB) // SEGMENT_BYTES
            assert backing.size_bytes(8 * MIB) == 8 * MIB
            assert backing.has_room(1)
            backing.make_ready(0, backing.nr_segments)
            assert backing.zeros_written == backing.zeros_per_segment == 0
            last = backing.nr_segments * SEGMENT_BLOCKS - 16
            for block in (1, 70, last):
                write(backing, block, pages(16, BIG, block))
            for block in (1, 70, last):
                assert read(backing, block, 16) == pages(16, BIG, block)
            content = image.read_bytes()
            assert content.startswith(MAGIC)
            assert not any(content[PAGE_SIZE:DEVICE_START]) and not any(content[-DEVICE_END:])
            used = image.stat().st_blocks
            assert backing.trim_segments == 1
            backing.punch(1, 1)
            assert image.stat().st_blocks < used
            assert read(backing, 1, 16) == pages(16, BIG, 1)
            assert backing.damage() == []
            refused(device, "cannot be used: it is in use: another zbudfs")
            second = Backing(str(device), os.dup(backing.fileno()))
            assert read(second, 1, 16) == pages(16, BIG, 1)
            os.close(second.fileno())
        assert not any(image.read_bytes())
        assert image.stat().st_blocks * 512 < MIB
        with opened(Backing, device):
            pass


@on_loop
def test_an_own_device_after_a_crash(tmp_path: Path) -> None:
    """The header is recognised, unless another program has labelled the device since."""
    image = tmp_path / "image"
    with loop(image, 16 * MIB) as device:
        for _ in range(2):
            backing = Backing(str(device))
            backing.make_ready(0, 1)
            write(backing, 1, pages(4, BIG))
            os.close(backing.fileno())
        empty_left(str(device))
        assert not any(image.read_bytes())
        os.close(Backing(str(device)).fileno())
        run_tool("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)
        with device.open("r+b") as file:
            file.write(MAGIC)
        refused(device, "holds a file system .ext4", LayoutError)


@on_loop
@pytest.mark.parametrize(
    ("program", "words"),
    [
        (("mkswap", "--label", "old"), "swap .an old swap partition, 'old'"),
        (("mkfs.ext4", "-q"), "a file system .ext4"),
        (None, "data of a kind that blkid does not know"),
    ],
)
def test_a_device_with_foreign_data(tmp_path: Path, program: tuple[str, ...] | None, words: str) -> None:
    """The error names the content, and nothing changes. With `force` the content is destroyed, and no tool finds it."""
    image = tmp_path / "image"
    with loop(image, 16 * MIB) as device:
        if program is None:
            with device.open("r+b") as file:
                file.seek(2 * MIB)
                file.write(b"the books of a firm")
        else:
            run_tool(*program, device)
        before = image.read_bytes()
        refused(device, f"holds {words}.*--force-backing", LayoutError)
        assert image.read_bytes() == before
        with contextlib.closing(Backing(str(device), force=True)) as backing:
            os.dup2(os.open(os.devnull, os.O_RDONLY), backing.fileno())  # killed: the label is gone in any case
        if program is not None:
            assert foreign.describe(str(device), device=True) == "data of a kind that blkid does not know"
        with opened(Backing, device):
            pass


@on_loop
def test_a_device_that_is_mounted(tmp_path: Path) -> None:
    """The error names the mount, also with `force`."""
    with small_ext4(tmp_path, 16 * MIB) as folder:
        device = Path(run_tool("findmnt", "--noheadings", "--output", "SOURCE", folder))
        refused(device, f"it is mounted on {folder}")
        with pytest.raises(BackingError, match="is mounted"):
            Backing(str(device), force=True)


@on_loop
def test_a_link_to_a_device(tmp_path: Path) -> None:
    """The permanent names are links, and they are followed. A link in a folder of other users is not."""
    with loop(tmp_path / "image", 16 * MIB) as device:
        link = tmp_path / "by-name"
        link.symlink_to(device)
        with opened(Backing, link) as backing:
            assert backing.nr_segments == 44
        os.chown(tmp_path, NOBODY, 0)
        with pytest.raises(BackingError, match="belongs to user"):
            Backing(str(link))
        os.chown(tmp_path, 0, 0)


@on_loop
def test_devices_that_will_not_do(tmp_path: Path) -> None:
    """A device that is too small is refused, and so is one that all users may write to."""
    with loop(tmp_path / "image", 5 * MIB) as device:
        refused(device, "has 5 MiB: it must have 6 or more")
        mode = stat.S_IMODE(device.stat().st_mode)
        try:
            device.chmod(0o666)
            refused(device, "every user may write to the device")
        finally:
            device.chmod(mode)
    run_tool("losetup", "--all")


@on_loop
def test_a_device_that_shrinks(tmp_path: Path) -> None:
    """A message reports the new size, and blocks behind the end are errors."""
    image = tmp_path / "image"
    with loop(image, 16 * MIB) as device, opened(Backing, device) as backing:
        backing.make_ready(0, 44)
        write(backing, 40 * SEGMENT_BLOCKS, pages(4, BIG))
        os.truncate(image, 8 * MIB)
        run_tool("losetup", "--set-capacity", device)
        assert backing.damage() == [
            f"the backing device {device} has been truncated: the pages beyond its end are lost; find the program that did it,"
            " then turn swap off and mount again"
        ]
        with pytest.raises(BackingError, match="backing device"):
            read(backing, 40 * SEGMENT_BLOCKS, 4)
        with pytest.raises(BackingError, match=r"backing device .* cannot be written"):
            write(backing, 40 * SEGMENT_BLOCKS, pages(4, BIG))


def test_words_of_blkid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind has its words. A blkid that hangs or cannot start is not waited for."""
    program = tmp_path / "blkid"
    monkeypatch.setattr(foreign, "BLKID", (str(program),))
    monkeypatch.setattr(foreign, "LIMIT_SECONDS", 0.2)
    for text, words in (
        ("echo TYPE=LVM2_member", "a physical volume of LVM"),
        ("echo TYPE=crypto_LUKS; echo LABEL=x", "an encrypted volume (LUKS), 'x'"),
        ("echo PTTYPE=gpt", "a partition table (gpt)"),
        ("exec sleep 9", "data of a kind that blkid does not know"),
    ):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert foreign.describe("/x", device=True) == words
    program.write_text("not a program")
    assert foreign.describe("/x", device=True) == "data of a kind that blkid does not know"


# ---- btrfs -------------------------------------------------------------------------------------------------------------


@on_loop
def test_btrfs_writes_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the attribute C. If the file system refuses it, there is a warning."""
    if shutil.which("mkfs.btrfs", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
        pytest.skip("needs mkfs.btrfs (apt-get install btrfs-progs)")
    where = tmp_path / "btrfs"
    where.mkdir()
    with loop(tmp_path / "image", 128 * MIB) as device:
        run_tool("mkfs.btrfs", "-q", device)
        run_tool("mount", device, where)
        try:
            with opened(Backing, where / "backing") as backing:
                assert "C" in run_tool("lsattr", where / "backing").split()[0]
                assert backing.warnings == []
                backing.make_ready(0, 4)
                write(backing, 64, pages(64, BIG))
                assert read(backing, 64, 64) == pages(64, BIG)
            monkeypatch.setattr(claiming, "_FS_IOC_SETFLAGS", 0x40086699)
            with opened(Backing, where / "backing") as backing:
                assert "NOCOW" in backing.warnings[0]
        finally:
            run_tool("umount", where)


# ---- refusals that no system at hand makes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("lstat", errno.EIO, "cannot open the backing file .*: Input/output error"),
        ("stat", errno.EACCES, "cannot examine the folder .* of the backing: Permission denied"),
        ("open", errno.EROFS, "cannot be created: Read-only file system"),
        ("fsync", errno.EIO, "cannot be prepared: Input/output error"),
        ("ftruncate", errno.EFBIG, "cannot be prepared: File too large"),
    ],
)
def test_system_calls_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    """Each failure is one sentence with the name of the file, and leaves no file behind."""
    path = tmp_path / "backing"
    actual = getattr(os, call)

    def fail(*arguments: object, **named: object) -> object:
        if call in ("fsync", "ftruncate") or (call == "stat") == (arguments[0] == str(tmp_path)):
            raise OSError(code, os.strerror(code))
        return actual(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(BackingError, match=words):
            Backing(str(path))
    assert not path.exists()


def test_an_old_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the reason, and the file does not change."""
    path = tmp_path / "backing"
    path.touch()
    actual = os.open

    def fail(name: str, *rest: int, **named: int) -> int:
        if name == str(path):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return actual(name, *rest, **named)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(BackingError, match=r"cannot open the backing file .*: Operation not permitted"):
        Backing(str(path))


def test_an_opened_file_is_closed_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is closed after any error between the claim and the first use. A disk of unknown room is tried."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with monkeypatch.context() as patch:
        patch.setattr("zbudfs.store.backing.space_of", fail)
        with pytest.raises(OSError, match="Input/output error"):
            Backing(str(tmp_path / "backing"))
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    with opened(Backing, tmp_path / "backing") as backing:
        monkeypatch.setattr(os, "fstatvfs", fail)
        assert backing.has_room(1 << 40)
        monkeypatch.undo()
        assert not backing.has_room(1 << 40)


def test_room_that_is_refused_for_another_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preallocated file whose room cannot be allocated again is an error. A failed part stays allocated."""
    path = fallocated(tmp_path / "backing")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(claiming, "fallocate", fail)
        with pytest.raises(BackingFull, match="cannot be prepared: No space left"):
            Backing(str(path))
    path = fallocated(tmp_path / "backing")
    with opened(Backing, path) as backing:
        room = path.stat().st_blocks
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            with pytest.raises(BackingFull, match="cannot be grown"):
                backing.make_ready(1, 4)
        assert path.stat().st_blocks == room


@on_loop
def test_devices_that_do_other_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of another device, large sectors, an immediate failure, and a replacement at this moment are handled."""
    with loop(tmp_path / "image", 16 * MIB) as device:
        number = device.stat().st_rdev
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda name: ["dm-3"] if str(name).endswith("/holders") else [])
            assert claiming._user_of_device(number) == "it is part of /dev/dm-3"
        actual = fcntl.ioctl

        def large(fd: int, request: int, argument: bytes) -> bytes:
            return (16384).to_bytes(4, "little") if request == 0x1268 else actual(fd, request, argument)

        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "ioctl", large)
            with pytest.raises(BackingError, match="has sectors of 16384 bytes"):
                Backing(str(device))

        def fail(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(BackingError, match=f"the backing device {device} cannot be prepared: Input/output"):
                Backing(str(device))
        with monkeypatch.context() as patch:
            other = tmp_path / "node"
            os.mknod(other, 0o600 | stat.S_IFBLK, number)

            def replace(path: str, status: os.stat_result) -> None:
                other.unlink()
                os.mknod(other, 0o600 | stat.S_IFBLK, Path("/dev/loop7").stat().st_rdev)

            patch.setattr(claiming, "_refuse_swap", replace)
            with pytest.raises(BackingError, match=r"was replaced meanwhile|cannot be used|cannot be prepared"):
                Backing(str(other))


@on_loop
def test_discards_that_are_too_slow_or_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is used without discards. With large granules only whole granules are discarded."""
    image = tmp_path / "image"
    with loop(image, 16 * MIB) as device:
        fd = os.open(device, os.O_RDWR)
        try:
            without = space.BlockDevice(fd, direct=False, sys=str(tmp_path))
            assert without.trim_segments == 0
            without.discard_all()
            number = device.stat().st_rdev
            queue = tmp_path / f"dev/block/{os.major(number)}:{os.minor(number)}/queue"
            queue.mkdir(parents=True)
            (queue / "discard_max_bytes").write_text("1073741824\n")
            (queue / "discard_granularity").write_text("1048576\n")
            coarse = space.BlockDevice(fd, direct=False, sys=str(tmp_path))
            assert coarse.trim_segments == 4
            os.pwrite(fd, b"x" * (16 * MIB), 0)
            os.fsync(fd)
            coarse.give_back(1, 2)  # not a whole granule
            assert image.read_bytes().count(b"x") == 16 * MIB
            coarse.give_back(4, 4)
            assert image.read_bytes().count(b"x") == 15 * MIB
            monkeypatch.setattr(space, "DISCARD_SECONDS", -1.0)
            coarse.discard_all()
            assert image.read_bytes().count(b"x") == 15 * MIB
        finally:
            os.close(fd)
