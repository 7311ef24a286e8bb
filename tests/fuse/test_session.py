# SPDX-License-Identifier: MIT
"""The session uses internals of trio. If they were missing, it would only be slower, without an error."""

from __future__ import annotations

import os
import select

import trio
import trio.testing

from zbudfs.fuse.session import Runnable, _event_loop


async def nothing() -> None:
    """Run once."""


def test_trios_loop_is_found() -> None:
    """The descriptor is readable when a task can run. Outside of trio, `_event_loop` finds no descriptor."""

    async def look() -> None:
        fd = _event_loop()
        assert fd >= 0
        end, other = os.pipe()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.wait_readable, end)
                await trio.testing.wait_all_tasks_blocked()
                assert not select.select([fd], [], [], 0)[0]
                os.write(other, b"x")
                assert select.select([fd], [], [], 0)[0]
        finally:
            os.close(end)
            os.close(other)

    trio.run(look)
    assert _event_loop() == -1


def test_tasks_of_the_running_batch_can_run() -> None:
    """Each task that runs sees those that have not run yet, also if trio has taken them off its queue."""
    seen: list[int] = []

    async def look() -> None:
        runnable = Runnable()
        trio.lowlevel.add_instrument(runnable)

        async def count() -> None:
            await trio.lowlevel.checkpoint()
            seen.append(len(runnable.tasks))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(nothing)
            assert len(runnable.tasks) == 1
            await trio.testing.wait_all_tasks_blocked()
            assert not runnable.tasks
            for _ in range(3):
                nursery.start_soon(count)

    trio.run(look)
    assert sorted(seen) == [0, 1, 2]
