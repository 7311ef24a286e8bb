# SPDX-License-Identifier: MIT
"""Rebuilding: it makes a usable state from the page table and the frames alone.

At whatever point the last worker died, each entry of the page table names a whole page. The new form is complete before the
entry is stored, and the old form is freed after it (store/state.py). So:

    entry -> word             right as it is
    entry -> zpage in frame   right if the handle there names this page: claim its place
    entry -> raw in frame     right if the content has the entry's check: claim the frame
    entry -> place in block   claim it; the block is checked when it is read
    anything else             the page is lost: a read of it is EIO, and it is counted

Places that no entry names are free. An ephemeral frame becomes a persistent one, since no entry names its block. A zombie
does too, since its entries were not changed yet. The order of the LRU is lost.
"""

from dataclasses import dataclass

from zbudfs.core.allocator import INDEX_MASK, REF_BITS
from zbudfs.core.codec import check_of_raw
from zbudfs.core.errors import Loss
from zbudfs.core.page_table import (
    BLOCK,
    FRAME,
    LOST,
    RAW_FRAME,
    entry_check,
    entry_kind,
    entry_ref,
)
from zbudfs.store.state import State


@dataclass(frozen=True, slots=True)
class Recovery:
    """The result of a rebuild."""

    stored_pages: int
    lost_pages: int
    frames: int
    blocks: int


def rebuild(state: State) -> Recovery:
    """Make frames, lists, blocks and counters agree with the page table. O(stored pages + populated frames).

    That may take minutes. The function advances the heartbeat in the status area, so that the keeper sees no hang.
    """
    table, pool, blocks = state.table, state.pool, state.blocks
    beat = pool.memory.status_area.beat
    allocator = pool.allocator
    populated = pool.memory.populated_frames()
    allocator.reset(populated)
    if blocks is not None:
        blocks.reset(beat)
    restore = state.path.restore
    entries = table.entries
    lost = 0
    for first, values in table.stretches(beat):
        for page, entry in enumerate(values, first):
            kind = entry_kind(entry)
            if kind < FRAME or entry == LOST:
                continue
            ref = entry_ref(entry)
            if kind == FRAME:
                right = restore(ref, page)
            elif kind == RAW_FRAME:
                right = (
                    ref >> REF_BITS < allocator.nr_frames
                    and check_of_raw(allocator.frame_bytes(ref >> REF_BITS)) == entry_check(entry)
                    and allocator.restore_raw(ref, page)
                )
            else:
                index = ref & INDEX_MASK
                right = blocks is not None and index < allocator.most_zpages and blocks.restore(ref >> REF_BITS, index)
            if not right:
                entries[page] = LOST
                state.counters.lost(Loss.CRASH)
                lost += 1
    table.recount(beat)
    pool.restore(populated)
    return Recovery(table.stored_pages, lost, pool.used_frames, blocks.used_blocks if blocks is not None else 0)


assert BLOCK > FRAME  # kinds from FRAME on are places
