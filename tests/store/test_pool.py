# SPDX-License-Identifier: MIT
"""The frames of the pool: free ones, ones with memory, and the limit on used ones."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.core.frames import content, size_of
from tests.store.rig import fill_reserve, made_pool
from zbudfs.core.allocator import EPHEMERAL_KIND, PERSISTENT_KIND, REF_BITS
from zbudfs.core.units import NCHUNKS, NO_FRAME, PAGE_SIZE
from zbudfs.store.memory import BOUNCE_FRAMES
from zbudfs.store.pool import POPULATE_FRAMES, RESERVE_FRAMES, Pool

FRAMES = 24


def numbers(runs: list[tuple[int, int]]) -> list[int]:
    """Return the frames of runs."""
    return [frame for first, count in runs for frame in range(first, first + count)]


def resident(pool: Pool) -> int:
    """Return the populated bytes of the pool's memory."""
    return sum(arena.resident_bytes for arena in pool.memory.arenas)


class PoolMachine(RuleBasedStateMachine):
    """The model has sets of frames: bare, ready, used, and those between bare and ready."""

    def __init__(self) -> None:
        super().__init__()
        self._context = made_pool(FRAMES)
        self.pool = self._context.__enter__()
        self.bare = set(range(FRAMES))
        self.ready: set[int] = set()
        self.used: set[int] = set()
        self.coming: list[list[tuple[int, int]]] = []
        self.going: list[list[tuple[int, int]]] = []

    def teardown(self) -> None:
        """Release the memory."""
        self._context.__exit__(None, None, None)

    @rule()
    def take_bare(self) -> None:
        """Take as many bare frames as the reserve lacks, and no more than the limit allows."""
        runs = self.pool.take_bare()
        taken = numbers(runs)
        assert len(set(taken)) == len(taken)
        assert set(taken) <= self.bare
        assert len(taken) <= max(0, self.pool.reserve_frames - len(self.ready))
        assert taken or not self.bare or len(self.ready) >= self.pool.reserve_frames
        self.bare -= set(taken)
        if runs:
            self.coming.append(runs)

    @precondition(lambda self: self.coming)
    @rule(succeeds=st.booleans())
    def populated(self, succeeds: bool) -> None:
        """Finish populating: the memory is there, or was refused."""
        runs = self.coming.pop(0)
        if succeeds:
            self.pool.populate(runs)
            self.pool.add_ready(runs)
            self.ready |= set(numbers(runs))
        else:
            self.pool.add_bare(runs)
            self.bare |= set(numbers(runs))

    @rule(times=st.integers(1, 8))
    def take(self, times: int) -> None:
        """Take a ready frame, unless the limit is reached."""
        for _ in range(times):
            frame = self.pool.take_frame()
            possible = bool(self.ready) and len(self.used) < self.pool.limit_frames
            assert (frame != NO_FRAME) == possible
            if possible:
                assert frame in self.ready
                self.ready.remove(frame)
                self.used.add(frame)
                self.pool.allocator.create_raw(frame, frame, content(frame, PAGE_SIZE))

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """Give a used frame back, which is ready then."""
        frame = data.draw(st.sampled_from(sorted(self.used)))
        assert self.pool.allocator.free(frame << REF_BITS) == frame
        self.pool.give_frame(frame)
        self.used.remove(frame)
        self.ready.add(frame)

    @rule(keep=st.integers(0, FRAMES), most=st.integers(1, FRAMES))
    def take_surplus(self, keep: int, most: int) -> None:
        """Take ready frames beyond the reserve, to release them."""
        runs = self.pool.take_surplus(keep, most)
        taken = set(numbers(runs))
        assert taken <= self.ready
        assert len(taken) == len(numbers(runs)) == max(0, min(len(self.ready) - keep, most))
        self.ready -= taken
        if runs:
            self.going.append(runs)

    @precondition(lambda self: self.going)
    @rule()
    def released(self) -> None:
        """Finish the release: the frames are bare."""
        runs = self.going.pop(0)
        self.pool.release(runs)
        self.pool.add_bare(runs)
        self.bare |= set(numbers(runs))

    @rule(limit=st.integers(1, FRAMES))
    def limit(self, limit: int) -> None:
        """Lower the limit, even below the used frames, or raise it."""
        self.pool.limit_frames = limit

    @invariant()
    def agrees(self) -> None:
        """Counts equal the model's, and used frames have their content."""
        pool = self.pool
        pool.check()
        assert pool.ready_frames == len(self.ready)
        assert pool.used_frames == len(self.used) <= FRAMES
        assert pool.free_frames == pool.limit_frames - len(self.used)
        assert pool.reserve_frames == max(0, min(RESERVE_FRAMES, pool.free_frames))
        for frame in self.used:
            assert pool.allocator.frame_bytes(frame) == content(frame, PAGE_SIZE)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_frame_is_bare_at_first() -> None:
    """No frame can be taken before it has memory, and only bounce frames and ends of lists have memory."""
    with made_pool(1000) as pool:
        assert pool.take_frame() == NO_FRAME
        assert pool.memory.frames.resident_bytes == BOUNCE_FRAMES * PAGE_SIZE
        assert pool.memory.frame_table.resident_bytes <= 8 * PAGE_SIZE
        assert pool.memory.free_frames.resident_bytes == 0
        assert pool.free_frames == pool.limit_frames == 1000


def test_the_limit_is_kept_to_the_frame() -> None:
    """Exactly as many frames can be taken as the limit says, each once, and one more after one is given back."""
    with made_pool(100) as pool:
        fill_reserve(pool)
        pool.limit_frames = 37
        taken = [pool.take_frame() for _ in range(37)]
        assert sorted(taken) == sorted(set(taken))
        assert NO_FRAME not in taken
        assert pool.take_frame() == NO_FRAME
        pool.give_frame(taken[5])
        assert pool.take_frame() == taken[5]
        assert pool.take_frame() == NO_FRAME
        pool.limit_frames = 20
        assert pool.free_frames == -17
        assert pool.reserve_frames == 0
        pool.give_frame(taken[0])
        assert pool.take_frame() == NO_FRAME


@pytest.mark.parametrize("nr_frames", [1, 7, 1000, 5000])
def test_a_ready_frame_needs_no_more_memory(nr_frames: int) -> None:
    """Work with ready frames takes no page of memory that `populate` has not made."""
    with made_pool(nr_frames) as pool:
        fill_reserve(pool)
        before = resident(pool)
        allocator, frames = pool.allocator, []
        while (frame := pool.take_frame()) != NO_FRAME:
            frames.append(frame)
            pool.block_of[frame] = frame
        assert len(frames) == min(nr_frames, RESERVE_FRAMES)
        for index, frame in enumerate(frames):
            if index % 4 == 0:
                allocator.create_raw(frame, index, content(index, PAGE_SIZE))
            elif index % 4 == 1:
                allocator.fill_prep(frame)
                allocator.fill_finish_raw(frame, index)
            else:
                size = size_of(1 + index % (NCHUNKS - 1))
                kind = (PERSISTENT_KIND, EPHEMERAL_KIND)[index % 2]
                allocator.create_finish(allocator.create_prep(frame, size, kind), index, content(index, size))
        while (frame := allocator.oldest(PERSISTENT_KIND)) != NO_FRAME:
            allocator.writeback_begin(frame)
            pool.give_frame(allocator.writeback_done(frame))
        while (frame := allocator.oldest(EPHEMERAL_KIND)) != NO_FRAME:
            allocator.drop_begin(frame)
            pool.give_frame(allocator.drop_done(frame))
        assert pool.used_frames == 0
        assert resident(pool) == before
        pool.check()


def test_the_reserve_is_filled_in_steps() -> None:
    """Memory comes in pieces of limited size, lowest frames first, until the reserve is full."""
    with made_pool(3 * RESERVE_FRAMES) as pool:
        pieces = []
        while runs := pool.take_bare():
            pieces.append(len(numbers(runs)))
            pool.populate(runs)
            pool.add_ready(runs)
        assert max(pieces) == POPULATE_FRAMES
        assert sum(pieces) == pool.ready_frames == RESERVE_FRAMES
        assert {pool.take_frame() for _ in range(RESERVE_FRAMES)} == set(range(RESERVE_FRAMES))
        fill_reserve(pool)
        assert {pool.take_frame() for _ in range(RESERVE_FRAMES)} == set(range(RESERVE_FRAMES, 2 * RESERVE_FRAMES))


def test_memory_goes_and_comes_back() -> None:
    """Released frames have no memory. They are populated again before frames that never had memory."""
    with made_pool(500) as pool:
        pool.limit_frames = 300
        fill_reserve(pool)
        before = pool.memory.frames.resident_bytes
        taken = pool.take_surplus(100, 150)
        pool.release(taken)
        assert pool.memory.frames.resident_bytes == before - 150 * PAGE_SIZE
        pool.add_bare(taken)
        pool.limit_frames = 500
        again = pool.take_bare()
        assert sorted(numbers(again)) == sorted(numbers(taken))
        pool.populate(again)
        pool.add_ready(again)
        assert pool.memory.frames.resident_bytes == before
        pool.check()


def test_bounce_frames_are_no_pool_frames() -> None:
    """The bounce frames are behind the pool's frames, have memory, and are never taken."""
    with made_pool(50) as pool:
        fill_reserve(pool)
        taken = {pool.take_frame() for _ in range(50)}
        assert taken == set(range(50))
        assert sorted(pool.bounce) == list(range(50, 50 + BOUNCE_FRAMES))
        assert len(pool.frames) == (50 + BOUNCE_FRAMES) * PAGE_SIZE
        for frame in pool.bounce:
            pool.allocator.frame_bytes(frame)[:] = b"b" * PAGE_SIZE
        assert all(pool.allocator.frame_bytes(frame) == bytes(PAGE_SIZE) for frame in taken)


def test_check_sees_a_frame_that_is_in_two_places() -> None:
    """A frame that is free twice, or free and in use, is found."""
    with made_pool(10) as pool:
        fill_reserve(pool)
        frame = pool.take_frame()
        with pytest.raises(AssertionError, match="1 frames used, the allocator holds 0"):
            pool.check()
        pool.allocator.create_raw(frame, 1, bytes(PAGE_SIZE))
        pool.check()
        pool.give_frame(frame)
        pool.used_frames += 1
        with pytest.raises(AssertionError, match="is the allocator's"):
            pool.check()
