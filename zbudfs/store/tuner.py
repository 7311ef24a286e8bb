# SPDX-License-Identifier: MIT
"""The tunables of a running store (core/tunables.py): reading and setting them.

A value that is set is saved in the status area, so that it outlives the worker and its successor resumes with it. No
method here waits: the reclaimer's tasks do the work that takes time (writeback, dropping).
"""

from typing import Final

import trio

from zbudfs.core.codec import Codec
from zbudfs.core.tunables import Limits, parse
from zbudfs.core.units import PAGE_SHIFT, PAGE_SIZE
from zbudfs.store.page_store import PageStore
from zbudfs.store.status_area import Field

LEVEL_OFFSET: Final = 64


class Tuner:
    """The tunables of `store`."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._reclaimer = store.reclaimer
        self._fields = store.memory.status_area.fields

    @property
    def limits(self) -> Limits:
        """The present limits of this mount for values."""
        marks = self._reclaimer.limit.watermarks
        return Limits(
            self._store.memory.nr_frames << PAGE_SHIFT,
            self._store.backing is not None,
            marks.low_frames,
            marks.high_frames,
        )

    def value(self, name: str) -> int:
        """Return the value in force; for an order, the work that is left. KeyError."""
        reclaimer = self._reclaimer
        return {
            "pool_limit_bytes": reclaimer.limit.governor.configured_frames << PAGE_SHIFT,
            "low_watermark_frames": reclaimer.limit.watermarks.low_frames,
            "high_watermark_frames": reclaimer.limit.watermarks.high_frames,
            "level": self._store.requests.codec.level,
            "writeback_enabled": int(reclaimer.writeback.enabled),
            "writeback_budget_bytes_per_day": reclaimer.budget.bytes_per_day,
            "age_seconds": reclaimer.writeback.age_seconds,
            "trace": int(self._store.tracer.active),
            "writers": self._fields[Field.WRITERS] or 1,
            "writeback": reclaimer.writeback.ordered_frames,
            "drop_ephemeral": self._store.zbud_counters()["eph_pageframes"],
        }[name]

    def set(self, name: str, text: str) -> None:
        """Set a value or give an order. ValueError with a sentence, without a change; KeyError for an unknown name."""
        value = parse(name, text, self.limits)
        reclaimer, fields = self._reclaimer, self._fields
        if name == "writeback":
            reclaimer.writeback.order(self._store.memory.nr_frames if value < 0 else value)
            return
        if name == "drop_ephemeral":
            reclaimer.writeback.order_drop()
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

    def resume(self) -> None:
        """Apply the values that an earlier worker saved in the status area."""
        fields = self._fields
        budget = fields[Field.WRITEBACK_BUDGET]
        self._reclaimer.budget.set(budget, trio.current_time(), fields[Field.WRITEBACK_BUDGET_LEFT])
        self._store.tracer.resume()
        self._apply()

    def save(self) -> None:
        """Save the rest of the budget in the status area."""
        self._fields[Field.WRITEBACK_BUDGET_LEFT] = self._reclaimer.budget.left_bytes(trio.current_time())

    def resume_level(self) -> None:
        """Apply the saved level. This part of `resume` needs memory, so a standby calls it while there is some."""
        level = self._fields[Field.LEVEL] - LEVEL_OFFSET
        if self._fields[Field.LEVEL] and level != self._store.requests.codec.level:
            codec = Codec(level)
            codec.encode(bytes(range(256)) * (PAGE_SIZE // 256))  # the first page makes it allocate its memory
            self._store.requests.codec = codec

    def _apply(self) -> None:
        """Apply the values in the status area to the store."""
        fields = self._fields
        self.resume_level()
        self._reclaimer.configure(
            limit_frames=fields[Field.POOL_LIMIT_FRAMES] or self._store.memory.nr_frames,
            watermarks=(fields[Field.LOW_WATERMARK_FRAMES], fields[Field.HIGH_WATERMARK_FRAMES]),
            writeback_enabled=not fields[Field.WRITEBACK_OFF],
            age_seconds=fields[Field.AGE_SECONDS],
        )
