# SPDX-License-Identifier: MIT
"""The parser of the command line, and the help of each command, with examples.

The parser checks the values, so that a wrong value is a usage error (exit status 2) before a command has done anything.
"""

from __future__ import annotations

import argparse
import functools
import textwrap
from typing import Any, Final

from zbudfs import __version__
from zbudfs.cli import values
from zbudfs.cli.argument_parser import OneLineParser, add_command
from zbudfs.cli.arguments import Later
from zbudfs.cli.expression import EXPRESSION_GRAMMAR
from zbudfs.cli.option_table import BY_NAME, FOLDER, OPTIONS, Option, Value, typed
from zbudfs.cli.study_parser import add_doctor, add_estimate, add_top, add_trace
from zbudfs.core.sizes import GRAMMAR
from zbudfs.core.tunables import TUNABLES
from zbudfs.service.settings import check_number, ram_bytes

_EPILOG: Final = """\
examples:
  zbudfs swapon /mnt/zswap                      turn on compressed swap: as large as RAM, with a pool of a quarter of RAM
  zbudfs status                                 show the stored pages, and the memory that they take
  zbudfs top                                    show the same and more, live
  zbudfs swapoff --umount /mnt/zswap            turn the swap off, and unmount

  zbudfs mount --size 8G --pool 1G /mnt/zswap   mount only: provide the file /mnt/zswap/swapfile, for any use
  zbudfs mount --backing none /mnt/zswap        store in RAM alone, and write nothing to a disk
  zbudfs umount /mnt/zswap                      unmount: the stored pages are lost

  zbudfs doctor                                 check whether this machine is ready for zbudfs
  zbudfs estimate --all                         measure how the memory of this machine compresses; changes nothing
  zbudfs trace record -o storm.zbt /mnt/zswap   record the requests of a mount, for trace show and trace replay

MOUNTPOINT is an existing directory. A command that changes something needs root. For more, see `zbudfs COMMAND --help`.
"""

_MOUNT_EPILOG: Final = f"""\
A SIZE is {GRAMMAR}.

When the pool is nearly full, the daemon writes the coldest pages, still compressed, to the backing file. The file grows as
needed, to a little more than SIZE at most, and is emptied at umount.
"""


_EXPORTER_EPILOG: Final = """\
The exporter needs the library prometheus-client (on Debian: python3-prometheus-client). If it is missing, the command
prints how to install it. The exporter need not run as root: as another user it exports the public statistics. A mount
whose daemon does not answer is zbudfs_up 0, and does not delay the others. docs/use/tools.md has alerts and a dashboard.

examples:
  zbudfs exporter --listen :9824                listen on all addresses
  zbudfs exporter --textfile /var/lib/prometheus/node-exporter/zbudfs.prom --interval 15
"""

WATCH_SECONDS: Final = 2.0


_SERVE_EPILOG: Final = """\
The process itself becomes the daemon, and reports its state to the service manager (sd_notify). If it is started again
after a crash, or after SIGTERM while the swap file is open, it takes over the mount, the stored pages, and the worker that
served meanwhile. zbudfs@.service runs this command. To mount by hand, use zbudfs mount.
"""

_HIBERNATE_EPILOG: Final = """\
prepare turns off the swap on every zbudfs. It fails, with nothing changed, if RAM has no room for the swapped pages, or if
no other swap can hold the image. finish turns the same swap on again. With systemd, zbudfs-hibernate.service runs both.

examples:
  zbudfs hibernate prepare && echo disk > /sys/power/state; zbudfs hibernate finish     without systemd
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser. It fills in an `Arguments` whose `run` is the function of the command."""
    parser = OneLineParser(
        prog="zbudfs",
        description="zbudfs is compressed swap: a file system with one file, whose pages it keeps compressed in RAM. It\n"
        "writes the coldest pages to a disk.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"zbudfs {__version__}")
    command = functools.partial(add_command, parser.add_subparsers(title="commands", metavar="COMMAND", required=True))

    sub = command("mount", Later("commands", "mount"), "mount a zbudfs, and return when it is ready", _MOUNT_EPILOG)
    _add_options(sub, "mount")
    sub.add_argument("--foreground", action="store_true", help="stay at the terminal until Ctrl-C, and log to it")
    sub.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory to mount on")

    sub = command(
        "umount",
        Later("commands", "umount"),
        "unmount a zbudfs; its stored pages are lost, and its backing file is emptied",
        "The command refuses to unmount while swap or a loop device is on the mount. If the daemon has died, the command\n"
        "removes the mount, its swap and its loop devices.\n",
    )
    sub.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory on which the zbudfs is mounted")

    sub = command(
        "swapon",
        Later("commands", "swapon"),
        "turn on swap on a zbudfs, and mount it first if it is not mounted",
        _MOUNT_EPILOG + "\nIf a step fails, the steps before it are undone.\n",
    )
    _add_options(sub, "swapon")
    _add_mountpoint_or_config(sub, Later("unit", "swapon"))

    sub = command(
        "swapoff",
        Later("commands", "swapoff"),
        "turn off swap on a zbudfs: the kernel reads all pages back into RAM",
        "If RAM has no room for the pages, the command fails and leaves the swap on.\n",
    )
    sub.add_argument("--umount", action="store_true", help="unmount the zbudfs afterwards")
    sub.add_argument("--force", action="store_true", help="try it even if RAM seems to have no room")
    _add_mountpoint_or_config(sub, Later("unit", "swapoff"))

    sub = command(
        "restart",
        Later("commands", "restart"),
        "hand a running mount over to this version of zbudfs; swap stays on",
        "Stored pages stay where they are. If this version cannot take over, the running version goes on.\n",
    )
    sub.add_argument("mountpoint", metavar="MOUNTPOINT", help="directory on which the zbudfs is mounted")

    sub = command(
        "status",
        Later("status", "status"),
        "show the stored pages of a mount, the memory that they take, and warnings",
        "The page of a mount has at most 20 lines, and begins with problems that need action. The speeds are measured over\n"
        "half a second, or with --watch between two pages. The exit status is 1 if a daemon does not answer.\n\n"
        "examples:\n"
        "  zbudfs status\n"
        "  zbudfs status --watch                                a page every two seconds, until Ctrl-C\n"
        "  zbudfs status --json /mnt/zswap | jq .pool_used_bytes\n"
        "  zbudfs status --json --watch 60 /mnt/zswap >> log    a line every minute\n",
    )
    sub.add_argument(
        "--watch",
        type=_interval_or_mountpoint,
        nargs="?",
        const=WATCH_SECONDS,
        metavar="SECONDS",
        help=f"print again every SECONDS, until Ctrl-C (default: {WATCH_SECONDS:g})",
    )
    sub.add_argument(
        "--json", action="store_true", help="print an object, or a list of objects if MOUNTPOINT is missing"
    )
    sub.add_argument("one_mountpoint", metavar="MOUNTPOINT", nargs="?", help="directory (default: every zbudfs)")

    sub = command(
        "set",
        Later("commands", "set_"),
        "change settings of a running zbudfs, and print the values in force",
        _set_epilog(),
    )
    sub.usage = "zbudfs set [-h] [--json] [KEY=VALUE ...] MOUNTPOINT"
    sub.add_argument("--json", action="store_true", help="print one object with all settings")
    sub.add_argument(
        "words",
        metavar="[KEY=VALUE ...] MOUNTPOINT",
        nargs="+",
        help="KEY=VALUE for each change, then the MOUNTPOINT; without a KEY=VALUE, all settings are printed",
    )

    sub = command(
        "exporter",
        Later("exporter", "exporter"),
        "export the statistics of all mounts to Prometheus",
        _EXPORTER_EPILOG,
    )
    where = sub.add_mutually_exclusive_group()
    where.add_argument(
        "--listen",
        type=values.listen_address,
        metavar="ADDR:PORT",
        help="answer scrapes over HTTP on this address, until SIGTERM or Ctrl-C (default: localhost:9824)",
    )
    where.add_argument(
        "--textfile",
        type=values.file_name,
        metavar="FILE",
        help="write FILE for the textfile collector of node_exporter, instead of listening",
    )
    sub.add_argument(
        "--interval", type=values.interval, metavar="SECONDS", help="write FILE again every SECONDS (default: once)"
    )
    sub.add_argument("mountpoints", metavar="MOUNTPOINT", nargs="*", help="directory (default: every zbudfs)")

    sub = command(
        "serve",
        Later("unit", "serve"),
        "become the daemon of a configuration, for a service manager",
        _SERVE_EPILOG,
    )
    sub.add_argument("name", metavar="NAME", help=f"name of the configuration {FOLDER}/NAME.toml")

    sub = command(
        "hibernate",
        Later("hibernate", "hibernate"),
        "turn swap off before the machine hibernates, and on again afterwards",
        _HIBERNATE_EPILOG,
    )
    sub.add_argument(
        "step",
        metavar="prepare|finish",
        choices=("prepare", "finish"),
        help="prepare before the hibernation, finish after it",
    )

    sub = command(
        "config",
        Later("config_page", "config"),
        "show the values of a configuration, and the source of each",
        _config_epilog(),
    )
    output = sub.add_mutually_exclusive_group()
    output.add_argument("--check", action="store_true", help="print errors only; the exit status is 1 if there is one")
    output.add_argument("--json", action="store_true", help="print an object, or a list of objects if NAME is missing")
    sub.add_argument(
        "--root",
        type=values.folder,
        default="/",
        metavar="DIR",
        help="read the system whose root folder is DIR (default: /)",
    )
    sub.add_argument("name", metavar="NAME", nargs="?", help="name of the configuration (default: all)")

    add_doctor(command)
    add_estimate(command)
    add_trace(command)
    add_top(command)
    return parser


def _set_epilog() -> str:
    """Return the epilog of `set`, with a list of all keys."""
    width = max(len(tunable.name) for tunable in TUNABLES)
    keys = "".join(f"  {tunable.name:{width}}  {tunable.meaning}\n" for tunable in TUNABLES)
    return f"""\
A setting stays in force until the unmount, also after a crash or a restart of the daemon. Each key is also a file in
MOUNTPOINT/control/. If one value is wrong, nothing is changed.

keys:
{keys}
A number of bytes is {GRAMMAR}.

examples:
  zbudfs set /mnt/zswap                                        print all settings
  zbudfs set pool_limit_bytes=64M level=3 /mnt/zswap           lower the pool's limit, and compress more
  zbudfs set writeback_budget_bytes_per_day=20G /mnt/zswap     limit the writes to flash
  zbudfs set writeback_enabled=0 writeback=all /mnt/zswap      write all pages back now, and then only on order
"""


def _config_epilog() -> str:
    """Return the epilog of `config`, with a list of all keys."""
    width = max(map(len, BY_NAME))
    keys = "".join(
        textwrap.fill(
            f"{each.summary} ({each.kind}; default: {each.default})",
            120,
            initial_indent=f"  {each.name:{width}}  ",
            subsequent_indent=" " * (width + 4),
        )
        + "\n"
        for each in OPTIONS
    )
    return f"""\
{FOLDER}/NAME.toml is read first, then the files in NAME.toml.d/ that end in .toml, in the order of their names. The
last file that sets a key wins. The output is TOML too, with the final value of every key.

keys:
{keys}
An amount is {EXPRESSION_GRAMMAR}.

examples:
  zbudfs config swap                            show {FOLDER}/swap.toml
  zbudfs config --json swap | jq .values.size
  zbudfs config --check                         check all configurations
"""


def _add_mountpoint_or_config(parser: argparse.ArgumentParser, configured: Later) -> None:
    """Add MOUNTPOINT and --config. The command is `configured` with --config."""

    class Config(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            namespace.config, namespace.run = values, configured

    parser.add_argument(
        "--config", action=Config, metavar="NAME", help=f"take mountpoint and options from {FOLDER}/NAME.toml"
    )
    parser.add_argument(
        "mountpoint", metavar="MOUNTPOINT", nargs="?", help="directory on which the zbudfs is, or will be, mounted"
    )


def _typed(option: Option, text: str) -> Value:
    value = typed(option, text, ram_bytes())
    if isinstance(value, int):
        check_number(option.name, value)
    return value


def _add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of a command in the table `OPTIONS`."""
    for option in OPTIONS:
        if command in option.commands:
            parser.add_argument(
                f"--{option.name}",
                type=functools.partial(_typed, option),
                metavar=option.metavar,
                help=f"{option.summary} (default: {option.typed_default})".replace("%", "%%"),
            )


def _interval_or_mountpoint(text: str) -> float | str:
    """Return the seconds of --watch, or a path as it is: the user may leave out the seconds and write MOUNTPOINT."""
    return text if "/" in text else values.interval(text)
