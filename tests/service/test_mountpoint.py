# SPDX-License-Identifier: MIT
"""Mount tables, names, and what mounting refuses; the real mount is in tests/cli/test_mount.py."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import LIMIT_SECONDS, mounted, status_of, wait_until
from zbudfs.service.mountpoint import (
    Mount,
    MountError,
    check_mountpoint,
    escape_path,
    find_mount,
    parse_mountinfo,
    request_timeout_warnings,
    resolve,
    shown_path,
    unescape_octal,
    unmount,
    zbudfs_mounts,
)

MOUNTINFO = rb"""22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:51 / /mnt/one rw,nosuid,nodev,noexec,noatime shared:7 master:3 - fuse.zbudfs zbudfs rw,user_id=0,group_id=0
41 22 0:52 / /mnt/a\040b\012c\134d\011 rw - fuse.zbudfs zbudfs rw,user_id=0
42 22 0:53 / /mnt/other rw - fuse.sshfs fuse.zbudfs rw
43 22 0:54 / /mnt/\344 rw - fuse.zbudfs zbudfs rw,user_id=0
44 22 0:55 / /mnt/one rw - fuse.zbudfs zbudfs rw,user_id=0
"""


@pytest.fixture
def fake_root(tmp_path: Path) -> Path:
    """A folder with a `proc/` of its own."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_bytes(MOUNTINFO)
    return tmp_path


def test_mountinfo_is_read(fake_root: Path) -> None:
    """Only zbudfs is listed, whatever its path holds, in the order of mounting."""
    mounts = zbudfs_mounts(str(fake_root))
    assert [mount.mountpoint for mount in mounts] == ["/mnt/one", "/mnt/a b\nc\\d\t", "/mnt/\udce4", "/mnt/one"]
    assert [mount.device for mount in mounts] == ["0:51", "0:52", "0:54", "0:55"]
    assert mounts[0].st_dev == os.makedev(0, 51)


def test_the_topmost_mount_is_found(fake_root: Path) -> None:
    """Of two mounts on one directory the one that can be seen counts."""
    assert find_mount("/mnt/one", str(fake_root)) == Mount("/mnt/one", "0:55")
    assert find_mount("/mnt/other", str(fake_root)) is None


@pytest.mark.parametrize("cut", range(0, len(MOUNTINFO), 7))
def test_a_cut_table_is_no_error(cut: int) -> None:
    """Every truncation of the table gives what is whole in it."""
    assert len(parse_mountinfo(MOUNTINFO[:cut])) <= 4


def test_this_machines_table_is_read() -> None:
    """The real table can be read, whatever is mounted."""
    assert isinstance(zbudfs_mounts(), list)


@given(st.binary())
def test_octal_escapes(raw: bytes) -> None:
    """What the kernel escapes comes back."""
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in raw)
    assert unescape_octal(escaped) == raw


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "-"),
        ("/mnt/swap", "mnt-swap"),
        ("//mnt//./swap/", "mnt-swap"),
        ("/.hidden", r"\x2ehidden"),
        ("/a/.b", "a-.b"),
        ("/a-b", r"a\x2db"),
        ("/my swap", r"my\x20swap"),
        ("/ä\n", r"\xc3\xa4\x0a"),
        ("/x\\y", r"x\x5cy"),
    ],
)
def test_paths_are_escaped(path: str, name: str) -> None:
    """Paths become names as systemd makes them."""
    assert escape_path(path) == name


@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="no systemd-escape to compare with")
@pytest.mark.parametrize("path", ["/", "/a b/-c", "/.x/.y", "/ä/€", "/a//b/", "/tab\there", "/q'\"$`*"])
def test_systemd_escapes_the_same_way(path: str) -> None:
    """systemd-escape itself gives the same name."""
    theirs = subprocess.run(["systemd-escape", "--path", "--", path], capture_output=True, text=True, check=True).stdout
    assert escape_path(path) == theirs.removesuffix("\n")


@given(
    st.lists(
        st.text(min_size=1).filter(lambda part: not set(part) & set("/\0") and part not in (".", "..")), min_size=1
    )
)
@example(["a-b"])
def test_different_paths_have_different_names(parts: list[str]) -> None:
    """A name can be turned back into its path, so no two are alike."""
    path = "/" + "/".join(os.fsdecode(part.encode("utf-8", "surrogatepass")) for part in parts)
    name = escape_path(path)
    assert "/" not in name
    back = b"/" + b"/".join(_unescape(part) for part in name.split("-"))
    assert back == os.fsencode(path)


def _unescape(name: str) -> bytes:
    first, *rest = name.split("\\x")
    return first.encode() + b"".join(bytes([int(piece[:2], 16)]) + piece[2:].encode() for piece in rest)


def test_request_timeouts_are_told(tmp_path: Path) -> None:
    """A limit on requests gives a sentence with the remedy; none, or an older kernel, gives nothing."""
    folder = tmp_path / "proc/sys/fs/fuse"
    assert request_timeout_warnings(str(tmp_path)) == []
    folder.mkdir(parents=True)
    (folder / "default_request_timeout").write_text("0\n")
    (folder / "max_request_timeout").write_text("600\n")
    (warning,) = request_timeout_warnings(str(tmp_path))
    assert "fs.fuse.max_request_timeout is 600 s" in warning
    assert "sysctl fs.fuse.max_request_timeout=0" in warning


def test_mountpoints_are_checked(fake_root: Path, tmp_path: Path) -> None:
    """What cannot be mounted on is refused with a reason."""
    file = tmp_path / "file"
    file.touch()
    for path, reason in (
        ("relative", "not an absolute path"),
        ("/mnt/one", "is mounted on /mnt/one already"),
        (str(tmp_path / "none"), "does not exist: create the directory first"),
        (str(file), "is not a directory"),
        (str(file / "below"), "cannot be used: Not a directory"),
    ):
        with pytest.raises(MountError, match=reason):
            check_mountpoint(path, str(fake_root))
    check_mountpoint(str(tmp_path), str(fake_root))


@pytest.mark.needs("root")
def test_unmounting_what_is_not_mounted(tmp_path: Path) -> None:
    """An unmount that cannot be done says why, and carries the errno."""
    with pytest.raises(MountError, match="nothing is mounted there") as caught:
        unmount(str(tmp_path))
    assert caught.value.code
    with pytest.raises(MountError, match="it does not exist"):
        unmount(str(tmp_path / "none"), lazy=True)


def test_paths_are_shown_on_one_line() -> None:
    """A path with anything odd in it is quoted."""
    assert shown_path("/mnt/swäp") == "/mnt/swäp"
    assert shown_path("/a b") == "'/a b'"
    assert shown_path("/a\nb\udce4") == r"$'/a\nb\xe4'"


@pytest.mark.parametrize(
    "path", [b"/a b", b"/it's", b"/x\ny\tz", b"/latin \xe4'\\", b"/$HOME`id`;*", "/sw\u00e4p".encode(), b"/\xff\x01f"]
)
def test_a_shown_path_can_be_pasted(path: bytes) -> None:
    """A shell makes of it just the bytes that it stands for, and a message of it stays on one line."""
    shown = shown_path(os.fsdecode(path))
    assert shown.isprintable()
    run = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, timeout=LIMIT_SECONDS, check=True)
    assert run.stdout == path


# ---- a path to a mount that nobody serves ------------------------------------------------------------------------------


def test_resolve_is_realpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, loops, dots, what is not there and what is no directory give what realpath(3) gives."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name, target in (("a/up", "../file"), ("a/b/abs", str(tmp_path / "a")), ("loop", "loop"), ("two", "a/b/abs/b")):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path / "a")
    for path in (
        ".",
        "..",
        "b/../../file",
        "b/abs/up",
        f"{tmp_path}/two/..",
        "not/there/../x",
        "up/x",
        "/",
        "//",
        "b//",
    ):
        assert resolve(path) == os.path.realpath(path), path
    assert resolve(f"{tmp_path}/loop") == f"{tmp_path}/loop"


RESOLVE: Final = """
import os, sys
from pathlib import Path
from zbudfs.cli.config import settings_of
from zbudfs.cli.target import resolve
mountpoint = sys.argv[1]
if sys.argv[2] == "lstat":
    os.lstat(mountpoint)
else:
    assert resolve(mountpoint + "/stats/../control") == mountpoint + "/control"
    assert settings_of({"backing": "none", "size": 1 << 26}, mountpoint)[1].mountpoint == mountpoint
print("answered")
"""


@pytest.mark.needs("root", "fuse")
def test_resolve_touches_no_mount(tmp_path: Path) -> None:
    """While nobody serves, lstat of the mountpoint waits after a plain `ls`; what commands and the daemon do does not."""
    with mounted(tmp_path / "mnt") as mount:
        wait_until(lambda: status_of(mount)["standby_ready"] is True, "the standby")
        status = status_of(mount)
        pids = [status[name] for name in ("keeper_pid", "standby_pid", "worker_pid")]
        subprocess.run(["ls", mount], check=True, capture_output=True)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            command = [sys.executable, "-c", RESOLVE, str(mount)]
            waits = subprocess.Popen([*command, "lstat"], stdout=subprocess.PIPE)
            answered = subprocess.run([*command, "resolve"], capture_output=True, timeout=LIMIT_SECONDS, check=True)
            assert answered.stdout == b"answered\n"
            assert waits.poll() is None
        finally:
            for pid in reversed(pids):
                os.kill(pid, signal.SIGCONT)
        assert waits.communicate(timeout=LIMIT_SECONDS)[0] == b"answered\n"
