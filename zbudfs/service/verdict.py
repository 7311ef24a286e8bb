# SPDX-License-Identifier: MIT
"""The exit status of a service that cannot start, or that an exception ends. It makes systemd try again, or give up.

    RETRY    the mount has pages, or may have some: systemd starts the service again, for ever
    GIVE_UP  the mount has none: the failure costs only swap, and must not delay the boot

systemd/zbudfs@.service names the statuses after which systemd does not start the service again. The daemon imports this
module first, so that a module that cannot be imported has the right status as well.
"""

import os
import sys
from types import TracebackType
from typing import Final

RETRY: Final = 1
GIVE_UP: Final = 2


def has_stored() -> bool:
    """Return whether the service manager has stored descriptors of an earlier process of this service."""
    return os.environ.get("LISTEN_FDS", "0") not in ("", "0")


class Guard:
    """Ends a service with the right exit status when nothing catches an exception."""

    def __init__(self) -> None:
        self.held = has_stored() or "--adopt-fd" in sys.argv
        """Whether the mount may have pages: those of an earlier process, or of a keeper that hands over."""
        self.loading = True
        """Whether modules are still being imported: then an exception means that a part of the program is missing."""

    def install(self) -> None:
        """Make this object choose the exit status of this process."""
        sys.excepthook = self.end

    def end(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Report the exception and end the process."""
        if self.loading:
            print(f"zbudfs: the daemon cannot start: {error}; install zbudfs again", file=sys.stderr, flush=True)
        else:
            sys.__excepthook__(kind, error, trace)
        os._exit(RETRY if self.held else GIVE_UP)


GUARD: Final = Guard()
if "--service" in sys.argv:
    GUARD.install()
