# SPDX-License-Identifier: MIT
"""The public statistics: /run/zbudfs-stats/NAME.json, which every user may read and the worker renews once a second.

The mount itself is root's (service/mountpoint.py). This file has what other users may know (core/public.py), as one JSON
object that is filled up with spaces:

    {"as_of": Unix time, "as_of_monotonic": seconds, "device": "0:52", ..., "crc32": of all text before this member}

The file is on the tmpfs of /run, or on a separate one, and not in the pool directory. So a user who has it open keeps no
memory of the pool alive. It has a fixed size and pages from the start, and each process of the mount has it mapped and
locked. So renewing it takes no memory and no wait, even while swap does not work. A reader that reads during a write sees a
wrong checksum, and reads again.
"""

import contextlib
import ctypes
import json
import os
import stat
import time
from collections.abc import Mapping
from typing import Any, Final
from zlib import crc32

from zbudfs.core.public import Value
from zbudfs.store.arena import Arena
from zbudfs.store.files import read_bytes

FOLDER: Final = "/run/zbudfs-stats"
STALE_SECONDS: Final = 10.0
"""Age from which the numbers are not shown. A worker that hangs is replaced within five seconds."""
BASE_BYTES: Final = 12 << 10
"""Room for all numbers and some warnings; the room for the two paths is added."""
_MS_NOSUID: Final = 1 << 1
_MS_NODEV: Final = 1 << 2
_MS_NOEXEC: Final = 1 << 3
_MAX_BYTES: Final = 1 << 20
_TRIES: Final = 20
_CHECKSUM: Final = b', "crc32": '


class PublicError(OSError):
    """There are no public statistics; the text gives the reason."""


class PublicFile:
    """The file of one mount, mapped into this process. `device` is "major:minor" of the mount."""

    def __init__(self, arena: Arena, device: str) -> None:
        self._arena = arena
        self._device = device

    @classmethod
    def create(cls, pool_directory: str, device: str, texts: list[str]) -> "PublicFile":
        """Make the file of the mount with this pool directory, or continue that of an earlier keeper.

        `texts` are the strings of unknown length for which it must have room. Files of mounts that are gone are removed.
        Raises OSError (PublicError if the file would not be in memory) and MemoryError.
        """
        folder, name = _folder_of(pool_directory), f"{os.path.basename(pool_directory)}.json"
        if not _is_tmpfs(folder):
            raise PublicError(f"{folder} is not on a tmpfs, and none can be mounted there: a write may wait for a disk")
        _sweep(folder, os.path.dirname(pool_directory))
        size = BASE_BYTES + sum(len(json.dumps(text)) for text in texts)
        with contextlib.suppress(FileNotFoundError):
            size = os.lstat(f"{folder}/{name}").st_size or size  # another version's size is right too
        arena = Arena(name, size, folder)
        arena.populate(0, arena.size)
        os.chmod(f"{folder}/{name}", 0o644)
        return cls(arena, device)

    def map_populated(self) -> None:
        """Map the pages of the file into this process, so that renewing it is no page fault."""
        self._arena.map_populated()

    def renew(self, numbers: Mapping[str, Value]) -> None:
        """Replace the numbers. Warnings for which there is no room are left out."""
        now: dict[str, Value | float] = {
            "as_of": int(time.time()),
            "as_of_monotonic": round(time.monotonic(), 3),
            "device": self._device,
        }
        text = _text({**now, **numbers})
        if len(text) > self._arena.size:
            text = _text({**now, **numbers, "warnings": ["root can read more warnings"]})
        if len(text) <= self._arena.size:
            self._arena.view[:] = text.ljust(self._arena.size - 1) + b"\n"


def make_folder(pool_directory: str) -> None:
    """Make FOLDER. If /run is not a tmpfs, mount a small one on it: a write to a mapped page on a disk may wait.

    Only one process at a time may call this. Raises OSError if the folder is not as it should be.
    """
    folder = _folder_of(pool_directory)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
        raise PublicError(f"{folder} must be a directory of root's that no other user may write to: remove it")
    os.chmod(folder, 0o755)  # makedirs applies the umask
    if not _is_tmpfs(folder):
        # Size 0 is no limit, so that df shows no blocks: the tmpfs holds one file of some 12 KiB for each mount.
        libc = ctypes.CDLL(None, use_errno=True)
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        for options in (b"size=0,mode=0755,noswap", b"size=0,mode=0755"):
            if libc.mount(b"zbudfs-stats", os.fsencode(folder), b"tmpfs", flags, options) == 0:
                break


def remove(pool_directory: str) -> None:
    """Remove the file of the mount with this pool directory, if there is one."""
    with contextlib.suppress(OSError):
        os.unlink(f"{_folder_of(pool_directory)}/{os.path.basename(pool_directory)}.json")


def _folder_of(pool_directory: str) -> str:
    """Return the folder of the public files: FOLDER, unless a test has the pool directories in another place."""
    return f"{os.path.dirname(pool_directory)}-stats"


def read(device: str, folder: str = FOLDER) -> dict[str, Any]:
    """Return the public numbers of the mount with this "major:minor". PublicError if there are none, or only old ones.

    "rounded" is True, and "renewed_at" is the time on the monotonic clock, in seconds.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    found: dict[str, Any] = {}
    for name in names:
        if name.endswith(".json") and (numbers := _read(f"{folder}/{name}")) and numbers.get("device") == device:
            found = max(found, numbers, key=lambda each: float(each.get("as_of_monotonic", 0)))
    if not found:
        raise PublicError(f"there are no public statistics of this mount in {folder}: run the command as root")
    renewed_at = found.pop("as_of_monotonic")
    age = time.monotonic() - renewed_at
    if age > STALE_SECONDS:
        raise PublicError(f"the public statistics are {age:.0f} s old: the daemon has died, or hangs")
    del found["device"], found["crc32"]
    return {**found, "rounded": True, "renewed_at": renewed_at}


def _text(numbers: Mapping[str, Value | float]) -> bytes:
    body = json.dumps(numbers).encode()[:-1]
    return b"%b%b%d}" % (body, _CHECKSUM, crc32(body))


def _read(path: str) -> dict[str, Any]:
    """Return the numbers in a file; empty if the file is not as it should be, or no read of it is consistent."""
    for _ in range(_TRIES):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return {}
        with os.fdopen(fd, "rb", buffering=0) as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
                return {}
            text = file.read(_MAX_BYTES)
        body, separator, checksum = text.rpartition(_CHECKSUM)
        with contextlib.suppress(ValueError):
            if separator and int(checksum.strip(b"} \n")) == crc32(body):
                numbers = json.loads(text)
                return numbers if isinstance(numbers, dict) else {}
        time.sleep(0.002)  # the worker is writing it, or has not written it yet
    return {}


def _sweep(folder: str, pools: str) -> None:
    """Remove the files of mounts whose pool directory is gone."""
    for name in os.listdir(folder):
        if name.endswith(".json") and not os.path.lexists(f"{pools}/{name.removesuffix('.json')}"):
            remove(f"{pools}/{name.removesuffix('.json')}")


def _is_tmpfs(path: str) -> bool:
    """Return whether a directory is on a tmpfs."""
    status = os.stat(path)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}".encode()
    for line in read_bytes("/proc/self/mountinfo").split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        words = fields.split(b" ")
        if len(words) >= 6 and words[2] == device:
            return rest.split(b" ")[0] == b"tmpfs"
    return False
