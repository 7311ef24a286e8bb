# SPDX-License-Identifier: MIT
"""The session uses internals of trio. If they were missing, it would only be slower, without an error."""

from __future__ import annotations

import os
import select

import trio
import trio.testing

from zbudfs.fuse.session import _event_loop


async def nothing() -> None:
    """Run once."""


def test_trios_loop_is_found() -> None:
    """The descriptor shows that a task can run, and the container has the runnable tasks. Outside of trio there are none."""

    async def look() -> None:
        fd, runnable = _event_loop()
        assert fd >= 0
        assert not len(runnable)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nothing)
            assert len(runnable) == 1
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
    assert _event_loop() == (-1, ())
