# SPDX-License-Identifier: MIT
"""The proof in a virtual machine: Debian under systemd, emulated, with everything as a user would install it.

    vm.py [--memory 768] [--cpus 2] [--keep DIR] [SCENARIO ...]      all of them, if none is named

    install     `make install` from wheels that were built before; the swap unit is enabled for the next boot
    boot        swap is there without a hand; IO flusher, OOM score; mount -t fuse.zbudfs, fstab; stop and start
    acceptance  a pool of 64 MiB, stress-ng over 700 MiB with verification, three times
    pressure    twice the machine's RAM, verified byte for byte, three eighths of it random
    dense       the same with `packing = "dense"`
    restart     kill -9 of the keeper, systemctl restart: nothing is lost, also where nothing can be handed over
    handover    restart, kill -9 of worker, keeper, both and all three, SIGSTOP, under that pressure
    upgrade     `make install` again while swap is on, a kill, a restart
    stop        `systemctl stop` without room in RAM
    reboot      reboot and power-off with swap in use, within a minute each
    full        a disk that fills up under the backing file
    broken      what cannot start at boot: backing files, a file with an error, no /dev/fuse, another Python
    late        a backing file on a disk that is mounted late, or not at all
    session     a daemon that a shell has started outlives the login session
    shutdown    power-off while a tmpfs in swap has no room in RAM
    sleep       suspend to RAM and to idle, 20 times each, under that pressure; the helpers are killed meanwhile
    hibernate   refused without room, and without other swap; with room the machine goes on from the image

It is Debian 13; with ZBUDFS_VM_SUITE=bookworm in the environment it is Debian 12, whose kernel cannot hand a mount over after
a kill (`install`, `boot`, `acceptance`, `pressure`, `dense` and `restart` are for both).

Each scenario runs in a machine of its own, on a copy of the disk that `install` has left, which is kept for the same
sources. What was seen goes to docs/vm-report.md: the sections of the scenarios that ran are written anew, the others stay.
Exit status 0 if all of it held. Where there is no QEMU one line says so, and nothing is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
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

from scripts import vm_image  # noqa: E402  after the path is known
from scripts.vm_guest import SCENARIOS  # noqa: E402

REPORT: Final = ROOT / "docs/vm-report.md"
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
"""Longest time for a scenario. Arbitrary and generous: a machine that hangs is ended by it."""
DEFAULT_LIMIT_SECONDS: Final = 3600.0
SECOND_DISK_MIB: Final = {"late": 256, "hibernate": 512}
"""Size of a second disk, /dev/vdc, of these scenarios; it is empty at first."""
END_LIMIT_SECONDS: Final = 60.0
"""Longest time for a reboot or a power-off with swap in use: the promise, not a guess."""
END_PATIENCE_SECONDS: Final = 240.0


@dataclass
class Outcome:
    """What a scenario has shown."""

    name: str
    machine: str = ""
    seconds: float = 0.0
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    ended: bool = False

    @property
    def held(self) -> bool:
        """Whether all of it did."""
        return self.ended and all(ok for _, ok, _ in self.checks)


class Machine:
    """A virtual machine that runs; its disk stays what it made of it."""

    def __init__(self, disks: list[Path], payload: Path, folder: Path, *, memory_mib: int, cpus: int) -> None:
        image = vm_image.disk()
        self.console = folder / "console.log"
        arguments = [
            *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(memory_mib), "-smp", str(cpus)),
            *("-nodefaults", "-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"),
            *("-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd"), "-append"),
            "root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off systemd.show_status=yes systemd.getty_auto=no"
            " modprobe.blacklist=ahci,kvm_amd,kvm_intel,kvm rtc_cmos.use_acpi_alarm=1"
            f"{' resume=/dev/vdc' if len(disks) > 1 else ''}",
            *("-drive", f"file={disks[0]},if=virtio,format=raw,cache=unsafe,discard=unmap"),
            *("-drive", f"file={payload},if=virtio,format=raw,readonly=on"),
            *(word for disk in disks[1:] for word in ("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe")),
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
        """What the guest reports, until the machine ends; after the limit it is ended."""
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


def payload(folder: Path, scenario: str) -> Path:
    """A disk with this project, the wheels and the guest's part."""
    tree = folder / "payload"
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


def what_is_installed() -> str:
    """A name for what `make install` would put on a machine: the same sources give the same disk."""
    parts = [name for name in vm_image.sources() if not name.startswith(("tests/", "bench/", "scripts/vm"))]
    contents = [(name, (ROOT / name).read_bytes()) for name in parts if not name.startswith("docs/") or "/man/" in name]
    return vm_image.key(vm_image.disk().name, vm_image.wheels().name, contents)


def copy_of(image: Path, path: Path) -> Path:
    """A copy of a disk."""
    vm_image.run("cp", "--sparse=always", "--reflink=auto", image, path)
    return path


def play(name: str, disk: Path, folder: Path, options: argparse.Namespace) -> Outcome:
    """Run one scenario on this disk."""
    print(f"== {name}", flush=True)
    outcome = Outcome(name)
    began = time.monotonic()
    image = payload(folder, name)
    disks = [disk]
    if name in SECOND_DISK_MIB:
        disks.append(folder / "second.img")
        disks[1].unlink(missing_ok=True)
        vm_image.run("truncate", "-s", f"{SECOND_DISK_MIB[name]}M", disks[1])
    again = True
    while again:
        again = False
        machine = Machine(disks, image, folder, memory_mib=options.memory, cpus=options.cpus)
        leaving: tuple[str, float] | None = None
        for message in machine.messages(LIMIT_SECONDS.get(name, DEFAULT_LIMIT_SECONDS)):
            if "kernel" in message:
                outcome.machine = f"Linux {message['kernel']}, {message['systemd']}"
            elif "check" in message:
                note(outcome, message["check"], message["ok"], message["seen"])
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
        note(outcome, "the scenario came to its end", False, "the machine ended, or took too long")
        print("\n".join(machine.console.read_text(errors="replace").splitlines()[-40:]))
    return outcome


def note(outcome: Outcome, what: str, ok: bool, seen: str) -> None:
    """Take down one check."""
    print(f"  {'ok  ' if ok else 'FAIL'} {what}: {seen}", flush=True)
    outcome.checks.append((what, ok, str(seen)))


# ---- the report --------------------------------------------------------------------------------------------------------


def title(name: str, suite: str) -> str:
    """Of a scenario's section."""
    return name if suite == "trixie" else f"{name} on {vm_image.SUITES[suite]}"


def section(outcome: Outcome, options: argparse.Namespace) -> str:
    """One scenario in the report."""
    summary = (SCENARIOS[outcome.name].__doc__ or "").strip().splitlines()[0]
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    verdict = "All of it held." if outcome.held else "Not all of it held."
    lines = [
        f"## {title(outcome.name, vm_image.SUITE)}",
        "",
        summary,
        "",
        f"zbudfs {version[1] if version else ''}, {time.strftime('%Y-%m-%d', time.gmtime())}. {outcome.machine}.",
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
    """Put what was seen into the report; sections of other scenarios stay as they are."""
    old = REPORT.read_text() if REPORT.exists() else ""
    sections = {
        part.splitlines()[0]: f"## {part.rstrip()}\n" for part in re.split(r"^## ", old, flags=re.MULTILINE)[1:]
    }
    sections |= {title(outcome.name, vm_image.SUITE): section(outcome, options) for outcome in outcomes}
    titles = [title(name, suite) for name in SCENARIOS for suite in vm_image.SUITES]
    head = (
        "# In a virtual machine\n\nWritten by `make test-vm`, not by hand: what was run, on which kernel, and what was seen."
        " Debian 13, or 12 where it says so, under systemd, emulated by QEMU; the program as `make install` puts it there.\n"
    )
    REPORT.write_text("\n".join([head, *(sections[each] for each in titles if each in sections)]))


def main() -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", type=int, default=768, metavar="MIB", help="of the machine (default: 768)")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="of the machine (default: 2)")
    parser.add_argument("--keep", metavar="DIR", help="put the consoles there")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in SCENARIOS]
    if unknown:
        parser.error(f"there is no scenario {unknown[0]}: write some of {', '.join(SCENARIOS)}")
    if reason := vm_image.why_not():
        print(f"test-vm: skipped, no virtual machine can be had here ({reason})")
        return 0
    wanted = [name for name in SCENARIOS if name in options.scenarios or not options.scenarios]
    vm_image.CACHE.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory(dir=vm_image.CACHE, prefix="run-") as name:
        folder = Path(name)
        try:
            print("making the machine", flush=True)
            installed = vm_image.CACHE / f"installed-{what_is_installed()}.img"
            if "install" in wanted or not installed.exists():
                disk = copy_of(vm_image.disk() / "root.img", folder / "installed.img")
                outcomes.append(play("install", disk, folder, options))
                write_report(outcomes, options)
                if not outcomes[0].ended:
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
    failed = [outcome.name for outcome in outcomes if not outcome.held]
    print(
        f"\n{REPORT.relative_to(ROOT)}: {len(outcomes)} scenarios, {f'not all held: {failed}' if failed else 'all of it held'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    sys.exit(main())
