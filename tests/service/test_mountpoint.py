# SPDX-License-Identifier: MIT
"""Mount tables, names, and refusals of mounts. tests/cli/test_mount.py has real mounts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import LIMIT_SECONDS, mounted, stopped
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
    """Return a folder with its own `proc/`."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_bytes(MOUNTINFO)
    return tmp_path


def test_mountinfo_is_read(fake_root: Path) -> None:
    """The list has each zbudfs and no other mount, with any path, in the order of mounting."""
    mounts = zbudfs_mounts(str(fake_root))
    assert [mount.mountpoint for mount in mounts] == ["/mnt/one", "/mnt/a b\nc\\d\t", "/mnt/\udce4", "/mnt/one"]
    assert [mount.device for mount in mounts] == ["0:51", "0:52", "0:54", "0:55"]
    assert mounts[0].st_dev == os.makedev(0, 51)


def test_the_topmost_mount_is_found(fake_root: Path) -> None:
    """The visible one of two mounts on one directory counts."""
    assert find_mount("/mnt/one", str(fake_root)) == Mount("/mnt/one", "0:55")
    assert find_mount("/mnt/other", str(fake_root)) is None


@pytest.mark.parametrize("cut", range(0, len(MOUNTINFO), 7))
def test_a_cut_table_is_no_error(cut: int) -> None:
    """A table that is cut anywhere gives its whole lines."""
    assert len(parse_mountinfo(MOUNTINFO[:cut])) <= 4


def test_this_machines_table_is_read() -> None:
    """The table of this machine can be read."""
    assert isinstance(zbudfs_mounts(), list)


@given(st.binary())
def test_octal_escapes(raw: bytes) -> None:
    """Escapes of the kernel become characters."""
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
    """Paths become the names that systemd makes."""
    assert escape_path(path) == name


@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="no systemd-escape to compare with")
@pytest.mark.parametrize("path", ["/", "/a b/-c", "/.x/.y", "/ä/€", "/a//b/", "/tab\there", "/q'\"$`*"])
def test_systemd_escapes_the_same_way(path: str) -> None:
    """systemd-escape gives the same name."""
    theirs = subprocess.run(["systemd-escape", "--path", "--", path], capture_output=True, text=True, check=True).stdout
    assert escape_path(path) == theirs.removesuffix("\n")


@given(
    st.lists(
        st.text(min_size=1).filter(lambda part: not set(part) & set("/\0") and part not in (".", "..")), min_size=1
    )
)
@example(["a-b"])
def test_different_paths_have_different_names(parts: list[str]) -> None:
    """A name can be turned back into its path, so different paths have different names."""
    path = "/" + "/".join(os.fsdecode(part.encode("utf-8", "surrogatepass")) for part in parts)
    name = escape_path(path)
    assert "/" not in name
    back = b"/" + b"/".join(_unescape(part) for part in name.split("-"))
    assert back == os.fsencode(path)


def _unescape(name: str) -> bytes:
    first, *rest = name.split("\\x")
    return first.encode() + b"".join(bytes([int(piece[:2], 16)]) + piece[2:].encode() for piece in rest)


def test_request_timeouts_are_reported(tmp_path: Path) -> None:
    """A limit on requests gives a sentence with the remedy. No limit, or an older kernel, gives nothing."""
    folder = tmp_path / "proc/sys/fs/fuse"
    assert request_timeout_warnings(str(tmp_path)) == []
    folder.mkdir(parents=True)
    (folder / "default_request_timeout").write_text("0\n")
    (folder / "max_request_timeout").write_text("600\n")
    (warning,) = request_timeout_warnings(str(tmp_path))
    assert "fs.fuse.max_request_timeout is 600 s" in warning
    assert "sysctl fs.fuse.max_request_timeout=0" in warning


def test_mountpoints_are_checked(fake_root: Path, tmp_path: Path) -> None:
    """A path that cannot be a mountpoint is refused with the reason."""
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
    """A failed unmount gives the reason and the errno."""
    with pytest.raises(MountError, match="nothing is mounted there") as caught:
        unmount(str(tmp_path))
    assert caught.value.code
    with pytest.raises(MountError, match="it does not exist"):
        unmount(str(tmp_path / "none"), lazy=True)


def test_paths_are_shown_on_one_line() -> None:
    """A path with unusual characters is quoted."""
    assert shown_path("/mnt/swäp") == "/mnt/swäp"
    assert shown_path("/a b") == "'/a b'"
    assert shown_path("/a\nb\udce4") == r"$'/a\nb\xe4'"


@pytest.mark.parametrize(
    "path", [b"/a b", b"/it's", b"/x\ny\tz", b"/latin \xe4'\\", b"/$HOME`id`;*", "/sw\u00e4p".encode(), b"/\xff\x01f"]
)
def test_a_shown_path_can_be_pasted(path: bytes) -> None:
    """A shell makes the right bytes of the quoted path, and the message stays on one line."""
    shown = shown_path(os.fsdecode(path))
    assert shown.isprintable()
    run = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, timeout=LIMIT_SECONDS, check=True)
    assert run.stdout == path


# ---- a path to a mount without a server --------------------------------------------------------------------------------


def test_resolve_is_realpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, loops, dots, missing files and files as folders give the results of realpath(3)."""
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
from collections.abc import Iterator
from pathlib import Path
from zbudfs.cli.plan import make_plan
from zbudfs.cli.target import resolve
mountpoint = sys.argv[1]
if sys.argv[2] == "lstat":
    os.lstat(mountpoint)
else:
    assert resolve(mountpoint + "/stats/../control") == mountpoint + "/control"
    assert make_plan({"backing": "none", "size": 1 << 26}, resolve(mountpoint)).mountpoint == mountpoint
print("answered")
"""


@pytest.mark.needs("root", "fuse")
def test_resolve_touches_no_mount(tmp_path: Path) -> None:
    """While no process serves, lstat of the mountpoint waits after a plain `ls`. The calls of commands and daemon do not."""
    with mounted(tmp_path / "mnt") as mount:
        subprocess.run(["ls", mount], check=True, capture_output=True)
        with stopped(mount):
            command = [sys.executable, "-c", RESOLVE, str(mount)]
            waits = subprocess.Popen([*command, "lstat"], stdout=subprocess.PIPE)
            answered = subprocess.run([*command, "resolve"], capture_output=True, timeout=LIMIT_SECONDS, check=True)
            assert answered.stdout == b"answered\n"
            assert waits.poll() is None
        assert waits.communicate(timeout=LIMIT_SECONDS)[0] == b"answered\n"


IMPOSTOR: Final = """
import os, sys
fd = os.open(sys.argv[2] + "/stats/all.json", os.O_RDONLY)
os.read(fd, 100)
print("opened", flush=True)
sys.stdin.read()
os._exit(0)
"""

PREDECESSORS: Final = """
import sys
from zbudfs.service import predecessors
try:
    predecessors.find({}, sys.argv[1])
except predecessors.Held:
    pass
print("answered")
"""


@pytest.mark.needs("root", "fuse")
def test_a_new_keeper_asks_no_file_of_the_mount(tmp_path: Path) -> None:
    """A process with the daemon's name has a file of an unserved mount. A new keeper does not wait for that file."""
    with mounted(tmp_path / "mnt") as mount:
        command = [sys.executable, "-c", IMPOSTOR, "zbudfs.service.daemon", str(mount)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as impostor:
            assert impostor.stdout is not None
            assert impostor.stdout.readline() == b"opened\n"
            with stopped(mount):
                keeper = [sys.executable, "-c", PREDECESSORS, str(mount)]
                answered = subprocess.run(keeper, capture_output=True, timeout=LIMIT_SECONDS, check=True)
                assert answered.stdout == b"answered\n"
            impostor.communicate(timeout=LIMIT_SECONDS)
