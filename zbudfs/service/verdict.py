# SPDX-License-Identifier: MIT
"""The exit status of a service that cannot start, or that an exception ends: try again, or give up.

    RETRY    the mount holds pages, or may hold some: systemd starts the service again, for ever
    GIVE_UP  the mount holds none: this costs swap and nothing else, and must not hold up the boot

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
    """Return whether the service manager has kept descriptors of an earlier process of this service."""
    return os.environ.get("LISTEN_FDS", "0") not in ("", "0")


def of_failure(*, held: bool) -> int:
    """Return the exit status of a service whose mount holds pages, or holds none."""
    return RETRY if held else GIVE_UP


class Guard:
    """Ends a service with the right exit status when nothing catches an exception."""

    def __init__(self) -> None:
        self.held = has_stored() or "--adopt-fd" in sys.argv
        """Whether the mount may hold pages: those of an earlier process, or of a keeper that hands over."""
        self.loading = True
        """Whether modules are still being imported: an exception then means that a part of the program is missing."""

    def install(self) -> None:
        """Decide on the exit status of this process from now on."""
        sys.excepthook = self.end

    def end(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Report the exception and end the process."""
        if self.loading:
            print(f"zbudfs: the daemon cannot start: {error}; install zbudfs again", file=sys.stderr, flush=True)
        else:
            sys.__excepthook__(kind, error, trace)
        os._exit(of_failure(held=self.held))


GUARD: Final = Guard()
if "--service" in sys.argv:
    GUARD.install()
