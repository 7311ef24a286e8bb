# SPDX-License-Identifier: MIT
"""What `zbudfs status` knows: the daemon's own snapshot, as JSON or as a page for people (`page`).

The numbers are those of MOUNTPOINT/stats/all.json and are passed on as they are; added is what the daemon cannot
know, who uses it (`users`), and what is wrong (`remedies`). Several instances are told as one (`stripe`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from zbudfs.cli import stripe
from zbudfs.cli.ask import all_numbers, why_silent
from zbudfs.cli.page import page
from zbudfs.cli.remedies import remedies
from zbudfs.cli.stdio import shows_unicode
from zbudfs.service.footprint import Footprint
from zbudfs.service.mountpoint import Mount
from zbudfs.service.settings import Settings, SettingsError, ram_bytes
from zbudfs.swap.loop import LOOP_DEVICE, users, was_swap

Report = dict[str, Any]
"""One mount's numbers by name; or "mountpoint" and "error", if its daemon gives none."""

SAMPLE_SECONDS: Final = 0.5
"""Between the two samples from which the page has its speeds."""

PUBLIC_SAMPLE_SECONDS: Final = 1.2
"""The same for public numbers, which change once a second."""

_CLEAR: Final = "\x1b[H\x1b[J"


def report(mount: Mount) -> Report:
    """Return what the daemon of `mount` tells, or why it tells nothing."""
    try:
        found = all_numbers(mount.mountpoint)
    except (OSError, ValueError) as error:
        return {"mountpoint": mount.mountpoint, "error": why_silent(mount.mountpoint, error)}
    found["mountpoint"] = mount.mountpoint
    if (own_bytes := _own_bytes(found)) is not None:
        found["own_bytes"] = own_bytes
    found["users"] = here = users(mount.mountpoint, mount.st_dev)
    loops = [user.removeprefix(LOOP_DEVICE) for user in here if user.startswith(LOOP_DEVICE)]
    found["swap_off"] = [device for device in loops if was_swap(device)]
    found["remedies"] = remedies(found)
    return found


def _own_bytes(numbers: Report) -> int | None:
    """Return the RAM that the daemon takes besides the pool; None if its version does not tell its settings."""
    try:
        settings = Settings(
            mountpoint=numbers["mountpoint"],
            size_bytes=numbers["size_bytes"],
            pool_bytes=numbers["pool_configured_bytes"],
            backing=numbers["backing_path"],
            packing=numbers["packing"],
        )
    except (KeyError, SettingsError):
        return None
    return Footprint.of([settings], ram_bytes()).own_bytes


def report_all(mountpoint: str, mounts: Sequence[Mount]) -> Report:
    """Return the report of the one mount that is there, or one of all instances together."""
    reports = [report(mount) for mount in mounts]
    return reports[0] if mounts[0].mountpoint == mountpoint else stripe.summed(mountpoint, reports)


def as_json(reports: Report | Sequence[Report], *, indent: int | None = 2) -> str:
    """Return an object for one report, a list of objects for several; ASCII, so that any path survives."""
    return json.dumps(reports, indent=indent)


def as_pages(reports: Sequence[Report], before: Sequence[Report] = (), seconds: float = 0.0) -> str:
    """Return a page for each report, for people; speeds since the reports `before` that are `seconds` older."""
    if not reports:
        return "no zbudfs is mounted"
    earlier = {each["mountpoint"]: each for each in before if "error" not in each}
    blocks = shows_unicode()
    return "\n\n".join(page(each, earlier.get(each["mountpoint"]), seconds, blocks=blocks) for each in reports)


def watch(collect: Callable[[], list[Report]], seconds: float, *, as_object: bool, single: bool) -> None:
    """Print what `collect` gives again and again, until Ctrl-C: a page that replaces itself, or a line of JSON."""
    before: list[Report] = []
    then = time.monotonic()
    while True:
        reports, now = collect(), time.monotonic()
        if as_object:
            text = as_json(reports[0] if single else reports, indent=None)
        else:
            text = as_pages(reports, before, now - then)
            text = f"{_CLEAR}{text}" if sys.stdout.isatty() else f"{text}\n"
        print(text, flush=True)
        before, then = reports, now
        time.sleep(seconds)
