# SPDX-License-Identifier: MIT
"""The daemon of one mount: `python -I -m zbudfs.service.daemon --settings-fd N --ready-fd M [--foreground]`.

Started by service/launch.py, never by hand. In this order, because each step relies on the ones before it:

    harden the process   before any thread exists: threads inherit it
    open the backing     refuse bad settings while there is still nothing to undo
    make the store       its threads start, its first frames are populated
    warm up              once around every path of the store, so that what it allocates once is allocated
    mount, first request the mount is there and answers
    lock memory          whatever exists now stays
    say "ready"          on the ready pipe: one line of JSON

It ends when the mount is gone: by `zbudfs umount`, by umount(8), or because of SIGTERM or SIGINT, which unmount if
nobody has the swapfile open and are refused otherwise.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import trio

from zbudfs import __version__
from zbudfs.core.codec import Codec
from zbudfs.core.errors import ZbudfsError
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.fuse import shim
from zbudfs.fuse.nodes import Stats, Value
from zbudfs.fuse.operations import Operations
from zbudfs.fuse.session import HEAP_BYTES, MAX_REQUEST_BYTES, open_session, serve
from zbudfs.service import hardening
from zbudfs.service.log import Log, route_logging
from zbudfs.service.mountpoint import MountError, open_and_mount, request_timeout_warnings, unmount
from zbudfs.service.settings import BACKING_FOLDER, Settings, SettingsError
from zbudfs.store.backing import Backing
from zbudfs.store.iothread import IoThread
from zbudfs.store.page_store import PageStore
from zbudfs.store.pressure import PressureMonitor

FIRST_ANSWER_SECONDS: Final = 30
"""How long the kernel may take to send FUSE_INIT after the mount. Arbitrary: it is sent at once."""


class Daemon:
    """One mount, from settings to exit status."""

    def __init__(self, settings: Settings, log: Log, ready_fd: int) -> None:
        self._settings = settings
        self._log = log
        self._ready_fd = ready_fd
        self._warnings: list[str] = []
        self._mounted = False
        self._operations: Operations | None = None

    def run(self) -> int:
        """Serve until the mount is gone; the exit status."""
        self._warnings += hardening.before_threads(HEAP_BYTES)
        shim.take_arenas_from_malloc()
        status = 0
        try:
            trio.run(self._run)
        except* (ZbudfsError, MountError, SettingsError, MemoryError, OSError, shim.ShimError) as group:
            self._fail(_first(group))
            status = 1
        return status

    def _fail(self, error: BaseException) -> None:
        text = str(error) or type(error).__name__
        self._log.error(text)
        self._say({"error": text})

    def _say(self, message: dict[str, object]) -> None:
        """Tell whoever started us, once; they may be gone."""
        if self._ready_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self._ready_fd, json.dumps(message).encode() + b"\n")
            os.close(self._ready_fd)
            self._ready_fd = -1

    async def _run(self) -> None:
        settings = self._settings
        backing = self._open_backing()
        store = PageStore(settings.size_bytes, settings.pool_bytes >> PAGE_SHIFT, backing, Codec(settings.level))
        store.reclaimer.log = self._log.warning
        unmounter = IoThread[None]("unmount")
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(store.run)
                await _warm_up(store)
                self._warnings += request_timeout_warnings()
                stats = Stats(store, self._facts, self._log.lines)
                self._operations = Operations(store, stats, nursery, time.time_ns())
                with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals, self._monitor(store):
                    fuse_fd = open_and_mount(settings.mountpoint)
                    self._mounted = True
                    os.set_blocking(fuse_fd, False)
                    open_session(self._operations, fuse_fd)
                    nursery.start_soon(self._end_on_signals, signals, unmounter)
                    nursery.start_soon(self._come_up, store, self._operations)
                    await serve()
                    self._mounted = False
                    self._log.info(f"unmounted from {settings.mountpoint}")
                    nursery.cancel_scope.cancel()
        finally:
            if self._mounted:  # something failed: leave no dead mount behind
                with contextlib.suppress(MountError):
                    unmount(settings.mountpoint, lazy=True)
            store.close()
            unmounter.close()

    def _open_backing(self) -> Backing | None:
        path = self._settings.backing
        if path is None:
            return None
        if Path(path).parent == Path(BACKING_FOLDER):
            Path(BACKING_FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
        backing = Backing(path)
        if not backing.direct:
            self._warnings.append(
                f"the file system of {path} refuses direct I/O: writeback goes through the page cache, which needs"
                " memory when there is little; put the backing file on ext4, xfs or btrfs"
            )
        return backing

    @contextlib.contextmanager
    def _monitor(self, store: PageStore) -> Iterator[None]:
        try:
            monitor = PressureMonitor(store.reclaimer.pressure)
        except OSError as error:
            self._log.info(f"memory pressure is not watched: {error.strerror} (PSI)")
            yield
            return
        try:
            yield
        finally:
            monitor.close()

    async def _come_up(self, store: PageStore, operations: Operations) -> None:
        with trio.move_on_after(FIRST_ANSWER_SECONDS) as limit:
            await operations.started.wait()
        if limit.cancelled_caught:
            raise MountError("the kernel sends no requests")
        self._warnings += hardening.lock_memory([(arena.address, arena.size) for arena in store.arenas])
        for warning in self._warnings:
            self._log.warning(warning)
        settings = self._settings
        self._log.info(
            f"zbudfs {__version__} on {settings.mountpoint}: {settings.size_bytes >> 20} MiB, pool of"
            f" {settings.pool_bytes >> 20} MiB, {settings.backing or 'no backing file'}; libfuse {shim.libfuse_version()}"
        )
        self._say({"ready": True, "pid": os.getpid(), "warnings": self._warnings})

    async def _end_on_signals(self, signals: AsyncIterator[int], unmounter: IoThread[None]) -> None:
        assert self._operations is not None
        async for number in signals:
            name = signal.Signals(number).name
            users = self._operations.open_swapfiles
            if users:
                self._log.warning(
                    f"{name}: not ending, the swapfile is open ({users} times): zbudfs swapoff comes first"
                )
                continue
            try:
                await unmounter.run(unmount, self._settings.mountpoint)
            except MountError as error:
                self._log.warning(f"{name}: not ending: {error}")
            else:
                return  # the session sees that the mount is gone, and ends

    def _facts(self) -> dict[str, Value]:
        settings = self._settings
        operations = self._operations
        return {
            "mountpoint": settings.mountpoint,
            "pid": os.getpid(),
            "version": __version__,
            "level": settings.level,
            "backing_path": settings.backing,
            "backing_size_bytes": settings.size_bytes if settings.backing is not None else 0,
            "open_swapfiles": operations.open_swapfiles if operations is not None else 0,
            "log_dropped": self._log.dropped,
            "warnings": self._warnings,
        }


async def _warm_up(store: PageStore) -> None:
    """Use each path once: a page that compresses, one that does not, a word; a whole request, and a part of a page."""
    compressible = bytes(range(256)) * (PAGE_SIZE // 256)
    length = min(MAX_REQUEST_BYTES, store.size_bytes // 2)
    samples = [os.urandom(PAGE_SIZE), compressible * (length // PAGE_SIZE), bytes(PAGE_SIZE), b"zbudfs"]
    for sample in samples:
        await store.write(0, sample)
        if await store.read(0, len(sample)) != sample:
            raise MemoryError("the store does not give back what it was given: this machine's memory cannot be trusted")
    await store.discard(0, length)
    store.forget_cumulative()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(arguments: Sequence[str]) -> int:
    """Run the daemon with the arguments that service/launch.py gives; the exit status."""
    foreground = "--foreground" in arguments
    named = dict(zip(arguments[:4:2], arguments[1:4:2], strict=False))
    settings_fd, ready_fd = int(named["--settings-fd"]), int(named["--ready-fd"])
    os.set_inheritable(ready_fd, False)
    log = Log(foreground)
    route_logging(log)
    with open(settings_fd, "rb") as stream:
        settings = Settings.from_json(stream.read())
    return Daemon(settings, log, ready_fd).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
