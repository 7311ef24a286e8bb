# SPDX-License-Identifier: MIT
"""The daemon's way in: `python -I -m zbudfs.service.daemon`, started by service/launch.py or by an older keeper.

    --settings-fd N --ready-fd M [--foreground]   make a mount; say on M how it went: one line of JSON
    --adopt-fd N [--foreground]                   take a mount over from the keeper at the other end of the socket N
    --service [--settings-fd N]                   be the main process of a service: go on with what an earlier one has
                                                  left, or make a mount; without settings only the former

What runs here is the keeper (service/keeper.py), which forks the workers.
"""

from zbudfs.service import verdict  # isort: skip  before anything that may fail to be imported
from zbudfs.service import slim as slim  # isort: skip  before anything imports trio

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from zbudfs.core.errors import ZbudfsError
from zbudfs.fuse.shim import ShimError
from zbudfs.service.keeper import ENDING, Keeper, StartError, keep_adopted
from zbudfs.service.locks import coming_up
from zbudfs.service.log import Log, route_logging
from zbudfs.service.mountpoint import MountError, shown_path
from zbudfs.service.notify import Notifier, take_stored
from zbudfs.service.pooldir import PoolDirectoryError
from zbudfs.service.predecessors import NAMES, Held, Remains, find
from zbudfs.service.settings import Settings, SettingsError

EXPECTED = (ZbudfsError, MountError, PoolDirectoryError, SettingsError, ShimError, StartError, MemoryError, OSError)
"""What can go wrong at the start without being a bug: told in one line."""


def _say(ready_fd: int, message: dict[str, object]) -> None:
    """Tell whoever started us; they may be gone."""
    with contextlib.suppress(OSError):
        os.write(ready_fd, json.dumps(message).encode() + b"\n")
    os.close(ready_fd)


def _is_awaited(ready_fd: int) -> bool:
    """Whether the command that started this daemon still has the other end of the pipe open."""
    poll = select.poll()
    poll.register(ready_fd, 0)
    return not poll.poll(0)


def _mount(
    settings: Settings,
    log: Log,
    say: Callable[[dict[str, object]], None],
    keeper: Keeper,
    is_awaited: Callable[[], bool] = lambda: True,
) -> int:
    made = False
    try:
        with coming_up(settings.mountpoint):
            # If it ends later, the next command finds this daemon coming up, and waits for it (cli/alone.py).
            if not is_awaited():
                raise StartError("the command that started this daemon has ended: nothing is mounted")
            keeper.make()
        made = True
        keeper.start()
        keeper.serve_first()
    except EXPECTED as error:
        if made:
            keeper.undo()
        text = str(error) or type(error).__name__
        log.error(text)
        say({"error": text})
        return verdict.GIVE_UP
    verdict.GUARD.held = True
    say({"ready": True, "pid": os.getpid(), "warnings": keeper.warnings})
    return keeper.run()


def _serve(settings: Settings | None, log: Log) -> int:
    """Be the main process of a service: the exit status."""
    notifier = Notifier.from_environment()
    try:
        remains = find(take_stored(), settings.mountpoint if settings is not None else None)
    except Held as held:
        return _leave(held, settings.mountpoint if settings is not None else "MOUNTPOINT", log, notifier)
    if remains is not None:
        return _resume(remains, settings, log, notifier)
    for name in NAMES:
        notifier.forget(name)
    if settings is None:
        log.error("there is nothing to go on with, and no settings to mount with")
        return verdict.GIVE_UP

    def say(message: dict[str, object]) -> None:
        if "error" in message:
            notifier.tell(f"STATUS={message['error']}")

    return _mount(settings, log, say, Keeper(settings, log, foreground=False, notifier=notifier))


def _leave(held: Held, mountpoint: str, log: Log, notifier: Notifier) -> int:
    """Leave a mount to the processes that serve it: the exit status."""
    remedy = (
        f"it serves on. To start anew, end it first: zbudfs swapoff --umount {shown_path(mountpoint)}"
        if held.for_good
        else "it is tried again"
    )
    text = f"{mountpoint} is served by another zbudfs, which this one cannot take over from: {held}; {remedy}"
    log.error(text)
    notifier.tell(f"STATUS={text}")
    return verdict.GIVE_UP if held.for_good else verdict.RETRY


def _resume(remains: Remains, wanted: Settings | None, log: Log, notifier: Notifier) -> int:
    """Go on with a mount that has lost its keeper, and perhaps its worker."""
    settings = remains.settings
    verdict.GUARD.held = True
    keeper = Keeper(settings, log, foreground=False, notifier=notifier)
    try:
        keeper.adopt(remains.directory, remains.descriptors, remains.born_ns)
        if remains.are_working:
            keeper.start()
        else:
            keeper.start_at_once()
    except EXPECTED as error:
        text = f"{settings.mountpoint} cannot be taken over: {error or type(error).__name__}"
        log.error(text)
        notifier.tell(f"STATUS={text}")
        return verdict.RETRY
    # From here on there is no way back. The new worker waits for the end of the old one (service/roster.py).
    keeper.end_others()
    if wanted is not None and wanted != settings:
        log.warning(f"the configuration has changed: it takes effect when {settings.mountpoint} is mounted anew")
    keeper.order_first()
    return keeper.run()


def main(arguments: Sequence[str]) -> int:
    """Run the daemon; the exit status."""
    verdict.GUARD.loading = False
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the keeper is up
    foreground = "--foreground" in arguments
    service = "--service" in arguments
    words = [word for word in arguments if word not in ("--foreground", "--service")]
    named = dict(zip(words[::2], words[1::2], strict=True))
    log = Log(foreground)
    route_logging(log)
    if "--adopt-fd" in named:
        notifier = Notifier.from_environment() if service else None
        channel = socket.socket(fileno=int(named["--adopt-fd"]))
        return keep_adopted(channel, log, foreground=foreground, notifier=notifier)
    settings = None
    if "--settings-fd" in named:
        with open(int(named["--settings-fd"]), "rb") as stream:  # noqa: PTH123  a descriptor
            settings = Settings.from_json(stream.read())
    if service:
        return _serve(settings, log)
    assert settings is not None
    ready_fd = int(named["--ready-fd"])
    os.set_inheritable(ready_fd, False)
    keeper = Keeper(settings, log, foreground=foreground)
    return _mount(settings, log, lambda message: _say(ready_fd, message), keeper, lambda: _is_awaited(ready_fd))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
