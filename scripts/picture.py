# SPDX-License-Identifier: MIT
"""Draws docs/top.svg: what `zbudfs top` shows while a program needs three times the memory that it gets. As root.

picture.py [FILE.svg]

The mount is at /mnt/zswap, as in all documents: people read the path.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from scripts.cell import Cell

ROOT: Final = Path(__file__).resolve().parent.parent
MOUNTPOINT: Final = Path("/mnt/zswap")
MIB: Final = 1 << 20
LIMIT_MIB: Final = 128
NEEDED_MIB: Final = 384
POOL: Final = "96M"
AFTER_SECONDS: Final = 20
INTERVAL_SECONDS: Final = 0.5
"""As many looks as the picture has columns, while the program is at work."""
_LIMIT_SECONDS: Final = 120.0


def zbudfs(*arguments: str) -> None:
    """Run the command, which must succeed."""
    subprocess.run([sys.executable, "-m", "zbudfs", *arguments], check=True, timeout=_LIMIT_SECONDS)


def draw(path: Path) -> None:
    """Draw the picture of a mount in a storm."""
    picture = ["--picture", str(path), "--after", str(AFTER_SECONDS)]
    with Cell("picture", LIMIT_MIB * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "scripts/storm.py"), str(NEEDED_MIB)])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as program:
            try:
                assert program.stdin is not None
                program.stdin.write("\n")
                program.stdin.flush()
                zbudfs("top", "--interval", str(INTERVAL_SECONDS), *picture, str(MOUNTPOINT))
            finally:
                program.kill()


def main(argv: list[str]) -> int:
    """Draw the picture; return the exit status."""
    path = Path(argv[1] if len(argv) > 1 else ROOT / "docs/top.svg").absolute()
    there = MOUNTPOINT.exists()
    MOUNTPOINT.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="zbudfs-picture-") as folder:
            zbudfs("swapon", "--size", "512M", "--pool", POOL, "--backing", f"{folder}/backing", str(MOUNTPOINT))
            try:
                draw(path)
            finally:
                zbudfs("swapoff", "--umount", str(MOUNTPOINT))
    except subprocess.CalledProcessError:
        return 1  # it has said why
    finally:
        if not there:
            MOUNTPOINT.rmdir()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
