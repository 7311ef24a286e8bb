# SPDX-License-Identifier: MIT
"""Which cgroups end with a login session, and what gives the daemon a scope of its own."""

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
def test_what_a_session_is(cgroup: str, ends: bool) -> None:
    """By the name of the cgroup."""
    assert session.ends_with_session(cgroup) is ends


def make_root(root: Path, cgroup: str) -> str:
    """Make up a machine with systemd, where this process is in a cgroup; return its root."""
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
    """With either version of cgroups."""
    assert session.cgroup_of("self", make_root(tmp_path, text)) == expected


def test_the_daemon_warns_of_a_session(tmp_path: Path) -> None:
    """And does not where it is a service."""
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
    """systemd may refuse: then the daemon is started where it is, after a try with what old versions know."""
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
