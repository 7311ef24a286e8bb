# SPDX-License-Identifier: MIT
"""mount(8), umount(8) and /etc/fstab with the type fuse.zbudfs.

The helpers must lie in /sbin. The real tests put them there in a mount namespace of their own, in which /sbin is a
folder with nothing but them; the machine's own is not touched.
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
from zbudfs.cli.config import ConfigError
from zbudfs.cli.keys import KEYS
from zbudfs.cli.mount_helper import mount_main, read_options, settings_for, split_options, umount_main
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
    """By commas, but not by those of an expression."""
    assert list(split_options(text)) == options


def test_what_an_fstab_line_says() -> None:
    """Our options are read; what is for mount(8) and the service manager passes without a word."""
    ours = "size=ram/2,pool=min(ram/4,1G),backing=/srv/x,level=3"
    theirs = "rw,defaults,nofail,noauto,auto,_netdev,nosuid,x-systemd.requires=a.mount,X-mount.mkdir,comment=x"
    assert read_options(f"{theirs},{ours}", RAM) == (
        {"size": RAM // 2, "pool": str(1 << 30), "backing": "/srv/x", "level": 3},
        [],
    )


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("exec", "it is always mounted nosuid, nodev and noexec"),
        ("relatime", "it keeps no access times"),
        ("user", "only root may mount"),
        ("sync", "a page that was written is stored"),
    ],
)
def test_what_is_ignored_is_told(option: str, reason: str) -> None:
    """Nothing that was asked for is dropped in silence."""
    values, (notice,) = read_options(f"rw,{option}", RAM)
    assert values == {}
    assert notice == f"the option {option} is ignored: {notice.partition(': ')[2]}"
    assert reason in notice


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("ro", "ro is refused: swap has to be written"),
        ("remount", "unmount it and mount it again"),
        ("bind", "leave out -t fuse.zbudfs"),
        ("uid=1000", "swapfile is always root's"),
        ("priority=5", r"it can only be set in /etc/zbudfs/NAME\.toml"),
        ("mountpoint=/x", "can only be set in"),
        ("size", "size needs a value: write size=VALUE"),
        ("size=4GB", "size=4GB cannot work: .* makes no sense"),
        ("level=20", "level=20 cannot work: it is not a level: write a whole number from -7 to 19"),
        ("backing=x", "write an absolute path"),
        ("sise=1G", "'sise=1G' is unknown: did you mean size"),
        ("nofial", "did you mean nofail"),
        ("zzz", "known are size, pool, backing, force-backing, level"),
    ],
)
def test_what_is_refused_is_told(option: str, reason: str) -> None:
    """What would be a lie to ignore is an error that says what to do."""
    with pytest.raises(SettingsError, match=reason):
        read_options(f"rw,{option}", RAM)


def test_sloppy_passes_over_the_unknown() -> None:
    """With -s, as mount(8) has it, but not over what is refused."""
    assert read_options("zzz=1,level=2", RAM, sloppy=True) == (
        {"level": 2},
        ["the option zzz=1 is unknown, and ignored because of -s"],
    )
    with pytest.raises(SettingsError):
        read_options("ro", RAM, sloppy=True)


def test_every_key_is_an_option_or_refused() -> None:
    """None of them falls through to "unknown"."""
    for key in KEYS:
        try:
            read_options(f"{key.name}=\0", RAM)
        except SettingsError as error:
            assert "unknown" not in str(error)  # noqa: PT017  either way it must be known


def test_a_configuration_as_source(tmp_path: Path) -> None:
    """Its values hold where the options say nothing; where it is mounted is said by fstab."""
    root = make_root(
        tmp_path, {"disk.toml": 'size = "1G"\nlevel = 7\nmountpoint = "/elsewhere"', "bad.toml": "size = 1"}
    )
    found = settings_for("disk", "/mnt/x", {"size": 2 << 30}, root)
    assert (found.source, found.mountpoint, found.size_bytes, found.level) == ("disk", "/mnt/x", 2 << 30, 7)
    assert found.backing == "/var/lib/zbudfs/mnt-x.backing"
    for source in ("anything", "/dev/none", "-x", "a b"):
        found = settings_for(source, "/mnt/x", {}, root)
        assert (found.source, found.size_bytes, found.level) == (source, RAM, -1)
    with pytest.raises(ConfigError, match=r"bad\.toml: size"):
        settings_for("bad", "/mnt/x", {}, root)


def test_exit_statuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that mount(8) documents, and one line for each error."""
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
    """-f mounts nothing, and -v says what would be."""
    assert mount_main(["some name", str(tmp_path), "-f", "-v", "-n", "-o", "rw,exec", "-o", "size=8M"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["size_bytes"] == 8 << 20
    assert json.loads(out)["source"] == "some name"
    assert "exec is ignored" in err


@pytest.fixture
def sbin(tmp_path: Path) -> Path:
    """A folder with the helpers alone, to be /sbin."""
    folder = tmp_path / "sbin"
    folder.mkdir()
    for name in HELPERS:
        helper = Path(sys.executable).parent / name
        assert helper.exists(), f"{helper} is missing: run make venv"
        (folder / name).symlink_to(helper)
    return folder


def in_namespace(sbin: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace in which /sbin is `sbin`; it is in its parent folder."""
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
    """mount -t, findmnt, umount; when umount returns the daemon has gone and its backing file is empty."""
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
    """mount -a mounts what is not noauto, once; a mount by name, umount; all that fstab may say."""
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
def test_what_mount_says_when_it_fails(sbin: Path) -> None:
    """The reason, in one line, and mount's own exit statuses."""
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
    for reason in ("swap has to be written", "'8MB' makes no sense", "for the backing file does not exist"):
        assert run.stderr.count(reason) == 1


@pytest.mark.needs("root", "fuse", "loop")
def test_umount_refuses_what_is_used(sbin: Path) -> None:
    """It says by what; a lazy umount is done all the same, and the daemon ends with its last user."""
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
