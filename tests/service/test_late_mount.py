# SPDX-License-Identifier: MIT
"""Mountpoints of fstab without a mount."""

from pathlib import Path

import pytest

from zbudfs.service.disks import missing_mountpoint

FSTAB = """\
# /dev/sdz1 /comment ext4 defaults 0 0
UUID=1 / ext4 defaults 0 1
/dev/sdb1 /mnt/ssd ext4 nofail 0 0
/dev/sdc1\t/mnt/ssd/inner ext4 noauto 0 0
/dev/sdd1 /mnt/my\\040disk ext4 nofail 0 0
/dev/sde1 none swap sw 0 0
"""
MOUNTINFO = """\
27 1 8:2 / / rw - ext4 /dev/sda2 rw
31 27 8:3 / {} rw - ext4 /dev/sda3 rw
"""


@pytest.mark.parametrize(
    ("path", "mounted", "expected"),
    [
        ("/var/lib/zbudfs/z", "/x", None),
        ("/comment/z", "/x", None),
        ("/mnt/ssd/z", "/x", "/mnt/ssd"),
        ("/mnt/ssd/folder/z", "/x", "/mnt/ssd"),
        ("/mnt/ssd/z", "/mnt/ssd", None),
        ("/mnt/ssdz", "/x", None),
        ("/mnt/ssd/inner/z", "/mnt/ssd", "/mnt/ssd/inner"),
        ("/mnt/my disk/z", "/x", "/mnt/my disk"),
        ("/mnt/my disk/z", "/mnt/my\\040disk", None),
    ],
)
def test_the_nearest_mountpoint_decides(path: str, mounted: str, expected: str | None, tmp_path: Path) -> None:
    """The nearest mountpoint above the path decides, and only if nothing is mounted there."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fstab").write_text(FSTAB)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(MOUNTINFO.format(mounted))
    found = missing_mountpoint(path, str(tmp_path))
    assert found == (expected and (expected, "/etc/fstab"))


def test_a_machine_without_fstab(tmp_path: Path) -> None:
    """Without fstab there is nothing to wait for."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(MOUNTINFO.format("/x"))
    assert missing_mountpoint("/mnt/ssd/z", str(tmp_path)) is None
