# SPDX-License-Identifier: MIT
"""Steering a store while it runs: the values of core/tunables.py, read and set.

What is set is put on the board as well, so that it outlives the worker: whoever takes over adopts it. Nothing here waits:
what takes time (writing back, dropping) is left to the reclaimer's tasks.
"""

from typing import Final

import trio

from zbudfs.core.codec import Codec
from zbudfs.core.tunables import Limits, parse
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.board import Field
from zbudfs.store.page_store import PageStore

LEVEL_OFFSET: Final = 64


class Steering:
    """The values of `store` that can be changed."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._reclaimer = store.reclaimer
        self._fields = store.memory.board.fields

    @property
    def limits(self) -> Limits:
        """What this mount allows now."""
        marks = self._reclaimer.watermarks
        return Limits(
            self._store.memory.nr_frames << PAGE_SHIFT,
            self._store.backing is not None,
            marks.low_frames,
            marks.high_frames,
        )

    def value(self, name: str) -> int:
        """What is in force; of an order, what is left to be done. KeyError."""
        reclaimer = self._reclaimer
        return {
            "pool_limit_bytes": reclaimer.governor.configured_frames << PAGE_SHIFT,
            "low_watermark_frames": reclaimer.watermarks.low_frames,
            "high_watermark_frames": reclaimer.watermarks.high_frames,
            "level": self._store.codec.level,
            "writeback_enabled": int(reclaimer.writeback_enabled),
            "writeback_budget_bytes_per_day": reclaimer.budget.bytes_per_day,
            "age_seconds": reclaimer.age_seconds,
            "trace": int(self._store.tracer.active),
            "writers": self._fields[Field.WRITERS] or 1,
            "writeback": reclaimer.ordered_frames,
            "drop_ephemeral": self._store.zbud_counters()["eph_pageframes"],
        }[name]

    def set(self, name: str, text: str) -> None:
        """Set a value or give an order. ValueError with a sentence, and nothing has changed; KeyError."""
        value = parse(name, text, self.limits)
        reclaimer, fields = self._reclaimer, self._fields
        if name == "writeback":
            reclaimer.order_writeback(self._store.memory.nr_frames if value < 0 else value)
            return
        if name == "drop_ephemeral":
            reclaimer.order_drop()
            return
        if name == "trace":
            self._store.tracer.order(on=bool(value))
            return
        if name == "pool_limit_bytes":
            fields[Field.POOL_LIMIT_FRAMES] = value >> PAGE_SHIFT
        elif name == "low_watermark_frames":
            fields[Field.LOW_WATERMARK_FRAMES] = value
        elif name == "high_watermark_frames":
            fields[Field.HIGH_WATERMARK_FRAMES] = value
        elif name == "level":
            fields[Field.LEVEL] = value + LEVEL_OFFSET
        elif name == "writeback_enabled":
            fields[Field.WRITEBACK_OFF] = not value
        elif name == "writeback_budget_bytes_per_day":
            reclaimer.budget.set(value, trio.current_time())
            fields[Field.WRITEBACK_BUDGET] = value
            self.save()
        elif name == "writers":
            fields[Field.WRITERS] = value
        else:  # age_seconds: there is no other name
            fields[Field.AGE_SECONDS] = value
        self._apply()

    def adopt(self) -> None:
        """Put in force what an earlier worker was told."""
        fields = self._fields
        budget = fields[Field.WRITEBACK_BUDGET]
        self._reclaimer.budget.set(budget, trio.current_time(), fields[Field.WRITEBACK_BUDGET_LEFT])
        self._store.tracer.adopt()
        self._apply()

    def save(self) -> None:
        """Keep what is left of the budget where it outlives this process."""
        self._fields[Field.WRITEBACK_BUDGET_LEFT] = self._reclaimer.budget.left_bytes(trio.current_time())

    def adopt_level(self) -> None:
        """The part of `adopt` that needs memory, for a standby while there is some."""
        level = self._fields[Field.LEVEL] - LEVEL_OFFSET
        if self._fields[Field.LEVEL] and level != self._store.codec.level:
            codec = Codec(level)
            codec.encode(bytes(range(256)) * (PAGE_SIZE // 256))  # what it needs is allocated by its first page
            self._store.use_codec(codec)

    def _apply(self) -> None:
        """Have the store do what the board says."""
        fields, reclaimer = self._fields, self._reclaimer
        self.adopt_level()
        reclaimer.writeback_enabled = self._store.backing is not None and not fields[Field.WRITEBACK_OFF]
        reclaimer.age_seconds = fields[Field.AGE_SECONDS]
        reclaimer.wanted_watermarks = (fields[Field.LOW_WATERMARK_FRAMES], fields[Field.HIGH_WATERMARK_FRAMES])
        wanted = fields[Field.POOL_LIMIT_FRAMES] or self._store.memory.nr_frames
        if wanted != reclaimer.governor.configured_frames:
            reclaimer.governor.configure(wanted)
            reclaimer.set_limit(wanted)
        else:
            reclaimer.set_limit(reclaimer.governor.limit_frames)  # lower than wanted under memory pressure
        reclaimer.look()
