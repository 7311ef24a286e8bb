# SPDX-License-Identifier: MIT
"""Hearing from the kernel that the system is short of memory."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest
import trio

from tests.store.rig import run
from zbudfs.store.pressure import MEMINFO_PATH, PSI_PATH, PressureMonitor, is_short

MEMINFO = b"MemTotal:       %d kB\nMemFree:            1 kB\nMemAvailable:   %d kB\nBuffers:               0 kB\n"


@pytest.mark.parametrize(
    ("total", "available", "short"),
    [(8000, 1001, False), (8000, 1000, False), (8000, 999, True), (8000, 0, True), (8000, 8000, False), (16, 1, True)],
)
def test_short_is_less_than_an_eighth(total: int, available: int, short: bool) -> None:
    """The system is short when less than an eighth of its RAM is available."""
    assert is_short(MEMINFO % (total, available)) == short


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", b"nonsense\n", b"MemTotal:\n" * 0 + b"MemFree: 5 kB\n", b"MemTotalX: 5 kB\nMemAvailable: 1 kB\n"],
)
def test_a_text_that_tells_nothing(text: bytes) -> None:
    """Without the total there is no telling, and that is not short."""
    assert not is_short(text)


def test_free_memory_is_not_available_memory() -> None:
    """Other lines, whatever they say, do not count: what the cache holds can be had."""
    text = b"MemFree: 1 kB\nMemTotal: 8000 kB\nSwapFree: 0 kB\nMemAvailable: 7000 kB\n"
    assert not is_short(text)
    assert not is_short(b"".join(reversed(text.splitlines(keepends=True))))


def test_the_real_meminfo_is_understood() -> None:
    """The kernel's own text has what is looked for: with ten times the total it is short, as it is it can be told."""
    text = Path(MEMINFO_PATH).read_bytes()
    assert is_short(text) in (True, False)
    total = next(line for line in text.splitlines() if line.startswith(b"MemTotal:"))
    kib = int(total.split()[1])
    assert is_short(text.replace(total, b"MemTotal: %d kB" % (kib * 10)))
    assert len(text) < 4096


def descriptors() -> list[str]:
    """Return what is open in this process."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that is used for looking
            found.append(str(entry.readlink()))
    return sorted(found)


def test_the_monitor_opens_the_real_thing() -> None:
    """It sets its trigger, waits in a thread of its own, says nothing while nothing is wrong, and goes without a trace."""
    if not os.access(PSI_PATH, os.W_OK):
        pytest.skip(f"needs {PSI_PATH}: this kernel has no PSI, or does not let this user set a trigger")

    async def main() -> None:
        try:
            monitor = PressureMonitor(lambda: None)
        except OSError as error:
            pytest.skip(f"needs a PSI trigger: {error.strerror}")
        assert any(thread.name == "pressure" for thread in threading.enumerate())
        await trio.lowlevel.checkpoint()
        monitor.close()
        assert not any(thread.name == "pressure" for thread in threading.enumerate())

    async def measured() -> None:
        before = descriptors()
        await main()
        assert descriptors() == before

    run(measured)


@pytest.mark.parametrize("which", ["missing", "a directory", "read only"])
def test_a_kernel_without_psi(tmp_path: Path, which: str) -> None:
    """Where there is nothing to listen to it is an OSError, and nothing stays open."""
    path = {"missing": tmp_path / "nothing", "a directory": tmp_path, "read only": Path("/proc/self/mounts")}[which]

    async def main() -> None:
        before, threads = descriptors(), threading.active_count()
        with pytest.raises(OSError, match=r"."):
            PressureMonitor(lambda: None, str(path))
        assert descriptors() == before
        assert threading.active_count() == threads

    run(main)


def test_a_system_without_meminfo(tmp_path: Path) -> None:
    """The same where the amount of memory cannot be read."""
    psi = tmp_path / "psi"
    psi.touch()

    async def main() -> None:
        before = descriptors()
        with pytest.raises(OSError, match=r"."):
            PressureMonitor(lambda: None, str(psi), str(tmp_path / "nothing"))
        assert descriptors() == before

    run(main)
