# SPDX-License-Identifier: MIT
"""The commands. Each is a function that takes the parsed command line and returns the exit status, or raises.

    mount    plan -> daemons that mount (`mounting`)      umount    check for users -> unmount -> wait for the daemon's end
    swapon   mount if needed -> loop -> mkswap -> swapon  swapoff   check for room -> swapoff -> loop -> umount if wanted
    restart  order to the keeper -> hand-over             set       check -> control/ -> values (in `tuning`)

The other commands are in modules of their own, and `parser` imports the module of the command that runs. The commands
decide the order of the steps and undo them on failure. The packages `service` and `swap` do each step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Sequence

from zbudfs.cli import stripe, tuning
from zbudfs.cli.alone import alone
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.ask import all_numbers, why_silent
from zbudfs.cli.errors import CommandError
from zbudfs.cli.mounting import mount_all, prepare_all, print_notes
from zbudfs.cli.option_table import BY_NAME, check_choice, given_options
from zbudfs.cli.plan import Plan, make_plan
from zbudfs.cli.restart import order_restart, wait_served
from zbudfs.cli.target import all_mounted, find_mounted, need_root, refuse_users, resolve
from zbudfs.cli.teardown import take_all_down
from zbudfs.service import launch
from zbudfs.service.mountpoint import Mount, shown_path
from zbudfs.service.settings import SettingsError
from zbudfs.swap.attach import attach
from zbudfs.swap.detach import detach, free_leftovers
from zbudfs.swap.discard import discard_of
from zbudfs.swap.loop import Swap, swaps, swaps_on
from zbudfs.swap.priority import choose_priority, filling_order


def mount(arguments: Arguments) -> int:
    """Mount, and return when the mount is ready; with --foreground, return when the daemon has ended."""
    need_root("mount")
    mountpoint = resolve(arguments.mountpoint)
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone("mount", mountpoint))
        plan = make_plan(given_options(arguments), mountpoint)
        if not arguments.foreground:
            mount_all(plan)
            return 0
        if len(plan.parts) > 1:
            raise SettingsError("--foreground is for one instance: leave it out, or --instances")
        prepare_all(plan)

        def on_ready(ready: launch.Ready) -> None:
            stack.close()  # other commands may work on the mount from now on
            print(f"zbudfs: mounted on {shown_path(mountpoint)}, pid {ready.pid}; Ctrl-C ends it", file=sys.stderr)
            print_notes(plan, ready)

        return launch.run_in_foreground(plan.settings, on_ready)


def umount(arguments: Arguments) -> int:
    """Unmount, unless swap is on the mount, and return when the daemon has ended."""
    need_root("umount")
    mountpoint = resolve(arguments.mountpoint)
    with alone("umount", mountpoint):
        take_all_down(mountpoint, all_mounted(mountpoint))
    return 0


def swapon(arguments: Arguments) -> int:
    """Mount if nothing is mounted yet, make the mount active swap, and print its devices."""
    check_choice(arguments)
    need_root("swapon")
    mountpoint = resolve(arguments.mountpoint)
    values = given_options(arguments)
    with alone("swapon", mountpoint):
        mounts = stripe.mounts_of(mountpoint)
        if not mounts:
            return mount_as_swap(make_plan(values, mountpoint))
        if fixed := [f"--{name}" for name in values if "mount" in BY_NAME[name].commands]:
            shown = shown_path(mountpoint)
            raise CommandError(
                f"{shown} is mounted already: {', '.join(fixed)} can only be set at mount; leave it out, or unmount first"
            )
        return make_swap(mountpoint, mounts, arguments.priority, arguments.discard)


def mount_as_swap(plan: Plan) -> int:
    """Mount, make the mount active swap, and print its devices. The caller holds the lock `alone`."""
    mounts = mount_all(plan)
    try:
        return make_swap(plan.mountpoint, mounts, plan.priority, plan.discard)
    except BaseException:
        take_all_down(plan.mountpoint, mounts)
        raise


def make_swap(mountpoint: str, mounts: Sequence[Mount], priority: int | None, discard: str | None) -> int:
    """Make mounts active swap, and print their devices. The caller holds the lock `alone`.

    A loop device that a killed swapon has left, or whose swap was turned off, is freed first. Without a `discard`, its own
    is kept.
    """
    missing = [mounted for mounted in mounts if not swaps_on(mounted.mountpoint, mounted.st_dev)]
    if not missing:
        refuse_users(mountpoint, mounts, "is in use already: {}")
    there = _swaps_of(mounts)
    if priority is None and there:
        priority = max(0, there[0].priority)  # the kernel fills instances in turns only if their priorities are equal
    elif priority is None:
        priority = choose_priority(swaps())
        if priority is None and len(mounts) > 1:
            priority = 0  # priorities that the kernel chooses are never equal
    if discard is None:
        discard = discard_of([(mounted.mountpoint, mounted.st_dev) for mounted in mounts])
    done: list[tuple[str, int | None]] = []
    try:
        for mounted in missing:
            free_leftovers(mounted.mountpoint, mounted.st_dev)
            attach(mounted.mountpoint, priority, discard)
            done.append((mounted.mountpoint, mounted.st_dev))
    except BaseException:
        detach(done, force=True)
        raise
    devices = [swap.path for swap in _swaps_of(mounts)]
    if order := filling_order(swaps(), devices, "zbudfs"):
        print(f"zbudfs: the kernel fills {order}", file=sys.stderr)
    print("\n".join(devices))
    return 0


def _swaps_of(mounts: Sequence[Mount]) -> list[Swap]:
    return [swap for mounted in mounts for swap in swaps_on(mounted.mountpoint, mounted.st_dev)]


def swapoff(arguments: Arguments) -> int:
    """Turn swap off and detach the loop device; with --umount, also unmount."""
    check_choice(arguments)
    need_root("swapoff")
    mountpoint = resolve(arguments.mountpoint)
    with alone("swapoff", mountpoint):
        return end_swap(mountpoint, force=arguments.force, umount=arguments.umount)


def end_swap(mountpoint: str, *, force: bool, umount: bool) -> int:
    """Turn swap off as `swapoff` does. The caller holds the lock `alone`."""
    mounts = all_mounted(mountpoint)
    devices = detach([(mounted.mountpoint, mounted.st_dev) for mounted in mounts], force=force)
    if umount:
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


def set_(arguments: Arguments) -> int:
    """Set tunables of a running mount, and print the values in force; without a KEY=VALUE, print all tunables."""
    last = arguments.words[-1]
    wanted = tuning.pairs(arguments.words[:-1])
    if "/" not in last.partition("=")[0] and not os.path.lexists(last) and not stripe.mounts_of(resolve(last)):
        if "=" not in last:
            raise SettingsError(
                f"{last!r} is neither KEY=VALUE nor a MOUNTPOINT: write KEY=VALUE ..., and the MOUNTPOINT as the last word"
            )
        tuning.pairs(arguments.words)
        raise SettingsError(f"the MOUNTPOINT is missing: write it after {last!r}, as the last word")
    need_root("set")
    mountpoint = find_mounted(resolve(last)).mountpoint
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
