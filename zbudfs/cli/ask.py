# SPDX-License-Identifier: MIT
"""Asking a mount, with a limit: whoever reads from a mount whose daemon hangs cannot be interrupted, so a thread does it."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from zbudfs.service import public
from zbudfs.service.mountpoint import find_mount, shown_path

T = TypeVar("T")

ANSWER_LIMIT_SECONDS: Final = 20.0
"""Longest wait for a daemon. Arbitrary: one that hangs is replaced within five seconds."""


def once_more_if_stale(function: Callable[[], T]) -> T:
    """Return what `function` returns, which opens a file of stats/ or control/ and reads or writes it; or raise its OSError.

    A file that was opened before another worker took over is stale, and nothing was read or written: that one is asked.
    """
    try:
        return function()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return function()


def within_limit(function: Callable[[], T], limit_seconds: float = ANSWER_LIMIT_SECONDS) -> T:
    """As `once_more_if_stale`; TimeoutError if it takes longer than that."""
    answers: list[T] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(once_more_if_stale(function))
        except (OSError, ValueError) as error:
            errors.append(error)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(limit_seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {limit_seconds:g} s")
    return answers[0]


def snapshot(mountpoint: str) -> dict[str, Any]:
    """Return stats/all.json of a mount, or what is public of it for a user whom the kernel does not let in.

    The latter has "rounded": true. Waits for the daemon. OSError; ValueError if it is not what it should be.
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
    """Return the `snapshot` of a mount, within a limit of time."""
    return within_limit(lambda: snapshot(mountpoint), limit_seconds)


def why_silent(mountpoint: str, error: OSError | ValueError) -> str:
    """Return the sentence for a mount that gives no answer."""
    shown = shown_path(mountpoint)
    if isinstance(error, ValueError):
        return f"the daemon of {shown}: {error}"
    if isinstance(error, public.PublicError):
        return f"{shown}: {error}"
    if error.errno == errno.ENOTCONN:
        return f"the daemon of {shown} has died: run zbudfs umount {shown} to clean up"
    return f"the daemon of {shown} does not answer: {error.strerror}"
