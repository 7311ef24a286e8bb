# SPDX-License-Identifier: MIT
"""Checks of the libraries that the daemon loads, and of the programs that turn its file into swap."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from zbudfs.cli.doctor.finding import Finding, Machine, ok, problem
from zbudfs.swap.loop import SYSTEM_PATH

LIBRARIES: Final = ("pyfuse3", "trio", "zstandard")
PROGRAMS: Final = ("losetup", "mkswap", "swapon", "swapoff")

_LIMIT_SECONDS: Final = 30.0
_LOAD: Final = (
    "from zbudfs.fuse import shim; from zbudfs.core.codec import Codec; import pyfuse3; Codec();"
    " shim.verify(open('/proc/self/maps').read()); print(shim.libfuse_version())"
)


def check_libraries(machine: Machine) -> Iterator[Finding]:
    """Load the libraries of the daemon in a child process, and report their versions."""
    command = [sys.executable, "-I", "-c", _LOAD]
    run = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
    if run.returncode != 0:
        words = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        yield problem("libraries", f"they cannot be loaded: {words[-1]}", "install zbudfs again")
        return
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    python = ".".join(map(str, sys.version_info[:3]))
    yield ok("libraries", f"libfuse {run.stdout.strip()}, {', '.join(versions)}, Python {python}")


def check_programs(machine: Machine) -> Iterator[Finding]:
    """Check that the programs of util-linux are installed."""
    path = ":".join(str(machine.path(folder)) for folder in SYSTEM_PATH.split(":"))
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        yield problem("programs", f"not installed: {', '.join(missing)}", "apt-get install util-linux mount")
    else:
        yield ok("programs", ", ".join(PROGRAMS))
