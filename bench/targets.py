# SPDX-License-Identifier: MIT
"""What zbudfs is compared with, each as a file or as active swap for a while.

    floor        a C program that does as little as can be (floor.c): the bytes as they are
    floor-zstd   the same with each page compressed at zbudfs's level
    nbdkit       nbdkit's memory plugin, allocator=zstd, behind nbdfuse
    zbudfs       this one; `--also NAME=COMMAND` adds another version
    dense        this one with `--packing dense`
    zbudfs-2     this one with two instances; any other number will do as well
    zram         the kernel's own, lz4 where it has that
    swapfile     an ordinary swap file on the disk on which the backing file is, too

All that are files (all but the last two) become swap in the same way as zbudfs does: a loop device with direct I/O, 4096-byte
sectors, discard, no write-back throttling.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.kit import MIB, PAGE, BenchError, build, find_program, run, stats, wait_until, zbudfs_command
from zbudfs.core.codec import DEFAULT_LEVEL
from zbudfs.service.mountpoint import MountError, unmount
from zbudfs.swap.attach import attach
from zbudfs.swap.detach import detach
from zbudfs.swap.loop import SwapError

PRIORITY: Final = 32767
"""Above every other swap: the storm's pages must go here."""
STRIPED: Final = "zbudfs-"
RAM: Final = ("zram", "floor", "floor-zstd", "nbdkit", "zbudfs", "dense", "zbudfs-2")
DISK: Final = ("swapfile", "zbudfs", "dense")


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how large; the same for every target of a run."""

    folder: Path
    """On a disk."""
    size_bytes: int
    pool_bytes: int
    also: dict[str, str] = field(default_factory=dict)
    """Other versions of zbudfs: by name, the command line of each."""
    level: int = DEFAULT_LEVEL


@dataclass(frozen=True, slots=True)
class Running:
    """A target that runs."""

    written_bytes: Callable[[], int]
    """What it has written to a disk so far, as it or the kernel counts it."""


def why_not(name: str) -> str | None:
    """Why a target cannot be had on this machine; None if it can."""
    if name == "zram" and not Path("/sys/class/zram-control/hot_add").exists():
        return "this kernel has no zram (modprobe zram)"
    if name == "nbdkit" and (missing := [program for program in ("nbdkit", "nbdfuse") if not find_program(program)]):
        return f"no {', '.join(missing)} (apt-get install nbdkit libnbd-bin)"
    if name.startswith("floor") and not Path("/usr/include/zstd.h").exists():
        return "no zstd.h (apt-get install libzstd-dev)"
    return None


@contextlib.contextmanager
def as_file(name: str, place: Place) -> Iterator[tuple[Path, Running]]:
    """Have a file target: the mountpoint with `swapfile` in it."""
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
            wait_until(lambda: server.poll() is not None or swapfile.exists(), f"{name} to come up")
            if server.poll() is not None:
                raise BenchError(f"{name} ended with status {server.returncode}")
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
    run([*command, "mount", *options, "--backing", f"{mountpoint}.backing", mountpoint])
    try:
        wait_until(lambda: bool(stats(mountpoint)["standby_ready"]), "the standby")
        pids = [int(stats(mountpoint)[name]) for name in ("keeper_pid", "worker_pid")]
        yield Running(lambda: _written_by(pids))
    finally:
        run([*command, "umount", mountpoint])


@contextlib.contextmanager
def as_swap(name: str, place: Place) -> Iterator[Running]:
    """Have a target as the swap that is used first."""
    if name.startswith(STRIPED):
        with _striped(name.removeprefix(STRIPED), place) as running:
            yield running
    elif name == "zram":
        with _zram(place.size_bytes) as running:
            yield running
    elif name == "swapfile":
        with _swap_file(place) as running:
            yield running
    else:
        with as_file(name, place) as (mountpoint, running):
            try:
                attach(str(mountpoint), PRIORITY)
            except SwapError as error:
                raise BenchError(f"{name}: {error}") from None
            try:
                yield running
            finally:
                detach([(str(mountpoint), mountpoint.stat().st_dev)], force=True)


@contextlib.contextmanager
def _striped(instances: str, place: Place) -> Iterator[Running]:
    """Several instances, which share size and pool."""
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
def _swap_file(place: Place) -> Iterator[Running]:
    """A swap file; where the file system refuses a swap file as it is, through a loop device."""
    file = place.folder / "plain"
    zeros = bytes(MIB)
    with file.open("wb") as out:
        file.chmod(0o600)
        for _ in range(place.size_bytes // MIB):
            out.write(
                zeros
            )  # written, not only allocated: a file with holes, or one still to be written, is refused or slow
    run(["sync", "-d", file])
    run(["mkswap", file])
    device, loop = str(file), None
    try:
        try:
            run(["swapon", "--priority", str(PRIORITY), device])
        except BenchError:
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
        file.unlink()


def _swapped_out_bytes() -> int:
    """By the whole system, since it started: nothing else swaps while this does."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts["pswpout"]) * PAGE


def _written_by(pids: list[int]) -> int:
    """Bytes that processes have sent to a disk: `write_bytes` of /proc/PID/io."""
    total = 0
    for pid in pids:
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        total += int(counts["write_bytes"])
    return total


def disk_written_bytes(folder: Path) -> int | None:
    """Bytes written to the disk that holds a folder, by anybody, since the system started; None if it is not a disk."""
    number = folder.stat().st_dev
    try:
        words = Path(f"/sys/dev/block/{number >> 8 & 0xFFF}:{number & 0xFF | number >> 12 & 0xFFF00}/stat").read_text()
    except OSError:
        return None
    return int(words.split()[6]) * 512
