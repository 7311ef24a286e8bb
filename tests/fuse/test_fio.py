# SPDX-License-Identifier: MIT
"""fio verifies checksums: random writes of 512 bytes to 1 MiB over eight times the pool."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import MIB, all_stats, require_tools
from tests.support import LIMIT_SECONDS, PACKING, mounted

pytestmark = pytest.mark.needs("root", "fuse")

SIZE: Final = 256 * MIB
WRITTEN: Final = 96 * MIB
"""Bytes that each run writes and reads back: three times the pool."""


ENGINES: Final = {
    "psync": ("--ioengine=psync", "--randseed=1"),
    # Two writes to the same bytes at once may end in either order, so fio keeps them apart.
    "libaio": ("--ioengine=libaio", "--randseed=2", "--iodepth=16", "--direct=1", "--serialize_overlap=1"),
}
LENGTHS: Final = {
    "evenly": "--bsrange=512-1m",
    "mostly small": "--bssplit=512/30:1536/15:4k/20:4608/10:20k/10:200k/10:1m/5",
}


@pytest.mark.parametrize(
    ("engine", "lengths", "packing"),
    [*((engine, lengths, PACKING) for engine in ENGINES for lengths in LENGTHS), ("libaio", "mostly small", "dense")],
)
def test_random_writes(engine: str, lengths: str, packing: str, tmp_path: Path) -> None:
    """Each block that is read back equals the written one."""
    require_tools("fio")
    options = ("--size", str(SIZE), "--pool", str(SIZE // 8), "--packing", packing, "--backing", tmp_path / "backing")
    with mounted(tmp_path / "mnt", *options) as mountpoint:
        command = [
            *("fio", "--name=verify", f"--filename={mountpoint}/swapfile", f"--size={SIZE}", f"--io_size={WRITTEN}"),
            *("--rw=randwrite", LENGTHS[lengths], "--blockalign=512", "--fallocate=none", *ENGINES[engine]),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_dump=0", "--do_verify=1"),
            *("--buffer_compress_percentage=60", "--buffer_compress_chunk=1024", "--refill_buffers=1"),
            "--output-format=json",
        ]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, cwd=tmp_path, check=False
        )
        assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout}\n{run.stderr}"
        (job,) = json.loads(run.stdout[run.stdout.index("{") :])["jobs"]
        assert job["error"] == 0
        assert job["write"]["io_bytes"] >= WRITTEN - MIB
        assert job["read"]["io_bytes"] == job["write"]["io_bytes"]
        counts = all_stats(mountpoint)
    assert counts["cumul_writeback_pages"] > 0
    assert counts["cumul_pagein_pages"] > 0
    assert (counts["lost_pages"], counts["writeback_failures"], counts["refused_pool_full"]) == (0, 0, 0)
