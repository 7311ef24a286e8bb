# SPDX-License-Identifier: MIT
"""The kill campaign kills workers with SIGKILL at random moments, while a program uses the swap that they serve.

    campaign_kill.py [--kills 100] [--mib 1024] [--limit 256] [--pool 192M] [--packing zbud] [--seed 1]

The program fills, rereads and rewrites `--mib` MiB in a memory cgroup of `--limit` MiB, and checks each byte. It runs again
and again, until `--kills` workers are dead. The pool is smaller than the stored pages, so there is writeback and page-in all
the time. When a program ends, its swap is discarded. Meanwhile a probe reads a page of the swapfile every few milliseconds:
its longest read is the longest stall.

The script prints one line of JSON. The exit status is 0 if no byte was wrong, no read failed, no process but the workers was
killed, and a takeover followed each kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.cell import Cell  # noqa: E402  after the path is known
from zbudfs.service.mountpoint import find_mount  # noqa: E402

PAGE_BYTES: Final = 4096
STORM_LIMIT_SECONDS: Final = 1800.0


def zbudfs(*arguments: str) -> str:
    """Run the command `zbudfs`, and return its output. Raises CalledProcessError."""
    command = [sys.executable, "-m", "zbudfs", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300, cwd=ROOT).stdout


def stats(mountpoint: Path) -> dict[str, Any]:
    """Return stats/all.json of the mount. While workers die, it is read again until a worker answers."""
    while True:
        with contextlib.suppress(OSError, json.JSONDecodeError):
            found: dict[str, Any] = json.loads((mountpoint / "stats/all.json").read_text())
            return found
        time.sleep(0.01)


class Probe:
    """A thread that reads a page of the swapfile all the time, with the longest time of a read and the number of errors."""

    def __init__(self, swapfile: Path) -> None:
        self.longest_seconds = 0.0
        self.reads = self.errors = 0
        self._fd = os.open(swapfile, os.O_RDONLY)
        self._end = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        page = mmap.mmap(-1, PAGE_BYTES)
        while not self._end:
            began = time.monotonic()
            try:
                os.preadv(self._fd, [page], 0)
            except OSError:
                self.errors += 1
            self.reads += 1
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            time.sleep(0.005)

    def close(self) -> None:
        """Stop the thread, and close the swapfile."""
        self._end = True
        self._thread.join()
        os.close(self._fd)


class Killer:
    """A thread that kills the worker of the mount at random moments, until `wanted` workers are dead or it is closed."""

    def __init__(self, mountpoint: Path, wanted: int, seed: int) -> None:
        self.kills = 0
        self.longest_recovery_us = 0
        self.stored_at_longest = 0
        self._mountpoint = mountpoint
        self._wanted = wanted
        self._random = random.Random(seed)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self.kills < self._wanted and not self._end.wait(self._random.uniform(0.1, 1.5)):
            found = stats(self._mountpoint)
            before, pid = found["recoveries"], found["worker_pid"]
            os.kill(pid, signal.SIGKILL)
            self.kills += 1
            if self._random.random() < 0.2:
                continue  # the next worker may be killed before there is another standby
            while (found := stats(self._mountpoint))["recoveries"] == before or found["worker_pid"] == pid:
                time.sleep(0.01)
            if found["last_recovery_us"] > self.longest_recovery_us:
                self.longest_recovery_us = found["last_recovery_us"]
                self.stored_at_longest = found["stored_pages"]

    @property
    def done(self) -> bool:
        """Whether the wanted number of workers is dead."""
        return self.kills >= self._wanted

    def close(self) -> None:
        """Stop the thread."""
        self._end.set()
        self._thread.join()


def kernel_errors(since: float, device: str) -> int:
    """Return the number of errors of `device` or of any task in the kernel's log since `since` (monotonic seconds).

    Errors of other devices do not count: tests with failing disks may run at the same time.
    """
    number = Path(device).stat().st_rdev
    at_device = rf"swap-device \({os.major(number)}:{os.minor(number)}:|I/O error, dev {Path(device).name},"
    wanted = re.compile(rf"{at_device}|blocked for more than|Out of memory")
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in log.splitlines() if (at := re.match(r"\[ *([0-9.]+)\]", line)) and float(at[1]) >= since]
    return sum(wanted.search(line) is not None for line in lines)


def run(kills: int, mib: int, limit: int, pool: str, seed: int, packing: str = "zbud") -> dict[str, Any]:
    """Run one campaign, and return its report."""
    report: dict[str, Any] = {"packing": packing, "bad": 0, "storms": 0, "failed_storms": 0}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zbudfs-kill-", dir="/var/tmp") as folder:
        mountpoint = Path(folder, "mnt")
        mountpoint.mkdir()
        size = f"{max(mib * 3 // 2, 64)}M"
        device = zbudfs(
            "swapon",
            "--size",
            size,
            "--pool",
            pool,
            "--packing",
            packing,
            "--backing",
            f"{folder}/backing",
            "--priority",
            "32767",
            str(mountpoint),
        ).strip()
        probe = Probe(mountpoint / "swapfile")
        killer = Killer(mountpoint, kills, seed)
        try:
            with Cell("kill", limit << 20) as cell:
                while not killer.done:
                    command = cell.command(
                        [sys.executable, "-I", str(ROOT / "kit/storm.py"), str(mib), str(seed + report["storms"])]
                    )
                    storm = subprocess.run(
                        command,
                        input="go on\n",
                        capture_output=True,
                        text=True,
                        timeout=STORM_LIMIT_SECONDS,
                        check=False,
                    )
                    report["storms"] += 1
                    if storm.returncode in (0, 1):
                        report["bad"] += json.loads(storm.stdout.splitlines()[-1])["bad"]
                    else:
                        report["failed_storms"] += 1
                        print(storm.returncode, storm.stderr[-500:], file=sys.stderr)
        finally:
            killer.close()
            probe.close()
            time.sleep(1.0)
            found = stats(mountpoint)
            print((mountpoint / "stats/log").read_text().splitlines()[-3:], file=sys.stderr)
            zbudfs("swapoff", "--umount", str(mountpoint))
            assert find_mount(str(mountpoint)) is None
    report |= {
        "kills": killer.kills,
        "recoveries": found["recoveries"],
        "lost_pages": found["lost_pages"],
        "longest_stall_seconds": round(probe.longest_seconds, 3),
        "probe_reads": probe.reads,
        "probe_errors": probe.errors,
        "longest_recovery_seconds": round(killer.longest_recovery_us / 1e6, 3),
        "stored_mib_then": killer.stored_at_longest >> 8,
        "cumul_writeback_pages": found["cumul_writeback_pages"],
        "cumul_pagein_pages": found["cumul_pagein_pages"],
        "cumul_discarded_pages": found["cumul_discarded_pages"],
        "kernel_errors": kernel_errors(began, device),
        "seconds": round(time.monotonic() - began),
    }
    return report


def sound(report: dict[str, Any]) -> bool:
    """Return whether a campaign found no error."""
    wrong = ("bad", "failed_storms", "lost_pages", "probe_errors", "kernel_errors")
    return not any(report[name] for name in wrong) and report["recoveries"] >= report["kills"] > 0


def main() -> int:
    """Run a campaign, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of workers to kill (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=1024, help="MiB that the program uses (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=256, help="MiB of RAM of the program (default: %(default)s)")
    parser.add_argument("--pool", default="192M", help="size of the pool (default: %(default)s)")
    parser.add_argument("--packing", default="zbud", help="packing of the mount (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random choices (default: %(default)s)")
    arguments = parser.parse_args()
    report = run(arguments.kills, arguments.mib, arguments.limit, arguments.pool, arguments.seed, arguments.packing)
    print(json.dumps(report))
    return 0 if sound(report) else 1


if __name__ == "__main__":
    raise SystemExit(main())
