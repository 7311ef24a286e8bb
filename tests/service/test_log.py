# SPDX-License-Identifier: MIT
"""The log keeps the last lines, sends all to syslog, and never waits."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from zbudfs.service.log import LINE_BYTES, RING_LINES_NR, Log, LogHandler

STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (info|warning|error): (.*)")


@pytest.fixture
def syslog(tmp_path: Path) -> Iterator[socket.socket]:
    """Return our own syslog at tmp_path/log."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(str(tmp_path / "log"))
        service.setblocking(False)
        yield service


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return both ends of a pipe."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def texts(log: Log) -> list[tuple[str, str]]:
    """Return (severity, text) of the ring."""
    found = [STAMPED.fullmatch(line) for line in log.lines()]
    return [(match[1], match[2]) for match in found if match]


def test_the_ring_keeps_the_last_lines(tmp_path: Path) -> None:
    """Without a syslog the last lines are there, oldest first, and the others count as dropped."""
    log = Log(False, syslog_path=str(tmp_path / "none"))
    for number in range(RING_LINES_NR + 5):
        log.info(f"line {number}")
    assert texts(log)[0] == ("info", "line 5")
    assert texts(log)[-1] == ("info", f"line {RING_LINES_NR + 4}")
    assert len(log.lines()) == RING_LINES_NR
    assert log.dropped == RING_LINES_NR + 5


def test_syslog_gets_one_datagram_a_line(tmp_path: Path, syslog: socket.socket) -> None:
    """Each line is a datagram with facility, severity, name and pid."""
    log = Log(False, syslog_path=str(tmp_path / "log"))
    log.info("all is well")
    log.warning("two\nlines")
    log.error("bad")
    got = [syslog.recv(2000).decode() for _ in range(4)]
    me = f"zbudfs[{os.getpid()}]: "
    assert got == [f"<30>{me}all is well", f"<28>{me}two", f"<28>{me}lines", f"<27>{me}bad"]
    assert log.dropped == 0
    log.close()


def test_a_full_syslog_is_not_waited_for(tmp_path: Path, syslog: socket.socket) -> None:
    """If syslog reads nothing, lines are dropped and counted, and the ring has them."""
    log = Log(False, syslog_path=str(tmp_path / "log"))
    for number in range(5000):
        log.info(f"line {number}")
    assert 0 < log.dropped < 5000
    assert texts(log)[-1] == ("info", "line 4999")
    log.close()


def test_a_new_syslog_is_found(tmp_path: Path) -> None:
    """A restarted syslog gets the next line."""
    path = str(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
        first.bind(path)
        log = Log(False, syslog_path=path)
    log.info("to nobody")
    assert log.dropped == 1
    Path(path).unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(path)
        second.setblocking(False)
        log = Log(False, syslog_path=path)
        log.info("to the second")
        assert second.recv(2000).endswith(b"to the second")
    log.close()


def test_stderr_gets_lines_in_the_foreground(pipe: tuple[int, int]) -> None:
    """In the foreground lines go to stderr, with a mark for the bad ones."""
    log = Log(True, stderr_fd=pipe[1])
    log.info("up")
    log.error("down")
    assert os.read(pipe[0], 1000) == b"zbudfs: up\nzbudfs: error: down\n"
    assert os.get_blocking(pipe[1]), "O_NONBLOCK would be everybody's"


def test_a_full_stderr_is_not_waited_for(pipe: tuple[int, int]) -> None:
    """If no program reads stderr, lines are dropped and counted."""
    log = Log(True, stderr_fd=pipe[1])
    for number in range(5000):
        log.info(f"line {number} " + "x" * 100)
    assert 0 < log.dropped < 5000
    assert len(log.lines()) == RING_LINES_NR


def test_a_closed_stderr_is_no_error() -> None:
    """A reader that has gone loses lines, without an error."""
    read, write = os.pipe()
    os.close(read)
    log = Log(True, stderr_fd=write)
    log.info("to nobody")
    assert log.dropped == 1
    os.close(write)
    log.info("to nothing at all")
    assert log.dropped == 2


def test_odd_lines_are_kept_short_and_whole(pipe: tuple[int, int]) -> None:
    """Long lines are cut between characters, bytes that are no text are escaped, and an empty line stays a line."""
    log = Log(True, stderr_fd=pipe[1])
    log.info("ä" * LINE_BYTES)
    log.info("\udce4")
    log.info("")
    assert texts(log) == [("info", "ä" * (LINE_BYTES // 2)), ("info", r"\udce4"), ("info", "")]
    assert log.dropped == 0


def test_records_of_logging_come_here(pipe: tuple[int, int]) -> None:
    """Records of the standard library arrive with severity and traceback, even wrong ones."""
    log = Log(True, stderr_fd=pipe[1])
    logger = logging.Logger("pyfuse3")
    logger.addHandler(LogHandler(log))
    logger.debug("not this")
    logger.info("hello %s", "you")
    logger.warning("hm")
    logger.error("%d", "no number")
    try:
        raise ValueError("a bug")
    except ValueError:
        logger.exception("handler failed")
    found = texts(log)
    assert found[:2] == [("info", "pyfuse3: hello you"), ("warning", "pyfuse3: hm")]
    assert found[2][0] == "error"
    assert "not shown" in found[2][1]
    assert found[3] == ("error", "pyfuse3: handler failed")
    assert found[-1] == ("error", "ValueError: a bug")
