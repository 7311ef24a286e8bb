# SPDX-License-Identifier: MIT
"""A limit of the address space (RLIMIT_AS) for `zbudfs mount` and its processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import MIB, all_stats, opened, server_of
from tests.support import LIMIT_SECONDS, is_mounted, wait_until, zbudfs

pytestmark = pytest.mark.needs("root", "fuse")

LIMITS_MIB: Final = (50, 100, 120, 400)


def test_from_too_little_to_enough(tmp_path: Path) -> None:
    """Each limit either ends the start, with the limit as the reason and nothing left behind, or changes nothing."""
    content = random.Random(1).randbytes(12 * MIB)
    outcomes = []
    for number, limit in enumerate(LIMITS_MIB):
        mountpoint = tmp_path / f"mnt{number}"
        mountpoint.mkdir()
        options = ["--size", "64M", "--pool", "8M", "--backing", str(tmp_path / "backing")]
        limited = ["sh", "-c", f'ulimit -v {limit << 10} && exec "$@"', "sh"]
        run = subprocess.run(
            [*limited, sys.executable, "-m", "zbudfs", "mount", *options, str(mountpoint)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        outcomes.append(run.returncode)
        if run.returncode:
            assert run.returncode == 1
            assert run.stderr.startswith("zbudfs: ")
            assert run.stderr.count("\n") == 1
            assert f"is limited to {limit} MiB (RLIMIT_AS)" in run.stderr
            assert not is_mounted(mountpoint)
            continue
        try:
            with opened(mountpoint / "swapfile") as fd:
                for at in range(0, len(content), MIB):
                    assert os.pwrite(fd, content[at : at + MIB], at) == MIB
                wait_until(lambda where=mountpoint: all_stats(where)["standby_ready"] is True, "the standby")  # type: ignore[misc]
                os.kill(server_of(mountpoint), signal.SIGKILL)
                for at in range(0, len(content), MIB):
                    assert os.pread(fd, MIB, at) == content[at : at + MIB]
                counts = all_stats(mountpoint)
                assert (counts["recoveries"], counts["lost_pages"]) == (1, 0)
        finally:
            zbudfs("umount", mountpoint)
    assert outcomes[0] == 1
    assert outcomes[-1] == 0
