# SPDX-License-Identifier: MIT
"""`zbudfs trace record` makes a mount record its requests in a ring, and copies the records from the ring to a file.

It ends after --seconds, at Ctrl-C or SIGTERM, or when the daemon ends. The file is complete in each case. If the command is
killed, the daemon notices that no process reads the ring, and stops recording.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from zbudfs import __version__
from zbudfs.cli import status
from zbudfs.cli.arguments import Arguments
from zbudfs.cli.errors import CommandError
from zbudfs.cli.progress import progress_bar
from zbudfs.cli.target import find_mounted, need_root, resolve
from zbudfs.core.sizes import format_size
from zbudfs.core.trace_file import TraceFileError
from zbudfs.service.mountpoint import shown_path
from zbudfs.tracing.file import MIN_FILE_BYTES, TraceWriter
from zbudfs.tracing.ring import RingReader, open_ring

DEFAULT_MAX_BYTES: Final = 64 << 20
"""Default limit of the file: about ten million records."""

_POLL_MS: Final = 50
"""Time between two reads of the ring, which holds 65,536 records."""
_FLUSH_SECONDS: Final = 10.0
"""Longest time until a record is in the file."""
_ANSWER_LIMIT_SECONDS: Final = 20.0
"""Longest wait for the daemon to start the recording, which takes 1 MiB of memory, and to stop it."""


def record(arguments: Arguments) -> int:
    """Record until a signal, a limit or the daemon ends it, and print a summary."""
    need_root("trace record")
    mounted = find_mounted(resolve(arguments.mountpoint))
    shown = shown_path(mounted.mountpoint)
    if arguments.max is not None and arguments.max < MIN_FILE_BYTES:
        raise CommandError(f"--max {format_size(arguments.max)} is too small for a trace: write 1M or more")
    report = status.report(mounted)
    if "error" in report:
        raise CommandError(str(report["error"]))
    switch = Path(mounted.mountpoint, "control/trace")
    try:
        if switch.read_text().strip() != "0":
            raise CommandError(f"{shown} is being recorded already: end the other zbudfs trace record first")
    except FileNotFoundError:
        raise CommandError(f"the daemon of {shown} is too old to record a trace: run zbudfs restart {shown}") from None
    daemon = os.pidfd_open(int(report["pid"]))
    try:
        ring = open_ring(str(report["pool_directory"]), int(report["worker_pid"]))
        writer = TraceWriter(arguments.output, arguments.max or DEFAULT_MAX_BYTES, _about(report))
        try:
            why = _record(ring, writer, switch, daemon, arguments.seconds)
        finally:
            writer.close()
            ring.close()
    except TraceFileError as error:
        raise CommandError(str(error)) from None
    finally:
        os.close(daemon)
    _print_summary(writer, arguments.output, why)
    return 0


def _about(report: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the mount for the head of the file: numbers, and no names."""
    names = ("size_bytes", "pool_limit_bytes", "level", "backing_size_bytes", "stored_pages", "written_back_pages")
    return {
        "zbudfs": __version__,
        "kernel": os.uname().release,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "packing": report.get("packing", "zbud"),
        **{name: report[name] for name in names},
    }


def _record(ring: RingReader, writer: TraceWriter, switch: Path, daemon: int, seconds: float | None) -> str:
    """Copy records until the recording ends. Return the reason; empty after --seconds or a signal."""
    poll = select.poll()
    poll.register(daemon, select.POLLIN)
    with _stoppable() as stopped, progress_bar("recording (Ctrl-C ends it)") as progress:
        switch.write_text("1")
        try:
            if not _wait(lambda: ring.active):
                raise CommandError("the daemon has not begun to record: it got no memory for the ring; try again later")
            began = flushed = time.monotonic()
            ended = ""
            while not stopped and not ended:
                if poll.poll(_POLL_MS):
                    ended = "the daemon has ended, or was handed over to another one"
                elif not ring.active:
                    ended = "the daemon has stopped recording"
                writer.add(*ring.read())
                now = time.monotonic()
                if now - flushed >= _FLUSH_SECONDS:
                    writer.flush()
                    flushed = now
                if seconds is not None:
                    progress(min(int(1000 * (now - began)), int(1000 * seconds)), int(1000 * seconds))
                    if now - began >= seconds:
                        break
        finally:
            with suppress(OSError):  # the mount may be gone
                switch.write_text("0")
                _wait(lambda: not ring.active)  # after that no record is added; the last ones can still be read
        writer.add(*ring.read())
    return ended


def _wait(condition: Callable[[], bool]) -> bool:
    """Wait until `condition` is true. Return whether it became true within _ANSWER_LIMIT_SECONDS."""
    end = time.monotonic() + _ANSWER_LIMIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Yield a list that is empty until SIGINT or SIGTERM comes."""
    stopped: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: stopped.append(number)) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _print_summary(writer: TraceWriter, path: str, why: str) -> None:
    parts = [f"{writer.records:,} records", f"{format_size(writer.file_bytes)} in {shown_path(path)}"]
    if writer.rounds:
        parts.append("new records have replaced the oldest (--max)")
    if writer.lost_records:
        parts.append(f"{writer.lost_records:,} records lost, which came faster than they were read")
    print("; ".join(parts))
    if why:
        print(f"zbudfs: {why}", file=sys.stderr)
