# SPDX-License-Identifier: MIT
"""The list of all checks in the order of the report, and the report itself, as text and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Final

from zbudfs.cli.doctor import disk, kernel, rights, sleep, software, swap
from zbudfs.cli.doctor.finding import Finding, Level, Machine, warning
from zbudfs.service.footprint import Footprint

CHECKS: Final[tuple[Callable[[Machine], Iterator[Finding]], ...]] = (
    kernel.check_version,
    kernel.check_page_size,
    kernel.check_fuse,
    kernel.check_loop,
    kernel.check_timeouts,
    kernel.check_psi,
    software.check_libraries,
    software.check_programs,
    rights.check_capabilities,
    rights.check_memlock,
    rights.check_protections,
    rights.check_footprint,
    rights.check_cgroup,
    swap.check_zswap,
    swap.check_other_swap,
    swap.check_swap_is_on,
    swap.check_container,
    sleep.check_suspend,
    sleep.check_hibernation,
    disk.check_backing,
)


def examine(machine: Machine) -> list[Finding]:
    """Run all checks, and return their findings. A check that fails to read a file becomes a warning."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(machine)
        except (OSError, ValueError, IndexError) as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            remedy = "run this as root" if isinstance(error, PermissionError) else "mount /proc and /sys"
            findings.append(warning(name, f"this check failed: {error}", remedy))
    return findings


def as_page(findings: Sequence[Finding], columns: int | None = None) -> str:
    """Return the report: a line for each finding and each remedy, wrapped to `columns`; None: not wrapped."""
    width = max(len(finding.check) for finding in findings)
    margin = " " * (7 + 2 + width + 2)
    lines = []
    for finding in findings:
        paragraphs = [(f"{finding.level:7}  {finding.check:{width}}  ", finding.text)]
        if finding.remedy:
            paragraphs.append((margin, f"-> {finding.remedy}"))
        for start, text in paragraphs:
            pieces = textwrap.wrap(text, max(columns - len(margin), 20)) if columns else [text]
            lines += [f"{start if at == 0 else margin}{piece}" for at, piece in enumerate(pieces)]
    return "\n".join(
        [*lines, "", f"{count(findings, Level.PROBLEM)} problems, {count(findings, Level.WARNING)} warnings"]
    )


def as_json(findings: Sequence[Finding], footprint: Footprint | None = None) -> str:
    """Return the report as a JSON object, with the numbers of the footprint."""
    numbers = {"problems": count(findings, Level.PROBLEM), "warnings": count(findings, Level.WARNING)}
    memory = {} if footprint is None else {"memory": footprint.as_object()}
    return json.dumps({**numbers, **memory, "findings": [asdict(finding) for finding in findings]}, indent=2)


def count(findings: Sequence[Finding], level: Level) -> int:
    """Return the number of findings of a level."""
    return sum(finding.level is level for finding in findings)
