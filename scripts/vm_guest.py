# SPDX-License-Identifier: MIT
"""Runs inside the virtual machine, as a service of its own, and shows one scenario: `vm_guest.py SCENARIO`.

What it finds goes to the console as lines of JSON behind "@ ": {"check": ..., "ok": ..., "seen": ...}, and at last {"end":
true}. Everything else on the console is for people. Only the standard library: it runs with the system's own Python.

The process locks its memory, so that it can look on while everybody else waits for swap; under pressure it reads files
itself rather than starting programs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

PAYLOAD: Final = Path("/vm")
STATE: Final = Path("/var/lib/vm-state")
MOUNTPOINT: Final = Path("/run/zbudfs.swap")
UNIT: Final = "zbudfs@swap.service"
SWAP_UNIT: Final = "zbudfs-swap@swap.service"
PAGE: Final = 4096
MIB: Final = 1 << 20
LIMIT_SECONDS: Final = 300.0
"""Longest wait for anything. Generous: the machine is emulated."""

PF_MEMALLOC_NOIO: Final = 0x00080000
"""In the flags of /proc/PID/stat: what PR_SET_IO_FLUSHER sets."""

COMPLAINTS: Final = re.compile(
    r"blocked for more than|hung_task|Out of memory|oom-kill|Read-error|Write-error|I/O error|BUG:|stack trace|soft lockup"
)


TOO_NEW: Final = re.compile("Unknown key '(RestartSteps|RestartMaxDelaySec|RestartMode|SurviveFinalKillSignal)'")
"""What systemd 252 passes over, and says so."""


class Failed(Exception):
    """A scenario cannot go on."""


def report(**what: object) -> None:
    """Tell the host."""
    print("@ " + json.dumps(what), flush=True)


def check(what: str, ok: bool, seen: object = "") -> bool:
    """Tell the host whether something holds, and what was seen."""
    report(check=what, ok=bool(ok), seen=str(seen))
    return bool(ok)


def run(
    *command: str, limit: float = LIMIT_SECONDS, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program; what it printed goes to the console as well."""
    print(f"$ {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
            env={**os.environ, **(env or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{command[0]} did not end within {limit:g} s") from error
    print(done.stdout, end="", flush=True)
    return done


def must(*command: str, limit: float = LIMIT_SECONDS) -> str:
    """Run a program that has to succeed: what it printed."""
    done = run(*command, limit=limit)
    if done.returncode:
        raise Failed(f"{' '.join(command)} failed ({done.returncode}): {done.stdout.strip().splitlines()[-1:]}")
    return done.stdout


def wait_for(condition: Callable[[], object], what: str, limit: float = LIMIT_SECONDS) -> float:
    """Wait; how long it took. Failed."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            if condition():
                return time.monotonic() - began
        if time.monotonic() - began > limit:
            raise Failed(f"waited {limit:g} s for {what}")
        time.sleep(0.2)


# ---- what is there ---------------------------------------------------------------------------------------------------


def swaps() -> list[list[str]]:
    """The lines of /proc/swaps."""
    return [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]


def swap_used_mib() -> int:
    """What is swapped out."""
    return sum(int(words[3]) for words in swaps()) >> 10


def stats() -> dict[str, Any]:
    """What the mount says about itself."""
    found: dict[str, Any] = json.loads((MOUNTPOINT / "stats/all.json").read_text())
    return found


def board(number: int) -> int:
    """A number from the pool directory's board, which answers also while nobody serves."""
    with open("/run/zbudfs/run-zbudfs.swap/board", "rb") as file:  # noqa: PTH123
        return int.from_bytes(os.pread(file.fileno(), 8, 8 * number), "little")


KEEPER, WORKER, STANDBY, STANDBY_READY, SERVING, HEARTBEAT, RECOVERIES = 4, 5, 6, 7, 8, 9, 10
BACKING_FD = 43


def show(unit: str, name: str) -> str:
    """One property of a unit."""
    return must("systemctl", "show", "-P", name, unit).strip()


def too_new_for_this_kernel() -> list[str]:
    """The versions from which on there is something that zbudfs needs, and this is older than."""
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return [since for since in ("6.4", "6.9") if (major, minor) < tuple(int(part) for part in since.split("."))]


def kernel_complaints() -> list[str]:
    """What the kernel has complained about since it started."""
    return [line for line in must("dmesg", "--notime").splitlines() if COMPLAINTS.search(line)]


def check_kernel(allowed: str = "") -> None:
    """The kernel has nothing to complain about."""
    found = [line for line in kernel_complaints() if not allowed or not re.search(allowed, line)]
    check("nothing hung, nobody killed, no I/O error in the kernel's log", not found, found[:3] or "nothing")


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def configure(**keys: object) -> None:
    """Write the drop-in of this scenario."""
    folder = Path("/etc/zbudfs/swap.toml.d")
    folder.mkdir(exist_ok=True)
    folder.joinpath("vm.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items()))


def start_swap(**keys: object) -> None:
    """Have swap on with this configuration."""
    run("systemctl", "stop", UNIT)
    configure(**keys)
    must("systemctl", "start", SWAP_UNIT)
    wait_for(lambda: swaps() and stats()["standby_ready"], "swap and a standby")


# ---- load ------------------------------------------------------------------------------------------------------------


NOISE_BYTES: Final = 1536
"""Of each page of a storm: two of them fit into a frame, and no more."""
DENSE_NOISE_BYTES: Final = 640
"""Of each page of a storm on a dense pool: five of them fit into a frame."""

LAST_LOOK_SECONDS: Final = 3000.0
"""Longest time for a look at all pages of a storm, most of them on disk, by an emulated processor that others use as well."""


class Storm:
    """A program that fills memory with pages of which it knows every byte, and reads and rewrites them all the time.

    So many bytes of each page are random, and the rest is text.
    """

    def __init__(self, mib: int, noise_bytes: int = NOISE_BYTES) -> None:
        self.mib = mib
        self._out = Path(f"/run/storm-{os.getpid()}-{time.monotonic_ns()}")
        self._out.write_text("0 0 0 fill")
        command = [sys.executable, __file__, "storm", str(mib), str(noise_bytes), str(self._out)]
        self._process = subprocess.Popen(command, preexec_fn=_ordinary)

    def state(self) -> tuple[int, int, int, str]:
        """Pages filled, pages checked, wrong pages, and what it does."""
        filled, checked, wrong, what = self._out.read_text().split()
        return int(filled), int(checked), int(wrong), what

    def wait_filled(self) -> None:
        """Wait until all of it is there."""
        wait_for(lambda: self.state()[3] == "check" or self._process.poll() is not None, "the storm's memory", 900)
        self.must_live()

    def must_live(self) -> None:
        """Fail if it has ended."""
        if self._process.poll() is not None:
            raise Failed(f"the storm has ended by itself: {self._process.returncode}")

    def wait_progress(self, pages: int = 2000) -> float:
        """Wait until so many more pages were checked: how long that took."""
        before = self.state()[1]
        took = wait_for(lambda: self.state()[1] >= before + pages or self._process.poll() is not None, "progress")
        self.must_live()
        return took

    def end(self) -> tuple[int, int]:
        """Have it check all of it once more and end: pages checked and wrong."""
        self.must_live()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(LAST_LOOK_SECONDS)
        _, checked, wrong, what = self.state()
        if what != "done":
            raise Failed(f"the storm did not come to its end: {what}")
        return checked, wrong

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(LIMIT_SECONDS)


def _ordinary() -> None:
    Path("/proc/self/oom_score_adj").write_text("0")


def storm(mib: int, noise_bytes: int, out: str) -> None:
    """Be the storm."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    count = mib * MIB // PAGE
    noise = random.Random(1).randbytes(MIB)
    memory = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    generations = bytearray(count)

    def page(number: int) -> bytes:
        start = (number * 2654435761 + generations[number] * 40503) % (MIB - noise_bytes)
        text = b"page %d, generation %d. " % (number, generations[number])
        return (noise[start : start + noise_bytes] + text * (PAGE // len(text)))[:PAGE]

    filled = checked = wrong = 0
    file = os.open(out, os.O_WRONLY)

    def tell(what: str) -> None:
        os.pwrite(file, f"{filled} {checked} {wrong} {what}".ljust(64).encode(), 0)

    def look(number: int) -> None:
        nonlocal checked, wrong
        if view[number * PAGE : (number + 1) * PAGE] != page(number):
            wrong += 1
        checked += 1

    for number in range(count):
        view[number * PAGE : (number + 1) * PAGE] = page(number)
        filled += 1
        if not number & 255:
            tell("fill")
    chance = random.Random(2)
    while not ended:
        first = chance.randrange(count)
        for number in range(first, min(first + 16, count)):  # some of it in order, as programs do
            look(number)
            if chance.random() < 0.3:
                generations[number] = (generations[number] + 1) & 255
                view[number * PAGE : (number + 1) * PAGE] = page(number)
        tell("check")
    for number in range(count):
        look(number)
        if not number & 255:
            tell("last")
    tell("done")


def stress(mib: int, seconds: int, workers: int = 1) -> subprocess.CompletedProcess[str]:
    """stress-ng with verification."""
    words = ["--vm", str(workers), "--vm-bytes", f"{mib}M", "--vm-method", "all", "--verify", "-t", f"{seconds}s"]
    return run("choom", "-n", "0", "--", "stress-ng", *words, limit=seconds + 1200)


# ---- scenarios ---------------------------------------------------------------------------------------------------------


def install() -> None:
    """`make install` from wheels, without a network; configuration; the unit enabled for the next boot."""
    must("cp", "-r", str(PAYLOAD / "source"), "/root/zbudfs")
    must("make", "-C", "/root/zbudfs", "install", f"WHEELHOUSE={PAYLOAD}/wheels", limit=900)
    check("make install", Path("/usr/local/bin/zbudfs").exists(), must("zbudfs", "--version").strip())
    doctor = run("zbudfs", "doctor")
    if "invalid choice" not in doctor.stdout:
        problems = [line for line in doctor.stdout.splitlines() if line.lower().startswith("problem")]
        check("zbudfs doctor finds no problem", doctor.returncode == 0, problems or "none")
    configure(size="1400M", pool="96M")
    run("zbudfs", "config", "swap")
    for unit in (UNIT, SWAP_UNIT):
        path = f"/usr/local/lib/systemd/system/{unit.replace('@swap', '@')}"
        verified = run("systemd-analyze", "verify", "--man=no", path)
        said = [line for line in verified.stdout.splitlines() if not TOO_NEW.search(line)]
        check(
            f"systemd-analyze verify {unit}", verified.returncode == 0 and not said, " ".join(said) or "nothing to say"
        )
        score = run("systemd-analyze", "security", "--offline=yes", path).stdout.splitlines()[-1]
        check(f"systemd-analyze security {unit}", "level for" in score, score.lstrip("→ "))
    must("systemctl", "enable", SWAP_UNIT)
    check("enabled for the next boot", True, SWAP_UNIT)


def boot() -> None:
    """Booted with the unit enabled: swap is there without a hand, and the protections are real."""
    found = swaps()
    if not check(
        "swap is on after boot, nobody did anything", len(found) == 1, " ".join(found[0]) if found else "none"
    ):
        raise Failed("there is no swap")
    affinity = Path("/sys/block", Path(found[0][0]).name, "queue/rq_affinity").read_text().strip()
    check("requests end on the CPU where they began", affinity == "2", affinity)
    check("both units are active", show(UNIT, "ActiveState") == show(SWAP_UNIT, "ActiveState") == "active", "active")
    wait_for(lambda: stats()["standby_ready"], "a standby")
    wait_for(lambda: show(UNIT, "StatusText"), "a status")
    check("the status says what is stored", "pages stored" in show(UNIT, "StatusText"), show(UNIT, "StatusText"))
    check("descriptors are in the store", show(UNIT, "NFileDescriptorStore") == "3", show(UNIT, "NFileDescriptorStore"))
    pids = {name: stats()[f"{name}_pid"] for name in ("keeper", "worker", "standby")}
    check("the main process is the keeper", show(UNIT, "MainPID") == str(pids["keeper"]), pids["keeper"])
    for name, pid in pids.items():
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        check(f"{name}: IO flusher", bool(int(words[6]) & PF_MEMALLOC_NOIO), f"flags {int(words[6]):#x}")
        score = Path(f"/proc/{pid}/oom_score_adj").read_text().strip()
        check(f"{name}: OOM score", score == "-1000", score)
        locked = re.search(r"VmLck:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        check(f"{name}: memory is locked", bool(locked and int(locked[1]) > 10_000), locked[0] if locked else "no")
    cgroup = Path("/sys/fs/cgroup/system.slice", UNIT, "memory.swap.max")
    check("MemorySwapMax=0", cgroup.read_text().strip() == "0", cgroup.read_text().strip())
    warnings = stats()["warnings"]
    old = sum(f"Linux {since} or later" in text for text in warnings for since in too_new_for_this_kernel())
    check("the system refused nothing that its kernel has", len(warnings) == old, warnings or "nothing")
    mounts()
    must("systemctl", "stop", UNIT)
    check(
        "systemctl stop of the daemon takes swap off first",
        not swaps() and not MOUNTPOINT.is_mount(),
        "no swap, no mount",
    )
    check(
        "both units are inactive", show(UNIT, "ActiveState") == show(SWAP_UNIT, "ActiveState") == "inactive", "inactive"
    )
    check("nothing left in /run/zbudfs", not list(Path("/run/zbudfs").iterdir()), "nothing")
    must("systemctl", "start", SWAP_UNIT)
    check("systemctl start of the swap unit brings both", len(swaps()) == 1, "swap is on")
    check_kernel()


def mounts() -> None:
    """mount -t fuse.zbudfs, a line in fstab, and umount."""
    place = Path("/mnt/extra")
    place.mkdir(exist_ok=True)
    must("mount", "-t", "fuse.zbudfs", "-o", "size=64M,pool=8M,backing=none", "extra", str(place))
    check("mount -t fuse.zbudfs", (place / "swapfile").stat().st_size == 64 * MIB, "swapfile of 64 MiB")
    must("umount", str(place))
    with Path("/etc/fstab").open("a") as fstab:
        fstab.write(f"extra {place} fuse.zbudfs size=32M,pool=8M,backing=none,nofail,noauto 0 0\n")
    must("mount", str(place))
    check("a line in /etc/fstab", (place / "swapfile").stat().st_size == 32 * MIB, "swapfile of 32 MiB")
    must("umount", str(place))
    check("umount", not place.is_mount(), "gone")


def acceptance() -> None:
    """A pool of 64 MiB and a backing file; stress-ng over 700 MiB with verification, three times; swapoff."""
    start_swap(size="1400M", pool="64M")
    for number in (1, 2, 3):
        before = stats()
        done = stress(700, 60)
        after = stats()
        passed = re.search(r"passed: (\d+)", done.stdout)
        check(
            f"stress-ng --vm-bytes 700M --verify, run {number} of 3",
            done.returncode == 0 and bool(passed),
            done.returncode,
        )
        out, back = (after[name] - before[name] for name in ("cumul_writeback_pages", "cumul_pagein_pages"))
        check(f"run {number}: pages written back and read back meanwhile", out > 0 and back > 0, f"{out} and {back}")
    check_kernel()
    must("zbudfs", "swapoff", str(MOUNTPOINT), limit=900)
    check("swapoff works after it", not swaps(), "no swap")


def pressure() -> None:
    """Twice the machine's RAM, of data that compresses to less than half, and then stress-ng's own patterns."""
    start_swap(size="1900M", pool="96M")
    _press(NOISE_BYTES, "two pages", 0.8)


def dense() -> None:
    """The same with the dense packing: twice the machine's RAM, of pages of which five fit into a frame."""
    start_swap(size="1900M", pool="64M", packing="dense")
    check("the pool is packed densely", stats()["packing"].startswith("dense"), stats()["packing"])
    _press(DENSE_NOISE_BYTES, "four pages and more", 0.25)


def _press(noise_bytes: int, packed: str, most_of_a_page: float) -> None:
    """Twice the RAM in pages with so much noise; a page written back takes at most this part of its size on disk."""
    ram = int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10
    mib = 2 * ram
    before = stats()
    load = Storm(mib, noise_bytes)
    try:
        load.wait_filled()
        load.wait_progress(20_000)
        out = swap_used_mib()
        checked, wrong = load.end()
    finally:
        load.kill()
    after = stats()
    check(f"{mib} MiB in a machine of {ram} MiB: no wrong page", wrong == 0, f"{checked} pages checked, {wrong} wrong")
    check("most of it was in swap", out > ram // 2, f"{out} MiB")
    pages, count = (after[name] - before[name] for name in ("cumul_writeback_pages", "cumul_writeback_bytes"))
    check(
        f"and much of that on disk, {packed} to a block",
        pages > 0 and count < most_of_a_page * PAGE * pages,
        f"{pages} pages, {count >> 20} MiB",
    )
    done = stress(2 * ram // 2, 60, workers=2)
    check(f"stress-ng --vm 2 --vm-bytes {2 * ram // 2}M --verify", done.returncode == 0, done.returncode)
    check("no page was lost", stats()["lost_pages"] == 0, stats()["lost_pages"])
    check_kernel()


def served_by(*old: int) -> bool:
    """Whether somebody else serves, with a standby."""
    return bool(board(SERVING) and board(STANDBY_READY) and board(WORKER) not in old and is_alive(board(WORKER)))


@contextlib.contextmanager
def storm_of(part: float, size: str) -> Iterator[Storm]:
    """Have a program of a part of RAM live on swap of this size; then no page may be wrong or lost."""
    start_swap(size=size, pool="96M")
    load = Storm(int(part * (int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10)))
    try:
        load.wait_filled()
        check(f"a storm of {part:g} of RAM is in swap", swap_used_mib() > 0, f"{swap_used_mib()} MiB in swap")
        yield load
        checked, wrong = load.end()
        check("no wrong page after all of that", wrong == 0, f"{checked} pages checked, {wrong} wrong")
        check("no page was lost", stats()["lost_pages"] == 0, stats()["lost_pages"])
    finally:
        load.kill()


def handover() -> None:
    """Everything that may happen to the daemon, while a program lives on the swap it serves."""
    with storm_of(1, size="1900M") as load:
        for number in (1, 2):
            _restart(load, number)
        for name, fields in (
            ("worker", [WORKER]),
            ("keeper", [KEEPER]),
            ("keeper and worker", [KEEPER, WORKER]),
            ("keeper, worker and standby", [KEEPER, WORKER, STANDBY]),
        ):
            _kill(load, name, fields)
        for name, number in (("worker", WORKER), ("keeper", KEEPER)):
            _stop(load, name, number)
    check(
        "the swap unit was active all the time",
        show(SWAP_UNIT, "ActiveState") == "active",
        show(SWAP_UNIT, "ActiveState"),
    )
    check_kernel()


def upgrade() -> None:
    """The program is installed anew while swap is on; a worker dies after that, and the service is restarted."""
    with storm_of(0.75, size="1400M") as load:
        must("make", "-C", "/root/zbudfs", "install", f"WHEELHOUSE={PAYLOAD}/wheels", limit=1800)
        must("systemctl", "daemon-reload")
        load.wait_progress()
        check("make install with swap on", must("zbudfs", "--version").startswith("zbudfs"), "the storm goes on")
        _kill(load, "worker, whose files were replaced", [WORKER])
        _restart(load, 1)
    check_kernel()


def restart() -> None:
    """kill -9 of the keeper and `systemctl restart`, while a program lives on the swap: it stays on, on any kernel."""
    with storm_of(1, size="1900M") as load:
        device = swaps()[0][0]
        steps: dict[str, Callable[[], object]] = {
            "kill -9 of the keeper": lambda: os.kill(int(show(UNIT, "MainPID")), signal.SIGKILL),
            "systemctl restart": lambda: run("systemctl", "restart", UNIT),
        }
        for name, step in steps.items():
            step()
            time.sleep(10)
            stalled = load.wait_progress()
            kept = bool(swaps()) and swaps()[0][0] == device
            seen = f"2000 more pages checked in {stalled:.1f} s; the service says: {show(UNIT, 'StatusText')}"
            check(f"{name}: swap stays on", kept, seen)
    must("zbudfs", "swapoff", "--umount", str(MOUNTPOINT), limit=900)
    check("swapoff --umount takes all of it away", not swaps() and not MOUNTPOINT.is_mount(), "no swap, no mount")
    must("systemctl", "restart", UNIT, SWAP_UNIT)
    check("and it can be started anew", len(swaps()) == 1, "swap is on")
    check_kernel()


def _restart(load: Storm, number: int) -> None:
    device, worker = swaps()[0][0], board(WORKER)
    began = time.monotonic()
    must("systemctl", "restart", UNIT)
    took = time.monotonic() - began
    wait_for(lambda: served_by(worker), "a new worker and its standby")
    stalled = load.wait_progress()
    kept = bool(swaps()) and swaps()[0][0] == device
    check(
        f"systemctl restart under pressure, {number}", kept, f"{took:.1f} s; 2000 more pages checked in {stalled:.1f} s"
    )


def _kill(load: Storm, name: str, fields: list[int]) -> None:
    wait_for(lambda: served_by(), "a standby")
    pids = [board(field) for field in fields]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    stalled = load.wait_progress()
    wait_for(
        lambda: served_by(*pids) and board(KEEPER) not in pids and is_alive(board(KEEPER)),
        "a keeper, a worker, a standby",
    )
    took = time.monotonic() - began
    check(
        f"kill -9 of {name} under pressure",
        True,
        f"2000 more pages within {stalled:.1f} s, all three again after {took:.1f} s",
    )


def _stop(load: Storm, name: str, number: int) -> None:
    wait_for(lambda: served_by(), "a standby")
    pid = board(number)
    os.kill(pid, signal.SIGSTOP)
    took = wait_for(lambda: board(number) != pid and not is_alive(pid) and is_alive(board(number)), f"another {name}")
    stalled = load.wait_progress()
    check(
        f"SIGSTOP of the {name} is noticed and healed", True, f"after {took:.1f} s; 2000 more pages in {stalled:.1f} s"
    )


def stop() -> None:
    """What has no room in RAM stays in swap: stop fails, and all goes on; with room it works."""
    start_swap(size="1900M", pool="96M")
    ram = int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10
    load = Storm(ram * 3 // 2)
    try:
        load.wait_filled()
        for unit in (UNIT, SWAP_UNIT):
            done = run("systemctl", "stop", unit)
            check(
                f"systemctl stop {unit} without room fails", done.returncode != 0, done.stdout.strip().splitlines()[-1:]
            )
            wait_for(lambda: show(UNIT, "ActiveState") == show(SWAP_UNIT, "ActiveState") == "active", "both units")
            check("swap is still on, both units are active", len(swaps()) == 1, f"{swap_used_mib()} MiB in swap")
            load.wait_progress()
        checked, wrong = load.end()
        check("no wrong page", wrong == 0, f"{checked} pages checked, {wrong} wrong")
    finally:
        load.kill()
    must("systemctl", "stop", UNIT)
    check("with room it works", not swaps() and not MOUNTPOINT.is_mount(), "no swap, no mount")
    check_kernel()


def reboot() -> None:
    """With swap in use: a reboot, and then a power-off; the host measures how long they take."""
    STATE.mkdir(exist_ok=True)
    first = not (STATE / "booted").exists()
    (STATE / "booted").touch()
    if not first:
        check("swap is on again after the reboot", len(swaps()) == 1, swaps())
    start_swap(size="1900M", pool="96M")
    ram = int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10
    load = Storm(ram)
    load.wait_filled()
    check("swap is in use", swap_used_mib() > 100, f"{swap_used_mib()} MiB")
    check_kernel()
    os.sync()
    report(ends="reboot" if first else "power-off", again=first)
    must("systemctl", "--no-block", "reboot" if first else "poweroff")
    time.sleep(LIMIT_SECONDS)


def full() -> None:
    """The disk under the backing file fills up: writes are refused, nothing is lost; with room again it goes on."""
    image, place = Path("/var/small.img"), Path("/mnt/small")
    place.mkdir(exist_ok=True)
    must("truncate", "-s", "192M", str(image))
    must("mkfs.ext4", "-q", "-m", "0", str(image))
    # Not through the page cache: that would be a disk which needs memory to give memory back (zbudfs doctor warns).
    device = must("losetup", "--show", "--find", "--direct-io=on", str(image)).strip()
    must("mount", device, str(place))
    start_swap(size="1900M", pool="64M", backing=f"{place}/backing")
    ballast = place / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while file.write(bytes(MIB)):
            file.flush()
            if os.statvfs(place).f_bavail * PAGE < 48 * MIB:
                break
    # More than there is RAM now, by so much that the pool is too small for what has to go to swap, and the disk is not.
    load = Storm((int(re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[0]) >> 10) + 64)
    try:
        wait_for(lambda: stats()["backing_ready_bytes"] > 0, "writeback", 900)
        with ballast.open("ab") as file, contextlib.suppress(OSError):
            while file.write(bytes(MIB // 4)):
                file.flush()
        free = os.statvfs(place).f_bavail * PAGE
        wait_for(lambda: load.state()[3] == "check" or stats()["refused_pool_full"], "the storm, or a refusal", 900)
        load.must_live()
        seen = stats()
        check(
            "the disk is full",
            free < MIB,
            f"{free >> 10} KiB free, backing file of {seen['backing_ready_bytes'] >> 20} MiB,"
            f" {seen['refused_pool_full']} writes refused",
        )
        ballast.unlink()
        load.wait_filled()
        load.wait_progress(5000)
        checked, wrong = load.end()
        check("no wrong page", wrong == 0, f"{checked} pages checked, {wrong} wrong")
        failed = stats()["writeback_failures"]
        check(
            "no page was lost",
            stats()["lost_pages"] == 0,
            f"{failed} writebacks failed, {stats()['refused_pool_full']} writes refused",
        )
    finally:
        load.kill()
    check_kernel(allowed=r"Write-error on swap-device|I/O error, dev loop")
    must("systemctl", "stop", UNIT)
    must("umount", str(place))
    must("losetup", "--detach", device)


# ---- what cannot start at boot -----------------------------------------------------------------------------------------

EARLY_UNIT: Final = """\
[Unit]
DefaultDependencies=no
After=local-fs.target
RequiresMountsFor=/vm
Conflicts=shutdown.target
Before=shutdown.target
[Service]
Type=exec
ExecStart=/usr/bin/python3 -u /vm/vm_guest.py
StandardOutput=file:/dev/hvc0
StandardError=inherit
KillMode=mixed
OOMScoreAdjust=-1000
Environment=LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
[Install]
WantedBy=multi-user.target
"""
"""The scenario's own unit where the boot itself is looked at: it waits for nothing."""
BOOT_LIMIT_SECONDS: Final = 600.0
"""How long this waits for multi-user.target. Longer than the time that is allowed, so that there is a figure."""
ALLOWED_BOOTS: Final = 4.0
"""How much longer a boot may take with what cannot start, in boots without zbudfs. Arbitrary: starting several Pythons takes
long on an emulated processor that others use as well. A boot that is held up does not end."""
LIBRARY: Final = Path("/usr/local/lib/zbudfs/lib")


def boot_seconds() -> float:
    """Wait for multi-user.target, and return when it was reached, in seconds from the kernel's start. Failed."""
    wait_for(lambda: show("multi-user.target", "ActiveState") == "active", "multi-user.target", BOOT_LIMIT_SECONDS)
    return int(show("multi-user.target", "ActiveEnterTimestampMonotonic")) / 1e6


def boot_again(phase: str) -> None:
    """Reboot; the scenario goes on with this phase."""
    (STATE / "phase").write_text(phase)
    os.sync()
    report(ends="reboot", again=True, **{"with": "no swap"})
    must("systemctl", "--no-block", "reboot")
    time.sleep(LIMIT_SECONDS)


def phase_now() -> str:
    """Return the phase that the scenario is in: "first" before it reboots."""
    STATE.mkdir(exist_ok=True)
    return (STATE / "phase").read_text() if (STATE / "phase").exists() else "first"


def write_configuration(name: str, **keys: object) -> None:
    """Have a configuration of that name, and its swap from the next boot on; keys as for `configure`, `text` as it is."""
    text = str(keys.pop("text", "")) + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    Path("/etc/zbudfs", f"{name}.toml").write_text(text)
    must("systemctl", "enable", f"zbudfs-swap@{name}.service")


def check_failed(name: str, words: str) -> None:
    """The unit of this configuration has failed, and is listed; the log has one line of zbudfs that says why."""
    unit = f"zbudfs@{name}.service"
    failed = must("systemctl", "--failed", "--plain", "--no-legend")
    state, restarts = show(unit, "ActiveState"), show(unit, "NRestarts")
    check(f"{unit} is failed, and listed so", state == "failed" and unit in failed, f"{state}, {restarts} restarts")
    log = must("journalctl", "-b", "-o", "cat", "-u", unit)
    said = [line for line in log.splitlines() if words in line]
    check(f"{unit} says why, once", len(said) == 1 and "Traceback" not in log, said or log.splitlines()[-5:])


def broken() -> None:
    """What cannot start at boot costs swap and nothing else; a mount that holds pages is tried for ever."""
    phase = phase_now()
    if phase == "first":
        Path("/etc/systemd/system/vm-guest.service").write_text(EARLY_UNIT)
        must("systemctl", "disable", SWAP_UNIT)
        boot_again("plain")
    try:
        took = boot_seconds()
    except Failed as error:
        check(f"the boot ({phase}) is not held up", False, f"{error}; {must('systemctl', 'list-jobs')}")
        raise
    if phase == "plain":
        (STATE / "plain").write_text(f"{took}")
        check("a boot without zbudfs reaches multi-user.target", True, f"after {took:.1f} s")
        _break_backings()
        boot_again("backings")
    plain = float((STATE / "plain").read_text())
    seen = f"after {took:.1f} s, without zbudfs after {plain:.1f} s"
    check(f"multi-user.target is reached ({phase})", took < (1 + ALLOWED_BOOTS) * plain, seen)
    if phase == "backings":
        check_failed("missing", "/mnt/not-there")
        check_failed("full", "No space left")
        check_failed("foreign", "/var/foreign")
        check_failed("syntax", "syntax.toml")
        for name in ("missing", "full", "foreign", "syntax"):
            must("systemctl", "disable", f"zbudfs-swap@{name}.service")
            Path("/etc/zbudfs", f"{name}.toml").unlink()
        check("the file of somebody else is as it was", Path("/var/foreign").read_text() == "not ours\n", "unchanged")
        Path("/etc/systemd/system/no-fuse.service").write_text(
            "[Unit]\nDefaultDependencies=no\nAfter=local-fs.target\nBefore=zbudfs@swap.service zbudfs@two.service\n"
            "[Service]\nType=oneshot\nExecStart=rm /dev/fuse\n[Install]\nWantedBy=sysinit.target\n"
        )
        must("systemctl", "enable", "no-fuse.service", SWAP_UNIT)
        write_configuration("two", size="64M", pool="16M", instances=2)
        boot_again("no /dev/fuse")
    if phase == "no /dev/fuse":
        check_failed("swap", "/dev/fuse")
        state = show("zbudfs@two.service", "ActiveState")
        check("a service of two instances is failed as well", state == "failed", state)
        must("systemctl", "disable", "no-fuse.service", "zbudfs-swap@two.service")
        Path("/etc/zbudfs/two.toml").unlink()
        _break_python()
        boot_again("another Python")
    check_failed("swap", "cannot start")
    done = run("zbudfs", "status")
    check("a command says in one line what to do", len(done.stdout.splitlines()) == 1, done.stdout.strip())
    _mend_python()
    must("systemctl", "reset-failed")
    must("systemctl", "start", SWAP_UNIT)
    wait_for(lambda: swaps() and stats()["standby_ready"], "swap and a standby")
    check("with the right Python it starts", len(swaps()) == 1, "swap is on")
    _break_python()
    os.kill(board(KEEPER), signal.SIGKILL)
    wait_for(lambda: int(show(UNIT, "NRestarts")) >= 5, "restarts")
    kept = show(UNIT, "ActiveState") == "activating" and show(UNIT, "NFileDescriptorStore") == "3"
    check("a mount that holds pages is tried again", kept, f"{show(UNIT, 'NRestarts')} restarts")
    _mend_python()
    took = wait_for(lambda: show(UNIT, "ActiveState") == "active" and is_alive(board(KEEPER)), "the keeper")
    check("and goes on when the program starts again", len(swaps()) == 1, f"after {took:.1f} s")
    _break_python()
    must("systemctl", "stop", UNIT)
    check("a stop turns swap off without the program", not swaps() and not MOUNTPOINT.is_mount(), "no swap, no mount")
    check_kernel()


def _break_backings() -> None:
    image = Path("/var/full.img")
    must("truncate", "-s", "16M", str(image))
    must("mkfs.ext4", "-q", "-m", "0", str(image))
    place = Path("/mnt/full")
    place.mkdir(exist_ok=True)
    with Path("/etc/fstab").open("a") as fstab:
        fstab.write(f"{image} {place} ext4 loop 0 0\n")
    must("mount", str(place))
    with contextlib.suppress(OSError), (place / "ballast").open("wb", buffering=0) as ballast:
        while ballast.write(bytes(PAGE)):
            pass
    Path("/var/foreign").write_text("not ours\n")
    write_configuration("missing", size="64M", pool="8M", backing="/mnt/not-there/z")
    write_configuration("full", size="64M", pool="8M", backing=f"{place}/z")
    write_configuration("foreign", size="64M", pool="8M", backing="/var/foreign")
    write_configuration("syntax", text="size = \n")


def _break_python() -> None:
    """Do what an upgrade of the distribution does: the interpreter looks for its packages in another folder."""
    (found,) = LIBRARY.glob("python3.*")
    found.rename(LIBRARY / "python3.0")


def _mend_python() -> None:
    version = must("/usr/bin/python3", "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    (LIBRARY / "python3.0").rename(LIBRARY / f"python{version.strip()}")


# ---- a disk that is mounted late ---------------------------------------------------------------------------------------


def late() -> None:
    """A backing file on a disk with `nofail` waits for the disk, and is never made below its empty mountpoint."""
    phase, place = phase_now(), Path("/mnt/ssd")
    backing = place / "z"
    if phase == "first":
        Path("/etc/systemd/system/vm-guest.service").write_text(EARLY_UNIT)
        must("systemctl", "stop", UNIT)
        must("mkfs.ext4", "-q", "/dev/vdc")
        place.mkdir(exist_ok=True)
        _fstab("/dev/vdc", place)
        configure(size="128M", pool="8M", backing=str(backing))
        boot_again("with the disk")
    took = boot_seconds()
    if phase == "with the disk":
        found = swaps()
        check("swap is on after boot", len(found) == 1, f"multi-user.target after {took:.1f} s")
        wait_for(place.is_mount, "the disk")
        fd = int(board(BACKING_FD))
        held = os.readlink(f"/proc/{board(WORKER)}/fd/{fd}")  # noqa: PTH115
        device = os.stat(f"/proc/{board(WORKER)}/fd/{fd}").st_dev  # noqa: PTH116
        check("the backing file is on that disk", device == os.stat(place).st_dev != os.stat("/").st_dev, held)  # noqa: PTH116
        _fstab("/dev/disk/by-uuid/0000-0000", place)
        boot_again("without the disk")
    check("the boot goes on without the disk", took < BOOT_LIMIT_SECONDS, f"multi-user.target after {took:.1f} s")
    check("no backing file below the empty mountpoint", not backing.exists(), list(place.iterdir()) or "nothing")
    check_failed("swap", str(place))
    _fstab("/dev/vdc", place)
    must("systemctl", "daemon-reload")
    must("systemctl", "reset-failed")
    must("systemctl", "start", SWAP_UNIT)
    check("started by hand it mounts the disk first", place.is_mount() and backing.exists(), "swap is on")
    check_kernel()


def _fstab(device: str, place: Path) -> None:
    """Have the disk mounted late, and nothing else at that place."""
    file = Path("/etc/fstab")
    lines = [line for line in file.read_text().splitlines() if f" {place} " not in line]
    file.write_text("\n".join([*lines, f"{device} {place} ext4 nofail 0 0", ""]))


# ---- login sessions ----------------------------------------------------------------------------------------------------


def session() -> None:
    """A daemon that a shell starts outlives the session: its scope is stopped, runs out of memory, is frozen."""
    must("systemctl", "stop", UNIT)
    place = Path("/mnt/z")
    place.mkdir(exist_ok=True)
    load = Storm(int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10)
    wait_for(lambda: load.state()[0] > 1000, "the storm's begin")
    load.kill()
    options = ["--size", "1400M", "--pool", "64M", str(place)]
    scope = ["systemd-run", "--scope", "--quiet", "--unit=s.scope", "--slice=user.slice", "-p", "MemorySwapMax=0"]
    must(*scope, "zbudfs", "swapon", *options)
    pids = [int((place / f"stats/{name}_pid").read_text()) for name in ("keeper", "worker", "standby")]
    groups = {Path(f"/proc/{pid}/cgroup").read_text().strip() for pid in pids}
    ok = len(groups) == 1 and re.search(r"^0::/system\.slice/zbudfs-[^/]+\.scope$", min(groups))
    check("all processes of the daemon are in a scope of their own", bool(ok), groups)
    warnings = json.loads((place / "stats/all.json").read_text())["warnings"]
    check("and there is no warning of a session", not any("session" in text for text in warnings), warnings or "none")
    load = Storm(int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10)
    try:
        load.wait_filled()
        check("a storm of the RAM is in swap", swap_used_mib() > 0, f"{swap_used_mib()} MiB")
        limits = ["-p", "MemoryMax=100M", "-p", "MemorySwapMax=0"]
        done = run(
            "systemd-run",
            "--scope",
            "--quiet",
            "--slice=user.slice",
            *limits,
            "choom",
            "-n",
            "0",
            "--",
            "python3",
            "-c",
            "x = bytearray(300 << 20)",
        )
        check("a program of a session is killed for want of memory", done.returncode != 0, done.returncode)
        run("systemctl", "stop", "s.scope")
        freeze = Path("/sys/fs/cgroup/user.slice/cgroup.freeze")
        freeze.write_text("1")
        took = load.wait_progress()
        freeze.write_text("0")
        check("user.slice is frozen: swap is served", True, f"2000 more pages within {took:.1f} s")
        check("swap is on, and all three processes live", all(map(is_alive, pids)) and len(swaps()) == 1, pids)
        checked, wrong = load.end()
        check("no wrong page", wrong == 0, f"{checked} pages checked, {wrong} wrong")
    finally:
        load.kill()
    must("zbudfs", "swapoff", "--umount", str(place), limit=900)
    listed = must("systemctl", "list-units", "--all", "--plain", "--no-legend", "zbudfs-*.scope")
    check("the scope is gone with the mount", not listed.strip(), listed.strip() or "gone")
    check_kernel(allowed=r"python3|oom|Killed process|Out of memory|Memory cgroup")


# ---- shutdown without room ---------------------------------------------------------------------------------------------


def shutdown() -> None:
    """Power-off while a tmpfs that stays mounted holds more than RAM: swap cannot go off, and the machine ends."""
    start_swap(size="1900M", pool="96M")
    ram = int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10
    must("mount", "-o", "remount,size=1500M", "/dev/shm")
    noise = random.Random(3).randbytes(MIB)
    with open("/dev/shm/data", "wb") as file:  # noqa: PTH123
        for _ in range(ram * 13 // 10):
            file.write(noise)
    check("a tmpfs holds more than RAM", swap_used_mib() > ram // 4, f"{swap_used_mib()} MiB in swap")
    check_kernel()
    os.sync()
    report(ends="power-off", again=False, **{"with": "a full tmpfs in swap"})
    must("systemctl", "--no-block", "poweroff")
    time.sleep(LIMIT_SECONDS)


# ---- sleep -------------------------------------------------------------------------------------------------------------

WAKE_SECONDS: Final = 8
"""From the alarm's setting to the alarm: freezing takes a part of that. Arbitrary: an emulated processor."""
WAKE_HOOK: Final = f"""\
#!/bin/sh
case $1 in
pre) rtcwake -m no -s {WAKE_SECONDS} ;;
esac
"""


def suspend_counts() -> tuple[int, int]:
    """Return how often the machine has slept, and how often it could not."""
    folder = Path("/sys/power/suspend_stats")
    return int((folder / "success").read_text()), int((folder / "fail").read_text())


def frozen_groups() -> list[str]:
    """Return the cgroups that are frozen now."""
    return [
        str(path.parent) for path in Path("/sys/fs/cgroup").rglob("cgroup.freeze") if path.read_text().strip() == "1"
    ]


def suspend_once() -> bool:
    """Suspend the machine as a user does, and return whether it slept. Failed, if it neither slept nor said so."""
    before = suspend_counts()
    wait_for(lambda: show("sleep.target", "ActiveState") == "inactive", "the end of the last sleep")
    must("systemctl", "suspend")
    wait_for(lambda: suspend_counts() != before or show("systemd-suspend.service", "Result") != "success", "sleep")
    wait_for(lambda: show("systemd-suspend.service", "ActiveState") in ("inactive", "failed"), "the end of sleep")
    return suspend_counts() == (before[0] + 1, before[1])


def sleep_() -> None:
    """Suspend to RAM and to idle under a storm, 20 times each; the hook and systemd-sleep are killed in the middle."""
    hook = Path("/usr/lib/systemd/system-sleep/wake")
    hook.write_text(WAKE_HOOK)
    hook.chmod(0o755)
    modes = [mode for mode in ("s2idle", "deep") if mode in Path("/sys/power/mem_sleep").read_text()]
    print(Path("/sys/power/mem_sleep").read_text(), flush=True)
    with storm_of(1, size="1900M") as load:
        for mode in modes:
            Path("/sys/power/mem_sleep").write_text(mode)
            slept, stalls = 0, []
            for _ in range(20):
                slept += suspend_once()
                stalls.append(load.wait_progress(1000))
            check(
                f"systemctl suspend ({mode}) under a storm",
                slept == 20,
                f"{slept} of 20; longest stall after it {max(stalls):.1f} s",
            )
            wait_for(lambda: not frozen_groups(), "the thaw", 30)
        refusing = [line for line in must("dmesg", "--notime").splitlines() if "refusing to freeze" in line]
        check("no task refused to freeze", not refusing, refusing[:3] or "none")
        slept = 0
        for _ in range(3):
            done = run("/usr/local/lib/zbudfs/libexec/sleep", "run", "rtcwake", "-m", "mem", "-s", str(WAKE_SECONDS))
            slept += done.returncode == 0
        check("sleep run rtcwake -m mem", slept == 3, f"{slept} of 3")
        for victim in ("libexec/sleep\0pre", "system-sleep/zbudfs\0pre", "systemd-sleep\0suspend"):
            _kill_while_frozen(victim)
            wait_for(lambda: not frozen_groups() and show("sleep.target", "ActiveState") == "inactive", "the thaw")
            check(f"kill -9 of {victim.replace(chr(0), ' ')}: all is thawed", not frozen_groups(), "nothing is frozen")
            load.wait_progress()
    hook.unlink()
    check_kernel(allowed=r"refusing to freeze|Freezing")


KILLER: Final = """
import os, signal, sys, time
from pathlib import Path
victim, end = sys.argv[1].encode().replace(b"|", b"\\0"), time.monotonic() + 60
while time.monotonic() < end and not Path("/run/zbudfs.frozen").exists():
    time.sleep(0.005)
for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
        if victim in path.read_bytes() and int(path.parent.name) != os.getpid():
            os.kill(int(path.parent.name), signal.SIGKILL)
            print("killed", path.parent.name, flush=True)
    except OSError:
        pass
"""
"""Kills a process as soon as the first cgroup is frozen; its own is not, by the unit's name."""


def _kill_while_frozen(victim: str) -> None:
    unit = f"zbudfs-killer{time.monotonic_ns()}.service"
    words = ["systemd-run", "--quiet", f"--unit={unit}", "--slice=system.slice", "-p", "RemainAfterExit=yes"]
    must(*words, "python3", "-c", KILLER, victim.replace("\0", "|"))
    time.sleep(3)
    if victim.startswith("libexec"):
        run("/usr/local/lib/zbudfs/libexec/sleep", "run", "sleep", "3")
    else:
        run("systemctl", "suspend")
    wait_for(lambda: "killed" in must("journalctl", "-b", "-o", "cat", "-u", unit), f"the end of {victim!r}")
    run("systemctl", "stop", unit)


# ---- hibernation -------------------------------------------------------------------------------------------------------


def hibernate() -> None:
    """Hibernation: refused where swap on zbudfs cannot go off; else it is off before and on afterwards."""
    phase = phase_now()
    if phase != "first":
        raise Failed("the machine has started afresh: the image was not used")
    ram = int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10
    start_swap(size="1900M", pool="96M")
    _refused("there is no swap for the image", "without other swap")
    must("update-initramfs", "-u", limit=900)
    check("the initramfs does not resume from zbudfs", "loop" not in _resume_device(), _resume_device() or "no device")
    must("mkswap", "/dev/vdc")
    must("swapon", "--priority", "0", "/dev/vdc")
    uuid = must("blkid", "-s", "UUID", "-o", "value", "/dev/vdc").strip()
    must("update-initramfs", "-u", limit=900)
    check("but from the disk, which is smaller", uuid in _resume_device(), _resume_device())
    must("swapoff", "/dev/vdc")
    load = Storm(2 * ram)
    try:
        load.wait_filled()
        must("swapon", "--priority", "0", "/dev/vdc")
        _refused("not enough memory for swapoff", "without room")
        load.wait_progress()
        check("the swap of before is on", any("loop" in words[0] for words in swaps()), swaps())
        checked, wrong = load.end()
        check("no wrong page", wrong == 0, f"{checked} pages checked, {wrong} wrong")
    finally:
        load.kill()
    must("swapoff", "/dev/vdc")
    load = Storm(ram * 6 // 10)
    load.wait_filled()
    must("swapon", "--priority", "0", "/dev/vdc")
    before = swaps()
    loops = [words for words in before if "loop" in words[0]]
    (STATE / "phase").write_text("hibernated")
    os.sync()
    began = time.clock_gettime(time.CLOCK_BOOTTIME)
    report(ends="hibernation", again=True, **{"with": "swap in use"})
    must("systemctl", "hibernate", limit=900)
    wait_for(
        lambda: (
            show("systemd-hibernate.service", "ActiveState") in ("inactive", "failed")
            and show("zbudfs-hibernate.service", "ActiveState") in ("inactive", "failed")
            and time.clock_gettime(time.CLOCK_BOOTTIME) > began + 20
        ),
        "the end of hibernation",
        600,
    )
    kernel = must("dmesg", "--notime")
    check(
        "the machine went on from the image",
        "PM: hibernation: hibernation exit" in kernel,
        must("journalctl", "-b", "-o", "cat", "-u", "systemd-hibernate.service")[-300:],
    )
    now = [words for words in swaps() if "loop" in words[0]]
    check(
        "swap on zbudfs is on again, with the priority of before", len(now) == 1 and now[0][4] == loops[0][4], swaps()
    )
    load.wait_progress()
    checked, wrong = load.end()
    check("no wrong page", wrong == 0, f"{checked} pages checked, {wrong} wrong")
    must("swapoff", "/dev/vdc")
    check_kernel()


def _refused(words: str, why: str) -> None:
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    run("systemctl", "start", "systemd-hibernate.service")
    said = must("journalctl", "-b", "-o", "cat", "--since", began, "-u", "zbudfs-hibernate.service")
    found = [line for line in said.splitlines() if words in line]
    check(f"hibernation {why} is refused, with the reason", len(found) == 1, found or said.splitlines()[-3:])
    check("and the machine goes on, with swap on", any("loop" in words[0] for words in swaps()), swaps())


def _resume_device() -> str:
    """Return what the initramfs resumes from; empty: nothing."""
    (image,) = Path("/boot").glob("initrd.img-*")
    must("rm", "-rf", "/run/initramfs-look")
    must("unmkinitramfs", str(image), "/run/initramfs-look")
    return " ".join(
        line
        for file in Path("/run/initramfs-look").rglob("conf/conf.d/*")
        for line in file.read_text().splitlines()
        if line.startswith("RESUME=")
    )


SCENARIOS: Final[dict[str, Callable[[], None]]] = {
    "install": install,
    "boot": boot,
    "acceptance": acceptance,
    "pressure": pressure,
    "dense": dense,
    "restart": restart,
    "handover": handover,
    "upgrade": upgrade,
    "stop": stop,
    "reboot": reboot,
    "full": full,
    "broken": broken,
    "late": late,
    "session": session,
    "shutdown": shutdown,
    "sleep": sleep_,
    "hibernate": hibernate,
}


def lock_memory() -> None:
    """Stay out of swap."""
    if ctypes.CDLL(None).mlockall(3):
        print("this process could not lock its memory")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell of what ends a scenario."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        check(f"the scenario came to its end ({type(error).__name__})", False, error)
        for command in (["systemctl", "status", "--no-pager", "-n", "30", UNIT, SWAP_UNIT], ["dmesg"]):
            with contextlib.suppress(Exception):
                print(run(*command, limit=60).stdout[-6000:])


def main() -> None:
    """Show the scenario that is named."""
    name = (PAYLOAD / "scenario").read_text().strip()
    lock_memory()
    kernel, version = os.uname().release, must("systemctl", "--version").splitlines()[0]
    report(kernel=kernel, systemd=version, uptime=time.clock_gettime(time.CLOCK_BOOTTIME))
    with _told():
        if name not in ("install", "broken", "late"):
            run("systemctl", "is-system-running", "--wait", limit=240)
        SCENARIOS[name]()
    report(end=True)
    os.sync()
    subprocess.run(["systemctl", "--no-block", "poweroff"], check=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["storm"]:
        storm(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        threading.stack_size(1 << 20)
        main()
