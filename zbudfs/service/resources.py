# SPDX-License-Identifier: MIT
"""The parts of a mount: pool directory, memory, backing file and the connection to the kernel.

A keeper makes them, or adopts them from another keeper, and frees them when the mount has ended.
"""

import contextlib
import os
import sys
import time

from zbudfs.core.packing import Packing
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.fuse import shim
from zbudfs.service import disks, hardening, public
from zbudfs.service.log import Log
from zbudfs.service.mountpoint import (
    MountError,
    find_mount,
    open_and_mount,
    request_timeout_warnings,
    unmount_all,
    zbudfs_mounts,
)
from zbudfs.service.pooldir import PoolDirectory
from zbudfs.service.public import PublicFile
from zbudfs.service.session import session_warnings
from zbudfs.service.settings import BACKING_FOLDER, Settings
from zbudfs.store.backing import Backing
from zbudfs.store.cgroup_limit import CgroupLimit
from zbudfs.store.memory import StoreMemory
from zbudfs.store.status_area import Field


class StartError(Exception):
    """The mount could not be made; the text is for the user."""


class Resources:
    """The parts of one mount, complete after `make` or `adopt`. The children of the keeper use them too."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.settings = settings
        self.warnings: list[str] = []
        """The protections that the system refused, with the consequences, one sentence each."""
        self.log = log
        self.keeper_pid = os.getpid()
        self.keeper_pidfd = os.pidfd_open(self.keeper_pid)

    @property
    def fields(self) -> memoryview:
        """The numbers in the status area."""
        return self.memory.status_area.fields

    def make(self) -> None:
        """Make memory, backing file and mount. Raises the errors of these steps, after undoing the earlier ones."""
        if sys.maxsize < 1 << 32:
            raise StartError(
                "zbudfs needs a 64-bit system and a 64-bit Python: the page table is changed 8 bytes at a time"
            )
        settings = self.settings
        self.warnings += hardening.before_threads(0)
        shim.take_arenas_from_malloc()
        self.directory = PoolDirectory.create(settings)
        try:
            self.backing = self._open_backing()
            try:
                self.memory = self._make_memory()
                self.memory.populate()
                self._encrypt()
                self.warnings += request_timeout_warnings()
                self.warnings += session_warnings()
                if not self.directory.survives:
                    self.warnings.append(
                        "the pool is in memory without a name: `zbudfs restart` cannot hand it to a newer version (that"
                        " needs a tmpfs with noswap: Linux 6.4 or later, and the right to mount)"
                    )
                self.fuse_fd = open_and_mount(settings.mountpoint, settings.source)
            except BaseException:
                if self.backing is not None:
                    self.backing.close()
                raise
        except BaseException:
            self.directory.remove()
            raise
        os.set_blocking(self.fuse_fd, False)
        self.directory.roster.keep()
        mount = find_mount(self.settings.mountpoint)
        fields = self.fields
        fields[Field.MOUNT_DEVICE] = mount.st_dev if mount is not None else 0
        public.remove(self.directory.path)  # it may be the file of a mount that has died
        self._prepare(time.time_ns())
        fields[Field.BORN_NS] = self.born_ns
        fields[Field.BACKING_FIXED] = self.backing is not None and self.backing.is_fixed
        self.write_owners()

    def adopt(self, directory: PoolDirectory, descriptors: list[int], born_ns: int) -> None:
        """Take over the parts of another keeper. `descriptors` are the connection, the lock and the backing file."""
        self.warnings += hardening.before_threads(0)
        shim.take_arenas_from_malloc()
        self.fuse_fd = descriptors[0]
        self.directory = directory
        backing = self.settings.backing
        self.memory = self._make_memory()
        is_fixed = bool(self.memory.status_area.fields[Field.BACKING_FIXED])
        self.backing = Backing(backing, open_fd=descriptors[2], is_fixed=is_fixed) if backing is not None else None
        self._encrypt()
        self._prepare(born_ns)

    def write_owners(self) -> None:
        """Write in the status area which keeper this is, and the numbers of the descriptors in it and its children."""
        fields = self.fields
        fields[Field.KEEPER_PID] = self.keeper_pid
        fields[Field.FUSE_FD] = self.fuse_fd
        fields[Field.LOCK_FD] = self.directory.lock_fd
        fields[Field.BACKING_FD] = self.backing.fileno() if self.backing is not None else 0

    def _prepare(self, born_ns: int) -> None:
        self.born_ns = born_ns
        """The times of all files."""
        self.directory.roster.join()
        self.descriptors = {"fuse": self.fuse_fd, "lock": self.directory.lock_fd}
        if self.backing is not None:
            self.descriptors["backing"] = self.backing.fileno()
        self.log.ring = self.memory.status_area
        self.public = self._publish()
        """The file of the public statistics; None if there is none."""
        if any(mount.admits_others for mount in zbudfs_mounts() if mount.st_dev == self._mount_device()):
            self.warnings.append(
                "other users' requests reach the daemon and can slow swap down: an older version has made the mount; swapoff,"
                " umount and mount it again"
            )

    def _mount_device(self) -> int:
        return int(self.memory.status_area.fields[Field.MOUNT_DEVICE])

    def _publish(self) -> PublicFile | None:
        """Make the file of the public statistics. Without it the mount works, and only root can read statistics."""
        device = f"{os.major(self._mount_device())}:{os.minor(self._mount_device())}"
        texts = [self.settings.mountpoint, self.settings.backing or ""]
        try:
            return PublicFile.create(self.directory.path, device, texts)
        except (OSError, MemoryError) as error:
            self.log.info(f"no public statistics: {error}")
            return None

    def _make_memory(self) -> StoreMemory:
        settings = self.settings
        memory = StoreMemory(
            settings.size_bytes,
            settings.pool_bytes >> PAGE_SHIFT,
            backed=settings.backing is not None,
            folder=self.directory.memory_folder,
            packing=Packing.parse(settings.packing),
        )
        memory.cgroup_limit = CgroupLimit()
        return memory

    def _encrypt(self) -> None:
        """Encrypt blocks with the key in the status area, if the settings say so."""
        if self.settings.encrypt and self.backing is not None and self.memory.outgoing is not None:
            from zbudfs.store.cipher import KEY_BYTES, BlockCipher  # before the first fork, and only if it is used

            self.backing.encrypt(BlockCipher(self.memory.status_area.key(KEY_BYTES)), self.memory.outgoing.view)

    def _open_backing(self) -> Backing | None:
        path = self.settings.backing
        if path is None:
            return None
        if os.path.dirname(path) == BACKING_FOLDER:
            os.makedirs(BACKING_FOLDER, mode=0o700, exist_ok=True)
        force = self.settings.force_backing
        self.warnings += disks.check(path, force=force)
        backing = Backing(path, force=force)
        self.warnings += backing.warnings
        if not backing.direct:
            self.warnings.append(
                f"the file system of {path} refuses direct I/O: writeback goes through the page cache, which needs"
                " memory when memory is short; put the backing file on ext4, xfs or btrfs"
            )
        return backing

    def unmount(self) -> None:
        """Unmount this mount, and no mount that was made at its path since."""
        with contextlib.suppress(MountError):
            unmount_all(self.fields[Field.MOUNT_DEVICE], lazy=True)

    def free(self) -> None:
        """Free memory and backing file of a mount that has ended."""
        os.close(self.fuse_fd)
        if self.backing is not None:
            self.backing.close()
        self.memory.status_area.forget_key()
        self.directory.remove()
