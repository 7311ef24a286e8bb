# SPDX-License-Identifier: MIT
"""The dense packing: the layout of N zpages in a frame, holes, and compaction, which may end at any line."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.core.frames import FILLER, Caller, content, packed_by
from zbudfs.core import dense
from zbudfs.core.allocator import (
    EPHEMERAL_KIND,
    INDEX_MASK,
    MAX_PAGE_NUMBER,
    MOST_ZPAGES,
    NO_REF,
    PERSISTENT_KIND,
    REF_BITS,
    Allocator,
    FrameState,
    max_zpage_size,
)
from zbudfs.core.dense import DEFAULT_ZPAGES, FEWEST_ZPAGES, Dense
from zbudfs.core.packing import DENSE, ZBUD, Packing
from zbudfs.core.units import NO_FRAME, PAGE_SIZE, WORD_SIZE

DIRECTORY = 8 * DEFAULT_ZPAGES
ROOM = PAGE_SIZE - DIRECTORY


@pytest.fixture(scope="module", autouse=True)
def packing() -> Iterator[Packing]:
    """Set the packing of this module."""
    with packed_by(DENSE) as packing:
        yield packing


def holes(caller: Caller) -> list[int]:
    """Fill frame 0 except for a short tail, and free each second zpage. Return the refs of pages 1 and 3."""
    refs = [caller.store(page, 900) for page in range(4)]
    assert {ref >> REF_BITS for ref in refs} == {0}
    caller.free(refs[0])
    caller.free(refs[2])
    return [refs[1], refs[3]]


# ---- the frame -----------------------------------------------------------------------------------------------------


def test_a_directory_and_then_zpages_byte_to_byte() -> None:
    """Zpages lie behind the directory, one after the other, and no other byte of any frame is written."""
    caller = Caller(3)
    caller.take()
    sizes = [100, 1, 777, 64]
    refs = [caller.store(page, size) for page, size in enumerate(sizes)]
    assert [ref & INDEX_MASK for ref in refs] == [0, 1, 2, 3]
    at = PAGE_SIZE + DIRECTORY
    for page, size in enumerate(sizes):
        assert caller.buffer[at : at + size] == content(page, size)
        at += size
    assert caller.buffer[:PAGE_SIZE] == FILLER * PAGE_SIZE
    assert caller.buffer[at:] == FILLER * (3 * PAGE_SIZE - at)
    assert caller.buffer[PAGE_SIZE + 32 : PAGE_SIZE + DIRECTORY] == FILLER * (DIRECTORY - 32)


@pytest.mark.parametrize("zpages", range(FEWEST_ZPAGES, MOST_ZPAGES + 1))
def test_a_frame_has_as_many_zpages_as_the_packing_says(zpages: int) -> None:
    """N small zpages share a frame, however much room there is, and the next one needs another frame."""
    with packed_by(Packing("dense", zpages)):
        caller = Caller(2)
        refs = [caller.store(page, 1) for page in range(zpages)]
        assert {ref >> REF_BITS for ref in refs} == {0}
        assert caller.match(99, 1) == NO_REF
        caller.free(refs[zpages // 2])
        assert caller.match(99, 1) == refs[zpages // 2]
        caller.allocator.check()


@pytest.mark.parametrize("zpages", [0, 1, MOST_ZPAGES + 1])
def test_other_numbers_are_refused(zpages: int) -> None:
    """One zpage to a frame is no packing, and more than there are indices are impossible."""
    buffers = memoryview(bytearray(PAGE_SIZE)), memoryview(bytearray(Dense.table_size(1)))
    with pytest.raises(ValueError, match="zpages to a frame"):
        Dense(*buffers, 1, attach=False, most_zpages=zpages)


def test_a_frame_says_its_layout() -> None:
    """In a frame of another layout or packing, nothing is taken for a zpage."""
    caller = Caller(2)
    ref = caller.create(5, 500)
    words = caller.allocator.frame_bytes(0).cast("Q")
    assert caller.zpage(ref, 5) == content(5, 500)
    words[0] ^= 1 << 56
    assert caller.zpage(ref, 5) is None
    words[0] = 5 << 12 | 500
    assert caller.zpage(ref, 5) is None
    with packed_by(ZBUD):
        other = Caller(1)
        other.create(5, 500)
    caller.allocator.frame_bytes(1)[:] = other.allocator.frame_bytes(0)
    assert all(caller.zpage(1 << REF_BITS | index, 5) is None for index in range(DEFAULT_ZPAGES))


@pytest.mark.parametrize("zpages", range(FEWEST_ZPAGES, MOST_ZPAGES + 1))
def test_there_are_as_many_handles_as_zpages(zpages: int) -> None:
    """Bytes behind the directory are no handle, even if they look like one."""
    with packed_by(Packing("dense", zpages)):
        caller = Caller(1)
        caller.allocator.frame_bytes(0).cast("Q")[:8] = memoryview(
            b"".join((0xD1 << 56 | 7 << 24 | (200 + 10 * index) << 12 | 10).to_bytes(8, "little") for index in range(8))
        ).cast("Q")
        caller.allocator.reset([(0, 1)])
        assert [caller.allocator.restore(index, 7) for index in range(8)] == [index < zpages for index in range(8)]
        caller.allocator.restore_done(0)
        caller.allocator.check()


@example(PAGE_SIZE - 100, 100)
@example(PAGE_SIZE - 99, 100)
@example(1000, 1)
@given(st.integers(0, 4095), st.integers(0, 4095))
def test_a_place_that_cannot_be(offset: int, size: int) -> None:
    """A handle is no zpage if its place is in the directory or beyond the frame, or its size is impossible."""
    caller = Caller(1)
    caller.allocator.frame_bytes(0).cast("Q")[2] = 0xD1 << 56 | 7 << 24 | offset << 12 | size
    possible = offset >= DIRECTORY and offset + size <= PAGE_SIZE and 0 < size <= max_zpage_size()
    view = caller.allocator.zpage(2, 7)
    assert (view is not None) == possible
    assert view is None or len(view) == size
    caller.allocator.reset([(0, 1)])
    assert caller.allocator.restore(2, 7) == possible


@pytest.mark.parametrize("page", [0, 1, MAX_PAGE_NUMBER - 1, MAX_PAGE_NUMBER])
def test_every_page_number(page: int) -> None:
    """A handle holds page numbers of 32 bits beside the layout."""
    caller = Caller(1)
    ref = caller.create(page, 321)
    assert caller.allocator.handle_at(ref) == page
    assert caller.zpage(ref, page) == content(page, 321)
    assert caller.zpage(ref, page ^ 1) is None


# ---- holes ---------------------------------------------------------------------------------------------------------


def test_a_freed_last_zpage_joins_the_tail() -> None:
    """Room at the end needs no compaction."""
    caller = Caller(1)
    refs = [caller.store(page, 1000) for page in range(4)]
    before = bytes(caller.allocator.frame_bytes(0))
    caller.free(refs[3])
    assert caller.match(9, 1000) == refs[3]
    assert (
        bytes(caller.allocator.frame_bytes(0))[: DIRECTORY + 3000][DIRECTORY:] == before[DIRECTORY : DIRECTORY + 3000]
    )


def test_holes_are_made_one_piece() -> None:
    """A zpage that fits only into all holes together is stored. The others move, and keep their refs."""
    caller = Caller(2)
    left = holes(caller)
    room = ROOM - 1800
    size = room // 64 * 64
    assert caller.match(8, size + 64) == NO_REF
    ref = caller.match(9, size)
    assert ref >> REF_BITS == 0
    assert caller.zpage(ref, 9) == content(9, size)
    assert [caller.zpage(kept, page) for kept, page in zip(left, (1, 3), strict=True)] == [
        content(1, 900),
        content(3, 900),
    ]
    caller.allocator.check()


def test_only_the_frame_itself_is_touched() -> None:
    """Compaction moves the bytes of one frame alone."""
    caller = Caller(3)
    filled = [caller.create(70 + page, max_zpage_size()) for page in range(2)]
    assert {ref >> REF_BITS for ref in filled} == {0, 1}
    refs = [caller.store(page, 900) for page in range(4)]
    caller.free(refs[0])
    caller.free(refs[2])
    before = bytes(caller.buffer[: 2 * PAGE_SIZE])
    assert caller.match(9, 2000) >> REF_BITS == 2
    assert caller.buffer[: 2 * PAGE_SIZE] == before


@pytest.mark.parametrize("kind", [PERSISTENT_KIND, EPHEMERAL_KIND])
def test_an_unevictable_frame_offers_its_tail_alone(kind: int) -> None:
    """Nothing moves while a place is filled or read: only the tail is matched. Then the holes count again."""
    caller = Caller(2)
    refs = [caller.create(0, 900, kind), *(caller.match(page, 900, kind) for page in range(1, 4))]
    caller.free(refs[0])
    caller.free(refs[2])
    pending = caller.allocator.match_prep(100, kind)
    assert pending >> REF_BITS == 0
    moved = bytes(caller.allocator.frame_bytes(0)[DIRECTORY:])
    assert caller.match(8, 1500, kind) == NO_REF
    tail = caller.match(9, 64, kind)
    assert tail >> REF_BITS == 0
    assert bytes(caller.allocator.frame_bytes(0)[DIRECTORY : DIRECTORY + 3600]) == moved[:3600]
    caller.allocator.check()
    caller.allocator.match_finish(pending, 7, content(7, 100))
    caller.allocator.check()
    assert caller.match(8, 1500, kind) >> REF_BITS == 0
    for ref, page, size in ((refs[1], 1, 900), (refs[3], 3, 900), (pending, 7, 100), (tail, 9, 64)):
        assert caller.zpage(ref, page) == content(page, size)


@pytest.mark.parametrize("state", [FrameState.ZOMBIE, FrameState.DYING, FrameState.FREE])
def test_frames_that_others_use_are_not_compacted(state: FrameState) -> None:
    """A zombie is on no list, so it is not matched, and a direct call refuses it."""
    caller = Caller(1)
    kind = EPHEMERAL_KIND if state is FrameState.DYING else PERSISTENT_KIND
    refs = [caller.create(0, 900, kind), caller.match(1, 900, kind)]
    caller.free(refs[0])
    if state is FrameState.ZOMBIE:
        caller.allocator.writeback_begin(0)
    elif state is FrameState.DYING:
        caller.allocator.drop_begin(0)
    else:
        caller.free(refs[1])
    assert caller.match(5, 1000, kind) == NO_REF
    assert isinstance(caller.allocator, Dense)
    with pytest.raises(AssertionError, match="others use its bytes"):
        caller.allocator._compact(0)


def test_the_room_of_a_frame_is_never_lost() -> None:
    """A frame with one small zpage takes, after any churn, the largest zpage that leaves room for both."""
    caller, order = Caller(1), random.Random(1)
    refs = [caller.create(0, 10)]
    for page in range(1, 3000):
        if len(refs) > 1 and (order.random() < 0.5 or len(refs) == DEFAULT_ZPAGES):
            caller.free(refs.pop(order.randrange(len(refs))))
        elif (ref := caller.match(page, order.randrange(1, 2000))) != NO_REF:
            refs.append(ref)
    while len(refs) > 1:
        caller.free(refs.pop())
    caller.allocator.check()
    used = sum(size for _, size in caller.allocator._zpages_of(0))
    fits = (PAGE_SIZE - -(-(DIRECTORY + used) // 64) * 64) // 64 * 64
    assert caller.match(9999, min(fits, max_zpage_size())) != NO_REF


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("used", range(60, 140))
def test_no_byte_more_than_there_is_room(used: int, halves: bool) -> None:
    """A zpage that fills its frame to the last chunk is stored, and one that is a byte larger is not."""
    for more in (0, 1):
        caller = Caller(2)
        caller.create(1, used)
        size = PAGE_SIZE - -(-(DIRECTORY + used) // 64) * 64 + more
        assert (caller.match(2, size, halves=halves) != NO_REF) == (not more)
        assert caller.buffer[PAGE_SIZE:] == FILLER * PAGE_SIZE
        caller.allocator.check()


@pytest.mark.parametrize("halves", [False, True])
def test_a_frame_that_is_being_filled_is_filled_up(halves: bool) -> None:
    """A zpage that fits the tail to the last byte needs no compaction, which would be refused."""
    caller = Caller(1)
    pending = caller.allocator.create_prep(caller.take(), 128 - DIRECTORY)
    ref = caller.match(2, PAGE_SIZE - 128, halves=halves)
    assert caller.zpage(ref, 2) == content(2, PAGE_SIZE - 128)
    assert caller.zpage(pending, MAX_PAGE_NUMBER) is None, "it is nobody's yet"
    caller.allocator.create_finish(pending, 1, content(1, 128 - DIRECTORY))
    assert caller.zpage(ref, 2) == content(2, PAGE_SIZE - 128)
    assert caller.zpage(pending, 1) == content(1, 128 - DIRECTORY)
    caller.allocator.check()


# ---- being killed in the middle --------------------------------------------------------------------------------


def killed_at(line: int, call: Callable[[], Any]) -> bool:
    """Call something and raise at its Nth line in core/dense.py. Return whether it reached that line."""

    class Killed(BaseException):
        pass

    seen = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != dense.__file__:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


CROWDED = {1: 1600, 3: 1000, 4: 500}
"""Zpages by page that stay in a frame with small holes between them, so that each moves onto its own bytes."""


def with_small_holes(caller: Caller) -> dict[int, int]:
    """Make frame 1 hold CROWDED with holes before and between, and return the refs by page."""
    caller.create(100, max_zpage_size())
    refs = {page: caller.store(page, {**CROWDED, 0: 50, 2: 100}[page]) for page in range(5)}
    assert {ref >> REF_BITS for ref in refs.values()} == {1}
    for page in (0, 2):
        caller.free(refs.pop(page))
    return refs


def heir_with(caller: Caller, refs: dict[int, int]) -> Allocator:
    """Return the allocator of another process, which has claimed all zpages of frame 1."""
    heir = DENSE.allocator(memoryview(caller.buffer), memoryview(caller.table), 2, attach=True)
    heir.reset([(0, 2)])
    for page, ref in refs.items():
        assert heir.restore(ref, page)
        assert bytes(heir.zpage(ref, page) or b"") == content(page, CROWDED[page])
    assert heir.restore_done(1)
    heir.check()
    return heir


def test_a_death_in_a_compaction_loses_no_zpage() -> None:
    """A kill at each line leaves a state in which a new allocator finds every zpage at its ref, and works on."""
    undone = 0
    for line in itertools.count(1):
        caller = Caller(2)
        refs = with_small_holes(caller)
        old = caller.allocator
        assert isinstance(old, Dense)
        made: list[int] = []
        died = killed_at(line, lambda old=old, made=made: made.append(old.match(9, content(9, 880))))  # type: ignore[misc]
        before = caller.buffer[PAGE_SIZE:]
        heir = heir_with(caller, refs)
        undone += caller.buffer[PAGE_SIZE:] != before
        heir = heir_with(caller, refs)
        assert died or bytes(heir.zpage(made[0], 9) or b"") == content(9, 880), (
            "a copy was put back after the compaction was done"
        )
        ref = heir.match(10, content(10, 880))
        assert ref != NO_REF
        assert bytes(heir.zpage(ref, 10) or b"") == content(10, 880)
        heir_with(caller, refs)
        if not died:
            break
    assert undone > 5, "hardly any death needed the copy"


def test_a_death_while_undoing() -> None:
    """A process that dies while it puts the undo copy back leaves that to the next one."""
    for line in itertools.count(1):
        caller = Caller(2)
        refs = with_small_holes(caller)
        allocator = caller.allocator
        assert isinstance(allocator, Dense)
        if not killed_at(line, lambda allocator=allocator: allocator._compact(1)):  # type: ignore[misc]
            break
        for again in range(1, 8):
            second = DENSE.allocator(memoryview(caller.buffer), memoryview(caller.table), 2, attach=True)
            killed_at(again, lambda second=second: second.reset([(0, 2)]))  # type: ignore[misc]
        heir_with(caller, refs)
    assert line > 20, "the compaction was not seen"


def test_a_copy_is_put_back_once_and_into_its_own_frame() -> None:
    """A copy that was put back is no copy any more, and the number of a frame that does not exist names none."""
    caller = Caller(2)
    allocator = caller.allocator
    assert isinstance(allocator, Dense)
    number = memoryview(caller.table)[-PAGE_SIZE - WORD_SIZE : -PAGE_SIZE].cast("Q")
    copy = b"C" * PAGE_SIZE
    nothing = FILLER * PAGE_SIZE
    for frame, expected in ((-1, nothing * 2), (0, copy + nothing), (1, nothing + copy), (2, nothing * 2)):
        caller.buffer[:] = nothing * 2
        caller.table[-PAGE_SIZE:] = copy
        number[0] = dense._UNDO + frame
        allocator.reset()
        assert caller.buffer == expected
        caller.buffer[:] = nothing * 2
        allocator.reset()
        assert caller.buffer == nothing * 2, "once more"


def test_zpages_that_overlap_are_not_both_restored() -> None:
    """A damaged handle costs its own page: a zpage that would lie on the bytes of another is refused."""
    caller = Caller(1)
    refs = [caller.store(page, 900) for page in range(3)]
    words = caller.allocator.frame_bytes(0).cast("Q")
    words[1] = words[1] - (100 << 12)
    caller.allocator.reset([(0, 1)])
    assert caller.allocator.restore(refs[0], 0)
    assert not caller.allocator.restore(refs[1], 1)
    assert caller.allocator.restore(refs[2], 2)
    assert caller.allocator.restore_done(0)
    caller.allocator.check()


@given(st.permutations(range(4)))
def test_zpages_come_back_in_any_order(order: list[int]) -> None:
    """Neighbours that touch do not overlap, and the tail begins at the end of the last one."""
    caller = Caller(1)
    refs = [caller.store(page, 900) for page in range(4)]
    table, counters = bytes(caller.table), caller.allocator.counters()
    caller.allocator.reset([(0, 1)])
    assert all(caller.allocator.restore(refs[page], page) for page in order)
    assert caller.allocator.restore_done(0)
    caller.allocator.check()
    assert caller.table == table
    assert caller.allocator.counters() == counters


# ---- a copy of a block ---------------------------------------------------------------------------------------------


def test_all_buddies_come_back_with_one() -> None:
    """A frame filled from a block keeps all wanted zpages, and the room of the others is free."""
    source, caller = Caller(1), Caller(2)
    refs = [source.store(page, 500) for page in range(6)]
    caller.allocator.fill_prep(caller.take())
    caller.allocator.frame_bytes(0)[:] = source.allocator.frame_bytes(0)
    caller.allocator.fill_finish(0, [refs[0], refs[3], refs[5]])
    assert caller.allocator.counters()["eph_zpages"] == 3
    assert [resident.page for resident in caller.allocator.residents(0)] == [0, 3, 5]
    caller.allocator.check()
    assert caller.match(9, 2000, EPHEMERAL_KIND) >> REF_BITS == 0
    assert [caller.zpage(refs[page], page) for page in (0, 3, 5)] == [content(page, 500) for page in (0, 3, 5)]
    caller.allocator.check()
    assert caller.allocator.oldest(PERSISTENT_KIND) == NO_FRAME


# ---- names ---------------------------------------------------------------------------------------------------------


def test_packings_by_name() -> None:
    """The name of a packing can be read again, and each packing has its own number, which leads back to it."""
    packings = [ZBUD, *(Packing("dense", zpages) for zpages in range(FEWEST_ZPAGES, MOST_ZPAGES + 1))]
    assert [Packing.parse(str(packing)) for packing in packings] == packings
    assert Packing.parse("dense") == DENSE
    assert len({packing.code for packing in packings}) == len(packings)
    assert all(packing.code and Packing.of_code(packing.code) == packing for packing in packings)
    assert Packing.of_code(0) is None
    assert Packing.of_code(0x101) is None


@pytest.mark.parametrize(
    "text", ["", "Zbud", "zbud:2", "dense:", "dense:1", "dense:8", "dense:06", "dense:\u0666", "z3fold"]
)
def test_wrong_names_of_packings(text: str) -> None:
    """The error names the right forms."""
    with pytest.raises(ValueError, match=r"is not a packing: write zbud, dense, or dense:N with N from 2 to 7"):
        Packing.parse(text)
