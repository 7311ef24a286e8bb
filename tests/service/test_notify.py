# SPDX-License-Identifier: MIT
"""Messages to the service manager: to our own socket, by path and by abstract name, and to a full one."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from zbudfs.service.notify import Notifier, take_stored


def listen(address: str | bytes) -> socket.socket:
    """Act as the service manager."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(address)
    manager.settimeout(10)
    return manager


@pytest.mark.parametrize("abstract", [False, True])
def test_messages_arrive(abstract: bool, tmp_path: Path) -> None:
    """A call is one datagram. A line break adds no second assignment, and bytes that are no UTF-8 are escaped."""
    name = f"@zbudfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with listen(name.replace("@", "\0")) as manager, closing(Notifier(name)) as notifier:
        assert notifier.tell("READY=1", "STATUS=two\nlines")
        assert manager.recv(4096) == b"READY=1\nSTATUS=two lines"
        assert notifier.tell("STATUS=\udcff")
        assert manager.recv(4096) == b"STATUS=\\udcff"
        assert notifier.forget("fuse")
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=fuse"
        assert notifier.dropped == 0


def test_a_descriptor_is_stored(tmp_path: Path) -> None:
    """The manager gets its own copy, and the order not to watch it."""
    with listen(str(tmp_path / "notify")) as manager, (tmp_path / "file").open("w+") as file:
        with closing(Notifier(str(tmp_path / "notify"))) as notifier:
            assert notifier.store("backing", file.fileno())
        data, (copy,), _, _ = socket.recv_fds(manager, 4096, 4)
        assert data == b"FDSTORE=1\nFDNAME=backing\nFDPOLL=0"
        assert os.fstat(copy).st_ino == os.fstat(file.fileno()).st_ino
        os.close(copy)


def test_sending_never_waits(tmp_path: Path) -> None:
    """A manager does not read: messages that it has no room for are dropped and counted, and later ones arrive."""
    path = str(tmp_path / "notify")
    with listen(path) as manager, closing(Notifier(path)) as notifier:
        taken = 0
        while notifier.tell(f"STATUS={taken}"):
            taken += 1
            assert taken < 100_000
        assert taken > 0
        assert notifier.dropped == 1
        assert not notifier.tell("READY=1")
        assert notifier.dropped == 2
        assert manager.recv(4096) == b"STATUS=0"
        assert notifier.tell("READY=1")
        assert [manager.recv(4096) for _ in range(taken)][-1] == b"READY=1"


def test_no_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a manager nothing is sent. One that has gone costs a count. A period that is no number counts as none."""
    assert Notifier().tell("READY=1")
    with closing(Notifier(str(tmp_path / "nobody"))) as gone:
        assert not gone.tell("READY=1")
        assert gone.dropped == 1
    for text, seconds in (("60000000", 60.0), ("soon", 0.0), ("", 0.0)):
        monkeypatch.setenv("WATCHDOG_USEC", text)
        monkeypatch.setenv("NOTIFY_SOCKET", "")
        found = Notifier.from_environment()
        assert found.watchdog_seconds == seconds
        assert found.tell("READY=1")
        found.close()


def test_stored_descriptors_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors from 3 on come back by name. Those for another process stay, and later programs get none."""
    child = os.fork()
    if not child:
        status = 1
        try:
            for number in (3, 4, 5, 6):
                os.dup2(os.open("/dev/null", os.O_RDONLY), number, inheritable=True)
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="4", LISTEN_FDNAMES="fuse:lock:fuse")
            found = take_stored()
            assert found == {"fuse": 5, "lock": 4, "unknown": 6}
            assert not any(os.get_inheritable(number) for number in found.values())
            assert not any(name.startswith("LISTEN_") for name in os.environ)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "2")
    assert take_stored() == {}
