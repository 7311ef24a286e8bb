# SPDX-License-Identifier: MIT
"""The handlers of the swapfile's data that also record each request. They replace the plain ones while a trace is on.

The task that completes a waiting write also records it: only then is it known how its pages are kept.
"""

import errno
from collections.abc import Callable

from zbudfs.core.trace import Kind
from zbudfs.store.tracer import Tracer

Read = Callable[[int, int, int], bytes | int | None]
Write = Callable[[int, int, memoryview], int | None]
Fallocate = Callable[[int, int, int, int], int | None]


def traced(tracer: Tracer, read: Read, write: Write, fallocate: Fallocate) -> tuple[Read, Write, Fallocate]:
    """Return the same handlers, which also report each request to the tracer."""

    def traced_read(request: int, offset: int, length: int) -> bytes | int | None:
        content = read(request, offset, length)
        if content is None:
            tracer.paging_in(offset, length)
        elif isinstance(content, bytes):
            tracer.read(offset, len(content))
        else:
            tracer.missed(Kind.LOST, offset, length)
        return content

    def traced_write(request: int, offset: int, content: memoryview) -> int | None:
        answer = write(request, offset, content)
        if answer == 0:
            tracer.wrote(offset, len(content))
        elif answer == errno.ENOSPC:
            tracer.missed(Kind.REFUSED, offset, len(content))
        return answer

    def traced_fallocate(request: int, mode: int, offset: int, length: int) -> int | None:
        answer = fallocate(request, mode, offset, length)
        if not answer:
            tracer.missed(Kind.DISCARD, offset, length)
        return answer

    return traced_read, traced_write, traced_fallocate
