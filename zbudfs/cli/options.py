# SPDX-License-Identifier: MIT
"""The words of the command line, and help that teaches by example.

Values are checked where they are read, so that a bad one is a usage error (exit status 2) before anything is done.
What depends on the machine, such as a percentage of its RAM, is worked out in `commands`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from zbudfs import __version__
from zbudfs.cli import commands, hibernate, unit, values
from zbudfs.cli.arguments import MOUNT_OPTIONS, Arguments
from zbudfs.cli.config import FOLDER
from zbudfs.cli.doctor.command import add_doctor
from zbudfs.cli.exporter import listen_address
from zbudfs.cli.expression import EXPRESSION_GRAMMAR
from zbudfs.cli.keys import KEYS
from zbudfs.cli.stripe import MAX_INSTANCES
from zbudfs.cli.study_options import add_estimate, add_top, add_trace
from zbudfs.cli.suggest import did_you_mean
from zbudfs.core.packing import DENSE, Packing
from zbudfs.core.sizes import GRAMMAR
from zbudfs.core.tunables import TUNABLES
from zbudfs.service.settings import (
    BACKING_FOLDER,
    DEFAULT_LEVEL,
    DEFAULT_PACKING,
    DEFAULT_POOL,
    MAX_LEVEL,
    MIN_LEVEL,
    SettingsError,
)
from zbudfs.swap.priority import DEFAULT_PRIORITY, MAX_PRIORITY

_EPILOG: Final = """\
examples:
  zbudfs swapon /mnt/zswap                      compressed swap as large as RAM, a quarter of RAM for its pool
  zbudfs status                                 what is stored, and what that takes
  zbudfs top                                    the same and more, live
  zbudfs swapoff --umount /mnt/zswap            all of it away again

  zbudfs mount --size 8G --pool 1G /mnt/zswap   only the file /mnt/zswap/swapfile, to do with as you like
  zbudfs mount --backing none /mnt/zswap        in RAM alone, nothing is ever written to disk
  zbudfs umount /mnt/zswap                      what was stored is gone after that

  zbudfs doctor                                 is this machine ready for it?
  zbudfs estimate --all                         how would this machine's memory compress? changes nothing
  zbudfs trace record -o storm.zbt /mnt/zswap   record requests; trace show and trace replay look at them

The mountpoint is a directory that exists. What changes something needs root. `zbudfs COMMAND --help` tells more.
"""

_MOUNT_EPILOG: Final = f"""\
A SIZE is {GRAMMAR}.

What does not fit into the pool is written, still compressed, to the backing file. It grows as needed, to a little more
than SIZE at most, and is emptied at umount.
"""


_EXPORTER_EPILOG: Final = """\
Needs the package prometheus-client: pip install 'zbudfs[exporter]'. It need not run as root. A mount whose daemon does not
answer is zbudfs_up 0, and does not hold up the others. docs/monitoring.md has alerts and a dashboard.

examples:
  zbudfs exporter --listen :9824                on all addresses
  zbudfs exporter --textfile /var/lib/prometheus/node-exporter/zbudfs.prom --interval 15
"""

WATCH_SECONDS: Final = 2.0


def one_line(text: str) -> str:
    """Return an error's text with what is not printable escaped: a line stays one, and no terminal is told anything else."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class OneLineParser(argparse.ArgumentParser):
    """Tells errors in one line, like every other error of this program."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # No option of ours starts with a digit, so "-3,-1,1" is a value, as "-3" is.
        self._negative_number_matcher = re.compile(r"-\d")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; an unknown option is an error of its own, told before its value is taken for something else."""
        args = sys.argv[1:] if args is None else list(args)
        for word in args:
            option = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # what follows are no options, or those of a command
            if re.fullmatch(r"--.+|-[^-\d.]", option, re.DOTALL) and option not in self._option_string_actions:
                self.error(f"{option!r} is no option of {self.prog}: {did_you_mean(option, self._known_options())}")
        return super().parse_known_args(args, namespace)

    def _known_options(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """See that a word is one of those that are allowed; for a command the error names the nearest."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"{value!r} is no command of {self.prog}: {did_you_mean(value, list(action.choices))}")
        if action.choices is not None and value not in action.choices:
            self.error(f"{value!r} is not one of the words {', '.join(map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        """Tell what was typed wrongly, and end with exit status 2."""
        message = message.replace("unrecognized arguments:", "there are more words than this command takes:")
        print(f"zbudfs: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


_SERVE_EPILOG: Final = """\
The process that was started becomes the daemon, and tells the service manager how things stand (sd_notify). Started again
after a crash, or after SIGTERM while the swap file is open, it takes over what is still there: the mount, what is
stored, and the worker that served meanwhile. zbudfs@.service runs this; by hand, zbudfs mount is what you want.
"""

_HIBERNATE_EPILOG: Final = """\
prepare takes the swap on every zbudfs off. It fails, with nothing changed, where memory has no room for what comes back, and
where no other swap can hold the image. finish turns the same swap on again. Under systemd, zbudfs-hibernate.service runs both.

examples:
  zbudfs hibernate prepare && echo disk > /sys/power/state; zbudfs hibernate finish     without systemd
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; what it gives is an `Arguments` whose `run` is the command."""
    parser = OneLineParser(
        prog="zbudfs",
        description="Compressed swap: a file system whose one file keeps its pages compressed in RAM, several to a frame,"
        " and writes the cold ones to disk.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zbudfs {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Arguments], int], summary: str, epilog: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("mount", commands.mount, "mount a zbudfs and return when it is up", _MOUNT_EPILOG)
    _add_mount_options(sub)
    sub.add_argument("--foreground", action="store_true", help="stay at the terminal until Ctrl-C, and log to it")
    sub.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory to mount on")

    sub = command(
        "umount",
        commands.umount,
        "unmount a zbudfs; what it stored is gone and its backing file is emptied",
        "It refuses while swap or a loop device is on it. If the daemon has died, this cleans up after it.\n",
    )
    sub.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory that it is mounted on")

    sub = command(
        "swapon",
        _mountpoint_or_config(commands.swapon, unit.swapon),
        "make a zbudfs active swap, mounting it first if need be",
        _MOUNT_EPILOG + "\nIf a step fails, the steps before it are undone.\n",
    )
    _add_mount_options(sub)
    sub.add_argument(
        "--priority",
        type=_priority,
        metavar="N",
        help=f"0 to {MAX_PRIORITY}, the highest is filled first (default: {DEFAULT_PRIORITY}, or what lies above all other swap"
        " and below zram)",
    )
    _add_mountpoint_or_config(sub)

    sub = command(
        "swapoff",
        _mountpoint_or_config(commands.swapoff, unit.swapoff),
        "read everything back to RAM and end the swap on a zbudfs",
        "If RAM is too short for what would come back, it fails and leaves everything running.\n",
    )
    sub.add_argument("--umount", action="store_true", help="unmount it as well")
    sub.add_argument("--force", action="store_true", help="try it even if RAM seems to be too short")
    _add_mountpoint_or_config(sub)

    sub = command(
        "restart",
        commands.restart,
        "have this version of zbudfs take over a running mount; swap stays on",
        "What is stored stays where it is. If this version cannot take over, the running one goes on.\n",
    )
    sub.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory that it is mounted on")

    sub = command(
        "status",
        commands.status,
        "tell what is stored, what it takes, and what the system refused",
        "The speeds are those of half a second, or of the time between two looks with --watch. Exit status 1 if a daemon does"
        " not answer.\n\n"
        "examples:\n"
        "  zbudfs status\n"
        "  zbudfs status --watch                                every two seconds, until Ctrl-C\n"
        "  zbudfs status --json /mnt/zswap | jq .pool_used_bytes\n"
        "  zbudfs status --json --watch 60 /mnt/zswap >> log    a line a minute\n",
    )
    sub.add_argument(
        "--watch",
        type=_seconds_or_mountpoint,
        nargs="?",
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"look again and again (default: every {WATCH_SECONDS:g} s), until Ctrl-C",
    )
    sub.add_argument(
        "--json", action="store_true", help="print one object, or a list of objects if no MOUNTPOINT is given"
    )
    sub.add_argument("one_mountpoint", metavar="MOUNTPOINT", nargs="?", help="directory (default: every zbudfs)")

    sub = command(
        "set",
        commands.set_,
        "change a zbudfs while it runs, and tell what is in force",
        _set_epilog(),
    )
    sub.usage = "zbudfs set [-h] [--json] [KEY=VALUE ...] MOUNTPOINT"
    sub.add_argument("--json", action="store_true", help="print one object with everything that can be set")
    sub.add_argument(
        "words",
        metavar="WORD",
        nargs="+",
        help="what to change, and where; without a KEY=VALUE everything is listed",
    )

    sub = command(
        "exporter",
        commands.exporter,
        "give the numbers of all mounts to Prometheus",
        _EXPORTER_EPILOG,
    )
    where = sub.add_mutually_exclusive_group()
    where.add_argument(
        "--listen",
        type=_listen_address,
        metavar="ADDR:PORT",
        help="answer scrapes there, over HTTP, until SIGTERM or Ctrl-C (default: localhost:9824)",
    )
    where.add_argument(
        "--textfile",
        type=values.file_name,
        metavar="FILE",
        help="write a file for node_exporter's textfile collector instead",
    )
    sub.add_argument("--interval", type=_seconds, metavar="SECONDS", help="write FILE again and again (default: once)")
    sub.add_argument("mountpoints", metavar="MOUNTPOINT", nargs="*", help="directory (default: every zbudfs)")

    sub = command(
        "serve",
        unit.serve,
        "become the daemon of a configuration, for a service manager",
        _SERVE_EPILOG,
    )
    sub.add_argument("name", metavar="NAME", help=f"of the configuration, {FOLDER}/NAME.toml")

    sub = command(
        "hibernate",
        hibernate.hibernate,
        "take swap off before the machine hibernates, and put it back",
        _HIBERNATE_EPILOG,
    )
    sub.add_argument("step", choices=("prepare", "finish"), help="before, and afterwards")

    sub = command(
        "config",
        commands.config,
        "tell what is configured, and where each value comes from",
        _config_epilog(),
    )
    sub.add_argument("--check", action="store_true", help="tell only what is wrong; exit status 1 if anything is")
    sub.add_argument("--json", action="store_true", help="print one object, or a list of objects if no NAME is given")
    sub.add_argument(
        "--root",
        type=values.folder,
        default="/",
        metavar="DIR",
        help="look at the system whose / is DIR (default: this one)",
    )
    sub.add_argument("name", metavar="NAME", nargs="?", help="of the configuration (default: all)")

    add_doctor(command)
    add_estimate(command)
    add_trace(command)
    add_top(command)
    return parser


def _set_epilog() -> str:
    """List the keys, as the daemon has them."""
    width = max(len(tunable.name) for tunable in TUNABLES)
    keys = "".join(f"  {tunable.name:{width}}  {tunable.meaning}\n" for tunable in TUNABLES)
    return f"""\
It holds until the unmount, crashes and restarts of the daemon included. Each key is a file in MOUNTPOINT/control/ as well.
Either all values are right or nothing is changed.

keys:
{keys}
A number of bytes is {GRAMMAR}.

examples:
  zbudfs set /mnt/zswap                                        what can be set, and how it is
  zbudfs set pool_limit_bytes=64M level=3 /mnt/zswap           a smaller pool, and smaller zpages
  zbudfs set writeback_budget_bytes_per_day=20G /mnt/zswap     go easy on flash
  zbudfs set writeback_enabled=0 writeback=all /mnt/zswap      write back only when told to, and now
"""


def _config_epilog() -> str:
    """List the keys, as the list that they are read from has them."""
    width = max(len(key.name) for key in KEYS)
    keys = "".join(f"  {key.name:{width}}  {key.summary} ({key.kind}; default: {key.default})\n" for key in KEYS)
    return f"""\
{FOLDER}/NAME.toml is read first, then the files in NAME.toml.d/ that end in .toml, in the order of their names; the
last to say something about a key wins. What is printed is TOML again, with every value worked out.

keys:
{keys}
An amount is {EXPRESSION_GRAMMAR}.

examples:
  zbudfs config swap                            for {FOLDER}/swap.toml
  zbudfs config --json swap | jq .values.size
  zbudfs config --check                         are all files in order?
"""


def _add_mountpoint_or_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="NAME", help=f"what {FOLDER}/NAME.toml says, instead of MOUNTPOINT and options"
    )
    parser.add_argument(
        "mountpoint", metavar="MOUNTPOINT", nargs="?", help="directory that it is, or will be, mounted on"
    )


def _mountpoint_or_config(
    typed: Callable[[Arguments], int], configured: Callable[[Arguments], int]
) -> Callable[[Arguments], int]:
    """Choose by which of the two is there; exactly one must be."""

    def run(arguments: Arguments) -> int:
        if (arguments.mountpoint is None) == (arguments.config is None):
            raise SettingsError("write either MOUNTPOINT or --config NAME")
        given = [name for name in (*MOUNT_OPTIONS, "priority") if getattr(arguments, name, None) is not None]
        if arguments.config is not None and given:
            raise SettingsError(f"--{given[0].replace('_', '-')} does not go with --config: write it into the file")
        return typed(arguments) if arguments.config is None else configured(arguments)

    return run


def _add_mount_options(parser: argparse.ArgumentParser) -> None:
    """Add what mount and swapon have in common."""
    parser.add_argument(
        "--size",
        type=values.size,
        metavar="SIZE",
        help="size of the swap file, in whole pages of 4096 bytes (default: RAM)",
    )
    parser.add_argument(
        "--pool",
        type=values.size_or_percent,
        metavar="SIZE|PERCENT",
        help=f"most RAM for what is stored; a percentage is one of RAM (default: {DEFAULT_POOL.replace('%', '%%')})",
    )
    parser.add_argument(
        "--backing",
        metavar="FILE|DEVICE|none",
        help=f"where cold frames are written (default: a file in {BACKING_FOLDER}, named after the mountpoint)",
    )
    parser.add_argument(
        "--force-backing",
        type=_switch,
        metavar="yes|no",
        help="take a backing that is refused otherwise: one that others could change, that holds foreign data, which is"
        " destroyed, or that lies on FUSE or a network (default: no)",
    )
    parser.add_argument(
        "--level",
        type=values.level,
        metavar="N",
        help=f"zstd level, {MIN_LEVEL} (fast) to {MAX_LEVEL} (small), not 0 (default: {DEFAULT_LEVEL})",
    )
    parser.add_argument(
        "--encrypt",
        type=_switch,
        metavar="yes|no",
        help="encrypt what is written to the backing file, with a key that nobody ever sees (default: yes)",
    )
    parser.add_argument(
        "--packing",
        type=_packing,
        metavar="zbud|dense[:N]",
        help="zbud: two pages to a frame, fast; dense: up to N, from 2 to 7, for half the RAM where pages are small"
        f" (default: {DEFAULT_PACKING}; dense alone is {DENSE})",
    )
    parser.add_argument(
        "--instances",
        type=_instances,
        metavar="N",
        help="divide size and pool among N daemons, mounted on MOUNTPOINT/0, MOUNTPOINT/1 ..., whose swap the kernel"
        " fills in turns (default: 1, mounted on MOUNTPOINT itself)",
    )


def _seconds(text: str) -> float:
    try:
        seconds = values.number(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds: write one from 0.1 to 86400")
    return seconds


def _seconds_or_mountpoint(text: str) -> float | str:
    """Return a path as it is: `status --watch MOUNTPOINT` leaves the seconds out."""
    return text if "/" in text else _seconds(text)


def _listen_address(text: str) -> tuple[str, int]:
    try:
        return listen_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _switch(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no: write one of them")
    return text == "yes"


def _packing(text: str) -> str:
    try:
        return str(Packing.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _instances(text: str) -> int:
    return values.whole_number(text, "a number of instances", 1, MAX_INSTANCES)


def _priority(text: str) -> int:
    return values.whole_number(text, "a priority", 0, MAX_PRIORITY)
