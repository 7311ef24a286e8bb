# SPDX-License-Identifier: MIT
"""The kernel's reports that the system is short of memory."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest
import trio

from tests.store.rig import run, trio_test
from zbudfs.store.pressure import MEMINFO_PATH, PSI_PATH, PressureMonitor, is_short

MEMINFO = b"MemTotal:       %d kB\nMemFree:            1 kB\nMemAvailable:   %d kB\nBuffers:               0 kB\n"


@pytest.mark.parametrize(
    ("total", "available", "short"),
    [(8000, 1001, False), (8000, 1000, False), (8000, 999, True), (8000, 0, True), (8000, 8000, False), (16, 1, True)],
)
def test_short_is_less_than_an_eighth(total: int, available: int, short: bool) -> None:
    """The system is short if less than an eighth of its RAM is available."""
    assert is_short(MEMINFO % (total, available)) == short


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", b"nonsense\n", b"MemTotal:\n" * 0 + b"MemFree: 5 kB\n", b"MemTotalX: 5 kB\nMemAvailable: 1 kB\n"],
)
def test_a_text_without_the_total(text: bytes) -> None:
    """Without the total, the system is not short."""
    assert not is_short(text)


def test_free_memory_is_not_available_memory() -> None:
    """Other lines do not count, since memory of the cache is available."""
    text = b"MemFree: 1 kB\nMemTotal: 8000 kB\nSwapFree: 0 kB\nMemAvailable: 7000 kB\n"
    assert not is_short(text)
    assert not is_short(b"".join(reversed(text.splitlines(keepends=True))))


def test_the_real_meminfo_is_understood() -> None:
    """The kernel's own text has both numbers: with ten times the total the system is short."""
    text = Path(MEMINFO_PATH).read_bytes()
    assert is_short(text) in (True, False)
    total = next(line for line in text.splitlines() if line.startswith(b"MemTotal:"))
    kib = int(total.split()[1])
    assert is_short(text.replace(total, b"MemTotal: %d kB" % (kib * 10)))
    assert len(text) < 4096


def descriptors() -> list[str]:
    """Return the open descriptors of this process."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that this function uses
            found.append(str(entry.readlink()))
    return sorted(found)


def test_the_monitor_opens_the_real_thing() -> None:
    """The monitor sets its trigger, waits in its own thread, reports nothing without pressure, and leaves nothing open."""
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
@trio_test
async def test_a_kernel_without_psi(tmp_path: Path, which: str) -> None:
    """Without PSI there is an OSError, and nothing stays open."""
    path = {"missing": tmp_path / "nothing", "a directory": tmp_path, "read only": Path("/proc/self/mounts")}[which]

    before, threads = descriptors(), threading.active_count()
    with pytest.raises(OSError, match=r"."):
        PressureMonitor(lambda: None, str(path))
    assert descriptors() == before
    assert threading.active_count() == threads


@trio_test
async def test_a_system_without_meminfo(tmp_path: Path) -> None:
    """Without meminfo there is an OSError, and nothing stays open."""
    psi = tmp_path / "psi"
    psi.touch()

    before = descriptors()
    with pytest.raises(OSError, match=r"."):
        PressureMonitor(lambda: None, str(psi), str(tmp_path / "nothing"))
    assert descriptors() == before
