# SPDX-License-Identifier: MIT
"""Checks of other swap on this machine, of zswap, and of the state of the swap on zbudfs."""

from __future__ import annotations

from collections.abc import Iterator

from zbudfs.cli import stripe
from zbudfs.cli.doctor.finding import Finding, Machine, ok, warning
from zbudfs.core.sizes import format_size
from zbudfs.service.mountpoint import find_mount, shown_path, zbudfs_mounts
from zbudfs.swap.loop import loop_devices_on, swaps, was_swap
from zbudfs.swap.priority import choose_priority, is_zram


def check_zswap(machine: Machine) -> Iterator[Finding]:
    """Check that zswap is off: it compresses every page before the page reaches a swap."""
    try:
        enabled = machine.read("/sys/module/zswap/parameters/enabled")
    except OSError:
        enabled = "N"
    if enabled in ("Y", "1"):
        yield warning(
            "zswap",
            "zswap is on: it compresses pages first, and zbudfs compresses again the pages that zswap writes out",
            "echo N > /sys/module/zswap/parameters/enabled, and zswap.enabled=0 on the kernel's command line",
        )
    else:
        yield ok("zswap", "off")


def check_other_swap(machine: Machine) -> Iterator[Finding]:
    """Compare the priority with those of other swap."""
    mountpoint = machine.settings.mountpoint
    mounted = find_mount(mountpoint, machine.root)
    ours = set()
    if mounted is not None:
        ours = {loop.path for loop in loop_devices_on(mountpoint, mounted.st_dev, machine.root)}
    active = swaps(machine.root)
    others = [swap for swap in active if swap.path not in ours]
    priority = next((swap.priority for swap in active if swap.path in ours), machine.priority)
    if priority is None:
        priority = choose_priority(others)
    if not others:
        yield ok("other swap", "none")
        return
    for swap in others:
        what = f"{shown_path(swap.path)} ({format_size(swap.size_bytes)}, priority {swap.priority})"
        if is_zram(swap):
            text = f"{what} is compressed memory too: its pages stay in RAM, while zbudfs could write them back"
            yield warning("other swap", text, f"turn it off (swapoff {swap.path}), or use it without zbudfs")
        elif priority is None or swap.priority > priority:
            mine = "chosen by the kernel, below all other swap" if priority is None else str(priority)
            text = f"{what} is filled first: the priority of zbudfs is {mine}"
            yield warning("other swap", text, f"set priority = {max(swap.priority, -1) + 1} or higher")
        elif swap.priority == priority:
            text = f"{what} has the same priority: the kernel fills both in turns"
            yield warning("other swap", text, f"set priority = {swap.priority + 1} unless that is intended")
        else:
            yield ok("other swap", f"{what} is filled after zbudfs, whose priority is {priority}")


def check_swap_is_on(machine: Machine) -> Iterator[Finding]:
    """Find mounts whose swap another program has turned off, such as swapoff -a or a tool that manages swap."""
    active = {swap.path for swap in swaps(machine.root)}
    wanted = machine.settings.mountpoint if machine.swap else None
    for mounted in zbudfs_mounts(machine.root):
        loops = loop_devices_on(mounted.mountpoint, mounted.st_dev, machine.root)
        if any(loop.path in active for loop in loops):
            continue
        shown = shown_path(mounted.mountpoint)
        left = [loop.path for loop in loops if was_swap(loop.path, machine.root)]
        is_wanted = wanted is not None and stripe.is_part(mounted.mountpoint, wanted)
        if left or is_wanted:
            text = f"{shown} is mounted, and its swap is off{f', though {left[0]} is still attached' if left else ''}"
            remedy = f"turn it on again with zbudfs swapon {shown}"
            yield warning("swap", text, f"{remedy}, or detach it with zbudfs swapoff {shown}" if left else remedy)


def check_container(machine: Machine) -> Iterator[Finding]:
    """Check whether the /proc of a container has its own numbers, which do not include the swap on zbudfs."""
    hidden = []
    for line in machine.read("/proc/self/mountinfo").split("\n"):
        fields, _, rest = line.partition(" - ")
        words = fields.split()
        if rest.startswith("fuse.lxcfs ") and len(words) > 4 and words[4] in ("/proc/swaps", "/proc/meminfo"):
            hidden.append(words[4])
    if hidden:
        yield warning(
            "container",
            f"{' and '.join(hidden)} is the container's own (lxcfs): it shows neither the swap nor the room for swapoff",
            "run zbudfs outside of the container, or use zbudfs swapoff --force in it",
        )
