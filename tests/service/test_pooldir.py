# SPDX-License-Identifier: MIT
"""The pool directory: a tmpfs of its own that nobody else sees, one owner at a time, and nothing left of it."""

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
    """A folder in the place of /run/zbudfs; what is mounted in it is taken away afterwards."""
    folder = tmp_path / "run" / "zbudfs"
    monkeypatch.setattr(pooldir, "RUN_FOLDER", str(folder))
    monkeypatch.setattr(pooldir, "path_of", lambda mountpoint: path_of(mountpoint, str(folder)))
    yield folder
    for mount in mounts_under(folder.parent):
        subprocess.run(["umount", "--lazy", mount], check=False, timeout=LIMIT_SECONDS)


def mounts_under(folder: Path) -> dict[str, tuple[str, set[str]]]:
    """Return what is mounted in a folder: type and options, by path."""
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
    """Whether a stranger gets the lock of a pool directory."""
    command = ["flock", "--nonblock", str(path / "lock"), "true"]
    return subprocess.run(command, check=False, timeout=LIMIT_SECONDS).returncode == 0


# ---- where -----------------------------------------------------------------------------------------------------------


def test_every_mountpoint_has_its_own() -> None:
    """The name is the mountpoint's, escaped; one too long is cut and stays its own."""
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
    """It is private, limited to what the store needs and some room, and without swap."""
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
    """A store that has populated everything fits, whatever device and pool."""
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


def test_what_was_mounted_stands_in_it(root: Path, tmp_path: Path) -> None:
    """For whoever has to clean up."""
    settings = settings_for(tmp_path)
    directory = PoolDirectory.create(settings)
    try:
        assert Settings.from_json(Path(directory.path, "settings.json").read_bytes()) == settings
    finally:
        directory.remove()


def test_it_is_removed_with_all_that_is_in_it(root: Path, tmp_path: Path) -> None:
    """Even while files in it are open and mapped."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    memory = StoreMemory(64 * MIB, 2048, backed=True, folder=directory.memory_folder)
    directory.remove()
    assert not Path(directory.path).exists()
    assert mounts_under(root) == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(directory.lock_fd)
    memory.pages.view[:4] = b"fine"


def test_where_nothing_can_be_mounted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an ordinary directory, the memory is to have no name, and it says that it does not survive."""
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
    """It is left alone while a child of the first has it open; a second one has a directory of its own."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    path = Path(directory.path)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        os.close(directory.lock_fd)  # the maker is gone, its child is not
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


def test_it_can_be_handed_over(root: Path, tmp_path: Path) -> None:
    """Whoever gets the descriptor has the directory: the lock goes on."""
    first = PoolDirectory.create(settings_for(tmp_path))
    handed = os.dup(first.lock_fd)
    os.close(first.lock_fd)
    second = PoolDirectory.adopt(first.path, handed)
    assert second.memory_folder == first.path
    assert not in_other_process(Path(first.path))
    second.remove()
    assert not Path(first.path).exists()


def test_several_at_the_same_moment(root: Path, tmp_path: Path) -> None:
    """Processes that make and remove directories of one mountpoint never take each other's away."""
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


def test_a_lock_that_is_no_longer_there(root: Path, tmp_path: Path) -> None:
    """A lock on a file that another process has replaced is worth nothing: the directory is left alone."""
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
def test_what_a_dead_one_has_left(root: Path, tmp_path: Path, backing: str | None) -> None:
    """All of it goes, and the path of the backing file is told."""
    directory = PoolDirectory.create(settings_for(tmp_path, backing=backing))
    StoreMemory(64 * MIB, 2048, backed=True, folder=directory.memory_folder).pages.populate(0, 4096)
    os.close(directory.lock_fd)
    assert remove_dead(str(tmp_path)) == ([backing] if backing is not None else [])
    assert not Path(directory.path).exists()
    assert mounts_under(root) == {}
    assert remove_dead(str(tmp_path)) == []


def test_a_new_one_takes_the_place_of_a_dead_one(root: Path, tmp_path: Path) -> None:
    """Without anybody having cleaned up: its memory is gone, and there is one mount."""
    dead = PoolDirectory.create(settings_for(tmp_path))
    Path(dead.path, "pages").write_bytes(b"old")
    os.close(dead.lock_fd)
    new = PoolDirectory.create(settings_for(tmp_path, pool_bytes=2 * MIB))
    assert not Path(new.path, "pages").exists()
    assert list(mounts_under(root)) == [new.path]
    new.remove()


def test_settings_that_cannot_be_read(root: Path, tmp_path: Path) -> None:
    """No backing file is told; everything goes all the same."""
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
    """Where somebody else could put things, nothing is mounted and nothing is made."""
    FOREIGN[what](root)
    with pytest.raises(PoolDirectoryError, match=re.escape(str(root))):
        PoolDirectory.create(settings_for(tmp_path))
    assert mounts_under(tmp_path) == {}
    assert not root.is_dir() or list(root.iterdir()) == []


@pytest.mark.parametrize("what", ["a symbolic link", "a file"])
def test_what_is_no_directory_is_refused(root: Path, tmp_path: Path, what: str) -> None:
    """It is left as it is, and so is what a link leads to."""
    path = Path(path_of(str(tmp_path), str(root)))
    FOREIGN[what](path)
    with pytest.raises(PoolDirectoryError, match=re.escape(str(path))):
        PoolDirectory.create(settings_for(tmp_path))
    assert mounts_under(tmp_path) == {}
    assert path.is_symlink() == (what == "a symbolic link")


def test_a_link_in_its_place_is_not_followed(root: Path, tmp_path: Path) -> None:
    """Nothing is made or read where a symbolic link leads to."""
    path = Path(path_of(str(tmp_path), str(root)))
    _link(path)
    (root / "elsewhere/settings.json").write_text(settings_for(tmp_path).to_json())
    assert remove_dead(str(tmp_path)) == []
    with pytest.raises(PoolDirectoryError):
        PoolDirectory.create(settings_for(tmp_path))
    assert [file.name for file in (root / "elsewhere").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("what", ["anybody may write", "of somebody else"])
def test_a_directory_of_somebody_else(root: Path, tmp_path: Path, what: str) -> None:
    """Nobody but root can put it there: it is refused, or replaced by one that is private."""
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
    """A link in the place of the lock is an error, and what it leads to is not opened."""
    path = Path(path_of(str(tmp_path), str(root)))
    path.mkdir(parents=True, mode=0o700)
    (path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises((OSError, PoolDirectoryError)):
        PoolDirectory.create(settings_for(tmp_path))
    assert not (tmp_path / "victim").exists()


def test_the_lock_is_not_inherited_by_programs(root: Path, tmp_path: Path) -> None:
    """A program that is started has no part in it."""
    directory = PoolDirectory.create(settings_for(tmp_path))
    assert fcntl.fcntl(directory.lock_fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    directory.remove()
