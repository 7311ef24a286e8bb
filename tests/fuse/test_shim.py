# SPDX-License-Identifier: MIT
"""The libfuse shim is built or names the missing part, is in its place, and does its work."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fuse.calls import MIB, PAGE, PUNCH, all_stats, fallocate, fuse_control, looped, opened, server_of
from tests.support import LIMIT_SECONDS, ROOT, is_mounted, is_running, mounted, stop, wait_until, zbudfs
from zbudfs.fuse.session import MAX_BURST
from zbudfs.service.launch import LaunchError, start
from zbudfs.service.settings import Settings

LIBFUSE: Final = "/usr/lib/x86_64-linux-gnu/libfuse3.so"
F_GETPIPE_SZ: Final = 1032
DEFAULT_PIPE_BYTES: Final = 16 * PAGE


def maps_of(*libraries: str) -> str:
    """Return a made-up /proc/PID/maps with three mappings for each library, like those of the loader."""
    lines = ["55d0c0000000-55d0c0001000 r--p 00000000 fe:00 11 /usr/bin/python3.11", "7ffc0000-7ffd0000 rw-p 0 00:00 0"]
    for number, library in enumerate(libraries):
        for piece, mode in enumerate(("r--p", "r-xp", "rw-p")):
            start_at = 0x7F00_0000_0000 + number * 0x10_0000 + piece * 0x1000
            lines.append(f"{start_at:x}-{start_at + 0x1000:x} {mode} {piece:08x} fe:00 {100 + number}    {library}")
    return "\n".join([*lines, "7ffd1000-7ffd2000 rw-p 00000000 00:00 0          [stack]", ""])


def run_python(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with the packages of `folder` before all others."""
    before = f"import sys; sys.path.insert(0, {str(folder)!r});" if folder is not None else ""
    command = [sys.executable, "-I", "-c", before + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)


def printed(code: str) -> str:
    """Return the output of code, which must succeed."""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a copy of the project as in the repository, without a built shim."""
    folder = tmp_path / "sources"
    shutil.copytree(ROOT / "zbudfs", folder / "zbudfs", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("A copy for a test.\n")
    return folder


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the shim in a copy of the project."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    changed = {**os.environ, "LC_ALL": "C", **environment}
    return subprocess.run(
        command, cwd=sources, env=changed, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, check=False
    )


@contextlib.contextmanager
def folder_of_programs(folder: Path, *names: str) -> Iterator[str]:
    """Return a PATH with just these programs."""
    folder.mkdir()
    for name in names:
        if (found := shutil.which(name)) is None:
            pytest.skip(f"no {name}")
        (folder / name).symlink_to(found)
    yield str(folder)


def refusal(run: subprocess.CompletedProcess[str]) -> str:
    """Return the error of a refused build. Warnings of setuptools may precede it."""
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    said = run.stderr.strip().splitlines()[-1]
    assert said.startswith("zbudfs: cannot build the libfuse shim: ")
    assert "apt-get install gcc pkg-config libfuse3-dev" in said
    return said


# ---- built, or not ---------------------------------------------------------------------------------------------------


def test_a_fresh_copy_builds(sources: Path) -> None:
    """A fresh copy builds without a warning of the compiler, and the result can be loaded."""
    if (
        shutil.which("pkg-config") is None
        or subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode
    ):
        pytest.skip("no headers of libfuse (apt-get install pkg-config libfuse3-dev)")
    run = build(sources)
    assert run.returncode == 0, run.stderr
    assert "shim.c" not in run.stderr
    loaded = run_python("import zbudfs.fuse; print(zbudfs.fuse.shim._shim.__file__)", folder=sources)
    assert loaded.stdout.startswith(f"{sources}/zbudfs/fuse/_shim."), loaded.stderr


def test_built_without_pkg_config(sources: Path, tmp_path: Path) -> None:
    """The error names the missing program, and how to get it."""
    with folder_of_programs(tmp_path / "bin", "gcc") as path:
        assert "no pkg-config" in refusal(build(sources, PATH=path))


def test_built_without_a_compiler(sources: Path, tmp_path: Path) -> None:
    """The error names the compiler, and how to get it."""
    with folder_of_programs(tmp_path / "bin", "pkg-config") as path:
        assert "no missing-cc " in refusal(build(sources, PATH=path, CC="missing-cc"))


@pytest.mark.parametrize("version", [None, "3.2.0"])
def test_built_without_the_right_headers(version: str | None, sources: Path, tmp_path: Path) -> None:
    """The error says that libfuse's headers are missing or too old."""
    folder = tmp_path / "pc"
    folder.mkdir()
    if version is not None:
        (folder / "fuse3.pc").write_text(f"Name: fuse3\nDescription: FUSE\nVersion: {version}\nLibs: -lfuse3\n")
    said = refusal(build(sources, PKG_CONFIG_LIBDIR=str(folder), PKG_CONFIG_PATH=""))
    assert "fuse3" in said.partition("(on Debian")[0]
    assert "Command '[" not in said


def test_a_copy_without_the_shim(sources: Path) -> None:
    """A package that was only copied says how to install it."""
    run = run_python("import zbudfs.fuse", folder=sources)
    assert run.returncode == 1
    said = run.stderr.strip().splitlines()[-1]
    assert said.startswith("zbudfs.fuse.shim.ShimError: the libfuse shim cannot be loaded")
    assert "install the package" in said
    assert "circular" not in said, "the reason that is given is a wrong one"


@pytest.mark.needs("root", "fuse")
def test_mounting_without_the_shim(sources: Path, tmp_path: Path) -> None:
    """The daemon does not start, the error is one line with the reason, and nothing is mounted."""
    code = f"import sys; sys.path.insert(0, {str(sources)!r}); import runpy; "
    code += "runpy.run_module('zbudfs.service.daemon', run_name='__main__')"
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    settings = Settings(mountpoint=str(mountpoint), size_bytes=MIB, pool_bytes=MIB, backing=None)
    with pytest.raises(LaunchError, match="libfuse shim cannot be loaded") as caught:
        start(settings, command=[sys.executable, "-I", "-c", code])
    assert "\n" not in str(caught.value)
    assert not is_mounted(mountpoint)


def test_without_the_hot_path(sources: Path) -> None:
    """Without the other C module no command starts, and one line says what to do."""
    run = run_python("import sys; from zbudfs.cli.entry import main; sys.exit(main())", folder=sources)
    assert run.returncode == 127
    (said,) = run.stderr.splitlines()
    assert said.startswith("zbudfs: cannot start: No module named 'zbudfs.core._hot'; install zbudfs again")


def test_too_late() -> None:
    """The shim cannot take its place after pyfuse3, and says so instead of doing nothing."""
    run = run_python("import pyfuse3, zbudfs.fuse")
    assert run.returncode == 1
    assert "ShimError: pyfuse3 was imported before zbudfs.fuse" in run.stderr


@pytest.mark.parametrize(
    ("libraries", "accepted"),
    [
        ((f"{LIBFUSE}.3.14.0",), True),
        ((f"{LIBFUSE}.3.14.0 (deleted)",), True),
        (("/opt/with space/libfuse3.so.4",), True),
        ((f"{LIBFUSE}.3.14.0", f"{LIBFUSE}.4"), False),
        ((f"{LIBFUSE}.3.14.0", "/opt/venv/pyfuse3.libs/libfuse3.so.3.14.0"), False),
        ((f"{LIBFUSE}.3.14.0", "/usr/lib/libfuse.so.2", "/usr/lib/python3/libfuse3_helper.so"), True),
    ],
)
def test_verify(libraries: tuple[str, ...], accepted: bool) -> None:
    """One libfuse is right, in any number of pieces. Two are refused, and both are named."""
    code = "import sys; from zbudfs.fuse import shim; shim.verify(sys.argv[1])"
    run = run_python(code, maps_of(*libraries))
    assert run.returncode == (0 if accepted else 1), run.stderr
    if not accepted:
        assert "ShimError" in run.stderr
        assert all(library in run.stderr for library in libraries)


# ---- in place --------------------------------------------------------------------------------------------------------


@pytest.mark.needs("root", "fuse")
def test_one_libfuse_and_one_shim(tmp_path: Path) -> None:
    """The daemon has loaded one libfuse and one shim, and pyfuse3 after it, since fallocate works."""
    with mounted(tmp_path / "mnt") as mountpoint:
        maps = Path(f"/proc/{server_of(mountpoint)}/maps").read_text().splitlines()
        paths = {line.split(None, 5)[5] for line in maps if len(line.split(None, 5)) == 6}
        assert len([path for path in paths if "/libfuse3" in path]) == 1
        assert len([path for path in paths if "/zbudfs/fuse/_shim." in path]) == 1
        assert len([path for path in paths if "/pyfuse3" in path and path.endswith(".so")]) == 1
        version = printed("from zbudfs.fuse import shim; print(shim.libfuse_version())")
        assert f"libfuse {version}" in (mountpoint / "stats/log").read_text()
        with opened(mountpoint / "swapfile") as fd:
            fallocate(fd, PUNCH, 0, PAGE)


@pytest.mark.needs("root", "fuse")
def test_requests_are_not_spliced(tmp_path: Path) -> None:
    """libfuse has made no pipe for its requests, which it would have enlarged to the size of the largest request."""
    with mounted(tmp_path / "mnt") as mountpoint:
        with opened(mountpoint / "swapfile") as fd:
            os.pwrite(fd, b"not through a pipe" * MIB, 0)
            os.pread(fd, MIB, 0)
        pid = server_of(mountpoint)
        sizes = []
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if str(entry.readlink()).startswith("pipe:"):
                with opened(entry, os.O_RDONLY | os.O_NONBLOCK) as pipe:
                    sizes.append(fcntl.fcntl(pipe, F_GETPIPE_SZ))
    assert [size for size in sizes if size > DEFAULT_PIPE_BYTES] == []


@pytest.mark.needs("root", "fuse")
def test_the_bound_on_requests_in_flight(tmp_path: Path) -> None:
    """The kernel knows the limit of requests in flight, for which memory is reserved."""
    bound = printed("from zbudfs.fuse import session; print(session.MAX_BACKGROUND)")
    with mounted(tmp_path / "mnt") as mountpoint, fuse_control(tmp_path / "ctl", mountpoint) as connection:
        assert (connection / "max_background").read_text().strip() == bound
        assert (connection / "congestion_threshold").read_text().strip() == bound


@pytest.mark.needs("root", "fuse")
def test_bursts(tmp_path: Path) -> None:
    """Requests that wait together are received together: there are far fewer wake-ups, and each answer is right."""
    rounds, readers = 20, 8
    found: list[bytes] = []

    def read_page(fd: int, number: int) -> None:
        found.append(os.pread(fd, PAGE, number * PAGE))

    with (
        mounted(tmp_path / "mnt") as mountpoint,
        fuse_control(tmp_path / "ctl", mountpoint) as connection,
        opened(mountpoint / "swapfile") as fd,
    ):
        os.pwrite(fd, b"".join(bytes([number]) * PAGE for number in range(readers)), 0)
        before = all_stats(mountpoint)
        pid, keeper = before["worker_pid"], before["keeper_pid"]
        for _ in range(rounds):
            stop(keeper)  # it would kill a worker that stands still
            stop(pid)
            threads = [threading.Thread(target=read_page, args=(fd, number)) for number in range(readers)]
            try:
                for thread in threads:
                    thread.start()
                waiting = connection / "waiting"
                wait_until(lambda file=waiting: int(file.read_text()) >= readers, "the readers")  # type: ignore[misc]
            finally:
                os.kill(pid, signal.SIGCONT)
                for thread in threads:
                    thread.join(LIMIT_SECONDS)
                os.kill(keeper, signal.SIGCONT)
        after = all_stats(mountpoint)
    assert sorted(found) == sorted(bytes([number]) * PAGE for number in range(readers) for _ in range(rounds))
    served, wakeups = (after[name] - before[name] for name in ("served_requests", "wakeups"))
    assert served == rounds * readers
    # Some wake-ups are for other requests (names, opens, closes), and one or two a round for the first request.
    assert wakeups < served / 2
    assert sum(after["read_latency_us"]) - sum(before["read_latency_us"]) == served
    assert after["requests_in_work_max"] >= 1 > after["requests_in_work"]


@pytest.mark.needs("root", "fuse")
def test_a_burst_goes_on_while_the_event_loop_is_idle(tmp_path: Path) -> None:
    """A reader that reads again at once has more requests in a burst than its bound, since no task has work.

    Another program may keep the CPU for a millisecond, which ends a burst. So one of several tries is enough.
    """
    longest = 0.0
    with mounted(tmp_path / "mnt") as mountpoint, opened(mountpoint / "swapfile") as fd:
        os.pwrite(fd, b"r" * PAGE, 0)
        for _ in range(20):
            before = all_stats(mountpoint)
            for _ in range(2000):
                os.pread(fd, PAGE, 0)
            after = all_stats(mountpoint)
            served, wakeups = (after[name] - before[name] for name in ("served_requests", "wakeups"))
            assert served == 2000
            longest = max(longest, served / wakeups)
            if longest > 1.5 * MAX_BURST:
                break
    assert longest > 1.5 * MAX_BURST


@pytest.mark.needs("root", "fuse", "loop")
def test_reads_first(tmp_path: Path) -> None:
    """A read that comes after large writes is answered before them. All are answered, and each page is right."""
    length, writers = MIB // 2, 6
    contents = [random.Random(number).randbytes(length) for number in range(writers)]
    answered: list[str] = []

    def write(fd: int, number: int) -> None:
        aligned = mmap.mmap(-1, length)
        aligned.write(contents[number])
        assert os.pwritev(fd, [aligned], (number + 1) * length) == length
        answered.append("write")

    def read(fd: int) -> None:
        assert os.pread(fd, PAGE, 0) == b"r" * PAGE
        answered.append("read")

    with (
        mounted(tmp_path / "mnt", writers=2) as mountpoint,
        fuse_control(tmp_path / "ctl", mountpoint) as connection,
        looped(mountpoint / "swapfile") as device,  # only the loop driver sends two writes of one file at once
        opened(device, os.O_RDWR | os.O_DIRECT) as disk,
        opened(mountpoint / "swapfile") as fd,
    ):
        os.pwrite(fd, b"r" * PAGE, 0)
        found = all_stats(mountpoint)
        pid, keeper, waiting = found["worker_pid"], found["keeper_pid"], connection / "waiting"
        stop(keeper)  # it would kill a worker that stands still
        stop(pid)
        threads = [threading.Thread(target=write, args=(disk, number)) for number in range(writers)]
        threads.append(threading.Thread(target=read, args=(fd,)))
        try:
            for count, thread in enumerate(threads, 1):
                thread.start()
                wait_until(lambda count=count: int(waiting.read_text()) >= count, "the request")  # type: ignore[misc]
        finally:
            os.kill(pid, signal.SIGCONT)
            for thread in threads:
                thread.join(LIMIT_SECONDS)
            os.kill(keeper, signal.SIGCONT)
        assert sorted(answered) == ["read"] + ["write"] * writers
        assert answered[-1] == "write"  # the read came last
        for number, content in enumerate(contents):
            assert os.pread(fd, length, (number + 1) * length) == content
        assert all_stats(mountpoint)["requests_in_work"] == 0


SLOW_DAEMON: Final = """
import sys, time
from zbudfs.core.codec import Codec
from zbudfs.service import daemon
right = Codec.__init__
def slow(codec, level=-1):
    right(codec, level)
    compress = codec.compress
    codec.compress = lambda page: (bytes(page[:4]) == b"slow" and time.sleep(0.005), compress(page))[1]
Codec.__init__ = slow
sys.exit(daemon.main(sys.argv[1:]))
"""
"""A daemon that compresses pages of `slow_pages` slowly."""


def slow_pages(count: int) -> bytes:
    """Return pages that SLOW_DAEMON compresses slowly."""
    return b"".join(b"slow" + page_with_noise(number)[4:] for number in range(count))


def page_with_noise(seed: int) -> bytes:
    """Return a page whose zpage takes less than half of a frame."""
    return random.Random(seed).randbytes(1500) + bytes(PAGE - 1500)


@pytest.mark.needs("root", "fuse")
@pytest.mark.race(17)
def test_reads_within_a_write(tmp_path: Path) -> None:
    """17. Reads that come while a large write is compressed are answered before it. Other requests wait.

    The test makes compression slow, so that there is time for them.
    """
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    settings = Settings(mountpoint=str(mountpoint), size_bytes=4 * MIB, pool_bytes=4 * MIB, backing=None)
    pid = start(settings, command=[sys.executable, "-I", "-c", SLOW_DAEMON]).pid
    content = slow_pages(256)  # more than a second
    answered: list[str] = []

    def write(fd: int) -> None:
        aligned = mmap.mmap(-1, MIB)
        aligned.write(content)
        assert os.pwritev(fd, [aligned], 2 * MIB) == MIB
        answered.append("write")

    def list_stats() -> None:
        assert any(file.name == "log" for file in (mountpoint / "stats").iterdir())
        assert (mountpoint / "stats/log").read_bytes() is not None
        answered.append("stats")

    try:
        with opened(mountpoint / "swapfile") as fd:
            os.pwrite(fd, b"r" * PAGE, 0)
            writer = threading.Thread(target=write, args=(fd,))
            others = [threading.Thread(target=list_stats) for _ in range(3)]
            writer.start()
            time.sleep(0.1)  # it has come
            for _ in range(5):
                assert os.pread(fd, 2 * PAGE, 0) == b"r" * PAGE + bytes(PAGE)
            assert not answered
            for thread in others:
                thread.start()
            for thread in (writer, *others):
                thread.join(LIMIT_SECONDS)
            assert sorted(answered) == ["stats"] * 3 + ["write"]
            assert os.pread(fd, MIB, 2 * MIB) == content
            assert all_stats(mountpoint)["requests_in_work"] == 0
    finally:
        zbudfs("umount", mountpoint)
        wait_until(lambda: not is_running(pid), "the daemon's end")


@pytest.mark.needs("root", "fuse")
@pytest.mark.race(17)
def test_page_ins_within_a_write(tmp_path: Path) -> None:
    """17. A page-in from the disk begins and ends while a large write is compressed."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    settings = Settings(
        mountpoint=str(mountpoint), size_bytes=112 * MIB, pool_bytes=4 * MIB, backing=str(tmp_path / "backing")
    )
    pid = start(settings, command=[sys.executable, "-I", "-c", SLOW_DAEMON]).pid
    content = slow_pages(64)  # one request of 0.3 s and more
    cold = [page_with_noise(number) for number in range(3072)]
    answered: list[str] = []

    def write(fd: int) -> None:
        aligned = mmap.mmap(-1, len(content))
        aligned.write(content)
        assert os.pwritev(fd, [aligned], 12 * MIB) == len(content)
        answered.append("write")

    try:
        with opened(mountpoint / "swapfile") as fd:
            os.pwrite(fd, b"".join(cold), 0)
            wait_until(lambda: all_stats(mountpoint)["page_in_path"] == "aio", "the queue")
            before = all_stats(mountpoint)["cumul_pagein_blocks"]
            writer = threading.Thread(target=write, args=(fd,))
            writer.start()
            time.sleep(0.05)  # it has come
            for number in range(0, 16, 4):
                assert os.pread(fd, PAGE, number * PAGE) == cold[number]
            assert not answered
            writer.join(LIMIT_SECONDS)
            assert answered and all_stats(mountpoint)["cumul_pagein_blocks"] >= before + 4
            assert os.pread(fd, len(content), 12 * MIB) == content
    finally:
        zbudfs("umount", mountpoint)
        wait_until(lambda: not is_running(pid), "the daemon's end")


@pytest.mark.needs("root", "fuse")
def test_a_bug_in_a_handler_is_an_error_of_one_request(tmp_path: Path) -> None:
    """A handler that raises gives EIO, and a line in the log the first time. The next request is answered as usual."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    code = (
        "import sys; from zbudfs.service import daemon; from zbudfs.store.requests import Requests; "
        "right = Requests.read_nowait; "
        "Requests.read_nowait = lambda store, at, length: 1 // 0 if at == 4096 * 7 else right(store, at, length); "
        "sys.exit(daemon.main(sys.argv[1:]))"
    )
    settings = Settings(mountpoint=str(mountpoint), size_bytes=MIB, pool_bytes=MIB, backing=None)
    pid = start(settings, command=[sys.executable, "-I", "-c", code]).pid
    try:
        with opened(mountpoint / "swapfile") as fd:
            os.pwrite(fd, b"x" * 16 * PAGE, 0)
            for _ in range(2):
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    os.pread(fd, PAGE, 7 * PAGE)
                assert os.pread(fd, PAGE, 6 * PAGE) == b"x" * PAGE
        log = (mountpoint / "stats/log").read_text()
        assert log.count("a request failed because of a bug in zbudfs") == 1  # two requests
        assert "ZeroDivisionError" in log
    finally:
        zbudfs("umount", mountpoint)
        wait_until(lambda: not is_running(pid), "the daemon's end")


@pytest.mark.needs("root", "fuse")
def test_the_server_sleeps_without_requests(tmp_path: Path) -> None:
    """Requests in close succession find the server awake. It sleeps soon after the last one."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with (
        mounted(mountpoint, "--size", "4M", "--pool", "4M", "--backing", "none"),
        opened(mountpoint / "swapfile") as fd,
    ):
        stat = Path(f"/proc/{server_of(mountpoint)}/stat")

        def ticks() -> int:
            return sum(map(int, stat.read_text().rpartition(") ")[2].split()[11:13]))

        content = random.Random(2).randbytes(64 * PAGE)
        os.pwrite(fd, content, 0)
        for number in range(2000):
            at = number % 64 * PAGE
            assert os.pread(fd, PAGE, at) == content[at : at + PAGE]
        before = ticks()
        time.sleep(1.5)
        assert ticks() - before < os.sysconf("SC_CLK_TCK") // 4, "it was awake for 17 % of that time, or more"
