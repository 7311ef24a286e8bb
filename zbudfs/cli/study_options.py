# SPDX-License-Identifier: MIT
"""The words of the commands that look at things: estimate, trace and top. What they run is imported when it is run."""

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

_TRACE_EPILOG: Final = """\
A trace holds times, page numbers, counts and how large pages are compressed; never what is in them, and no names.

examples:
  zbudfs trace record --seconds 60 -o storm.zbt /mnt/zswap
  zbudfs trace show storm.zbt
  zbudfs trace replay --pool 512M,1G,2G storm.zbt

`zbudfs trace COMMAND --help` tells more; docs/trace-format.md is about the file.
"""

_RECORD_EPILOG: Final = """\
What the daemon serves is copied from a ring in shared memory: it never waits for this command. What comes faster than
it is read is lost, and counted. Ctrl-C ends the recording; the file is whole then.

examples:
  zbudfs trace record --seconds 60 -o storm.zbt /mnt/zswap
  zbudfs trace record --max 16M -o last.zbt /mnt/zswap      the last few million requests, until Ctrl-C
"""

_SHOW_EPILOG: Final = """\
The working set are the different pages read or written in a stretch of time: a pool that holds it (see zbudfs estimate
for how much that is in RAM) hardly reads from disk.

examples:
  zbudfs trace show storm.zbt
  zbudfs trace show --plot storm.svg storm.zbt
"""

_REPLAY_EPILOG: Final = """\
The requests are given to zbudfs's own store as fast as it takes them, with made-up pages of the recorded sizes, and every
page that is read is compared. Every combination of what is given is tried:

  hits       share of the pages read that needed no disk       to disk    written back
  from disk  read back                                         refused    pages that found no room
  a frame    pages to a frame, not counting same-filled ones   CPU        for a page read or written

examples:
  zbudfs trace replay --pool 256M,512M,1G storm.zbt
  zbudfs trace replay --watermark 2%:5%,10%:20% --backing none storm.zbt
  zbudfs trace replay --packing zbud,dense --level -1,3 storm.zbt
"""

_TOP_EPILOG: Final = """\
It reads the mount's stats/ and, when told to, writes its control/ (as root); the daemon carries nothing of it. It needs
textual: pip install 'zbudfs[top]'.

keys:
  q         quit                        s    type KEY=VALUE to be set (see zbudfs set)
  Tab       next mount                  w    write everything back now
  + -       pool limit up and down      d    drop clean copies of what is on disk
  ] [       zstd level up and down      b    writeback on and off

Latencies are of the last ten looks, as upper bounds in powers of two.

examples:
  sudo zbudfs top
  zbudfs top --picture now.svg --after 30 /mnt/zswap    a picture of the next 30 seconds, to send or to keep
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
    what.add_argument(
        "--file",
        type=values.file_name,
        metavar="FILE",
        help="look at the pages of a file, or at the memory in a core dump",
    )
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


def add_trace(command: AddCommand) -> None:
    """Add the command trace, with its own commands."""
    sub = command(
        "trace",
        _no_command,
        "record what is asked of a mount, look at it, and replay it",
        _TRACE_EPILOG,
    )
    commands = sub.add_subparsers(title="commands", metavar="COMMAND", required=True, help="what to do with a trace")

    def trace_command(name: str, run: Callable[[Arguments], int], summary: str, epilog: str) -> argparse.ArgumentParser:
        part = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        part.set_defaults(run=run)
        return part

    part = trace_command("record", _trace_record, "record the requests of a mount to a file", _RECORD_EPILOG)
    part.add_argument(
        "-o",
        "--output",
        type=values.file_name,
        required=True,
        metavar="FILE",
        help="file to write; one that is there is replaced",
    )
    part.add_argument("--seconds", type=values.seconds, metavar="N", help="how long (default: until Ctrl-C)")
    part.add_argument(
        "--max",
        type=values.some_size,
        metavar="SIZE",
        help="largest size of the file, 1M or more; then the newest overwrites the oldest (default: 64M)",
    )
    part.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory that it is mounted on")

    part = trace_command("show", _trace_show, "tell what is in a trace, and how the working set went", _SHOW_EPILOG)
    _add_output(part)
    part.add_argument("trace", type=values.file_name, metavar="FILE", help="what trace record has written")

    part = trace_command("replay", _trace_replay, "replay a trace without a mount, to compare settings", _REPLAY_EPILOG)
    part.add_argument(
        "--pool",
        dest="pools",
        type=values.pools,
        metavar="SIZE,...",
        help="pools to compare; a percentage is one of RAM (default: as recorded)",
    )
    part.add_argument(
        "--level",
        dest="levels",
        type=values.levels,
        metavar="N,...",
        help="zstd levels to compare (default: as recorded)",
    )
    part.add_argument(
        "--packing",
        dest="packings",
        type=values.packings,
        metavar="PACKING,...",
        help="packings to compare: zbud, dense or dense:N (default: as recorded)",
    )
    part.add_argument(
        "--watermark",
        dest="watermarks",
        type=values.watermarks,
        metavar="LOW:HIGH,...",
        help="free room below which writeback starts, and at which it stops; a percentage is one of the pool (default: the"
        " daemon's)",
    )
    part.add_argument(
        "--backing",
        metavar="DIR|none",
        help="folder for a backing file during the replay (default: /var/tmp, or none if there was none)",
    )
    part.add_argument(
        "--seed",
        type=values.seed,
        default=1,
        metavar="N",
        help="make other pages of the same sizes (default: %(default)s)",
    )
    part.add_argument("--json", action="store_true", help="print a list of objects, one for each combination")
    part.add_argument("trace", type=values.file_name, metavar="FILE", help="what trace record has written")


def add_top(command: AddCommand) -> None:
    """Add the command top."""
    sub = command("top", _top, "show a mount live, on all of the terminal", _TOP_EPILOG)
    sub.add_argument(
        "--interval",
        dest="look_seconds",
        type=values.seconds,
        default=1.0,
        metavar="N",
        help="seconds between looks (default: %(default)g)",
    )
    sub.add_argument(
        "--picture",
        type=values.svg_file,
        metavar="FILE.svg",
        help="draw what it shows to a file and end; needs no terminal",
    )
    sub.add_argument(
        "--after",
        dest="picture_seconds",
        type=values.seconds,
        default=10.0,
        metavar="N",
        help="seconds until the picture is drawn (default: %(default)g)",
    )
    sub.add_argument(
        "one_mountpoint", metavar="MOUNTPOINT", nargs="?", help="directory (default: the first; Tab changes)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one object, sizes in bytes")
    parser.add_argument(
        "--plot", type=values.plot_file, metavar="FILE", help="draw it as well, to a file that ends in .svg or .png"
    )


def _no_command(_: Arguments) -> int:
    raise AssertionError("trace has commands of its own")


def _trace_record(arguments: Arguments) -> int:
    from zbudfs.cli.trace_record import record

    return record(arguments)


def _trace_show(arguments: Arguments) -> int:
    from zbudfs.cli.trace_show import show

    return show(arguments)


def _trace_replay(arguments: Arguments) -> int:
    from zbudfs.cli.trace_replay import replay_trace

    return replay_trace(arguments)


def _top(arguments: Arguments) -> int:
    from zbudfs.cli.top import top

    return top(arguments)


def _estimate(arguments: Arguments) -> int:
    from zbudfs.cli.estimate import estimate

    return estimate(arguments)
