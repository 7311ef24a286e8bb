# SPDX-License-Identifier: MIT
"""Many processes do anything that can be done to `swapfile`, and everything is compared with a plain file, byte for byte.

    |<-- each process has a part -->|<-- stripes of 1500 bytes, by turns -->|<-- everybody's -->|

Parts are for large requests. In the stripes most pages belong to several processes, which change their bytes of it at the same
time. Whatever a process reads there must be what it wrote. In the last part all write over each other: there each word tells
which place it was written to, so one that turns up elsewhere is seen.

The mount has a small pool and a backing file, so pages are on their way to and from the disk all the time. A timer's signals
interrupt requests. With --kill-seconds the process that serves is killed again and again.

A seed is a sequence of operations of each process; what went wrong is told with the seed and the last operations.
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
"""Bytes of one stripe: not a divisor of a page, so that hardly any page has one owner."""
LARGEST: Final = 300_000
"""Bytes of the largest request of a process: the kernel makes several of it."""
OPERATIONS: Final = 60
"""Of one process in one seed."""
SHOWN_NR: Final = 12
SIGNAL_SECONDS: Final = 0.003

_KEEP_SIZE: Final = 0x01
_PUNCH: Final = 0x02
_ZERO: Final = 0x10
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

T = TypeVar("T")

Span = tuple[int, int]
"""First byte, and the one behind the last."""


class Mismatch(Exception):
    """Something that was read is not what must be there."""


class Layout:
    """Who may write where, for so many processes."""

    def __init__(self, size: int, processes: int) -> None:
        self.size = size
        self.processes = processes
        half = size // 2 + 77
        part = half // processes
        self._parts = [(number * part, (number + 1) * part) for number in range(processes)]
        self._stripes_at = half
        self.shared = (size * 7 // 8, size)

    def spans(self, process: int) -> list[Span]:
        """The spans that a process has to itself."""
        starts = range(self._stripes_at + process * STRIPE, self.shared[0] - STRIPE, self.processes * STRIPE)
        return [self._parts[process], *((start, start + STRIPE) for start in starts)]


class Player:
    """One process, which changes `path` and the plain file `shadow` in the same way."""

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
        """How long a call may be refused, where the disk has faults."""
        self.refused = 0

    def _again(self, call: Callable[..., T], *args: Any) -> T:
        """Make a call on the swapfile; where faults are expected, until it succeeds: each may be repeated."""
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
        """One sequence of operations, then all is compared. Mismatch."""
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
        """Everything that belongs to this process. Mismatch."""
        for span in self.spans:
            self._compare(*span)

    # ---- what can be done ------------------------------------------------------------------------------------------

    def _span(self, largest: int = LARGEST) -> Span:
        """A stretch of one of the spans: often short, often at an edge of a page."""
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
        done = self._again(os.pwrite, fd, memoryview(data)[:length], start)
        if done != length:
            raise Mismatch(f"a write of {length} bytes took {done}")
        os.pwrite(self.shadow_fd, memoryview(data)[:length], start)

    def _vector(self) -> None:
        start, end = self._span(LARGEST // 4)
        data = self._data(end - start)
        cut = self.source.randint(0, len(data))
        self._note("writev", start, end)
        if self._again(os.pwritev, self.fd, [data[:cut], data[cut:]], start) != len(data):
            raise Mismatch("a writev was short")
        os.pwrite(self.shadow_fd, data, start)

    def _direct(self) -> None:
        """Whole pages past the page cache, from the part that belongs to this process alone."""
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
            if code != errno.EINTR:  # Python asks again for what it knows, and not for this
                raise OSError(code, os.strerror(code))

    def _read_all(self, length: int, start: int) -> bytes:
        """A read; where faults are expected, one that a lost page has cut short goes on behind what it gave."""
        got = os.pread(self.fd, length, start)
        while self.patience_seconds and 0 < len(got) < length:
            got += os.pread(self.fd, length - len(got), start + len(got))
        return got

    def _read_direct(self, buffer: mmap.mmap, start: int) -> int:
        """The same into a buffer, past the page cache: how much it gave."""
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

    # ---- where all of them write -----------------------------------------------------------------------------------

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
    """Play the seeds and say how it went: one line of JSON."""
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
    """Play in so many processes; what each says at its end. Calls may be refused for `patience_seconds`."""
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
            "wrong": f"only {len(said)} of {processes} processes came to their end",
        }


def zbudfs(*arguments: str | Path) -> str:
    """Run the command, which must succeed."""
    command = [sys.executable, "-m", "zbudfs", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@contextlib.contextmanager
def mounted(folder: Path, size: int, pool: str, packing: str) -> Iterator[Path]:
    """Have a mount with a backing file."""
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
    """Start killing whoever serves, in a process of its own; what is returned ends that, and gives the number of kills."""
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
    """Run what is wanted; 1 if a byte was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2000, help="sequences of operations (default: 2000)")
    parser.add_argument("--first-seed", type=int, default=0, help="to see a failure again (default: 0)")
    parser.add_argument("--processes", type=int, default=6, help="at the same time (default: 6)")
    parser.add_argument("--size", type=int, default=16, help="MiB of the swapfile (default: 16)")
    parser.add_argument("--pool", default="2M", help="of the mount (default: 2M)")
    parser.add_argument("--packing", default="zbud", help="of the mount (default: zbud)")
    parser.add_argument("--kill-seconds", type=float, default=0, help="kill the worker so often (default: never)")
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
