# SPDX-License-Identifier: MIT
"""Open files of stats/ and control/: their number and bytes are limited, and a close costs nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import all_stats, opened, server_of
from tests.support import mounted
from zbudfs.fuse.openfiles import MAX_BYTES, MAX_FILES, OpenFiles

OPEN_NR: Final = 6000
SPARE_KIB: Final = 4096
"""Allowed growth of a worker's memory: MAX_BYTES, and the needs of the statistics."""


def test_too_many_files() -> None:
    """The oldest file loses its content."""
    files = OpenFiles(7)
    handles = [files.add(b"x") for _ in range(MAX_FILES + 3)]
    assert handles == list(range(7, 7 + MAX_FILES + 3))
    assert [files.find(handle) is None for handle in handles] == [True] * 3 + [False] * MAX_FILES


def test_too_many_bytes() -> None:
    """The oldest contents go, as many as needed. A single content larger than the limit is kept."""
    files = OpenFiles(0)
    first, second, third = (files.add(bytes(MAX_BYTES // 2 - 1), "key") for _ in range(3))
    assert [files.find(handle) is None for handle in (first, second, third)] == [True, False, False]
    files.rewrite(second, b"")
    fourth = files.add(bytes(MAX_BYTES // 2))
    assert [files.find(handle) is None for handle in (second, third, fourth)] == [False] * 3
    large = files.add(bytes(MAX_BYTES + 1))
    assert (len(files), files.find(large) is None) == (1, False)
    for handle in (large, large, first):
        files.remove(handle)
        files.rewrite(handle, b"x")
    assert len(files) == 0
    assert [files.find(files.add(bytes(MAX_BYTES // 2))) is None for _ in range(2)] == [False] * 2


def resident_kib(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])


LEAK: Final = """
import os, sys
fds = [os.open(sys.argv[1 + number % 2], os.O_RDONLY) for number in range(int(sys.argv[3]))]
print(os.pread(fds[-2], 1, 0), flush=True)
try:
    os.pread(fds[0], 1, 0)
except OSError as error:
    print(error.errno, flush=True)
sys.stdin.read()
"""


@pytest.mark.needs("root", "fuse")
def test_programs_that_leak_open_files(tmp_path: Path) -> None:
    """Memory stays the same while thousands of files are open and afterwards. The oldest files are stale."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    each = min(hard - 100, OPEN_NR)
    with mounted(tmp_path / "mnt") as mountpoint, contextlib.ExitStack() as leaks:
        names = [mountpoint / "stats/all.json", mountpoint / "stats/log"]
        pid = server_of(mountpoint)
        for path in names * MAX_FILES:
            path.read_bytes()
        before = resident_kib(pid)
        command = [sys.executable, "-c", LEAK, *map(str, names), str(each)]
        raised = f'ulimit -n {hard}; exec "$@"'
        for _ in range(-(-OPEN_NR // each)):
            leak = leaks.enter_context(
                subprocess.Popen(["sh", "-c", raised, "sh", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            assert leak.stdout is not None
            assert leak.stdout.readline() == b"b'{'\n"
            assert leak.stdout.readline() == b"%d\n" % errno.ESTALE
        assert resident_kib(pid) - before < SPARE_KIB
        with opened(mountpoint / "control/level") as fd:
            os.write(fd, b"3")
            assert os.pread(fd, 10, 0) == b"3\n"
        leaks.close()
        assert all_stats(mountpoint)["worker_pid"] == pid
        assert resident_kib(pid) - before < SPARE_KIB
