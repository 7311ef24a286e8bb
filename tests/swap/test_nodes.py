# SPDX-License-Identifier: MIT
"""A /dev without nodes of loop devices, as in a container, in its own mount namespace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS, ROOT

pytestmark = pytest.mark.needs("root", "loop")

BARE_DEV = """
set -e
mount -t tmpfs none "$1"
cp -a /dev/null /dev/zero /dev/urandom /dev/fuse /dev/loop-control "$1"
mount --bind "$1" /dev
shift
exec "$@"
"""


def in_bare_dev(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a /dev without these nodes."""
    words = ["unshare", "--mount", "sh", "-c", BARE_DEV, "sh", str(folder), sys.executable, *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_SECONDS, cwd=ROOT, check=False)


ATTACH = (
    "import sys, os; from pathlib import Path; from zbudfs.swap import attach, loop\n"
    "device = attach._losetup(Path(sys.argv[1]))\n"
    "print(device, os.path.exists(device)); attach.release(device)"
)


def test_a_missing_node_is_made(tmp_path: Path) -> None:
    """attach makes the loop device and its node."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "swapfile").write_bytes(bytes(1 << 20))
    run = in_bare_dev(tmp_path / "dev", "-c", ATTACH, str(tmp_path / "swapfile"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("/dev/loop")
    assert run.stdout.endswith(" True\n")


def test_a_node_that_cannot_be_made(tmp_path: Path) -> None:
    """The error names the device and the option that passes it into a container, and not the swap file."""
    (tmp_path / "dev").mkdir()
    code = (
        "import sys; from zbudfs.swap.nodes import ensure_free_loop; from zbudfs.swap.loop import SwapError\n"
        "import ctypes; libc = ctypes.CDLL(None); libc.mount(None, b'/dev', None, 32 | 1 | 4096, None)\n"  # read-only
        "try: ensure_free_loop()\n"
        "except SwapError as error: print(error)"
    )
    run = in_bare_dev(tmp_path / "dev", "-c", code)
    assert "is missing and cannot be made: Read-only file system; pass --device /dev/loop-control" in run.stdout, run
    assert "-v /dev:/dev" in run.stdout


@pytest.mark.needs("fuse")
def test_the_doctor_says_so(tmp_path: Path) -> None:
    """A free loop device without a node is no problem if the node can be made. Otherwise doctor names the remedy."""
    (tmp_path / "dev").mkdir()
    code = (
        "import ctypes, sys; from zbudfs.cli.doctor import kernel; from zbudfs.cli.doctor.finding import Machine\n"
        "from zbudfs.service.settings import Settings\n"
        "if sys.argv[1] == 'ro': ctypes.CDLL(None).mount(None, b'/dev', None, 32 | 1 | 4096, None)\n"
        "settings = Settings(mountpoint='/x', size_bytes=1 << 20, pool_bytes=1 << 20, backing=None)\n"
        "(found,) = kernel.check_loop(Machine(root='/', settings=settings)); print(found.level, found.text, found.remedy)"
    )
    run = in_bare_dev(tmp_path / "dev", "-c", code, "rw")
    assert run.stdout.startswith("ok /dev/loop"), run
    assert "its node is missing, and zbudfs swapon creates it" in run.stdout
    run = in_bare_dev(tmp_path / "dev", "-c", code, "ro")
    assert run.stdout.startswith("problem the node /dev/loop"), run
    assert "--device /dev/loop" in run.stdout
