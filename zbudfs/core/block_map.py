# SPDX-License-Identifier: MIT
"""The map of the backing file: which blocks are free, and which zpages of the blocks in use are live.

The file is divided into segments of 64 blocks (256 KiB). A segment is a hole or ready. The file system has given a hole no
space yet, or has got it back. A ready segment is allocated and written over, so that a write there changes no metadata. It
has a 64-bit mask of its free blocks, and is on the list of segments with that many free ones. So the emptiest segment,
which has room for the longest run of neighbouring blocks, is found without a scan. Ready free blocks are always used
before the file grows.

The segments from `_fresh` on have never been ready. They are holes and on no list, so that no operation takes longer
because the file may become large.

    segment   hole --grow--> ready, 64 free --alloc--> ready, n free --last free--> ready, 64 free --punch--> hole

A block is in use from `alloc` until its last live zpage is freed. A bit mask for each block says which zpages are live,
with one bit for each zpage that a frame can hold.
"""

from collections.abc import Callable
from typing import Final

from zbudfs.core.lists import IndexLists

SEGMENT_BLOCKS: Final = 64
NO_SEGMENT: Final = -1
_ALL_FREE: Final = (1 << SEGMENT_BLOCKS) - 1
_HOLES: Final = SEGMENT_BLOCKS + 1
_LISTS: Final = SEGMENT_BLOCKS + 2
BEAT_SEGMENTS: Final = 4096
"""Segments between two heartbeats in a long loop: some milliseconds."""
_NOT_LIVE: Final = bytes(1 << 16)
HEADER_BLOCK: Final = 0
"""The block of the file's header: never free."""


def _lowest_bit(mask: int) -> int:
    """Return the number of the lowest bit that is set; there must be one."""
    return (mask & -mask).bit_length() - 1


class BlockMap:
    """The map of a backing file of at most `nr_segments` segments, all of them holes if the table is zeros.

    buffer: a zeroed writable memoryview of `table_size(nr_segments)` bytes. `limit`: segments that the disk has; those
    beyond are neither holes nor ready.

    I1: a block is free iff its bit in the segment's mask is set; then none of its zpages is live.
    I2: a ready segment with n free blocks is on list n; a hole is on the list of holes, or its number is at least `_fresh`.
    I3: the table is zero for the segments from `_fresh` on.

    With `attach` the constructor writes nothing, and `reset` must come before any other call.
    """

    def __init__(self, buffer: memoryview, nr_segments: int, *, attach: bool = False, limit: int | None = None) -> None:
        if len(buffer) < self.table_size(nr_segments):
            raise ValueError(f"a table of {len(buffer)} bytes is too small for {nr_segments} segments")
        self.nr_segments = nr_segments
        self._limit = nr_segments if limit is None else min(limit, nr_segments)
        nodes = nr_segments + _LISTS
        masks_end = 8 * nr_segments
        next_end = masks_end + 4 * nodes
        prev_end = next_end + 4 * nodes
        self._masks = buffer[:masks_end].cast("Q")
        nexts, prevs = buffer[masks_end:next_end].cast("I"), buffer[next_end:prev_end].cast("I")
        self._lists = IndexLists(nexts, prevs, nr_segments, _LISTS, attach=True)
        live_end = prev_end + nr_segments * SEGMENT_BLOCKS
        self.live_masks = buffer[prev_end:live_end]
        """The bit mask of the live zpages of each block."""
        fresh_at = -(-(live_end + nr_segments) // 8) * 8
        self._ready = buffer[live_end : live_end + nr_segments]
        self._fresh = buffer[fresh_at : fresh_at + 8].cast("Q")
        """An array of one number: the first segment that has never been ready."""
        self._zero_counters()  # a store that attaches reads the counters before it restores
        if not attach:
            self.reset()

    def _zero_counters(self) -> None:
        self._lengths = [0] * _LISTS
        self._nonempty = 0
        self.free_blocks = 0
        """Blocks of ready segments that are free."""
        self.used_blocks = 0
        """Blocks with a live zpage, or being written."""
        self.ready_segments = 0

    def reset(self, beat: Callable[[], None] | None = None) -> None:
        """Mark all blocks free. Segments stay ready or holes, as the table says. O(segments that were ever ready).

        The method calls `beat` every BEAT_SEGMENTS segments.
        """
        self._zero_counters()
        self._lists.clear()
        fresh = self._fresh[0]
        for start in range(0, fresh * SEGMENT_BLOCKS, len(_NOT_LIVE)):
            end = min(start + len(_NOT_LIVE), fresh * SEGMENT_BLOCKS)
            self.live_masks[start:end] = _NOT_LIVE[: end - start]
        for segment in range(fresh):
            if beat is not None and not segment % BEAT_SEGMENTS:
                beat()
            if self._ready[segment]:
                self.add_ready(segment, 1)
            else:
                self._masks[segment] = 0
                if segment < self._limit:
                    self._link(segment, _HOLES)

    def restore(self, block: int, index: int) -> bool:
        """Mark zpage `index` of the block live, after `reset`. False if that is impossible, or it is live already."""
        segment, bit = divmod(block, SEGMENT_BLOCKS)
        if (
            not 0 < block < self.nr_segments * SEGMENT_BLOCKS
            or not self._ready[segment]
            or self.live_masks[block] >> index & 1
        ):
            return False
        mask = self._masks[segment]
        if mask >> bit & 1:
            free = mask.bit_count()
            self._masks[segment] = mask & ~(1 << bit)
            self._unlink(segment, free)
            self._link(segment, free - 1)
            self.free_blocks -= 1
            self.used_blocks += 1
        self.live_masks[block] |= 1 << index
        return True

    @staticmethod
    def table_size(nr_segments: int) -> int:
        """Return the bytes of the table: 1.27 a block, and half a KiB."""
        return -(-nr_segments * (8 + 8 + SEGMENT_BLOCKS + 1) // 8) * 8 + 8 * _LISTS + 8

    def _link(self, segment: int, which: int) -> None:
        self._lists.append(which, segment)
        self._lengths[which] += 1
        self._nonempty |= 1 << which

    def _unlink(self, segment: int, which: int) -> None:
        self._lists.remove(segment)
        self._lengths[which] -= 1
        if not self._lengths[which]:
            self._nonempty &= ~(1 << which)

    # ---- growing and punching ----------------------------------------------------------------------------------

    def take_holes(self, most: int) -> tuple[int, int]:
        """Take up to `most` neighbouring holes, to be made ready, off the list: (first segment, count); count 0 if none."""
        first = self._lists.oldest(_HOLES)
        if first >= self.nr_segments:
            first = self._fresh[0]
            count = max(0, min(most, self._limit - first))
            self._fresh[0] = first + count  # before any of them is ready
            return (first, count) if count else (NO_SEGMENT, 0)
        count = 0
        while count < most and self._lists.oldest(_HOLES) == first + count:
            self._unlink(first + count, _HOLES)
            count += 1
        return first, count

    def return_holes(self, first: int, count: int) -> None:
        """Put back segments of `take_holes` that could not be made ready, or of `take_free` that are punched."""
        for segment in range(first, first + count):
            self._link(segment, _HOLES)

    def add_ready(self, first: int, count: int) -> None:
        """Add segments of `take_holes` that are ready now."""
        for segment in range(first, first + count):
            free = SEGMENT_BLOCKS
            self._ready[segment] = 1
            self._masks[segment] = _ALL_FREE
            if segment == HEADER_BLOCK // SEGMENT_BLOCKS:
                self._masks[segment] &= ~(1 << HEADER_BLOCK)
                free -= 1
            self.free_blocks += free
            self.ready_segments += 1
            self._link(segment, free)

    def take_free(self, keep_blocks: int) -> int:
        """Take a wholly free segment, to be punched, if `keep_blocks` free blocks remain without it; else NO_SEGMENT."""
        segment = self._lists.oldest(SEGMENT_BLOCKS)
        if segment >= self.nr_segments or self.free_blocks - SEGMENT_BLOCKS < keep_blocks:
            return NO_SEGMENT
        self._unlink(segment, SEGMENT_BLOCKS)
        self._ready[segment] = 0
        self._masks[segment] = 0
        self.free_blocks -= SEGMENT_BLOCKS
        self.ready_segments -= 1
        return segment

    def are_holes(self, first: int, count: int) -> bool:
        """Return whether `count` segments from `first` on are holes, or were taken by `take_free`."""
        end = min(first + count, self.nr_segments)
        return not any(self._ready[first:end]) and not any(self._masks[first:end])

    # ---- blocks --------------------------------------------------------------------------------------------------

    def alloc(self, most: int) -> tuple[int, int]:
        """Take a run of up to `most` neighbouring free blocks of the emptiest segment: (first block, count); count 0: none."""
        ready = self._nonempty & (_ALL_FREE << 1)  # lists 1..64
        if not ready:
            return 0, 0
        free = ready.bit_length() - 1
        segment = self._lists.oldest(free)
        mask = self._masks[segment]
        low = _lowest_bit(mask)
        count = min(most, _lowest_bit((mask >> low) + 1))
        self._masks[segment] = mask & ~(((1 << count) - 1) << low)
        self._unlink(segment, free)
        self._link(segment, free - count)
        self.free_blocks -= count
        self.used_blocks += count
        return segment * SEGMENT_BLOCKS + low, count

    def set_live(self, block: int, live: int) -> None:
        """Record the bit mask of the live zpages of a block from `alloc`; with 0 the block is free again."""
        self.live_masks[block] = live
        if not live:
            self._release(block)

    @property
    def nr_blocks(self) -> int:
        """The blocks of all segments."""
        return self.nr_segments * SEGMENT_BLOCKS

    def live(self, block: int) -> int:
        """Return the bit mask of the live zpages of a block."""
        return self.live_masks[block]

    def free(self, block: int, index: int) -> bool:
        """Forget zpage `index` of a block. True if that was the last live one, so that the block is free now."""
        bit = 1 << index
        live = self.live_masks[block]
        if not live & bit:
            raise AssertionError(f"zpage {index} of block {block} is not live")
        self.live_masks[block] = live ^ bit
        if live != bit:
            return False
        self._release(block)
        return True

    def _release(self, block: int) -> None:
        segment, bit = divmod(block, SEGMENT_BLOCKS)
        mask = self._masks[segment]
        if mask >> bit & 1:
            raise AssertionError(f"block {block} is free already")
        free = mask.bit_count()
        self._masks[segment] = mask | 1 << bit
        self._unlink(segment, free)
        self._link(segment, free + 1)
        self.free_blocks += 1
        self.used_blocks -= 1

    @property
    def holes(self) -> int:
        """The segments that are holes, without those that are taken."""
        return self._lengths[_HOLES] + max(0, self._limit - self._fresh[0])

    def check(self) -> None:
        """Recount everything; AssertionError where a list or counter differs. O(blocks)."""
        free_blocks = ready = 0
        fresh = self._fresh[0]
        assert not any(self._ready[fresh:]), "I3: a fresh segment is ready"
        assert not any(self.live_masks[fresh * SEGMENT_BLOCKS :]), "I3: a block of a fresh segment is live"
        for which in range(_LISTS):
            members = list(self._lists.members(which))
            assert len(members) == self._lengths[which], f"length of list {which} is wrong"
            assert bool(members) == bool(self._nonempty >> which & 1), f"mask bit {which} is wrong"
            for segment in members:
                mask = self._masks[segment]
                assert mask.bit_count() == (0 if which == _HOLES else which), f"segment {segment} is on list {which}"
                if which != _HOLES:
                    free_blocks += which
                    ready += 1
                for bit in range(SEGMENT_BLOCKS):
                    if mask >> bit & 1:
                        assert not self.live_masks[segment * SEGMENT_BLOCKS + bit], "I1: a free block has a live zpage"
        assert free_blocks == self.free_blocks, f"{self.free_blocks} free blocks, a recount gives {free_blocks}"
        assert ready == self.ready_segments, f"{self.ready_segments} ready segments, a recount gives {ready}"
