# SPDX-License-Identifier: MIT
"""The cgroups that end with a login session, and the scope that a daemon in one of them gets."""

import os
import stat
import sys
from pathlib import Path

import pytest

from tests.support import LIMIT_SECONDS
from zbudfs.service import launch, session
from zbudfs.service.settings import Settings


@pytest.mark.parametrize(
    ("cgroup", "ends"),
    [
        ("/user.slice/user-0.slice/session-1.scope", True),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/x.service", True),
        ("/system.slice/run-r123.scope", True),
        ("/machine.slice/libpod-1.scope", True),
        ("/system.slice/ssh.service", True),
        ("/system.slice/system-getty.slice/getty@tty1.service", True),
        ("/system.slice/cron.service", True),
        ("/system.slice/zbudfs@swap.service", False),
        ("/system.slice/zbudfs-mnt-z-77.scope", False),
        ("/system.slice/mine.service", False),
        ("/", False),
        ("", False),
    ],
)
def test_cgroups_of_sessions(cgroup: str, ends: bool) -> None:
    """The name of the cgroup decides."""
    assert session.ends_with_session(cgroup) is ends


def make_root(root: Path, cgroup: str) -> str:
    """Make a machine with systemd, with this process in a cgroup, and return its root."""
    (root / "run/systemd/system").mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    return str(root)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::/user.slice/a.scope\n", "/user.slice/a.scope"),
        ("12:memory:/m\n1:name=systemd:/user.slice/a.scope\n0::/\n", "/user.slice/a.scope"),
        ("nonsense\n", ""),
    ],
)
def test_the_cgroup_of_a_process(text: str, expected: str, tmp_path: Path) -> None:
    """The cgroup is found with both versions of cgroups."""
    assert session.cgroup_of("self", make_root(tmp_path, text)) == expected


def test_the_daemon_warns_of_a_session(tmp_path: Path) -> None:
    """A daemon in a session warns, and one in a service does not."""
    (text,) = session.session_warnings(make_root(tmp_path / "a", "0::/user.slice/user-0.slice/session-1.scope\n"))
    assert "/user.slice/user-0.slice/session-1.scope" in text
    assert session.session_warnings(make_root(tmp_path / "b", "0::/system.slice/zbudfs@swap.service\n")) == []


def test_a_scope_is_asked_for_only_in_a_session_under_systemd(tmp_path: Path) -> None:
    """The words before the command name the scope."""
    root = make_root(tmp_path / "a", "0::/user.slice/a.scope\n")
    words = session.scope_command("mnt-z", root=root)
    if words:  # systemd-run is there
        assert f"--unit=zbudfs-mnt-z-{os.getpid()}.scope" in words
        assert set(words) > set(session.scope_command("mnt-z", every=False, root=root))
    assert session.scope_command("mnt-z", root=make_root(tmp_path / "b", "0::/system.slice/x.service\n")) == []
    (Path(root) / "run/systemd/system").rmdir()
    assert session.scope_command("mnt-z", root=root) == []


def test_without_a_scope_the_daemon_starts_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd may refuse. Then a second try leaves out newer settings, and the daemon starts without a scope."""
    refusing = tmp_path / "systemd-run"
    refusing.write_text(
        f"#!/bin/sh\necho $1 >>{tmp_path}/tried\necho 'Failed to start transient scope unit: no' >&2\nexit 1\n"
    )
    refusing.chmod(refusing.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(
        launch, "scope_command", lambda name, *, every=True: [str(refusing), "all" if every else "old", "--"]
    )
    settings = Settings(mountpoint="/nonexistent", size_bytes=1 << 20, pool_bytes=1 << 20, backing=None)
    program = 'import os, sys; os.write(int(sys.argv[4]), b\'{"ready": true, "pid": 7, "warnings": []}\\n\')'
    ready = launch.start(settings, limit_seconds=LIMIT_SECONDS, command=[sys.executable, "-c", program])
    assert ready.pid == 7
    assert (tmp_path / "tried").read_text() == "all\nold\n"
