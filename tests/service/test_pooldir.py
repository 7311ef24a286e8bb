# SPDX-License-Identifier: MIT
"""The pool directory: its own private tmpfs, one owner at a time, and nothing left of it."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS
from zbudfs.service import pooldir
from zbudfs.service.mountpoint import escape_path
from zbudfs.service.pooldir import PoolDirectory, PoolDirectoryError, path_of, remove_dead
from zbudfs.service.settings import Settings
from zbudfs.store.memory import StoreMemory

pytestmark = pytest.mark.needs("root")

MIB = 1 << 20


def settings_for(mountpoint: Path, *, pool_bytes: int = 8 * MIB, backing: str | None = "/b") -> Settings:
    """Return the settings of a small mount."""
    return Settings(mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=pool_bytes, backing=backing)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder in the place of /run/zbudfs. Mounts in it are removed afterwards."""
    folder = tmp_path / "run" / "zbudfs"
    monkeypatch.setattr(pooldir, "RUN_FOLDER", str(folder))
    monkeypatch.setattr(pooldir, "path_of", lambda mountpoint: path_of(mountpoint, str(folder)))
    yield folder
    for mount in mounts_under(folder.parent):
        subprocess.run(["umount", "--lazy", mount], check=False, timeout=LIMIT_SECONDS)


def mounts_under(folder: Path) -> dict[str, tuple[str, set[str]]]:
    """Return the mounts in a folder: type and options, by path."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        path, own = left.split()[4:6]
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
        if path.startswith(f"{folder}/"):
            kind, _, options = right.split()
            found[path] = (kind, {*own.split(","), *options.split(",")})
    return found


def in_other_process(path: Path) -> bool:
    """Return whether another process gets the lock of a pool directory."""
    command = ["flock", "--nonblock", str(path / "lock"), "true"]
    return subprocess.run(command, check=False, timeout=LIMIT_SECONDS).returncode == 0


# ---- where -----------------------------------------------------------------------------------------------------------


def test_every_mountpoint_has_its_own() -> None:
    """The name is the escaped mountpoint. A name that is too long is cut and stays unique."""
    assert path_of("/mnt/swap") == "/run/zbudfs/mnt-swap"
    assert path_of("/mnt/swap", "/elsewhere") == "/elsewhere/mnt-swap"
    assert path_of("/mnt/my swap") == rf"/run/zbudfs/{escape_path('/mnt/my swap')}"
    long = [f"/{'x' * 240}/{end}" for end in "ab"]
    names = [Path(path_of(path)).name for path in long]
    assert len(set(names)) == 2
    for name in names:
        with socket.socket(socket.AF_UNIX) as unbound, pytest.raises(FileNotFoundError):  # not: "path too long"
            unbound.connect(f"/run/zbudfs/{name}@9/control")
    assert path_of(os.fsdecode(b"/\xe4" * 150)) != path_of(os.fsdecode(b"/\xe5" * 150))


# ---- made ------------------------------------------------------------------------------------------------------------


def test_a_tmpfs_that_is_never_swapped_out(root: Path, tmp_path: Path) -> None:
    """The tmpfs is private, limited to the needs of the store and some room, and without swap."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    try:
        assert directory.survives
        assert directory.memory_folder == directory.path == path_of(str(tmp_path), str(root))
        kind, options = mounts_under(root)[directory.path]
        assert kind == "tmpfs"
        assert options >= {"noswap", "nosuid", "nodev", "noexec"}
        status = os.lstat(directory.path)
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, 0)
        room = os.statvfs(directory.path)
        assert 16 * MIB < room.f_blocks * room.f_frsize < 2 * (8 * MIB + 32 * MIB)  # twice what it needs
        assert stat.S_IMODE(root.stat().st_mode) & 0o022 == 0
    finally:
        directory.remove()


@pytest.mark.parametrize(("size", "pool"), [(1 * MIB, 1 * MIB), (64 * MIB, 8 * MIB), (1 << 33, 16 * MIB)])
def test_there_is_room_for_all_of_the_memory(root: Path, tmp_path: Path, size: int, pool: int) -> None:
    """A populated store fits, with any device and pool."""
    settings = Settings(mountpoint=str(tmp_path), size_bytes=size, pool_bytes=pool, backing="/b")
    directory = PoolDirectory.create(settings)
    try:
        memory = StoreMemory(size, pool >> 12, backed=True, folder=directory.memory_folder)
        memory.populate()
        memory.populate_frames([(0, pool >> 12)])
        for arena in memory.arenas:
            arena.populate(0, arena.size)
        del memory, arena
    finally:
        directory.remove()
    assert not Path(directory.path).exists()


def test_the_settings_are_in_it(root: Path, tmp_path: Path) -> None:
    """The settings of the mount are in the directory, for the clean-up."""
    settings = settings_for(tmp_path)
    directory = PoolDirectory.create(settings)
    try:
        assert Settings.from_json(Path(directory.path, "settings.json").read_bytes()) == settings
    finally:
        directory.remove()


def test_a_removal_with_all_content(root: Path, tmp_path: Path) -> None:
    """The directory goes, even while files in it are open and mapped."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    memory = StoreMemory(64 * MIB, 2048, backed=True, folder=directory.memory_folder)
    directory.remove()
    assert not Path(directory.path).exists()
    assert mounts_under(root) == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(directory.lock_fd)
    memory.pages.view[:4] = b"fine"


def test_a_system_that_cannot_mount_a_tmpfs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is an ordinary directory. The memory has no name, and the directory says that it does not survive."""
    monkeypatch.setattr(pooldir, "_mount_tmpfs", lambda path, settings: False)
    directory = PoolDirectory.create(settings_for(tmp_path))
    assert not directory.survives
    assert directory.memory_folder is None
    assert stat.S_IMODE(os.lstat(directory.path).st_mode) == 0o700
    assert not in_other_process(Path(directory.path))
    directory.remove()
    assert not Path(directory.path).exists()


# ---- one owner -------------------------------------------------------------------------------------------------------


def test_the_lock_is_held_as_long_as_a_process_lives(root: Path, tmp_path: Path) -> None:
    """The directory stays while a child of the first owner has it open. A second one has its own directory."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    path = Path(directory.path)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        os.close(directory.lock_fd)  # the owner is gone, its child is not
        assert not in_other_process(path)
        other = PoolDirectory.create(settings_for(tmp_path))
        assert other.path == f"{path}@1"
        other.remove()
        assert remove_dead(str(tmp_path)) == []
        assert (path / "settings.json").exists()
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)
    assert in_other_process(path)
    assert remove_dead(str(tmp_path)) == ["/b"]
    assert not path.exists()


def test_two_mountpoints_do_not_meet(root: Path, tmp_path: Path) -> None:
    """Each has a directory and a lock."""
    one = PoolDirectory.create(settings_for(tmp_path / "one"))
    two = PoolDirectory.create(settings_for(tmp_path / "two"))
    assert len(mounts_under(root)) == 2
    one.remove()
    assert Path(two.path, "settings.json").exists()
    two.remove()


def test_a_handed_over_directory(root: Path, tmp_path: Path) -> None:
    """The lock continues with the process that gets the descriptor."""
    first = PoolDirectory.create(settings_for(tmp_path))
    handed = os.dup(first.lock_fd)
    os.close(first.lock_fd)
    second = PoolDirectory.adopt(first.path, handed)
    assert second.memory_folder == first.path
    assert not in_other_process(Path(first.path))
    second.remove()
    assert not Path(first.path).exists()


def test_several_at_the_same_moment(root: Path, tmp_path: Path) -> None:
    """Processes that make and remove the directories of one mountpoint never remove each other's."""
    rounds, processes = 12, 4
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(processes)
    found: multiprocessing.Queue[str] = context.Queue()

    def make_and_remove() -> None:
        for _ in range(rounds):
            barrier.wait(LIMIT_SECONDS)
            try:
                directory = PoolDirectory.create(settings_for(tmp_path))
            except Exception as error:
                directory, result = None, repr(error)
            barrier.wait(LIMIT_SECONDS)
            if directory is not None:
                result = "whole" if Path(directory.path, "settings.json").exists() else "taken away"
            barrier.wait(LIMIT_SECONDS)
            if directory is not None:
                directory.remove()
            found.put(result)

    workers = [context.Process(target=make_and_remove) for _ in range(processes)]
    for worker in workers:
        worker.start()
    results = [found.get(timeout=LIMIT_SECONDS) for _ in range(rounds * processes)]
    for worker in workers:
        worker.join(LIMIT_SECONDS)
    assert set(results) == {"whole"}
    assert mounts_under(root) == {}
    assert [path.name for path in root.iterdir()] == [".lock"]


def test_one_process_at_a_time_makes_or_removes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process works on it, nothing is made and nothing removed. After a while that is an error."""
    monkeypatch.setattr(pooldir, "_TURN_SECONDS", 0.1)
    directory = PoolDirectory.create(settings_for(tmp_path))
    os.close(directory.lock_fd)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for act in (lambda: remove_dead(str(tmp_path)), lambda: PoolDirectory.create(settings_for(tmp_path))):
            with pytest.raises(PoolDirectoryError, match="another process has held"):
                act()
        assert Path(directory.path, "settings.json").exists()
    assert remove_dead(str(tmp_path)) == ["/b"]


def test_a_lock_that_is_no_longer_there(root: Path, tmp_path: Path) -> None:
    """A lock on a file that another process has replaced has no effect: the directory stays."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    lock = Path(directory.path, "lock")
    real = fcntl.flock

    def replaced_meanwhile(fd: int, how: int) -> None:
        real(fd, how)
        if Path(f"/proc/self/fd/{fd}").readlink() == lock:
            lock.unlink()
            lock.touch()

    os.close(directory.lock_fd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", replaced_meanwhile)
        assert remove_dead(str(tmp_path)) == []
    assert lock.exists()
    assert remove_dead(str(tmp_path)) == ["/b"]


# ---- what a dead one has left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["/var/lib/somewhere/backing file", None])
def test_the_remains_of_a_dead_daemon(root: Path, tmp_path: Path, backing: str | None) -> None:
    """All of it goes, and the path of the backing file is returned."""
    directory = PoolDirectory.create(settings_for(tmp_path, backing=backing))
    StoreMemory(64 * MIB, 2048, backed=True, folder=directory.memory_folder).pages.populate(0, 4096)
    os.close(directory.lock_fd)
    assert remove_dead(str(tmp_path)) == ([backing] if backing is not None else [])
    assert not Path(directory.path).exists()
    assert mounts_under(root) == {}
    assert remove_dead(str(tmp_path)) == []


def test_a_new_one_takes_the_place_of_a_dead_one(root: Path, tmp_path: Path) -> None:
    """Without any clean-up before, the old memory is gone, and there is one mount."""
    dead = PoolDirectory.create(settings_for(tmp_path))
    Path(dead.path, "pages").write_bytes(b"old")
    os.close(dead.lock_fd)
    new = PoolDirectory.create(settings_for(tmp_path, pool_bytes=2 * MIB))
    assert not Path(new.path, "pages").exists()
    assert list(mounts_under(root)) == [new.path]
    new.remove()


def test_settings_that_cannot_be_read(root: Path, tmp_path: Path) -> None:
    """No backing file is returned, and everything goes."""
    for text in ("", "{}", json.dumps({"backing": "/etc/passwd"})):
        directory = PoolDirectory.create(settings_for(tmp_path))
        Path(directory.path, "settings.json").write_text(text)
        os.close(directory.lock_fd)
        assert remove_dead(str(tmp_path)) == []
        assert not Path(directory.path).exists()


# ---- what is not ours --------------------------------------------------------------------------------------------------


def _writable(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def _of_somebody(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, 65534, 65534)


def _link(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    target = folder.parent / "elsewhere"
    target.mkdir()
    folder.symlink_to(target)


def _file(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


FOREIGN: dict[str, Callable[[Path], None]] = {
    "anybody may write": _writable,
    "of somebody else": _of_somebody,
    "a symbolic link": _link,
    "a file": _file,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_parent_is_refused(root: Path, tmp_path: Path, what: str) -> None:
    """If other users could put files there, nothing is mounted and nothing is made."""
    FOREIGN[what](root)
    with pytest.raises(PoolDirectoryError, match=re.escape(str(root))):
        PoolDirectory.create(settings_for(tmp_path))
    assert mounts_under(tmp_path) == {}
    assert not root.is_dir() or list(root.iterdir()) == []


@pytest.mark.parametrize("what", ["a symbolic link", "a file"])
def test_a_file_in_its_place_is_refused(root: Path, tmp_path: Path, what: str) -> None:
    """The file stays as it is, and so does the target of a link."""
    path = Path(path_of(str(tmp_path), str(root)))
    FOREIGN[what](path)
    with pytest.raises(PoolDirectoryError, match=re.escape(str(path))):
        PoolDirectory.create(settings_for(tmp_path))
    assert mounts_under(tmp_path) == {}
    assert path.is_symlink() == (what == "a symbolic link")


def test_a_link_in_its_place_is_not_followed(root: Path, tmp_path: Path) -> None:
    """Nothing is made or read at the target of a symbolic link."""
    path = Path(path_of(str(tmp_path), str(root)))
    _link(path)
    (root / "elsewhere/settings.json").write_text(settings_for(tmp_path).to_json())
    assert remove_dead(str(tmp_path)) == []
    with pytest.raises(PoolDirectoryError):
        PoolDirectory.create(settings_for(tmp_path))
    assert [file.name for file in (root / "elsewhere").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("what", ["anybody may write", "of somebody else"])
def test_a_directory_of_another_user(root: Path, tmp_path: Path, what: str) -> None:
    """Only root can put it there: it is refused, or replaced by a private one."""
    path = Path(path_of(str(tmp_path), str(root)))
    FOREIGN[what](path)
    try:
        directory = PoolDirectory.create(settings_for(tmp_path))
    except PoolDirectoryError:
        return
    status = os.lstat(path)
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, 0)
    directory.remove()


def test_a_lock_that_is_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    """A link in the place of the lock is an error, and its target is not opened."""
    path = Path(path_of(str(tmp_path), str(root)))
    path.mkdir(parents=True, mode=0o700)
    (path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises((OSError, PoolDirectoryError)):
        PoolDirectory.create(settings_for(tmp_path))
    assert not (tmp_path / "victim").exists()


def test_the_lock_is_not_inherited_by_programs(root: Path, tmp_path: Path) -> None:
    """A program that is started does not get the lock."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    assert fcntl.fcntl(directory.lock_fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    directory.remove()
