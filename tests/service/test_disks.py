# SPDX-License-Identifier: MIT
"""The place of a backing: real mounts of each refused sort, and made-up machines for the rest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kit.programs import run_tool
from tests.store.disks import looped, ramfs, small_ext4, tmpfs
from tests.support import mounted, run_zbudfs, zbudfs
from zbudfs.core.errors import BackingError
from zbudfs.service import disks

MIB: Final = 1 << 20
real: Final = pytest.mark.needs("root", "loop")


def refusal(path: Path, *, force: bool = False) -> str:
    """Return why a place is refused, or an empty text."""
    try:
        disks.check(str(path), force=force)
    except BackingError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def overlay(folder: Path, upper: Path) -> Iterator[Path]:
    """Mount an overlay whose writes go below `upper`, for the block."""
    lower, where = folder / "lower", folder / "overlay"
    for each in (lower, where, upper / "u", upper / "w"):
        each.mkdir()
    options = f"lowerdir={lower},upperdir={upper}/u,workdir={upper}/w"
    run_tool("mount", "-t", "overlay", "-o", options, "overlay", where)
    try:
        yield where
    finally:
        run_tool("umount", where)


# ---- real mounts -------------------------------------------------------------------------------------------------------


@real
def test_memory(tmp_path: Path) -> None:
    """File systems in memory, overlays on them, and disks with their image there are refused, even with `--force-backing`."""
    assert refusal(tmp_path / "b") == ""
    with tmpfs(tmp_path, 64 * MIB) as memory:
        assert "lies on tmpfs, which is memory" in refusal(memory / "b", force=True)
        with overlay(tmp_path, memory) as where:
            assert "lies on tmpfs, which is memory" in refusal(where / "b", force=True)
        (memory / "image").touch()
        os.truncate(memory / "image", 16 * MIB)
        with looped(memory / "image") as device:
            assert "lies on tmpfs, which is memory" in refusal(device, force=True)
        (memory / "disk").mkdir()
        with small_ext4(memory / "disk", 16 * MIB) as disk:
            assert "lies on tmpfs, which is memory" in refusal(disk / "b", force=True)
    with ramfs(tmp_path) as memory:
        assert "lies on ramfs, which is memory" in refusal(memory / "b", force=True)
    with small_ext4(tmp_path, 16 * MIB) as disk:
        assert refusal(disk / "b") == ""


@real
def test_an_overlay_whose_upper_folder_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the upper folder may be unseen. The overlay's files have extents only if they are on a disk."""
    monkeypatch.setattr(os.path, "isdir", lambda _: False)
    with tmpfs(tmp_path, 64 * MIB) as memory, overlay(tmp_path, memory) as where:
        assert "lies on tmpfs, which is memory" in refusal(where / "b")
    plain = tmp_path / "plain"
    (plain / "layers").mkdir(parents=True)
    with overlay(plain, plain / "layers") as where:
        assert refusal(where / "b") == ""


@pytest.mark.needs("root", "fuse", "loop")
def test_a_zbudfs(tmp_path: Path) -> None:
    """`mount` refuses a zbudfs and a loop device on it, even with `--force-backing`, and nothing stays behind."""
    (tmp_path / "two").mkdir()
    with mounted(tmp_path / "one") as one:
        for backing in (one / "swapfile", one / "new"):
            assert "lies on a zbudfs itself" in refusal(backing, force=True)
        with looped(one / "swapfile") as device:
            run = run_zbudfs("mount", "--backing", device, "--force-backing", "yes", tmp_path / "two")
            assert run.returncode == 1
            assert f"the backing {device} is refused: it lies on a zbudfs itself" in run.stderr
    assert not os.path.ismount(tmp_path / "two")


@pytest.mark.needs("root", "fuse")
def test_mount_refuses_memory(tmp_path: Path) -> None:
    """The refusal is one sentence with exit status 1, and no file is made."""
    with tmpfs(tmp_path, 64 * MIB) as memory:
        (tmp_path / "mnt").mkdir()
        options = ("--size", "8M", "--pool", "1M", "--backing", memory / "b")
        run = run_zbudfs("mount", *options, tmp_path / "mnt")
        assert (run.returncode, run.stderr.count("\n")) == (1, 1)
        assert f"the backing {memory}/b is refused: it lies on tmpfs, which is memory" in run.stderr
        assert not (memory / "b").exists()


@pytest.mark.needs("root", "fuse")
def test_status_reports_a_forced_backing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another user is accepted with `--force-backing`, as an option and as a mount option, and status says so."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    options = ("--size", "8M", "--pool", "1M", "--backing", folder / "b")
    (tmp_path / "mnt").mkdir()
    run = run_zbudfs("mount", *options, tmp_path / "mnt")
    assert "belongs to user 65534" in run.stderr
    assert list(folder.iterdir()) == []
    with mounted(tmp_path / "mnt", *options, "--force-backing", "yes"):
        assert str(folder / "b") in zbudfs("status", tmp_path / "mnt")


# ---- late mounts ---------------------------------------------------------------------------------------------------------


def machine(root: Path, mountinfo: str = "", fstab: str = "") -> str:
    """Make a machine whose / is on ext4, and which has a folder /mnt/ssd."""
    (root / "proc/self").mkdir(parents=True)
    first = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    (root / "proc/self/mountinfo").write_text(first + mountinfo)
    (root / "etc").mkdir()
    (root / "etc/fstab").write_text(fstab)
    (root / "mnt/ssd").mkdir(parents=True)
    return str(root)


SSD: Final = "22 21 8:17 / /mnt/ssd rw - ext4 /dev/sdb1 rw\n"
AUTOFS: Final = "22 21 0:40 / /mnt/ssd rw - autofs systemd-1 rw,direct\n"
FSTAB: Final = "# comment\n\nLABEL=x none swap sw 0 0\n/dev/sda1 / ext4 defaults 0 1\nUUID=1 /mnt/ssd ext4 nofail 0 2\n"


@pytest.mark.parametrize(
    ("mountinfo", "fstab", "path", "missing"),
    [
        ("", FSTAB, "/mnt/ssd/z", True),
        ("", FSTAB, "/mnt/ssd/deeper/z", True),
        (AUTOFS, FSTAB, "/mnt/ssd/z", True),
        (SSD, FSTAB, "/mnt/ssd/z", False),
        (AUTOFS + SSD, FSTAB, "/mnt/ssd/z", False),
        ("", FSTAB, "/mnt/ssd2/z", False),
        ("", FSTAB, "/mnt/z", False),
        ("", FSTAB, "/dev/sdb1", False),
        ("", FSTAB.replace("/mnt/ssd", "/mnt/my\\040ssd"), "/mnt/my ssd/z", True),
        ("", "", "/mnt/ssd/z", False),
    ],
)
def test_a_mount_of_fstab(tmp_path: Path, mountinfo: str, fstab: str, path: str, missing: bool) -> None:
    """A path below a mount point of fstab is refused until the mount is there. Other paths are not."""
    root = machine(tmp_path, mountinfo, fstab)
    assert (disks.missing_mount(path, root) is not None) == missing
    if missing:
        with pytest.raises(BackingError, match=r"is in /etc/fstab and not mounted; mount it first, or insist"):
            disks.check(path, force=False, root=root)
        assert disks.check(path, force=True, root=root) == []


def test_a_mount_unit(tmp_path: Path) -> None:
    """The same holds for a mount unit of systemd, unless it is masked."""
    root = machine(tmp_path)
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    unit = folder / "mnt-ssd.mount"
    unit.touch()
    assert (
        disks.missing_mount("/mnt/ssd/a/z", root) == f"/mnt/ssd is in /etc/systemd/system/{unit.name} and not mounted"
    )
    unit.unlink()
    unit.symlink_to("/dev/null")
    assert disks.missing_mount("/mnt/ssd/a/z", root) is None
    assert disks.path_to_mount("/mnt/ssd/a/z") == "/mnt/ssd/a"


def test_nothing_is_created_below_an_empty_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is made, if the folder exists and if it is only on the missing disk."""
    root = machine(tmp_path, fstab=FSTAB)
    for path in ("/mnt/ssd/z", "/mnt/ssd/swap/z"):
        with pytest.raises(BackingError, match="/mnt/ssd is in /etc/fstab and not mounted"):
            disks.check(path, force=False, root=root)
    assert list((tmp_path / "mnt/ssd").iterdir()) == []


# ---- made-up machines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words", "insisted"),
    [
        ("0:50 / /srv rw - nfs4 server:/x rw", "lies on nfs4: writing there needs memory", True),
        ("0:50 / /srv rw - fuse.sshfs host: rw", "lies on fuse.sshfs", True),
        ("8:33 / /srv rw - fuseblk /dev/sdc1 rw", "lies on fuseblk", True),
        ("0:50 / /srv rw - fuse.zbudfs zbudfs rw", "lies on a zbudfs itself", False),
        ("0:50 / /srv rw - hugetlbfs x rw", "which is memory", False),
        ("253:0 / /srv rw - ext4 /dev/zram0 rw", "lies on /dev/zram0, which is memory", False),
        ("7:3 / /srv rw - ext4 /dev/loop3 rw", "lies on nfs", True),
    ],
)
def test_refused_file_systems(tmp_path: Path, line: str, words: str, insisted: bool) -> None:
    """Memory and a zbudfs are always refused, FUSE and networks only without `--force-backing`. With it they give a warning."""
    root = machine(tmp_path, f"22 21 {line}\n23 21 0:51 / /net rw - nfs server:/x rw\n")
    for number, name in (("253:0", "zram0"), ("7:3", "loop3")):
        (tmp_path / "sys/devices" / name).mkdir(parents=True)
        (tmp_path / "sys/dev/block").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/dev/block" / number).symlink_to(f"../../devices/{name}")
    (tmp_path / "sys/devices/loop3/loop").mkdir()
    (tmp_path / "sys/devices/loop3/loop/backing_file").write_text("/net/image (deleted)\n")
    with pytest.raises(BackingError, match=words):
        disks.check("/srv/z", force=False, root=root)
    if insisted:
        assert words in disks.check("/srv/z", force=True, root=root)[0]
    else:
        with pytest.raises(BackingError, match=words):
            disks.check("/srv/z", force=True, root=root)


@pytest.mark.parametrize(("version", "warned"), [("2.2.2-1", True), ("2.3.0-rc1", False), ("2.4.1", False), ("", True)])
def test_zfs(tmp_path: Path, version: str, warned: bool) -> None:
    """ZFS before 2.3 accepts direct I/O without doing it."""
    root = machine(tmp_path, "22 21 0:50 / /srv rw - zfs tank/x rw\n")
    (tmp_path / "sys/module/zfs").mkdir(parents=True)
    (tmp_path / "sys/module/zfs/version").write_text(version)
    assert bool(disks.check("/srv/z", force=False, root=root)) == warned


def test_a_device_of_a_network(tmp_path: Path) -> None:
    """A disk of a network is used, with a warning."""
    root = machine(tmp_path, "22 21 43:0 / /srv rw - ext4 /dev/nbd0 rw\n")
    (tmp_path / "sys/devices/nbd0").mkdir(parents=True)
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/43:0").symlink_to("../../devices/nbd0")
    assert "lies on /dev/nbd0, a device of a network" in disks.check("/srv/z", force=False, root=root)[0]


def test_a_mount_that_is_not_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a chroot the table may lack the mount. The number of the file system then gives its type."""
    monkeypatch.setattr(disks, "mounts", lambda root="/": iter(()))
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs /dev/shm")
    assert disks.layers("/dev/shm/not there/z") == ["tmpfs"]
