# SPDX-License-Identifier: MIT
"""A bar for what takes a while: on stderr, if that is a terminal, and gone when the work is done.

It is drawn by rich, which need not be installed: nothing but the bar is missing then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Have a function that is told (done, in all), in any unit, and shows how far `what` is."""
    try:
        if not sys.stderr.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda done, total: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
