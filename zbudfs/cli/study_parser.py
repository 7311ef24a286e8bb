# SPDX-License-Identifier: MIT
"""The parsers of the commands that look at something: doctor, estimate, trace and top."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Final

from zbudfs.cli import values
from zbudfs.cli.argument_parser import OneLineParser, add_command
from zbudfs.cli.arguments import Later
from zbudfs.service.settings import DEFAULT_LEVEL, DEFAULT_POOL, MAX_LEVEL, MIN_LEVEL

AddCommand = Callable[[str, Later | None, str, str], OneLineParser]
"""Function that adds a command, from its name, function, summary, and the text below its options."""

_DOCTOR_EPILOG: Final = """\
Each line is ok, a warning or a problem. With a warning, zbudfs works less well or less safely than it could. With a problem,
zbudfs does not work, or may hang the machine or lose swapped pages. A line with -> says what to do. The exit status is 1 if
there is a problem. The command changes nothing: it tries things out in a child process, and with a temporary file.

examples:
  zbudfs doctor                                 check the machine for the default settings
  zbudfs doctor swap                            check it for the settings in /etc/zbudfs/swap.toml
  zbudfs doctor --backing /srv/zbudfs.backing   check a place for the backing file
  zbudfs doctor --json
"""

_ESTIMATE_EPILOG: Final = """\
The command reads a random sample of the pages that the kernel could swap out: private writable pages in RAM. It swaps
nothing in, changes nothing, and neither stores nor prints the content of a page. It compresses and packs the pages with the
code of the daemon, so a pool would hold as many pages as the result says.

examples:
  sudo zbudfs estimate --all                         for all processes: does zbudfs pay on this machine?
  zbudfs estimate $(pgrep -u $USER firefox)          for one program
  zbudfs estimate --all --pool 2G --levels -3,-1,1,3 compare compression levels
  zbudfs estimate --file core.1234                   for the writable memory in a core dump, or the pages of any other file
  zbudfs estimate --all --json | jq '.levels[0].packings.zbud.zpages_per_frame'
"""

_TRACE_EPILOG: Final = """\
A trace holds times, page numbers, counts and the compressed sizes of pages. It holds no content of pages and no names.

examples:
  zbudfs trace record --seconds 60 -o storm.zbt /mnt/zswap
  zbudfs trace show storm.zbt
  zbudfs trace replay --pool 512M,1G,2G storm.zbt

For more, see `zbudfs trace COMMAND --help`. docs/use/reference.md describes the file.
"""

_RECORD_EPILOG: Final = """\
The daemon writes records to a ring in shared memory, and this command copies them to the file. The daemon never waits for
the command: records that come too fast are lost, and counted. Ctrl-C ends the recording and leaves a complete file.

examples:
  zbudfs trace record --seconds 60 -o storm.zbt /mnt/zswap
  zbudfs trace record --max 16M -o last.zbt /mnt/zswap      until Ctrl-C, keep the last few million requests
"""

_SHOW_EPILOG: Final = """\
The working set is the set of pages that are read or written in a stretch of time. A pool that holds the working set hardly
reads from the disk. zbudfs estimate shows how much RAM that takes.

examples:
  zbudfs trace show storm.zbt
  zbudfs trace show --plot storm.svg storm.zbt
"""

_REPLAY_EPILOG: Final = """\
The command gives the requests to the store of the daemon, as fast as the store takes them. The pages are generated, with
the recorded sizes, and each page that is read is compared. Every combination of the given settings is replayed:

  hits       share of the read pages that needed no disk       to disk    bytes written back
  from disk  bytes read back                                   refused    pages for which there was no room
  a frame    pages in a frame, without same-filled pages       CPU        CPU time for a page read or written

examples:
  zbudfs trace replay --pool 256M,512M,1G storm.zbt
  zbudfs trace replay --watermark 2%:5%,10%:20% --backing none storm.zbt
  zbudfs trace replay --packing zbud,dense --level -1,3 storm.zbt
"""

_TOP_EPILOG: Final = """\
top reads the stats/ of the mount. The keys that change a setting write its control/, which needs root. top needs the library
textual (on Debian: python3-textual). If it is missing, the command prints how to install it.

keys:
  q         quit                        s    type KEY=VALUE to set (see zbudfs set)
  Tab       show the next mount         w    write all pages back now
  + -       raise or lower pool limit   d    drop clean copies of blocks on the disk
  ] [       raise or lower zstd level   b    turn writeback on or off

A figure with the mark ! is near its limit, one with !! is failing. The colours are those of the terminal; with NO_COLOR in
the environment there are none. Latencies are those of the last ten updates, as upper bounds in powers of two.

examples:
  sudo zbudfs top
  zbudfs top --picture now.svg --after 30 /mnt/zswap    draw a picture of the next 30 seconds
"""


def add_doctor(command: AddCommand) -> None:
    """Add the command with `command(name, run, summary, epilog)`, which returns a parser."""
    sub = command(
        "doctor",
        Later("doctor.command", "doctor"),
        "check whether this machine is ready for zbudfs, and say what to do if it is not",
        _DOCTOR_EPILOG,
    )
    sub.add_argument("--json", action="store_true", help="print one object")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--backing", metavar="FILE|none", help="check this place for the backing file")
    what.add_argument(
        "name", metavar="NAME", nargs="?", help="check the configuration NAME (default: the default settings)"
    )
    sub.add_argument(
        "--root",
        type=values.folder,
        default="/",
        metavar="DIR",
        help="check the system whose root folder is DIR (default: /)",
    )


def add_estimate(command: AddCommand) -> None:
    """Add the command estimate."""
    sub = command(
        "estimate",
        Later("estimate", "estimate"),
        "measure how well memory compresses, without a mount and without any change",
        _ESTIMATE_EPILOG,
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--all", action="store_true", help="sample the memory of all processes (processes of other users need root)"
    )
    what.add_argument(
        "--file",
        type=values.file_name,
        metavar="FILE",
        help="sample the pages of a file, or the memory in a core dump",
    )
    what.add_argument(
        "pids", nargs="*", type=values.pid, default=[], metavar="PID", help="sample the memory of these processes"
    )
    sub.add_argument(
        "--sample",
        type=values.some_size,
        metavar="SIZE",
        help="size of the random sample (default: 64M, or all pages if there are fewer)",
    )
    sub.add_argument(
        "--seed", type=values.seed, default=1, metavar="N", help="seed of the random sample (default: %(default)s)"
    )
    sub.add_argument(
        "--levels",
        type=values.each(values.compared_level),
        metavar="N,N,...",
        help=f"zstd levels to compare, {MIN_LEVEL} (fast) to {MAX_LEVEL} (small), not 0 (default: {DEFAULT_LEVEL})",
    )
    sub.add_argument(
        "--pool",
        type=values.size_or_percent,
        metavar="SIZE|PERCENT",
        help=f"size of the pool whose saving is computed (default: {DEFAULT_POOL.replace('%', '%%')} of RAM)",
    )
    _add_output(sub)


def add_trace(command: AddCommand) -> None:
    """Add the command trace, with its own commands."""
    sub = command(
        "trace",
        None,
        "record the requests of a mount, show them, and replay them",
        _TRACE_EPILOG,
    )
    trace_command = partial(
        add_command, sub.add_subparsers(title="commands", metavar="COMMAND", required=True, help="command on a trace")
    )
    part = trace_command(
        "record", Later("trace_record", "record"), "record the requests of a mount to a file", _RECORD_EPILOG
    )
    part.add_argument(
        "-o",
        "--output",
        type=values.file_name,
        required=True,
        metavar="FILE",
        help="file to write; an existing file is replaced",
    )
    part.add_argument(
        "--seconds", type=values.seconds, metavar="N", help="seconds until the recording ends (default: until Ctrl-C)"
    )
    part.add_argument(
        "--max",
        type=values.some_size,
        metavar="SIZE",
        help="largest size of the file, 1M or more; after that, new records replace the oldest (default: 64M)",
    )
    part.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory on which the zbudfs is mounted")

    part = trace_command(
        "show", Later("trace_show", "show"), "show a summary of a trace, and its working set over time", _SHOW_EPILOG
    )
    _add_output(part)
    part.add_argument("trace", type=values.file_name, metavar="FILE", help="trace that trace record has written")

    part = trace_command(
        "replay",
        Later("trace_replay", "replay_trace"),
        "replay a trace without a mount, to compare settings",
        _REPLAY_EPILOG,
    )
    part.add_argument(
        "--pool",
        dest="pools",
        type=values.each(values.size_or_percent),
        metavar="SIZE,...",
        help="pool sizes to compare; a percentage is a share of RAM (default: as recorded)",
    )
    part.add_argument(
        "--level",
        dest="levels",
        type=values.each(values.compared_level),
        metavar="N,...",
        help="zstd levels to compare (default: as recorded)",
    )
    part.add_argument(
        "--packing",
        dest="packings",
        type=values.each(values.packing),
        metavar="PACKING,...",
        help="packings to compare: zbud, dense or dense:N (default: as recorded)",
    )
    part.add_argument(
        "--watermark",
        dest="watermarks",
        type=values.each(values.watermarks),
        metavar="LOW:HIGH,...",
        help="free room below which writeback starts, and at which it stops; a percentage is a share of the pool (default:"
        " those of the daemon)",
    )
    part.add_argument(
        "--backing",
        metavar="DIR|none",
        help="folder for the backing file of the replay (default: /var/tmp, or none if the recorded mount had none)",
    )
    part.add_argument(
        "--seed",
        type=values.seed,
        default=1,
        metavar="N",
        help="seed of the generated pages (default: %(default)s)",
    )
    part.add_argument("--json", action="store_true", help="print a list of objects, one for each combination")
    part.add_argument("trace", type=values.file_name, metavar="FILE", help="trace that trace record has written")


def add_top(command: AddCommand) -> None:
    """Add the command top."""
    sub = command("top", Later("top", "top"), "show a mount live on the full screen of the terminal", _TOP_EPILOG)
    sub.add_argument(
        "--interval",
        dest="look_seconds",
        type=values.seconds,
        default=1.0,
        metavar="N",
        help="seconds between two updates (default: %(default)g)",
    )
    sub.add_argument(
        "--picture",
        type=values.picture(".svg"),
        metavar="FILE.svg",
        help="draw the screen to a file and end; needs no terminal",
    )
    sub.add_argument(
        "--after",
        dest="picture_seconds",
        type=values.seconds,
        metavar="N",
        help="seconds until --picture draws (default: 10)",
    )
    sub.add_argument(
        "one_mountpoint",
        metavar="MOUNTPOINT",
        nargs="?",
        help="directory (default: the first mount; Tab shows the next)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one object, sizes in bytes")
    parser.add_argument(
        "--plot",
        type=values.picture(".svg", ".png"),
        metavar="FILE",
        help="draw a plot too, to a file that ends in .svg or .png",
    )
