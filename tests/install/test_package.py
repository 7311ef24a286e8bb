# SPDX-License-Identifier: MIT
"""The Debian package has the program's version, and its scripts do the right things at a removal and an upgrade."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from scripts import deb
from tests.install.test_scripts import ONE_SWAP, MadeUp
from tests.support import ROOT
from zbudfs import __version__

DEBIAN = ROOT / "debian"
SCRIPTS = ("prerm", "postinst", "postrm", "stop-all", "hand-over", "tests/demo")
SWAPFILE = "/run/zbudfs.swap/swapfile"


@pytest.fixture
def machine(tmp_path: Path) -> MadeUp:
    """Return a machine with swap on one zbudfs."""
    made = MadeUp(tmp_path)
    made.file("proc/swaps", ONE_SWAP)
    made.file("proc/mounts", "zbudfs /run/zbudfs.swap fuse.zbudfs rw 0 0\n")
    made.file("sys/block/loop3/loop/backing_file", f"{SWAPFILE}\n")
    made.program("losetup")
    return made


def run(machine: MadeUp, name: str, zbudfs: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the package with a `zbudfs` that does this."""
    command = machine.program("zbudfs", zbudfs)
    text = (DEBIAN / name).read_text()
    assert "/usr/bin/zbudfs" in text
    return machine.run(machine.file(name, text.replace("/usr/bin/zbudfs", str(command))), **environment)


def test_one_version() -> None:
    """The program, the package and the top of the change log have one version; the wheel takes it from the program."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    (packaged,) = re.findall(r"\Azbudfs \((.*?)-", (DEBIAN / "changelog").read_text())
    assert packaged == __version__
    sections = re.findall(r"^## \[(.*?)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0][0] == __version__


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_understands_them(name: str) -> None:
    """Each script is valid for sh."""
    assert (DEBIAN / name).read_text().startswith("#!/bin/sh\n# SPDX-License-Identifier: MIT\n")
    assert subprocess.run(["sh", "-n", DEBIAN / name], check=False).returncode == 0


STATUS = """case $1 in status) echo '[{"mountpoint": "/mnt/my place"}, {"mountpoint": "/mnt/b"}]' ;; restart) exit %d ;; esac"""


@pytest.mark.parametrize(("status", "told"), [(0, 0), (1, 2)])
def test_every_mount_is_handed_over(status: int, told: int, machine: MadeUp) -> None:
    """A refused hand-over gives one line that the old version continues, and the package is installed."""
    done = run(machine, "hand-over", STATUS % status)
    assert done.returncode == 0
    assert done.stderr.count("goes on with the version before") == told
    assert machine.called() == ["zbudfs status --json", "zbudfs restart /mnt/my place", "zbudfs restart /mnt/b"]


def test_nothing_to_stop(machine: MadeUp) -> None:
    """Without a mount the script calls nothing that changes anything."""
    machine.file("proc/swaps", "Filename Type Size Used Priority\n")
    assert run(machine, "stop-all", "case $1 in status) echo '[]' ;; esac").returncode == 0
    assert machine.called() == ["zbudfs --version", "zbudfs status --json"]


def test_units_and_mounts_are_stopped(machine: MadeUp) -> None:
    """The script stops units first, then mounts made by hand."""
    (machine.root / "run/systemd/system").mkdir(parents=True)
    machine.program("systemctl", "case $1 in list-units) echo 'zbudfs@swap.service loaded active running' ;; esac")
    gone = f'case $1 in status) echo \'[{{"mountpoint": "/mnt/b"}}]\' ;; swapoff) : >{machine.root}/proc/swaps ;; esac'
    done = run(machine, "stop-all", gone)
    assert (done.returncode, done.stderr) == (0, "")
    assert machine.called()[1:] == [
        "systemctl stop zbudfs@swap.service",
        "zbudfs --version",
        "zbudfs status --json",
        "zbudfs swapoff --umount /mnt/b",
    ]


@pytest.mark.parametrize("what", ["a unit", "a mount", "swap that nothing turns off"])
def test_a_removal_without_room_is_refused(what: str, machine: MadeUp) -> None:
    """The script gives the reason in one line to the user, and a status to the package manager."""
    if what == "a unit":
        (machine.root / "run/systemd/system").mkdir(parents=True)
        words = "case $1 in list-units) echo 'zbudfs@swap.service loaded active running' ;; stop) exit 1 ;; esac"
        machine.program("systemctl", words)
    body = STATUS % 0 + ("\n[ $1 != swapoff ]" if what == "a mount" else "")
    done = run(machine, "stop-all", body)
    assert done.returncode == 1
    assert done.stderr.startswith("zbudfs: ")
    assert "try again" in done.stderr


@pytest.mark.parametrize(("swapoff", "status"), [("", 0), ("exit 1", 1)])
def test_a_removal_where_the_program_cannot_start(swapoff: str, status: int, machine: MadeUp) -> None:
    """swapoff(8) turns off the swap of zbudfs, and no other swap."""
    machine.file("proc/swaps", f"{ONE_SWAP}/dev/loop4 partition 1024 0 1\n/dev/sda2 partition 1024 0 -2\n")
    machine.file("sys/block/loop4/loop/backing_file", "/home/swapfile\n")
    machine.program("swapoff", swapoff)
    assert run(machine, "stop-all", "exit 127").returncode == status
    assert "swapoff /dev/loop3" in machine.called()
    assert "swapoff /dev/loop4" not in machine.called()


def test_the_build_uses_the_python_of_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Python in front of Debian's, such as that of pyenv, lacks the Build-Depends."""
    monkeypatch.setenv("PATH", f"{tmp_path}/other/bin:/usr/bin:/bin")
    searched: list[str] = []

    def built(*command: str | Path, **environment: str) -> str:
        searched.append(environment["PATH"])
        (Path(command[-1]).parent / f"zbudfs_{__version__}-1_all.deb").touch()
        return ""

    monkeypatch.setattr(deb, "run", built)
    monkeypatch.setattr(deb, "put_source", lambda place, *_: place.mkdir())
    assert deb.build(deb.HERE, __version__, tmp_path / "out").exists()
    assert searched == ["/usr/sbin:/usr/bin:/sbin:/bin"]
