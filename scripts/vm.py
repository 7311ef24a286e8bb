# SPDX-License-Identifier: MIT
"""Run scenarios in a virtual machine: an emulated Debian with systemd, on which zbudfs is installed as a user installs it.

    vm.py [--memory 768] [--cpus 2] [--keep DIR] [SCENARIO ...]      without a SCENARIO: all scenarios

    install     `make install` from wheels that were built before; the swap unit is enabled for the next boot
    boot        swap is on after boot; IO flusher, OOM score; mount -t fuse.zbudfs, fstab; stop and start
    acceptance  a pool of 64 MiB, stress-ng over 700 MiB with verification, three times
    pressure    twice the machine's RAM, verified byte for byte, three eighths of it random
    dense       the same with `packing = "dense"`
    restart     kill -9 of the keeper, systemctl restart: no page is lost, also on a kernel without hand-over
    handover    restart, kill -9 of worker, keeper, both and all three, SIGSTOP, under that pressure
    upgrade     `make install` again while swap is on, a kill, a restart
    stop        `systemctl stop` without room in RAM
    reboot      reboot and power-off with swap in use, within a minute each
    full        a disk that fills up under the backing file
    broken      services that cannot start at boot: wrong backing files, a file with an error, no /dev/fuse, another Python
    late        a backing file on a disk that is mounted late, or not at all
    session     a daemon that a shell has started survives the login session
    shutdown    power-off while a tmpfs in swap has no room in RAM
    sleep       suspend to RAM and to idle, 20 times each, under that pressure; the helpers are killed meanwhile
    hibernate   refused without room, and without other swap; with room the machine resumes from the image
    package     the Debian package, without a compiler: first minute, upgrade under a storm, suspend, reboot, removal

The system is Debian 13. With ZBUDFS_VM_SUITE=bookworm in the environment it is Debian 12, whose kernel cannot hand a mount
over after a kill. `install`, `boot`, `acceptance`, `pressure`, `dense`, `restart` and `package` are for both.

Each scenario runs in its own machine, on a copy of the disk that `install` has made. That disk is kept for the same sources.
The results go to docs/evidence/vm-report.md: the script replaces the sections of the scenarios that ran. The exit status is
0 if all checks held. Without QEMU, the script prints one line and does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import deb, vm_image  # noqa: E402  after the path is known
from scripts.vm_guest import SCENARIOS  # noqa: E402
from zbudfs import __version__  # noqa: E402

REPORT: Final = ROOT / "docs/evidence/vm-report.md"
LIMIT_SECONDS: Final[dict[str, float]] = {
    "install": 1800,
    "boot": 1200,
    "acceptance": 2400,
    "reboot": 2400,
    "pressure": 7200,
    "dense": 7200,
    "broken": 1800,
    "late": 1500,
    "session": 1500,
}
"""Longest time for a scenario, after which the machine is ended. Arbitrary: long enough for a slow machine."""
DEFAULT_LIMIT_SECONDS: Final = 3600.0
SECOND_DISK_MIB: Final = {"late": 256, "hibernate": 1536}
"""Size of the second disk, /dev/vdc, of some scenarios. The disk is empty at first."""
MONITOR_SECONDS: Final = 6.0
"""Time between two commands to the monitor. Arbitrary: an emulated machine falls asleep in a shorter time."""
END_LIMIT_SECONDS: Final = 60.0
"""Longest time for a reboot or a power-off with swap in use, as the documents promise."""
END_PATIENCE_SECONDS: Final = 240.0


@dataclass
class Outcome:
    """The result of a scenario."""

    name: str
    machine: str = ""
    seconds: float = 0.0
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    ended: bool = False

    @property
    def held(self) -> bool:
        """Whether the scenario came to its end, and all of its checks held."""
        return self.ended and all(ok for _, ok, _ in self.checks)


class Machine:
    """A running virtual machine. It changes its disks."""

    def __init__(
        self, disks: list[Path], payload: Path, folder: Path, *, image: Path, memory_mib: int, cpus: int
    ) -> None:
        self.console = folder / "console.log"
        self._monitor = folder / "monitor"
        self._monitor.unlink(missing_ok=True)
        self._ended = threading.Event()
        arguments = [
            *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(memory_mib), "-smp", str(cpus)),
            *("-nodefaults", "-display", "none", "-nic", "none", "-no-reboot"),
            *("-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd"), "-append"),
            "root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off systemd.show_status=yes systemd.getty_auto=no"
            " modprobe.blacklist=ahci,kvm_amd,kvm_intel,kvm rtc_cmos.use_acpi_alarm=1"
            f"{' resume=/dev/vdc' if len(disks) > 1 else ''}",
            *("-drive", f"file={disks[0]},if=virtio,format=raw,cache=unsafe,discard=unmap"),
            *("-drive", f"file={payload},if=virtio,format=raw,readonly=on"),
            *(word for disk in disks[1:] for word in ("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe")),
            *("-monitor", f"unix:{self._monitor},server=on,wait=off"),
            *("-serial", f"file:{self.console}", "-device", "virtio-serial-pci"),
            *("-chardev", "stdio,id=out,signal=off", "-device", "virtconsole,chardev=out"),
            *("-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r"),
        ]
        self.process = subprocess.Popen(
            [*vm_image.qemu(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def messages(self, limit_seconds: float) -> Iterator[dict[str, Any]]:
        """Yield the messages of the guest until the machine ends. After the limit, the machine is ended."""
        assert self.process.stdout is not None
        watch = threading.Timer(limit_seconds, self.process.kill)
        watch.start()
        try:
            for line in self.process.stdout:
                text = line.rstrip()
                if not text.startswith("@ "):
                    print(f"    | {text}", flush=True)
                    continue
                with contextlib.suppress(ValueError):
                    yield json.loads(text[2:])
            self.process.wait()
        finally:
            watch.cancel()
            self.process.kill()
            self.process.wait()

    def repeat_in_monitor(self, command: str) -> None:
        """Start to give the monitor of QEMU a command every few seconds; an empty command stops that."""
        self._ended.set()
        if command:
            self._ended = threading.Event()
            threading.Thread(target=self._repeat, args=(command, self._ended), daemon=True).start()

    def _repeat(self, command: str, ended: threading.Event) -> None:
        with socket.socket(socket.AF_UNIX) as monitor, contextlib.suppress(OSError):  # the machine has ended
            monitor.connect(str(self._monitor))
            while not ended.wait(MONITOR_SECONDS) and self.process.poll() is None:
                monitor.sendall(f"{command}\n".encode())
                monitor.recv(1 << 16)


def payload(folder: Path, scenario: str) -> Path:
    """Make a disk with the script of the guest and this project: source and wheels, or its packages and their needs."""
    tree = folder / "payload"
    if scenario == "package":
        shutil.copytree(packages(), tree / "packages")
        shutil.copy(ROOT / "README.md", tree / "packages")
    else:
        for name in vm_image.sources():
            place = tree / "source" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place)
        shutil.copytree(vm_image.wheels(), tree / "wheels")
    shutil.copy(ROOT / "scripts/vm_guest.py", tree / "vm_guest.py")
    (tree / "scenario").write_text(scenario)
    image = folder / "payload.img"
    vm_image.make_ext4(image, tree, 96)
    shutil.rmtree(tree)
    return image


def packages() -> Path:
    """Return a folder with the package in two versions, `old` and `new`, and with the packages that it needs in `needs`."""
    contents = [
        (ROOT / name).read_bytes() for name in vm_image.sources() if not name.startswith(("tests/", "bench/", "docs/e"))
    ]
    tree = vm_image.system(vm_image.USER_PACKAGES)
    folder = vm_image.CACHE / f"packages-{vm_image.key(tree.name, contents)}"
    if not folder.is_dir():
        with vm_image.made(folder) as draft:
            old = deb.build(vm_image.SUITE, __version__, draft / "old")
            deb.build(vm_image.SUITE, f"{__version__}.1", draft / "new")
            for log in draft.rglob("deb.log"):
                log.unlink()
            deb.download_needs(tree, old, draft / "needs")
    return folder


def what_is_installed() -> str:
    """Return a name for the result of `make install`: the same sources give the same name, and so the same disk."""
    parts = [name for name in vm_image.sources() if not name.startswith(("tests/", "bench/", "scripts/vm"))]
    contents = [(name, (ROOT / name).read_bytes()) for name in parts if not name.startswith("docs/") or "/man/" in name]
    return vm_image.key(vm_image.disk().name, vm_image.wheels().name, contents)


def base_of(scenario: str) -> Path:
    """Return the folder of the disk, kernel and initrd with which a scenario begins."""
    return vm_image.disk(vm_image.USER_PACKAGES if scenario == "package" else vm_image.PACKAGES)


def copy_of(image: Path, path: Path) -> Path:
    """Copy a disk, and return the path of the copy."""
    vm_image.run("cp", "--sparse=always", "--reflink=auto", image, path)
    return path


def play(name: str, disk: Path, folder: Path, options: argparse.Namespace) -> Outcome:
    """Run one scenario on a disk, and return its result."""
    print(f"== {name}", flush=True)
    outcome = Outcome(name)
    began = time.monotonic()
    base = base_of(name)
    image = payload(folder, name)
    disks = [disk]
    if name in SECOND_DISK_MIB:
        disks.append(folder / "second.img")
        disks[1].unlink(missing_ok=True)
        vm_image.run("truncate", "-s", f"{SECOND_DISK_MIB[name]}M", disks[1])
    again = True
    while again:
        again = False
        machine = Machine(disks, image, folder, image=base, memory_mib=options.memory, cpus=options.cpus)
        leaving: tuple[str, float] | None = None
        for message in machine.messages(LIMIT_SECONDS.get(name, DEFAULT_LIMIT_SECONDS)):
            if "kernel" in message:
                outcome.machine = f"Linux {message['kernel']}, {message['systemd']}"
            elif "check" in message:
                note(outcome, message["check"], message["ok"], message["seen"])
            elif "monitor" in message:
                machine.repeat_in_monitor(message["monitor"])
            elif "ends" in message:
                leaving, again = (message["ends"], time.monotonic()), message["again"]
                with_what = message.get("with", "swap in use")
                patience = threading.Timer(END_PATIENCE_SECONDS, machine.process.kill)
                patience.daemon = True
                patience.start()
                outcome.ended = not again
            elif "end" in message:
                outcome.ended = True
        if leaving is not None:
            took = time.monotonic() - leaving[1]
            patience.cancel()
            done = "reboot: Restarting system" if leaving[0] == "reboot" else "reboot: Power down"
            if leaving[0] == "hibernation":
                done = "PM: hibernation: "
            orderly = done in machine.console.read_text(errors="replace")
            ok = orderly and took < END_LIMIT_SECONDS
            note(
                outcome,
                f"{leaving[0]} with {with_what} in under a minute",
                ok,
                f"{took:.1f} s{'' if orderly else ', not in order'}",
            )
            again = again and orderly
        if options.keep:
            Path(options.keep).mkdir(parents=True, exist_ok=True)
            shutil.copy(machine.console, Path(options.keep) / f"console-{name}-{len(outcome.checks)}.log")
    outcome.seconds = time.monotonic() - began
    if not outcome.ended:
        note(outcome, "the scenario came to its end", False, "the machine ended early, or took too long")
        print("\n".join(machine.console.read_text(errors="replace").splitlines()[-40:]))
    return outcome


def note(outcome: Outcome, what: str, ok: bool, seen: str) -> None:
    """Print one check, and add it to the result."""
    print(f"  {'ok  ' if ok else 'FAIL'} {what}: {seen}", flush=True)
    outcome.checks.append((what, ok, str(seen)))


# ---- the report --------------------------------------------------------------------------------------------------------


def title(name: str, suite: str) -> str:
    """Return the title of the section of a scenario."""
    return name if suite == "trixie" else f"{name} on {vm_image.SUITES[suite]}"


def section(outcome: Outcome, options: argparse.Namespace) -> str:
    """Return the section of one scenario in the report."""
    summary = (SCENARIOS[outcome.name].__doc__ or "").strip().splitlines()[0]
    verdict = "All of it held." if outcome.held else "Not all of it held."
    lines = [
        f"## {title(outcome.name, vm_image.SUITE)}",
        "",
        summary,
        "",
        f"zbudfs {__version__}, {time.strftime('%Y-%m-%d', time.gmtime())}. {outcome.machine}.",
        f"{options.memory} MiB, {options.cpus} CPUs, emulated; {outcome.seconds:.0f} s. **{verdict}**",
        "",
        "| what | held | seen |",
        "|---|---|---|",
    ]
    for what, ok, seen in outcome.checks:
        cells = [re.sub(r"\s+", " ", text.replace("|", "\\|")) for text in (what, seen)]
        lines.append(f"| {cells[0]} | {'yes' if ok else '**no**'} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def write_report(outcomes: list[Outcome], options: argparse.Namespace) -> None:
    """Write the sections of these scenarios into the report. The sections of other scenarios do not change."""
    old = REPORT.read_text() if REPORT.exists() else ""
    sections = {
        part.splitlines()[0]: f"## {part.rstrip()}\n" for part in re.split(r"^## ", old, flags=re.MULTILINE)[1:]
    }
    sections |= {title(outcome.name, vm_image.SUITE): section(outcome, options) for outcome in outcomes}
    titles = [title(name, suite) for name in SCENARIOS for suite in vm_image.SUITES]
    head = (
        "# In a virtual machine\n\n`make test-vm` writes this page: the scenarios, their kernel, and the result of each check."
        " The system is Debian 13, or 12 where the title says so, with systemd, emulated by QEMU. `make install` has"
        " installed the program.\n"
    )
    REPORT.write_text("\n".join([head, *(sections[each] for each in titles if each in sections)]))


def main() -> int:
    """Run the wanted scenarios, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", type=int, default=768, metavar="MIB", help="RAM of the machine (default: 768)")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="CPUs of the machine (default: 2)")
    parser.add_argument("--keep", metavar="DIR", help="folder for the logs of the console")
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help=f"one of {', '.join(SCENARIOS)} (default: all)"
    )
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"the scenario {unknown[0]} is unknown: write one of {', '.join(SCENARIOS)}")
    if reason := vm_image.why_not():
        print(f"test-vm: skipped, since this machine cannot run a virtual machine ({reason})")
        return 0
    wanted = [name for name in SCENARIOS if name in options.scenarios or not options.scenarios]
    vm_image.CACHE.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory(dir=vm_image.CACHE, prefix="run-") as name:
        folder = Path(name)
        try:
            print("making the machine", flush=True)
            if "package" in wanted:
                wanted.remove("package")
                outcomes.append(
                    play("package", copy_of(base_of("package") / "root.img", folder / "user.img"), folder, options)
                )
                write_report(outcomes, options)
            if not wanted:
                return conclude(outcomes)
            installed = vm_image.CACHE / f"installed-{what_is_installed()}.img"
            if "install" in wanted or not installed.exists():
                disk = copy_of(vm_image.disk() / "root.img", folder / "installed.img")
                outcomes.append(play("install", disk, folder, options))
                write_report(outcomes, options)
                if not outcomes[-1].ended:
                    wanted = []
                for old in vm_image.CACHE.glob("installed-*.img"):
                    old.unlink()
                disk.rename(installed)
            for scenario in wanted:
                if scenario != "install":
                    outcomes.append(play(scenario, copy_of(installed, folder / "disk.img"), folder, options))
                    write_report(outcomes, options)
        except vm_image.VmError as error:
            print(f"test-vm: {error}", file=sys.stderr)
            return 1
    return conclude(outcomes)


def conclude(outcomes: list[Outcome]) -> int:
    """Print whether all scenarios held, and return the exit status."""
    failed = [outcome.name for outcome in outcomes if not outcome.held]
    print(
        f"\n{REPORT.relative_to(ROOT)}: {len(outcomes)} scenarios, {f'not all held: {failed}' if failed else 'all of it held'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    sys.exit(main())
