# SPDX-License-Identifier: MIT
"""The commands, each a function of what was typed that returns the exit status or raises.

    mount    settings -> a daemon that mounts           umount    no users? -> unmount -> wait for the daemon's end
    swapon   mount if need be -> loop -> mkswap -> on   swapoff   room? -> off -> loop -> umount if wanted
    restart  order to the keeper -> it hands over     status    in `status`
    config   files -> settings (in `config`)           exporter  in `exporter`
    set      check -> control/ -> what is in force (in `tuning`)

They decide the order and undo what they did; how each step is done is known to `service` and `swap`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zbudfs.cli import config as configuration
from zbudfs.cli import config_page, footprint_text, stripe, tuning
from zbudfs.cli import exporter as exporting
from zbudfs.cli import status as status_page
from zbudfs.cli.alone import alone
from zbudfs.cli.arguments import MOUNT_OPTIONS, Arguments
from zbudfs.cli.ask import all_numbers, why_silent
from zbudfs.cli.restart import order_restart, wait_served
from zbudfs.cli.target import CommandError, all_mounted, find_mounted, need_root, refuse_users, resolve
from zbudfs.cli.teardown import take_all_down, take_down
from zbudfs.core.sizes import format_size, parse_size_or_percent
from zbudfs.core.tunables import NAMES
from zbudfs.service import disks, launch
from zbudfs.service.footprint import check_tables
from zbudfs.service.mountpoint import (
    Mount,
    MountError,
    check_mountpoint,
    find_mount,
    is_dead,
    shown_path,
    zbudfs_mounts,
)
from zbudfs.service.settings import (
    BACKING_FOLDER,
    DEFAULT_LEVEL,
    DEFAULT_PACKING,
    PAGE_BYTES,
    Settings,
    SettingsError,
    default_backing,
    default_pool_bytes,
    default_size_bytes,
    ram_bytes,
)
from zbudfs.swap.attach import attach
from zbudfs.swap.detach import detach, free_leftovers
from zbudfs.swap.loop import Swap, swaps, swaps_on
from zbudfs.swap.priority import choose_priority, filling_order


def mount(arguments: Arguments) -> int:
    """Mount and return when it is up; in the foreground, when it has ended."""
    need_root("mount")
    mountpoint = resolve(arguments.mountpoint)
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone("mount", mountpoint))
        if not arguments.foreground:
            _start(arguments, mountpoint)
            return 0
        parts = make_parts(arguments, mountpoint)
        if len(parts) > 1:
            raise SettingsError("--foreground is for one instance: leave it out, or --instances")
        _prepare(mountpoint, parts)

        def on_ready(ready: launch.Ready) -> None:
            stack.close()  # others may work on it from now on
            print(f"zbudfs: mounted on {shown_path(mountpoint)}, pid {ready.pid}; Ctrl-C ends it", file=sys.stderr)
            _tell_refusals(ready, mountpoint)
            _tell_footprint(parts)

        return launch.run_in_foreground(parts[0], on_ready)


def umount(arguments: Arguments) -> int:
    """Unmount, if no swap is on it, and return when the daemon has ended."""
    need_root("umount")
    mountpoint = resolve(arguments.mountpoint)
    with alone("umount", mountpoint):
        take_all_down(mountpoint, all_mounted(mountpoint))
    return 0


def swapon(arguments: Arguments) -> int:
    """Mount if need be, then make it active swap; print the device, or devices."""
    need_root("swapon")
    mountpoint = resolve(arguments.mountpoint)
    with alone("swapon", mountpoint):
        return make_swap(arguments, mountpoint)


def make_swap(arguments: Arguments, mountpoint: str) -> int:
    """As `swapon`, for a caller that is `alone` on the mountpoint.

    What an earlier swapon that was killed has left is taken over, and so is a loop device whose swap was turned off.
    """
    mounts = stripe.mounts_of(mountpoint)
    mounted_here = not mounts
    if mounted_here:
        mounts = _start(arguments, mountpoint)
    else:
        _refuse_mount_options(arguments, mountpoint)
        if all(swaps_on(mounted.mountpoint, mounted.st_dev) for mounted in mounts):
            refuse_users(mountpoint, mounts, "is in use already: {}")
    there = _swaps_of(mounts)
    missing = [mounted for mounted in mounts if not swaps_on(mounted.mountpoint, mounted.st_dev)]
    priority = arguments.priority
    if priority is None and there:
        priority = max(0, there[0].priority)  # the kernel fills instances in turns only if theirs are equal
    elif priority is None:
        priority = choose_priority(swaps())
        if priority is None and len(mounts) > 1:
            priority = 0  # those that the kernel chooses are never equal
    done: list[tuple[str, int | None]] = []
    try:
        for mounted in missing:
            free_leftovers(mounted.mountpoint, mounted.st_dev)
            attach(mounted.mountpoint, priority)
            done.append((mounted.mountpoint, mounted.st_dev))
    except BaseException:
        detach(done, force=True)
        if mounted_here:
            take_all_down(mountpoint, mounts)
        raise
    devices = [swap.path for swap in _swaps_of(mounts)]
    if order := filling_order(swaps(), devices, "zbudfs"):
        print(f"zbudfs: the kernel fills {order}", file=sys.stderr)
    print("\n".join(devices))
    return 0


def _swaps_of(mounts: Sequence[Mount]) -> list[Swap]:
    return [swap for mounted in mounts for swap in swaps_on(mounted.mountpoint, mounted.st_dev)]


def swapoff(arguments: Arguments) -> int:
    """Take swap and loop device away, and the mount as well if wanted."""
    need_root("swapoff")
    mountpoint = resolve(arguments.mountpoint)
    with alone("swapoff", mountpoint):
        return end_swap(arguments, mountpoint)


def end_swap(arguments: Arguments, mountpoint: str) -> int:
    """As `swapoff`, for a caller that is `alone` on the mountpoint."""
    mounts = all_mounted(mountpoint)
    devices = detach([(mounted.mountpoint, mounted.st_dev) for mounted in mounts], force=arguments.force)
    if arguments.umount:
        take_all_down(mountpoint, mounts)
    elif not devices:
        raise CommandError(f"no swap is on {shown_path(mountpoint)}")
    return 0


def restart(arguments: Arguments) -> int:
    """Hand a mount over to the version of zbudfs that runs this command; swap stays on."""
    need_root("restart")
    mountpoint = resolve(arguments.mountpoint)
    with alone("restart", mountpoint):
        for mounted in all_mounted(mountpoint):
            answer = order_restart(mounted.mountpoint)
            wait_served(mounted.mountpoint, answer["pid"])
            print(f"zbudfs {answer['version']} serves {shown_path(mounted.mountpoint)} now, pid {answer['pid']}")
    return 0


def status(arguments: Arguments) -> int:
    """Print what one mount, or every mount, stores, once or again and again; 1 if a daemon does not answer."""
    typed, seconds = arguments.one_mountpoint, arguments.watch
    if isinstance(seconds, str):  # a path behind --watch
        if typed is not None:
            raise CommandError(f"{seconds!r} is not a time, and there are two mountpoints then")
        typed, seconds = seconds, 2.0
    only = None if typed is None else resolve(typed)
    chosen = None if only is None else all_mounted(only)

    def collect() -> list[status_page.Report]:
        groups = stripe.grouped(zbudfs_mounts()) if only is None or chosen is None else [(only, chosen)]
        reports = [status_page.report_all(*group) for group in groups]
        if only is not None and "error" in reports[0]:
            raise CommandError(str(reports[0]["error"]))
        return reports

    if seconds is not None:
        with contextlib.suppress(KeyboardInterrupt):
            status_page.watch(collect, seconds, as_object=arguments.json, single=only is not None)
        return 0
    before, then = collect(), time.monotonic()
    if arguments.json:
        reports = before
        print(status_page.as_json(reports if only is None else reports[0]))
    else:
        rounded = any(report.get("rounded") for report in before)
        time.sleep((status_page.PUBLIC_SAMPLE_SECONDS if rounded else status_page.SAMPLE_SECONDS) if before else 0)
        reports = collect()
        print(status_page.as_pages(reports, before, time.monotonic() - then))
    return 1 if any("error" in report for report in reports) else 0


def set_(arguments: Arguments) -> int:
    """Change what can be changed while a mount runs, and print what is in force; without a KEY=VALUE everything."""
    wanted = tuning.pairs(arguments.words[:-1])
    if arguments.words[-1].partition("=")[0] in NAMES and not os.path.lexists(arguments.words[-1]):
        raise SettingsError(f"{arguments.words[-1]!r} is the last word, where the MOUNTPOINT must be: write it behind")
    need_root("set")
    mountpoint = find_mounted(resolve(arguments.words[-1])).mountpoint
    try:
        if wanted:
            tuning.check(wanted, mountpoint)
            tuning.apply(wanted, mountpoint)
        found = tuning.values(mountpoint)
        numbers = all_numbers(mountpoint)
    except OSError as error:
        if error.errno == errno.ENOTCONN or isinstance(error, TimeoutError):
            raise CommandError(why_silent(mountpoint, error)) from None
        raise CommandError(str(error.strerror)) from None
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        shown = {name: number for name, number in found.items() if name in wanted or not wanted}
        print("\n".join(tuning.as_lines(shown, numbers)))
    return 0


def exporter(arguments: Arguments) -> int:
    """Give the numbers to Prometheus until it is ended, or write them to a file."""
    wanted = [resolve(path) for path in arguments.mountpoints]
    try:
        import prometheus_client as prometheus_client
    except ImportError:
        raise CommandError(exporting.MISSING) from None
    if arguments.interval is not None and arguments.textfile is None:
        raise CommandError("--interval is for --textfile FILE; over HTTP Prometheus decides when it asks")

    def mountpoints() -> list[str]:
        return wanted or list(dict.fromkeys(mount.mountpoint for mount in zbudfs_mounts()))

    if arguments.textfile is not None:
        with contextlib.suppress(KeyboardInterrupt):
            exporting.write(mountpoints, arguments.textfile, arguments.interval)
        return 0
    address, port = arguments.listen or exporting.DEFAULT_LISTEN
    if os.geteuid() != 0:
        print("zbudfs: not root: what is exported is public, that is rounded, and some is missing", file=sys.stderr)

    def ready(port: int) -> None:
        print(f"zbudfs: answering on {address}, port {port}; Ctrl-C ends it", file=sys.stderr, flush=True)

    exporting.serve(mountpoints, address, port, ready)
    return 0


def config(arguments: Arguments) -> int:
    """Print what is configured and where each value comes from; with --check only what is wrong, and 1 if anything is."""
    root = arguments.root
    wanted = configuration.names(root) if arguments.name is None else [arguments.name]
    loaded = []
    problems: list[str] = []
    for name in wanted:
        try:
            loaded.append(configuration.load(name, root))
        except configuration.ConfigError as error:
            problems += error.problems
    problems += configuration.conflicts(loaded)
    for text in (*(text for each in loaded for text in each.warnings), *problems):
        print(f"zbudfs: {text}", file=sys.stderr)
    if arguments.check:
        print(f"configurations: {len(wanted)}, problems: {len(problems)}")
    elif arguments.json:
        objects = [config_page.as_object(each) for each in loaded]
        if arguments.name is None:
            print(json.dumps(objects, indent=2))
        elif objects:
            print(json.dumps(objects[0], indent=2))
    elif loaded:
        print("\n\n".join(config_page.as_toml(each) for each in loaded))
    elif not wanted:
        print(f"nothing is configured: there is no file in {configuration.FOLDER}")
    return 1 if problems else 0


# ---- before ------------------------------------------------------------------------------------------------------


def make_settings(arguments: Arguments, mountpoint: str, root: str = "/") -> Settings:
    """Return the daemon's settings: what was typed, the defaults for the rest. Raises SettingsError.

    `root` holds `proc/`, from which the size of RAM is read.
    """
    ram = ram_bytes(root)
    if arguments.pool is None:
        pool_bytes = default_pool_bytes(ram)
    else:
        pool_bytes = parse_size_or_percent(arguments.pool, ram)
        if arguments.pool.endswith("%"):
            pool_bytes = pool_bytes // PAGE_BYTES * PAGE_BYTES
        if pool_bytes > ram:
            raise SettingsError(
                f"pool of {format_size(pool_bytes)} is more than this machine's RAM of {format_size(ram)}: frames are"
                " locked in RAM, so they must fit into it"
            )
    settings = Settings(
        mountpoint=mountpoint,
        size_bytes=default_size_bytes(ram) if arguments.size is None else arguments.size,
        pool_bytes=pool_bytes,
        backing=_backing(arguments.backing, mountpoint),
        level=DEFAULT_LEVEL if arguments.level is None else arguments.level,
        encrypt=arguments.encrypt is not False,
        force_backing=arguments.force_backing is True,
        packing=DEFAULT_PACKING if arguments.packing is None else arguments.packing,
    )
    check_tables(settings, ram)
    return settings


def _backing(typed: str | None, mountpoint: str) -> str | None:
    """Return the absolute path of the backing file, or None for none.

    Folders are resolved, but a symbolic link in the last place is left for the daemon to refuse: whoever can put one
    there could have root empty a file of his choice.
    """
    if typed is None:
        return default_backing(mountpoint)
    if typed == "none":
        return None
    folder, name = os.path.split(typed)
    if name in ("", ".", "..") or "\0" in typed:
        raise SettingsError(f"backing {typed!r} is not a file name: write the path of a file, or none")
    return os.path.join(os.path.realpath(folder or "."), name)  # noqa: PTH118  the path may hold any bytes


def prepare(settings: Settings) -> None:
    """See that a daemon can be started: a free mountpoint, a folder for the backing file. CommandError, MountError."""
    _check_free(settings.mountpoint)
    _prepare_backing_folder(settings)
    _tell_hidden(settings.mountpoint)


def start(settings: Settings) -> None:
    """Have a daemon mount in the background; return when it is up. CommandError, MountError, LaunchError."""
    prepare(settings)
    _tell_refusals(launch.start(settings), settings.mountpoint)
    _tell_footprint([settings])


def make_parts(arguments: Arguments, mountpoint: str, root: str = "/") -> list[Settings]:
    """Return the settings of each daemon; more than one if there are to be several instances. Raises SettingsError."""
    whole = make_settings(arguments, mountpoint, root)
    return stripe.divided(whole, arguments.instances or 1, arguments.backing)


def _prepare(mountpoint: str, parts: Sequence[Settings]) -> None:
    """See that it can be mounted there, and make the folders that are needed."""
    _check_free(mountpoint)
    stripe.make_folders(parts)
    for part in parts:
        prepare(part)


def _start(arguments: Arguments, mountpoint: str) -> list[Mount]:
    """Mount all instances; return the mounts. If one does not come up, those that did are taken down again."""
    parts = make_parts(arguments, mountpoint)
    try:
        _prepare(mountpoint, parts)
        _start_each(parts)
    except BaseException:
        stripe.undo_folders(parts)
        raise
    return stripe.mounts_of(mountpoint)


def _start_each(parts: Sequence[Settings]) -> None:
    up: list[Settings] = []
    try:
        for part in parts:
            ready = launch.start(part)
            up.append(part)
    except BaseException:
        for part in up:
            take_down(find_mounted(part.mountpoint))
        raise
    _tell_refusals(ready, parts[0].mountpoint)  # all of them are refused the same
    _tell_footprint(parts)


def _prepare_backing_folder(settings: Settings) -> None:
    """Make the folder of default backing files, which only root may look into; any other folder must exist."""
    if settings.backing is None:
        return
    folder = Path(settings.backing).parent
    if str(folder) == BACKING_FOLDER:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif not folder.is_dir():
        if missing := disks.missing_mount(settings.backing):
            raise CommandError(f"the backing {shown_path(settings.backing)} is refused: {missing}; mount it first")
        raise CommandError(f"the folder {shown_path(str(folder))} for the backing file does not exist")


def _check_free(mountpoint: str) -> None:
    """Raise CommandError or MountError if nothing can be mounted there, before anything is done.

    The daemon looks again; here a dead mount is known as such, with the remedy.
    """
    if find_mount(mountpoint) is not None and is_dead(mountpoint):
        raise CommandError(
            f"a zbudfs whose daemon has died is still mounted on {shown_path(mountpoint)}:"
            f" run zbudfs umount {shown_path(mountpoint)} first"
        )
    check_mountpoint(mountpoint)
    if below := stripe.mounts_of(mountpoint):
        raise MountError(f"zbudfs is mounted on {shown_path(below[0].mountpoint)} already")


def _tell_hidden(mountpoint: str) -> None:
    """Tell that the mount hides what is in the directory: mount(8) allows that, and it is seldom meant."""
    with contextlib.suppress(OSError), os.scandir(mountpoint) as entries:
        if next(entries, None) is not None:
            print(
                f"zbudfs: {shown_path(mountpoint)} is not empty: the mount hides what is in it until the umount",
                file=sys.stderr,
            )


def _refuse_mount_options(arguments: Arguments, mountpoint: str) -> None:
    """What is mounted has its size and pool: silently ignoring others would be a lie."""
    typed = [f"--{name.replace('_', '-')}" for name in MOUNT_OPTIONS if getattr(arguments, name) is not None]
    if typed:
        raise CommandError(f"{shown_path(mountpoint)} is mounted already: {', '.join(typed)} can only be set at mount")


def _tell_footprint(parts: Sequence[Settings]) -> None:
    """On a machine with little RAM, print what zbudfs takes of it."""
    if (text := footprint_text.note(parts, ram_bytes())) is not None:
        print(f"zbudfs: {text}", file=sys.stderr)


def _tell_refusals(ready: launch.Ready, mountpoint: str) -> None:
    if ready.warnings:
        nr = len(ready.warnings)
        print(
            f"zbudfs: the system refused {nr} of the daemon's protections; zbudfs status {shown_path(mountpoint)} says",
            file=sys.stderr,
        )
