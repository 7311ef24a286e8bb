# SPDX-License-Identifier: MIT
"""Draws docs/top.svg: what `zbudfs top` shows while a program needs three times the memory that it gets. As root.

picture.py [FILE.svg]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from scripts.cell import Cell

ROOT: Final = Path(__file__).resolve().parent.parent
MIB: Final = 1 << 20
LIMIT_MIB: Final = 128
NEEDED_MIB: Final = 384
POOL: Final = "96M"
AFTER_SECONDS: Final = 45
_LIMIT_SECONDS: Final = 120.0


def zbudfs(*arguments: str) -> None:
    """Run the command, which must succeed."""
    subprocess.run([sys.executable, "-m", "zbudfs", *arguments], check=True, timeout=_LIMIT_SECONDS)


def main(argv: list[str]) -> int:
    """Draw the picture; return the exit status."""
    path = Path(argv[1] if len(argv) > 1 else ROOT / "docs/top.svg").absolute()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="zbudfs-picture-") as folder:
        mountpoint = Path(folder, "zswap")
        mountpoint.mkdir()
        zbudfs("swapon", "--size", "512M", "--pool", POOL, "--backing", f"{folder}/backing", str(mountpoint))
        try:
            with Cell("picture", LIMIT_MIB * MIB) as cell:
                command = cell.command([sys.executable, "-I", str(ROOT / "scripts/storm.py"), str(NEEDED_MIB)])
                with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as program:
                    try:
                        assert program.stdin is not None
                        program.stdin.write("\n")
                        program.stdin.flush()
                        zbudfs("top", "--picture", str(path), "--after", str(AFTER_SECONDS), str(mountpoint))
                    finally:
                        program.kill()
        finally:
            zbudfs("swapoff", "--umount", str(mountpoint))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
