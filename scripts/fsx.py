# SPDX-License-Identifier: MIT
"""Test `swapfile` with many processes that do every operation, and compare it byte for byte with a plain file.

    |<-- each process has a part -->|<-- stripes of 1500 bytes, by turns -->|<-- shared by all -->|

The parts are for large requests. In the stripes, most pages belong to several processes, which change their own bytes of a
page at the same time. Each process must read back its own bytes. In the last part, all processes overwrite each other. Each
word there holds the place to which it was written, so a word in a wrong place is noticed.

The mount has a small pool and a backing file, so pages move to and from the disk all the time. The signals of a timer
interrupt requests. With --kill-seconds, the worker is killed repeatedly.

A seed gives a sequence of operations for each process. A failure is printed with its seed and the last operations.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from zbudfs.core.tunables import MAX_WRITERS

PAGE: Final = 4096
STRIPE: Final = 1500
"""Bytes of one stripe. It does not divide a page, so that few pages have a single owner."""
LARGEST: Final = 300_000
"""Bytes of the largest operation of a process. The kernel splits it into several requests."""
OPERATIONS: Final = 60
"""Operations of one process for one seed."""
SHOWN_NR: Final = 12
SIGNAL_SECONDS: Final = 0.003

_KEEP_SIZE: Final = 0x01
_PUNCH: Final = 0x02
_ZERO: Final = 0x10
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

T = TypeVar("T")

Span = tuple[int, int]
"""A range of bytes: the first byte, and the byte after the last."""


class Mismatch(Exception):
    """A read returned wrong bytes, or a call was short."""


class Layout:
    """The division of the swapfile among the processes."""

    def __init__(self, size: int, processes: int) -> None:
        self.size = size
        self.processes = processes
        half = size // 2 + 77
        part = half // processes
        self._parts = [(number * part, (number + 1) * part) for number in range(processes)]
        self._stripes_at = half
        self.shared = (size * 7 // 8, size)

    def spans(self, process: int) -> list[Span]:
        """Return the spans that belong to one process alone."""
        starts = range(self._stripes_at + process * STRIPE, self.shared[0] - STRIPE, self.processes * STRIPE)
        return [self._parts[process], *((start, start + STRIPE) for start in starts)]


class Player:
    """One process. It changes the swapfile `path` and the plain file `shadow` in the same way."""

    def __init__(self, path: Path, shadow: Path, layout: Layout, number: int) -> None:
        self.number = number
        self.layout = layout
        self.spans = layout.spans(number)
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.direct_fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self.shadow_fd = os.open(shadow, os.O_RDWR | os.O_CLOEXEC)
        self.path = path
        self.source = random.Random()
        self.last: deque[str] = deque(maxlen=SHOWN_NR)
        self.operations = 0
        self.bytes = 0
        self.patience_seconds = 0.0
        """Time for which a call may be refused, in seconds, if the disk has faults."""
        self.refused = 0

    def _again(self, call: Callable[..., T], *args: Any) -> T:
        """Make a call on the swapfile. If faults are expected, repeat it until it succeeds, as each call allows."""
        end = time.monotonic() + self.patience_seconds
        while True:
            try:
                return call(*args)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ENOSPC) or time.monotonic() > end:
                    raise
                self.refused += 1
                time.sleep(0.02)

    def play(self, seed: int) -> None:
        """Do the operations of one seed, then compare a sample of the spans. Raises Mismatch."""
        self.source.seed(seed << 8 | self.number)
        self.last.clear()
        kinds: list[Callable[[], None]] = [
            *(self._write, self._write, self._write, self._read, self._read, self._punch, self._zero),
            *(self._direct, self._vector, self._shared_write, self._shared_read, self._sync),
        ]
        for _ in range(OPERATIONS):
            self.source.choice(kinds)()
            self.operations += 1
        for span in self.source.sample(self.spans, min(40, len(self.spans))):
            self._compare(*span)
        if self.source.random() < 0.1:
            self._open_again()

    def compare_all(self) -> None:
        """Compare all spans of this process. Raises Mismatch."""
        for span in self.spans:
            self._compare(*span)

    # ---- operations ------------------------------------------------------------------------------------------------

    def _span(self, largest: int = LARGEST) -> Span:
        """Return a random part of one of the spans. It is often short, and often begins at a page."""
        low, high = self.spans[0] if self.source.random() < 0.5 else self.source.choice(self.spans)
        length = min(self.source.choice((1, 7, 512, 1000, PAGE, 2 * PAGE, 5 * PAGE + 3, largest)), high - low)
        length = self.source.randint(1, length) if self.source.random() < 0.5 else length
        start = self.source.randint(low, high - length)
        if self.source.random() < 0.5:
            aligned = (start + PAGE - 1) // PAGE * PAGE
            start = aligned if aligned + length <= high else start
        return start, start + length

    def _data(self, length: int) -> bytes:
        kind = self.source.randrange(6)
        if kind == 0:
            return bytes(length)
        if kind == 1:
            return (self.source.randbytes(8) * (length // 8 + 1))[:length]
        if kind == 2:
            return self.source.randbytes(length)
        if kind == 3:
            piece = self.source.randbytes(1 + length // 3)
            return (piece + bytes(length))[:length]
        words = b" ".join(b"%d" % self.source.randrange(1000) for _ in range(20))
        return (words * (length // len(words) + 1))[:length]

    def _note(self, name: str, start: int, end: int) -> None:
        self.last.append(f"{name} {start}..{end}")
        self.bytes += end - start

    def _write(self) -> None:
        start, end = self._span()
        data = self._data(end - start)
        self._note("write", start, end)
        self._put(self.fd, data, start)

    def _put(self, fd: int, data: bytes | mmap.mmap, start: int, length: int | None = None) -> None:
        length = len(data) if length is None else length
        self._write_whole(fd, memoryview(data)[:length], start)
        os.pwrite(self.shadow_fd, memoryview(data)[:length], start)

    def _write_whole(self, fd: int, data: memoryview, start: int) -> None:
        """Write all of `data`. If faults are expected, a write may be short: the kernel divides it, and a part was refused."""
        done = 0
        while done < len(data):
            taken = self._again(os.pwrite, fd, data[done:], start + done)
            if taken < len(data) - done:
                if not taken or not self.patience_seconds:
                    raise Mismatch(f"a write of {len(data) - done} bytes took {taken}")
                self.refused += 1
            done += taken

    def _vector(self) -> None:
        start, end = self._span(LARGEST // 4)
        data = self._data(end - start)
        cut = self.source.randint(0, len(data))
        self._note("writev", start, end)
        done = self._again(os.pwritev, self.fd, [data[:cut], data[cut:]], start)
        if done != len(data) and not self.patience_seconds:
            raise Mismatch("a writev was short")
        self._write_whole(self.fd, memoryview(data)[done:], start + done)
        os.pwrite(self.shadow_fd, data, start)

    def _direct(self) -> None:
        """Read or write whole pages with direct I/O, in the part that belongs to this process alone."""
        low, high = self.spans[0]
        first, last = -(-low // PAGE), high // PAGE
        if last - first < 1:
            return
        page = self.source.randrange(first, last)
        length = min(self.source.choice((1, 1, 3, 32)), last - page) * PAGE
        start = page * PAGE
        with mmap.mmap(-1, length) as buffer:
            if self.source.random() < 0.6:
                buffer[:] = self._data(length)
                self._note("direct write", start, start + length)
                self._put(self.direct_fd, buffer, start)
            else:
                self._note("direct read", start, start + length)
                if self._again(self._read_direct, buffer, start) != length:
                    raise Mismatch("a direct read was short")
                self._same(buffer[:], start)

    def _read(self) -> None:
        start, end = self._span()
        self._note("read", start, end)
        self._compare(start, end)

    def _compare(self, start: int, end: int) -> None:
        self._same(self._again(self._read_all, end - start, start), start, end - start)

    def _same(self, got: bytes, start: int, length: int | None = None) -> None:
        length = len(got) if length is None else length
        expected = os.pread(self.shadow_fd, length, start)
        if got == expected:
            return
        if len(got) != len(expected):
            raise Mismatch(f"a read of {len(expected)} bytes at {start} gave {len(got)}")
        at = next(index for index, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other)
        wrong = sum(one != other for one, other in zip(got, expected, strict=True))
        raise Mismatch(
            f"{wrong} of the bytes {start}..{start + length} are wrong, the first at {start + at} (page"
            f" {(start + at) // PAGE}): {got[at : at + 8].hex()} instead of {expected[at : at + 8].hex()}"
        )

    def _punch(self) -> None:
        self._fallocate("punch", _PUNCH | _KEEP_SIZE)

    def _zero(self) -> None:
        self._fallocate("zero", _ZERO | self.source.choice((0, _KEEP_SIZE)))

    def _fallocate(self, name: str, mode: int) -> None:
        start, end = self._span()
        self._note(name, start, end)
        self._again(self._fallocate_once, mode, start, end - start)
        os.pwrite(self.shadow_fd, bytes(end - start), start)

    def _fallocate_once(self, mode: int, start: int, length: int) -> None:
        while _libc.fallocate(self.fd, mode, start, length):
            code = ctypes.get_errno()
            if code != errno.EINTR:  # Python itself repeats interrupted calls, but not this one
                raise OSError(code, os.strerror(code))

    def _read_all(self, length: int, start: int) -> bytes:
        """Read bytes. If faults are expected and a failed page makes the read short, read the rest too."""
        got = os.pread(self.fd, length, start)
        while self.patience_seconds and 0 < len(got) < length:
            got += os.pread(self.fd, length - len(got), start + len(got))
        return got

    def _read_direct(self, buffer: mmap.mmap, start: int) -> int:
        """Do the same as `_read_all` into a buffer, with direct I/O. Return the number of bytes."""
        with memoryview(buffer) as view:
            done = os.preadv(self.direct_fd, [view], start)
            while self.patience_seconds and 0 < done < len(view):
                with view[done:] as rest:
                    done += os.preadv(self.direct_fd, [rest], start + done)
        return done

    def _sync(self) -> None:
        self.last.append("fsync")
        self._again(os.fsync if self.source.random() < 0.5 else os.fdatasync, self.fd)

    def _open_again(self) -> None:
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    # ---- the part that all processes share -------------------------------------------------------------------------

    def _shared_span(self) -> Span:
        low, high = (-(-self.layout.shared[0] // 8) * 8, self.layout.shared[1] // 8 * 8)
        length = self.source.choice((8, 512, PAGE, 5 * PAGE + 8))
        start = self.source.randrange(low, high - length) // 8 * 8
        return start, start + length

    def _shared_write(self) -> None:
        start, end = self._shared_span()
        self._note("shared write", start, end)
        if self.source.random() < 0.2:
            self._again(os.pwrite, self.fd, bytes(end - start), start)
            return
        turn = self.operations & 0xFFFF
        words = b"".join(struct.pack("<HHI", self.number + 1, turn, offset) for offset in range(start, end, 8))
        self._again(os.pwrite, self.fd, words, start)

    def _shared_read(self) -> None:
        start, end = self._shared_span()
        self._note("shared read", start, end)
        got = self._again(os.pread, self.fd, end - start, start)
        got = got[: len(got) // 8 * 8]
        for at, (writer, _, offset) in enumerate(struct.iter_unpack("<HHI", got)):
            if (writer, offset) != (0, 0) and not (0 < writer <= self.layout.processes and offset == start + 8 * at):
                raise Mismatch(f"the word at {start + 8 * at} was written to {offset} by process {writer - 1}")


def run_process(player: Player, seeds: range, report_fd: int) -> None:
    """Play the seeds, and write the result as one line of JSON to a pipe."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, SIGNAL_SECONDS, SIGNAL_SECONDS)
    seed = seeds.start
    wrong = None
    try:
        for seed in seeds:
            player.play(seed)
        player.compare_all()
    except (Mismatch, OSError) as error:
        wrong = f"seed {seed}, process {player.number}: {error}; the last operations: {'; '.join(player.last)}"
    said = {"operations": player.operations, "bytes": player.bytes, "refused": player.refused, "wrong": wrong}
    os.write(report_fd, json.dumps(said).encode() + b"\n")


def play_all(
    path: Path, shadow: Path, size: int, processes: int, seeds: range, patience_seconds: float = 0.0
) -> Iterator[dict[str, object]]:
    """Play in `processes` processes, and yield the result of each. Calls may be refused for `patience_seconds`."""
    layout = Layout(size, processes)
    read_fd, write_fd = os.pipe()
    children = []
    for number in range(processes):
        pid = os.fork()
        if not pid:
            try:
                player = Player(path, shadow, layout, number)
                player.patience_seconds = patience_seconds
                run_process(player, seeds, write_fd)
            finally:
                os._exit(0)
        children.append(pid)
    os.close(write_fd)
    with open(read_fd, "rb") as stream:  # noqa: PTH123  a descriptor
        said = [json.loads(line) for line in stream]
    for pid in children:
        os.waitpid(pid, 0)
    yield from said
    if len(said) != processes:
        yield {
            "operations": 0,
            "bytes": 0,
            "refused": 0,
            "wrong": f"only {len(said)} of {processes} processes reported a result",
        }


def zbudfs(*arguments: str | Path) -> str:
    """Run the command `zbudfs`, and return its output. Raises CalledProcessError."""
    command = [sys.executable, "-m", "zbudfs", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@contextlib.contextmanager
def mounted(folder: Path, size: int, pool: str, packing: str) -> Iterator[Path]:
    """Make a mount with a backing file for this context, and yield the mountpoint."""
    mountpoint = folder / "mnt"
    mountpoint.mkdir()
    options = ("--size", str(size), "--pool", pool, "--packing", packing, "--backing", folder / "backing")
    zbudfs("mount", *options, mountpoint)
    try:
        (mountpoint / "control/writers").write_text(str(MAX_WRITERS))
        yield mountpoint
    finally:
        zbudfs("umount", mountpoint)


def kill_again_and_again(mountpoint: Path, seconds: float) -> Callable[[], int]:
    """Start a process that kills the worker at each interval. Return a function that ends it and returns the kills."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        kills = 0
        stop = False

        def end(number: int, frame: object) -> None:
            nonlocal stop
            stop = True

        signal.signal(signal.SIGTERM, end)
        while not stop:
            time.sleep(seconds)
            with contextlib.suppress(OSError, ValueError):
                if (mountpoint / "stats/standby_ready").read_text().strip() == "True":
                    os.kill(int((mountpoint / "stats/worker_pid").read_text()), signal.SIGKILL)
                    kills += 1
        os.write(write_fd, str(kills).encode())
        os._exit(0)
    os.close(write_fd)

    def finish() -> int:
        os.kill(pid, signal.SIGTERM)
        with open(read_fd, "rb") as stream:  # noqa: PTH123  a descriptor
            kills = int(stream.read() or 0)
        os.waitpid(pid, 0)
        return kills

    return finish


def main(arguments: list[str]) -> int:
    """Run the test, print the result, and return 1 if a byte was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000, help="number of seeds (default: 2000)")
    parser.add_argument("--first-seed", type=int, default=0, help="first seed, to repeat a failure (default: 0)")
    parser.add_argument("--processes", type=int, default=6, help="number of processes (default: 6)")
    parser.add_argument("--size", type=int, default=16, help="size of the swapfile in MiB (default: 16)")
    parser.add_argument("--pool", default="2M", help="size of the pool (default: 2M)")
    parser.add_argument("--packing", default="zbud", help="packing of the mount (default: zbud)")
    parser.add_argument(
        "--kill-seconds", type=float, default=0, help="seconds between two kills of the worker (default: never)"
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="zbudfs-fsx-"))
    size = options.size << 20
    shadow = folder / "shadow"
    with shadow.open("wb") as file:
        file.truncate(size)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    began = time.monotonic()
    try:
        with mounted(folder, size, options.pool, options.packing) as mountpoint:
            finish = kill_again_and_again(mountpoint, options.kill_seconds) if options.kill_seconds else lambda: 0
            said = list(play_all(mountpoint / "swapfile", shadow, size, options.processes, seeds))
            kills = finish()
            counts = json.loads((mountpoint / "stats/all.json").read_bytes())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [str(each["wrong"]) for each in said if each["wrong"]]
    for text in wrong:
        print(f"fsx: {text}", file=sys.stderr)
    operations, moved = (sum(int(str(each[name])) for each in said) for name in ("operations", "bytes"))
    print(f"  seeds            {options.seeds:,} in {options.processes} processes, {time.monotonic() - began:.0f} s")
    print(f"  operations       {operations:,}, {moved >> 20:,} MiB")
    print(
        f"  written back     {counts['cumul_writeback_pages']:,} pages, {counts['cumul_pagein_blocks']:,} blocks read"
    )
    print(f"  kills            {kills:,}, {counts['recoveries']:,} takeovers")
    print(f"  lost pages       {counts['lost_pages']:,}")
    print(f"  wrong            {len(wrong):,}")
    return 1 if wrong or counts["lost_pages"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
