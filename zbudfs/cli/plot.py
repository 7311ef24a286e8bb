# SPDX-License-Identifier: MIT
"""Pictures in a file, drawn by matplotlib, which is an extra: `pip install 'zbudfs[plot]'`.

Whether a picture can be made is asked before the work whose result it shows. Nothing here needs a display.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zbudfs.cli.target import CommandError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES: Final = (9.0, 6.0)


def check_plot(path: str | None) -> None:
    """CommandError if no picture can be written to `path`, as far as that can be told now. None is fine."""
    if path is None:
        return
    folder = Path(path).parent
    if not folder.is_dir():
        raise CommandError(f"the folder {str(folder)!r} for the picture does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CommandError(
            "--plot needs matplotlib: pip install 'zbudfs[plot]' (or apt install python3-matplotlib)"
        ) from None


def save_plot(path: str, title: str, draw: Callable[[Figure], None]) -> None:
    """Have `draw` fill a figure and write it to `path`; there is the whole picture or, if that fails, what was there before.

    An SVG has its text as text. OSError.
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
