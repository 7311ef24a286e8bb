# SPDX-License-Identifier: MIT
"""`zbudfs restart` gives another keeper, perhaps of another version, and the same bytes. Otherwise it changes nothing.

The other version is a copy of the package with one changed line, and a virtual environment whose interpreter finds it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any, Final

import pytest

import zbudfs as package
from kit.cell import Cell
from tests.service.test_keeper import MIB, PAGE, Served, compare, fill, mount, opened
from tests.support import LIMIT_SECONDS, ROOT, is_mounted, is_running, run_zbudfs, status_of, wait_until, zbudfs
from zbudfs.cli.target import not_mounted
from zbudfs.core.statistics import COUNTERS, CounterFields
from zbudfs.service import launch
from zbudfs.service.settings import Settings
from zbudfs.store.status_area import LAYOUT
from zbudfs.swap.loop import swaps

pytestmark = pytest.mark.needs("root", "fuse")

__all__ = ["mount"]  # the fixture

Mount = Callable[..., Served]


def version_at(folder: Path, file: str = "", old: str = "", new: str = "") -> str:
    """Return an interpreter that finds a copy of the package. In one file of the copy, `new` replaces `old`."""
    copytree(Path(package.__file__).parent, folder / "copy/zbudfs", ignore=ignore_patterns("__pycache__"))
    if file:
        path = folder / "copy/zbudfs" / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    needed = [importlib.util.find_spec(name) for name in ("trio", "pyfuse3", "zstandard")]
    origins = [Path(spec.origin) for spec in needed if spec is not None and spec.origin is not None]
    folders = [origin.parents[origin.name.startswith("__init__.")] for origin in origins]
    return interpreter_with(folder, [folder / "copy", *dict.fromkeys(folders)])


def interpreter_with(folder: Path, paths: list[str | Path]) -> str:
    """Return an interpreter that looks for packages in some folders."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "paths.pth").write_text("".join(f"{path}\n" for path in paths))
    return str(folder / "venv/bin/python")


def restart_with(interpreter: str, mountpoint: Path) -> subprocess.CompletedProcess[str]:
    """Run `zbudfs restart` of another version."""
    command = [interpreter, "-I", "-m", "zbudfs", "restart", str(mountpoint)]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, check=False)


def counts(served: Served) -> dict[str, int]:
    """Return the numbers of events since the mount."""
    return {name: value for name, value in served.stats().items() if name in COUNTERS or name.startswith("cumul_")}


def order(served: Served, data: bytes) -> dict[str, Any]:
    """Send an order to the keeper's socket, and return its answer."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(LIMIT_SECONDS)
        channel.connect(str(served.pool / "control"))
        channel.sendall(data)
        answer = b""
        while piece := channel.recv(4096):
            answer += piece
    found: dict[str, Any] = json.loads(answer)
    return found


def restart_order(interpreter: str) -> bytes:
    """Return the order to hand over to an interpreter."""
    return json.dumps({"order": "restart", "interpreter": interpreter}).encode()


def processes(served: Served) -> list[int]:
    """Return keeper, worker and standby."""
    return [served.keeper, served.worker, served.standby]


# ---- another keeper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["zbud", "dense:6"])
def test_the_same_bytes(mount: Mount, tmp_path: Path, packing: str) -> None:
    """New processes have all stored pages, in RAM and on disk. Open files continue to work."""
    served = mount("--pool", "2M", "--level", "1", "--packing", packing, "--backing", tmp_path / "backing")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 2048)
        before, old = served.stats(), processes(served)
        assert before["written_back_pages"] > 0
        born = served.swapfile.stat().st_mtime_ns
        said = zbudfs("restart", served.mountpoint)
        new_keeper = served.keeper
        assert said == f"zbudfs {package.__version__} serves {served.mountpoint} now, pid {new_keeper}\n"
        for pid in old:
            wait_until(lambda pid=pid: not is_running(pid), "the end of the old ones")  # type: ignore[misc]
        compare(fd, 0, 2048)
        fill(fd, 1000, 500, generation=2)
        compare(fd, 1000, 500, generation=2)
        served.wait_ready()
        after = served.stats()
        assert not {*old} & {*processes(served)}
        assert (after["keeper_pid"], after["pid"]) == (new_keeper, new_keeper)
        assert (after["recoveries"], after["lost_pages"], after["lost_in_recovery"]) == (0, 0, 0)
        assert after["packing"] == packing
        for name in ("stored_pages", "size_bytes", "pool_configured_bytes", "level", "backing_path", "open_swapfiles"):
            assert after[name] == before[name], name
        assert served.swapfile.stat().st_mtime_ns == born
        served.kill(served.worker)
        compare(fd, 1000, 500, generation=2)
    zbudfs("umount", served.mountpoint)
    assert not is_running(new_keeper)
    assert not served.pool.exists()
    assert (tmp_path / "backing").stat().st_size == 0


def test_twice_in_a_row(mount: Mount) -> None:
    """A restart right after another one, before there is a standby, and a kill in between do no harm."""
    served = mount()
    keepers = {served.keeper}
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
        for kill in (False, True, False):
            zbudfs("restart", served.mountpoint)
            keepers.add(served.keeper)
            if kill:
                served.kill(served.worker)
            compare(fd, 0, 512)
        assert len(keepers) == 4
        served.wait_ready()
        assert [pid for pid in keepers if is_running(pid)] == [served.keeper]
        assert served.stats()["lost_pages"] == 0


def test_another_version(mount: Mount, tmp_path: Path) -> None:
    """The version that runs the command serves afterwards, and a restart with the old version works as well."""
    newer = version_at(tmp_path, "__init__.py", package.__version__, "99.1")
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 512)
        run = restart_with(newer, served.mountpoint)
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.startswith("zbudfs 99.1 serves ")
        assert served.stats()["version"] == "99.1"
        assert str(tmp_path / "copy/zbudfs").encode() in Path(f"/proc/{served.keeper}/maps").read_bytes()
        compare(fd, 0, 512)
        zbudfs("restart", served.mountpoint)
        assert served.stats()["version"] == package.__version__
        compare(fd, 0, 512)


def test_a_version_with_one_counter_more(mount: Mount, tmp_path: Path) -> None:
    """A new counter at the end needs no new layout: the newer version and the older one continue all counts."""
    declared = inspect.getsource(CounterFields)
    newer = version_at(
        tmp_path, "core/statistics.py", declared, f'{declared}    cumul_new: Annotated[int, Stat("events", "new")]\n'
    )
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        compare(fd, 0, 64)
        before = counts(served)
        assert min(before["cumul_written_pages"], before["cumul_read_pages"]) >= 64
        run = restart_with(newer, served.mountpoint)
        assert (run.returncode, run.stderr) == (0, "")
        assert counts(served) == {**before, "cumul_new": 0}
        zbudfs("restart", served.mountpoint)
        assert counts(served) == before
        compare(fd, 0, 64)


@pytest.mark.needs("loop", "swap", "cell")
def test_swap_stays_on(mount: Mount, tmp_path: Path) -> None:
    """A program on the swap does not notice a restart while it is filled, nor when all of it is swapped out."""
    served = mount("--priority", "32767", "--backing", tmp_path / "backing", "--pool", "4M", command="swapon")
    keepers = {served.keeper}
    with Cell("restart", 18 * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), "30"])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                wait_until(lambda: served.stats()["stored_pages"] > 1000, "something being swapped out")
                zbudfs("restart", served.mountpoint)
                keepers.add(served.keeper)
                assert program.stdout is not None
                assert program.stdout.readline() == "filled\n"
                zbudfs("restart", served.mountpoint)
                keepers.add(served.keeper)
                said, _ = program.communicate("\n", timeout=2 * LIMIT_SECONDS)
            finally:
                program.kill()
    assert json.loads(said) == {"pages": 30 * 256, "bad": 0}
    assert len(keepers) == 3
    found = status_of(served.mountpoint)
    assert found["lost_pages"] == 0
    (user,) = found["users"]
    assert user.removeprefix("swap on ") in [swap.path for swap in swaps()]
    zbudfs("swapoff", "--umount", served.mountpoint)
    assert not served.pool.exists()


# ---- refused -------------------------------------------------------------------------------------------------------------


def goes_on(served: Served, fd: int, old: list[int]) -> None:
    """The processes and the bytes are the same, and the mount survives a death."""
    assert processes(served) == old
    assert all(map(is_running, old))
    found = served.stats()
    assert (found["keeper_pid"], found["worker_pid"], found["standby_pid"]) == tuple(old)
    assert (found["standby_ready"], found["recoveries"], found["pid"]) == (True, 0, old[0])
    compare(fd, 0, 64)
    served.kill(served.worker)
    compare(fd, 0, 64)
    assert served.worker == old[2]


def test_a_layout_that_is_not_known(mount: Mount, tmp_path: Path) -> None:
    """A version that cannot read the memory does not get it, and says why and what to do."""
    other = version_at(
        tmp_path, "store/status_area.py", f"LAYOUT: Final = 0x{LAYOUT >> 16:X}_", "LAYOUT: Final = 0x1234_"
    )
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        old = processes(served)
        run = restart_with(other, served.mountpoint)
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.startswith(f"zbudfs: {served.mountpoint} was not restarted, and runs on as before: ")
        assert "another layout" in run.stderr
        assert f"{LAYOUT:#x}" in run.stderr
        assert run.stderr.count("\n") == 1
        goes_on(served, fd, old)


def test_settings_that_are_not_known(mount: Mount, tmp_path: Path) -> None:
    """A version that does not know a setting of the mount does not get it either."""
    other = version_at(
        tmp_path, "service/settings.py", "    level: int = DEFAULT_LEVEL", "    grade: int = DEFAULT_LEVEL"
    )
    path = tmp_path / "copy/zbudfs/service/settings.py"
    path.write_text(path.read_text().replace("self.level", "self.grade").replace('"level"', '"grade"'))
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        old = processes(served)
        run = restart_with(other, served.mountpoint)
        assert run.returncode == 1
        assert "was not restarted, and runs on as before: unknown settings: level" in run.stderr
        goes_on(served, fd, old)


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        (
            *("service/resources.py", "Packing.parse(settings.packing)", 'Packing.parse("zbud")'),
            "packs its frames as dense:7 and cannot be handed over to zbud: swapoff and unmount it, then mount it again",
        ),
        (
            *("core/dense.py", "_LAYOUT: Final = 0xD1", "_LAYOUT: Final = 0xD2"),
            "packs its frames as a packing that this version does not know and cannot be handed over to dense:7",
        ),
    ],
    ids=["another packing", "another layout of frames"],
)
def test_across_packings(mount: Mount, tmp_path: Path, file: str, old: str, new: str, why: str) -> None:
    """A version that does not know the packing refuses with the reason, and the running version continues."""
    other = version_at(tmp_path, file, old, new)
    served = mount("--packing", "dense")
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        before = processes(served)
        run = restart_with(other, served.mountpoint)
        assert run.returncode == 1
        assert f"was not restarted, and runs on as before: the running zbudfs {why}" in run.stderr
        goes_on(served, fd, before)


def test_a_version_whose_worker_fails(mount: Mount, tmp_path: Path) -> None:
    """A worker that cannot get ready is found before anything is handed over."""
    other = version_at(
        tmp_path,
        "service/worker.py",
        "await _warm_up(settings.level, resources.memory.packing)",
        "raise OSError('not in the mood')",
    )
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        old = processes(served)
        run = restart_with(other, served.mountpoint)
        assert (run.returncode, run.stderr) == (
            1,
            f"zbudfs: {served.mountpoint} was not restarted, and runs on as before: not in the mood\n",
        )
        goes_on(served, fd, old)


def test_an_interpreter_that_does_not_come_up(mount: Mount, tmp_path: Path) -> None:
    """An interpreter that is missing, dies at once, is no program or does not know zbudfs is refused."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        old = processes(served)
        for interpreter in ("/nonexistent/python", "/etc/passwd", "relative"):
            answer = order(served, restart_order(interpreter))
            assert list(answer) == ["error"]
            assert answer["error"].startswith(f"{interpreter} cannot be started: ")
        for interpreter in ("/bin/false", "/bin/true", interpreter_with(tmp_path, [])):
            answer = order(served, restart_order(interpreter))
            assert list(answer) == ["error"]
            assert "the new version" in answer["error"]
        goes_on(served, fd, old)


def test_an_order_that_makes_no_sense(mount: Mount) -> None:
    """A wrong order gets an error, and a silent client is not waited for."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        old = processes(served)
        for data in (
            b"{",
            b"[1]",
            b"1",
            b'{"order": "stop", "interpreter": "/bin/sh"}',
            b'{"order": 1}',
            b"\xff" * 5000,
            b"[" * 60_000,
            b'{"order": "restart", "interpreter": "/bin/\\u0000sh"}',
        ):
            assert list(order(served, data)) == ["error"]
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(served.pool / "control"))
        goes_on(served, fd, old)


NO_TMPFS: Final = """
import sys
from zbudfs.service import daemon, pooldir
pooldir._mount_tmpfs = lambda path, settings: False
sys.exit(daemon.main(sys.argv[1:]))
"""
"""The daemon on a system whose pool directory cannot be a tmpfs."""


def test_memory_without_a_name(tmp_path: Path) -> None:
    """Such memory cannot be handed over. A warning says so, restart refuses with the remedy, and a death is survived."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    served = Served(mountpoint)
    settings = Settings(mountpoint=str(mountpoint), size_bytes=64 * MIB, pool_bytes=8 * MIB, backing=None)
    launch.start(settings, command=(sys.executable, "-I", "-c", NO_TMPFS))
    try:
        wait_until(lambda: served.stats()["standby_ready"], "a standby")
        found = served.stats()
        old = [found["keeper_pid"], found["worker_pid"], found["standby_pid"]]
        assert [text for text in found["warnings"] if "cannot hand it to a newer version" in text]
        with opened(served.swapfile) as fd:
            fill(fd, 0, 64)
            run = run_zbudfs("restart", mountpoint)
            assert run.returncode == 1
            assert "was not restarted, and runs on as before: the pool is in memory without a name" in run.stderr
            os.kill(old[1], signal.SIGKILL)
            compare(fd, 0, 64)
            assert served.stats()["worker_pid"] == old[2]
    finally:
        zbudfs("umount", mountpoint)
    assert not served.pool.exists()


def test_a_mount_without_a_keeper(mount: Mount) -> None:
    """Without a keeper the worker continues, and without any process the mount stays as it is. One line says so."""
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        standby = served.standby
        served.kill(served.keeper)
        for dead in (False, True):
            run = run_zbudfs("restart", served.mountpoint)
            assert (run.returncode, run.stderr.count("\n")) == (1, 1)
            assert run.stderr.startswith(f"zbudfs: the keeper of {served.mountpoint} cannot be reached")
            if not dead:
                compare(fd, 0, 64)
                served.kill(standby, served.worker)
    assert is_mounted(served.mountpoint)


def test_paths_without_a_zbudfs(tmp_path: Path) -> None:
    """A directory, a file and a missing path are refused."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file", tmp_path / "nothing", Path("/")):
        run = run_zbudfs("restart", path)
        assert (run.returncode, run.stderr) == (1, f"zbudfs: {not_mounted(str(path))}\n")


# ---- between the old and the new -------------------------------------------------------------------------------------


def test_the_new_worker_dies_at_the_handover(mount: Mount, tmp_path: Path) -> None:
    """When the old processes are gone, the new keeper forks another worker, as after any death."""
    other = version_at(
        tmp_path,
        "service/worker.py",
        "        fields[Field.SERVING] = 1\n",
        "        os.kill(os.getpid(), 0 if self._emergency else signal.SIGKILL)\n        fields[Field.SERVING] = 1\n",
    )
    served = mount()
    with opened(served.swapfile) as fd:
        fill(fd, 0, 64)
        keeper = served.keeper
        run = restart_with(other, served.mountpoint)
        assert (run.returncode, run.stderr) == (0, "")
        compare(fd, 0, 64)
        assert served.keeper not in (0, keeper)
        assert served.stats()["recoveries"] == 1
    assert not is_running(keeper)


SLOW_TO_DIE: Final = "#!/bin/sh\nsleep 1.0\nexit 1\n"


def test_a_standby_that_becomes_ready_meanwhile(mount: Mount, tmp_path: Path) -> None:
    """A refused restart keeps the message of the standby."""
    slow = tmp_path / "slow"
    slow.write_text(SLOW_TO_DIE)
    slow.chmod(0o755)
    served = mount()
    old = served.standby
    os.kill(old, signal.SIGKILL)
    while (new := served.standby) in (0, old):
        assert is_running(served.keeper)
    os.kill(new, signal.SIGSTOP)
    try:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(LIMIT_SECONDS)
            channel.connect(str(served.pool / "control"))
            channel.sendall(restart_order(str(slow)))
            time.sleep(0.5)
            os.kill(new, signal.SIGCONT)
            assert b"error" in channel.recv(4096)
    finally:
        os.kill(new, signal.SIGCONT)
    served.wait_taken_over(0)
    assert is_running(new)
    wait_until(lambda: bool(served.stats()["standby_ready"]), "the standby to be said to be ready")
    assert served.standby == new


def test_a_standby_that_is_forked_meanwhile(mount: Mount, tmp_path: Path) -> None:
    """A failed restart is answered at once: the standby has no copy of the connection."""
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 3.0\nexit 1\n")
    slow.chmod(0o755)
    served = mount()
    old = served.standby
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(LIMIT_SECONDS)
        channel.connect(str(served.pool / "control"))
        channel.sendall(restart_order(str(slow)))
        served.kill(old)
        wait_until(lambda: served.standby not in (0, old), "the next standby")
        standby = served.standby
        assert b"error" in channel.recv(4096)
        assert channel.recv(4096) == b"", "the connection is still open"
    assert is_running(standby)


def test_a_worker_that_dies_while_a_restart_fails(mount: Mount, tmp_path: Path) -> None:
    """The worker is replaced as soon as it is clear that the new version does not start."""
    slow = tmp_path / "slow"
    slow.write_text(SLOW_TO_DIE)
    slow.chmod(0o755)
    served = mount()
    with opened(served.swapfile) as fd, socket.socket(socket.AF_UNIX) as channel:
        fill(fd, 0, 64)
        channel.connect(str(served.pool / "control"))
        channel.sendall(restart_order(str(slow)))
        time.sleep(0.3)
        served.kill(served.worker)
        compare(fd, 0, 64)
        channel.settimeout(LIMIT_SECONDS)
        assert b"error" in channel.recv(4096)
        assert os.pread(fd, PAGE, 63 * PAGE) != bytes(PAGE)
        assert served.stats()["recoveries"] == 1
