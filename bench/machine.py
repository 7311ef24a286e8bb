# SPDX-License-Identifier: MIT
"""The description of the machine on which figures were measured, in two sentences. It has no names and no paths."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import zstandard

from zbudfs import __version__


def describe(disk: Path) -> str:
    """Return the processor, memory, disk and versions. `disk` is a folder on the disk of the measurement."""
    model = _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.machine()
    ram = int(_first(r"MemTotal:\s*(\d+)", Path("/proc/meminfo")) or 0) / (1 << 20)
    virtual = ", a virtual machine" if re.search(r"\bhypervisor\b", Path("/proc/cpuinfo").read_text()) else ""
    return (
        f"Machine: {os.cpu_count()} cores ({model}{virtual}), {ram:.0f} GiB of RAM, {_disk(disk)}. Linux {platform.release()},"
        f" Python {platform.python_version()}, libfuse {_fuse()}, zstandard {zstandard.__version__} with zstd"
        f" {'.'.join(map(str, zstandard.ZSTD_VERSION))}, zbudfs {__version__}."
    )


def _first(pattern: str, file: Path) -> str | None:
    found = re.search(pattern, file.read_text())
    return found[1].strip() if found else None


def _fuse() -> str:
    run = subprocess.run(["pkg-config", "--modversion", "fuse3"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _disk(folder: Path) -> str:
    """Return the file system and the kind of disk that hold a folder."""
    number = folder.stat().st_dev
    shape = f"{os.major(number)}:{os.minor(number)}"
    kind = "a file system of an unknown kind"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, rest = line.partition(" - ")
        if words.split()[2] == shape:
            kind = rest.split()[0]
    try:
        device = Path(f"/sys/dev/block/{shape}").resolve()
    except OSError:
        return kind
    if not device.exists():
        return kind
    whole = device if (device / "queue").exists() else device.parent
    turns = (whole / "queue/rotational").read_text().strip() == "1"
    return (
        f"{kind} on a {'virtio disk' if 'virtio' in str(whole) else 'rotating disk' if turns else 'solid-state disk'}"
    )
