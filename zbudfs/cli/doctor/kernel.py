# SPDX-License-Identifier: MIT
"""Checks of the kernel: its features and its settings."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import Final

from zbudfs.cli.doctor.finding import Finding, Level, Machine, ok, problem, warning
from zbudfs.core.sizes import format_size
from zbudfs.core.units import PAGE_SIZE
from zbudfs.service.mountpoint import request_timeout_warnings
from zbudfs.swap.nodes import free_loop_number, has_node, make_node, pass_in

SINCE: Final = (
    ((5, 6), Level.PROBLEM, "IO flusher mode", "when all memory is short the machine may hang"),
    ((5, 14), Level.WARNING, "MADV_POPULATE", "memory is populated in advance only if it can be locked"),
    ((6, 4), Level.WARNING, "noswap tmpfs", "stored pages cannot be handed over to a newer version of zbudfs"),
    (
        (6, 9),
        Level.WARNING,
        "FUSE_NOTIFY_RESEND",
        "if the worker dies, the requests that it had taken and the swapped pages are lost",
    ),
)
"""Features of the kernel: the version that brought it, the level of a finding, the name, and the effect of its absence."""


def check_version(machine: Machine) -> Iterator[Finding]:
    """Find the features that the kernel's version lacks."""
    release = machine.read("/proc/sys/kernel/osrelease")
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        yield warning(
            "kernel", f"the version {release!r} is malformed", "use a kernel from kernel.org or from a distribution"
        )
        return
    version = (int(match[1]), int(match[2]))
    lacking = [each for each in SINCE if version < each[0]]
    for (major, minor), level, what, without in lacking:
        text = f"{release} has no {what} (Linux {major}.{minor}): {without}"
        yield Finding(level, "kernel", text, f"use Linux {major}.{minor} or later; 6.9 has everything")
    if not lacking:
        yield ok("kernel", f"{release} has {', '.join(what for _, _, what, _ in reversed(SINCE))}")


def check_page_size(machine: Machine) -> Iterator[Finding]:
    """Report the size of a page of the kernel."""
    text = f"a page of the kernel has {format_size(machine.page_bytes)}"
    if machine.page_bytes > PAGE_SIZE:
        text += (
            f": {machine.page_bytes // PAGE_SIZE} pages of zbudfs, which compresses each alone; the pool can return a page"
            " of the kernel only if all frames in it are free"
        )
    yield ok("page size", text)


def check_fuse(machine: Machine) -> Iterator[Finding]:
    """Check that /dev/fuse can be opened."""
    try:
        os.close(os.open(machine.path("/dev/fuse"), os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        remedy = "load the module: modprobe fuse" if missing else "run this as root; in a container, give it /dev/fuse"
        yield problem("fuse", f"/dev/fuse cannot be opened: {error.strerror}", remedy)
    else:
        yield ok("fuse", "/dev/fuse can be opened")


def check_loop(machine: Machine) -> Iterator[Finding]:
    """Check that a loop device is available."""
    if not machine.path("/dev/loop-control").exists():
        yield problem(
            "loop",
            "/dev/loop-control is missing: the swap file needs a loop device",
            f"load the module: modprobe loop; in a container, {pass_in(0)}",
        )
        return
    try:
        number = free_loop_number(machine.root)
    except OSError as error:
        if error.errno == errno.ENOTTY:  # a file in another system's folder
            yield ok("loop", "/dev/loop-control exists")
        else:
            yield warning(
                "loop",
                f"/dev/loop-control cannot be used: {error.strerror}",
                f"run this as root; in a container, {pass_in(0)}",
            )
        return
    if has_node(number, machine.root):
        yield ok("loop", f"/dev/loop{number} is free")
        return
    name = f".zbudfs-doctor-{os.getpid()}"
    try:
        make_node(number, name, machine.root)
        machine.path(f"/dev/{name}").unlink()
    except OSError as error:
        yield problem(
            "loop",
            f"the node /dev/loop{number} of the free loop device is missing, and cannot be created: {error.strerror}",
            f"in a container, {pass_in(number)}",
        )
    else:
        yield ok("loop", f"/dev/loop{number} is free; its node is missing, and zbudfs swapon creates it")


def check_timeouts(machine: Machine) -> Iterator[Finding]:
    """Check that the kernel does not limit the time of a FUSE request."""
    sentences = request_timeout_warnings(machine.root)
    for sentence in sentences:
        text, _, remedy = sentence.partition("; ")
        yield problem("fuse timeouts", text, f"{remedy}, and in /etc/sysctl.d/ for the next boot")
    if not sentences:
        yield ok("fuse timeouts", "the kernel does not limit the time of a request")


def check_psi(machine: Machine) -> Iterator[Finding]:
    """Check that the kernel reports memory pressure (PSI)."""
    name = "/proc/pressure/memory"
    try:
        machine.read(name)
    except OSError as error:
        yield psi_missing(error.errno or 0, machine)
    else:
        yield ok("pressure", f"{name} can be read: the pool shrinks when the system is short of memory")


def psi_missing(code: int, machine: Machine) -> Finding:
    """Return the finding for a kernel without PSI. `code` is the errno of the attempt to read it."""
    try:
        options = machine.read("/proc/cmdline").split()
    except OSError:
        options = []
    without = "the pool cannot shrink when the system is short of memory"
    if "psi=0" in options:
        return warning("pressure", f"PSI is turned off by psi=0: {without}", "boot without psi=0")
    if code == errno.EOPNOTSUPP:
        return warning(
            "pressure", f"PSI is disabled at boot: {without}", "boot with psi=1 on the kernel's command line"
        )
    return warning(
        "pressure", f"the kernel has no PSI: {without}", "use a kernel with CONFIG_PSI; some need psi=1 at boot"
    )
