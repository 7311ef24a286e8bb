# SPDX-License-Identifier: MIT
"""The hand-over of a mount to another version: the order to its keeper, and the wait until the new keeper serves."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from pathlib import Path
from typing import Final

from zbudfs.cli.ask import once_more_if_stale
from zbudfs.cli.errors import CommandError
from zbudfs.service.mountpoint import shown_path

RESTART_LIMIT_SECONDS: Final = 120.0
"""Longest wait for a restart. Arbitrary: long, since an interpreter may start slowly when memory is short."""


def order_restart(mountpoint: str) -> dict[str, object]:
    """Order the keeper to hand the mount over to this version of zbudfs, and return its answer. Raises CommandError."""
    shown = shown_path(mountpoint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(RESTART_LIMIT_SECONDS)
        try:
            folder = once_more_if_stale(Path(mountpoint, "stats/pool_directory").read_text).removesuffix("\n")
            channel.connect(f"{folder}/control")
            channel.sendall(json.dumps({"order": "restart", "interpreter": sys.executable}).encode())
            answer = b""
            while piece := channel.recv(4096):
                answer += piece
        except TimeoutError:
            raise CommandError(
                f"the keeper of {shown} has not answered within {RESTART_LIMIT_SECONDS:g} s: see zbudfs status"
            ) from None
        except OSError as error:
            raise CommandError(f"the keeper of {shown} cannot be reached: {error.strerror}") from None
    try:
        found: dict[str, object] = json.loads(answer)
    except ValueError:
        raise CommandError(f"the keeper of {shown} ended before it had answered: see zbudfs status") from None
    if "error" in found:
        raise CommandError(f"{shown} was not restarted, and runs on as before: {found['error']}")
    return found


def wait_served(mountpoint: str, pid: object) -> None:
    """Wait until the keeper `pid` has a worker that answers. Raises CommandError after RESTART_LIMIT_SECONDS."""
    end = time.monotonic() + RESTART_LIMIT_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if int(Path(mountpoint, "stats/keeper_pid").read_text()) == pid:
                return
        time.sleep(0.05)
    raise CommandError(f"{shown_path(mountpoint)} was handed over, but does not answer yet: see zbudfs status")
