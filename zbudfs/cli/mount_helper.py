# SPDX-License-Identifier: MIT
"""What mount(8) and umount(8) call for the type fuse.zbudfs, and so what an /etc/fstab line comes to.

    mount.fuse.zbudfs SOURCE DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTION,...] [-t TYPE]
    umount.fuse.zbudfs DIRECTORY [-flnrv] [-N NAMESPACE] [-t TYPE]

Both are looked for in /sbin under just these names. Without them mount(8) would fall back to libfuse's mount.fuse3,
which knows nothing of sizes, and umount(8) would do no more than call the kernel: the daemon would still be emptying
its backing file on return, and a mount right after it would find that file in use.

If SOURCE is the NAME of a configuration, that is what is mounted, at DIRECTORY, with whatever the options say instead.
Any other SOURCE is only a name. It is what mount tables show, since that is how `mount -a` knows its lines again.

Exit status, as mount(8) has it: 0 done, 1 asked for wrongly or not root, 32 it could not be done.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from zbudfs.cli import config
from zbudfs.cli.alone import alone
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.commands import start
from zbudfs.cli.keys import BY_NAME, KEYS, Value
from zbudfs.cli.main import USAGE, guarded
from zbudfs.cli.options import OneLineParser
from zbudfs.cli.suggest import did_you_mean
from zbudfs.cli.target import CommandError, need_root, resolve
from zbudfs.cli.teardown import take_down
from zbudfs.service.mountpoint import Mount, find_mount, shown_path, unmount
from zbudfs.service.settings import Settings, SettingsError, ram_bytes

MOUNT_USAGE: Final = 1
MOUNT_FAILURE: Final = 32

_SO_ANYWAY: Final = frozenset(
    {
        *("rw", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "norelatime", "nolazytime", "nostrictatime"),
        *("async", "nomand", "noiversion", "silent", "loud", "nouser", "noowner", "nogroup"),
        *("defaults", "auto", "noauto", "nofail", "_netdev", "default_permissions"),
    }
)
"""What is the case, or is for mount(8) and the service manager alone."""

_IGNORED: Final = {
    **dict.fromkeys(("suid", "dev", "exec"), "it is always mounted nosuid, nodev and noexec"),
    **dict.fromkeys(("atime", "relatime", "strictatime", "diratime", "lazytime"), "it keeps no access times"),
    **dict.fromkeys(("sync", "dirsync"), "a page that was written is stored, and nothing outlives the mount"),
    **dict.fromkeys(("user", "users", "owner", "group"), "only root may mount and unmount it"),
    **dict.fromkeys(("mand", "iversion"), "it has nothing of the kind"),
    "allow_other": "only root may use it; zbudfs status shows other users the public statistics",
}
"""What asks for something that will not be, and does no harm; and why."""

_REFUSED: Final = {
    "ro": "swap has to be written: leave it out",
    "remount": "what is mounted keeps what it was mounted with: unmount it and mount it again",
    **dict.fromkeys(("bind", "rbind", "move"), "that needs no type: leave out -t fuse.zbudfs"),
    **dict.fromkeys(("uid", "gid", "umask"), "swapfile is always root's, with mode 0600: leave it out"),
}
"""What would be a lie if it were ignored; and what to do."""


class HelperArguments(Arguments):
    """What mount(8) or umount(8) has typed."""

    source: str
    directory: str
    options: list[str]
    """Each a list parted by commas."""
    sloppy: bool
    fake: bool
    verbose: bool
    lazy: bool
    namespace: str | None


def mount_main(argv: Sequence[str] | None = None) -> int:
    """Be mount.fuse.zbudfs; return the exit status."""
    return _status(guarded(lambda: _mount(_parse("mount", argv))))


def umount_main(argv: Sequence[str] | None = None) -> int:
    """Be umount.fuse.zbudfs; return the exit status."""
    return _status(guarded(lambda: _umount(_parse("umount", argv))))


def _status(status: int) -> int:
    return {0: 0, USAGE: MOUNT_USAGE}.get(status, MOUNT_FAILURE)


def _parse(what: str, argv: Sequence[str] | None) -> HelperArguments:
    parser = OneLineParser(
        prog=f"{what}.fuse.zbudfs",
        description=f"Called by {what}(8) for file systems of the type fuse.zbudfs; see zbudfs(8).",
        allow_abbrev=False,
    )
    if what == "mount":
        parser.add_argument("source", metavar="SOURCE", help="NAME of a configuration, or any other word")
    parser.add_argument("directory", metavar="DIRECTORY", help="the mountpoint")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTION,...", help="what fstab says")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="pass over options that nobody knows")
    parser.add_argument("-f", dest="fake", action="store_true", help="check everything, and mount nothing")
    parser.add_argument("-v", dest="verbose", action="store_true", help="say what is done")
    parser.add_argument("-l", dest="lazy", action="store_true", help="take it out of the tree now, end it when idle")
    parser.add_argument("-n", "-r", dest="unused", action="store_true", help="of no meaning here")
    parser.add_argument("-t", dest="type", metavar="TYPE", help="of no meaning here")
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help="refused")
    arguments = parser.parse_args(argv, HelperArguments())
    if arguments.namespace is not None:
        raise CommandError(f"-N is refused: use nsenter --mount={arguments.namespace} {what} ...")
    return arguments


def _mount(arguments: HelperArguments) -> int:
    values, notices = read_options(",".join(arguments.options), ram_bytes(), sloppy=arguments.sloppy)
    settings = settings_for(arguments.source, arguments.directory, values)
    for notice in notices:
        print(f"zbudfs: {notice}", file=sys.stderr)
    if arguments.verbose:
        print(settings.to_json())
    if not arguments.fake:
        need_root("mount")
        with alone("mount", settings.mountpoint):
            start(settings)
    return 0


def _umount(arguments: HelperArguments) -> int:
    need_root("umount")
    mountpoint = resolve(arguments.directory)
    if arguments.lazy:  # the last resort where a command hangs: it waits for none
        _find(mountpoint)
        unmount(mountpoint, lazy=True)
        return 0
    with alone("umount", mountpoint):
        take_down(_find(mountpoint))
    return 0


def _find(mountpoint: str) -> Mount:
    if (mounted := find_mount(mountpoint)) is None:
        raise CommandError(f"no zbudfs is mounted on {shown_path(mountpoint)}")
    return mounted


def settings_for(source: str, directory: str, values: dict[str, Value], root: str = "/") -> Settings:
    """Return what to mount: the configuration `source`, if there is one of that name, changed by `values`.

    Raises SettingsError and ConfigError.
    """
    configured: dict[str, Value] = {}
    if config.is_configured(source, root):
        configured = {key: found.value for key, found in config.load(source, root).found.items()}
    if configured.get("instances", 1) != 1:
        raise SettingsError(
            f"{source} is configured to have several instances, and mount(8) mounts one: use zbudfs mount"
        )
    _, settings = config.settings_of({**configured, **values, "mountpoint": directory}, directory, root)
    return replace(settings, source=source)


def read_options(text: str, ram: int, *, sloppy: bool = False) -> tuple[dict[str, Value], list[str]]:
    """Return the keys that a list of mount options sets, and a sentence for each option that is ignored.

    `ram` is the RAM in bytes. Raises SettingsError for an option that is refused, unknown (unless `sloppy`), or whose
    value cannot work.
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
            raise SettingsError(f"the option {name} is refused: it can only be set in {config.FOLDER}/NAME.toml")
        elif name in BY_NAME:
            if not equals:
                raise SettingsError(f"the option {name} needs a value: write {name}=VALUE ({BY_NAME[name].kind})")
            try:
                values[name] = BY_NAME[name].read(value, ram)
            except ValueError as error:
                raise SettingsError(f"the option {name}={value} cannot work: {error}") from None
        elif sloppy:
            notices.append(f"the option {option} is unknown, and ignored because of -s")
        else:
            known = [key.name for key in KEYS if key.mount_option]
            listed = f"{', '.join(known)}, and those of mount(8)"
            hint = did_you_mean(name, [*known, *_SO_ANYWAY, *_IGNORED, *_REFUSED], listed)
            raise SettingsError(f"the option {option!r} is unknown: {hint}")
    return values, notices


def split_options(text: str) -> Iterator[str]:
    """Yield the options in a list. A comma inside double quotes or parentheses, as in "min(ram/2,4G)", parts nothing."""
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
