# SPDX-License-Identifier: MIT
"""The measurement `fio`: the cost of one request to `swapfile`, compared with a C program that only copies bytes (floor.c).

fio uses direct I/O through libaio, and makes the content: three quarters of every 4 KiB are zeros and one quarter is random
(buffer_compress_percentage=75). It is new for each request, and compresses about as well as process memory. The whole file
is written once before the first measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Final

from bench import targets
from bench.kit import Benchmark, Options, add_also, in_turns, progress, workplace
from bench.table import Column, Table
from kit.programs import MIB, KitError, find_program, run

JOBS: Final = {
    "4 KiB read, depth 1": ("randread", "4k", 1),
    "4 KiB read, depth 4": ("randread", "4k", 4),
    "4 KiB read, depth 16": ("randread", "4k", 16),
    "4 KiB write, depth 1": ("randwrite", "4k", 1),
    "4 KiB write, depth 4": ("randwrite", "4k", 4),
    "4 KiB write, depth 16": ("randwrite", "4k", 16),
    "128 KiB read, depth 4": ("randread", "128k", 4),
    "128 KiB write, depth 4": ("randwrite", "128k", 4),
    "1 MiB read, depth 4": ("randread", "1m", 4),
    "1 MiB write, depth 4": ("randwrite", "1m", 4),
}
SHORT_JOBS: Final = ("4 KiB read, depth 1", "1 MiB write, depth 4")
COMPRESS_PERCENT: Final = 75


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this measurement."""
    parser.add_argument(
        "--mib", type=int, default=256, metavar="N", help="size of the file in MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="length of one job in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--job", action="append", choices=list(JOBS), metavar="NAME", help="run this job only: " + "; ".join(JOBS)
    )
    add_also(parser)


def measure(options: Options) -> list[Table]:
    """Return one table: the bandwidth of each job, and the mean time of a request."""
    if options.short:
        options.mib, options.seconds, options.job = 16, 0.2, list(SHORT_JOBS)
    if find_program("fio") is None:
        raise KitError("fio is missing: apt-get install fio")
    jobs = options.job or list(JOBS)
    also = dict(options.also)
    names = [name for name in ("floor", "zbudfs") if not targets.why_not(name)] + list(also)
    columns = [
        column for name in names for column in (Column(name, f"{name} MiB/s"), Column(f"{name}_us", f"{name} us"))
    ]
    columns += [Column(f"{name}_ratio", f"{name} : floor") for name in names if name != "floor" and "floor" in names]
    table = Table(f"Requests of fio to a file of {options.mib} MiB: MiB/s, and mean microseconds of a request", columns)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(workplace(options))
        place = targets.Place(folder, options.mib * MIB, options.mib * MIB, also)
        mounts = {name: stack.enter_context(targets.as_file(name, place))[0] for name in names}
        for mount in mounts.values():
            _fio(mount, options, ("write", "1m", 4), whole=True)
        for number in range(options.rounds):
            for job in jobs:
                sample: dict[str, float | None] = {}
                for _, name in in_turns(names[number % len(names) :] + names[: number % len(names)], 1):
                    sample[name], sample[f"{name}_us"] = _fio(mounts[name], options, JOBS[job])
                for name in names[1:]:
                    if (own := sample[name]) is not None and (floor := sample.get("floor")):
                        sample[f"{name}_ratio"] = own / floor
                table.add(job, sample)
                progress(f"round {number + 1}: {job} {sample}")
    table.notes.append(
        f"Content: new for each request, of every 4 KiB {COMPRESS_PERCENT} % zeros and the rest random"
        f" (fio's buffer_compress_percentage={COMPRESS_PERCENT}); direct I/O, libaio; the floor does not compress."
    )
    return [table]


def _fio(mount: Path, options: Options, job: tuple[str, str, int], *, whole: bool = False) -> tuple[float, float]:
    """Run one job, and return its MiB a second and the mean microseconds from a request to its answer."""
    pattern, size, depth = job
    length = [] if whole else ["--time_based", f"--runtime={options.seconds}"]
    command = [
        *(
            "fio",
            "--name=bench",
            f"--filename={mount}/swapfile",
            f"--size={options.mib}m",
            f"--rw={pattern}",
            f"--bs={size}",
        ),
        *(
            "--ioengine=libaio",
            "--direct=1",
            f"--iodepth={depth}",
            "--fallocate=none",
            "--allow_file_create=0",
            *length,
        ),
        *(f"--buffer_compress_percentage={COMPRESS_PERCENT}", "--buffer_compress_chunk=4096", "--refill_buffers=1"),
        *("--norandommap", "--randrepeat=0", "--output-format=json"),
    ]
    said = run(command, cwd=mount.parent)
    (found,) = json.loads(said[said.index("{") :])["jobs"]
    side = found["read" if "read" in pattern else "write"]
    return side["bw_bytes"] / MIB, side["lat_ns"]["mean"] / 1000


BENCHMARK: Final = Benchmark(
    "fio", "requests of 4 KiB to 1 MiB on the file, against a C floor", ("root", "fuse"), add_options, measure
)
