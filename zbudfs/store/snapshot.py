# SPDX-License-Identifier: MIT
"""The statistics of a store at one moment. core/statistics.py declares the meaning of each."""

from zbudfs.core.errors import Loss, Refusal
from zbudfs.core.page_table import BLOCK, RAW_BLOCK, RAW_FRAME, WORD, WORD_HALVES, WORD_INVERTED
from zbudfs.core.statistics import PageStoreStatistics
from zbudfs.core.units import PAGE_SHIFT
from zbudfs.store.backing import SEGMENT_BYTES
from zbudfs.store.reclaimer import Reclaimer
from zbudfs.store.state import State


def snapshot(size_bytes: int, level: int, state: State, reclaimer: Reclaimer) -> PageStoreStatistics:
    """Return all statistics of a store of `size_bytes` that compresses at `level`."""
    counted = state.counters.by_name()
    counts = state.table.counts
    counters = state.allocator.counters()
    writeback = reclaimer.writeback
    budget = reclaimer.budget
    now = reclaimer.ticked_at
    blocks = state.blocks
    return PageStoreStatistics(
        **counted,
        size_bytes=size_bytes,
        pool_limit_bytes=state.pool.limit_frames << PAGE_SHIFT,
        pool_configured_bytes=state.pool.nr_frames << PAGE_SHIFT,
        pool_used_bytes=state.pool.used_frames << PAGE_SHIFT,
        pool_ready_bytes=state.pool.ready_frames << PAGE_SHIFT,
        stored_pages=state.table.stored_pages,
        same_filled_pages=counts[WORD] + counts[WORD_INVERTED] + counts[WORD_HALVES] + state.table.word_zpages,
        raw_pages=counts[RAW_FRAME] + counts[RAW_BLOCK],
        compressed_bytes=counters["pers_zbytes"] + counters["eph_zbytes"],
        written_back_pages=counts[BLOCK] + counts[RAW_BLOCK],
        backing_used_bytes=blocks.used_blocks << PAGE_SHIFT if blocks is not None else 0,
        backing_ready_bytes=blocks.ready_segments * SEGMENT_BYTES if blocks is not None else 0,
        cumul_writeback_bytes=counted["cumul_writeback_frames"] << PAGE_SHIFT,
        refused_pool_full=sum(counted[f"refused_{cause}"] for cause in Refusal),
        lost_pages=sum(counted[f"lost_{cause}"] for cause in Loss),
        pool_limit_set_bytes=reclaimer.limit.governor.configured_frames << PAGE_SHIFT,
        low_watermark_frames=reclaimer.limit.watermarks.low_frames,
        high_watermark_frames=reclaimer.limit.watermarks.high_frames,
        level=level,
        writeback_enabled=int(writeback.enabled),
        writeback_failing=int(reclaimer.failing),
        writeback_ordered_frames=writeback.ordered_frames,
        writeback_budget_bytes_per_day=budget.bytes_per_day,
        writeback_budget_used_bytes=budget.used_bytes(now),
        writeback_budget_left_bytes=budget.left_bytes(now),
        writeback_budget_full_in_seconds=budget.seconds_until_full(now),
        backing_full=int(reclaimer.full),
        age_seconds=writeback.age_seconds,
        coldest_age_seconds=state.coldest_age_seconds,
    )
