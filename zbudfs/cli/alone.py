# SPDX-License-Identifier: MIT
"""A lock for each mountpoint, so that one command at a time works on it, from its first check to its end.

    a command on /mnt/z      holds the lock of /mnt/z exclusively
    a command on /mnt/z/1    shares the lock of /mnt/z, whose instance it may be, and holds that of /mnt/z/1 exclusively

Two commands that check at the same moment would both find a mount without swap, and both turn swap on. So the second
command waits for the first, then checks, and acts as if the user had typed it later.

The programs that a command runs inherit the lock. If a command is killed while its mkswap or swapoff still runs, the next
command waits for that program too.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from zbudfs.cli.errors import CommandError
from zbudfs.cli.stripe import MAX_INSTANCES, instance_of
from zbudfs.service.locks import COMMANDS, LockHeld, MountpointLock, who_comes_up
from zbudfs.service.mountpoint import shown_path

WAIT_SECONDS: Final = 30.0
"""Longest wait for another command. Arbitrary: longer than a mount takes; a swapoff may take much longer."""

NO_LIMIT: Final = float("inf")

_SILENT_SECONDS: Final = 1.0
"""A shorter wait prints no message."""

_LOOK_SECONDS: Final = 0.02


@contextmanager
def alone(command: str, mountpoint: str, limit_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Keep other commands off `mountpoint` (a resolved path) while `command` works on it.

    Raises CommandError if another command works on it for longer than `limit_seconds`.
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
    """A wait with a limit. It prints one message to the user."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._began = time.monotonic()
        self._told = False

    def until_taken(self, command: str, mountpoint: str, *, shared: bool) -> MountpointLock:
        """Take the lock of a mountpoint as soon as other commands release it."""
        while True:
            try:
                return MountpointLock.take(COMMANDS, mountpoint, f"{command}, pid {os.getpid()}", shared=shared)
            except LockHeld as error:
                other = f"another zbudfs command ({error.holder})" if error.holder else "another zbudfs command"
            self._go_on(other, mountpoint)

    def until_up(self, mountpoint: str) -> None:
        """Wait while a daemon starts up whose command was killed meanwhile."""
        while (holder := who_comes_up(mountpoint)) is not None:
            self._go_on(f"a daemon that starts up ({holder})", mountpoint)

    def _go_on(self, other: str, mountpoint: str) -> None:
        """Sleep for a moment; raise CommandError at the end of the limit."""
        waited = time.monotonic() - self._began
        shown = shown_path(mountpoint)
        if waited >= self._limit_seconds:
            raise CommandError(
                f"{other} works on {shown} and has not ended within {self._limit_seconds:g} s:"
                " run this command again when it has ended"
            )
        if waited >= _SILENT_SECONDS and not self._told:
            self._told = True
            print(f"zbudfs: waiting for {other}, which works on {shown}", file=sys.stderr, flush=True)
        time.sleep(_LOOK_SECONDS)
