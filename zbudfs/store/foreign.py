# SPDX-License-Identifier: MIT
"""A description of the content of a foreign file or device. blkid knows the labels of file systems, swap, RAID and others."""

import contextlib
import os
import select
import signal
import time
from typing import Final

BLKID: Final = tuple(f"{folder}/blkid" for folder in ("/usr/sbin", "/sbin", "/usr/bin", "/bin"))
LIMIT_SECONDS: Final = 10.0
"""Longest time that blkid may take, since it may wait for a disk that does not answer. Arbitrary."""
_MOST_BYTES: Final = 1 << 16
_KINDS: Final = {
    "LVM2_member": "a physical volume of LVM",
    "linux_raid_member": "a member of a RAID array",
    "crypto_LUKS": "an encrypted volume (LUKS)",
    "zfs_member": "a member of a ZFS pool",
}


def describe(path: str, *, device: bool) -> str:
    """Return the content of the file or device at `path`, for a sentence: "swap (an old swap partition)"."""
    program = next((each for each in BLKID if os.access(each, os.X_OK)), None)
    if program is None:
        return "data (blkid, which could name it, is not installed)"
    found = dict(line.split("=", 1) for line in _ask(program, path).splitlines() if "=" in line)
    kind, table = found.get("TYPE", ""), found.get("PTTYPE", "")
    name = f", {found['LABEL']!r}" if "LABEL" in found else ""
    if kind == "swap":
        return f"swap (an old swap {'partition' if device else 'file'}{name})"
    if kind in _KINDS:
        return f"{_KINDS[kind]}{name}"
    if kind:
        return f"a file system ({kind}{name})"
    if table:
        return f"a partition table ({table})"
    return "data of a kind that blkid does not know"


def _ask(program: str, path: str) -> str:
    """Return the output of `blkid` for `path`; nothing if it fails or takes too long."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    words = [program, "--probe", "--output", "export", path]
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions = [
            (os.POSIX_SPAWN_DUP2, nothing, 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_DUP2, nothing, 2),
        ]
        pid = os.posix_spawn(program, words, {"LC_ALL": "C"}, file_actions=actions, setsigmask=())
    except OSError:
        os.close(reader)
        return ""
    finally:
        os.close(writer)
        os.close(nothing)
    end = time.monotonic() + LIMIT_SECONDS
    printed = b""
    with contextlib.suppress(OSError):
        while len(printed) < _MOST_BYTES and select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = os.read(reader, 4096)
            if not piece:
                break
            printed += piece
        else:
            os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _reap(pid, end)
    return printed.decode("utf-8", "backslashreplace")


def _reap(pid: int, end: float) -> None:
    """Wait for a process to end, but for a limited time: one that waits for a disk dies when the disk has answered."""
    while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < end + 1:
        time.sleep(0.01)
