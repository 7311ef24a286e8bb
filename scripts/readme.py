# SPDX-License-Identifier: MIT
"""Run the commands of README.md in a clean Debian. `make readme` runs this script, as root.

    readme.py [--suite trixie|bookworm ...]

Each suite gets a clean folder with that Debian, made by mmdebstrap: no compiler, no library of zbudfs. The source is in it
as a clone. The commands of README run there in order, with the kernel of this machine: real FUSE, loop devices and swap.

    from source    the demonstration, `make install`, and the build of the package
    the package    in a second clean folder: its installation, swap, look and tune

A command ends with status 0 within its limit. A command that needs systemd is skipped: `make test-vm ARGS=package` runs it.
The programs have their own mount and process namespaces, so that they end, and their mounts with them, in any case. First
swap on their loop devices is turned off.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.deb import IN_TREE, RELEASES, clean, copy_of  # noqa: E402  after the path is known
from scripts.vm_image import VmError, run, sources  # noqa: E402

CLONE: Final = "/root/zbudfs"
"""The clone of the repository in the folder."""
TUNED: Final = "/mnt/zswap"
"""The mountpoint of README."""

LIMIT_SECONDS: Final = 300.0
LONG_LIMIT_SECONDS: Final = 1800.0
"""Longest time of a command, and of one that downloads or builds. Arbitrary."""
START_LIMIT_SECONDS: Final = 60.0
TOP_SECONDS: Final = 10
"""Seconds after which `zbudfs top` gets the key q."""

PROGRAMS: Final = ("apt", "apt-get", "make", "mkdir", "rmdir", "systemctl", "zbudfs")
"""First words of the commands. Other indented lines are output, files or pictures."""
SKIPPED: Final = {
    "systemctl": "needs a booted systemd: make test-vm ARGS=package",
    "make setup test": "all tests run from their own target, and on this machine",
    "zbudfs /mnt/zswap": "a line of /etc/fstab: tests/cli/test_mount_helper.py",
}
"""Beginnings of commands that do not run here, each with the reason."""
REFUSED: Final = {("bookworm", "zbudfs top"): "zbudfs status --watch shows the same"}
"""Commands that a Debian cannot run, as README says, each with the message."""
DOCTOR_FOUND: Final = 1
"""Status of `zbudfs doctor` if it reports a problem of this machine."""

KEEP_ALIVE: Final = "echo ready; while :; do sleep 60 & wait; done"
WRITER: Final = r"""
import os, time
file, end = os.open("/mnt/zswap/swapfile", os.O_RDWR), time.monotonic() + 900
number = 0
while time.monotonic() < end and not os.path.exists("/run/readme.end"):
    os.pwrite(file, os.urandom(1024) * 4, number % 4096 * 4096)
    os.pread(file, 4096, number * 7 % 4096 * 4096)
    number += 1
    time.sleep(0.01)
"""
"""A program that writes and reads pages, so that a recording has requests."""


class ReadmeError(Exception):
    """A step failed. The text is for the user."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command of README."""

    section: str
    line: str
    """The command without its comment."""

    @property
    def skipped(self) -> str | None:
        """Return why the command does not run here; None if it runs."""
        return next((reason for start, reason in SKIPPED.items() if self.line.startswith(start)), None)


def commands(text: str) -> list[Command]:
    """Return the commands in the indented blocks of a document."""
    found, section = [], ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("    ") and line.split()[0] in PROGRAMS:
            found.append(Command(section, re.split(r"\s{2,}#", line.strip())[0]))
    return found


def of(section: str) -> list[Command]:
    """Return the commands of a section of README. Raises ReadmeError if there are none."""
    found = [each for each in commands((ROOT / "README.md").read_text()) if each.section == section]
    if not found:
        raise ReadmeError(f"README.md has no commands in the section {section!r}: change scripts/readme.py")
    return found


def named(beginning: str) -> list[Command]:
    """Return the commands that README names in a sentence, which begins like this. Raises ReadmeError if there are none."""
    text = " ".join((ROOT / "README.md").read_text().split())
    sentence = re.split(r"[.:] ", text.partition(beginning)[2])[0]
    found = [each for each in re.findall(r"`(.*?)`", sentence) if each.split()[0] in PROGRAMS]
    if not found:
        raise ReadmeError(f"README.md names no command after {beginning!r}: change scripts/readme.py")
    return [Command(beginning, line) for line in found]


# ---- the machine -----------------------------------------------------------------------------------------------------


def left_behind(mounts: str, loops: str, swaps: str) -> list[list[str]]:
    """Return the commands that end swap on zbudfs, from a mountinfo, the list of loop devices and /proc/swaps."""
    numbers = {line.split()[2] for line in mounts.splitlines() if " - fuse.zbudfs " in line}
    # The kernel names a device by its path outside the folder.
    on = {Path(line.split()[0]).name for line in swaps.splitlines()[1:]}
    found = []
    for device, *backing in (line.split() for line in loops.splitlines()):
        if backing and backing[0] in numbers:
            found += [["swapoff", device]] if Path(device).name in on else []
            found += [["losetup", "--detach", device]]
    return found


class Machine:
    """A Debian in a folder, with its own mounts and processes, and the devices of this machine."""

    def __init__(self, suite: str, tree: Path) -> None:
        self._suite = suite
        self._tree = tree
        self._pid = 0
        """The first process in the folder, as this machine sees it."""
        self.failed: list[str] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start the first process, for this context. At the end all processes end, and all mounts with them."""
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "--pid", "--fork"]
        words += ["--kill-child", "sh", "-c", IN_TREE, str(self._tree), "sh", "-c", KEEP_ALIVE]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as holder:
            try:
                assert holder.stdout is not None  # it is a pipe
                if not select.select([holder.stdout], [], [], START_LIMIT_SECONDS)[0] or not holder.stdout.readline():
                    raise ReadmeError("the folder with Debian does not start: see the messages above")
                self._pid = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
                yield
            finally:
                if self._pid:
                    self._end_swap()
                holder.kill()
                holder.wait(START_LIMIT_SECONDS)

    def _end_swap(self) -> None:
        """Turn swap off on the loop devices of this machine's zbudfs mounts, and detach them."""
        mounts = Path(f"/proc/{self._pid}/mountinfo").read_text()
        loops = run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-MAJ:MIN")
        for words in left_behind(mounts, loops, Path("/proc/swaps").read_text()):
            print(f"  left behind, so: {' '.join(words)}", flush=True)
            subprocess.run(words, timeout=LIMIT_SECONDS, check=False)

    def path(self, name: str) -> Path:
        """Return the path of a file in the folder."""
        return self._tree / name.lstrip("/")

    def call(self, line: str, limit_seconds: float) -> tuple[int, str]:
        """Run a command in the clone, and return its status and output. Status 124 means that the limit ended it."""
        limited = ["timeout", "--kill-after", "10", str(limit_seconds), "bash", "-c", f"cd {CLONE} && {line}"]
        with self.start(*limited) as process:
            try:
                said, _ = process.communicate(timeout=limit_seconds + START_LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return 124, "the command ended and left its output open"
            return process.returncode, said

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a program in the folder."""
        entered = ["nsenter", "--target", str(self._pid), "--mount", "--pid", "--root", "--wd"]
        return subprocess.Popen(
            [*entered, "env", "-i", *environment(), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def do(self, line: str, *, needed: bool = True) -> str:
        """Run a command that README does not name, and return its output. Raises ReadmeError if it fails and is needed."""
        status, said = self.call(line, LONG_LIMIT_SECONDS)
        if status and needed:
            raise ReadmeError(f"{line!r} ended with status {status}: {' | '.join(said.strip().splitlines()[-5:])}")
        return said

    def follow(self, *every: Command) -> None:
        """Run commands of README, and print a line for each."""
        for command in every:
            line = command.line
            if command.skipped:
                print(f"  skipped    {line}\n             {command.skipped}", flush=True)
                continue
            began = time.monotonic()
            limit = LONG_LIMIT_SECONDS if line.startswith(("apt", "make")) else LIMIT_SECONDS
            if line == "zbudfs top":
                line = f"(sleep {TOP_SECONDS}; printf q) | script -qec '{line}' /dev/null"
            status, said = self.call(line, limit)
            refusal = REFUSED.get((self._suite, command.line))
            if refusal is not None:
                fine = status != 0 and refusal in said
            else:
                fine = status == 0 or (command.line == "zbudfs doctor" and status == DOCTOR_FOUND and "-> " in said)
            print(
                f"  {'ok      ' if fine else f'FAILED {status}'}   {command.line}   ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            if not fine:
                self.failed.append(command.line)
                print("\n".join(f"    | {part}" for part in said.strip().splitlines()[-15:]), flush=True)


def environment() -> list[str]:
    """Return the environment of a command, as of a login of root. The proxies and settings of pip are those of this machine."""
    kept = [f"{name}={value}" for name, value in os.environ.items() if re.match(r"(?i)(\w+_proxy|pip_\w+)$", name)]
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return [*kept, path, "HOME=/root", "LC_ALL=C.UTF-8", "TERM=xterm-256color", "DEBIAN_FRONTEND=noninteractive"]


def prepare(tree: Path) -> None:
    """Put the source as a clone into a folder with a Debian, and the settings of this machine's registries."""
    clone = tree / CLONE[1:]
    for name in sources():
        place = clone / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place)
    run("git", "init", "--quiet", clone)
    run("git", "-C", clone, "add", "--all")
    for path in (Path("/etc/pip.conf"), Path("/etc/resolv.conf"), Path("/etc/ssl/certs/ca-certificates.crt")):
        if path.exists():
            (tree / str(path)[1:]).unlink(missing_ok=True)
            shutil.copy(path, tree / str(path)[1:])
    # A user answers apt's question, and has Debian's default for recommended packages.
    (tree / "etc/apt/apt.conf.d/99zz-readme").write_text(
        'APT::Get::Assume-Yes "true";\nAPT::Install-Recommends "true";\n'
    )


@contextlib.contextmanager
def machine(suite: str) -> Iterator[Machine]:
    """Make a clean Debian with the clone, for this context."""
    with copy_of(clean(suite)) as tree:
        prepare(tree)
        made = Machine(suite, tree)
        with made.running():
            made.do("apt-get -q update")
            made.do("apt-get -q install --no-install-recommends git")  # which made the clone
            yield made


# ---- the visits ------------------------------------------------------------------------------------------------------


def visit(suite: str, folder: Path) -> list[str]:
    """Run all commands in a Debian, with the package in `folder` in between. Return the commands that failed."""
    print(f"== {suite}: from source", flush=True)
    with machine(suite) as debian:
        debian.follow(*named("On a fresh Debian 12 or 13"), *of("Try it without installing"))
        debian.follow(*of("Install from source"))
        debian.follow(*(Command("Install from source", line) for line in ("zbudfs --version", "make uninstall")))
        debian.follow(*named("or build it in a clone of this repository"))
        failed = debian.failed
        built = debian.do("ls dist/*.deb", needed=False).split()
        packages = [
            Path(shutil.copy(debian.path(f"{CLONE}/{name}"), folder)) for name in built if name.endswith(".deb")
        ]
    if not packages:
        return failed
    print(f"== {suite}: {packages[0].name}", flush=True)
    with machine(suite) as debian:
        shutil.copy(packages[0], debian.path(CLONE))
        debian.follow(*of("Install"), *of("Swap by hand"))
        _look_and_tune(debian)
    return failed + debian.failed


def _look_and_tune(debian: Machine) -> None:
    """Run the commands that watch a mount, while a program writes to it."""
    debian.do(f"mkdir -p {TUNED} && zbudfs mount --size 64M --pool 16M {TUNED}")
    with debian.start("python3", "-c", WRITER) as writer:
        debian.follow(*of("Look and tune"))
        debian.do("touch /run/readme.end")
        writer.wait(START_LIMIT_SECONDS)
    debian.do(f"zbudfs umount {TUNED}")


def main() -> int:
    """Run README in each suite, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", action="append", choices=tuple(RELEASES), help="Debian (default: each)")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        print("readme: run it as root, and install mmdebstrap: apt-get install mmdebstrap", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    failed = []
    try:
        for suite in options.suite or RELEASES:
            with tempfile.TemporaryDirectory() as folder:
                failed += [f"{suite}: {line}" for line in visit(suite, Path(folder))]
    except (ReadmeError, VmError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return 1
    print("\n".join(["failed:", *(f"  {line}" for line in failed)]) if failed else "every command held")
    return 1 if failed else 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
