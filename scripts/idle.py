# SPDX-License-Identifier: MIT
"""Measure the cost of the processes of an idle mount.

    idle.py [--pool 64M] [--size 128M] [--fill 48M] [--seconds 60] [--threads]

The script fills a mount without a backing file with bytes that do not compress, and leaves it alone. It prints the CPU time
in percent of one core and the wake-ups a second, for each process and for all together, and with --threads for each thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from zbudfs.core.sizes import parse_size  # noqa: E402  after the path is known

PIECE_BYTES: Final = 1 << 20
SETTLE_SECONDS: Final = 15.0
"""Time after the filling in which the daemon returns surplus memory."""

Cost = tuple[float, int]
"""CPU seconds, and the number of voluntary context switches."""


def zbudfs(*arguments: str) -> None:
    """Run the command `zbudfs`. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "zbudfs", *arguments], check=True, timeout=300, cwd=ROOT)


def costs_of(pid: int) -> dict[str, Cost]:
    """Return the costs of the threads of a process since its start, by name and number."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds = int((task / "schedstat").read_text().split()[0])
        status = (task / "status").read_text()
        switches = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        found[f"{(task / 'comm').read_text().strip()} {task.name}"] = (nanoseconds / 1e9, switches)
    return found


def fill(swapfile: Path, length: int) -> None:
    """Write `length` bytes that do not compress."""
    noise = os.urandom(PIECE_BYTES)
    fd = os.open(swapfile, os.O_RDWR)
    try:
        for start in range(0, length, PIECE_BYTES):
            os.pwrite(fd, noise[start // PIECE_BYTES % 4096 :] + noise[: start // PIECE_BYTES % 4096], start)
    finally:
        os.close(fd)


def main() -> int:
    """Measure, print the costs, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", default="64M", help="size of the pool (default: %(default)s)")
    parser.add_argument("--size", default="128M", help="size of the swap file (default: %(default)s)")
    parser.add_argument("--fill", default="48M", help="bytes to write first (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the measurement (default: %(default)g)")
    parser.add_argument("--threads", action="store_true", help="print the cost of each thread too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zbudfs-idle-") as folder:
        zbudfs("mount", "--pool", arguments.pool, "--size", arguments.size, "--backing", "none", folder)
        try:
            fill(Path(folder, "swapfile"), parse_size(arguments.fill))
            time.sleep(SETTLE_SECONDS)
            names = ("keeper", "worker", "standby")
            pids = {name: int(Path(folder, f"stats/{name}_pid").read_text()) for name in names}
            before = {name: costs_of(pid) for name, pid in pids.items()}
            began = time.monotonic()
            time.sleep(arguments.seconds)
            seconds = time.monotonic() - began
            after = {name: costs_of(pid) for name, pid in pids.items()}
        finally:
            zbudfs("umount", folder)
    total, wake_ups = 0.0, 0.0
    for name in names:
        spent = {
            thread: (cpu - before[name].get(thread, (0.0, 0))[0], switches - before[name].get(thread, (0.0, 0))[1])
            for thread, (cpu, switches) in after[name].items()
        }
        cpu = sum(seconds for seconds, _ in spent.values())
        switches = sum(count for _, count in spent.values())
        total, wake_ups = total + cpu, wake_ups + switches
        print(f"{name}: {100 * cpu / seconds:.3f} %, {switches / seconds:.1f} wake-ups/s")
        if arguments.threads:
            for thread, (cpu_seconds, count) in sorted(spent.items(), key=lambda item: -item[1][0]):
                print(f"    {thread}: {100 * cpu_seconds / seconds:.3f} %, {count / seconds:.1f}/s")
    print(f"all: {100 * total / seconds:.3f} %, {wake_ups / seconds:.1f} wake-ups/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
