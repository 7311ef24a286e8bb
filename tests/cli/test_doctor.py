# SPDX-License-Identifier: MIT
"""The doctor, on made-up machines with missing parts, and on this machine for the checks that try something."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import LIMIT_SECONDS, mounted, run_zbudfs
from zbudfs.cli.doctor import disk, kernel, rights, sleep, software, swap
from zbudfs.cli.doctor.examine import CHECKS, as_json, as_page, examine
from zbudfs.cli.doctor.finding import Finding, Level, Machine, ok, problem
from zbudfs.cli.main import main
from zbudfs.service import disks
from zbudfs.service.settings import Settings
from zbudfs.swap.attach import release
from zbudfs.swap.loop import run_tool

ALL_CAPABILITIES = "000001ffffffffff"
MOUNTINFO = """\
22 27 0:21 / /proc rw - proc proc rw
27 1 8:2 / / rw - ext4 /dev/sda2 rw
28 27 0:30 / /net rw - nfs4 server:/x rw
29 27 0:31 / /other\\040fuse rw - fuse.sshfs x rw
30 27 0:32 / /tmp rw - tmpfs tmpfs rw
31 27 8:3 / /cow rw - btrfs /dev/sda3 rw
32 27 7:0 / /image rw - ext4 /dev/loop0 rw
33 27 254:0 / /crypt rw - ext4 /dev/dm-0 rw
34 27 8:4 / /cow/ext4 rw - ext4 /dev/sda4 rw
35 1 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw
36 1 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
"""


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """Make a machine on which its files show no problem."""
    files = {
        "proc/sys/kernel/osrelease": "6.9.0-generic",
        "proc/sys/fs/fuse/default_request_timeout": "0",
        "proc/sys/fs/fuse/max_request_timeout": "0",
        "proc/pressure/memory": "some avg10=0.00",
        "proc/cmdline": "quiet",
        "proc/meminfo": "MemTotal: 8388608 kB",
        "proc/self/status": f"Name:\tx\nCapEff:\t{ALL_CAPABILITIES}",
        "proc/self/limits": "Max locked memory         8388608              8388608              bytes",
        "proc/self/cgroup": "0::/user.slice/a",
        "proc/self/mountinfo": MOUNTINFO,
        "proc/swaps": "Filename Type Size Used Priority",
        "dev/fuse": "",
        "dev/loop-control": "",
        "sys/module/zswap/parameters/enabled": "N",
        "sys/block/.keep": "",
    }
    for name, text in files.items():
        put(tmp_path, name, text)
    for name in software.PROGRAMS:
        put(tmp_path, f"usr/sbin/{name}", "")
        (tmp_path / "usr/sbin" / name).chmod(0o755)
    (tmp_path / "var/lib").mkdir(parents=True)
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    """Write a file of a made-up machine."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def machine(
    root: Path, backing: str | None = "/var/lib/x", priority: int | None = None, pool: int = 64 << 20
) -> Machine:
    """Return a machine with settings."""
    settings = Settings(mountpoint="/mnt/z", size_bytes=1 << 20, pool_bytes=pool, backing=backing)
    return Machine(root=str(root), settings=settings, priority=priority)


def only(findings: Iterator[Finding]) -> Finding:
    """Return the only finding of a check."""
    (finding,) = findings
    return finding


def test_a_healthy_machine(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is ok, each finding has a text, and none needs a remedy."""
    monkeypatch.setattr(rights, "in_child", lambda step: None)
    findings = examine(machine(healthy))
    wrong = [finding for finding in findings if finding.level is not Level.OK and finding.check != "direct I/O"]
    assert wrong == []
    assert len(findings) >= len(CHECKS)
    assert all(finding.text and (not finding.remedy) == (finding.level is Level.OK) for finding in findings)


@pytest.mark.parametrize(
    ("release", "lacking"),
    [
        ("6.9.0", []),
        ("7.0-rc1", []),
        ("6.8.12-1-pve", ["FUSE_NOTIFY_RESEND"]),
        ("6.1.0-18-amd64", ["noswap", "FUSE_NOTIFY_RESEND"]),
        ("5.10.0", ["MADV_POPULATE", "noswap", "FUSE_NOTIFY_RESEND"]),
        ("5.4.0", ["IO flusher", "MADV_POPULATE", "noswap", "FUSE_NOTIFY_RESEND"]),
    ],
)
def test_missing_functions_of_a_kernel(healthy: Path, release: str, lacking: list[str]) -> None:
    """Each missing function has one line with its consequence. A missing IO flusher mode is a problem."""
    put(healthy, "proc/sys/kernel/osrelease", release)
    findings = list(kernel.check_version(machine(healthy)))
    if not lacking:
        assert [finding.level for finding in findings] == [Level.OK]
        return
    assert len(findings) == len(lacking)
    for finding, name in zip(findings, lacking, strict=True):
        assert f"has no {name}" in finding.text
        assert finding.level is (Level.PROBLEM if name == "IO flusher" else Level.WARNING)


def test_a_kernel_that_makes_no_sense(healthy: Path) -> None:
    """A kernel version that makes no sense is a warning and no error."""
    put(healthy, "proc/sys/kernel/osrelease", "unknown")
    assert only(kernel.check_version(machine(healthy))).level is Level.WARNING


Check = Callable[[Machine], Iterator[Finding]]


def can_sleep(root: Path, *missing: str) -> Machine:
    """Make a machine that can sleep, with everything that `make install` brings, except for the named parts."""
    files = {
        "sys/power/state": "freeze mem disk",
        "sys/power/disk": "[platform] shutdown",
        "run/systemd/system/.keep": "",
        "sys/fs/cgroup/cgroup.controllers": "memory",
        sleep.HOOK.lstrip("/"): "",
        f"usr/local/lib/systemd/system/{sleep.DROP_IN}": "",
    }
    for name, text in files.items():
        if name not in missing:
            put(root, name, text)
    return machine(root)


def test_a_machine_that_can_sleep(healthy: Path) -> None:
    """With everything installed the check is ok. A machine that cannot sleep needs nothing."""
    checks = (sleep.check_suspend, sleep.check_hibernation)
    for check in checks:
        assert only(check(machine(healthy))).level is Level.OK
        assert "cannot" in only(check(machine(healthy))).text
    assert [only(check(can_sleep(healthy))).level for check in checks] == [Level.OK, Level.OK]
    put(healthy, "sys/power/disk", "[disabled]")
    assert "cannot" in only(sleep.check_hibernation(machine(healthy))).text


@pytest.mark.parametrize(
    ("missing", "check", "remedy"),
    [
        ("run/systemd/system/.keep", sleep.check_suspend, "freeze all other programs"),
        ("sys/fs/cgroup/cgroup.controllers", sleep.check_suspend, "unified_cgroup_hierarchy"),
        ("usr/lib/systemd/system-sleep/zbudfs", sleep.check_suspend, "make install"),
        ("run/systemd/system/.keep", sleep.check_hibernation, "zbudfs hibernate prepare"),
        (f"usr/local/lib/systemd/system/{sleep.DROP_IN}", sleep.check_hibernation, "make install"),
    ],
)
def test_missing_parts_for_sleep(healthy: Path, missing: str, check: Check, remedy: str) -> None:
    """Each missing part gives a warning with the remedy."""
    finding = only(check(can_sleep(healthy, missing)))
    assert finding.level is Level.WARNING
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("name", "text", "check", "level", "words"),
    [
        ("proc/sys/fs/fuse/max_request_timeout", "30", kernel.check_timeouts, "problem", "fs.fuse.max_request_timeout"),
        ("proc/sys/fs/fuse/default_request_timeout", "9", kernel.check_timeouts, "problem", "sysctl"),
        ("sys/module/zswap/parameters/enabled", "Y", swap.check_zswap, "warning", "compresses again the pages"),
        ("proc/self/status", "CapEff: 00000000a80425fb", rights.check_capabilities, "problem", "CAP_SYS_ADMIN"),
        ("proc/self/status", "CapEff: 1fffff7ffff", rights.check_capabilities, "problem", "CAP_SYS_PTRACE"),
        ("proc/self/status", "CapEff: 0", rights.check_memlock, "problem", "8 MiB: the daemon itself may be swapped"),
        ("sys/fs/cgroup/user.slice/memory.max", str(96 << 20), rights.check_cgroup, "problem", "96 MiB"),
        ("sys/fs/cgroup/user.slice/a/memory.max", str(1 << 30), rights.check_cgroup, "warning", "1 GiB"),
        ("sys/fs/cgroup/user.slice/a/memory.max", "max", rights.check_cgroup, "ok", "no limit"),
    ],
)
def test_findings_from_single_files(healthy: Path, name: str, text: str, check: Check, level: str, words: str) -> None:
    """The check that reads a changed file reports it."""
    put(healthy, name, text)
    findings = [finding for finding in check(machine(healthy)) if words in finding.text + finding.remedy]
    assert [finding.level for finding in findings] == [level]


@pytest.mark.parametrize("name", ["dev/fuse", "dev/loop-control", "usr/sbin/mkswap", "proc/pressure/memory"])
def test_a_missing_file(healthy: Path, name: str) -> None:
    """Exactly one finding changes."""
    checks = (kernel.check_fuse, kernel.check_loop, software.check_programs, kernel.check_psi)
    assert [only(check(machine(healthy))).level for check in checks] == [Level.OK] * 4
    (healthy / name).unlink()
    wrong = [only(check(machine(healthy))) for check in checks]
    assert len([finding for finding in wrong if finding.level is not Level.OK and finding.remedy]) == 1


def test_memlock_without_a_limit(healthy: Path) -> None:
    """Without a limit on locked memory, capabilities do not matter."""
    put(healthy, "proc/self/status", "CapEff: 0")
    put(healthy, "proc/self/limits", "Max locked memory         unlimited            unlimited            bytes")
    assert only(rights.check_memlock(machine(healthy))).level is Level.OK


def test_a_cgroup_of_version_1(healthy: Path) -> None:
    """Version 1 has another name and place for the limit. A number beyond all memory means no limit."""
    put(healthy, "proc/self/cgroup", "5:cpu:/x\n4:memory:/x/y\n0::/")
    put(healthy, "sys/fs/cgroup/memory/x/y/memory.limit_in_bytes", "9223372036854771712")
    assert only(rights.check_cgroup(machine(healthy))).level is Level.OK
    put(healthy, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", str(100 << 20))
    assert only(rights.check_cgroup(machine(healthy))).level is Level.PROBLEM


@pytest.mark.parametrize(
    ("code", "options", "remedy"),
    [
        (errno.EOPNOTSUPP, "quiet", "psi=1"),
        (errno.ENOENT, "quiet", "CONFIG_PSI"),
        (errno.ENOENT, "psi=0 quiet", "boot without psi=0"),
    ],
)
def test_why_there_is_no_pressure(healthy: Path, code: int, options: str, remedy: str) -> None:
    """The remedy differs if PSI is turned off at boot, turned off by the user, or not built."""
    put(healthy, "proc/cmdline", options)
    assert remedy in kernel.psi_missing(code, machine(healthy)).remedy


@pytest.mark.parametrize(
    ("swaps", "priority", "level", "words"),
    [
        ("", None, "ok", "none"),
        ("/dev/sda5 partition 1048576 0 -2", None, "ok", "is filled after zbudfs, whose priority is 50"),
        ("/dev/sda5 partition 1048576 0 70", None, "ok", "is filled after zbudfs, whose priority is 71"),
        ("/dev/sda5 partition 1048576 0 -2", 5, "ok", "is filled after zbudfs, whose priority is 5"),
        ("/dev/sda5 partition 1048576 0 10", 5, "warning", "set priority = 11 or higher"),
        ("/dev/sda5 partition 1048576 0 5", 5, "warning", "the same priority"),
        ("/dev/zram0 partition 1048576 0 100", 200, "warning", "compressed memory too"),
    ],
)
def test_other_swap(healthy: Path, swaps: str, priority: int | None, level: str, words: str) -> None:
    """The finding names the order of the swaps, and what to do about it."""
    put(healthy, "proc/swaps", f"Filename Type Size Used Priority\n{swaps}")
    finding = only(swap.check_other_swap(machine(healthy, priority=priority)))
    assert finding.level == level
    assert words in f"{finding.text} {finding.remedy}"


@pytest.mark.parametrize(
    ("backing", "level", "words"),
    [
        ("/srv/x", "ok", "on ext4"),
        ("/net/x", "problem", "nfs4"),
        ("/other fuse/x", "problem", "fuse.sshfs"),
        ("/tmp/x", "problem", "which is memory"),
        ("/cow/x", "warning", "btrfs"),
        ("/cow/ext4/x", "ok", "on ext4"),
        ("/image/x", "problem", "/dev/loop0"),
        ("/crypt/x", "problem", "/dev/zram1"),
        ("/netx/x", "ok", "on ext4"),
    ],
)
def test_places_of_a_backing_file(healthy: Path, backing: str, level: str, words: str) -> None:
    """The check knows network, FUSE, memory, copy-on-write, loop, and the disks below a mapped device."""
    sys = healthy / "sys"
    for number, name in (("8:2", "sda/sda2"), ("8:4", "sda/sda4"), ("7:0", "loop0"), ("254:0", "dm-0")):
        (sys / "devices" / name).mkdir(parents=True)
        (sys / "dev/block").mkdir(parents=True, exist_ok=True)
        (sys / "dev/block" / number).symlink_to(f"../../devices/{name}")
    for name in ("sda/sda2", "sda/sda4"):
        (sys / "devices" / name / "partition").touch()
    (sys / "devices/zram1").mkdir()
    (sys / "devices/dm-1/slaves").mkdir(parents=True)
    (sys / "devices/dm-1/slaves/zram1").symlink_to("../../zram1")
    (sys / "devices/dm-0/slaves").mkdir()
    (sys / "devices/dm-0/slaves/dm-1").symlink_to("../../dm-1")
    finding = next(disk.check_backing(machine(healthy, backing)))
    assert (finding.level, finding.check) == (level, "backing file")
    assert words in finding.text


def test_mountpoints_that_users_choose(healthy: Path) -> None:
    """A FUSE file system of a user, mounted at any name, ends no line and hides no other mount."""
    odd = b"/home/u/a\x0bb\r99 1 0:99 / / rw - tmpfs x rw\x0c\xe2\x80\xa8\xff"
    mountinfo = healthy / "proc/self/mountinfo"
    mountinfo.write_bytes(
        mountinfo.read_bytes() + b"40 27 0:77 / " + odd.replace(b" ", b"\\040") + b" rw - fuse x rw\n"
    )
    for path, fstype, device in (("/srv/x", "ext4", "8:2"), (os.fsdecode(odd) + "/x", "fuse", "0:77")):
        row = disks.mount_of(path, str(healthy))
        assert (row.fstype, row.device) == (fstype, device)
    assert only(rights.check_cgroup(machine(healthy))).level is Level.OK


@pytest.mark.parametrize(
    ("page_bytes", "words"), [(4096, "4 KiB"), (16384, "16 KiB: 4 pages of zbudfs"), (65536, "64 KiB")]
)
def test_the_page_of_the_kernel(healthy: Path, page_bytes: int, words: str) -> None:
    """The finding has the page size of the kernel, and the consequence of a larger one."""
    finding = only(kernel.check_page_size(replace(machine(healthy), page_bytes=page_bytes)))
    assert finding.level is Level.OK
    assert words in finding.text


def test_swap_that_was_turned_off(healthy: Path) -> None:
    """The check reports a mount whose loop device was swap, and one that a configuration wants as swap."""
    put(healthy, "proc/self/mountinfo", "50 27 0:99 / /mnt/z rw - fuse.zbudfs zbudfs rw,user_id=0")
    here = machine(healthy)
    assert list(swap.check_swap_is_on(here)) == []
    wanted = only(swap.check_swap_is_on(replace(here, swap=True)))
    assert (wanted.level, wanted.remedy) == (Level.WARNING, "turn it on again with zbudfs swapon /mnt/z")
    put(healthy, "sys/block/loop7/loop/backing_file", "/mnt/z/swapfile")
    put(healthy, "sys/block/loop7/loop/dio", "1")
    assert list(swap.check_swap_is_on(here)) == []
    put(healthy, "sys/block/loop7/queue/rq_affinity", "2")
    found = only(swap.check_swap_is_on(here))
    assert "its swap is off, though /dev/loop7 is still attached" in found.text
    assert "zbudfs swapoff /mnt/z" in found.remedy
    put(healthy, "proc/swaps", "Filename Type Size Used Priority\n/dev/loop7 partition 1048576 0 50")
    assert list(swap.check_swap_is_on(replace(here, swap=True))) == []


def test_figures_of_a_container(healthy: Path) -> None:
    """Behind lxcfs in /proc, nothing is known about swap."""
    assert list(swap.check_container(machine(healthy))) == []
    put(healthy, "proc/self/mountinfo", "60 22 0:77 /proc/swaps /proc/swaps rw - fuse.lxcfs lxcfs rw")
    assert "/proc/swaps is the container's own" in only(swap.check_container(machine(healthy))).text


def test_no_backing_file(healthy: Path) -> None:
    """No backing file is a valid choice."""
    assert only(disk.check_backing(machine(healthy, None))).level is Level.OK


def test_a_symbolic_link_as_backing_file(healthy: Path) -> None:
    """The daemon would refuse a symbolic link."""
    (healthy / "var/lib/x").symlink_to("/etc/passwd")
    assert "symbolic link" in only(disk.check_backing(machine(healthy))).text


def test_room_for_the_backing_file(healthy: Path) -> None:
    """The check compares the free room with the room that may be needed."""
    free = shutil.disk_usage(healthy).free
    for size, level in ((1 << 20, Level.OK), ((free // 4096 + (1 << 24)) * 4096, Level.WARNING)):
        settings = Settings(mountpoint="/mnt/z", size_bytes=size, pool_bytes=1 << 20, backing="/var/lib/none/x")
        findings = list(disk.check_backing(Machine(root=str(healthy), settings=settings)))
        assert [finding.level for finding in findings if finding.check == "backing room"] == [level]


def test_direct_io_is_really_tried(tmp_path: Path) -> None:
    """The check opens a file with direct I/O, where this works and where not, and leaves nothing there."""
    finding = disk._direct_io(Path("/proc"), "/proc/x", device=False)
    assert (finding.level, finding.check) == (Level.WARNING, "direct I/O")
    before = list(tmp_path.iterdir())
    try:
        os.close(os.open(tmp_path, os.O_RDWR | os.O_DIRECT | os.O_TMPFILE))
        expected = Level.OK
    except OSError:
        expected = Level.WARNING
    assert disk._direct_io(tmp_path, "x", device=False).level is expected
    assert list(tmp_path.iterdir()) == before


def test_a_child_tries() -> None:
    """A step runs in another process, and its result or failure comes back."""
    before = resource.getrlimit(resource.RLIMIT_CORE)

    def limit() -> str:
        resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
        return str(os.getpid())

    def fail() -> str | None:
        raise KeyError("some key")

    assert rights.in_child(limit) not in (None, str(os.getpid()))
    assert resource.getrlimit(resource.RLIMIT_CORE) == before
    assert rights.in_child(lambda: None) is None
    assert "some key" in str(rights.in_child(fail))


def test_a_refusal_is_a_finding(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of the step is split into the meaning and the remedy."""
    monkeypatch.setattr(rights, "in_child", lambda step: "it was refused: that is bad; do something")
    findings = list(rights.check_protections(machine(healthy)))
    assert len(findings) == 4
    assert {(finding.text, finding.remedy) for finding in findings} == {("it was refused: that is bad", "do something")}
    assert Level.OK not in {finding.level for finding in findings}


def test_a_machine_without_anything(tmp_path: Path) -> None:
    """No check ends the others, whatever is missing."""
    put(tmp_path, "proc/meminfo", "MemTotal: 1048576 kB")
    findings = examine(machine(tmp_path))
    assert len(findings) >= len(CHECKS)
    assert sum("this check failed" in finding.text for finding in findings) >= 4


def test_libraries_that_cannot_be_loaded(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding has the library's own error."""
    monkeypatch.setattr(software, "_LOAD", "import zbudfs.no_such_module")
    finding = only(software.check_libraries(machine(healthy)))
    assert finding.level is Level.PROBLEM
    assert "no_such_module" in finding.text


def test_the_page() -> None:
    """The page has columns and remedies below, and breaks lines only at the edge."""
    findings = [ok("one", "fine"), problem("the other", "word " * 30 + "end", "do this")]
    assert as_page(findings).splitlines() == [
        "ok       one        fine",
        f"problem  the other  {'word ' * 30}end",
        "                    -> do this",
        "",
        "1 problems, 0 warnings",
    ]
    assert max(map(len, as_page(findings, 60).splitlines())) <= 60
    assert json.loads(as_json(findings))["findings"][0] == {"level": "ok", "check": "one", "text": "fine", "remedy": ""}


@pytest.mark.needs("root", "fuse")
def test_this_machine() -> None:
    """The whole report of this machine has an exit status that agrees with it."""
    run = run_zbudfs("doctor", "--json", "--backing", "none")
    found: dict[str, Any] = json.loads(run.stdout)
    levels = [finding["level"] for finding in found["findings"]]
    assert (found["problems"], found["warnings"]) == (levels.count("problem"), levels.count("warning"))
    assert run.returncode == (1 if found["problems"] else 0)
    by_check = {finding["check"]: finding for finding in found["findings"]}
    assert "pyfuse3" in by_check["libraries"]["text"]
    for check in ("kernel", "fuse", "libraries", "programs"):
        assert by_check[check]["level"] == "ok", by_check[check]
    capable = by_check["capabilities"]["level"] == "ok"
    assert (by_check["IO flusher"]["level"] == "ok") == capable


@pytest.mark.needs("root", "fuse", "loop")
def test_a_backing_file_on_real_ones(tmp_path: Path) -> None:
    """The check knows a backing file on a zbudfs, and one on a loop device."""
    with mounted(tmp_path / "mnt") as mountpoint:
        out = run_zbudfs("doctor", "--backing", mountpoint / "swapfile").stdout
        assert "on fuse.zbudfs: another program" in out
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    device = run_tool(["losetup", "--find", "--show", str(tmp_path / "image")], limit_seconds=LIMIT_SECONDS)
    try:
        out = run_zbudfs("doctor", "--backing", device).stdout
        assert f"on {device}, which hides a network or another file system" in out
    finally:
        release(device)


def test_a_configuration(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checks use the values of the configuration, its warnings are printed, and its errors are errors."""
    put(healthy, "etc/zbudfs/good.toml", 'backing = "/net/x"\nnonsense = 1\npool = "10%"')
    put(healthy, "etc/zbudfs/bad.toml", "size = 1")
    assert main(["doctor", "--root", str(healthy), "good"]) == 1
    out = capsys.readouterr().out
    assert "'nonsense' is unknown" in out
    assert "on nfs4" in out
    assert main(["doctor", "--root", str(healthy), "bad"]) == 1
    assert capsys.readouterr().err.startswith("zbudfs: /etc/zbudfs/bad.toml: size")


@pytest.mark.parametrize(
    ("ram", "packing", "level", "words"),
    [
        (
            256,
            "zbud",
            "warning",
            "the pool can save nothing; with the default size and pool, zbudfs does not pay below 288 MiB of RAM",
        ),
        (256, "zbud", "warning", "use --packing dense, zram if the kernel has it, or swap on a disk"),
        (256, "dense", "ok", "which saves 127.8 MiB (75.4 MiB with the memory of typical programs)"),
        (512, "zbud", "ok", "zbudfs itself takes 65.2 MiB (processes 60 MiB, buffers 3 MiB, tables 2.2 MiB)"),
        (8192, "zbud", "ok", "and the pool 2 GiB, of this machine's 8 GiB of RAM"),
    ],
)
def test_the_memory_of_zbudfs(
    healthy: Path, ram: int, packing: str, level: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine with little RAM, zbudfs may take more than it saves. The numbers are in JSON."""
    put(healthy, "proc/meminfo", f"MemTotal: {ram * 1024} kB")
    put(healthy, "etc/zbudfs/swap.toml", f'packing = "{packing}"')
    main(["doctor", "--root", str(healthy), "--json", "swap"])
    found = json.loads(capsys.readouterr().out)
    (finding,) = (each for each in found["findings"] if each["check"] == "memory")
    assert finding["level"] == level
    assert words in f"{finding['text']} {finding['remedy']}"
    assert found["memory"]["ram_bytes"] == ram << 20
    assert found["memory"]["is_worthwhile"] is (level == "ok")


def test_instances_take_more(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each instance has its own processes, so several take more."""
    put(healthy, "etc/zbudfs/swap.toml", "instances = 4")
    main(["doctor", "--root", str(healthy), "swap"])
    assert "(processes 240 MiB, buffers" in capsys.readouterr().out
