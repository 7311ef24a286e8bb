# SPDX-License-Identifier: MIT
"""One command at a time works on a mountpoint, from its first look at it to its end.

    a command on /mnt/z      has the lock of /mnt/z alone
    a command on /mnt/z/1    shares the lock of /mnt/z, of which it may be an instance, and has that of /mnt/z/1 alone

Two commands that look at the same moment would both find a mount without swap, and both turn swap on. So the second waits
for the first, then looks, and does or refuses what it was asked for as if it had been typed later.

The programs that a command runs inherit the lock: when a command is killed, the next one still waits for the mkswap or the
swapoff that the dead one had started.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from zbudfs.cli.stripe import MAX_INSTANCES, instance_of
from zbudfs.cli.target import CommandError
from zbudfs.service.locks import COMMANDS, LockHeld, MountpointLock, who_comes_up
from zbudfs.service.mountpoint import shown_path

WAIT_SECONDS: Final = 30.0
"""Longest wait for another command. Arbitrary: longer than a mount takes; a swapoff may take much longer."""

NO_LIMIT: Final = float("inf")

_SILENT_SECONDS: Final = 1.0
"""A shorter wait is not told."""

_LOOK_SECONDS: Final = 0.02


@contextmanager
def alone(command: str, mountpoint: str, limit_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Keep other commands off `mountpoint`, which is resolved, while `command` works on it.

    Raises CommandError if another command is at work for longer than `limit_seconds`.
    """
    above, _, name = mountpoint.rpartition("/")
    may_be_instance = above and name.isdecimal() and len(name) <= 2 and int(name) < MAX_INSTANCES
    wait = _Wait(limit_seconds)
    with ExitStack() as stack:
        for path, shared in ((above, True), (mountpoint, False)) if may_be_instance else ((mountpoint, False),):
            lock = wait.until_taken(command, path, shared=shared)
            stack.callback(lock.release)
            os.set_inheritable(lock.fd, True)
        for path in (mountpoint, *(instance_of(mountpoint, number) for number in range(MAX_INSTANCES))):
            wait.until_up(path)
        yield


class _Wait:
    """A wait with a limit, of which the user is told once."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._began = time.monotonic()
        self._told = False

    def until_taken(self, command: str, mountpoint: str, *, shared: bool) -> MountpointLock:
        """Take the lock of a mountpoint as soon as other commands leave it."""
        while True:
            try:
                return MountpointLock.take(COMMANDS, mountpoint, f"{command}, pid {os.getpid()}", shared=shared)
            except LockHeld as error:
                other = f"another zbudfs command ({error.holder})" if error.holder else "another zbudfs command"
            self._go_on(other, mountpoint)

    def until_up(self, mountpoint: str) -> None:
        """Let a daemon come up that a command has started which was killed meanwhile."""
        while (holder := who_comes_up(mountpoint)) is not None:
            self._go_on(f"a daemon that comes up ({holder})", mountpoint)

    def _go_on(self, other: str, mountpoint: str) -> None:
        """Sleep for a moment; raise CommandError at the end of the limit."""
        waited = time.monotonic() - self._began
        shown = shown_path(mountpoint)
        if waited >= self._limit_seconds:
            raise CommandError(
                f"{other} works on {shown} and has not ended within {self._limit_seconds:g} s: run this again when it has"
            )
        if waited >= _SILENT_SECONDS and not self._told:
            self._told = True
            print(f"zbudfs: waiting for {other}, which works on {shown}", file=sys.stderr, flush=True)
        time.sleep(_LOOK_SECONDS)
