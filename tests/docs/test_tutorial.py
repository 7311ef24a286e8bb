# SPDX-License-Identifier: MIT
"""The commands of the tutorial succeed, in their order, in one shell."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT, is_mounted, run_zbudfs
from zbudfs.service.settings import default_backing

BLOCK: Final = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACES: Final = ("/mnt/zswap", "/mnt/zplay")


def script_of(document: str, folder: Path) -> str:
    """Return the commands of a document, with its places moved into `folder`."""
    script = "\n".join(BLOCK.findall(document))
    for place in PLACES:
        script = script.replace(place, str(folder / Path(place).name))
    return script


@pytest.mark.needs("root", "fuse", "loop", "swap")
@pytest.mark.timeout(15 * LIMIT_SECONDS)
def test_every_command_of_the_tutorial(tmp_path: Path) -> None:
    """The tutorial turns swap on, survives the kill of its daemon, and leaves nothing behind."""
    script = script_of((ROOT / "docs/use/tutorial.md").read_text(), tmp_path)
    assert script.count("zbudfs ") >= 12
    assert not re.search(r"^[^#\n]*/mnt/", script, re.MULTILINE)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    mountpoints = [tmp_path / Path(place).name for place in PLACES]
    try:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            capture_output=True,
            text=True,
            timeout=12 * LIMIT_SECONDS,
            check=False,
            env={**os.environ, "PATH": path},
        )
        assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
        assert not any(mountpoint.exists() for mountpoint in mountpoints)
        assert re.search(r"^1$", run.stdout, re.MULTILINE), "nothing was recovered"
    finally:
        for mountpoint in mountpoints:
            if is_mounted(mountpoint):
                run_zbudfs("swapoff", "--force", "--umount", mountpoint)
                run_zbudfs("umount", mountpoint)
            with contextlib.suppress(FileNotFoundError):
                Path(default_backing(str(mountpoint))).unlink()
