# SPDX-License-Identifier: MIT
"""The status area: one process reads the values that another one wrote, and no value overlaps another."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from zbudfs.core.errors import LayoutError
from zbudfs.core.statistics import COUNTERS
from zbudfs.store.arena import Arena
from zbudfs.store.status_area import INIT_BYTES, LAYOUT, LOG_LINE_BYTES, LOG_LINES, STATUS_AREA_BYTES, Field, StatusArea

FACTS = {"size_bytes": 1 << 30, "pool_frames": 1 << 15, "backed": 1, "persistent": 1}


@pytest.fixture
def area() -> StatusArea:
    """Return a new status area."""
    return StatusArea(Arena("board", STATUS_AREA_BYTES))


def test_a_new_status_area_is_empty(area: StatusArea) -> None:
    """All numbers are 0, and there is no request, no error and no line."""
    assert [area.fields[field] for field in Field] == [0] * len(Field)
    assert not any(area.counters.by_name().values())
    assert (area.init(), area.take_error(), area.lines()) == (b"", "", [])


def test_all_of_it_has_memory_from_the_start() -> None:
    """No later access to the status area is a page fault that needs memory."""
    arena = Arena("board", STATUS_AREA_BYTES)
    StatusArea(arena)
    assert arena.resident_bytes == arena.size


def test_everything_is_seen_by_others(tmp_path: Path) -> None:
    """Two boards on one file have the same content."""
    mine, theirs = (StatusArea(Arena("board", STATUS_AREA_BYTES, str(tmp_path))) for _ in range(2))
    mine.fields[Field.HEARTBEAT] += 7
    mine.counters.cumul_written_pages += 3
    mine.save_init(b"init")
    mine.save_error("no memory")
    mine.add_line("first")
    theirs.add_line("second")
    assert theirs.fields[Field.HEARTBEAT] == 7
    assert theirs.counters.cumul_written_pages == 3
    assert theirs.init() == b"init"
    assert theirs.take_error() == "no memory"
    assert mine.take_error() == ""
    assert mine.lines() == theirs.lines() == ["first", "second"]


def test_a_child_writes_where_its_parent_reads(area: StatusArea) -> None:
    """A forked process shares memory without a name."""
    pid = os.fork()
    if not pid:
        area.fields[Field.WORKER_PID] = os.getpid()
        area.add_line("here")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert area.fields[Field.WORKER_PID] == pid
    assert area.lines() == ["here"]


# ---- claims --------------------------------------------------------------------------------------------------------------


def test_a_claim_is_kept(area: StatusArea) -> None:
    """The first claim is stored, and the same claim is accepted again."""
    area.claim(**FACTS)
    assert area.fields[Field.LAYOUT] == LAYOUT
    assert area.fields[Field.SIZE_BYTES] == 1 << 30
    assert area.fields[Field.PERSISTENT] == 1
    area.claim(**FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_another_claim_is_refused(name: str, area: StatusArea) -> None:
    """A different claim is refused with names and numbers, and nothing changes."""
    area.claim(**FACTS)
    before = list(area.fields)
    with pytest.raises(LayoutError, match=rf"{name} {FACTS[name]:#x}, this version wants {FACTS[name] + 1:#x}"):
        area.claim(**{**FACTS, name: FACTS[name] + 1})
    assert list(area.fields) == before


def test_a_layout_that_is_not_known_is_refused(area: StatusArea) -> None:
    """Another layout is refused, even if all else is the same."""
    area.claim(**FACTS)
    area.fields[Field.LAYOUT] = LAYOUT - 1
    with pytest.raises(LayoutError, match="layout"):
        area.claim(**FACTS)


# ---- numbers and texts -----------------------------------------------------------------------------------------------


def test_every_counter_of_the_store_has_room(area: StatusArea) -> None:
    """Large values of all counters can be read back, and nothing else changes."""
    values = {name: (1 << 64) - 1 - number for number, name in enumerate(COUNTERS)}
    for name, value in values.items():
        setattr(area.counters, name, value)
    assert area.counters.by_name() == values
    assert [area.fields[field] for field in Field] == [0] * len(Field)
    assert (area.init(), area.take_error(), area.lines()) == (b"", "", [])


def test_a_request_is_kept_as_it_is(area: StatusArea) -> None:
    """FUSE_INIT may have any bytes, including zeros at its end."""
    request = random.Random(1).randbytes(102) + bytes(10)
    area.save_init(request)
    assert area.init() == area.init() == request
    assert area.take_error() == ""


def test_an_error_is_taken_once(area: StatusArea) -> None:
    """The first reader takes the error, and a later, shorter error is not mixed with it."""
    area.save_error("the first error, a long one")
    assert area.take_error() == "the first error, a long one"
    assert area.take_error() == ""
    area.save_error("später €")
    assert area.take_error() == "später €"


def test_an_error_that_is_too_long_is_cut(area: StatusArea) -> None:
    """A long error does not overlap the log, with any characters."""
    area.add_line("a line")
    area.save_error("€" * 5000)
    assert area.lines() == ["a line"]
    told = area.take_error()
    assert 500 < len(told) < 5000
    assert set(told[:-1]) == {"€"}


def test_paths_that_are_no_text(area: StatusArea) -> None:
    """Errors and lines may have surrogate escapes."""
    text = os.fsdecode(b"/mnt/\xe4")
    area.save_error(text)
    area.add_line(text)
    assert area.take_error().startswith("/mnt/")
    assert area.lines()[0].startswith("/mnt/")


# ---- log ---------------------------------------------------------------------------------------------------------------


def test_the_last_lines_are_kept(area: StatusArea) -> None:
    """The oldest lines go, the order stays, and a short line has no rest of a long one behind it."""
    lines = [f"{number} {'x' * (number % 300)}" for number in range(3 * LOG_LINES + 5)]
    for count, line in enumerate(lines, 1):
        area.add_line(line)
        if count in (1, LOG_LINES - 1, LOG_LINES, LOG_LINES + 1, len(lines)):
            assert area.lines() == lines[max(0, count - LOG_LINES) : count]


@pytest.mark.parametrize("size", [LOG_LINE_BYTES - 1, LOG_LINE_BYTES, LOG_LINE_BYTES + 1, 10 * LOG_LINE_BYTES])
def test_a_long_line_is_cut(size: int, area: StatusArea) -> None:
    """The neighbours of a long line are whole."""
    for line in ("before", "x" * size, "after"):
        area.add_line(line)
    assert area.lines() == ["before", "x" * min(size, LOG_LINE_BYTES), "after"]


def test_a_cut_in_a_character_is_no_error(area: StatusArea) -> None:
    """A character that was cut is replaced."""
    area.add_line("€" * LOG_LINE_BYTES)
    (line,) = area.lines()
    assert line.startswith("€" * (LOG_LINE_BYTES // 3))


def test_the_whole_log_fits(area: StatusArea) -> None:
    """The last slot ends within the status area."""
    for number in range(LOG_LINES):
        area.add_line(chr(ord("a") + number % 26) * LOG_LINE_BYTES)
    assert [line[0] * LOG_LINE_BYTES == line for line in area.lines()] == [True] * LOG_LINES


def test_the_first_request_spares_the_key(area: StatusArea) -> None:
    """The longest accepted request does not change the key, and a longer one is refused."""
    key = area.key(32)
    area.save_init(b"x" * INIT_BYTES)
    assert (area.init(), area.key(32)) == (b"x" * INIT_BYTES, key)
    with pytest.raises(ValueError, match="1017 bytes"):
        area.save_init(b"x" * (INIT_BYTES + 1))
    assert area.key(32) == key
