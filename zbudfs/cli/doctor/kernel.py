# SPDX-License-Identifier: MIT
"""What the kernel can do, and how it is set up."""

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
    ((5, 14), Level.WARNING, "MADV_POPULATE", "memory is made present in advance only where it may be locked"),
    ((6, 4), Level.WARNING, "noswap tmpfs", "what is stored cannot be handed to a newer version of zbudfs"),
    ((6, 9), Level.WARNING, "FUSE_NOTIFY_RESEND", "if the worker dies, requests that it had taken are lost, and swap"),
)
"""What came with which version, how much it matters, and what its absence means."""


def check_version(machine: Machine) -> Iterator[Finding]:
    """Tell what the kernel's version lacks."""
    release = machine.read("/proc/sys/kernel/osrelease")
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        yield warning(
            "kernel", f"version {release!r} makes no sense", "use a kernel of kernel.org's or a distribution's"
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
    """Tell the size of the kernel's page."""
    text = f"the kernel's page has {format_size(machine.page_bytes)}"
    if machine.page_bytes > PAGE_SIZE:
        text += (
            f": {machine.page_bytes // PAGE_SIZE} pages of zbudfs, which compresses each alone; the pool gives RAM back"
            " only where all frames in a page of the kernel are free"
        )
    yield ok("page size", text)


def check_fuse(machine: Machine) -> Iterator[Finding]:
    """See whether /dev/fuse can be opened."""
    try:
        os.close(os.open(machine.path("/dev/fuse"), os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        remedy = "load the module: modprobe fuse" if missing else "run this as root; in a container, give it /dev/fuse"
        yield problem("fuse", f"/dev/fuse cannot be opened: {error.strerror}", remedy)
    else:
        yield ok("fuse", "/dev/fuse can be opened")


def check_loop(machine: Machine) -> Iterator[Finding]:
    """See whether there are loop devices."""
    if not machine.path("/dev/loop-control").exists():
        yield problem(
            "loop",
            "/dev/loop-control is missing: a file of a FUSE file system can be swap only through a loop device",
            f"load the module: modprobe loop; in a container, {pass_in(0)}",
        )
        return
    try:
        number = free_loop_number(machine.root)
    except OSError as error:
        if error.errno == errno.ENOTTY:  # a file in another system's folder
            yield ok("loop", "/dev/loop-control is there")
        else:
            yield warning(
                "loop", f"/dev/loop-control cannot be asked: {error.strerror}", f"run this as root; {pass_in(0)}"
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
            f"the node /dev/loop{number} of the free loop device is missing, and cannot be made: {error.strerror}",
            f"in a container, {pass_in(number)}",
        )
    else:
        yield ok("loop", f"/dev/loop{number} is free; its node is missing, and zbudfs swapon makes it")


def check_timeouts(machine: Machine) -> Iterator[Finding]:
    """See whether the kernel limits the time that a FUSE request may take."""
    sentences = request_timeout_warnings(machine.root)
    for sentence in sentences:
        text, _, remedy = sentence.partition("; ")
        yield problem("fuse timeouts", text, f"{remedy}, and in /etc/sysctl.d/ for the next boot")
    if not sentences:
        yield ok("fuse timeouts", "a request may take as long as it takes")


def check_psi(machine: Machine) -> Iterator[Finding]:
    """See whether the kernel tells of pressure on memory."""
    name = "/proc/pressure/memory"
    try:
        machine.read(name)
    except OSError as error:
        yield psi_missing(error.errno or 0, machine)
    else:
        yield ok("pressure", f"{name} can be read: the pool gives way when the system is short of memory")


def psi_missing(code: int, machine: Machine) -> Finding:
    """Tell why there is no pressure to be read; `code` is the errno of the attempt."""
    try:
        options = machine.read("/proc/cmdline").split()
    except OSError:
        options = []
    without = "the pool cannot give way when the system is short of memory"
    if "psi=0" in options:
        return warning("pressure", f"PSI is turned off by psi=0: {without}", "boot without psi=0")
    if code == errno.EOPNOTSUPP:
        return warning(
            "pressure", f"PSI is disabled at boot: {without}", "boot with psi=1 on the kernel's command line"
        )
    return warning("pressure", f"there is no PSI: {without}", "use a kernel with CONFIG_PSI; some need psi=1 at boot")
