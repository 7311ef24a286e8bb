# SPDX-License-Identifier: MIT
"""The entry point of the daemon: `python -I -m zbudfs.service.daemon`, started by service/launch.py or an older keeper.

    --settings-fd N --ready-fd M [--foreground]   make a mount; report the result on M: one line of JSON
    --adopt-fd N [--foreground]                   take a mount over from the keeper at the other end of the socket N
    --service [--settings-fd N]                   be the main process of a service: continue a mount of an earlier process,
                                                  or make a mount; without settings only the former

This process is the keeper (service/keeper.py), which forks the workers.
"""

from zbudfs.service import bare_code  # isort: skip  before any other import

if __name__ == "__main__":  # not in another process that imports this module
    bare_code.install()

from zbudfs.service import verdict  # isort: skip  before any import that may fail
from zbudfs.service import import_guard as import_guard  # isort: skip  before any import of trio

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from zbudfs import __version__
from zbudfs.core.errors import ZbudfsError
from zbudfs.fuse.shim import ShimError
from zbudfs.service.ending import ENDING
from zbudfs.service.handing_over import receive_line, receive_with_descriptors
from zbudfs.service.keeper import Keeper
from zbudfs.service.locks import coming_up
from zbudfs.service.log import Log, route_logging
from zbudfs.service.mountpoint import MountError, shown_path
from zbudfs.service.notify import Notifier, take_stored
from zbudfs.service.pooldir import PoolDirectory, PoolDirectoryError
from zbudfs.service.predecessors import NAMES, Held, Remains, find
from zbudfs.service.resources import StartError
from zbudfs.service.settings import Settings, SettingsError

EXPECTED = (ZbudfsError, MountError, PoolDirectoryError, SettingsError, ShimError, StartError, MemoryError, OSError)
"""Errors of a start that are no bugs: each is reported in one line."""


def _say(ready_fd: int, message: dict[str, object]) -> None:
    """Report to the process that started the daemon, which may have ended."""
    with contextlib.suppress(OSError):
        os.write(ready_fd, json.dumps(message).encode() + b"\n")
    os.close(ready_fd)


def _is_awaited(ready_fd: int) -> bool:
    """Return whether the command that started this daemon still has the other end of the pipe open."""
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
            # If the command ends later, the next command finds this daemon starting, and waits for it (cli/alone.py).
            if not is_awaited():
                raise StartError("the command that started this daemon has ended: nothing is mounted")
            keeper.resources.make()
        made = True
        keeper.first_worker.start()
        keeper.first_worker.serve()
    except EXPECTED as error:
        if made:
            keeper.undo()
        text = str(error) or type(error).__name__
        log.failed_start(text)
        say({"error": text})
        return verdict.GIVE_UP
    verdict.GUARD.held = True
    say({"ready": True, "pid": os.getpid(), "warnings": keeper.resources.warnings})
    return keeper.run()


def _serve(settings: Settings | None, log: Log) -> int:
    """Run as the main process of a service, and return the exit status."""
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
        log.failed_start("there is no mount to continue with, and there are no settings to mount with")
        return verdict.GIVE_UP

    def say(message: dict[str, object]) -> None:
        if "error" in message:
            notifier.tell(f"STATUS={message['error']}")

    return _mount(settings, log, say, Keeper(settings, log, notifier=notifier))


def _leave(held: Held, mountpoint: str, log: Log, notifier: Notifier) -> int:
    """Leave a mount to the processes that serve it, and return the exit status."""
    remedy = (
        f"it continues to serve. To start again, end it first: zbudfs swapoff --umount {shown_path(mountpoint)}"
        if held.for_good
        else "the service tries again"
    )
    text = f"{mountpoint} is served by another zbudfs, which this one cannot take over from: {held}; {remedy}"
    log.failed_start(text)
    notifier.tell(f"STATUS={text}")
    return verdict.GIVE_UP if held.for_good else verdict.RETRY


def _resume(remains: Remains, wanted: Settings | None, log: Log, notifier: Notifier) -> int:
    """Continue a mount that has lost its keeper, and perhaps its worker. Return the exit status."""
    settings = remains.settings
    verdict.GUARD.held = True
    keeper = Keeper(settings, log, notifier=notifier)
    try:
        keeper.resources.adopt(remains.directory, remains.descriptors, remains.born_ns)
        if remains.are_working:
            keeper.first_worker.start()
            keeper.first_worker.wait_for_disk()
        else:
            keeper.first_worker.start_at_once()
    except EXPECTED as error:
        text = f"{settings.mountpoint} cannot be taken over: {error or type(error).__name__}"
        log.failed_start(text)
        notifier.tell(f"STATUS={text}")
        return verdict.RETRY
    # The takeover cannot be undone after this. The new worker waits for the end of the old one (service/roster.py).
    keeper.first_worker.end_others()
    if wanted is not None and wanted != settings:
        log.warning(f"the configuration has changed: it takes effect when {settings.mountpoint} is mounted again")
    keeper.first_worker.order()
    return keeper.run()


def _succeed(channel: socket.socket, log: Log, *, foreground: bool, notifier: Notifier | None) -> int:
    """Run as the keeper that takes over from the one at the other end of `channel`, and return the exit status."""
    try:
        handed, descriptors = receive_with_descriptors(channel)
        settings = Settings.from_json(str(handed["settings"]))
        keeper = Keeper(settings, log, foreground=foreground, notifier=notifier, predecessor=channel)
        directory = PoolDirectory.adopt(str(handed["folder"]), descriptors[1])
        keeper.resources.adopt(directory, descriptors, int(str(handed["born_ns"])))
        keeper.first_worker.start()
    except Exception as error:
        channel.sendall(json.dumps({"error": str(error) or repr(error)}).encode() + b"\n")
        return 1
    ready = {"ready": True, "version": __version__, "worker": keeper.first_worker.pid}
    try:
        channel.sendall(json.dumps(ready).encode() + b"\n")
    except OSError:
        return 1
    said = receive_line(channel)
    if not said:
        return 1  # the old keeper has died or given up the restart: its worker continues to serve
    if "ending" in said and not receive_line(channel):
        keeper.first_worker.end_others()  # the old keeper has died after it had killed its worker
    keeper.first_worker.order()
    return keeper.run()


def main(arguments: Sequence[str]) -> int:
    """Run the daemon, and return the exit status."""
    verdict.GUARD.loading = False
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the keeper handles them
    foreground = "--foreground" in arguments
    service = "--service" in arguments
    words = [word for word in arguments if word not in ("--foreground", "--service")]
    named = dict(zip(words[::2], words[1::2], strict=True))
    log = Log(foreground, service=service)
    route_logging(log)
    if "--adopt-fd" in named:
        notifier = Notifier.from_environment() if service else None
        channel = socket.socket(fileno=int(named["--adopt-fd"]))
        return _succeed(channel, log, foreground=foreground, notifier=notifier)
    settings = None
    if "--settings-fd" in named:
        with open(int(named["--settings-fd"]), "rb") as stream:
            settings = Settings.from_json(stream.read())
    if service:
        return _serve(settings, log)
    assert settings is not None
    ready_fd = int(named["--ready-fd"])
    os.set_inheritable(ready_fd, False)
    keeper = Keeper(settings, log, foreground=foreground)
    return _mount(settings, log, lambda message: _say(ready_fd, message), keeper, lambda: _is_awaited(ready_fd))


if __name__ == "__main__":
    bare_code.drop()
    sys.exit(main(sys.argv[1:]))
