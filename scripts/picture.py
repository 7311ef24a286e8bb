# SPDX-License-Identifier: MIT
"""Draw docs/top.svg: the screen of `zbudfs top` while a program needs three times the memory that it gets. Needs root.

picture.py [FILE.svg]

The mountpoint is /mnt/zswap as in all documents, since readers see the path.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from kit.cell import Cell

ROOT: Final = Path(__file__).resolve().parent.parent
MOUNTPOINT: Final = Path("/mnt/zswap")
MIB: Final = 1 << 20
LIMIT_MIB: Final = 128
NEEDED_MIB: Final = 384
POOL: Final = "96M"
AFTER_SECONDS: Final = 20
INTERVAL_SECONDS: Final = 0.5
"""Time between two updates of top, so that the picture has an update for each column while the program works."""
_LIMIT_SECONDS: Final = 120.0


def zbudfs(*arguments: str) -> None:
    """Run the command `zbudfs`. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "zbudfs", *arguments], check=True, timeout=_LIMIT_SECONDS)


def draw(path: Path) -> None:
    """Draw the screen of top while a storm runs."""
    picture = ["--picture", str(path), "--after", str(AFTER_SECONDS)]
    with Cell("picture", LIMIT_MIB * MIB) as cell:
        command = cell.command([sys.executable, "-I", str(ROOT / "kit/storm.py"), str(NEEDED_MIB)])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as program:
            try:
                assert program.stdin is not None
                program.stdin.write("\n")
                program.stdin.flush()
                zbudfs("top", "--interval", str(INTERVAL_SECONDS), *picture, str(MOUNTPOINT))
            finally:
                program.kill()


def main(argv: list[str]) -> int:
    """Draw the picture, and return the exit status."""
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
        return 1  # the command has printed the reason
    finally:
        if not there:
            MOUNTPOINT.rmdir()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
