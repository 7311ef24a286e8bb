# SPDX-License-Identifier: MIT
"""mount(8), umount(8) and /etc/fstab with the type fuse.zbudfs.

The helpers must be in /sbin. The tests use their own mount namespace, in which /sbin is a folder with the helpers
alone.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_config import make_root
from tests.support import LIMIT_SECONDS
from zbudfs.cli.errors import ConfigError
from zbudfs.cli.mount_helper import mount_main, plan_for, read_options, split_options, umount_main
from zbudfs.cli.option_table import OPTIONS
from zbudfs.service.settings import SettingsError

RAM = 8 << 30
HELPERS = ("mount.fuse.zbudfs", "umount.fuse.zbudfs")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", []),
        (",,rw,,", ["rw"]),
        ("rw,size=1G", ["rw", "size=1G"]),
        ("pool=min(ram/2,4G),level=1", ["pool=min(ram/2,4G)", "level=1"]),
        ('pool="min(ram/2,4G)",backing="/a,b"', ["pool=min(ram/2,4G)", "backing=/a,b"]),
        ("a),b", ["a)", "b"]),
        ("(a,b", ["(a,b"]),
    ],
)
def test_options_are_parted(text: str, options: list[str]) -> None:
    """Commas separate options, except for commas in an expression."""
    assert list(split_options(text)) == options


def test_options_of_an_fstab_line() -> None:
    """The options of zbudfs are read. Those of mount(8) and of the service manager have no effect and no message."""
    ours = "size=ram/2,pool=min(ram/4,1G),backing=/srv/x,level=3"
    theirs = "rw,defaults,nofail,noauto,auto,_netdev,nosuid,x-systemd.requires=a.mount,X-mount.mkdir,comment=x"
    assert read_options(f"{theirs},{ours}", RAM) == (
        {"size": RAM // 2, "pool": 1 << 30, "backing": "/srv/x", "level": 3},
        [],
    )


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("exec", "zbudfs is always mounted nosuid, nodev and noexec"),
        ("relatime", "zbudfs keeps no access times"),
        ("user", "only root may mount"),
        ("sync", "every written page is stored"),
    ],
)
def test_ignored_options_are_reported(option: str, reason: str) -> None:
    """Each ignored option gives a message."""
    values, (notice,) = read_options(f"rw,{option}", RAM)
    assert values == {}
    assert notice == f"the option {option} is ignored: {notice.partition(': ')[2]}"
    assert reason in notice


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("ro", "ro is refused: swap must be writable"),
        ("remount", "unmount it and mount it again"),
        ("bind", "leave out -t fuse.zbudfs"),
        ("uid=1000", "swapfile always belongs to root"),
        ("priority=5", r"it can only be set in /etc/zbudfs/NAME\.toml"),
        ("mountpoint=/x", "can only be set in"),
        ("size", "size needs a value: write size=VALUE"),
        ("size=4GB", "size=4GB has a wrong value: .* is not a size"),
        ("level=20", "level=20 has a wrong value: it is not a level: write a whole number from -7 to 19"),
        ("backing=x", "write an absolute path"),
        ("sise=1G", "'sise=1G' is unknown: did you mean size"),
        ("nofial", "did you mean nofail"),
        ("zzz", "known are size, pool, backing, force-backing, level"),
    ],
)
def test_refused_options_are_reported(option: str, reason: str) -> None:
    """An option that must not be ignored is an error that says what to do."""
    with pytest.raises(SettingsError, match=reason):
        read_options(f"rw,{option}", RAM)


def test_sloppy_passes_over_the_unknown() -> None:
    """-s skips unknown options, as in mount(8), but not refused ones."""
    assert read_options("zzz=1,level=2", RAM, sloppy=True) == (
        {"level": 2},
        ["the option zzz=1 is unknown, and ignored because of -s"],
    )
    with pytest.raises(SettingsError):
        read_options("ro", RAM, sloppy=True)


def test_every_key_is_an_option_or_refused() -> None:
    """No key of a configuration falls through to "unknown"."""
    for option in OPTIONS:
        try:
            read_options(f"{option.name}=\0", RAM)
        except SettingsError as error:
            assert "unknown" not in str(error)  # noqa: PT017  either way it must be known


def test_a_configuration_as_source(tmp_path: Path) -> None:
    """The values of the configuration hold for options that are not given. fstab gives the mountpoint."""
    root = make_root(
        tmp_path, {"disk.toml": 'size = "1G"\nlevel = 7\nmountpoint = "/elsewhere"', "bad.toml": "size = 1"}
    )
    found = plan_for("disk", "/mnt/x", {"size": 2 << 30}, root).settings
    assert (found.source, found.mountpoint, found.size_bytes, found.level) == ("disk", "/mnt/x", 2 << 30, 7)
    assert found.backing == "/var/lib/zbudfs/mnt-x.backing"
    for source in ("anything", "/dev/none", "-x", "a b"):
        found = plan_for(source, "/mnt/x", {}, root).settings
        assert (found.source, found.size_bytes, found.level) == (source, RAM, -1)
    with pytest.raises(ConfigError, match=r"bad\.toml: size"):
        plan_for("bad", "/mnt/x", {}, root)


def test_exit_statuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The statuses are those that mount(8) documents, with one line for each error."""
    assert mount_main(["x", str(tmp_path), "-o", "ro"]) == 1
    assert mount_main(["x"]) == 1
    assert mount_main(["x", str(tmp_path / "none"), "-o", "rw,level=2", "-f"]) == 0
    assert mount_main(["x", str(tmp_path), "-N", "/proc/1/ns/mnt"]) == 32
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert mount_main(["x", str(tmp_path)]) == 32
    assert umount_main([str(tmp_path)]) == 32
    err = capsys.readouterr().err
    assert err.count("\n") == 5
    assert all(line.startswith("zbudfs: ") for line in err.splitlines())
    assert "nsenter --mount=/proc/1/ns/mnt mount" in err


def test_fake_and_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-f mounts nothing, and -v prints the plan."""
    assert mount_main(["some name", str(tmp_path), "-f", "-v", "-n", "-o", "rw,exec", "-o", "size=8M"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["size_bytes"] == 8 << 20
    assert json.loads(out)["source"] == "some name"
    assert "exec is ignored" in err


@pytest.fixture
def sbin(tmp_path: Path) -> Path:
    """Return a folder with the helpers alone, for /sbin."""
    folder = tmp_path / "sbin"
    folder.mkdir()
    for name in HELPERS:
        helper = Path(sys.executable).parent / name
        assert helper.exists(), f"{helper} is missing: run make venv"
        (folder / name).symlink_to(helper)
    return folder


def in_namespace(sbin: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in the parent folder of `sbin`, in a mount namespace in which /sbin is `sbin`."""
    prepare = 'mount --bind "$0" "$(readlink -f /sbin)" && set -e\n'
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "bash", "-c", prepare + script, str(sbin)],
        cwd=sbin.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.mark.needs("root", "fuse")
def test_mount_and_umount(sbin: Path) -> None:
    """mount -t, findmnt and umount work. After umount the daemon has ended and its backing file is empty."""
    run = in_namespace(
        sbin,
        """
        mkdir mnt
        mount -t fuse.zbudfs anything mnt -o "size=16M,pool=1M,backing=$PWD/backing,level=1,noatime"
        findmnt -no SOURCE,FSTYPE mnt
        stat -c %s mnt/swapfile
        head -c 8M /dev/urandom | dd of=mnt/swapfile bs=1M conv=notrunc iflag=fullblock status=none
        [ "$(stat -c %s backing)" -gt 0 ]
        pid=$(cat mnt/stats/pid)
        umount mnt
        ! kill -0 "$pid" 2>/dev/null
        stat -c %s backing
        """,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["anything", "fuse.zbudfs", "16777216", "0"]


@pytest.mark.needs("root", "fuse")
def test_an_fstab(sbin: Path) -> None:
    """mount -a mounts each line without noauto once. A mount by name, umount, and all options of fstab work."""
    run = in_namespace(
        sbin,
        """
        mkdir one two
        cat >fstab <<END
        first $PWD/one fuse.zbudfs size=8M,pool=1M,backing=none,defaults,nofail,_netdev,x-systemd.requires=x.service 0 0
        second $PWD/two fuse.zbudfs size=min(ram,4M),pool=1M,backing=none,noauto 0 0
END
        mount -T fstab -a
        mount -T fstab -a
        mount -T fstab second
        findmnt -n -o SOURCE,TARGET --mountpoint "$PWD/one"
        findmnt -n -o SOURCE,TARGET --mountpoint "$PWD/two"
        cat one/stats/size_bytes two/stats/size_bytes
        umount one
        umount "$PWD/two"
        findmnt -n "$PWD/one" "$PWD/two" || echo none
        """,
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    folder = sbin.parent
    assert lines[:2] == [["first", f"{folder}/one"], ["second", f"{folder}/two"]]
    assert lines[2:] == [["8388608"], ["4194304"], ["none"]]


@pytest.mark.needs("root", "fuse")
def test_a_failed_mount_has_a_reason(sbin: Path) -> None:
    """The error is the reason in one line, with mount's own exit status."""
    run = in_namespace(
        sbin,
        """
        set +e
        mkdir mnt
        mount -t fuse.zbudfs x mnt -o ro,size=8M; echo $?
        mount -t fuse.zbudfs x mnt -o size=8MB; echo $?
        mount -t fuse.zbudfs x mnt -o backing=/none/at/all; echo $?
        umount -t fuse.zbudfs mnt; echo $?
        """,
    )
    assert run.stdout.split()[:3] == ["1", "1", "32"]
    assert run.stdout.split()[3] != "0"
    for reason in ("swap must be writable", "'8MB' is not a size", "for the backing file does not exist"):
        assert run.stderr.count(reason) == 1


@pytest.mark.needs("root", "fuse", "loop")
def test_umount_refuses_what_is_used(sbin: Path) -> None:
    """umount names the user and refuses. A lazy umount succeeds, and the daemon ends with its last user."""
    if shutil.which("losetup", path="/usr/sbin:/sbin") is None:
        pytest.skip("no losetup")
    run = in_namespace(
        sbin,
        """
        mkdir mnt
        mount -t fuse.zbudfs x mnt -o size=8M,pool=1M,backing=none
        pid=$(cat mnt/stats/pid)
        exec 3<mnt/swapfile
        ! umount mnt
        umount -l mnt
        findmnt -n --mountpoint "$PWD/mnt" || echo none
        kill -0 "$pid"
        exec 3<&-
        for try in $(seq 200); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
        ! kill -0 "$pid" 2>/dev/null
        """,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["none"]
    assert run.stderr.count("it is in use: a program has a file open on it") == 1
