# SPDX-License-Identifier: MIT
"""The FUSE handlers. They are thin, and the only place where an error becomes an errno."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import pyfuse3
import trio

from zbudfs.core.errors import BackingError, BackingFull, LayoutError, OutOfRange, PageLost, PoolFull, ZbudfsError
from zbudfs.core.trace import Kind
from zbudfs.core.units import PAGE_SIZE
from zbudfs.fuse import shim
from zbudfs.fuse.nodes import (
    CONTROL,
    CONTROL_NAME,
    ROOT,
    STATS,
    STATS_NAME,
    SWAPFILE,
    SWAPFILE_NAME,
    Control,
    Folder,
    Stats,
)
from zbudfs.fuse.openfiles import OpenFiles
from zbudfs.fuse.openings import OPENED, Openings
from zbudfs.fuse.traced import traced
from zbudfs.store.page_store import PageStore

ERRNO_OF: Final[Mapping[type[ZbudfsError], int]] = {
    PoolFull: errno.ENOSPC,
    PageLost: errno.EIO,
    BackingError: errno.EIO,
    BackingFull: errno.ENOSPC,
    OutOfRange: errno.EINVAL,
    LayoutError: errno.EIO,
}

FOREVER_SECONDS: Final = 86400.0 * 365
"""Seconds for which the kernel may keep names and attributes. The tree never changes, so look-ups need no daemon."""

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
_DISCARDS: Final = frozenset(
    {FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE}
)

_log = logging.getLogger(__name__)

_MOST_BUGS: Final = 32
_known_bugs: set[tuple[type, str, int]] = set()
"""Type and place (file, line) of the bugs that were logged."""


def fuse_error(error: Exception) -> pyfuse3.FUSEError:
    """Return the answer to the kernel for an error. An error that is not the store's own is a bug: it is logged once."""
    if isinstance(error, ZbudfsError):
        return pyfuse3.FUSEError(ERRNO_OF[type(error)])
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    bug = type(error), trace.tb_frame.f_code.co_filename if trace else "", trace.tb_lineno if trace else 0
    if bug not in _known_bugs and len(_known_bugs) < _MOST_BUGS:
        _known_bugs.add(bug)
        _log.error("a request failed because of a bug in zbudfs", exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


class Operations(pyfuse3.Operations):
    """The handlers of one mount. `started` is set when FUSE_INIT has come, from the kernel or from `resume`."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, store: PageStore, stats: Stats, control: Control, nursery: trio.Nursery, born_ns: int) -> None:
        super().__init__()
        self._store = store
        self._requests = store.requests
        self._stats = stats
        self._control = control
        self._folders: dict[int, Folder] = {STATS: stats, CONTROL: control}
        self._nursery = nursery
        self._born_ns = born_ns
        self.started = trio.Event()
        self._status_area = store.memory.status_area
        self._openings = Openings(self._status_area.fields)
        # Handles do not start at the same number after a takeover: an old one must not read another file's content.
        self._open_files = OpenFiles((os.getpid() << 32) + SWAPFILE + 1)
        store.tracer.notify(self._serve)
        shim.set_make_ready(store.requests.make_ready)
        store.aio.serve(shim.reply_data, self._read_again)
        self._serve()

    def init(self) -> None:
        """Handle FUSE_INIT: the mount answers requests from now on."""
        if not self._status_area.init():
            self._status_area.save_init(shim.first_request())
        self.started.set()

    # ---- the tree --------------------------------------------------------------------------------------------------

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = entry.entry_timeout = FOREVER_SECONDS
        entry.st_uid = entry.st_gid = 0
        entry.st_blksize = PAGE_SIZE
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._born_ns
        if inode in (ROOT, STATS):
            entry.st_mode = stat.S_IFDIR | 0o555
            entry.st_nlink = 4 if inode == ROOT else 2
        elif inode == CONTROL:
            entry.st_mode = stat.S_IFDIR | 0o700
            entry.st_nlink = 2
        elif inode == SWAPFILE:
            entry.st_mode = stat.S_IFREG | 0o600
            entry.st_nlink = 1
            entry.st_size = self._store.size_bytes
            entry.st_blocks = self._store.size_bytes // 512  # with fewer the file has holes, and swapon refuses it
        elif self._stats.name(inode) is not None:
            entry.st_mode = stat.S_IFREG | 0o444
            entry.st_nlink = 1
        elif self._control.name(inode) is not None:
            entry.st_mode = stat.S_IFREG | 0o600
            entry.st_nlink = 1
        else:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a name in a directory."""
        inode: int | None = None
        if parent_inode == ROOT:
            inode = {SWAPFILE_NAME: SWAPFILE, STATS_NAME: STATS, CONTROL_NAME: CONTROL}.get(name)
        elif parent_inode in self._folders:
            inode = self._folders[parent_inode].inode(name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(inode)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Do nothing: the kernel's look-up counts do not matter, since inodes are fixed."""

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode."""
        return self._attributes(inode)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Refuse to change attributes. New times have no effect, nor has the present size or any size of a control/ file."""
        current = self._attributes(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size != current.st_size and self._control.name(inode) is None:
            raise pyfuse3.FUSEError(errno.EPERM)
        return current

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """Open a directory; its handle is its inode."""
        if inode != ROOT and inode not in self._folders:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Report the names of a directory, from number `start_id` on."""
        if fh == ROOT:
            entries = [(SWAPFILE_NAME, SWAPFILE), (STATS_NAME, STATS), (CONTROL_NAME, CONTROL)]
        else:
            folder = self._folders[fh]
            entries = [(name, folder.inode(name) or 0) for name in folder.names]
        for number, (name, inode) in enumerate(entries[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), number):
                break

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Report no blocks and no inodes, as pseudo filesystems do, so that df and monitoring leave the mount out."""
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = PAGE_SIZE
        answer.f_blocks = answer.f_bfree = answer.f_bavail = 0
        answer.f_files = answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 255
        return answer

    async def access(self, inode: pyfuse3.InodeT, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        """Allow the access: the kernel has checked the modes itself (default_permissions)."""
        return True

    # ---- operations that a tree of fixed files does not have ----------------------------------------------------

    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        """Refuse: there are no symbolic links."""
        raise pyfuse3.FUSEError(errno.EINVAL)

    async def _refuse(self, *_: object) -> None:
        raise pyfuse3.FUSEError(errno.EPERM)

    mknod = mkdir = unlink = rmdir = symlink = rename = link = create = _refuse  # type: ignore[assignment]

    # ---- files -----------------------------------------------------------------------------------------------------

    async def open(self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open the swapfile, without page cache, or another file, whose content is fixed at this moment."""
        if inode == SWAPFILE:
            if flags & os.O_TRUNC:
                # After a success the kernel would take the file as empty, and a loop device on it would read nothing.
                raise pyfuse3.FUSEError(errno.EPERM)
            try:
                opened = self._openings.open(shim.open_request(), writing=flags & os.O_ACCMODE != os.O_RDONLY)
            except OSError as error:
                raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
            return pyfuse3.FileInfo(fh=opened, direct_io=True)
        if (name := self._control.name(inode)) is not None:
            handle = self._open_files.add(self._control.content(name), name)
        elif (name := self._stats.name(inode)) is not None:
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise pyfuse3.FUSEError(errno.EACCES)
            handle = self._open_files.add(self._stats.content(name))
        else:
            raise pyfuse3.FUSEError(errno.EISDIR)
        return pyfuse3.FileInfo(fh=handle, direct_io=True)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Close an open file after its last user."""
        if fh & OPENED:
            self._openings.release(fh)
        else:
            self._open_files.remove(fh)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Return bytes of a file of stats/ or control/. Reads of the swapfile go to `_read_served` instead."""
        file = self._open_files.find(fh)
        if file is None:
            raise pyfuse3.FUSEError(errno.ESTALE)  # opened before a takeover, or before too many other files
        return file.content[off : off + size]

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Set a value of control/. Each write is a whole value, whatever its offset, as in sysfs."""
        file = self._open_files.find(fh)
        if file is None or file.key is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        try:
            self._control.set(file.key, bytes(buf))
        except ValueError:
            raise pyfuse3.FUSEError(errno.EINVAL) from None
        self._open_files.rewrite(fh, self._control.content(file.key))
        return len(buf)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing when a file is closed: no data is buffered."""

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Do nothing: values written to control/ are in force already. The swapfile's fsync goes to `_fsync_served`."""

    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Do nothing: directories never change."""

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Do nothing: an open directory has no resources."""

    # ---- the swapfile's data: handlers that the shim calls -------------------------------------------------------
    # Each returns its answer at once if it can (bytes, 0 or an errno). Else it returns None, and a task calls `shim.reply`.

    def _serve(self) -> None:
        """Register the handlers with the shim: those that trace while a trace is on, else those without any test for one."""
        plain = self._read_served, self._write_served, self._fallocate_served
        read, write, fallocate = traced(self._store.tracer, *plain) if self._store.tracer.active else plain
        shim.serve_file(SWAPFILE, read, write, fallocate, self._fsync_served)

    def _read_served(self, request: int, offset: int, length: int) -> bytes | int | None:
        try:
            content = self._requests.read_nowait(offset, length)
        except Exception as error:
            return fuse_error(error).errno
        if content is None and not self._store.aio.begin(request, offset, length):
            self._read_again(request, offset, length)
        return content

    def _read_again(self, request: int, offset: int, length: int) -> None:
        self._nursery.start_soon(self._read_later, request, offset, length)

    async def _read_later(self, request: int, offset: int, length: int) -> None:
        try:
            content = await self._requests.read(offset, length)
        except Exception as error:
            shim.reply(request, fuse_error(error).errno)
        else:
            shim.reply_data(request, content)

    def _write_served(self, request: int, offset: int, content: memoryview) -> int | None:
        """Store `content`, which is valid until the request is answered. A write beyond the end is ENOSPC, as on a disk."""
        if offset + len(content) > self._store.size_bytes:
            return errno.ENOSPC
        try:
            done = self._requests.write_nowait(offset, content)
        except Exception as error:
            return fuse_error(error).errno
        if done == len(content):
            return 0
        self._nursery.start_soon(self._write_later, request, offset + done, content[done:], len(content))
        return None

    async def _write_later(self, request: int, offset: int, content: memoryview, length: int) -> None:
        rest = len(content)
        try:
            await self._requests.write(offset, content)
        except Exception as error:
            self._trace_write(Kind.REFUSED, offset, rest, length)
            answer = fuse_error(error).errno
        else:
            self._trace_write(Kind.WRITE, offset, rest, length)
            answer = 0
        content.release()
        shim.reply(request, answer, length)

    def _trace_write(self, kind: Kind, offset: int, rest: int, length: int) -> None:
        """Record a write of `length` bytes that had to wait: its last `rest` bytes start at `offset`."""
        tracer = self._store.tracer
        if tracer.active:
            start = offset + rest - length
            if kind == Kind.WRITE:
                tracer.wrote(start, length)
            else:
                tracer.missed(kind, start, length)

    def _fallocate_served(self, request: int, mode: int, offset: int, length: int) -> int | None:
        """Punch and zero as discards; refuse other modes. Never ENOSYS: the kernel would not send fallocate again."""
        if mode not in _DISCARDS:
            return errno.EOPNOTSUPP
        if not mode & FALLOC_FL_KEEP_SIZE and offset + length > self._store.size_bytes:
            return errno.EFBIG
        self._nursery.start_soon(self._act_later, request, self._requests.discard, offset, length)
        return None

    def _fsync_served(self, request: int) -> int | None:
        """Sync the backing file. All earlier writes are stored by then; those that were written back are on the disk too."""
        self._nursery.start_soon(self._act_later, request, self._requests.sync)
        return None

    async def _act_later(self, request: int, act: Callable[..., Awaitable[None]], *arguments: int) -> None:
        try:
            await act(*arguments)
        except Exception as error:
            shim.reply(request, fuse_error(error).errno)
        else:
            shim.reply(request, 0)
