# SPDX-License-Identifier: MIT
"""The helpers that mount(8) and umount(8) call for the type fuse.zbudfs, for example for a line of /etc/fstab.

    mount.fuse.zbudfs SOURCE DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTION,...] [-t TYPE]
    umount.fuse.zbudfs DIRECTORY [-flnrv] [-N NAMESPACE] [-t TYPE]

mount(8) and umount(8) look for these names in /sbin alone. Without the first helper, mount(8) would call mount.fuse3 of
libfuse, which has no option for the size. Without the second, umount(8) would only call the kernel and return while the
daemon still empties its backing file: the next mount would find that file in use.

If SOURCE is the NAME of a configuration, the helper mounts that configuration on DIRECTORY, changed by the options. Any
other SOURCE is only a name. Mount tables show SOURCE, since `mount -a` recognises its lines by it.

The exit status follows mount(8): 0 success, 1 usage error or not root, 32 failure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Final

from zbudfs.cli import config
from zbudfs.cli.alone import alone
from zbudfs.cli.argument_parser import OneLineParser
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError
from zbudfs.cli.main import USAGE, guarded
from zbudfs.cli.mounting import mount_all
from zbudfs.cli.option_table import BY_NAME, FOLDER, OPTIONS, Value
from zbudfs.cli.plan import Plan, make_plan
from zbudfs.cli.suggest import did_you_mean
from zbudfs.cli.target import need_root, not_mounted, resolve
from zbudfs.cli.teardown import take_down
from zbudfs.service.mountpoint import Mount, find_mount, unmount
from zbudfs.service.settings import SettingsError, ram_bytes

MOUNT_USAGE: Final = 1
MOUNT_FAILURE: Final = 32

_SO_ANYWAY: Final = frozenset(
    {
        *("rw", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "norelatime", "nolazytime", "nostrictatime"),
        *("async", "nomand", "noiversion", "silent", "loud", "nouser", "noowner", "nogroup"),
        *("defaults", "auto", "noauto", "nofail", "_netdev", "default_permissions"),
    }
)
"""Options that are accepted in silence: they always hold, or concern mount(8) and the service manager alone."""

_IGNORED: Final = {
    **dict.fromkeys(("suid", "dev", "exec"), "zbudfs is always mounted nosuid, nodev and noexec"),
    **dict.fromkeys(("atime", "relatime", "strictatime", "diratime", "lazytime"), "zbudfs keeps no access times"),
    **dict.fromkeys(("sync", "dirsync"), "every written page is stored at once, and nothing outlives the mount"),
    **dict.fromkeys(("user", "users", "owner", "group"), "only root may mount and unmount zbudfs"),
    **dict.fromkeys(("mand", "iversion"), "zbudfs does not support it"),
    "allow_other": "only root may use the mount; zbudfs status shows other users the public statistics",
}
"""Options that are ignored with a notice, by name: zbudfs cannot follow them, which does no harm. The value is the reason."""

_REFUSED: Final = {
    "ro": "swap must be writable: leave the option out",
    "remount": "a mount keeps its options: unmount it and mount it again",
    **dict.fromkeys(("bind", "rbind", "move"), "it needs no type: leave out -t fuse.zbudfs"),
    **dict.fromkeys(("uid", "gid", "umask"), "swapfile always belongs to root, with mode 0600: leave the option out"),
}
"""Options that are refused, by name, since the user would rely on them. The value is the reason and what to do."""


class HelperArguments(Arguments):
    """The parsed command line of a helper."""

    source: str
    directory: str
    options: list[str]
    """The value of each -o: a list of options with commas between them."""
    sloppy: bool
    fake: bool
    verbose: bool
    lazy: bool
    namespace: str | None


def mount_main(argv: Sequence[str] | None = None) -> int:
    """Run mount.fuse.zbudfs, and return the exit status."""
    return _status(guarded(lambda: _mount(_parse("mount", argv))))


def umount_main(argv: Sequence[str] | None = None) -> int:
    """Run umount.fuse.zbudfs, and return the exit status."""
    return _status(guarded(lambda: _umount(_parse("umount", argv))))


def _status(status: int) -> int:
    return {0: 0, USAGE: MOUNT_USAGE}.get(status, MOUNT_FAILURE)


def _parse(what: str, argv: Sequence[str] | None) -> HelperArguments:
    parser = OneLineParser(
        prog=f"{what}.fuse.zbudfs",
        description=f"The helper that {what}(8) calls for file systems of the type fuse.zbudfs. See zbudfs(8).",
    )
    if what == "mount":
        parser.add_argument("source", metavar="SOURCE", help="NAME of a configuration, or any other word")
    parser.add_argument("directory", metavar="DIRECTORY", help="the mountpoint")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], metavar="OPTION,...", help="mount options, as in fstab"
    )
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    parser.add_argument("-f", dest="fake", action="store_true", help="check everything, and mount nothing")
    parser.add_argument("-v", dest="verbose", action="store_true", help="print the settings of the mount")
    parser.add_argument(
        "-l",
        dest="lazy",
        action="store_true",
        help="unmount lazily: the daemon ends when the mount is no longer in use",
    )
    parser.add_argument("-n", "-r", dest="unused", action="store_true", help="ignored")
    parser.add_argument("-t", dest="type", metavar="TYPE", help="ignored")
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help="refused")
    arguments = parser.parse_args(argv, HelperArguments())
    if arguments.namespace is not None:
        raise CommandError(f"-N is refused: use nsenter --mount={arguments.namespace} {what} ...")
    return arguments


def _mount(arguments: HelperArguments) -> int:
    values, notices = read_options(",".join(arguments.options), ram_bytes(), sloppy=arguments.sloppy)
    plan = plan_for(arguments.source, arguments.directory, values)
    for notice in notices:
        print(f"zbudfs: {notice}", file=sys.stderr)
    if arguments.verbose:
        print(plan.settings.to_json())
    if not arguments.fake:
        need_root("mount")
        with alone("mount", plan.mountpoint):
            mount_all(plan)
    return 0


def _umount(arguments: HelperArguments) -> int:
    need_root("umount")
    mountpoint = resolve(arguments.directory)
    if arguments.lazy:  # the last resort if another command hangs: it takes no lock
        _find(mountpoint)
        unmount(mountpoint, lazy=True)
        return 0
    with alone("umount", mountpoint):
        take_down(_find(mountpoint))
    return 0


def _find(mountpoint: str) -> Mount:
    if (mounted := find_mount(mountpoint)) is None:
        raise not_mounted(mountpoint)
    return mounted


def plan_for(source: str, directory: str, values: dict[str, Value], root: str = "/") -> Plan:
    """Return the plan of the configuration `source`, if there is one of that name, or of the defaults, changed by `values`.

    Raises SettingsError and ConfigError.
    """
    configured: dict[str, Value] = {}
    if config.is_configured(source, root):
        configured = {key: found.value for key, found in config.load(source, root).found.items()}
    if configured.get("instances", 1) != 1:
        raise SettingsError(
            f"the configuration {source} has several instances, and mount(8) mounts one: use zbudfs mount"
        )
    return make_plan({**configured, **values}, resolve(directory), root=root, source=source)


def read_options(text: str, ram: int, *, sloppy: bool = False) -> tuple[dict[str, Value], list[str]]:
    """Return the values that a list of mount options sets, by key, and a sentence for each option that is ignored.

    `ram` is the RAM in bytes. Raises SettingsError for an option that is refused, is unknown (unless `sloppy`), or has a
    wrong value.
    """
    values: dict[str, Value] = {}
    notices = []
    for option in split_options(text):
        name, equals, value = option.partition("=")
        if option in _SO_ANYWAY or name.startswith(("x-", "X-")) or name == "comment":
            continue
        if option in _IGNORED:
            notices.append(f"the option {option} is ignored: {_IGNORED[option]}")
        elif name in _REFUSED:
            raise SettingsError(f"the option {name} is refused: {_REFUSED[name]}")
        elif name in BY_NAME and not BY_NAME[name].mount_option:
            raise SettingsError(f"the option {name} is refused: it can only be set in {FOLDER}/NAME.toml")
        elif name in BY_NAME:
            if not equals:
                raise SettingsError(f"the option {name} needs a value: write {name}=VALUE ({BY_NAME[name].kind})")
            try:
                values[name] = BY_NAME[name].read(value, ram)
            except ValueError as error:
                raise SettingsError(f"the option {name}={value} has a wrong value: {error}") from None
        elif sloppy:
            notices.append(f"the option {option} is unknown, and ignored because of -s")
        else:
            known = [option.name for option in OPTIONS if option.mount_option]
            listed = f"{', '.join(known)}, and those of mount(8)"
            hint = did_you_mean(name, [*known, *_SO_ANYWAY, *_IGNORED, *_REFUSED], listed)
            raise SettingsError(f"the option {option!r} is unknown: {hint}")
    return values, notices


def split_options(text: str) -> Iterator[str]:
    """Yield the options in a list. A comma in double quotes or parentheses, as in "min(ram/2,4G)", does not separate."""
    option, depth, quoted = "", 0, False
    for character in text:
        if character == '"':
            quoted = not quoted
            continue
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth <= 0 and not quoted:
            if option:
                yield option
            option = ""
        else:
            option += character
    if option:
        yield option
