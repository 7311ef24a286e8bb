# SPDX-License-Identifier: MIT
"""The start of a daemon: made-up daemons that work, refuse, die, print nonsense, or are silent."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import is_running, wait_until
from zbudfs.service.launch import LaunchError, Ready, run_in_foreground, start
from zbudfs.service.settings import Settings

SETTINGS = Settings(mountpoint="/none/ä \udce4", size_bytes=1 << 20, pool_bytes=1 << 20, backing=None)

HEAD = """
import json, os, signal, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
settings = os.read(int(options["--settings-fd"]), 65536)
signal.pthread_sigmask(signal.SIG_SETMASK, ())  # in the foreground it begins with some that are blocked
def say(text):
    os.write(int(options["--ready-fd"]), text.encode())
"""


def daemon(code: str) -> list[str]:
    """Return the command of a daemon that runs `code`."""
    return [sys.executable, "-I", "-c", HEAD + code]


def test_a_daemon_that_is_up(tmp_path: Path) -> None:
    """The daemon gets its settings, its own session and the root folder, and survives us."""
    facts = tmp_path / "facts"
    code = f"""
with open({str(facts)!r}, "wb") as file:
    file.write(b"%d %s\\n" % (os.getsid(0) == os.getpid(), os.getcwd().encode()) + settings)
say(json.dumps({{"ready": True, "pid": os.getpid(), "warnings": ["a", "b"]}}) + "\\n")
sys.stderr.write("talks to nobody")
time.sleep(60)
"""
    ready = start(SETTINGS, command=daemon(code))
    try:
        assert ready.warnings == ("a", "b")
        assert is_running(ready.pid)
        head, _, settings = facts.read_bytes().partition(b"\n")
        assert head == b"1 /"
        assert Settings.from_json(settings) == SETTINGS
    finally:
        os.kill(ready.pid, signal.SIGKILL)
        os.waitpid(ready.pid, 0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('say(\'{"error": "no such thing"}\\n\')', "^no such thing$"),
        ("sys.stderr.write('first\\nlast words\\n'); sys.exit(3)", "ended with exit status 3 before .*: last words$"),
        ("raise ValueError('a bug')", "exit status 1 before it was ready: ValueError: a bug$"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL before it was ready$"),
        ("say('{')", "ended with exit status 0 before it was ready$"),
        ("say('nonsense\\n')", "makes no sense"),
        ("say('[]\\n')", "makes no sense"),
        ("say('{\"ready\": true}\\n')", "makes no sense"),
        ('say(\'{"error": "slow to go"}\\n\'); time.sleep(60)', "^slow to go$"),
    ],
)
def test_a_daemon_that_does_not_come_up(code: str, reason: str) -> None:
    """Any other behaviour is an error with its reason, and the daemon is gone."""
    with pytest.raises(LaunchError, match=reason):
        start(SETTINGS, command=daemon(code))


def test_a_daemon_that_says_nothing(tmp_path: Path) -> None:
    """The wait has a limit, and then the daemon is stopped."""
    file = tmp_path / "pid"
    code = f"open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(LaunchError, match=r"not ready within 1 s, and was stopped"):
        start(SETTINGS, command=daemon(code), limit_seconds=1)
    if file.exists():
        assert not is_running(int(file.read_text()))


def test_much_on_stderr_does_not_block_a_daemon() -> None:
    """More output than a pipe holds is read meanwhile."""
    with pytest.raises(LaunchError, match=r"the end$"):
        start(SETTINGS, command=daemon("sys.stderr.write('x' * 300000 + '\\nthe end\\n'); sys.exit(1)"))


def test_a_program_that_is_not_there() -> None:
    """A daemon that cannot be started is an error."""
    with pytest.raises(LaunchError, match="could not be started"):
        start(SETTINGS, command=["/none/at/all"])


@pytest.mark.parametrize(
    ("code", "status"), [("sys.exit(0)", 0), ("sys.exit(5)", 5), ("os.kill(os.getpid(), 15)", 143)]
)
def test_in_the_foreground_the_exit_status_is_the_daemons(code: str, status: int) -> None:
    """The command waits for the daemon and returns its status."""
    seen: list[Ready] = []
    up = "say(json.dumps({'ready': True, 'pid': os.getpid()}) + '\\n');"
    assert run_in_foreground(SETTINGS, seen.append, command=daemon(up + code)) == status
    assert [ready.warnings for ready in seen] == [()]


def test_in_the_foreground_sigterm_is_passed_on() -> None:
    """A SIGTERM to us ends the daemon. It gets SIGINT from the terminal itself."""
    code = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
say(json.dumps({"ready": True, "pid": os.getpid()}) + "\\n")
time.sleep(60)
"""

    def on_ready(ready: Ready) -> None:
        wait_until(lambda: is_running(ready.pid), "the daemon")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_in_foreground(SETTINGS, on_ready, command=daemon(code)) == 7
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_ctrl_c_before_the_daemon_is_up() -> None:
    """The daemon handles Ctrl-C when it can, and does not start. That is no further error."""
    code = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
os.kill(os.getppid(), signal.SIGINT)
say('{"error": "it was told to end"}\\n')
"""
    with pytest.raises(KeyboardInterrupt):
        run_in_foreground(SETTINGS, lambda _: None, command=daemon(code))


def test_in_the_foreground_errors_are_reported() -> None:
    """A daemon that refuses is the same error as in the background."""
    with pytest.raises(LaunchError, match=r"^no$"):
        run_in_foreground(SETTINGS, lambda _: None, command=daemon('say(\'{"error": "no"}\\n\')'))


def test_a_daemon_that_ignores_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon is killed, and so is the process that it has forked, since a worker survives its keeper."""
    monkeypatch.setattr("zbudfs.service.launch._STOP_LIMIT_SECONDS", 0.1)
    file = tmp_path / "pid"
    code = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not os.fork():
    open({str(file)!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    with pytest.raises(LaunchError, match="not ready within 1 s"):
        start(SETTINGS, command=daemon(code), limit_seconds=1)
    pid = int(file.read_text())
    try:
        wait_until(lambda: not is_running(pid), "the worker's end")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_ctrl_c_while_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the moment when the daemon starts stops it, as at any other moment."""
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(SETTINGS, command=daemon("time.sleep(60)"))
    (process,) = started
    try:
        assert process.poll() is not None
    finally:
        process.kill()
        process.wait()
