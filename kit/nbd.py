# SPDX-License-Identifier: MIT
"""Disks made of real parts that fail, stop or are slow on demand. They need root, and are removed afterwards.

    nbdkit (memory, error filter) -> nbdfuse -> loop device -> ext4 -> the backing file

nbdkit makes the errors, so everything above it meets the same errors as on a bad disk.

A slow disk has a second nbdkit below. To change the delays, it is started again, while the first nbdkit retries:

    nbdkit (file, delay filter) -> nbdkit (nbd, retry filter) -> nbdfuse -> loop device -> ext4 -> the backing file

A card delays each request and has little bandwidth, like an SD card or a small volume in a cloud:

    nbdkit (memory, delay and rate filters) -> nbdfuse -> loop device -> ext4 -> the backing file
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from kit.programs import run_tool

_LIMIT_SECONDS: Final = 20.0


class NbdDisk:
    """A disk in `folder` that can fail or stop answering. `mounted` is the folder of its file system."""

    def __init__(self, folder: Path, server: subprocess.Popen[bytes]) -> None:
        self.mounted = folder / "disk"
        self._folder = folder
        self._server = server

    @contextlib.contextmanager
    def failing(self, *what: str) -> Iterator[None]:
        """Make reads ("pread") or writes ("pwrite") fail with EIO in this context, at the error rate of the disk."""
        for name in what:
            (self._folder / f"{name}.fails").touch()
        try:
            yield
        finally:
            for name in what:
                (self._folder / f"{name}.fails").unlink()

    @contextlib.contextmanager
    def standing_still(self, limit_seconds: float = 60.0) -> Iterator[None]:
        """Stop the disk in this context, for at most `limit_seconds`. A caller that waits for the disk hangs until then."""
        limit = threading.Timer(limit_seconds, self._server.send_signal, [signal.SIGCONT])
        limit.start()
        self._server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            limit.cancel()
            self._server.send_signal(signal.SIGCONT)


class SlowDisk:
    """A disk in `folder` whose requests can be delayed. `mounted` is the folder of its file system."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.mounted = folder / "disk"
        self._image = folder / "image"
        self._socket = socket
        self._server: subprocess.Popen[bytes] | None = None

    def start(self, *delays: str) -> None:
        """Start the lower nbdkit, or start it again, with these delays: "rdelay=SECONDS", "wdelay=SECONDS"."""
        self.end()
        command = ["nbdkit", "--foreground", "--unix", str(self._socket), "--filter=delay", "file", str(self._image)]
        self._server = subprocess.Popen([*command, *delays], stderr=subprocess.DEVNULL)
        _wait(self._socket.exists)

    def end(self) -> None:
        """End the lower nbdkit. It has a client, which repeats the requests that have had no answer."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self._socket.unlink(missing_ok=True)

    @contextlib.contextmanager
    def slow(self, *delays: str) -> Iterator[None]:
        """Delay each request in this context."""
        self.start(*delays)
        try:
            yield
        finally:
            self.start()


@contextlib.contextmanager
def slow_disk(folder: Path, size_bytes: int) -> Iterator[SlowDisk]:
    """Make a slow disk for this context."""
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


class CardDisk:
    """A disk in `folder`, as slow as an SD card, with a settable bandwidth. `mounted` is the folder of its file system."""

    def __init__(self, folder: Path) -> None:
        self.mounted = folder / "disk"
        self._rate = folder / "rate"

    def set_rate(self, bytes_per_second: int) -> None:
        """Limit the bandwidth of reads, and of writes; 0 is no limit. The next request still has the old limit."""
        new = self._rate.with_suffix(".new")
        new.write_text(f"{bytes_per_second * 8}\n")  # nbdkit counts bits
        new.rename(self._rate)


@contextlib.contextmanager
def card_disk(folder: Path, size_bytes: int, delay_ms: int) -> Iterator[CardDisk]:
    """Make a card for this context. Each request takes `delay_ms` longer. At first the bandwidth has no limit.

    An idle disk saves up bandwidth for a tenth of a second. With the default of two seconds, a light load would never reach
    the limit.
    """
    disk = CardDisk(folder)
    disk.set_rate(0)
    limits = [f"rdelay={delay_ms}ms", f"wdelay={delay_ms}ms", f"rate-file={folder / 'rate'}", "burstiness=0.1"]
    with _shown(folder, size_bytes, "--filter=delay", "--filter=rate", "memory", str(size_bytes), *limits):
        yield disk


@contextlib.contextmanager
def nbd_disk(folder: Path, size_bytes: int, *, error_rate: str = "100%") -> Iterator[NbdDisk]:
    """Make a failing disk for this context. It needs nbdkit, nbdfuse and mkfs.ext4."""
    errors = []
    for name in ("pread", "pwrite"):
        errors += [f"error-{name}-rate={error_rate}", f"error-{name}-file={folder / name}.fails"]
    with _shown(folder, size_bytes, "--filter=error", "memory", str(size_bytes), *errors) as server:
        yield NbdDisk(folder, server)


@contextlib.contextmanager
def _shown(folder: Path, size_bytes: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start an nbdkit with these arguments, and mount the file system on its disk in the folder `disk`. Yield the nbdkit."""
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
        assert time.monotonic() < end, "the disk did not start in time"
        time.sleep(0.01)
