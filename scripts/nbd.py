# SPDX-License-Identifier: MIT
"""A disk that can be told to fail, made of real parts.

    nbdkit (memory, error filter) -> nbdfuse -> loop device -> ext4 -> the backing file

nbdkit makes the errors, so everything above it meets what it would meet of a bad disk. For root, and gone afterwards.

A slow disk has another nbdkit below, which is started anew with other delays while the first asks again:

    nbdkit (file, delay filter) -> nbdkit (nbd, retry filter) -> nbdfuse -> loop device -> ext4 -> the backing file
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_LIMIT_SECONDS: Final = 20.0


class NbdDisk:
    """A disk in `folder`; `mounted` is its file system."""

    def __init__(self, folder: Path, server: subprocess.Popen[bytes]) -> None:
        self.mounted = folder / "disk"
        self._folder = folder
        self._server = server

    @contextlib.contextmanager
    def failing(self, *what: str) -> Iterator[None]:
        """Have reads or writes ("pread", "pwrite") fail with EIO for a while, as often as the disk was made for."""
        for name in what:
            (self._folder / f"{name}.fails").touch()
        try:
            yield
        finally:
            for name in what:
                (self._folder / f"{name}.fails").unlink()

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Have the disk answer nothing for a while."""
        self._server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._server.send_signal(signal.SIGCONT)


class SlowDisk:
    """A disk in `folder`, whose requests can be made to take long; `mounted` is its file system."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.mounted = folder / "disk"
        self._image = folder / "image"
        self._socket = socket
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, *delays: str) -> None:
        """Start the nbdkit below, again if need be, with these delays: "rdelay=SECONDS", "wdelay=SECONDS"."""
        self.end()
        command = ["nbdkit", "--foreground", "--unix", str(self._socket), "--filter=delay", "file", str(self._image)]
        self._server = subprocess.Popen([*command, *delays], stderr=subprocess.DEVNULL)
        _wait(self._socket.exists)

    def end(self) -> None:
        """End it."""
        if self._server is not None:
            _end(self._server)
        self._socket.unlink(missing_ok=True)

    @contextlib.contextmanager
    def slow(self, *delays: str) -> Iterator[None]:
        """Have each request take so long for a while."""
        self.start(*delays)
        try:
            yield
        finally:
            self.start()


@contextlib.contextmanager
def slow_disk(folder: Path, size_bytes: int) -> Iterator[SlowDisk]:
    """Have such a disk."""
    with (folder / "image").open("wb") as file:
        file.truncate(size_bytes)
    below = Path(f"/tmp/zbudfs-slow-{os.getpid()}")
    disk = SlowDisk(folder, below)
    with contextlib.ExitStack() as stack:
        stack.callback(disk.end)
        disk.start()
        retry = ["retries=1000", "retry-delay=1", "retry-exponential=no"]
        stack.enter_context(_shown(folder, size_bytes, "--filter=retry", "nbd", f"socket={below}", *retry))
        yield disk


@contextlib.contextmanager
def nbd_disk(folder: Path, size_bytes: int, *, error_rate: str = "100%") -> Iterator[NbdDisk]:
    """Have such a disk. It needs nbdkit, nbdfuse and mkfs.ext4."""
    errors = []
    for name in ("pread", "pwrite"):
        errors += [f"error-{name}-rate={error_rate}", f"error-{name}-file={folder / name}.fails"]
    with _shown(folder, size_bytes, "--filter=error", "memory", str(size_bytes), *errors) as server:
        yield NbdDisk(folder, server)


@contextlib.contextmanager
def _shown(folder: Path, size_bytes: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have an nbdkit with these arguments, and what it serves as a file system in the folder `disk`."""
    file, disk = folder / "nbd", folder / "disk"
    file.touch()
    disk.mkdir()
    socket = f"/tmp/zbudfs-nbd-{os.getpid()}"  # a socket's path must be short
    with contextlib.ExitStack() as stack:
        server = subprocess.Popen(["nbdkit", "--foreground", "--unix", socket, *arguments], stderr=subprocess.DEVNULL)
        stack.callback(_end, server)
        stack.callback(Path(socket).unlink, missing_ok=True)
        _wait(Path(socket).exists)
        shown = subprocess.Popen(["nbdfuse", str(file), "--unix", socket], stderr=subprocess.DEVNULL)
        stack.callback(_end, shown)
        _wait(lambda: file.stat().st_size == size_bytes)
        stack.callback(run_tool, "umount", "--lazy", file)
        device = run_tool("losetup", "--find", "--show", "--direct-io=on", file)
        stack.callback(run_tool, "losetup", "--detach", device)
        run_tool("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", device)
        run_tool("mount", device, disk)
        stack.callback(run_tool, "umount", disk)
        run_tool("sync", "--file-system", disk)
        yield server


def run_tool(*command: str | Path) -> str:
    """Run a program, which must succeed; return what it printed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    words = list(map(str, command))
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "the disk did not come up"
        time.sleep(0.01)
