# SPDX-License-Identifier: MIT
"""Mounting and unmounting with mount(2).

    open("/dev/fuse") -> fd     mount("zbudfs", MOUNTPOINT, "fuse.zbudfs", flags, "fd=N,...")

libfuse would do both inside its session, through a setuid helper, and would unmount at the end of the session. Here the process
that opens the file descriptor owns the mount, and sessions on it can begin and end. This needs root, which a daemon that locks
memory and serves swap needs anyway.

The functions read the mounts from /proc/self/mountinfo and never from stat(2). A mount whose daemon has died or hangs answers
every stat with an error, or not at all, and users want to clean up just such mounts.

Only root may use the mount. Without `allow_other` the kernel refuses the requests of other users itself, so that they do not
enter the queue that swap uses. Processes of root count as root only if all their user and group ids are 0. Kernel threads,
such as those of a loop device, are root's.

Mountpoints are absolute, resolved `str` paths here. Bytes that are not UTF-8 become surrogate escapes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import stat
from dataclasses import dataclass
from typing import Final

from zbudfs.core.errors import Failed
from zbudfs.store.files import read_bytes, read_text

FSTYPE: Final = "fuse.zbudfs"
"""The file system type in mount tables: FUSE, subtype zbudfs."""

SOURCE: Final = "zbudfs"
"""The default device name in mount tables."""

MAX_READ_BYTES: Final = 256 << 10
"""Largest read request that the kernel may send."""

_MS_NOSUID: Final = 1 << 1
_MS_NODEV: Final = 1 << 2
_MS_NOEXEC: Final = 1 << 3
_MS_NOATIME: Final = 1 << 10
_MNT_DETACH: Final = 1 << 1
_UMOUNT_NOFOLLOW: Final = 1 << 3

_SHELL_SAFE: Final = re.compile(r"[\w@%+=:,./-]+")
_MOST_LINKS: Final = 40
"""Most symbolic links in one path, as in the kernel: more of them are a loop."""
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")
_TIMEOUTS: Final = ("default_request_timeout", "max_request_timeout")
_UNIT_SAFE: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789:_.")


class MountError(Failed):
    """A mount or an unmount failed. The text is one sentence for the user, with the remedy if any."""

    code: int
    """The kernel's errno; 0 if the kernel did not refuse."""

    def __init__(self, text: str, code: int = 0) -> None:
        """Make an error with the message `text`; `code` is the kernel's errno, if any."""
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Mount:
    """One mounted zbudfs, as in the kernel's mount table."""

    mountpoint: str
    """Absolute path, as seen by this process."""
    device: str
    """st_dev of all files on it, as "major:minor"; no two live mounts share one."""

    admits_others: bool = False
    """Whether the kernel admits other users (`allow_other`). It does if an old version has made the mount."""

    @property
    def st_dev(self) -> int:
        """The device number, as `os.stat_result.st_dev` has it."""
        major, minor = self.device.split(":")
        return os.makedev(int(major), int(minor))


def zbudfs_mounts(root: str = "/") -> list[Mount]:
    """Return every mounted zbudfs that this process can see, oldest first.

    `root` is the folder that holds `proc/`. Raises OSError if the mount table cannot be read.
    """
    return parse_mountinfo(read_bytes("proc/self/mountinfo", root))


def find_mount(mountpoint: str, root: str = "/") -> Mount | None:
    """Return the zbudfs that is mounted at `mountpoint`, the topmost if there are several, or None."""
    return next((mount for mount in reversed(zbudfs_mounts(root)) if mount.mountpoint == mountpoint), None)


def resolve(path: str, root: str = "/") -> str:
    """Return the absolute path without symbolic links, without a request to any zbudfs. The path need not exist.

    lstat(2) of a mountpoint is a request to its daemon when the kernel's copy of the attributes is too old (a plain `ls` can
    cause that). The request waits while no process serves, and a new daemon would wait for itself. Below a mountpoint the
    function makes no system call: it resolves ".." and "." by their names. `root` holds `proc/`.
    """
    try:
        mountpoints = {mount.mountpoint for mount in zbudfs_mounts(root)}
    except OSError:
        mountpoints = set()
    todo = os.path.join(os.getcwd(), path).split("/")[::-1]
    found: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del found[-1:]
            continue
        found.append(part)
        if any("/" + "/".join(found[:count]) in mountpoints for count in range(1, len(found) + 1)):
            continue
        try:
            target = os.readlink("/" + "/".join(found))
        except OSError:
            continue  # it is no link, or does not exist
        links += 1
        if links > _MOST_LINKS:
            continue
        found = [] if target.startswith("/") else found[:-1]
        todo += target.split("/")[::-1]
    return "/" + "/".join(found)


def is_dead(mountpoint: str) -> bool:
    """Return whether the mount at `mountpoint` has lost its daemon. Waits if the daemon is alive and does not answer.

    The kernel may answer stat(2) from its cache, but it always passes statfs(2) to the daemon.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def is_connected(fuse_fd: int) -> bool:
    """Return whether the connection of this descriptor is alive. After an unmount or an abort the descriptor has an error."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return not poll.poll(0)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """Return the zbudfs mounts of root in `text`, the contents of a mountinfo file; other lines are skipped.

    Any user may mount a FUSE filesystem of any subtype with fusermount3. The kernel shows that user as `user_id`.
    """
    mounts = []
    for line in text.split(b"\n"):
        # id parent major:minor root mountpoint options [tags...] - fstype source superoptions
        fields, separator, rest = line.partition(b" - ")
        words = fields.split(b" ")
        fstype, _, source_and_options = rest.partition(b" ")
        options = source_and_options.rpartition(b" ")[2].split(b",")
        if separator and len(words) >= 6 and fstype == FSTYPE.encode() and b"user_id=0" in options:
            path = os.fsdecode(unescape_octal(words[4]))
            mounts.append(Mount(path, words[2].decode("ascii"), b"allow_other" in options))
    return mounts


def unescape_octal(field: bytes) -> bytes:
    r"""Undo the kernel's escapes in the tables of /proc: "\040" is a space, "\012" a newline."""
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)


def escape_path(path: str) -> str:
    r"""Return `path` as one file name, just as `systemd-escape --path` does: "/mnt/my swap" -> "mnt-my\x20swap".

    No two different absolute paths (without "." and ".." parts) have the same name.
    """
    trimmed = b"/".join(part for part in os.fsencode(path).split(b"/") if part not in (b"", b"."))
    if not trimmed:
        return "-"
    return "".join(
        "-" if byte == ord("/") else chr(byte) if byte in _UNIT_SAFE and (at or byte != ord(".")) else f"\\x{byte:02x}"
        for at, byte in enumerate(trimmed)
    )


def request_timeout_warnings(root: str = "/") -> list[str]:
    """Return a sentence for each limit that the system sets on the time of a FUSE request.

    The kernel ends a connection whose request is older than that limit, and all swapped-out pages are lost. But a daemon
    may be stopped for a while, or wait for a slow disk. `root` holds `proc/`.
    """
    warnings = []
    for name in _TIMEOUTS:
        try:
            value = read_text(f"proc/sys/fs/fuse/{name}", root).strip()
        except OSError:
            continue  # older kernels have no such limit
        if value != "0":
            warnings.append(
                f"fs.fuse.{name} is {value} s: the kernel will end the connection, and lose all swapped-out pages, when a"
                f" request takes longer; set it to 0 with sysctl fs.fuse.{name}=0"
            )
    return warnings


def check_mountpoint(mountpoint: str, root: str = "/") -> None:
    """Raise MountError unless a zbudfs can be mounted at `mountpoint`. `root` holds `proc/`."""
    shown = shown_path(mountpoint)
    if not mountpoint.startswith("/"):
        raise MountError(f"the mountpoint {shown} is not an absolute path")
    # The table comes first: a stat of a dead mount would only return "transport endpoint is not connected".
    if find_mount(mountpoint, root) is not None:
        raise MountError(f"zbudfs is mounted on {shown} already")
    try:
        mode = os.stat(mountpoint).st_mode
    except FileNotFoundError:
        raise MountError(f"the mountpoint {shown} does not exist: create the directory first") from None
    except OSError as error:
        raise MountError(f"the mountpoint {shown} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"the mountpoint {shown} is not a directory")


def open_and_mount(mountpoint: str, source: str = SOURCE) -> int:
    """Mount a zbudfs at `mountpoint` (absolute, resolved) and return the file descriptor of its connection.

    On return the kernel's first request waits in the descriptor. Requests to the mount wait until a process serves it. When
    the last copy of the descriptor is closed, the mount is dead. Close-on-exec is set. Raises MountError, with nothing
    mounted and nothing open.
    """
    if os.geteuid() != 0:
        raise MountError("mounting needs root: run it with sudo")
    check_mountpoint(mountpoint)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, OSError) as error:
        remedy = (
            "load the module with modprobe fuse" if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO) else ""
        )
        raise MountError(f"/dev/fuse cannot be opened: {error.strerror}{remedy and ': ' + remedy}") from None
    try:
        _mount(fd, mountpoint, source)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount(fd: int, mountpoint: str, source: str) -> None:
    """Call mount(2) for the connection `fd`. Raises MountError if the kernel refuses."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,max_read={MAX_READ_BYTES}"
    libc = ctypes.CDLL(None, use_errno=True)
    target = os.fsencode(mountpoint)
    if libc.mount(os.fsencode(source), target, FSTYPE.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        code = ctypes.get_errno()
        hint = {
            errno.EPERM: " (it needs CAP_SYS_ADMIN, which containers often lack)",
            errno.ENODEV: " (this kernel has no FUSE: load the module with modprobe fuse)",
        }.get(code, "")
        raise MountError(f"the kernel refused to mount on {shown_path(mountpoint)}: {os.strerror(code)}{hint}", code)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount the mount at `mountpoint`, which may be dead.

    With `lazy` the mount leaves the tree at once and ends with its last user; without it a mount in use stays. Raises
    MountError; a symbolic link is not followed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if libc.umount2(os.fsencode(mountpoint), ctypes.c_int(flags)) == 0:
        return
    code = ctypes.get_errno()
    reason = {
        errno.EBUSY: "it is in use: a program has a file open on it or its working directory there (see fuser -vm)",
        errno.EPERM: "unmounting needs root: run it with sudo",
        errno.EINVAL: "nothing is mounted there",
        errno.ENOENT: "it does not exist",
    }.get(code, os.strerror(code))
    raise MountError(f"cannot unmount {shown_path(mountpoint)}: {reason}", code)


def places_of(device: str, mountinfo: bytes) -> list[tuple[str, bool]]:
    """Return where a file system ("major:minor") is mounted, newest first, and whether another mount covers it there."""
    newest: dict[str, str] = {}
    found = []
    for line in mountinfo.split(b"\n"):
        words = line.split(b" ")
        if len(words) >= 6:
            path = os.fsdecode(unescape_octal(words[4]))
            newest[path] = words[2].decode("ascii")
            if newest[path] == device:
                found.append(path)
    return [(path, newest[path] != device) for path in reversed(found)]


def unmount_all(st_dev: int, *, lazy: bool = False) -> None:
    """Unmount a file system wherever it is mounted in this mount namespace, and nothing else.

    The path alone is not enough: the file system may have been unmounted lazily, and another one mounted there. MountError
    if it is in use (without `lazy`) or covered by another mount.
    """
    for path, is_covered in places_of(device_name(st_dev), read_bytes("/proc/self/mountinfo")):
        if is_covered:
            raise MountError(f"cannot unmount {shown_path(path)}: another mount covers it; unmount that first")
        unmount(path, lazy=lazy)


def device_name(st_dev: int) -> str:
    """Return a device number as the mount table writes it, such as "0:42"."""
    return f"{os.major(st_dev)}:{os.minor(st_dev)}"


def printable(text: str) -> str:
    r"""Return `text` without characters that control a terminal: "\x1b" becomes the four characters \x1b."""
    return "".join(each if each.isprintable() or each in "\n\xa0" else f"\\x{ord(each):02x}" for each in text)


def shown_path(path: str) -> str:
    """Return `path` for a message of one line, in a form that can be pasted into a shell: quoted if necessary.

    Bytes that a terminal does not show, or that are not UTF-8, become $'...'; bash, zsh, ksh and busybox sh understand that.
    """
    if not path.isprintable():
        return "$'" + "".join(map(_shell_escape, os.fsencode(path))) + "'"
    quoted = path.replace("'", "'\"'\"'")
    return path if _SHELL_SAFE.fullmatch(path) else f"'{quoted}'"


def _shell_escape(byte: int) -> str:
    character = chr(byte)
    if character in "\t\n":
        return {"\t": "\\t", "\n": "\\n"}[character]
    if character in "'\\":
        return f"\\{character}"
    return character if " " <= character <= "~" else f"\\x{byte:02x}"
