# SPDX-License-Identifier: MIT
"""Checks of the rights and limits of a daemon that is started from here. A child process tries each protection.

A service that a service manager starts has its own rights and limits. These checks hold for `zbudfs mount`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Final

from zbudfs.cli import footprint_text
from zbudfs.cli.doctor.finding import Finding, Level, Machine, ok, problem, warning
from zbudfs.core.sizes import format_size
from zbudfs.service import hardening

CAPABILITIES: Final = {
    21: (Level.PROBLEM, "CAP_SYS_ADMIN", "nothing can be mounted, and no swap turned on"),
    24: (Level.PROBLEM, "CAP_SYS_RESOURCE", "IO flusher mode and the lowest OOM score are refused"),
    19: (Level.PROBLEM, "CAP_SYS_PTRACE", "a keeper that is started again cannot copy the descriptors of a worker"),
    14: (Level.WARNING, "CAP_IPC_LOCK", "memory can be locked only up to a limit"),
    23: (Level.WARNING, "CAP_SYS_NICE", "real-time scheduling is refused"),
}
"""Needed capabilities, by number: the level of a finding, the name, and the effect of its absence."""


def check_capabilities(machine: Machine) -> Iterator[Finding]:
    """Find missing capabilities."""
    found = int(machine.first_line_with("/proc/self/status", "CapEff:"), 16)
    missing = [each for number, each in CAPABILITIES.items() if not found >> number & 1]
    for level, name, without in missing:
        yield Finding(
            level, "capabilities", f"{name} is missing: {without}", "be root; in a container, give it that capability"
        )
    if not missing:
        yield ok("capabilities", ", ".join(name for _, name, _ in CAPABILITIES.values()))


def check_memlock(machine: Machine) -> Iterator[Finding]:
    """Check the limit on locked memory."""
    limit = machine.first_line_with("/proc/self/limits", "Max locked memory").split()[0]
    capable = int(machine.first_line_with("/proc/self/status", "CapEff:"), 16) >> 14 & 1
    if limit == "unlimited":
        yield ok("locked memory", "there is no limit")
    elif capable:
        yield ok("locked memory", f"the limit is {format_size(int(limit))}, which CAP_IPC_LOCK overrides")
    else:
        yield problem(
            "locked memory",
            f"the limit is {format_size(int(limit))}: the daemon itself may be swapped out, and the machine may hang",
            "set ulimit -l unlimited, LimitMEMLOCK=infinity in the service, or grant CAP_IPC_LOCK",
        )


def check_protections(machine: Machine) -> Iterator[Finding]:
    """Try each protection of the daemon in a child process, and report those that are refused."""
    for level, name, step in (
        (Level.PROBLEM, "IO flusher", hardening.set_io_flusher),
        (Level.PROBLEM, "OOM score", hardening.protect_from_oom_killer),
        (Level.WARNING, "real-time", hardening.schedule_realtime),
        (Level.PROBLEM, "mlockall", hardening.lock_all),
    ):
        refusal = in_child(step)
        if refusal is None:
            yield ok(name, "granted (tried in a child process)")
        else:
            text, _, remedy = refusal.rpartition("; ")
            yield Finding(level, name, text or refusal, remedy if text else "look in the kernel's log (dmesg)")


def in_child(step: Callable[[], str | None]) -> str | None:
    """Call `step` in a child process, and return its result. Changes to the process end with the child."""
    answer, wanted = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = step() or ""
        except BaseException as error:  # the child must not go on with the code of the parent
            text = f"it failed ({error!r})"
        os.write(wanted, text.encode(errors="replace"))
        os._exit(0)
    os.close(wanted)
    with open(answer, encoding="utf-8") as stream:  # noqa: PTH123  a descriptor
        text = stream.read()
    os.waitpid(child, 0)
    return text or None


def check_footprint(machine: Machine) -> Iterator[Finding]:
    """Report the RAM that zbudfs takes and saves, and whether it pays."""
    footprint = machine.footprint
    text = footprint_text.takes_and_saves(footprint)
    if footprint.is_worthwhile or not footprint.is_small_machine:
        yield ok("memory", text)
    else:
        clause, _, remedy = footprint_text.not_worthwhile(machine.parts or (machine.settings,)).partition(": ")
        yield warning("memory", f"{text}; {clause}", remedy)


def check_cgroup(machine: Machine) -> Iterator[Finding]:
    """Check that memory cgroups leave enough memory for the pool and the processes."""
    limits = [limit for limit in _cgroup_limits(machine) if limit < 1 << 62]
    footprint = machine.footprint
    needed = footprint.pool_bytes + footprint.own_bytes
    if not limits:
        yield ok("memory cgroup", "no limit for processes that are started from here")
    elif min(limits) < needed:
        yield problem(
            "memory cgroup",
            f"the limit is {format_size(min(limits))}, but a pool of {format_size(footprint.pool_bytes)} with processes"
            f" and tables needs {format_size(needed)}: the daemon would wait for memory that only the daemon can free",
            "use a smaller pool or a higher limit, or start zbudfs@NAME, which runs in system.slice",
        )
    else:
        yield warning(
            "memory cgroup",
            f"the limit is {format_size(min(limits))}: the daemon and other processes in the same cgroup may reach it",
            "start zbudfs@NAME, which runs in system.slice",
        )


def _cgroup_limits(machine: Machine) -> Iterator[int]:
    """Yield the limits, in bytes, of the memory cgroups of this process and of their parents."""
    mounts = machine.read("/proc/self/mountinfo")
    for line in machine.read("/proc/self/cgroup").split("\n"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            fstype, knob = "cgroup2", "memory.max"
        elif "memory" in controllers.split(","):
            fstype, knob = "cgroup", "memory.limit_in_bytes"
        else:
            continue
        for mount in mounts.split("\n"):
            fields, _, rest = mount.partition(" - ")
            words = rest.split(" ")
            if words[0] != fstype or (fstype == "cgroup" and "memory" not in words[-1].split(",")):
                continue
            # In a container, the mount shows only a part of the tree, and the path begins with the path of that part.
            part, top = fields.split(" ")[3:5]
            inside = PurePosixPath(path.removeprefix(part if part != "/" else "").lstrip("/"))
            for folder in (inside, *inside.parents):
                try:
                    text = machine.read(str(PurePosixPath(top) / folder / knob))
                except OSError:
                    continue  # the root cgroup has no limit
                if re.fullmatch(r"\d+", text):
                    yield int(text)
