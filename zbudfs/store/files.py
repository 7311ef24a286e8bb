# SPDX-License-Identifier: MIT
"""Small files of the system, whole: those of proc, sys and etc, below the folder `root` of the system.

The daemon reads them through this module and not through pathlib, which would cost 150 KiB of locked memory in each process.
"""

import os


def below(root: str, path: str) -> str:
    """Return the path of a file of the system whose / is the folder `root`."""
    return os.path.join(root, path.lstrip("/")).rstrip("/") or "/"


def read_bytes(path: str, root: str = "/") -> bytes:
    """Return the content of a file below `root`. OSError."""
    with open(below(root, path), "rb") as file:
        return file.read()


def read_text(path: str, root: str = "/") -> str:
    """Return the content of a file below `root` as text, in which any bytes are allowed, as in a path. OSError."""
    return os.fsdecode(read_bytes(path, root))


def write_text(path: str, text: str, root: str = "/") -> None:
    """Replace the content of a file below `root`. OSError."""
    with open(below(root, path), "wb") as file:
        file.write(os.fsencode(text))
