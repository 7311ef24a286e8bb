# SPDX-License-Identifier: MIT
"""The amount of memory that the memory cgroup still allows this process.

A frame is populated in a system call. If the cgroup has no room for it, the kernel does not refuse. It kills a process of
the cgroup, which is this daemon, and then the worker that takes over, and the next (measured). So the daemon checks before.

It reads these files each time. They are opened only once, since there may be no memory for that later:

    version 1    memory.limit_in_bytes    memory.usage_in_bytes      memory.stat: total_inactive_file
    version 2    memory.max               memory.current             memory.stat: inactive_file

Every level counts, from the process's own up to the root of the tree. Without a memory cgroup there is no limit.
"""

import contextlib
import os
from typing import Final, NamedTuple

from zbudfs.store.files import below, read_text

UNLIMITED: Final = 1 << 62
_STAT_BYTES: Final = 8192
_VERSIONS: Final = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file "),
    ("memory.max", "memory.current", b"inactive_file "),
)


class _Level(NamedTuple):
    limit_fd: int
    usage_fd: int
    stat_fd: int
    word: bytes
    """The word before the bytes of page cache that the kernel can drop at once."""


class CgroupLimit:
    """The levels of this process's memory cgroup. `root` is the folder of `proc/`, and of the trees in proc/self/mounts."""

    def __init__(self, root: str = "/") -> None:
        self._levels: list[_Level] = []
        with contextlib.suppress(OSError, ValueError, IndexError):
            for folder, top, version in _trees(root):
                self._open(folder, version)
                while folder != top:
                    folder = os.path.dirname(folder)
                    self._open(folder, version)

    def _open(self, folder: str, version: int) -> None:
        limit, usage, word = _VERSIONS[version - 1]
        fds: list[int] = []
        try:
            fds.extend(
                os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in (limit, usage, "memory.stat")
            )
        except OSError:  # the root of the tree has no limit
            for fd in fds:
                os.close(fd)
        else:
            self._levels.append(_Level(fds[0], fds[1], fds[2], word))

    def available_bytes(self) -> int:
        """Return the bytes that the process can allocate before it reaches a limit; UNLIMITED without one."""
        found = UNLIMITED
        for level in self._levels:
            with contextlib.suppress(OSError, ValueError):
                text = os.pread(level.limit_fd, 64, 0).strip()
                limit = UNLIMITED if text == b"max" else int(text)
                if limit < UNLIMITED:
                    used = int(os.pread(level.usage_fd, 64, 0))
                    found = min(
                        found, limit - used + _number_after(level.word, os.pread(level.stat_fd, _STAT_BYTES, 0))
                    )
        return found


def _number_after(word: bytes, text: bytes) -> int:
    for line in text.splitlines():
        if line.startswith(word):
            return int(line[len(word) :])
    return 0


def _trees(root: str) -> list[tuple[str, str, int]]:
    """Return (this process's folder, root of the tree, version) of each tree that may have the memory controller."""
    paths = {}
    # Split at newlines only: users choose names of cgroups and mountpoints, and the kernel escapes no other separator.
    for line in read_text("proc/self/cgroup", root).rstrip("\n").split("\n"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths[2 if not controllers else 1] = path.lstrip("/")
    found = []
    for line in read_text("proc/self/mounts", root).rstrip("\n").split("\n"):
        words = line.split(" ")
        version = {"cgroup": 1, "cgroup2": 2}.get(words[2], 0)
        if version in paths and (version == 2 or "memory" in words[3].split(",")):
            top = below(root, words[1])
            folder = below(top, paths[version])
            found.append((folder if os.path.isdir(folder) else top, top, version))
    return found
