# SPDX-License-Identifier: MIT
"""The shell scripts of the units, on made-up machines: a folder with proc/, run/, sys/, and programs that log calls."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT, wait_until

LIBEXEC: Final = ROOT / "systemd/libexec"
OTHER: Final = ROOT / "systemd/other"
ONE_SWAP: Final = "Filename Type Size Used Priority\n/dev/loop3 partition 1024 0 100\n"


class MadeUp:
    """A machine that is a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls = root / "calls"
        self.calls.touch()
        (root / "bin").mkdir()

    def file(self, name: str, text: str) -> Path:
        """Write a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def program(self, name: str, body: str = "") -> Path:
        """Make a program that logs its call and then does this."""
        path = self.root / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.calls}\n{body}\n')
        path.chmod(0o755)
        return path

    def run(self, script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script on this machine."""
        return subprocess.run(
            ["sh", script, *arguments],
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of its programs."""
        return {"PATH": f"{self.root}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "ROOT": str(self.root), **more}

    def called(self) -> list[str]:
        """Return the calls of the programs, in their order."""
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> MadeUp:
    """Return an empty machine."""
    return MadeUp(tmp_path)


@pytest.mark.parametrize("script", [*sorted(LIBEXEC.iterdir()), OTHER / "initramfs-hook"], ids=lambda path: path.name)
def test_the_shell_understands_them(script: Path) -> None:
    """Each script is valid for sh."""
    assert script.read_text().startswith("#!/bin/sh\n# SPDX-License-Identifier: MIT\n")
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


# ---- the launcher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "status"), [("", 127), ("0", 127), ("3", 1)])
def test_an_interpreter_that_is_gone(stored: str, status: int, machine: MadeUp) -> None:
    """One line gives the remedy. systemd starts a service again if its mount holds pages."""
    text = (LIBEXEC / "launcher").read_text().replace("/usr/local/lib/zbudfs", str(machine.root / "lib"))
    (machine.root / "lib/bin").mkdir(parents=True)
    (machine.root / "lib/bin/python").symlink_to("/nonexistent/python3.9")
    run = machine.run(machine.file("zbudfs", text), "status", LISTEN_FDS=stored)
    assert run.returncode == status
    assert len(run.stderr.splitlines()) == 1
    assert "make install" in run.stderr


# ---- the swap unit's stop ----------------------------------------------------------------------------------------------


def stop_swap(
    machine: MadeUp, *, status: int, jobs: str = "", swapoff: str = "", state: str = "running"
) -> subprocess.CompletedProcess[str]:
    """Run stop-swap with a zbudfs that ends with this status, and a systemd with these jobs and this state."""
    machine.program("systemctl", f'case $1 in list-jobs) echo "{jobs}" ;; is-system-running) echo "{state}" ;; esac')
    machine.program("swapoff", swapoff)
    machine.program("losetup")
    command = machine.program("zbudfs", f"exit {status}")
    text = (LIBEXEC / "stop-swap").read_text()
    assert "/usr/local/bin/zbudfs" in text
    return machine.run(machine.file("stop-swap", text.replace("/usr/local/bin/zbudfs", str(command))), "swap")


@pytest.mark.parametrize("job", ["restart", "start"])
def test_a_restart_leaves_swap_on(job: str, machine: MadeUp) -> None:
    """A restart of the daemon is a hand-over, so swap stays on."""
    assert stop_swap(machine, status=0, jobs=f" 77 zbudfs@swap.service {job} waiting").returncode == 0
    assert [call for call in machine.called() if not call.startswith("systemctl list-jobs")] == []


def test_a_stop_without_room_is_taken_back(machine: MadeUp) -> None:
    """The script starts the unit again."""
    assert stop_swap(machine, status=1).returncode == 1
    assert machine.called()[1:] == [
        "zbudfs swapoff --config swap",
        "systemctl is-system-running",
        "systemctl --no-block start zbudfs-swap@swap.service",
    ]


@pytest.mark.parametrize(
    ("swap_kib", "committed_kib", "extra_kib"), [(2_000_000, 1_500_000, 500_000), (8_000_000, 1_000_000, 1)]
)
def test_a_shutdown_without_room_does_not_wait_for_swapoff(
    swap_kib: int, committed_kib: int, extra_kib: int, machine: MadeUp
) -> None:
    """The kernel refuses each later swapoff, and room is left to the programs that run."""
    machine.file("proc/meminfo", f"SwapTotal: {swap_kib} kB\nCommitted_AS: {committed_kib} kB\n")
    for name in ("overcommit_kbytes", "overcommit_memory"):
        machine.file(f"proc/sys/vm/{name}", "0\n")
    assert stop_swap(machine, status=1, state="stopping").returncode == 1
    assert "systemctl --no-block start zbudfs-swap@swap.service" not in machine.called()
    sysctl = machine.root / "proc/sys/vm"
    assert (sysctl / "overcommit_memory").read_text() == "2\n"
    assert (sysctl / "overcommit_kbytes").read_text() == f"{extra_kib}\n"
    limit_kib = extra_kib + swap_kib
    assert committed_kib + swap_kib > limit_kib  # a swapoff of all pages is refused
    assert committed_kib < limit_kib  # others have room


@pytest.mark.parametrize("status", [126, 127])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"loop3": "/run/zbudfs.swap/swapfile", "loop4": "/mnt/other/swapfile"}, ["loop3"]),
        ({"loop3": "/run/zbudfs.swap/0/swapfile", "loop4": "/run/zbudfs.swap/1/swapfile"}, ["loop3", "loop4"]),
        ({"loop3": "/mnt/my place/swapfile", "loop4": "/home/image"}, ["loop3"]),
    ],
)
def test_without_the_program_swap_goes_off_all_the_same(
    files: dict[str, str], expected: list[str], status: int, machine: MadeUp
) -> None:
    """swapoff(8) and losetup(8) turn off the swap of zbudfs, and no other swap."""
    lines = "".join(f"/dev/{name} partition 1024 0 100\n" for name in files)
    machine.file("proc/swaps", f"Filename Type Size Used Priority\n/dev/sda2 partition 1024 0 -2\n{lines}")
    for name, file in files.items():
        machine.file(f"sys/block/{name}/loop/backing_file", f"{file}\n")
    assert stop_swap(machine, status=status).returncode == 0
    wanted = [f"{step} /dev/{name}" for name in expected for step in ("swapoff", "losetup --detach")]
    assert machine.called()[2:] == wanted


def test_a_swapoff_that_fails_is_taken_back_too(machine: MadeUp) -> None:
    """A swapoff that fails is treated like one that has no room."""
    machine.file("proc/swaps", ONE_SWAP)
    machine.file("sys/block/loop3/loop/backing_file", "/run/zbudfs.swap/swapfile\n")
    assert stop_swap(machine, status=127, swapoff="exit 1").returncode == 1
    assert machine.called()[-1] == "systemctl --no-block start zbudfs-swap@swap.service"


# ---- sleep -------------------------------------------------------------------------------------------------------------

GROUPS: Final = (
    *("init.scope", "user.slice", "user.slice/session-1.scope", "system.slice", "system.slice/web.service"),
    *("system.slice/web.service/inner", "system.slice/zbudfs@swap.service", "system.slice/zbudfs-swap@swap.service"),
    *("system.slice/dbus.service", "system.slice/systemd-homed.service", "system.slice/systemd-suspend.service"),
    *("other.slice", "other.slice/mine.service"),
    *("other.slice/theirs.service", "stopped.slice", "empty.slice"),
)


class Kernel:
    """The kernel's part of cgroup.freeze: cgroup.events follows a little later."""

    def __init__(self, tree: Path, *, slow: str = "") -> None:
        self._tree = tree
        self._slow = slow
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Kernel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.02):
            for freeze in self._tree.rglob("cgroup.freeze"):
                group = freeze.parent
                frozen = freeze.read_text().strip() == "1" and not (self._slow and group.name == self._slow)
                populated = int(group.name != "empty.slice")
                draft = group / "draft"
                draft.write_text(f"populated {populated}\nfrozen {int(frozen)}\n")
                draft.rename(group / "cgroup.events")


def loop_stat(in_flight: int, *, completed: int = 10) -> str:
    """Return the text of /sys/block/DEVICE/stat for a device with requests in flight."""
    return f"{completed} 0 80 1 {completed} 0 80 1 {in_flight} 1 2 0 0 0 0 0 0\n"


@pytest.fixture
def sleeper(machine: MadeUp) -> MadeUp:
    """Return a machine with cgroups, swap on a loop device, and a daemon in other.slice/mine.service."""
    tree = machine.root / "sys/fs/cgroup"
    machine.file("sys/fs/cgroup/cgroup.controllers", "memory\n")
    for group in GROUPS:
        machine.file(f"sys/fs/cgroup/{group}/cgroup.events", "populated 1\nfrozen 0\n")
        (tree / group / "cgroup.freeze").write_text("1\n" if group == "stopped.slice" else "0\n")
    machine.file("proc/swaps", ONE_SWAP)
    machine.file("proc/self/cgroup", "0::/system.slice/systemd-suspend.service\n")
    machine.file("proc/1/cgroup", "0::/init.scope\n")
    for pid in (100, 101, 102):
        machine.file(f"proc/{pid}/cgroup", "0::/other.slice/mine.service\n")
    machine.file("proc/meminfo", f"MemTotal: {2 << 20} kB\nMemFree: 4 kB\n")
    machine.file("sys/fs/cgroup/memory.reclaim", "")
    machine.file("sys/block/loop3/stat", loop_stat(0))
    area = machine.file("run/zbudfs/mnt-z/board", "")
    area.write_bytes(b"".join(number.to_bytes(8, "little") for number in (9, 9, 9, 9, 100, 101, 102, 1)))
    return machine


def frozen(machine: MadeUp) -> set[str]:
    """Return the cgroups that the script has frozen."""
    tree = machine.root / "sys/fs/cgroup"
    found = {str(path.parent.relative_to(tree)) for path in tree.rglob("cgroup.freeze") if path.read_text() == "1\n"}
    return found - {"stopped.slice"}


def test_all_but_the_daemon_is_frozen_and_thawed(sleeper: MadeUp) -> None:
    """Whole subtrees freeze if the daemon needs nothing of them. A cgroup that another program froze stays frozen."""
    with Kernel(sleeper.root / "sys/fs/cgroup"):
        run = sleeper.run(LIBEXEC / "sleep", "pre", "suspend")
        assert (run.returncode, run.stderr) == (0, "")
        assert frozen(sleeper) == {
            *("user.slice", "system.slice/web.service", "other.slice/theirs.service", "empty.slice"),
        }
        assert sleeper.run(LIBEXEC / "sleep", "post", "suspend").returncode == 0
    assert frozen(sleeper) == set()
    assert (sleeper.root / "sys/fs/cgroup/stopped.slice/cgroup.freeze").read_text() == "1\n"
    assert not (sleeper.root / "run/zbudfs.frozen").exists()


def test_the_status_area_has_the_pids_where_the_script_looks() -> None:
    """The status area has the pids of keeper, worker and standby as three numbers from byte 32 on."""
    from zbudfs.store.status_area import Field

    assert [Field.KEEPER_PID, Field.WORKER_PID, Field.STANDBY_PID] == [4, 5, 6]
    assert "-j 32 -N 24" in (LIBEXEC / "sleep").read_text()


@pytest.mark.parametrize("lacks", ["swap", "cgroup v2"])
def test_nothing_is_frozen_without_need(lacks: str, sleeper: MadeUp) -> None:
    """The script does nothing without swap on a loop device, and reports that it cannot freeze without cgroup v2."""
    if lacks == "swap":
        sleeper.file("proc/swaps", "Filename\n/dev/sda2 partition 1024 0 -2\n")
    else:
        (sleeper.root / "sys/fs/cgroup/cgroup.controllers").unlink()
    run = sleeper.run(LIBEXEC / "sleep", "pre", "suspend")
    assert run.returncode == 0
    assert ("no cgroup v2" in run.stderr) == (lacks == "cgroup v2")
    assert frozen(sleeper) == set()


def test_the_loop_device_is_drained_while_the_daemon_still_serves(sleeper: MadeUp) -> None:
    """The hook frees memory, so that kswapd sleeps, and waits for the requests that kernel threads have sent."""
    stat = sleeper.root / "sys/block/loop3/stat"
    stat.write_text(loop_stat(2))
    with Kernel(sleeper.root / "sys/fs/cgroup"):
        process = subprocess.Popen(["sh", LIBEXEC / "sleep", "pre", "suspend"], env=sleeper.environment())
        try:
            reclaim = sleeper.root / "sys/fs/cgroup/memory.reclaim"
            wait_until(lambda: reclaim.read_text() == f"{(2 << 30) // 64}\n", "the room")
            for completed in range(11, 20):
                time.sleep(0.1)
                assert process.poll() is None
                stat.write_text(loop_stat(0 if completed % 2 else 1, completed=completed))
            assert process.wait(LIMIT_SECONDS) == 0
        finally:
            process.kill()
            process.wait()


def test_a_loop_device_that_stays_busy_is_reported(sleeper: MadeUp) -> None:
    """The script reports the device, and the kernel then decides whether the machine can sleep."""
    text = (LIBEXEC / "sleep").read_text()
    script = sleeper.file("sleep", text.replace("drain_limit=10", "drain_limit=1"))
    (sleeper.root / "sys/block/loop3/stat").write_text(loop_stat(1))
    with Kernel(sleeper.root / "sys/fs/cgroup"):
        run = sleeper.run(script, "pre", "suspend")
    assert run.returncode == 0
    assert run.stderr == "zbudfs: the loop devices of swap still have requests after 1 s: sleep may fail\n"


def test_a_task_that_cannot_be_frozen_is_reported(sleeper: MadeUp) -> None:
    """The wait has a limit, and all cgroups are thawed afterwards."""
    text = (LIBEXEC / "sleep").read_text()
    script = sleeper.file("sleep", text.replace("freeze_limit=10", "freeze_limit=1"))
    assert script.read_text() != text
    with Kernel(sleeper.root / "sys/fs/cgroup", slow="web.service"):
        run = sleeper.run(script, "pre", "suspend")
        assert run.returncode == 0
        assert "/system.slice/web.service" in run.stderr
        assert "/user.slice" not in run.stderr
        sleeper.run(script, "post", "suspend")
    assert frozen(sleeper) == set()


@pytest.fixture
def waiting(sleeper: MadeUp) -> Iterator[subprocess.Popen[bytes]]:
    """Start a `sleep run` whose freezing never ends."""
    with Kernel(sleeper.root / "sys/fs/cgroup", slow="web.service"):
        command = ["sh", str(LIBEXEC / "sleep"), "run", "true"]
        process = subprocess.Popen(command, env=sleeper.environment(), stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: len(frozen(sleeper)) == 4, "freezing")
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_helper_that_is_killed_leaves_nothing_frozen(sleeper: MadeUp, waiting: subprocess.Popen[bytes]) -> None:
    """A second process of `run` thaws after the kill. The list of the hook is there for zbudfs-sleep.service."""
    assert (sleeper.root / "run/zbudfs.frozen").read_text().count("\n") == 4
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    wait_until(lambda: frozen(sleeper) == set(), "the thaw")


def test_run_thaws_and_has_the_status_of_its_command(sleeper: MadeUp) -> None:
    """All cgroups are frozen while the command runs, and thawed afterwards."""
    sleeper.program("look", f"cat {sleeper.root}/sys/fs/cgroup/user.slice/cgroup.freeze >>{sleeper.calls}; exit 7")
    with Kernel(sleeper.root / "sys/fs/cgroup"):
        run = sleeper.run(LIBEXEC / "sleep", "run", "look", "here")
    assert run.returncode == 7
    assert sleeper.called() == ["look here", "1"]
    assert (sleeper.root / "sys/fs/cgroup/zbudfs-sleep/cgroup.procs").read_text() == "0\n"
    assert frozen(sleeper) == set()


def test_a_run_does_not_thaw_what_the_next_one_freezes(sleeper: MadeUp) -> None:
    """The second process of a `run` looks once a second whether the first still lives."""
    sleeper.program("look", f"sleep 1.5; cat {sleeper.root}/sys/fs/cgroup/user.slice/cgroup.freeze >>{sleeper.calls}")
    with Kernel(sleeper.root / "sys/fs/cgroup"):
        assert sleeper.run(LIBEXEC / "sleep", "run", "true").returncode == 0
        assert sleeper.run(LIBEXEC / "sleep", "run", "look", "later").returncode == 0
    assert sleeper.called() == ["look later", "1"]
    assert frozen(sleeper) == set()


def test_the_hook_waits_for_other_hooks(sleeper: MadeUp) -> None:
    """Other hooks may need programs that would be frozen. systemd-sleep runs all hooks at once, as "(sd-...)"."""
    other = subprocess.Popen(["sleep", "60"])
    sleeper.file(f"proc/{os.getpid()}/comm", "(sd-executor)\n")
    children = sleeper.file(f"proc/{os.getpid()}/task/{os.getpid()}/children", "1 2 \n")
    sleeper.file(f"proc/{os.getpid()}/cgroup", "0::/system.slice/systemd-suspend.service\n")
    with Kernel(sleeper.root / "sys/fs/cgroup"):
        process = subprocess.Popen(["sh", LIBEXEC / "sleep", "pre", "suspend"], env=sleeper.environment())
        try:
            time.sleep(0.5)
            assert frozen(sleeper) == set()
            children.write_text(f"{process.pid} \n")
            assert process.wait(LIMIT_SECONDS) == 0
            assert "user.slice" in frozen(sleeper)
        finally:
            process.kill()
            process.wait()
            other.kill()
            other.wait()


# ---- the initramfs, and needrestart ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "swaps", "crypttab", "expected"),
    [
        ("UUID=loop3", "/dev/loop3 partition 900 0 100\n/dev/sda2\tpartition 500 0 -2\n", "", "RESUME=UUID=sda2\n"),
        (
            "UUID=loop3",
            "/dev/loop3 partition 900 0 1\n/dev/sda1 partition 5 0 -2\n/dev/sda2 partition 50 0 -3\n",
            "",
            "RESUME=UUID=sda2\n",
        ),
        ("/dev/loop3", "/dev/loop3 partition 900 0 100\n/dev/zram0 partition 500 0 100\n", "", None),
        (
            "UUID=loop3",
            "/dev/loop3 partition 900 0 100\n/dev/dm-0 partition 500 0 -2\n",
            "swap x /dev/urandom swap\n",
            None,
        ),
        ("UUID=sda2", "/dev/loop3 partition 100 0 100\n/dev/sda2 partition 500 0 -2\n", "", "RESUME=UUID=sda2\n"),
        ("", "/dev/loop3 partition 100 0 100\n", "", "RESUME=\n"),
    ],
)
def test_the_initramfs_never_resumes_from_a_loop_device(
    chosen: str, swaps: str, crypttab: str, expected: str | None, machine: MadeUp
) -> None:
    """If initramfs-tools has chosen a loop device, the hook names the largest other swap."""
    machine.program("blkid", 'case $1 in -U) echo "/dev/$2" ;; *) echo "${5#/dev/}" ;; esac')
    machine.file("proc/swaps", f"Filename Type Size Used Priority\n{swaps}")
    machine.file("etc/crypttab", crypttab)
    auto = machine.file("made/conf/conf.d/zz-resume-auto", f"RESUME={chosen}\n")
    run = machine.run(OTHER / "initramfs-hook", DESTDIR=str(machine.root / "made"))
    assert run.returncode == 0, run.stderr
    assert (auto.read_text() if auto.exists() else None) == expected


def test_a_configured_resume_device_stays(machine: MadeUp) -> None:
    """Then initramfs-tools writes no file of its own, and the hook does nothing."""
    (machine.root / "made/conf/conf.d").mkdir(parents=True)
    assert machine.run(OTHER / "initramfs-hook", DESTDIR=str(machine.root / "made")).returncode == 0
    assert machine.run(OTHER / "initramfs-hook", "prereqs").stdout == ""
    assert list((machine.root / "made/conf/conf.d").iterdir()) == []


@pytest.mark.skipif(shutil.which("perl") is None, reason="no perl")
def test_needrestart_leaves_the_units_alone() -> None:
    """The configuration of needrestart is Perl code that matches the name of a unit with each key of override_rc."""
    program = """
    our %nrconf; my $text = do { local $/; open my $file, "<", $ARGV[0]; <$file> }; eval $text; die $@ if $@;
    for my $unit (@ARGV[1 .. $#ARGV]) {
        my ($found) = grep { $unit =~ /$_/ } keys %{$nrconf{override_rc}};
        print "$unit ", defined $found ? $nrconf{override_rc}{$found} : "restarted", "\\n";
    }
    """
    units = ["zbudfs@swap.service", "zbudfs-swap@swap.service", "web.service"]
    done = subprocess.run(["perl", "-we", f"use strict; no strict 'refs'; {program}", OTHER / "needrestart.conf", *units],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines() == ["zbudfs@swap.service 0", "zbudfs-swap@swap.service 0", "web.service restarted"]
