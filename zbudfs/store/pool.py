# SPDX-License-Identifier: MIT
"""The pool: the frames of RAM, which of them are free, and how many may be in use.

    bare      mapped, without memory                       --populate-->  ready
    ready     free and populated: can be used at once      --take--> used, --trim--> bare
    used      the allocator's (a page in it, being filled, or being written back)

The pool keeps a reserve of ready frames ahead of need, so that storing a page does not wait for memory as long as populating
keeps up. It gives the surplus back to the system. `used_frames <= limit_frames` holds whenever a frame is taken. A few bounce
frames follow the frames of the pool. They never belong to the allocator: they take a block that is read when there is no
frame to keep it.
"""

from typing import Final

from zbudfs.core.units import NO_FRAME, PAGE_SHIFT
from zbudfs.store.memory import BOUNCE_FRAMES, FRAME_ENTRY_BYTES, StoreMemory
from zbudfs.store.status_area import Field

RESERVE_FRAMES: Final = 512
"""Ready frames of the reserve: 2 MiB, some 20 ms of the fastest fill that was measured (25,000 frames a second)."""

ACTIVE_RESERVE_FRAMES: Final = 4096
"""Ready frames of the reserve while the pool is being filled: 16 MiB. A storm's fill was 8 % faster with it."""

POPULATE_FRAMES: Final = 512
"""Frames that one call populates: 2 MiB, about 1 ms."""

BEAT_FRAMES: Final = 8192
"""Frames between two heartbeats in a rebuild: 32 MiB, some 20 ms."""


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return numbers as runs of neighbours: [(first, count), ...] in ascending order."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


class Pool:
    """The frames of `memory`; all of them are bare at first.

    `allocator` is the allocator over them, `frames` the memoryview of their bytes. `block_of[frame]` is the block of which
    an ephemeral frame is a copy. `stored_at[frame]` is the second, on the store's own clock, of the last store to a
    persistent frame. The two are one column, since no frame is both. `limit_frames` may be lowered below `nr_frames` and
    raised again. With `attach` the constructor writes nothing, and `restore` must come before any other call.
    """

    def __init__(self, memory: StoreMemory, *, attach: bool = False) -> None:
        self.memory = memory
        self.nr_frames = nr_frames = memory.nr_frames
        self.limit_frames = nr_frames
        self.frames = memory.frames.view
        own = memory.free_frames.view[: FRAME_ENTRY_BYTES * nr_frames].cast("I")
        self.block_of = self.stored_at = own[:nr_frames]
        self._stack = own[nr_frames:]  # ready frames from the left; from the right, bare frames that were ready before
        self.ready_frames = 0
        self.reserve_wanted = RESERVE_FRAMES
        """Size of the reserve in frames, where the limit allows it; larger while the pool is being filled."""
        self._trimmed = 0
        self._fresh = 0  # frames from this number on were never populated
        self.used_frames = 0
        self.bounce = list(range(nr_frames, nr_frames + BOUNCE_FRAMES))
        self.allocator = memory.packing.allocator(self.frames, memory.frame_table.view, nr_frames, attach=attach)

    def restore(self, populated: list[tuple[int, int]]) -> None:
        """Sort the frames into used, ready and bare ones, after the zpages of a store are claimed (`Allocator.restore`).

        `populated` has the frames with memory, as runs (first, count).
        """
        self.used_frames = self.ready_frames = self._trimmed = self._fresh = 0
        restore_done = self.allocator.restore_done
        beat = self.memory.status_area.beat
        for first, count in populated:
            if first > self._fresh:
                self.add_bare([(self._fresh, first - self._fresh)])
            self._fresh = first + count
            for frame in range(first, first + count):
                if not (frame - first) % BEAT_FRAMES:
                    beat()
                    self.memory.populate_frames([(frame, min(BEAT_FRAMES, first + count - frame))])
                if restore_done(frame):
                    self.used_frames += 1
                    self.stored_at[frame] = 0  # the order of the LRU is lost, and ages start again
                else:
                    self._stack[self.ready_frames] = frame
                    self.ready_frames += 1
        self._tell_populated(self.used_frames + self.ready_frames)

    def _tell_populated(self, frames: int) -> None:
        """Add `frames` to the count of populated frames in the status area, so that a standby maps them."""
        fields = self.memory.status_area.fields
        fields[Field.FRESH_FRAMES] = self._fresh
        fields[Field.POPULATED_FRAMES] += frames

    # ---- taking and giving -------------------------------------------------------------------------------------

    def take_frame(self) -> int:
        """Take a ready frame, which is used from then on; NO_FRAME at the limit or if none is ready."""
        ready = self.ready_frames
        used = self.used_frames
        if not ready or used >= self.limit_frames:
            return NO_FRAME
        self.ready_frames = ready = ready - 1
        self.used_frames = used + 1
        return self._stack[ready]

    def give_frame(self, frame: int) -> None:
        """Free a used frame."""
        self._stack[self.ready_frames] = frame
        self.ready_frames += 1
        self.used_frames -= 1

    @property
    def free_frames(self) -> int:
        """Number of frames that may be used now; negative while the limit is below the frames in use."""
        return self.limit_frames - self.used_frames

    # ---- populating and trimming -------------------------------------------------------------------------------

    @property
    def reserve_frames(self) -> int:
        """Number of ready frames that there should be now: the reserve, or all that the limit still allows."""
        return max(0, min(self.reserve_wanted, self.free_frames))

    def take_bare(self) -> list[tuple[int, int]]:
        """Take bare frames to be populated next, as runs (first, count); none if the reserve is full."""
        want = min(self.reserve_frames - self.ready_frames, POPULATE_FRAMES)
        if want <= 0:
            return []
        if self._trimmed:
            count = min(want, self._trimmed)
            end = self.nr_frames - self._trimmed
            frames = list(self._stack[end : end + count])
            self._trimmed -= count
            return _runs(frames)
        count = min(want, self.nr_frames - self._fresh)
        self._fresh += count
        return [(self._fresh - count, count)] if count else []

    def populate(self, runs: list[tuple[int, int]]) -> None:
        """Populate the frames of `take_bare`. MemoryError. For a worker thread: it changes no state."""
        self.memory.check_room(sum(count for _, count in runs) << PAGE_SHIFT)
        self.memory.populate_frames(runs)

    def add_ready(self, runs: list[tuple[int, int]]) -> None:
        """Add the frames of `take_bare`, which are populated now, to the ready ones."""
        for first, count in runs:
            for frame in range(first, first + count):
                self._stack[self.ready_frames] = frame
                self.ready_frames += 1
        self._tell_populated(sum(count for _, count in runs))

    def add_bare(self, runs: list[tuple[int, int]]) -> None:
        """Add frames of `take_bare` that could not be populated, or of `take_surplus` that are released, to the bare ones."""
        for first, count in runs:
            for frame in range(first, first + count):
                self._trimmed += 1
                self._stack[self.nr_frames - self._trimmed] = frame

    def take_surplus(self, keep: int, most: int) -> list[tuple[int, int]]:
        """Take up to `most` ready frames beyond `keep`, to be released, as runs (first, count)."""
        count = min(self.ready_frames - keep, most)
        if count <= 0:
            return []
        self.ready_frames -= count
        return _runs(list(self._stack[self.ready_frames : self.ready_frames + count]))

    def release(self, runs: list[tuple[int, int]]) -> None:
        """Release the memory of the frames. For a worker thread."""
        for first, count in runs:
            self.memory.frames.release(first << PAGE_SHIFT, count << PAGE_SHIFT)

    def check(self) -> None:
        """Raise AssertionError unless each frame is either free or the allocator's, and only once. O(frames)."""
        bare = list(self._stack[self.nr_frames - self._trimmed :]) if self._trimmed else []
        free = [*self._stack[: self.ready_frames], *bare, *range(self._fresh, self.nr_frames)]
        assert len(set(free)) == len(free), "a frame is free twice"
        counters = self.allocator.counters()
        held = counters["pers_pageframes"] + counters["eph_pageframes"]
        assert held == self.used_frames, f"{self.used_frames} frames used, the allocator holds {held}"
        for frame in free:
            assert not self.allocator.state(frame), f"free frame {frame} is the allocator's"
