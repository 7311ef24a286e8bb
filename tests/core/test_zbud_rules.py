# SPDX-License-Identifier: MIT
"""The rules of zbud alone: the places of two zpages in a frame, and the room that is left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.frames import FILLER, Caller, content, size_of
from tests.core.test_allocator_rules import BOTH, HALF, frame_of, zombie
from zbudfs.core.allocator import (
    EPHEMERAL_KIND,
    HANDLE_SIZE,
    MAX_CHUNKS,
    NO_REF,
    SIZE_BITS,
    chunks_for,
    max_zpage_size,
)
from zbudfs.core.units import CHUNK_SIZE, NCHUNKS, PAGE_SIZE, PAGE_WORDS

# ---- rule 1: two zpages to a frame, first and last, on boundaries of 64 bytes ------------------------------------


def test_rule_1_the_first_starts_at_the_start() -> None:
    """A first zpage of any size lies behind its handle at the start of its frame, and no other byte is written."""
    for size in range(1, max_zpage_size() + 1):
        caller = Caller(3)
        caller.take()
        ref = caller.create(7, size)
        assert frame_of(ref) == 1
        assert caller.zpage(ref, 7) == content(7, size)
        end = PAGE_SIZE + HANDLE_SIZE + size
        assert caller.buffer[PAGE_SIZE + HANDLE_SIZE : end] == content(7, size)
        assert caller.buffer[:PAGE_SIZE] == FILLER * PAGE_SIZE
        assert caller.buffer[end:] == FILLER * (3 * PAGE_SIZE - end)


def test_rule_1_the_last_is_right_justified_on_a_boundary() -> None:
    """A last zpage starts on a chunk's boundary, ends with its handle at the frame's end, and changes no other."""
    for size in range(1, size_of(NCHUNKS - 1) + 1):
        caller = Caller(3)
        caller.take()
        first = caller.create(1, 56)
        last = caller.match(2, size)
        assert frame_of(last) == frame_of(first) == 1
        assert last != first
        assert caller.zpage(last, 2) == content(2, size)
        assert caller.zpage(first, 1) == content(1, 56)
        start = 2 * PAGE_SIZE - chunks_for(size) * CHUNK_SIZE
        assert caller.buffer[start : start + size] == content(2, size)
        assert caller.buffer[PAGE_SIZE + CHUNK_SIZE : start] == FILLER * (start - PAGE_SIZE - CHUNK_SIZE)
        pad = slice(start + size, 2 * PAGE_SIZE - HANDLE_SIZE)
        assert caller.buffer[pad] == FILLER * (pad.stop - pad.start)
        assert caller.buffer[:PAGE_SIZE] == caller.buffer[2 * PAGE_SIZE :] == FILLER * PAGE_SIZE


def test_rule_1_free_space_is_one_piece() -> None:
    """Two zpages share a frame exactly if their chunks together fit into it."""
    for first in range(1, NCHUNKS):
        for second in range(1, NCHUNKS):
            caller = Caller(1)
            caller.create(1, size_of(first))
            assert (caller.match(2, size_of(second)) != NO_REF) == (first + second <= NCHUNKS), (first, second)


def test_rule_1_never_a_third() -> None:
    """A frame with two buddies is matched with nothing, however much room there is."""
    caller = Caller(1)
    caller.create(1, 1)
    assert caller.match(2, 1) != NO_REF
    assert caller.match(3, 1) == NO_REF


@pytest.mark.parametrize("freed", [0, 1])
@pytest.mark.parametrize("kind", BOTH)
def test_rule_1_the_hole_joins_the_slack(freed: int, kind: int) -> None:
    """If either buddy goes, the other one stays in its place, and the free room is one piece again."""
    caller = Caller(1)
    refs = [caller.create(0, size_of(20), kind), caller.match(1, size_of(30), kind)]
    kept, used = 1 - freed, (30, 20)[freed]
    assert caller.allocator.zpage(refs[kept], kept) is not None
    before = bytes(caller.allocator.frame_bytes(0))
    caller.free(refs[freed])
    assert bytes(caller.allocator.frame_bytes(0)) == before
    assert caller.match(2, size_of(NCHUNKS - used) + 1, kind) == NO_REF
    assert caller.match(3, size_of(NCHUNKS - used), kind) == refs[freed]
    assert caller.zpage(refs[kept], kept) == content(kept, size_of((20, 30)[kept]))
    caller.allocator.check()


def test_rule_2_the_handle_counts_towards_the_chunks() -> None:
    """Zpage and handle together are rounded up to chunks."""
    assert HANDLE_SIZE == 8
    assert [chunks_for(size) for size in (1, 55, 56, 57, 120, 121)] == [1, 1, 1, 2, 2, 3]
    assert all(chunks_for(size_of(chunks)) == chunks < chunks_for(size_of(chunks) + 1) for chunks in range(1, NCHUNKS))


def test_rule_2_a_frame_of_nonsense_holds_nothing() -> None:
    """A handle with an impossible size is no zpage, whichever page it names."""
    allocator = Caller(1).allocator
    for size in (0, max_zpage_size() + 1, PAGE_SIZE - 1):
        allocator.frame_bytes(0).cast("Q")[0] = 5 << 12 | size
        allocator.frame_bytes(0).cast("Q")[511] = 5 << 12 | size
        assert allocator.zpage(0, 5) is None
        assert allocator.zpage(1, 5) is None
    allocator.frame_bytes(0)[:] = bytes(PAGE_SIZE)
    assert allocator.zpage(0, 0) is None


def test_rule_2_the_largest_zpage() -> None:
    """The largest zpage takes 63 chunks with its handle. The chunk that is left can be used."""
    assert max_zpage_size() == 63 * 64 - 8 == size_of(MAX_CHUNKS)
    caller = Caller(1)
    ref = caller.create(1, max_zpage_size())
    assert caller.zpage(ref, 1) == content(1, max_zpage_size())
    assert caller.match(2, size_of(1) + 1) == NO_REF
    assert caller.match(2, size_of(1)) != NO_REF
    caller.allocator.check()


@pytest.mark.parametrize("halves", [False, True])
@given(st.lists(st.integers(1, MAX_CHUNKS), min_size=1, max_size=12), st.integers(1, MAX_CHUNKS), st.sampled_from(BOTH))
def test_rule_3_the_fullest_frame_that_fits(halves: bool, used: list[int], wanted: int, kind: int) -> None:
    """The match is the fullest frame that has room. If none has room, the zpage gets its own frame."""
    caller = Caller(len(used))
    for page, chunks in enumerate(used):
        caller.create(page, size_of(chunks), kind)
    best = max((chunks for chunks in used if chunks + wanted <= NCHUNKS), default=None)
    ref = caller.match(99, size_of(wanted), kind, halves=halves)
    if best is None:
        assert ref == NO_REF
    else:
        assert used[frame_of(ref)] == best


@pytest.mark.parametrize("freed", [0, 1])
def test_rule_7_what_is_left_of_a_failed_writeback_can_be_matched(freed: int) -> None:
    """A frame that lost a buddy as a zombie is unbuddied afterwards, with the right amount of room."""
    caller = Caller(1)
    refs = zombie(caller)
    caller.free(refs[freed])
    caller.allocator.writeback_failed(0)
    assert caller.allocator.unbuddied_lists()[20] == 1
    assert caller.match(3, size_of(NCHUNKS - 20) + 1) == NO_REF
    assert caller.match(3, size_of(NCHUNKS - 20)) == refs[freed]
    caller.allocator.check()


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("chunks", [34, 35])
def test_rule_8_zpages_that_overlap_are_not_both_restored(damaged: int, chunks: int) -> None:
    """A handle with a wrong length costs its own page, and only if the zpage would lie on the other buddy."""
    caller = Caller(1)
    refs = [caller.create(0, size_of(30)), caller.match(1, size_of(30))]
    words = caller.allocator.frame_bytes(0).cast("Q")
    words[(0, PAGE_WORDS - 1)[damaged]] = damaged << SIZE_BITS | size_of(chunks)
    caller.allocator.reset([(0, 1)])
    assert caller.allocator.restore(refs[1 - damaged], 1 - damaged)
    assert caller.allocator.restore(refs[damaged], damaged) == (30 + chunks <= NCHUNKS)
    assert caller.allocator.restore_done(0)
    caller.allocator.check()


def test_rule_9_what_the_kernel_could_not_show() -> None:
    """Statistics have the length of each unbuddied list, and the number of zpages by chunks, of both kinds together."""
    caller = Caller(8)
    caller.create(1, size_of(1))
    for page in range(2):
        caller.create(page, size_of(63))
    caller.create(2, size_of(5), EPHEMERAL_KIND)
    caller.create(2, size_of(40))
    assert caller.match(3, size_of(2)) != NO_REF
    unbuddied, histogram = caller.allocator.unbuddied_lists(), caller.allocator.chunk_histogram()
    assert len(unbuddied) == len(histogram) == NCHUNKS == 64
    assert {chunks: count for chunks, count in enumerate(unbuddied) if count} == {1: 1, 5: 1, 63: 2}
    assert {chunks: count for chunks, count in enumerate(histogram) if count} == {1: 1, 2: 1, 5: 1, 40: 1, 63: 2}
    unbuddied[1] = histogram[1] = 99
    assert 99 not in caller.allocator.unbuddied_lists() + caller.allocator.chunk_histogram()


def test_rule_9_check_finds_what_does_not_add_up() -> None:
    """The recount finds a handle, a chunk count or a frame that was changed without the allocator."""
    for offset, value in ((0, 5), (PAGE_SIZE - HANDLE_SIZE, 3900)):
        caller = Caller(1)
        caller.create(1, HALF)
        caller.match(2, HALF)
        caller.allocator.check()
        caller.buffer[offset : offset + 2] = value.to_bytes(2, "little")
        with pytest.raises(AssertionError):
            caller.allocator.check()
