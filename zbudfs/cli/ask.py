# SPDX-License-Identifier: MIT
"""Reading the numbers of a mount within a time limit.

A read from a mount whose daemon hangs cannot be interrupted. So a thread reads, and the caller waits for the thread.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from zbudfs.service import public
from zbudfs.service.mountpoint import find_mount, shown_path

T = TypeVar("T")

ANSWER_LIMIT_SECONDS: Final = 20.0
"""Longest wait for a daemon. Arbitrary: the standby replaces a worker that hangs within five seconds."""


def once_more_if_stale(function: Callable[[], T]) -> T:
    """Call `function`, which opens a file of stats/ or control/ and reads or writes it. Return its result, or raise OSError.

    A file that was opened before a takeover is stale (ESTALE): nothing was read or written. Then `function` is called again.
    """
    try:
        return function()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return function()


class Question(Generic[T]):
    """A call of a `function` that may hang, in a thread, with `once_more_if_stale`."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.asked_at = time.monotonic()
        self._function = function
        self._answers: list[T] = []
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self._answers.append(once_more_if_stale(self._function))
        except (OSError, ValueError) as error:
            self._errors.append(error)

    @property
    def is_open(self) -> bool:
        """Whether the function has neither returned nor raised yet."""
        return self._thread.is_alive()

    def answer(self, limit_seconds: float) -> T:
        """Return the result of the function, or raise its OSError or ValueError. Raises TimeoutError at the limit."""
        self._thread.join(max(0.0, self.asked_at + limit_seconds - time.monotonic()))
        if self._errors:
            raise self._errors[0]
        if not self._answers:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {limit_seconds:g} s")
        return self._answers[0]


def within_limit(function: Callable[[], T], limit_seconds: float = ANSWER_LIMIT_SECONDS) -> T:
    """Return the result of `function` within a time limit, as `Question.answer` does."""
    return Question(function).answer(limit_seconds)


def snapshot(mountpoint: str) -> dict[str, Any]:
    """Return stats/all.json of a mount, or its public statistics if the kernel refuses this user the file.

    Public statistics have "rounded": true. Waits for the daemon. Raises OSError, and ValueError for a malformed file.
    """
    try:
        found = json.loads(once_more_if_stale(Path(mountpoint, "stats/all.json").read_bytes))
    except PermissionError:
        mount = find_mount(mountpoint)
        if mount is None:
            raise
        return public.read(mount.device)
    if not isinstance(found, dict):
        raise ValueError("stats/all.json is not an object")
    return found


def all_numbers(mountpoint: str, limit_seconds: float = ANSWER_LIMIT_SECONDS) -> dict[str, Any]:
    """Return the `snapshot` of a mount within a time limit. Raises OSError and ValueError."""
    return within_limit(lambda: snapshot(mountpoint), limit_seconds)


def why_silent(mountpoint: str, error: OSError | ValueError) -> str:
    """Return a sentence that says why a mount gives no numbers."""
    shown = shown_path(mountpoint)
    if isinstance(error, ValueError):
        return f"the daemon of {shown} gave a wrong answer: {error}"
    if isinstance(error, public.PublicError):
        return f"{shown}: {error}"
    if error.errno == errno.ENOTCONN:
        return f"the daemon of {shown} has died: run zbudfs umount {shown} to clean up"
    return f"the daemon of {shown} does not answer: {error.strerror}"
