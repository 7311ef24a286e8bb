# SPDX-License-Identifier: MIT
"""The targets of measurements: zbudfs, and the stores and swaps with which it is compared, as a file or as active swap.

    floor        a minimal C program (floor.c) that stores the bytes uncompressed
    floor-zstd   the same program, which compresses each page at the level of zbudfs
    nbdkit       the memory plugin of nbdkit with allocator=zstd, behind nbdfuse
    zbudfs       this version of zbudfs; `--also NAME=COMMAND` adds another version
    dense        this version with `--packing dense`
    zbudfs-2     this version with two instances, or with any other number
    NAME-once    a target that is a file, as swap with `discard = once`
    zram         zram of the kernel, with lz4 if the kernel has it
    swapfile     an ordinary swap file, on the same disk as the backing file

All targets but the last two are files. They become swap in the same way as zbudfs: through a loop device with direct I/O,
4096-byte sectors and discard, without write-back throttling.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.kit import build, stats, wait_until, zbudfs_command
from kit.programs import MIB, PAGE, KitError, find_program, run
from zbudfs.core.codec import DEFAULT_LEVEL
from zbudfs.service.mountpoint import MountError, unmount
from zbudfs.swap.attach import attach
from zbudfs.swap.detach import detach
from zbudfs.swap.discard import DEFAULT_DISCARD
from zbudfs.swap.loop import SwapError

PRIORITY: Final = 32767
"""Priority of a target's swap. It is above every other swap, so that all pages of the program go there."""
ONCE: Final = "-once"
WITH_ONCE: Final = (f"zbudfs{ONCE}", f"dense{ONCE}")
STRIPED: Final = "zbudfs-"
RAM: Final = ("zram", "floor", "floor-zstd", "nbdkit", "zbudfs", "dense", "zbudfs-2")
DISK: Final = ("swapfile", "zbudfs", "dense")


@dataclass(frozen=True, slots=True)
class Place:
    """The place and the sizes of a target, the same for all targets of a run."""

    folder: Path
    """Folder on the disk that is measured."""
    size_bytes: int
    pool_bytes: int
    also: dict[str, str] = field(default_factory=dict)
    """Command lines of other versions of zbudfs, by name."""
    level: int = DEFAULT_LEVEL
    options: tuple[str, ...] = ()
    """More options of `zbudfs mount`."""


@dataclass(frozen=True, slots=True)
class Running:
    """A target that is running."""

    written_bytes: Callable[[], int]
    """Function that returns the bytes that the target has written to a disk so far."""


def why_not(name: str) -> str | None:
    """Return why a target is not available on this machine; None if it is."""
    if name == "zram" and not Path("/sys/class/zram-control/hot_add").exists():
        return "this kernel has no zram (modprobe zram)"
    if name == "nbdkit" and (missing := [program for program in ("nbdkit", "nbdfuse") if not find_program(program)]):
        return f"no {', '.join(missing)} (apt-get install nbdkit libnbd-bin)"
    if name.startswith("floor") and not Path("/usr/include/zstd.h").exists():
        return "no zstd.h (apt-get install libzstd-dev)"
    return None


@contextlib.contextmanager
def as_file(name: str, place: Place) -> Iterator[tuple[Path, Running]]:
    """Start a target that is a file, for this context. Yield the mountpoint, which has `swapfile`, and the running target."""
    mountpoint = place.folder / f"mnt-{name}"
    mountpoint.mkdir(exist_ok=True)
    if name in ("zbudfs", "dense") or name in place.also:
        packing = ["--packing", "dense"] if name == "dense" else []
        with _zbudfs(zbudfs_command(place.also.get(name)), packing, place, mountpoint) as running:
            yield mountpoint, running
        return
    swapfile = mountpoint / "swapfile"
    if name == "nbdkit":
        memory = ["nbdkit", "--exit-with-parent", "memory", str(place.size_bytes), "allocator=zstd"]
        command = ["nbdfuse", str(swapfile), "[", *memory, "]"]
    else:
        level = [str(place.level)] if name == "floor-zstd" else []
        command = [str(build("floor", place.folder)), str(mountpoint), str(place.size_bytes), *level]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            wait_until(lambda: server.poll() is not None or swapfile.exists(), f"{name} to start")
            if server.poll() is not None:
                raise KitError(f"{name} ended with status {server.returncode}")
            yield mountpoint, Running(lambda: _written_by([server.pid]))
        finally:
            try:
                with contextlib.suppress(MountError):
                    unmount(str(mountpoint), lazy=True)
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


@contextlib.contextmanager
def _zbudfs(command: list[str], packing: list[str], place: Place, mountpoint: Path) -> Iterator[Running]:
    options = [*packing, "--size", str(place.size_bytes), "--pool", str(place.pool_bytes), "--level", str(place.level)]
    options += place.options
    run([*command, "mount", *options, "--backing", f"{mountpoint}.backing", mountpoint])
    try:
        wait_until(lambda: bool(stats(mountpoint)["standby_ready"]), "the standby")
        pids = [int(stats(mountpoint)[name]) for name in ("keeper_pid", "worker_pid")]
        yield Running(lambda: _written_by(pids))
    finally:
        run([*command, "umount", mountpoint])


@contextlib.contextmanager
def as_swap(name: str, place: Place) -> Iterator[Running]:
    """Make a target the swap that the kernel fills first, in this context."""
    file = name.removesuffix(ONCE)
    if name.startswith(STRIPED) and file == name:
        with _striped(name.removeprefix(STRIPED), place) as running:
            yield running
    elif name == "zram":
        with _zram(place.size_bytes) as running:
            yield running
    elif name == "swapfile":
        with _swap_file(place) as running:
            yield running
    else:
        with as_file(file, place) as (mountpoint, running):
            try:
                attach(str(mountpoint), PRIORITY, DEFAULT_DISCARD if file == name else "once")
            except SwapError as error:
                raise KitError(f"{name}: {error}") from None
            try:
                yield running
            finally:
                detach([(str(mountpoint), mountpoint.stat().st_dev)], force=True)


@contextlib.contextmanager
def _striped(instances: str, place: Place) -> Iterator[Running]:
    """Make several instances active swap in this context. Size and pool are divided among them."""
    mountpoint = place.folder / "striped"
    mountpoint.mkdir(exist_ok=True)
    command = zbudfs_command()
    options = ["--size", str(place.size_bytes), "--pool", str(place.pool_bytes), "--level", str(place.level)]
    options += ["--backing", f"{mountpoint}.backing", "--instances", instances, "--priority", str(PRIORITY)]
    run([*command, "swapon", *options, mountpoint])
    try:
        members = sorted(mountpoint.iterdir())
        for member in members:
            wait_until(lambda member=member: bool(stats(member)["standby_ready"]), "the standby")  # type: ignore[misc]
        pids = [int(stats(member)[name]) for member in members for name in ("keeper_pid", "worker_pid")]
        yield Running(lambda: _written_by(pids))
    finally:
        run([*command, "swapoff", "--force", "--umount", mountpoint])


@contextlib.contextmanager
def _zram(size_bytes: int) -> Iterator[Running]:
    control = Path("/sys/class/zram-control")
    number = (control / "hot_add").read_text().strip()
    device, knobs = f"/dev/zram{number}", Path(f"/sys/block/zram{number}")
    try:
        if "lz4" in (knobs / "comp_algorithm").read_text():
            (knobs / "comp_algorithm").write_text("lz4")
        (knobs / "disksize").write_text(str(size_bytes))
        wait_until(Path(device).exists, device)
        run(["mkswap", device])
        run(["swapon", "--discard", "--priority", str(PRIORITY), device])
        try:
            yield Running(lambda: 0)
        finally:
            run(["swapoff", device])
    finally:
        (knobs / "reset").write_text("1")
        (control / "hot_remove").write_text(number)


@contextlib.contextmanager
def written_swap_file(place: Place) -> Iterator[Path]:
    """Make the file of the target `swapfile` for this context. A file that exists already is used and not removed."""
    file = place.folder / "plain"
    if file.exists():
        yield file
        return
    zeros = bytes(MIB)
    try:
        with file.open("wb") as out:
            file.chmod(0o600)
            for _ in range(place.size_bytes // MIB):
                # The blocks are written, not only allocated: a file with holes or unwritten blocks is refused or slow.
                out.write(zeros)
        run(["sync", "-d", file])
        yield file
    finally:
        file.unlink()


@contextlib.contextmanager
def _swap_file(place: Place) -> Iterator[Running]:
    """Make an ordinary swap file active swap in this context."""
    with written_swap_file(place) as file, _swap_on(file) as running:
        yield running


@contextlib.contextmanager
def _swap_on(file: Path) -> Iterator[Running]:
    """Turn on swap on a file, in this context. If its file system refuses a swap file, use a loop device."""
    run(["mkswap", file])
    device, loop = str(file), None
    try:
        try:
            run(["swapon", "--priority", str(PRIORITY), device])
        except KitError:
            loop = device = run(["losetup", "--find", "--show", "--direct-io=on", file]).strip()
            run(["swapon", "--priority", str(PRIORITY), device])
        before = _swapped_out_bytes()
        try:
            yield Running(lambda: _swapped_out_bytes() - before)
        finally:
            run(["swapoff", device])
    finally:
        if loop is not None:
            run(["losetup", "--detach", loop])


def _swapped_out_bytes() -> int:
    """Return the bytes that the whole system has swapped out since it started. No other program swaps meanwhile."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts["pswpout"]) * PAGE


def _written_by(pids: list[int]) -> int:
    """Return the bytes that processes have written to a disk: the sum of `write_bytes` of /proc/PID/io."""
    total = 0
    for pid in pids:
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        total += int(counts["write_bytes"])
    return total


def disk_written_bytes(folder: Path) -> int | None:
    """Return the bytes that all programs have written to the disk of a folder since the system started; None without a disk."""
    number = folder.stat().st_dev
    try:
        words = Path(f"/sys/dev/block/{number >> 8 & 0xFFF}:{number & 0xFF | number >> 12 & 0xFFF00}/stat").read_text()
    except OSError:
        return None
    return int(words.split()[6]) * 512
