# SPDX-License-Identifier: MIT
"""The status page and its warnings: made-up numbers in, lines for people out."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.calls import opened
from tests.support import LIMIT_SECONDS, ROOT, mounted, run_zbudfs
from zbudfs.cli.page import MOST_LINES, WIDTH, below, page
from zbudfs.cli.remedies import is_thrashing, problems, remedies
from zbudfs.cli.status import as_json, as_pages, report
from zbudfs.core.errors import Refusal
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
    """Each question has its line, and the parts of the pages add up."""
    assert page(FULL, EARLIER, 2.0).splitlines() == [
        "/mnt/z                   zbudfs 0.1.0, zstd level -1, standby ready, 1 recovery",
        "  device     8 GiB, loop device /dev/loop9",
        "",
        "  stored     1.9 GiB in 500,000 pages",
        "  takes      512 MiB of RAM, 256 MiB on disk",
        "  saved      1.2 GiB (60.7 %); a page takes 1,610 of 4,096 bytes",
        "  places     pairs 50 %, alone 2 %, raw <1 %, same-filled 28 %, disk 20 %",
        "",
        "  pool       ██████░░░░░░░░░░░░░░░░░░  25.0 % of 2 GiB",
        "  backing    ██████░░░░░░░░░░░░░░░░░░  25.0 % of 1 GiB",
        "             /var/lib/zbudfs/mnt-z.backing, encrypted",
        "  written    150,000 pages as 300 MiB; 20 blocks read back, 0 of them too soon",
        "  budget     ██████░░░░░░░░░░░░░░░░░░  25.0 % of 20 GiB a day",
        "",
        "                        write        read     discard     to disk   from disk",
        "  speed (2.0 s)       5 MiB/s       0 B/s       0 B/s   512 KiB/s       0 B/s",
        "  half within               -       32 us           -           -           -",
        "  99 % within               -      128 us           -           -           -",
        "  longest                   -     1.23 ms           -           -           -",
    ]


def test_the_page_in_the_documents() -> None:
    """The page that docs/use/tools.md shows has every label of a page for root, and as many lines and columns."""
    text = (ROOT / "docs/use/tools.md").read_text().split("\n    /mnt/zswap  ", 1)[1].split("\n\n-", 1)[0]
    shown = [line[4:] for line in text.splitlines()]
    first_words = re.compile(r"^  (\w+)", re.MULTILINE).findall
    assert {*first_words(page(FULL, EARLIER, 2.0))} - {*first_words("\n".join(shown))} == {"budget"}
    assert "; itself " in text
    assert len(shown) <= MOST_LINES
    assert max(map(len, shown)) <= WIDTH


def test_speeds_of_public_numbers() -> None:
    """The rate of numbers that are renewed once a second uses the time between two renewals, not between two looks."""
    now, before = {**FULL, "renewed_at": 11.0}, {**EARLIER, "renewed_at": 9.0}
    speeds = "speed (2.0 s)       5 MiB/s       0 B/s       0 B/s   512 KiB/s       0 B/s"
    assert speeds in page(now, before, 0.5)
    assert "speed" not in page({**now, "renewed_at": 9.0}, before, 0.5)


def test_a_page_of_public_numbers() -> None:
    """The page says that the numbers are rounded, and does not show missing ones as 0."""
    told = {name: value for name, value in FULL.items() if name in NAMES}
    text = page({**told, "rounded": True, "as_of": 1_800_000_000}, None, 1.0)
    assert "public     rounded, as of " in text
    assert "512 MiB of RAM" in text
    assert "same-filled" not in text
    assert "packed" not in text
    assert "99 % within               -      128 us" in text
    assert "longest" not in text


def test_a_text_gives_the_terminal_no_orders() -> None:
    """Control characters are shown as escapes, and letters of any language are letters."""
    hostile = "\x1b]0;title\x07 \x9b2J\u202e über 空き\r"
    for numbers in ({**FULL, "warnings": [hostile], "version": hostile}, {"mountpoint": "/mnt/z", "error": hostile}):
        text = page(numbers)
        assert {each for each in text if not each.isprintable()} == {"\n"}
        assert "\\x1b]0;title\\x07" in text
        assert "über 空き" in text


def test_an_empty_page() -> None:
    """Without pages, backing file and problems there are no lines about them, and no division by zero."""
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
        "                        write        read     discard     to disk   from disk",
        "  mean speed            0 B/s       0 B/s       0 B/s       0 B/s       0 B/s",
    ]


def test_another_packing() -> None:
    """If frames hold more than two, the unbuddied frames do not count the pages that are alone."""
    text = page({**FULL, "packing": "dense"})
    assert "places     packed 52 %, raw <1 %" in text
    assert "pairs" not in text


def test_no_line_is_too_long() -> None:
    """80 columns are enough for each line, except for a longer path."""
    worst = {
        **FULL,
        **dict.fromkeys(("lost_pages", "writeback_failing", "backing_full", "refused_no_memory"), 10**12),
        "warnings": ["the system refused something " * 10],
        "users": ["swap on /dev/loop1000", "loop device /dev/loop1001"],
        "recoveries": 1000,
    }
    assert all(len(line) <= WIDTH for line in page(worst).splitlines())


def test_several_pages() -> None:
    """The report has a page for each mount, a line for one that does not answer, and one sentence if there is none."""
    dead = {"mountpoint": "/mnt/dead", "error": "the daemon has died"}
    assert as_pages([FULL, dead], [dead, FULL], 1.0).endswith("\n\n/mnt/dead\n  error      the daemon has died")
    assert as_pages([]) == "no zbudfs is mounted"


def test_json_is_ascii() -> None:
    """JSON is one object or a list of them, and any path survives."""
    odd = {"mountpoint": "/ä\udce4\n"}
    assert json.loads(as_json(odd)) == odd
    assert json.loads(as_json([odd, FULL])) == [odd, FULL]
    assert as_json(odd).isascii()


def test_a_mount_that_gives_nothing() -> None:
    """A mount without numbers is reported and does not raise."""
    assert "does not answer: No such file or directory" in report(Mount("/none/at/all", "0:1"))["error"]


TROUBLE: dict[str, Any] = {
    **FULL,
    "packing": "dense",
    "recoveries": 1000,
    "standby_ready": False,
    "rounded": True,
    "as_of": 1_800_000_000,
    "swap_off": ["/dev/loop9"],
    "lost_in_recovery": 3,
    "lost_pages": 5,
    "writeback_failing": 1,
    "writeback_failures": 9,
    "writeback_enabled": 0,
    "pagein_failures": 2,
    "backing_full": 1,
    "writeback_budget_left_bytes": 4096,
    "writeback_budget_full_in_seconds": 9000,
    "cumul_refault_blocks": 20_000,
    "pool_limit_bytes": 1 << 30,
    **{f"refused_{cause}": 10**9 for cause in Refusal},
    "warnings": [f"the system refused protection {number}: {'the machine may hang, ' * 5}" for number in range(10)],
    "users": [f"{kind} /dev/loop{number}" for number in range(100) for kind in ("swap on", "loop device")],
    **{f"{kind}_latency_us": [9] * 28 for kind in ("read", "write", "discard", "writeback", "pagein")},
    **{f"{kind}_latency_max_us": 1 << 27 for kind in ("read", "write", "discard", "writeback", "pagein")},
}
"""The numbers of a mount that has every problem."""


def test_every_problem_at_once() -> None:
    """A page has 20 lines at most. Problems come first, those that need action before the others, and no count is lost."""
    found = problems(TROUBLE)
    assert len(found) > 20
    lines = page(TROUBLE, EARLIER, 2.0).splitlines()
    assert len(lines) == MOST_LINES == 20
    first = next(number for number, line in enumerate(lines) if line.startswith("  ! "))
    assert first <= 2  # after the header, which may need two lines
    assert "the swap on /dev/loop9 was turned off by another program: zbudfs swapon" in lines[first]
    shown = sum(line.startswith(("  ! ", "  - ")) for line in lines)
    assert shown >= 4
    assert f"more       zbudfs status --json: {len(found) - shown} more problems, " in lines[-1]
    assert "device, budget, speeds" in lines[-1]
    for label in ("stored", "takes", "saved", "pool", "backing"):
        assert any(line.startswith(f"  {label} ") for line in lines), label


@pytest.mark.parametrize("count", range(25))
def test_any_number_of_problems(count: int) -> None:
    """The page has 20 lines at most with any number of warnings, also in the report of several instances."""
    numbers = {**FULL, "warnings": TROUBLE["warnings"][:1] * count}
    for each in (numbers, {**numbers, "users": TROUBLE["users"], "instances": [FULL] * 32, "level": list(range(32))}):
        lines = page(each, EARLIER, 2.0).splitlines()
        assert len(lines) <= 20
        shown = sum(line.startswith("  ! ") for line in lines)
        assert shown == count or f"{count - shown} more problem" in lines[-1]


def test_problems_without_action_come_last() -> None:
    """A problem that the daemon ends by itself has another mark and stands below the others."""
    lines = page({**FULL, "pool_limit_bytes": 1 << 30, "refused_no_backing": 1, "warnings": ["it is broken: mend it"]})
    marked = [line for line in lines.splitlines() if line.startswith(("  ! ", "  - "))]
    assert [line[:4] for line in marked] == ["  ! ", "  ! ", "  - "]
    assert "memory is short" in marked[2]


def test_an_error_is_short() -> None:
    """The page of many instances that do not answer has 20 lines at most."""
    error = "; ".join(
        f"the daemon of /mnt/z/{number} has died: run zbudfs umount /mnt/z to clean up" for number in range(32)
    )
    assert len(page({"mountpoint": "/mnt/z", "error": error}).splitlines()) == 20


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
    """A percentile is the bound of its bucket."""
    assert (below(counts, 50), below(counts, 99)) == (half, most)


# ---- warnings ------------------------------------------------------------------------------------------------------


def test_all_is_well() -> None:
    """A mount without problems gives no warning."""
    assert remedies(FULL) == []


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"lost_in_recovery": 3, "lost_pages": 3}, "3 pages were lost when a worker died"),
        ({"lost_pages": 5, "lost_in_recovery": 3}, "2 reads failed because the page was damaged or lost"),
        ({"writeback_failing": 1, "writeback_failures": 9}, "writes to the backing file fail, so pages stay in RAM"),
        ({"writeback_failures": 9}, "9 batches of writes to the backing file failed"),
        ({"pagein_failures": 2}, "2 reads from the backing file failed"),
        ({"backing_full": 1}, "make room on its disk"),
        ({"writeback_budget_left_bytes": 4096, "writeback_budget_full_in_seconds": 9000}, "full again in 2.5 hours"),
        ({"cumul_refault_blocks": 20_000}, "20,000 were read back within half a minute"),
        ({"pool_limit_bytes": 1 << 30}, "the pool's limit is now 1 GiB instead of 2 GiB"),
        ({"refused_no_backing": 4}, "4 writes were refused: the pool was full, without a backing file"),
        ({"refused_writeback_off": 4}, "zbudfs set writeback_enabled=1 /mnt/z"),
        ({"warnings": ["the system refused this"]}, "the system refused this"),
    ],
)
def test_each_trouble_has_its_remedy(numbers: dict[str, Any], said: str) -> None:
    """Each problem has a warning with a remedy, in one sentence."""
    found = remedies({**FULL, **numbers})
    assert any(said in sentence for sentence in found)
    assert not any("\n" in sentence for sentence in found)


def test_thrashing_needs_numbers() -> None:
    """A few blocks prove nothing. A fifth of the written ones is thrashing."""
    assert not is_thrashing(10, 10)
    assert not is_thrashing(10_000, 1999)
    assert is_thrashing(10_000, 2000)


# ---- the real command ----------------------------------------------------------------------------------------------


@pytest.mark.needs("root", "fuse")
def test_watching(tmp_path: Path) -> None:
    """Each look prints a line of JSON until Ctrl-C, which is no error."""
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
    """The page replaces itself, and `--watch MOUNTPOINT` needs no number."""
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
    """Wrong times are usage errors."""
    run = run_zbudfs("status", *words)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "from 0.1 to 86400" in run.stderr
