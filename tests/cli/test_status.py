# SPDX-License-Identifier: MIT
"""The status page and its warnings: made-up numbers in, lines for people out."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.calls import opened
from tests.support import LIMIT_SECONDS, mounted, run_zbudfs
from zbudfs.cli.page import WIDTH, below, page
from zbudfs.cli.remedies import is_thrashing, remedies
from zbudfs.cli.status import as_json, as_pages, report
from zbudfs.core.public import NAMES
from zbudfs.service.mountpoint import Mount

MIB = 1 << 20
FULL: dict[str, Any] = {
    "mountpoint": "/mnt/z",
    "pid": 77,
    "version": "0.1.0",
    "level": -1,
    "recoveries": 1,
    "standby_ready": True,
    "size_bytes": 8 << 30,
    "pool_limit_bytes": 2 << 30,
    "pool_limit_set_bytes": 2 << 30,
    "pool_used_bytes": 512 * MIB,
    "stored_pages": 500_000,
    "pers_zpages": 250_000,
    "eph_zpages": 10_000,
    "pers_unbuddied_count": 9_000,
    "eph_unbuddied_count": 1_000,
    "pers_raw_count": 6,
    "written_back_pages": 100_000,
    "backing_path": "/var/lib/zbudfs/mnt-z.backing",
    "backing_used_bytes": 256 * MIB,
    "backing_size_bytes": 1 << 30,
    "encrypted": True,
    "writeback_enabled": 1,
    "writeback_budget_bytes_per_day": 20 << 30,
    "writeback_budget_used_bytes": 5 << 30,
    "writeback_budget_left_bytes": 15 << 30,
    "cumul_writeback_bytes": 300 * MIB,
    "cumul_writeback_frames": 76_800,
    "cumul_writeback_pages": 150_000,
    "cumul_pagein_blocks": 20,
    "cumul_written_pages": 700_000,
    "cumul_read_pages": 1000,
    "read_latency_us": [0, 0, 0, 0, 0, 90, 5, 4, 1, 0],
    "read_latency_max_us": 1234,
    "users": ["loop device /dev/loop9"],
}
EARLIER: dict[str, Any] = {
    **FULL,
    "cumul_written_pages": 700_000 - 2560,
    "cumul_writeback_bytes": 299 * MIB,
    "cumul_pagein_blocks": 20,
}


def test_a_full_page() -> None:
    """Every question has its line, and the parts of the pages add up."""
    assert page(FULL, EARLIER, 2.0).splitlines() == [
        "/mnt/z                   zbudfs 0.1.0, zstd level -1, standby ready, 1 recovery",
        "  device     8 GiB, loop device /dev/loop9",
        "",
        "  stored     1.9 GiB in 500,000 pages",
        "  takes      512 MiB of RAM, 256 MiB on disk",
        "  saved      1.2 GiB (60.7 %); a page takes 1,610 of 4,096 bytes",
        "",
        "  RAM, packed in pairs       250,000   50.0 %  ████████████",
        "  RAM, alone in a frame       10,000    2.0 %  █",
        "  RAM, raw: incompressible         6    0.0 %  █",
        "  same-filled, in the table  139,994   28.0 %  ███████",
        "  disk alone                 100,000   20.0 %  █████",
        "",
        "  pool       ██████░░░░░░░░░░░░░░░░░░  25.0 % of 2 GiB",
        "  backing    ██████░░░░░░░░░░░░░░░░░░  25.0 % of 1 GiB",
        "             /var/lib/zbudfs/mnt-z.backing, encrypted",
        "  written    150,000 pages as 300 MiB; 20 blocks read back, 0 of them too soon",
        "  budget     ██████░░░░░░░░░░░░░░░░░░  25.0 % of 20 GiB a day",
        "",
        "  speed      in 5 MiB/s, out 0 B/s, to disk 512 KiB/s, from disk 0 B/s",
        "             (over 2.0 s)",
        "  latency              half below  99 % below     longest",
        "             read           32 us      128 us     1.23 ms",
    ]


def test_speeds_of_public_numbers() -> None:
    """They are renewed once a second: the time between two of them counts, not that between two looks."""
    now, before = {**FULL, "renewed_at": 11.0}, {**EARLIER, "renewed_at": 9.0}
    assert "  speed      in 5 MiB/s, out 0 B/s, to disk 512 KiB/s, from disk 0 B/s" in page(now, before, 0.5)
    assert "speed" not in page({**now, "renewed_at": 9.0}, before, 0.5)


def test_a_page_of_public_numbers() -> None:
    """It says that they are rounded; what is missing is not shown as 0."""
    told = {name: value for name, value in FULL.items() if name in NAMES}
    text = page({**told, "rounded": True, "as_of": 1_800_000_000}, None, 1.0)
    assert "public     rounded, as of " in text
    assert "512 MiB of RAM" in text
    assert "same-filled" not in text
    assert "packed" not in text
    (read,) = (line.split() for line in text.splitlines() if line.strip().startswith("read "))
    assert read[-1] == "-"


def test_a_text_gives_the_terminal_no_orders() -> None:
    """Control characters are shown as what they are, and letters of any language are letters."""
    hostile = "\x1b]0;title\x07 \x9b2J\u202e über 空き\r"
    for numbers in ({**FULL, "warnings": [hostile], "version": hostile}, {"mountpoint": "/mnt/z", "error": hostile}):
        text = page(numbers)
        assert {each for each in text if not each.isprintable()} == {"\n"}
        assert "\\x1b]0;title\\x07" in text
        assert "über 空き" in text


def test_an_empty_page() -> None:
    """Nothing stored, no backing file, no trouble: no lines about them, and no division by zero."""
    empty = {"mountpoint": "/a b", "size_bytes": 1 << 20, "pool_limit_bytes": 1 << 20, "stored_pages": 0}
    assert page({**empty, "version": "1", "level": 3, "mounted_at": 1}, blocks=False).splitlines() == [
        "'/a b'                                   zbudfs 1, zstd level 3, no standby yet",
        "  device     1 MiB, not in use",
        "",
        "  stored     0 B in 0 pages",
        "  takes      0 B of RAM",
        "",
        "  pool       ........................  0.0 % of 1 MiB",
        "  backing    none: nothing is ever written to disk",
        "",
        "  speed      in 0 B/s, out 0 B/s, to disk 0 B/s, from disk 0 B/s",
        "             (since the mount)",
    ]


def test_another_packing() -> None:
    """Where frames hold more than two, unbuddied ones are no measure of who is alone."""
    text = page({**FULL, "packing": "dense"})
    assert "RAM, packed                260,000   52.0 %" in text
    assert "pairs" not in text


def test_no_line_is_too_long() -> None:
    """80 columns are enough for everything but a path that is longer than that."""
    worst = {
        **FULL,
        **dict.fromkeys(("lost_pages", "writeback_failing", "backing_full", "refused_no_memory"), 10**12),
        "warnings": ["the system refused something " * 10],
        "users": ["swap on /dev/loop1000", "loop device /dev/loop1001"],
        "recoveries": 1000,
    }
    assert all(len(line) <= WIDTH for line in page(worst).splitlines())


def test_several_pages() -> None:
    """One page for each mount, a line for one that does not answer, one sentence for none at all."""
    dead = {"mountpoint": "/mnt/dead", "error": "the daemon has died"}
    assert as_pages([FULL, dead], [dead, FULL], 1.0).endswith("\n\n/mnt/dead\n  error      the daemon has died")
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


@pytest.mark.parametrize(
    ("counts", "half", "most"),
    [
        ([1], "1 us", "1 us"),
        ([50, 50], "1 us", "2 us"),
        ([0] * 9 + [99, 1], "512 us", "512 us"),
        ([0] * 10 + [98, 2], "1.02 ms", "2.05 ms"),
        ([0] * 21 + [1], "2.1 s", "2.1 s"),
    ],
)
def test_percentiles(counts: list[int], half: str, most: str) -> None:
    """The bound of the bucket in which they are."""
    assert (below(counts, 50), below(counts, 99)) == (half, most)


# ---- warnings ------------------------------------------------------------------------------------------------------


def test_all_is_well() -> None:
    """Nothing is said of a mount that has nothing."""
    assert remedies(FULL) == []


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"lost_in_recovery": 3, "lost_pages": 3}, "3 pages were lost when a worker died"),
        ({"lost_pages": 5, "lost_in_recovery": 3}, "2 reads met pages that were damaged or lost"),
        ({"writeback_failing": 1, "writeback_failures": 9}, "the backing file does not take pages"),
        ({"writeback_failures": 9}, "did not take 9 batches at some time"),
        ({"pagein_failures": 2}, "2 reads that the backing file refused"),
        ({"backing_full": 1}, "make room on its disk"),
        ({"writeback_budget_left_bytes": 4096, "writeback_budget_full_in_seconds": 9000}, "whole again in 2.5 hours"),
        ({"cumul_refault_blocks": 20_000}, "the pool is thrashing: 20,000 blocks were read back"),
        ({"pool_limit_bytes": 1 << 30}, "the pool's limit is 1 GiB instead of 2 GiB for now"),
        ({"refused_no_backing": 4}, "4 writes were refused: the pool is full and there is no backing file"),
        ({"refused_writeback_off": 4}, "zbudfs set writeback_enabled=1 /mnt/z"),
        ({"warnings": ["the system refused this"]}, "the system refused this"),
    ],
)
def test_each_trouble_has_its_remedy(numbers: dict[str, Any], said: str) -> None:
    """It is said, and in one sentence."""
    found = remedies({**FULL, **numbers})
    assert any(said in sentence for sentence in found)
    assert not any("\n" in sentence for sentence in found)


def test_thrashing_needs_numbers() -> None:
    """A few blocks prove nothing; a fifth of what was written does."""
    assert not is_thrashing(10, 10)
    assert not is_thrashing(10_000, 1999)
    assert is_thrashing(10_000, 2000)


# ---- the real command ----------------------------------------------------------------------------------------------


@pytest.mark.needs("root", "fuse")
def test_watching(tmp_path: Path) -> None:
    """A line of JSON at each look, until Ctrl-C, which is no error."""
    with mounted(tmp_path / "mnt") as mountpoint:
        command = [sys.executable, "-m", "zbudfs", "status", "--json", "--watch", "0.1", str(mountpoint)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
            try:
                assert watching.stdout is not None
                first = json.loads(watching.stdout.readline())
                with opened(mountpoint / "swapfile") as fd:
                    os.pwrite(fd, b"page" * 1024, 0)
                end = time.monotonic() + LIMIT_SECONDS
                while json.loads(watching.stdout.readline())["stored_pages"] != 1:
                    assert time.monotonic() < end
                watching.send_signal(signal.SIGINT)
                _, err = watching.communicate(timeout=LIMIT_SECONDS)
            finally:
                watching.kill()
        assert (watching.returncode, err) == (0, "")
        assert first["stored_pages"] == 0
        assert first["mountpoint"] == str(mountpoint)


@pytest.mark.needs("root", "fuse")
def test_watching_in_a_terminal(tmp_path: Path) -> None:
    """The page replaces itself; `--watch MOUNTPOINT` needs no number."""
    with mounted(tmp_path / "mnt") as mountpoint:
        master, slave = os.openpty()
        command = [sys.executable, "-m", "zbudfs", "status", "--watch", str(mountpoint)]
        with subprocess.Popen(command, stdout=slave, stderr=slave) as watching:
            try:
                shown = b""
                while b"latency" not in shown and b"speed" not in shown:
                    assert select.select([master], [], [], LIMIT_SECONDS)[0], shown
                    shown += os.read(master, 65536)
                watching.send_signal(signal.SIGINT)
                assert watching.wait(LIMIT_SECONDS) == 0
            finally:
                watching.kill()
                os.close(master)
                os.close(slave)
    assert shown.startswith(b"\x1b[H\x1b[J")
    assert b"no standby yet" in shown or b"standby ready" in shown


@pytest.mark.parametrize("words", [["--watch", "0"], ["--watch", "soon"], ["--watch", "1e9"]])
def test_wrong_times(words: list[str]) -> None:
    """They are usage errors."""
    run = run_zbudfs("status", *words)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "from 0.1 to 86400" in run.stderr
