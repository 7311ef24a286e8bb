# SPDX-License-Identifier: MIT
"""The soak test: every load and fault at the same time, for a given time. No byte may be wrong, and no process may grow.

    swapfile   processes play scripts/fsx.py on it: every operation, compared with a plain file
    disk       made of nbdkit, nbdfuse, a loop device and ext4: for seconds, reads fail, writes fail, or it does not answer
    worker     killed again and again
    control/   tunables change at random, writeback is ordered, clean copies are dropped
    swap       with --swap: a program in a memory cgroup swaps to a second mount, which comes and goes

A request that is refused while the disk fails is repeated: it must succeed after the disk has recovered. The load stops
between two rounds. Then the memory, open files and threads of the processes, and the loop devices, are counted and compared
with those of the first round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from kit.cell import Cell
from kit.nbd import NbdDisk, nbd_disk
from kit.programs import ROOT
from scripts.fsx import play_all, zbudfs
from zbudfs.core.tunables import MAX_WRITERS

SIZE: Final = 24 << 20
POOL: Final = 4 << 20
PROCESSES: Final = 4
SEEDS_A_ROUND: Final = 12
PATIENCE_SECONDS: Final = 120.0
CALM_SECONDS: Final = 60.0
"""Longest wait until the mount is calm after a round. A longer time is a failure."""
GROWTH_FILES: Final = 3
"""Open files by which a process may grow: the count itself needs open files of the worker."""
GROWTH_KIB: Final = 16 << 10
"""KiB of private memory by which a process may grow after the first round, since its heap may still need more."""


class Troubles:
    """A thread that causes faults of a mount and its disk until it is stopped. `done` counts them by kind."""

    def __init__(self, mountpoint: Path, disk: NbdDisk, source: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._mountpoint = mountpoint
        self._disk = disk
        self._source = source
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Troubles:
        """Start the thread."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread, and restore the tunables. The disk works again."""
        self._stop.set()
        self._thread.join()
        for name, value in (("writeback_enabled", "1"), ("age_seconds", "0"), ("pool_limit_bytes", str(POOL))):
            self._set(name, value)
        for name in ("low_watermark_frames", "high_watermark_frames"):
            self._set(name, "auto")

    def _work(self) -> None:
        kinds = (self._kill, self._reads_fail, self._writes_fail, self._stall, self._settings, self._settings)
        while not self._stop.wait(self._source.uniform(0.1, 1.0)):
            self._source.choice(kinds)()

    def _kill(self) -> None:
        counts = stats(self._mountpoint)
        if counts.get("standby_ready"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(counts["worker_pid"], signal.SIGKILL)
                self.done["kills"] += 1

    def _reads_fail(self) -> None:
        self.done["reads fail"] += 1
        with self._disk.failing("pread"):
            self._stop.wait(self._source.uniform(0.1, 1.5))

    def _writes_fail(self) -> None:
        self.done["writes fail"] += 1
        with self._disk.failing("pwrite"):
            self._stop.wait(self._source.uniform(0.1, 2.0))

    def _stall(self) -> None:
        self.done["stalls"] += 1
        with self._disk.standing_still():
            self._stop.wait(self._source.uniform(0.1, 3.0))

    def _settings(self) -> None:
        self.done["settings"] += 1
        name, values = self._source.choice(
            (
                ("pool_limit_bytes", [str(POOL), str(POOL // 2), str(POOL * 3 // 4)]),
                ("level", ["-7", "-1", "1", "3", "9", "nonsense"]),
                ("writeback_enabled", ["0", "1", "1", "1"]),
                ("age_seconds", ["0", "1"]),
                ("writeback", ["10", "100", "all"]),
                ("drop_ephemeral", ["1"]),
                ("low_watermark_frames", ["auto", "50", "-5"]),
                ("high_watermark_frames", ["auto", "200"]),
            )
        )
        self._set(name, self._source.choice(values))

    def _set(self, name: str, value: str) -> None:
        with contextlib.suppress(OSError):  # the daemon refuses wrong values
            (self._mountpoint / "control" / name).write_text(value)


def stats(mountpoint: Path) -> dict[str, Any]:
    """Return all numbers of a mount; an empty dictionary if no worker answers."""
    try:
        found: dict[str, Any] = json.loads((mountpoint / "stats/all.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def sizes(mountpoint: Path) -> dict[str, int]:
    """Wait until the mount is calm, and return the sizes that must not grow: memory in KiB, open files, threads, loops."""
    end = time.monotonic() + CALM_SECONDS
    counts = stats(mountpoint)
    while not counts.get("standby_ready") or counts["pers_zombie_count"]:
        if time.monotonic() > end:
            raise TimeoutError("the mount does not become calm")
        time.sleep(0.1)
        counts = stats(mountpoint)
    ours = f"{mountpoint.parent}/"
    loops = Path("/sys/block").glob("loop*/loop/backing_file")
    found = {"loop devices": sum(file.read_text().startswith(ours) for file in loops)}
    for who in ("keeper", "worker"):
        process = Path(f"/proc/{counts[f'{who}_pid']}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        found[f"{who}'s memory"] = int(status["RssAnon"].split()[0])
        found[f"{who}'s threads"] = int(status["Threads"])
        found[f"{who}'s files"] = len(list((process / "fd").iterdir()))
    return found


def grown(first: dict[str, int], last: dict[str, int]) -> list[str]:
    """Return a text for each size that has grown by more than is allowed."""
    allowed = {name: GROWTH_KIB if name.endswith("memory") else GROWTH_FILES * name.endswith("files") for name in first}
    return [f"{name}: {first[name]} to {last[name]}" for name in first if last[name] > first[name] + allowed[name]]


def swap_round(folder: Path, seed: int) -> int:
    """Make a second mount for one program that swaps to it, and return the number of wrong pages."""
    mountpoint = folder / "swap"
    mountpoint.mkdir(exist_ok=True)
    zbudfs("swapon", "--size", "192M", "--pool", "24M", "--backing", folder / "swap.backing", mountpoint)
    try:
        storm = str(ROOT / "kit/storm.py")
        with Cell("soak", 48 << 20) as cell:
            command = cell.command([sys.executable, "-I", storm, "112", str(seed)])
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
                try:
                    said, _ = program.communicate("\n", timeout=240)
                finally:
                    program.kill()
            return int(json.loads(said.splitlines()[-1])["bad"])
    finally:
        zbudfs("swapoff", "--umount", mountpoint)


def main(arguments: list[str]) -> int:
    """Run the soak test. Return 1 if a byte was wrong, a page was lost, or a size has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="length of the test in minutes (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: 0)")
    parser.add_argument("--swap", action="store_true", help="run a program that swaps in each round")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="zbudfs-soak-"))
    shadow = folder / "shadow"
    with shadow.open("wb") as file:
        file.truncate(SIZE)
    wrong: list[str] = []
    totals: Counter[str] = Counter()
    began = time.monotonic()
    rounds = 0
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    try:
        with nbd_disk(folder, 96 << 20) as disk:
            sizes_and_disk = ("--size", str(SIZE), "--pool", str(POOL), "--backing", disk.mounted / "b")
            zbudfs(
                "mount", *sizes_and_disk, "--force-backing", "yes", mountpoint
            )  # the disk is on FUSE, which makes the faults
            try:
                (mountpoint / "control/writers").write_text(str(MAX_WRITERS))
                troubles = Troubles(mountpoint, disk, random.Random(options.seed))
                while not rounds or (not wrong and time.monotonic() - began < options.minutes * 60):
                    start = options.seed + rounds * SEEDS_A_ROUND
                    seeds = range(start, start + SEEDS_A_ROUND)
                    with troubles:
                        said = list(play_all(mountpoint / "swapfile", shadow, SIZE, PROCESSES, seeds, PATIENCE_SECONDS))
                    wrong += [str(each["wrong"]) for each in said if each["wrong"]]
                    totals.update(
                        {
                            name: sum(int(str(each[name])) for each in said)
                            for name in ("operations", "bytes", "refused")
                        }
                    )
                    if options.swap and (bad := swap_round(folder, rounds + 1)):
                        wrong.append(f"{bad} pages of a program that swapped")
                    last = sizes(mountpoint)
                    first = first or last
                    rounds += 1
                    print(
                        f"  {(time.monotonic() - began) / 60:6.1f} min, round {rounds}: {json.dumps(last)}", flush=True
                    )
                counts = stats(mountpoint)
            finally:
                zbudfs("umount", mountpoint)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong += [f"grown: {text}" for text in grown(first, last)] if rounds > 1 else []
    for text in wrong:
        print(f"soak: {text}", file=sys.stderr)
    print(f"  rounds           {rounds:,} in {(time.monotonic() - began) / 60:.1f} minutes")
    print(f"  operations       {totals['operations']:,}, {totals['bytes'] >> 20:,} MiB; {totals['refused']:,} repeated")
    print(f"  troubles         {', '.join(f'{number:,} {name}' for name, number in sorted(troubles.done.items()))}")
    print(f"  takeovers        {counts.get('recoveries'):,}, pages lost in them {counts.get('lost_in_recovery'):,}")
    print(f"  wrong            {len(wrong):,}")
    return 1 if wrong or counts.get("lost_in_recovery") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
