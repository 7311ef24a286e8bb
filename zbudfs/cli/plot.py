# SPDX-License-Identifier: MIT
"""Plots in a file, drawn by matplotlib, which is an extra.

A command checks whether it can draw before it does its work. No display is needed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zbudfs.cli.errors import CommandError
from zbudfs.cli.installation import Installation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES: Final = (9.0, 6.0)


def check_plot(path: str | None) -> None:
    """Raise CommandError if the folder of `path` or matplotlib is missing. None is allowed."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise CommandError(f"the folder {str(folder)!r} for the picture does not exist: create it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CommandError(f"--plot needs matplotlib: {Installation().command_for('plot')}") from None


def save_plot(path: str, title: str, draw: Callable[[Figure], None]) -> None:
    """Call `draw` with a figure, and write the figure to `path`. On failure, an earlier file at `path` is unchanged.

    An SVG keeps its text as text. Raises OSError.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "zbudfs"  # the same picture twice is the same file
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    figure.suptitle(title)
    draw(figure)
    target = Path(path)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name[:100]}-", delete=False) as file:
        try:
            figure.savefig(file, format=target.suffix[1:].lower(), metadata=_METADATA.get(target.suffix.lower()))
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)  # noqa: PTH105
        except BaseException:
            os.unlink(file.name)  # noqa: PTH108
            raise


_METADATA: Final = {".svg": {"Date": None, "Creator": "zbudfs"}}
