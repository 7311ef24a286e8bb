# SPDX-License-Identifier: MIT
"""Checks of suspend and hibernation with swap on zbudfs.

The kernel freezes the daemon like any other program. Then a program that waits for a page keeps the machine awake. A
hibernation swaps out to make room for its image, and hangs the machine. The package and `make install` have a hook and units
against both. They need systemd, and the hook needs cgroup v2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from zbudfs.cli.doctor.finding import Finding, Machine, ok, warning
from zbudfs.cli.installation import Installation

HOOK: Final = "/usr/lib/systemd/system-sleep/zbudfs"
DROP_IN: Final = "systemd-hibernate.service.d/zbudfs.conf"
UNIT_FOLDERS: Final = (
    *("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system"),
    "/lib/systemd/system",
)


def check_suspend(machine: Machine) -> Iterator[Finding]:
    """Check that a hook freezes programs before the kernel freezes the daemon."""
    if "mem" not in _words(machine, "/sys/power/state") and "freeze" not in _words(machine, "/sys/power/state"):
        yield ok("suspend", "this machine cannot be suspended")
        return
    without = "a program that waits for a page keeps the machine awake"
    script = "freeze all other programs before each suspend (docs/understand/systemd.md)"
    if not machine.path("/run/systemd/system").is_dir():
        yield warning("suspend", f"systemd does not run here: {without}", script)
    elif not machine.path("/sys/fs/cgroup/cgroup.controllers").exists():
        remedy = "boot with systemd.unified_cgroup_hierarchy=1"
        yield warning("suspend", f"cgroup v2 is missing, so programs cannot be frozen first: {without}", remedy)
    elif not machine.path(HOOK).exists():
        yield warning("suspend", f"{HOOK} is missing: {without}", Installation().command_for_units())
    else:
        yield ok("suspend", "programs are frozen first, while the daemon still serves")


def check_hibernation(machine: Machine) -> Iterator[Finding]:
    """Check that swap on zbudfs is turned off before the machine hibernates."""
    modes = _words(machine, "/sys/power/disk")
    if "disk" not in _words(machine, "/sys/power/state") or not modes or modes == ["[disabled]"]:
        yield ok("hibernation", "this machine cannot hibernate")
        return
    text = "with swap on zbudfs a hibernation hangs the machine"
    by_hand = "run zbudfs hibernate prepare before, and zbudfs hibernate finish afterwards; or boot with nohibernate"
    if not machine.path("/run/systemd/system").is_dir():
        yield warning("hibernation", f"systemd does not run here: {text}", by_hand)
    elif not any(machine.path(f"{folder}/{DROP_IN}").exists() for folder in UNIT_FOLDERS):
        yield warning(
            "hibernation", f"{DROP_IN} is missing: {text}", f"{Installation().command_for_units()}; by hand, {by_hand}"
        )
    else:
        yield ok("hibernation", "swap is turned off first (use systemctl hibernate; never write to /sys/power/state)")


def _words(machine: Machine, name: str) -> list[str]:
    try:
        return machine.read(name).split()
    except OSError:
        return []
