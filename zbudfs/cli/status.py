# SPDX-License-Identifier: MIT
"""`zbudfs status` reports the numbers of each mount, as JSON or as a page for people (`page`).

The numbers are those of MOUNTPOINT/stats/all.json, unchanged. The command adds the facts that the daemon does not know: the
users of the mount (`users`), and its problems with their remedies (`remedies`). Several instances make one report
(`stripe`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from zbudfs.cli import stripe
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.ask import all_numbers, why_silent
from zbudfs.cli.errors import CommandError
from zbudfs.cli.page import page
from zbudfs.cli.remedies import remedies
from zbudfs.cli.stdio import shows_unicode
from zbudfs.cli.target import all_mounted, resolve
from zbudfs.service.footprint import Footprint
from zbudfs.service.mountpoint import Mount, zbudfs_mounts
from zbudfs.service.settings import Settings, SettingsError, ram_bytes
from zbudfs.swap.discard import kept_discard
from zbudfs.swap.loop import LOOP_DEVICE, swaps_on, users, was_swap

Report = dict[str, Any]
"""The numbers of one mount by name; or "mountpoint" and "error" if its daemon gives none."""

SAMPLE_SECONDS: Final = 0.5
"""Time between the two samples from which the speeds are computed."""

PUBLIC_SAMPLE_SECONDS: Final = 1.2
"""Time between two samples of public statistics, which change once a second."""

_CLEAR: Final = "\x1b[H\x1b[J"


def report(mount: Mount) -> Report:
    """Return the report of one mount, or an error report if its daemon gives no numbers."""
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
    for swap in swaps_on(mount.mountpoint, mount.st_dev):
        if discard := kept_discard(swap.path):
            found["discard"] = discard
    found["remedies"] = remedies(found)
    return found


def _own_bytes(numbers: Report) -> int | None:
    """Return the RAM that the daemon takes besides the pool; None if its version does not export its settings."""
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
    """Return the report of the mount on `mountpoint`, or one report of all its instances together."""
    reports = [report(mount) for mount in mounts]
    return reports[0] if mounts[0].mountpoint == mountpoint else stripe.summed(mountpoint, reports)


def as_json(reports: Report | Sequence[Report], *, indent: int | None = 2) -> str:
    """Return JSON: an object for one report, a list for several. It is ASCII, so that every path can be printed."""
    return json.dumps(reports, indent=indent)


def as_pages(reports: Sequence[Report], before: Sequence[Report] = (), seconds: float = 0.0) -> str:
    """Return a page of text for each report, with the speeds since the reports `before`, which are `seconds` older."""
    if not reports:
        return "no zbudfs is mounted"
    earlier = {each["mountpoint"]: each for each in before if "error" not in each}
    blocks = shows_unicode()
    return "\n\n".join(page(each, earlier.get(each["mountpoint"]), seconds, blocks=blocks) for each in reports)


def watch(collect: Callable[[], list[Report]], seconds: float, *, as_object: bool, single: bool) -> None:
    """Print the reports of `collect` every `seconds`, until Ctrl-C: a page that replaces the last one, or a line of JSON."""
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


def status(arguments: Arguments) -> int:
    """Print the statistics of one mount or of every mount, once or repeatedly. Return 1 if a daemon does not answer."""
    typed, seconds = arguments.one_mountpoint, arguments.watch
    if isinstance(seconds, str):  # a path after --watch
        if typed is not None:
            raise CommandError(f"{seconds!r} is not a number of seconds: write --watch SECONDS MOUNTPOINT")
        typed, seconds = seconds, 2.0
    only = None if typed is None else resolve(typed)
    chosen = None if only is None else all_mounted(only)

    def collect() -> list[Report]:
        groups = stripe.grouped(zbudfs_mounts()) if only is None or chosen is None else [(only, chosen)]
        reports = [report_all(*group) for group in groups]
        if only is not None and "error" in reports[0]:
            raise CommandError(str(reports[0]["error"]))
        return reports

    if seconds is not None:
        with contextlib.suppress(KeyboardInterrupt):
            watch(collect, seconds, as_object=arguments.json, single=only is not None)
        return 0
    before, then = collect(), time.monotonic()
    if arguments.json:
        reports = before
        print(as_json(reports if only is None else reports[0]))
    else:
        rounded = any(report.get("rounded") for report in before)
        time.sleep((PUBLIC_SAMPLE_SECONDS if rounded else SAMPLE_SECONDS) if before else 0)
        reports = collect()
        print(as_pages(reports, before, time.monotonic() - then))
    return 1 if any("error" in report for report in reports) else 0
