# SPDX-License-Identifier: MIT
"""The status page: made-up numbers in, lines for people out."""

import json
from typing import Any

from zbudfs.cli.status import as_json, as_pages, report
from zbudfs.service.mountpoint import Mount

FULL: dict[str, Any] = {
    "mountpoint": "/mnt/z",
    "pid": 77,
    "version": "0.1.0",
    "level": -1,
    "size_bytes": 8 << 30,
    "pool_limit_bytes": 2 << 30,
    "pool_used_bytes": 512 << 20,
    "stored_pages": 524288,
    "same_filled_pages": 12345,
    "raw_pages": 6,
    "written_back_pages": 1000,
    "backing_path": "/var/lib/zbudfs/mnt-z.backing",
    "backing_used_bytes": 256 << 20,
    "backing_size_bytes": 1 << 30,
    "encrypted": True,
    "cumul_writeback_bytes": 300 << 20,
    "cumul_writeback_pages": 150000,
    "cumul_pagein_blocks": 20,
    "refused_pool_full": 3,
    "writeback_failures": 0,
    "warnings": ["the system refused this", "and that"],
    "users": ["loop device /dev/loop9"],
}


def test_a_full_page() -> None:
    """Every question has its line."""
    assert as_pages([FULL]).splitlines() == [
        "/mnt/z",
        "  device    8 GiB, zstd level -1, loop device /dev/loop9",
        "  daemon    zbudfs 0.1.0, pid 77, no standby yet",
        "  stored    2 GiB in 524,288 pages (12,345 same-filled, 6 incompressible)",
        "  takes     512 MiB of RAM, 256 MiB on disk",
        "  saved     1.3 GiB (62.5 %)",
        "  pool      25.0 % of 2 GiB",
        "  backing   /var/lib/zbudfs/mnt-z.backing, encrypted, up to 1 GiB",
        "  written   150,000 pages as 300 MiB, 20 blocks read back",
        "  trouble   3 writes refused for want of room",
        "  warning   the system refused this",
        "  warning   and that",
    ]


def test_an_empty_page() -> None:
    """Nothing stored, no backing file, no trouble: no lines about them, and no division by zero."""
    empty = {"mountpoint": "/a b", "size_bytes": 1 << 20, "pool_limit_bytes": 1 << 20, "stored_pages": 0}
    assert as_pages([{**empty, "version": "1", "pid": 1, "level": 3}]).splitlines() == [
        "'/a b'",
        "  device    1 MiB, zstd level 3, not in use",
        "  daemon    zbudfs 1, pid 1, no standby yet",
        "  stored    0 B in 0 pages",
        "  takes     0 B of RAM, 0 B on disk",
        "  pool      0.0 % of 1 MiB",
        "  backing   none",
    ]


def test_several_pages() -> None:
    """One page for each mount, a line for one that does not answer, one sentence for none at all."""
    dead = {"mountpoint": "/mnt/dead", "error": "the daemon has died"}
    pages = as_pages([FULL, dead]).split("\n\n")
    assert len(pages) == 2
    assert pages[1] == "/mnt/dead\n  error     the daemon has died"
    assert as_pages([]) == "no zbudfs is mounted"


def test_json_is_ascii() -> None:
    """One object or a list of them; any path survives."""
    odd = {"mountpoint": "/ä\udce4\n"}
    assert json.loads(as_json(odd)) == odd
    assert json.loads(as_json([odd, FULL])) == [odd, FULL]
    assert as_json(odd).isascii()


def test_a_mount_that_gives_nothing() -> None:
    """A mount without numbers is reported, not raised."""
    assert "does not answer: No such file or directory" in report(Mount("/none/at/all", "0:1"))["error"]
