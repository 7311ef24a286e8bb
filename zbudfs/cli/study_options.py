# SPDX-License-Identifier: MIT
"""The words of the commands that look and change nothing: estimate. What they run is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from zbudfs.cli import values
from zbudfs.cli.arguments import Arguments
from zbudfs.service.settings import DEFAULT_LEVEL, DEFAULT_POOL, MAX_LEVEL, MIN_LEVEL

AddCommand = Callable[[str, Callable[[Arguments], int], str, str], argparse.ArgumentParser]
"""Makes a command: name, what it runs, summary, and what stands below its options."""

_ESTIMATE_EPILOG: Final = """\
It reads a random sample of what the kernel could swap out: private writable pages that are in RAM. Nothing is brought
back from swap, nothing is changed, and no content is kept or shown. The pages are compressed and packed by zbudfs's own
code, so the result is what a pool would hold.

examples:
  sudo zbudfs estimate --all                         would zbudfs pay on this machine?
  zbudfs estimate $(pgrep -u $USER firefox)          for one program
  zbudfs estimate --all --pool 2G --levels -3,-1,1,3 which level, in how much time
  zbudfs estimate --file core.1234                   writable memory of a core dump; any other file as pages
  zbudfs estimate --all --json | jq '.levels[0].packings.zbud.zpages_per_frame'
"""


def add_estimate(command: AddCommand) -> None:
    """Add the command estimate."""
    sub = command(
        "estimate",
        _estimate,
        "tell how memory would compress and pair, before anything is installed or changed",
        _ESTIMATE_EPILOG,
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--all", action="store_true", help="look at all processes (those of others: as root)")
    what.add_argument("--file", metavar="FILE", help="look at the pages of a file, or at the memory in a core dump")
    what.add_argument(
        "pids", nargs="*", type=values.pid, default=[], metavar="PID", help="look at the memory of these processes"
    )
    sub.add_argument(
        "--sample",
        type=values.some_size,
        metavar="SIZE",
        help="how much of it is read, at random (default: 64M; as much as there is, if that is less)",
    )
    sub.add_argument(
        "--seed", type=values.seed, default=1, metavar="N", help="draw another sample (default: %(default)s)"
    )
    sub.add_argument(
        "--levels",
        type=values.levels,
        metavar="N,N,...",
        help=f"zstd levels to compare, {MIN_LEVEL} (fast) to {MAX_LEVEL} (small) without 0 (default: {DEFAULT_LEVEL})",
    )
    sub.add_argument(
        "--pool",
        type=values.size_or_percent,
        metavar="SIZE|PERCENT",
        help=f"pool to tell the saving for (default: {DEFAULT_POOL.replace('%', '%%')} of RAM)",
    )
    _add_output(sub)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one object, sizes in bytes")
    parser.add_argument(
        "--plot", type=values.plot_file, metavar="FILE", help="draw it as well, to a file that ends in .svg or .png"
    )


def _estimate(arguments: Arguments) -> int:
    from zbudfs.cli.estimate import estimate

    return estimate(arguments)
