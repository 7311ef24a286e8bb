# SPDX-License-Identifier: MIT
"""The start of a daemon: a fresh interpreter that gets its settings through one pipe and reports through another.

    zbudfs mount                                   the daemon (python -I -m zbudfs.service.daemon)
        |-- settings, one line of JSON, end -->  --settings-fd N
        |<- {"ready": true, "pid": P, "warnings": [...]}  or  {"error": "..."} --  --ready-fd M

The daemon is a fresh interpreter and not a fork. The modules of this process (argparse, subprocess, the user's environment of
imports) would stay in the daemon's locked memory for ever. A fork would also share its pages with a parent that ends. `-I`
keeps the caller's PYTHON* variables and working directory out of a process that runs as root for weeks.

A daemon that closes the pipe without a report has died; the end of its stderr becomes the error. Every wait has a limit.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, Final

from zbudfs.core.errors import Failed
from zbudfs.service.mountpoint import Mount, MountError, escape_path, is_dead, unmount, zbudfs_mounts
from zbudfs.service.session import scope_command
from zbudfs.service.settings import Settings

DAEMON_COMMAND: Final = (sys.executable, "-I", "-m", "zbudfs.service.daemon")
"""The command of the daemon, without its two options."""

READY_LIMIT_SECONDS: Final = 60.0
"""Longest time in which a daemon must be ready. Arbitrary, and generous: in it the daemon allocates and writes the first
part of the backing file, on a disk that may be slow."""

_STOP_LIMIT_SECONDS: Final = 10.0
"""Longest time between SIGTERM and SIGKILL for a daemon that did not start. Arbitrary."""

_PASSED_ON: Final = frozenset((signal.SIGINT, signal.SIGTERM))
"""Signals that are blocked while a daemon in the foreground starts."""

_LAST_WORDS_BYTES: Final = 64 << 10
"""Most bytes of a daemon's stderr that an error message is made from."""


_NO_MEMORY: Final = ("Cannot allocate memory", "MemoryError", "failed to map segment", "no memory for")
"""Texts in error messages that are about a lack of memory."""


_SCOPE_REFUSED: Final = (b"Failed to ", b"Unknown assignment", b"systemd-run: ", b"Running scope as unit failed")
"""The beginnings of error messages of systemd-run."""


class LaunchError(Failed):
    """A daemon could not start; the text is for the user."""


class _NoScope(Exception):
    """systemd did not make the scope in which the daemon should run."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The report of a daemon that is ready."""

    pid: int
    """The process id of its keeper."""
    warnings: tuple[str, ...]
    """The protections that the system refused, one sentence each."""


def start(
    settings: Settings, *, limit_seconds: float = READY_LIMIT_SECONDS, command: Sequence[str] = DAEMON_COMMAND
) -> Ready:
    """Start a daemon in the background and return when it is ready.

    The daemon runs in its own session, in /, with no open files but its pipes. Under systemd it also runs in a scope of its
    own, if this process is part of a login session (`session`). Raises LaunchError, after the daemon has ended, when it
    reports an error, dies, or is not ready within `limit_seconds`. KeyboardInterrupt ends the daemon too.
    """
    name = escape_path(settings.mountpoint)
    for prefix in (scope_command(name), scope_command(name, every=False)):
        if prefix:
            with suppress(_NoScope):
                return _start([*prefix, *command], settings, limit_seconds)
    return _start(command, settings, limit_seconds)


def _start(command: Sequence[str], settings: Settings, limit_seconds: float) -> Ready:
    mounts_before = zbudfs_mounts()
    daemon: subprocess.Popen[bytes] | None = None
    interrupted: list[int] = []
    try:
        # SIGINT is only noted until `daemon` is set, so that it can be stopped. A blocked signal would reach another thread.
        with _handling({signal.SIGINT: lambda number, frame: interrupted.append(number)}):
            daemon, ready_fd = _spawn(command, settings, foreground=False)
        if interrupted:
            raise KeyboardInterrupt
        ready, last_words = _wait_ready(daemon, ready_fd, limit_seconds)
        if isinstance(ready, Ready):
            daemon.returncode = 0  # the daemon outlives this process, which must not wait for it
            return ready
        _stop(daemon)
        if ready is None and last_words.startswith(_SCOPE_REFUSED):
            raise _NoScope(last_words)
        raise LaunchError(_why(ready, daemon.returncode, last_words))
    except BaseException:
        if daemon is not None:
            with _handling({signal.SIGINT: lambda number, frame: None}):  # a second Ctrl-C must not leave it behind
                _stop(daemon)
                _clear_mount(settings.mountpoint, mounts_before)
        raise
    finally:
        if daemon is not None:
            os.close(ready_fd)
            if daemon.stderr is not None:
                daemon.stderr.close()


def run_in_foreground(
    settings: Settings,
    on_ready: Callable[[Ready], None],
    *,
    limit_seconds: float = READY_LIMIT_SECONDS,
    command: Sequence[str] = DAEMON_COMMAND,
) -> int:
    """Start a daemon that shares our terminal, wait until it ends, and return its exit status.

    `on_ready` is called once the daemon is ready. Ctrl-C reaches the daemon directly, as a member of the same process group,
    and the daemon decides what to do: with swap attached it must not end. SIGTERM and SIGHUP are passed on to it. If a signal
    ends the daemon, the status is 128 and the signal's number, as in a shell. Raises LaunchError as `start` does, and
    KeyboardInterrupt if the daemon did not start after Ctrl-C.
    """
    daemon: subprocess.Popen[bytes] | None = None
    mounts_before = zbudfs_mounts()
    interrupted = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = interrupted or number == signal.SIGINT
        if daemon is not None and number != signal.SIGINT and daemon.poll() is None:
            daemon.send_signal(number)

    # Handlers, not SIG_IGN: exec resets handlers, but an ignored signal would stay ignored in the new program.
    with _handling({signal.SIGINT: pass_on, signal.SIGTERM: pass_on, signal.SIGHUP: pass_on}):
        # The daemon starts with these signals blocked, and handles those that came meanwhile when it can.
        with _blocked(_PASSED_ON):
            daemon, ready_fd = _spawn(command, settings, foreground=True)
        try:
            ready, last_words = _wait_ready(daemon, ready_fd, limit_seconds)
            if not isinstance(ready, Ready):
                _stop(daemon)
                if interrupted:
                    raise KeyboardInterrupt
                raise LaunchError(_why(ready, daemon.returncode, last_words))
            on_ready(ready)
            status = daemon.wait()  # no limit: this is what the user asked for
        except BaseException:
            _stop(daemon)
            _clear_mount(settings.mountpoint, mounts_before)
            raise
        finally:
            os.close(ready_fd)
    return status if status >= 0 else 128 - status


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Block signals in the block of the context manager."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


@contextmanager
def _handling(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Handle signals with `handlers` in the block of the context manager."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spawn(command: Sequence[str], settings: Settings, *, foreground: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Start the daemon; return it and our end of its ready pipe (not blocking)."""
    settings_read = settings_pipe(settings)
    ready_read, ready_write = os.pipe()
    try:
        options = ["--settings-fd", str(settings_read), "--ready-fd", str(ready_write)]
        daemon = subprocess.Popen(
            [*command, *options, *(["--foreground"] if foreground else [])],
            stdin=subprocess.DEVNULL,
            stdout=None if foreground else subprocess.DEVNULL,
            stderr=None if foreground else subprocess.PIPE,
            cwd="/",
            pass_fds=(settings_read, ready_write),
            start_new_session=not foreground,
        )
    except OSError as error:
        os.close(ready_read)
        raise LaunchError(f"the daemon could not be started: {error}") from None
    except BaseException:
        os.close(ready_read)
        raise
    finally:
        for fd in (settings_read, ready_write):
            os.close(fd)
    os.set_blocking(ready_read, False)
    return daemon, ready_read


def settings_pipe(settings: Settings) -> int:
    """Return the read end of a pipe that holds the settings."""
    read_fd, write_fd = os.pipe()
    # The settings have less than the 64 KiB of a pipe (two paths of 4 KiB at most), so this cannot block.
    os.write(write_fd, settings.to_json().encode() + b"\n")
    os.close(write_fd)
    return read_fd


def _wait_ready(
    daemon: subprocess.Popen[bytes], ready_fd: int, limit_seconds: float
) -> tuple[Ready | str | None, bytes]:
    """Wait for the daemon's report.

    Returns (report, stderr so far). The report is `Ready`, the text of an error, or None if the daemon has closed the pipe
    without a report. Raises LaunchError after `limit_seconds`.
    """
    end = time.monotonic() + limit_seconds
    said, last_words = b"", b""
    with selectors.DefaultSelector() as selector:
        selector.register(ready_fd, selectors.EVENT_READ, "ready")
        if daemon.stderr is not None:
            os.set_blocking(daemon.stderr.fileno(), False)
            selector.register(daemon.stderr, selectors.EVENT_READ, "stderr")
        while b"\n" not in said:
            left = end - time.monotonic()
            if left <= 0:
                raise LaunchError(f"the daemon was not ready within {limit_seconds:g} s, and was stopped")
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 16)
                if key.data == "stderr":
                    last_words = (last_words + data)[-_LAST_WORDS_BYTES:]
                    if not data:
                        selector.unregister(key.fileobj)
                elif data:
                    said += data
                else:
                    return None, last_words + _rest(daemon.stderr)
    return _parse(said), last_words


def _rest(stream: IO[bytes] | None) -> bytes:
    """Return the bytes that can be read from a stream without a wait."""
    if stream is None:
        return b""
    try:
        return stream.read(_LAST_WORDS_BYTES) or b""
    except OSError:
        return b""


def _parse(said: bytes) -> Ready | str:
    """Return the meaning of the daemon's line: `Ready`, or the text of an error."""
    try:
        answer = json.loads(said.partition(b"\n")[0])
        if answer.get("ready"):
            return Ready(int(answer["pid"]), tuple(str(text) for text in answer.get("warnings", ())))
        return str(answer["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the daemon's report makes no sense: {said[:200]!r}"


def _why(error: str | None, status: int | None, last_words: bytes) -> str:
    """Return the message for a daemon that reported `error`, or died (None) with exit status `status`; with a likely cause."""
    text = error if error is not None else _death(status, last_words)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and any(words in text for words in _NO_MEMORY):
        text += (
            f": the address space of each process started here is limited to {limit >> 20} MiB (RLIMIT_AS); raise that"
            " (ulimit -v unlimited), or make size and pool smaller"
        )
    return text


def _death(status: int | None, last_words: bytes) -> str:
    if status is not None and status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
    else:
        how = f"ended with exit status {status}"
    lines = last_words.decode("utf-8", "replace").strip().splitlines()
    return f"the daemon {how} before it was ready{f': {lines[-1].strip()}' if lines else ''}"


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    """End a daemon that did not start, with limits: it may have died, be about to die, or hang.

    SIGTERM is sent repeatedly: a worker ignores it until it serves, and while a program uses the mount. After the limit
    SIGKILL goes to all of the daemon's processes, since a worker outlives its keeper.
    """
    end = time.monotonic() + _STOP_LIMIT_SECONDS
    limit_seconds = 0.5  # most daemons have ended by then: this is their own exit status
    while True:
        try:
            daemon.wait(limit_seconds)
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                break
        daemon.terminate()
        limit_seconds = 1.0
    with suppress(ProcessLookupError):
        if os.getpgid(daemon.pid) == daemon.pid:
            os.killpg(daemon.pid, signal.SIGKILL)
    daemon.kill()
    daemon.wait()


def _clear_mount(mountpoint: str, before: list[Mount]) -> None:
    """Unmount the mount that a dead daemon has left at `mountpoint`, if it is not one of `before`.

    Only a mount that answers as dead is unmounted: another zbudfs may have been mounted there, which is why ours failed.
    """
    if not any(mount.mountpoint == mountpoint and mount not in before for mount in zbudfs_mounts()):
        return
    if is_dead(mountpoint):
        with suppress(MountError):
            unmount(mountpoint, lazy=True)
