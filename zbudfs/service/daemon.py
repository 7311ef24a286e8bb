# SPDX-License-Identifier: MIT
"""The daemon's way in: `python -I -m zbudfs.service.daemon`, started by service/launch.py or by an older keeper.

    --settings-fd N --ready-fd M [--foreground]   make a mount; say on M how it went: one line of JSON
    --adopt-fd N [--foreground]                   take a mount over from the keeper at the other end of the socket N

What runs here is the keeper (service/keeper.py), which forks the workers.
"""

from zbudfs.service import slim as slim  # isort: skip  before anything imports trio

import contextlib
import json
import os
import socket
import sys
from collections.abc import Sequence

from zbudfs.core.errors import ZbudfsError
from zbudfs.fuse.shim import ShimError
from zbudfs.service.keeper import Keeper, StartError, keep_adopted
from zbudfs.service.log import Log, route_logging
from zbudfs.service.mountpoint import MountError
from zbudfs.service.pooldir import PoolDirectoryError
from zbudfs.service.settings import Settings, SettingsError

EXPECTED = (ZbudfsError, MountError, PoolDirectoryError, SettingsError, ShimError, StartError, MemoryError, OSError)
"""What can go wrong at the start without being a bug: told in one line."""


def _say(ready_fd: int, message: dict[str, object]) -> None:
    """Tell whoever started us; they may be gone."""
    with contextlib.suppress(OSError):
        os.write(ready_fd, json.dumps(message).encode() + b"\n")
    os.close(ready_fd)


def _mount(settings: Settings, log: Log, ready_fd: int, *, foreground: bool) -> int:
    keeper = Keeper(settings, log, foreground=foreground)
    made = False
    try:
        keeper.make()
        made = True
        keeper.start()
        keeper.serve_first()
    except EXPECTED as error:
        if made:
            keeper.undo()
        text = str(error) or type(error).__name__
        log.error(text)
        _say(ready_fd, {"error": text})
        return 1
    _say(ready_fd, {"ready": True, "pid": os.getpid(), "warnings": keeper.warnings})
    return keeper.run()


def main(arguments: Sequence[str]) -> int:
    """Run the daemon; the exit status."""
    foreground = "--foreground" in arguments
    named = dict(zip(arguments[::2], arguments[1::2], strict=False))
    log = Log(foreground)
    route_logging(log)
    if "--adopt-fd" in named:
        return keep_adopted(socket.socket(fileno=int(named["--adopt-fd"])), log, foreground=foreground)
    ready_fd = int(named["--ready-fd"])
    os.set_inheritable(ready_fd, False)
    with open(int(named["--settings-fd"]), "rb") as stream:  # noqa: PTH123  a descriptor
        settings = Settings.from_json(stream.read())
    return _mount(settings, log, ready_fd, foreground=foreground)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
