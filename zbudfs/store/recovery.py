# SPDX-License-Identifier: MIT
"""Rebuilding: from the page table and the frames, and nothing else, to a state that can be worked with.

Whatever the last worker was in the middle of, each entry of the page table names a whole page: the new form is complete
before the entry is stored, and the old form is freed after it (store/state.py). So:

    entry -> word             right as it is
    entry -> zpage in frame   right if the handle there says this page: claim its place
    entry -> raw in frame     right if the content has the entry's check: claim the frame
    entry -> place in block   claim it; the block confirms itself when it is read
    anything else             the page is lost: reading it is EIO, and it is counted

What no entry names is free. An ephemeral frame becomes a persistent one (its block is named by nobody), a zombie as well
(its write did not get as far as the entries), and the order of the LRU is lost.
"""

from dataclasses import dataclass

from zbudfs.core.allocator import INDEX_MASK, REF_BITS
from zbudfs.core.codec import check_of_raw
from zbudfs.core.page_table import (
    BLOCK,
    CHECK_SHIFT,
    FRAME,
    KIND_BITS,
    KIND_MASK,
    LOST,
    RAW_FRAME,
    REF_MASK,
)
from zbudfs.store.state import State


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found."""

    stored_pages: int
    lost_pages: int
    frames: int
    blocks: int


def rebuild(state: State) -> Recovery:
    """Bring frames, lists, blocks and counters in line with the page table. O(stored pages + populated frames).

    That may take minutes. The heartbeat on the board goes on meanwhile: the keeper tells a long rebuild from a hang.
    """
    table, pool, blocks = state.table, state.pool, state.blocks
    beat = pool.memory.board.beat
    allocator = pool.allocator
    populated = pool.memory.populated_frames()
    allocator.reset(populated)
    if blocks is not None:
        blocks.reset(beat)
    restore = allocator.restore
    entries = table.entries
    lost = 0
    for first, values in table.stretches(beat):
        for page, entry in enumerate(values, first):
            kind = entry & KIND_MASK
            if kind < FRAME or entry == LOST:
                continue
            ref = entry >> KIND_BITS & REF_MASK
            if kind == FRAME:
                right = restore(ref, page)
            elif kind == RAW_FRAME:
                right = (
                    ref >> REF_BITS < allocator.nr_frames
                    and check_of_raw(allocator.raw(ref)) == entry >> CHECK_SHIFT
                    and allocator.restore_raw(ref, page)
                )
            else:
                index = ref & INDEX_MASK
                right = blocks is not None and index < allocator.most_zpages and blocks.restore(ref >> REF_BITS, index)
            if not right:
                entries[page] = LOST
                lost += 1
    table.recount(beat)
    pool.restore(populated)
    return Recovery(table.stored_pages, lost, pool.used_frames, blocks.used_blocks if blocks is not None else 0)


assert BLOCK > FRAME  # kinds from FRAME on are places
