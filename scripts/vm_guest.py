# SPDX-License-Identifier: MIT
"""Run one scenario inside the virtual machine, as a service. The file /vm/scenario has its name.

The results go to the console as lines of JSON after "@ ": {"check": ..., "ok": ..., "seen": ...}, and at last {"end": true}.
Other lines on the console are for people. The script runs with the system's own Python and imports only the standard library.

The process locks its memory, so that it can observe while all other programs wait for swap. Under pressure it reads files
itself instead of starting programs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import re
import shutil
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
"""Longest wait for a step. Long, since the machine is emulated."""

PF_MEMALLOC_NOIO: Final = 0x00080000
"""Bit in the flags of /proc/PID/stat that PR_SET_IO_FLUSHER sets."""

COMPLAINTS: Final = re.compile(
    r"blocked for more than|hung_task|Out of memory|oom-kill|Read-error|Write-error|I/O error|BUG:|stack trace|soft lockup"
)


TOO_NEW: Final = re.compile("Unknown key '(RestartSteps|RestartMaxDelaySec|RestartMode|SurviveFinalKillSignal)'")
"""Messages of systemd 252 about keys that it does not know and ignores."""


class Failed(Exception):
    """The scenario cannot go on."""


def report(**what: object) -> None:
    """Send a message to the host."""
    print("@ " + json.dumps(what), flush=True)


def check(what: str, ok: bool, seen: object = "") -> bool:
    """Report to the host whether `what` holds, with the observed value. Return `ok`."""
    report(check=what, ok=bool(ok), seen=str(seen))
    return bool(ok)


def run(
    *command: str, limit: float = LIMIT_SECONDS, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program, and print its output to the console too. Raises Failed at the limit."""
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
    """Run a program, and return its output. Raises Failed if the program fails."""
    done = run(*command, limit=limit)
    if done.returncode:
        raise Failed(f"{' '.join(command)} failed ({done.returncode}): {done.stdout.strip().splitlines()[-1:]}")
    return done.stdout


def wait_for(condition: Callable[[], object], what: str, limit: float = LIMIT_SECONDS) -> float:
    """Wait until `condition` is true, and return the seconds of the wait. Raises Failed at the limit."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            if condition():
                return time.monotonic() - began
        if time.monotonic() - began > limit:
            raise Failed(f"waited {limit:g} s for {what}")
        time.sleep(0.2)


# ---- the state of the machine ----------------------------------------------------------------------------------------


def swaps() -> list[list[str]]:
    """Return the words of each line of /proc/swaps."""
    return [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]


def swap_used_mib() -> int:
    """Return the used swap in MiB."""
    return sum(int(words[3]) for words in swaps()) >> 10


def stats() -> dict[str, Any]:
    """Return stats/all.json of the mount."""
    found: dict[str, Any] = json.loads((MOUNTPOINT / "stats/all.json").read_text())
    return found


def status_field(number: int) -> int:
    """Return a number from the status area in the pool directory, which can be read even if no worker answers."""
    with open("/run/zbudfs/run-zbudfs.swap/board", "rb") as file:  # noqa: PTH123
        return int.from_bytes(os.pread(file.fileno(), 8, 8 * number), "little")


KEEPER, WORKER, STANDBY, STANDBY_READY, SERVING, HEARTBEAT, RECOVERIES = 4, 5, 6, 7, 8, 9, 10
BACKING_FD = 43


def show(unit: str, name: str) -> str:
    """Return one property of a unit."""
    return must("systemctl", "show", "-P", name, unit).strip()


def too_new_for_this_kernel() -> list[str]:
    """Return the versions of Linux with a feature that zbudfs needs and this kernel is too old for."""
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return [since for since in ("6.4", "6.9") if (major, minor) < tuple(int(part) for part in since.split("."))]


def kernel_complaints() -> list[str]:
    """Return the lines of the kernel's log since its start that report a problem."""
    return [line for line in must("dmesg", "--notime").splitlines() if COMPLAINTS.search(line)]


def check_kernel(allowed: str = "") -> None:
    """Check that the kernel's log reports no problem."""
    found = [line for line in kernel_complaints() if not allowed or not re.search(allowed, line)]
    check("nothing hung, nobody killed, no I/O error in the kernel's log", not found, found[:3] or "nothing")


def is_alive(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def configure(**keys: object) -> None:
    """Write the drop-in file of this scenario with these keys."""
    folder = Path("/etc/zbudfs/swap.toml.d")
    folder.mkdir(exist_ok=True)
    folder.joinpath("vm.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in keys.items()))


def start_swap(**keys: object) -> None:
    """Turn on swap with these keys of the configuration."""
    run("systemctl", "stop", UNIT)
    configure(**keys)
    must("systemctl", "start", SWAP_UNIT)
    wait_for(lambda: swaps() and stats()["standby_ready"], "swap and a standby")


# ---- load ------------------------------------------------------------------------------------------------------------


NOISE_BYTES: Final = 1536
"""Random bytes in each page of a storm: two such pages, and no more, fit into a frame."""
DENSE_NOISE_BYTES: Final = 640
"""Random bytes in each page of a storm on a dense pool: five such pages fit into a frame."""

LAST_LOOK_SECONDS: Final = 3000.0
"""Longest time for the last check of all pages of a storm. Most are on disk, and the emulated processor is shared."""


class Storm:
    """A program that fills memory with known pages, and reads, checks and rewrites them all the time.

    `noise_bytes` bytes of each page are random, and the rest is text.
    """

    def __init__(self, mib: int, noise_bytes: int = NOISE_BYTES) -> None:
        self.mib = mib
        self._out = Path(f"/run/storm-{os.getpid()}-{time.monotonic_ns()}")
        self._out.write_text("0 0 0 fill")
        command = [sys.executable, __file__, "storm", str(mib), str(noise_bytes), str(self._out)]
        self._process = subprocess.Popen(command, preexec_fn=_ordinary)

    def state(self) -> tuple[int, int, int, str]:
        """Return the number of filled, of checked and of wrong pages, and the name of the phase."""
        filled, checked, wrong, what = self._out.read_text().split()
        return int(filled), int(checked), int(wrong), what

    def wait_filled(self) -> None:
        """Wait until the whole memory is filled."""
        wait_for(lambda: self.state()[3] == "check" or self._process.poll() is not None, "the storm's memory", 900)
        self.must_live()

    def must_live(self) -> None:
        """Raise Failed if the program has ended."""
        if self._process.poll() is not None:
            raise Failed(f"the storm has ended by itself: {self._process.returncode}")

    def wait_progress(self, pages: int = 2000) -> float:
        """Wait until `pages` more pages are checked, and return the seconds of the wait."""
        before = self.state()[1]
        took = wait_for(lambda: self.state()[1] >= before + pages or self._process.poll() is not None, "progress")
        self.must_live()
        return took

    def end(self) -> tuple[int, int]:
        """Make the program check all pages again and end. Return the number of checked and of wrong pages."""
        self.must_live()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(LAST_LOOK_SECONDS)
        _, checked, wrong, what = self.state()
        if what != "done":
            raise Failed(f"the storm did not come to its end: {what}")
        return checked, wrong

    def kill(self) -> None:
        """Kill the program."""
        self._process.kill()
        self._process.wait(LIMIT_SECONDS)


def _ordinary() -> None:
    Path("/proc/self/oom_score_adj").write_text("0")


def storm(mib: int, noise_bytes: int, out: str) -> None:
    """Run as the program of a storm."""
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

    def note(what: str) -> None:
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
            note("fill")
    chance = random.Random(2)
    while not ended:
        first = chance.randrange(count)
        for number in range(first, min(first + 16, count)):  # some pages in order, as in real programs
            look(number)
            if chance.random() < 0.3:
                generations[number] = (generations[number] + 1) & 255
                view[number * PAGE : (number + 1) * PAGE] = page(number)
        note("check")
    for number in range(count):
        look(number)
        if not number & 255:
            note("last")
    note("done")


def stress(mib: int, seconds: int, workers: int = 1) -> subprocess.CompletedProcess[str]:
    """Run stress-ng with verification."""
    words = ["--vm", str(workers), "--vm-bytes", f"{mib}M", "--vm-method", "all", "--verify", "-t", f"{seconds}s"]
    return run("choom", "-n", "0", "--", "stress-ng", *words, limit=seconds + 1200)


# ---- scenarios ---------------------------------------------------------------------------------------------------------


def install() -> None:
    """Install with `make install` from wheels, without a network; configure; enable the unit for the next boot."""
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
    """Boot with the enabled unit: swap is on without a command, and the protections are in force."""
    found = swaps()
    if not check("swap is on after boot, without a command", len(found) == 1, " ".join(found[0]) if found else "none"):
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
    left = [
        str(path) for path in Path("/run/zbudfs").rglob("*") if not re.match(r"\.(commands|mounting|lock)$", path.name)
    ]
    check("no mount has left anything in /run/zbudfs", not left, left or "nothing")
    must("systemctl", "start", SWAP_UNIT)
    check("systemctl start of the swap unit brings both", len(swaps()) == 1, "swap is on")
    check_kernel()


def mounts() -> None:
    """Check mount -t fuse.zbudfs, a line in fstab, and umount."""
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
    """Run stress-ng over 700 MiB with verification, three times, on a pool of 64 MiB and a backing file; then swapoff."""
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
    """Swap twice the machine's RAM, with data that compresses to less than half, and then the patterns of stress-ng."""
    start_swap(size="1900M", pool="96M")
    _press(NOISE_BYTES, "two pages", 0.8)


def dense() -> None:
    """Swap twice the machine's RAM with the dense packing. Five of its pages fit into a frame."""
    start_swap(size="1900M", pool="64M", packing="dense")
    check("the pool is packed densely", stats()["packing"].startswith("dense"), stats()["packing"])
    _press(DENSE_NOISE_BYTES, "four pages and more", 0.25)


def _press(noise_bytes: int, packed: str, most_of_a_page: float) -> None:
    """Swap twice the RAM in pages with `noise_bytes` random bytes. A written page takes at most a part of its size on disk."""
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
    """Return whether a worker other than `old` serves, with a standby."""
    return bool(
        status_field(SERVING)
        and status_field(STANDBY_READY)
        and status_field(WORKER) not in old
        and is_alive(status_field(WORKER))
    )


@contextlib.contextmanager
def storm_of(part: float, size: str) -> Iterator[Storm]:
    """Run a storm of a part of RAM on swap of this size, in this context. At the end, no page may be wrong or lost."""
    start_swap(size=size, pool="96M")
    load = Storm(int(part * (int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10)))
    try:
        load.wait_filled()
        size_of = "as large as RAM" if part == 1 else f"of {part:g} times RAM"
        check(f"a storm {size_of} is in swap", swap_used_mib() > 0, f"{swap_used_mib()} MiB in swap")
        yield load
        checked, wrong = load.end()
        check("no wrong page after all of that", wrong == 0, f"{checked} pages checked, {wrong} wrong")
        check("no page was lost", stats()["lost_pages"] == 0, stats()["lost_pages"])
    finally:
        load.kill()


def handover() -> None:
    """Restart, kill and stop the processes of the daemon, while a program uses the swap that they serve."""
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
    """Install the program again while swap is on. After that, a worker is killed, and the service is restarted."""
    with storm_of(0.75, size="1400M") as load:
        must("make", "-C", "/root/zbudfs", "install", f"WHEELHOUSE={PAYLOAD}/wheels", limit=1800)
        must("systemctl", "daemon-reload")
        load.wait_progress()
        check("make install with swap on", must("zbudfs", "--version").startswith("zbudfs"), "the storm goes on")
        _kill(load, "worker, whose files were replaced", [WORKER])
        _restart(load, 1)
    check_kernel()


def restart() -> None:
    """Kill the keeper, and run `systemctl restart`, while a program uses the swap: swap stays on, on any kernel."""
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
            seen = f"2000 more pages checked in {stalled:.1f} s; status of the service: {show(UNIT, 'StatusText')}"
            check(f"{name}: swap stays on", kept, seen)
    must("zbudfs", "swapoff", "--umount", str(MOUNTPOINT), limit=900)
    check("swapoff --umount takes all of it away", not swaps() and not MOUNTPOINT.is_mount(), "no swap, no mount")
    must("systemctl", "restart", UNIT, SWAP_UNIT)
    check("and it can be started again", len(swaps()) == 1, "swap is on")
    check_kernel()


def _restart(load: Storm, number: int) -> None:
    device, worker = swaps()[0][0], status_field(WORKER)
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
    pids = [status_field(field) for field in fields]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    stalled = load.wait_progress()
    wait_for(
        lambda: served_by(*pids) and status_field(KEEPER) not in pids and is_alive(status_field(KEEPER)),
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
    pid = status_field(number)
    os.kill(pid, signal.SIGSTOP)
    took = wait_for(
        lambda: status_field(number) != pid and not is_alive(pid) and is_alive(status_field(number)), f"another {name}"
    )
    stalled = load.wait_progress()
    check(
        f"SIGSTOP of the {name} is noticed and healed", True, f"after {took:.1f} s; 2000 more pages in {stalled:.1f} s"
    )


def stop() -> None:
    """Stop the service while RAM has no room for the swapped pages: stop fails and swap stays on. With room, it works."""
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
    """Reboot with swap in use, and then power off. The host measures the times."""
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
    """Fill the disk of the backing file: writes are refused, and no page is lost. With room again, writeback goes on."""
    image, place = Path("/var/small.img"), Path("/mnt/small")
    place.mkdir(exist_ok=True)
    must("truncate", "-s", "192M", str(image))
    must("mkfs.ext4", "-q", "-m", "0", str(image))
    # Direct I/O, since a disk behind the page cache needs memory in order to free memory (zbudfs doctor warns of it).
    device = must("losetup", "--show", "--find", "--direct-io=on", str(image)).strip()
    must("mount", device, str(place))
    start_swap(size="1900M", pool="64M", backing=f"{place}/backing")
    ballast = place / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while file.write(bytes(MIB)):
            file.flush()
            if os.statvfs(place).f_bavail * PAGE < 48 * MIB:
                break
    # 64 MiB more than the available RAM: too much for the pool, but not for the disk.
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


# ---- services that cannot start at boot --------------------------------------------------------------------------------

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
"""The unit of a scenario that observes the boot itself: it waits for no other unit."""
BOOT_LIMIT_SECONDS: Final = 600.0
"""Longest wait for multi-user.target. It is longer than the allowed time, so that a slow boot is measured too."""
ALLOWED_BOOTS: Final = 4.0
"""Allowed extra time of a boot with failing services, as a multiple of a boot without zbudfs. Arbitrary: several starts of
Python take long on a shared, emulated processor. A boot that is blocked does not end."""
LIBRARY: Final = Path("/usr/local/lib/zbudfs/lib")


def boot_seconds() -> float:
    """Wait for multi-user.target, and return the seconds from the kernel's start until it was reached. Raises Failed."""
    wait_for(lambda: show("multi-user.target", "ActiveState") == "active", "multi-user.target", BOOT_LIMIT_SECONDS)
    return int(show("multi-user.target", "ActiveEnterTimestampMonotonic")) / 1e6


def boot_again(phase: str) -> None:
    """Reboot, and continue the scenario with this phase."""
    (STATE / "phase").write_text(phase)
    os.sync()
    report(ends="reboot", again=True, **{"with": "no swap"})
    must("systemctl", "--no-block", "reboot")
    time.sleep(LIMIT_SECONDS)


def phase_now() -> str:
    """Return the phase of the scenario; "first" before its first reboot."""
    STATE.mkdir(exist_ok=True)
    return (STATE / "phase").read_text() if (STATE / "phase").exists() else "first"


def write_configuration(name: str, **keys: object) -> None:
    """Write a configuration, and enable its swap for the next boot. The keys are as for `configure`; `text` comes first."""
    text = str(keys.pop("text", "")) + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    Path("/etc/zbudfs", f"{name}.toml").write_text(text)
    must("systemctl", "enable", f"zbudfs-swap@{name}.service")


def check_failed(name: str, words: str) -> None:
    """Check that the unit of a configuration has failed, is listed, and has one line in the log that says why."""
    unit = f"zbudfs@{name}.service"
    failed = must("systemctl", "--failed", "--plain", "--no-legend")
    state, restarts = show(unit, "ActiveState"), show(unit, "NRestarts")
    check(f"{unit} is failed, and listed so", state == "failed" and unit in failed, f"{state}, {restarts} restarts")
    log = must("journalctl", "-b", "-o", "cat", "-u", unit)
    said = [line for line in log.splitlines() if words in line]
    check(f"{unit} says why, once", len(said) == 1 and "Traceback" not in log, said or log.splitlines()[-5:])


def broken() -> None:
    """Boot with services that cannot start: only their swap is missing. A mount that holds pages is tried again for ever."""
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
        check("the foreign file is unchanged", Path("/var/foreign").read_text() == "not ours\n", "unchanged")
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
    os.kill(status_field(KEEPER), signal.SIGKILL)
    wait_for(lambda: int(show(UNIT, "NRestarts")) >= 5, "restarts")
    kept = show(UNIT, "ActiveState") == "activating" and show(UNIT, "NFileDescriptorStore") == "3"
    check("a mount that holds pages is tried again", kept, f"{show(UNIT, 'NRestarts')} restarts")
    _mend_python()
    took = wait_for(lambda: show(UNIT, "ActiveState") == "active" and is_alive(status_field(KEEPER)), "the keeper")
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
    """Rename the folder of the libraries: after an upgrade of the distribution, Python searches in another folder too."""
    (found,) = LIBRARY.glob("python3.*")
    found.rename(LIBRARY / "python3.0")


def _mend_python() -> None:
    version = must("/usr/bin/python3", "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    (LIBRARY / "python3.0").rename(LIBRARY / f"python{version.strip()}")


# ---- a disk that is mounted late ---------------------------------------------------------------------------------------


def late() -> None:
    """Use a backing file on a disk with `nofail`: zbudfs waits for the disk, and makes no file in its empty mountpoint."""
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
        fd = int(status_field(BACKING_FD))
        held = os.readlink(f"/proc/{status_field(WORKER)}/fd/{fd}")  # noqa: PTH115
        device = os.stat(f"/proc/{status_field(WORKER)}/fd/{fd}").st_dev  # noqa: PTH116
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
    """Write a line for the disk with `nofail` into /etc/fstab, and remove other lines with that mountpoint."""
    file = Path("/etc/fstab")
    lines = [line for line in file.read_text().splitlines() if f" {place} " not in line]
    file.write_text("\n".join([*lines, f"{device} {place} ext4 nofail 0 0", ""]))


# ---- login sessions ----------------------------------------------------------------------------------------------------


def session() -> None:
    """Start a daemon from a shell: it survives its session, whose scope is stopped, runs out of memory, and is frozen."""
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
        check("a storm as large as RAM is in swap", swap_used_mib() > 0, f"{swap_used_mib()} MiB")
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
        check("a program of a session is killed for lack of memory", done.returncode != 0, done.returncode)
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
    """Power off while a tmpfs holds more than RAM: swap cannot be turned off, and the machine still ends."""
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
"""Seconds from the setting of the alarm to the alarm, which include the freezing. Arbitrary: the processor is emulated."""


@contextlib.contextmanager
def woken() -> Iterator[None]:
    """Make the host wake the machine every few seconds in this context: from idle by the power button, from RAM by a wake-up.

    The emulated clock does not wake a machine from idle, and an alarm may ring before a busy machine sleeps.
    """
    to_idle = "[s2idle]" in Path("/sys/power/mem_sleep").read_text()
    report(monitor="system_powerdown" if to_idle else "system_wakeup")
    try:
        yield
    finally:
        report(monitor="")


def suspend_counts() -> tuple[int, int]:
    """Return the numbers of successful and of failed suspends."""
    folder = Path("/sys/power/suspend_stats")
    return int((folder / "success").read_text()), int((folder / "fail").read_text())


def frozen_groups() -> list[str]:
    """Return the paths of the frozen cgroups."""
    return [
        str(path.parent) for path in Path("/sys/fs/cgroup").rglob("cgroup.freeze") if path.read_text().strip() == "1"
    ]


def suspend_once() -> bool:
    """Suspend the machine as a user does, and return whether it slept. Raises Failed without an answer of the system."""
    before = suspend_counts()
    wait_for(lambda: show("sleep.target", "ActiveState") == "inactive", "the end of the last sleep")
    with woken():
        must("systemctl", "suspend")
        wait_for(lambda: suspend_counts() != before or show("systemd-suspend.service", "Result") != "success", "sleep")
        # After a failure systemd-sleep tries again, so the machine must be woken until the service has ended.
        wait_for(lambda: show("systemd-suspend.service", "ActiveState") in ("inactive", "failed"), "the end of sleep")
    return suspend_counts() == (before[0] + 1, before[1])


def sleep_() -> None:
    """Suspend to RAM and to idle under a storm, 20 times each. Then the hook and systemd-sleep are killed halfway."""
    modes = [mode for mode in ("s2idle", "deep") if mode in Path("/sys/power/mem_sleep").read_text()]
    check("the kernel offers both ways to sleep", len(modes) == 2, modes)
    ignored = Path("/etc/systemd/logind.conf.d/button.conf")
    ignored.parent.mkdir(exist_ok=True)
    ignored.write_text("[Login]\nHandlePowerKey=ignore\n")
    must("systemctl", "restart", "systemd-logind")
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
            with woken():
                done = run(
                    "/usr/local/lib/zbudfs/libexec/sleep", "run", "rtcwake", "-m", "mem", "-s", str(WAKE_SECONDS)
                )
            slept += done.returncode == 0
        check("sleep run rtcwake -m mem", slept == 3, f"{slept} of 3")
        for victim in ("libexec/sleep\0pre", "system-sleep/zbudfs\0pre", "systemd-sleep\0suspend"):
            with woken():
                _kill_while_frozen(victim)
            wait_for(lambda: not frozen_groups() and show("sleep.target", "ActiveState") == "inactive", "the thaw")
            check(f"kill -9 of {victim.replace(chr(0), ' ')}: all is thawed", not frozen_groups(), "nothing is frozen")
            load.wait_progress()
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
"""A program that kills a process as soon as the first cgroup is frozen. Because of its unit's name, it is not frozen."""


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


# ---- the Debian package ------------------------------------------------------------------------------------------------


def package() -> None:
    """Install, upgrade and remove the Debian package on a machine without a compiler and without PyPI."""
    if phase_now() == "first":
        _package_first_minute()
        _package_upgrade()
        return
    check("swap is on again after the reboot", len(swaps()) == 1, swaps())
    _package_removal()


def _installed_version() -> str:
    return must("dpkg-query", "--show", "--showformat=${Version}", "zbudfs")


def _package_first_minute() -> None:
    there = [name for name in ("gcc", "cc", "pip", "pip3") if shutil.which(name)]
    check("no compiler and no pip", not there, there or "none")
    # Making an initramfs takes an emulated machine ten minutes.
    Path("/etc/initramfs-tools/update-initramfs.conf").write_text("update_initramfs=no\nbackup_initramfs=no\n")
    began = time.monotonic()
    apt = ["apt-get", "-y", "-q", "--no-install-recommends", "install"]
    debs = [str(path) for folder in ("needs", "old") for path in sorted((PAYLOAD / "packages" / folder).glob("*.deb"))]
    done = run(*apt, *debs, limit=1800)
    check(
        "apt-get install ./zbudfs_*.deb",
        done.returncode == 0,
        f"{time.monotonic() - began:.0f} s, {_installed_version()}",
    )
    for unit in (UNIT, SWAP_UNIT):
        check(f"{unit} is not started unasked", show(unit, "ActiveState") == "inactive", show(unit, "ActiveState"))
    began = time.monotonic()
    must("systemctl", "enable", "--now", SWAP_UNIT)
    found = swaps()
    check("systemctl enable --now zbudfs-swap@swap", len(found) == 1, f"{time.monotonic() - began:.0f} s, {found}")
    wait_for(lambda: stats()["standby_ready"], "a standby")
    shown = must("zbudfs", "config", "swap")
    check(
        "zbudfs config swap shows the values and their reasons",
        "pool" in shown and "backing" in shown,
        shown.replace("\n", "; "),
    )
    doctor = run("zbudfs", "doctor")
    said = [line for line in doctor.stdout.splitlines() if line.startswith(("problem", "warning"))]
    known = [line for line in said if too_new_for_this_kernel() and line.split()[1] == "kernel"]
    check("zbudfs doctor has nothing to add", said == known, said or "nothing")
    for command, words in (("top", "textual"), ("exporter", "prometheus")):
        lines = run("zbudfs", command).stdout.splitlines()
        check(
            f"zbudfs {command} without its library says what to install", len(lines) == 1 and words in lines[0], lines
        )
    readme()


def readme() -> None:
    """Run the lines of README that turn swap on and off."""
    text = (PAYLOAD / "packages/README.md").read_text().partition("\n## Swap by hand\n")[2].partition("\n## ")[0]
    lines = [line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith("    zbudfs ")]
    place = Path("/mnt/zswap")
    place.mkdir(exist_ok=True)
    for line in lines:
        if line != "zbudfs top":
            done = run(*line.replace("--size 8G", "--size 512M").split())
            held = done.returncode == 0
            if too_new_for_this_kernel() and "restart" in line:
                held = done.returncode == 1 and "runs on as before" in done.stdout
            check(f"README: {line}", held, done.stdout.strip().splitlines()[-1:] or "no output")
    check("README leaves nothing behind", not place.is_mount() and len(swaps()) == 1, swaps())


def _package_upgrade() -> None:
    ram = int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10
    load = Storm(ram)
    try:
        load.wait_filled()
        check("a storm as large as RAM is in swap", swap_used_mib() > 100, f"{swap_used_mib()} MiB in swap")
        load.wait_progress()
        device, before, old = swaps()[0][0], stats()["version"], stats()["worker_pid"]
        new = str(next((PAYLOAD / "packages/new").glob("*.deb")))
        done = run("apt-get", "-y", "-q", "install", new, limit=1800)
        check("apt-get install of the next version under the storm", done.returncode == 0, _installed_version())
        stalled = load.wait_progress()
        wait_for(lambda: stats()["standby_ready"], "a standby")
        after = stats()["version"]
        if too_new_for_this_kernel():
            said = "goes on with the version before" in done.stdout
            check("no hand-over on this kernel, and the package says so", after == before and said, f"{after} serves")
        else:
            check(
                "the new version serves",
                after != before and stats()["worker_pid"] != old,
                f"{before} before, {after} now",
            )
        check("swap stayed on", swaps()[0][0] == device, f"2000 more pages checked in {stalled:.1f} s")
        if "deep" in Path("/sys/power/mem_sleep").read_text():
            Path("/sys/power/mem_sleep").write_text("deep")
            check("systemctl suspend under the storm", suspend_once(), "the machine slept, and woke up")
            load.wait_progress()
        done = run("apt-get", "-y", "-q", "purge", "zbudfs", limit=1800)
        refused = done.returncode != 0 and "no room" in done.stdout and bool(swaps())
        check("a removal without room is refused", refused, done.stdout.strip().splitlines()[-6:])
        load.wait_progress()
        checked, wrong = load.end()
        check("no wrong page after all of that", wrong == 0, f"{checked} pages checked, {wrong} wrong")
        check("no page was lost", stats()["lost_pages"] == 0, stats()["lost_pages"])
    finally:
        load.kill()
    must("dpkg", "--configure", "-a", limit=900)
    check("the package is whole", "ok installed" in must("dpkg", "-s", "zbudfs"), _installed_version())
    check_kernel(allowed=r"refusing to freeze|Freezing")
    load = Storm(ram)
    load.wait_filled()
    (STATE / "phase").write_text("rebooted")
    os.sync()
    report(ends="reboot", again=True)
    must("systemctl", "--no-block", "reboot")
    time.sleep(LIMIT_SECONDS)


def _package_removal() -> None:
    load = Storm(100)
    load.wait_filled()
    done = run("apt-get", "-y", "-q", "purge", "zbudfs", limit=1800)
    check("apt-get purge zbudfs", done.returncode == 0 and not swaps(), "no swap")
    checked, wrong = load.end()
    check("no wrong page after the removal", wrong == 0, f"{checked} pages checked, {wrong} wrong")
    folders = ("/etc", "/usr/lib", "/usr/bin", "/usr/sbin", "/usr/share", "/var/lib")
    left = [str(path) for folder in folders for path in Path(folder).rglob("*zbudfs*") if "dpkg" not in path.parts]
    check("nothing is left", not left and not MOUNTPOINT.is_mount(), left or "nothing")
    check_kernel()


# ---- hibernation -------------------------------------------------------------------------------------------------------


def hibernate() -> None:
    """Hibernate: refused if swap on zbudfs cannot be turned off; otherwise swap is off before, and on afterwards."""
    phase = phase_now()
    if phase != "first":
        raise Failed("the machine has booted again: the image was not used")
    ram = int(re.findall(r"\d+", Path("/proc/meminfo").read_text())[0]) >> 10
    start_swap(size="1900M", pool="96M")
    _refused("there is no swap for the image", "without other swap")
    must("update-initramfs", "-u", limit=900)
    check("the initramfs does not resume from zbudfs", "loop" not in _resume_device(), _resume_device() or "no device")
    must("mkswap", "/dev/vdc", str(512 << 10))
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
    must("mkswap", "/dev/vdc", str(256 << 10))
    load = Storm(ram * 6 // 10)
    load.wait_filled()
    must("swapon", "--priority", "0", "/dev/vdc")
    _refused("memory and image need", "without room for the image")
    load.wait_progress()
    must("swapoff", "/dev/vdc")
    must("mkswap", "/dev/vdc")
    must("swapon", "--priority", "0", "/dev/vdc")
    before = swaps()
    loops = [words for words in before if "loop" in words[0]]
    # logind asks the kernel for the device of the image. The initramfs does that only if it finds an image.
    number = Path("/dev/vdc").stat().st_rdev
    Path("/sys/power/resume").write_text(f"{os.major(number)}:{os.minor(number)}")
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
        "PM: hibernation: hibernation exit" in kernel and "Image saving failed" not in kernel,
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
    """Return the device from which the initramfs resumes, or an empty string if it resumes from no device."""
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
    "package": package,
}


def lock_memory() -> None:
    """Lock the memory of this process."""
    if ctypes.CDLL(None).mlockall(3):
        print("this process could not lock its memory")


@contextlib.contextmanager
def _errors_reported() -> Iterator[None]:
    """Report an exception that ends the scenario, with the state of the units and the kernel's log."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        check(f"the scenario came to its end ({type(error).__name__})", False, error)
        for command in (["systemctl", "status", "--no-pager", "-n", "30", UNIT, SWAP_UNIT], ["dmesg"]):
            with contextlib.suppress(Exception):
                print(run(*command, limit=60).stdout[-6000:])


def main() -> None:
    """Run the scenario of the payload, and power off."""
    name = (PAYLOAD / "scenario").read_text().strip()
    lock_memory()
    kernel, version = os.uname().release, must("systemctl", "--version").splitlines()[0]
    report(kernel=kernel, systemd=version, uptime=time.clock_gettime(time.CLOCK_BOOTTIME))
    with _errors_reported():
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
