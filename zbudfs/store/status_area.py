# SPDX-License-Identifier: MIT
"""The status area: a small piece of shared memory through which the processes of a mount inform each other.

Writing a number here allocates nothing and never waits, unlike a write to a pipe, a socket or a file. Each field has one
writer at a time. The status area also has the state that must survive the worker: FUSE_INIT, the counters, the last lines
of the log. In a pool directory it is the file `board`. The name is older than the term, and a keeper of another version
looks for it.

    0        fields, 8 bytes each
    1 KiB    counters of the store, 8 bytes each (core/statistics.py)
    2 KiB    FUSE_INIT: its length in 8 bytes, then the request
    3 KiB    the key with which blocks are encrypted
    4 KiB    the error of a process that could not start: length, then text
    6 KiB    latencies (core/latency.py), which the shim writes itself
    8 KiB    log: the number of lines so far in 8 bytes, then LOG_LINES slots of LOG_LINE_BYTES
"""

import os
from enum import IntEnum
from typing import Final

from zbudfs.core.errors import LayoutError
from zbudfs.core.latency import WORDS, Latencies
from zbudfs.core.statistics import COUNTERS, Counters
from zbudfs.store.arena import Arena

LAYOUT: Final = 0x7A627564_000B
"""Layout number of all state that outlives a worker: tables, frames, blocks, this status area, and the meaning of zpages
(core/dictionary.py). It changes when any of them changes."""

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
assert _COUNTERS + 8 * len(COUNTERS) <= _INIT
STATUS_AREA_BYTES: Final = _LOG + 8 + LOG_LINES * LOG_LINE_BYTES


FIRST_OPENING: Final = 64
OPENINGS: Final = 64
"""The fields that hold the open files of the swapfile (fuse/openings.py); no `Field` lies there."""


CANNOT_RESEND: Final = 2
"""Value of Field.CAN_RESEND: if a worker dies, the requests that it has taken and not answered are lost."""


class Field(IntEnum):
    """The numbers in the status area. 0 stands for "not yet" or "none"."""

    LAYOUT = 0
    SIZE_BYTES = 1
    POOL_FRAMES = 2
    BACKED = 3
    """1 if there is a backing file."""
    KEEPER_PID = 4
    WORKER_PID = 5
    STANDBY_PID = 6
    STANDBY_READY = 7
    """1 once the standby has reported that it can take over at once."""
    SERVING = 8
    """1 once the worker answers requests."""
    HEARTBEAT = 9
    """A counter of the worker. Its event loop advances it; the worker does so too while it rebuilds, or waits for the former
    worker to end."""
    RECOVERIES = 10
    """Number of takeovers from a dead worker."""
    OPEN_SWAPFILES = 11
    """Number of open files of the swapfile; a loop device holds one."""
    CAN_RESEND = 12
    """1 if the kernel sends again the requests that a dead worker had taken, 2 if it does not."""
    LAST_RECOVERY_US = 13
    """Microseconds from the order to take over to the first request that can be answered."""
    LOST_IN_RECOVERY = 14
    """Pages whose frame or block did not match the page table after a crash."""
    PERSISTENT = 15
    """1 if the memory lies in a pool directory, 0 if it ends with the processes."""
    # Settings that were changed since the mount (store/tuner.py); 0 is "as mounted" or the default.
    POOL_LIMIT_FRAMES = 16
    LOW_WATERMARK_FRAMES = 17
    HIGH_WATERMARK_FRAMES = 18
    LEVEL = 19
    """The level and LEVEL_OFFSET, so that no level is 0."""
    WRITEBACK_OFF = 20
    WRITEBACK_BUDGET = 21
    """Bytes a day."""
    WRITEBACK_BUDGET_LEFT = 22
    """Bytes that were left when the counters were last saved."""
    AGE_SECONDS = 23
    TRACING = 24
    """1 while requests are recorded (store/tracer.py)."""
    PACKING = 25
    """The code of the packing, which stands for the layout of its frames too."""
    READY_BEAT = 26
    """A counter that the event loop of each process advances while the process prepares to serve."""
    BACKING_FIXED = 27
    """1 if the backing is a file of fixed size."""
    STANDBY_BEAT = 32
    """A counter that the standby's event loop advances."""
    TAKING_OVER = 33
    """PID of the process that began a takeover last."""
    NO_STANDBY_SINCE = 34
    """Time in seconds since 1970 from which no standby has been ready; 0: one is ready."""
    NO_STANDBY_FAULT = 35
    """The reason: the errno of fork(2), ECHILD if the last standby died, or 0 if one is starting."""
    MOUNT_DEVICE = 36
    """st_dev of the mount; 0: not known."""
    ENDED = 37
    """1 once the worker has ended the connection on purpose: no process takes over."""
    POPULATED_FRAMES = 38
    """Number of frames to which the worker has given memory; a frame counts each time."""
    FRESH_FRAMES = 39
    """First frame that has never had memory."""
    BORN_NS = 40
    """Time of the mount, which is the time of all its files, in ns since 1970."""
    FUSE_FD = 41
    """Number of the connection's descriptor in the worker and the standby. The next two fields are descriptors too."""
    LOCK_FD = 42
    BACKING_FD = 43
    """0: the mount has no backing file."""
    STORED_PAGES = 44
    """Value at the last heartbeat, like the next two."""
    USED_FRAMES = 45
    WRITTEN_BACK_PAGES = 46
    OLDEST_READ_SECONDS = 47
    """Age of the oldest read of a block that is in flight, in seconds at the last heartbeat; 0: less than a second."""
    WRITERS = 50
    """Number of open files of the swapfile that may be for writing; 0: one."""


class StatusArea:
    """The status area in an arena of STATUS_AREA_BYTES. The constructor populates all of it."""

    def __init__(self, arena: Arena) -> None:
        self._view = arena.view
        arena.populate(0, STATUS_AREA_BYTES)
        self.fields = self._view[:_COUNTERS].cast("Q")
        self.counters = Counters(self._view[_COUNTERS:_INIT].cast("Q"))
        self._init_length = self._view[_INIT : _INIT + 8].cast("Q")
        self._error_length = self._view[_ERROR : _ERROR + 8].cast("Q")
        self.latencies = Latencies(self._view[_LATENCIES : _LATENCIES + 8 * WORDS].cast("Q"))
        self._lines = self._view[_LOG : _LOG + 8].cast("Q")

    def claim(self, **facts: int) -> None:
        """Record the layout and the facts, by the names of fields. LayoutError if others are recorded already."""
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
                    f" version wants {value:#x}): restart it with the version that runs, or unmount it and mount it again"
                )

    def beat(self) -> None:
        """Advance the heartbeat of the worker."""
        self.fields[Field.HEARTBEAT] += 1

    # ---- FUSE_INIT -----------------------------------------------------------------------------------------------

    def save_init(self, request: bytes) -> None:
        """Save the kernel's first request. ValueError if it has more than INIT_BYTES; the shim saves no longer one."""
        if len(request) > INIT_BYTES:
            raise ValueError(f"a first request of {len(request)} bytes, and the status area has room for {INIT_BYTES}")
        self._view[_INIT + 8 : _INIT + 8 + len(request)] = request
        self._init_length[0] = len(request)

    def init(self) -> bytes:
        """Return the kernel's first request; empty if it has not come yet."""
        return bytes(self._view[_INIT + 8 : min(_INIT + 8 + self._init_length[0], _KEY)])

    # ---- the key ---------------------------------------------------------------------------------------------------

    def key(self, length: int) -> bytes:
        """Return the key of this mount. The first call creates it at random."""
        place = self._view[_KEY : _KEY + length]
        if bytes(place) == bytes(length):
            place[:] = os.urandom(length)
        return bytes(place)

    def forget_key(self) -> None:
        """Overwrite the key. All data that was encrypted with it is noise from then on."""
        self._view[_KEY:_ERROR] = bytes(_ERROR - _KEY)

    # ---- the error of a process that could not start -----------------------------------------------------------

    def save_error(self, text: str) -> None:
        """Save the reason why a process could not start, for the process that waits for it."""
        data = text.encode("utf-8", "backslashreplace")[: _LATENCIES - _ERROR - 8]
        self._view[_ERROR + 8 : _ERROR + 8 + len(data)] = data
        self._error_length[0] = len(data)

    def take_error(self) -> str:
        """Return the text that `save_error` saved, and delete it; empty if there is none."""
        length = self._error_length[0]
        self._error_length[0] = 0
        return bytes(self._view[_ERROR + 8 : min(_ERROR + 8 + length, _LOG)]).decode("utf-8", "replace")

    # ---- log -------------------------------------------------------------------------------------------------------

    def add_line(self, line: str) -> None:
        """Save a line of the log; it replaces the oldest."""
        number = self._lines[0]
        data = line.encode("utf-8", "backslashreplace")[:LOG_LINE_BYTES].ljust(LOG_LINE_BYTES, b"\0")
        start = _LOG + 8 + number % LOG_LINES * LOG_LINE_BYTES
        self._view[start : start + LOG_LINE_BYTES] = data
        self._lines[0] = number + 1

    def lines(self) -> list[str]:
        """Return the last lines of the log, oldest first."""
        total = self._lines[0]
        found = []
        for number in range(max(0, total - LOG_LINES), total):
            start = _LOG + 8 + number % LOG_LINES * LOG_LINE_BYTES
            found.append(bytes(self._view[start : start + LOG_LINE_BYTES]).rstrip(b"\0").decode("utf-8", "replace"))
        return found
