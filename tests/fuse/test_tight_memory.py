# SPDX-License-Identifier: MIT
"""A daemon in a memory cgroup with less room than its pool uses the room that there is, and is not killed."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kit.cell import Cell
from tests.fuse.calls import MIB, all_stats, opened, server_of
from tests.support import LIMIT_SECONDS, status_of, wait_until, zbudfs

pytestmark = pytest.mark.needs("root", "fuse", "cell")

SIZE: Final = 256 * MIB
POOL: Final = 208 * MIB
CELL: Final = 220 * MIB
"""The processes take 85 to 105 MiB: the pages of a library are charged to the cgroup that touched them first."""
CHUNK: Final = MIB // 4
WRITTEN: Final = 160 * MIB
"""More than RAM has room for."""


@pytest.mark.parametrize("backed", [True, False])
def test_a_pool_that_does_not_fit(backed: bool, tmp_path: Path) -> None:
    """The pool ends where the cgroup does. With a backing file the rest goes there, and without one writes are refused.

    A killed worker is replaced within the same limit, `status` gives the reason, no process is killed, and no page is
    lost.
    """
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    options = ["--size", str(SIZE), "--pool", str(POOL), "--backing", str(tmp_path / "backing") if backed else "none"]
    source = random.Random(3)
    with Cell("tight", CELL) as cell:
        mount = [sys.executable, "-m", "zbudfs", "mount", *options, str(mountpoint)]
        subprocess.run(cell.command(mount), check=True, timeout=LIMIT_SECONDS, capture_output=True)
        try:
            wait_until(lambda: all_stats(mountpoint)["standby_ready"] is True, "the standby")
            with opened(mountpoint / "swapfile") as fd:
                taken: list[bytes] = []
                code = 0
                while not code and (len(taken) + 1) * CHUNK <= WRITTEN:
                    data = source.randbytes(CHUNK)
                    try:
                        done = os.pwrite(fd, data, len(taken) * CHUNK)
                    except OSError as error:
                        code = error.errno or 0
                    else:
                        taken.append(data[:done])  # the kernel splits a write, and its second part may be refused
                counts = all_stats(mountpoint)
                assert code == (0 if backed else errno.ENOSPC)
                assert (counts["recoveries"], counts["lost_pages"]) == (0, 0), "it was killed"
                assert 8 * MIB < counts["pool_used_bytes"] < POOL * 3 // 4
                assert "the memory cgroup has room for" in "\n".join(status_of(mountpoint)["warnings"])

                os.kill(server_of(mountpoint), signal.SIGKILL)
                wait_until(lambda: all_stats(mountpoint)["recoveries"] == 1, "a takeover")
                wait_until(lambda: all_stats(mountpoint)["standby_ready"] is True, "another standby")
                for number, data in enumerate(taken):
                    assert os.pread(fd, len(data), number * CHUNK) == data, f"chunk {number}"
                counts = all_stats(mountpoint)
                assert (counts["recoveries"], counts["lost_pages"]) == (1, 0)
        finally:
            zbudfs("umount", mountpoint)
