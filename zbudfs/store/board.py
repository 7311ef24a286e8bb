# SPDX-License-Identifier: MIT
"""The board: one small piece of shared memory in which the processes of a mount tell each other how things stand.

Writing a number here allocates nothing and waits for nobody, which is why it is not a pipe, a socket or a file. Each
field has one writer at a time. What must survive the worker is here as well: FUSE_INIT, the cumulative counters, the
last lines of the log.

    0        fields, 8 bytes each
    1 KiB    cumulative counters, 8 bytes each, in the order of the store
    2 KiB    FUSE_INIT: its length in 8 bytes, then the request
    3 KiB    the key with which blocks are encrypted
    4 KiB    the error of a process that did not come up: length, then text
    6 KiB    latencies (core/latency.py), written by the shim itself
    8 KiB    log: the number of lines so far in 8 bytes, then LOG_LINES slots of LOG_LINE_BYTES
"""

import os
from enum import IntEnum
from typing import Final

from zbudfs.core.errors import LayoutError
from zbudfs.core.latency import WORDS, Latencies
from zbudfs.store.arena import Arena

LAYOUT: Final = 0x7A627564_0009
"""Of everything that outlives a worker: tables, frames, blocks, this board, and what zpages mean (core/dictionary.py).
Changed when any of them changes."""

_COUNTERS: Final = 1 << 10
_INIT: Final = 2 << 10
_KEY: Final = 3 << 10
INIT_BYTES: Final = _KEY - _INIT - 8
_ERROR: Final = 4 << 10
_LATENCIES: Final = 6 << 10
_LOG: Final = 8 << 10
LOG_LINES: Final = 128
LOG_LINE_BYTES: Final = 512
assert _LATENCIES + 8 * WORDS <= _LOG
BOARD_BYTES: Final = _LOG + 8 + LOG_LINES * LOG_LINE_BYTES


FIRST_OPENING: Final = 64
OPENINGS: Final = 64
"""The fields in which the open files of the swapfile stand (fuse/openings.py); no `Field` lies there."""


CANNOT_RESEND: Final = 2
"""Value of Field.CAN_RESEND: a request that a worker has taken and not answered is lost with it."""


class Field(IntEnum):
    """The numbers on the board; 0 is "not yet" or "none"."""

    LAYOUT = 0
    SIZE_BYTES = 1
    POOL_FRAMES = 2
    BACKED = 3
    """1 if there is a backing file."""
    KEEPER_PID = 4
    WORKER_PID = 5
    STANDBY_PID = 6
    STANDBY_READY = 7
    """1 once the standby has said that it can take over at once."""
    SERVING = 8
    """1 once the worker answers requests."""
    HEARTBEAT = 9
    """Counted up by the worker: by its event loop, and while it rebuilds or waits for the end of the former worker."""
    RECOVERIES = 10
    """Workers that have taken over from a dead one."""
    OPEN_SWAPFILES = 11
    """Open files of the swapfile: a loop device is one."""
    CAN_RESEND = 12
    """1 if the kernel sends again what a dead worker had taken, 2 if it does not."""
    LAST_RECOVERY_US = 13
    """Microseconds from the order to take over to the first request that can be answered."""
    LOST_IN_RECOVERY = 14
    """Pages whose frame or block did not confirm the page table after a crash."""
    PERSISTENT = 15
    """1 if the memory lies in a pool directory, 0 if it goes with the processes."""
    # What somebody has changed since the mount (store/steering.py); 0 is "as mounted" or the default.
    POOL_LIMIT_FRAMES = 16
    LOW_WATERMARK_FRAMES = 17
    HIGH_WATERMARK_FRAMES = 18
    LEVEL = 19
    """The level and LEVEL_OFFSET, so that no level is 0."""
    WRITEBACK_OFF = 20
    WRITEBACK_BUDGET = 21
    """Bytes a day."""
    WRITEBACK_BUDGET_LEFT = 22
    """Bytes, as of the last time that the counters were kept."""
    AGE_SECONDS = 23
    TRACING = 24
    """1 while requests are recorded (store/tracer.py)."""
    PACKING = 25
    """The code of the packing, which is also that of the layout of its frames."""
    READY_BEAT = 26
    """Counted up by the event loop of each process that gets ready to serve."""
    BACKING_FIXED = 27
    """1 if the backing is a file of fixed size."""
    STANDBY_BEAT = 32
    """Counted up by the standby's event loop."""
    TAKING_OVER = 33
    """The process that has begun to take over last."""
    NO_STANDBY_SINCE = 34
    """Since when there is no standby that is ready, in seconds since 1970; 0: there is one."""
    NO_STANDBY_FAULT = 35
    """Why: the errno of fork(2), ECHILD if the last one died, or 0 if one is on its way."""
    MOUNT_DEVICE = 36
    """st_dev of the mount; 0: it is not known."""
    ENDED = 37
    """1 once the worker has ended the connection on purpose: nobody takes over."""
    POPULATED_FRAMES = 38
    """Frames that the worker has given memory so far, one that was given it twice counted twice."""
    FRESH_FRAMES = 39
    """Frames from this number on have never had memory."""
    BORN_NS = 40
    """When the mount was made: the time of all its files."""
    FUSE_FD = 41
    """Number of the connection's descriptor in the worker and the standby, and of the next two."""
    LOCK_FD = 42
    BACKING_FD = 43
    """0: there is no backing file."""
    STORED_PAGES = 44
    """As of the last heartbeat, like the next two."""
    USED_FRAMES = 45
    WRITTEN_BACK_PAGES = 46
    WRITERS = 50
    """How many open files of the swapfile may be for writing; 0: one."""


class Board:
    """The board in an arena of BOARD_BYTES. All of it is populated when it is made."""

    def __init__(self, arena: Arena) -> None:
        self._view = arena.view
        arena.populate(0, BOARD_BYTES)
        self.fields = self._view[:_COUNTERS].cast("Q")
        self._counters = self._view[_COUNTERS:_INIT].cast("Q")
        self._init_length = self._view[_INIT : _INIT + 8].cast("Q")
        self._error_length = self._view[_ERROR : _ERROR + 8].cast("Q")
        self.latencies = Latencies(self._view[_LATENCIES : _LATENCIES + 8 * WORDS].cast("Q"))
        self._lines = self._view[_LOG : _LOG + 8].cast("Q")

    def claim(self, **facts: int) -> None:
        """Say what the memory is for, by the names of fields; LayoutError if it is for something else already."""
        wanted = {Field.LAYOUT: LAYOUT, **{Field[name.upper()]: value for name, value in facts.items()}}
        found = self.fields[Field.LAYOUT]
        if not found:
            for field, value in wanted.items():
                self.fields[field] = value
            return
        for field, value in wanted.items():
            if self.fields[field] != value:
                raise LayoutError(
                    f"the running zbudfs has another layout in memory ({field.name.lower()} {self.fields[field]:#x}, this"
                    f" version wants {value:#x}): restart it with the version that runs, or unmount it and mount it anew"
                )

    def beat(self) -> None:
        """Give a sign of life of the worker."""
        self.fields[Field.HEARTBEAT] += 1

    # ---- cumulative counters -----------------------------------------------------------------------------------

    def save_counters(self, values: list[int]) -> None:
        """Keep the store's cumulative counters."""
        for index, value in enumerate(values):
            self._counters[index] = value

    def counters(self, count: int) -> list[int]:
        """The first `count` cumulative counters that were kept."""
        return self._counters[:count].tolist()

    # ---- FUSE_INIT -----------------------------------------------------------------------------------------------

    def save_init(self, request: bytes) -> None:
        """Keep the kernel's first request, of at most INIT_BYTES; the shim keeps no longer one."""
        if len(request) > INIT_BYTES:
            raise ValueError(f"a first request of {len(request)} bytes, and the board has room for {INIT_BYTES}")
        self._view[_INIT + 8 : _INIT + 8 + len(request)] = request
        self._init_length[0] = len(request)

    def init(self) -> bytes:
        """The kernel's first request; empty if it has not come yet."""
        return bytes(self._view[_INIT + 8 : min(_INIT + 8 + self._init_length[0], _KEY)])

    # ---- the key ---------------------------------------------------------------------------------------------------

    def key(self, length: int) -> bytes:
        """The key of this mount, which is made up when it is asked for first."""
        place = self._view[_KEY : _KEY + length]
        if bytes(place) == bytes(length):
            place[:] = os.urandom(length)
        return bytes(place)

    def forget_key(self) -> None:
        """Overwrite the key: whatever was encrypted with it is noise from now on."""
        self._view[_KEY:_ERROR] = bytes(_ERROR - _KEY)

    # ---- the error of a process that did not come up -----------------------------------------------------------

    def save_error(self, text: str) -> None:
        """Keep why a process could not come up, for the one that waits for it."""
        data = text.encode("utf-8", "backslashreplace")[: _LATENCIES - _ERROR - 8]
        self._view[_ERROR + 8 : _ERROR + 8 + len(data)] = data
        self._error_length[0] = len(data)

    def take_error(self) -> str:
        """What `save_error` kept, once; empty if nothing."""
        length = self._error_length[0]
        self._error_length[0] = 0
        return bytes(self._view[_ERROR + 8 : min(_ERROR + 8 + length, _LOG)]).decode("utf-8", "replace")

    # ---- log -------------------------------------------------------------------------------------------------------

    def add_line(self, line: str) -> None:
        """Keep a line of the log; the oldest goes."""
        number = self._lines[0]
        data = line.encode("utf-8", "backslashreplace")[:LOG_LINE_BYTES].ljust(LOG_LINE_BYTES, b"\0")
        start = _LOG + 8 + number % LOG_LINES * LOG_LINE_BYTES
        self._view[start : start + LOG_LINE_BYTES] = data
        self._lines[0] = number + 1

    def lines(self) -> list[str]:
        """The last lines of the log, oldest first."""
        total = self._lines[0]
        found = []
        for number in range(max(0, total - LOG_LINES), total):
            start = _LOG + 8 + number % LOG_LINES * LOG_LINE_BYTES
            found.append(bytes(self._view[start : start + LOG_LINE_BYTES]).rstrip(b"\0").decode("utf-8", "replace"))
        return found
