# SPDX-License-Identifier: MIT
"""Makes the sdist and the wheel, and tries them: `make dist`.

    source -> dist/*.tar.gz -> dist/*.whl -> an empty virtual environment -> zbudfs --version

The wheel is made from what the sdist holds, so that an sdist which lacks something fails here. Building needs what
requirements-dev.txt pins; the empty environment gets its dependencies from the network, as a user's would.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
LIMIT_SECONDS: Final = 300.0


def build(hook: str, source: Path, target: Path) -> Path:
    """Call a hook of the build backend ("sdist" or "wheel") for the project in `source`; return what was made."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{hook}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=source,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    if run.returncode != 0:
        raise SystemExit(f"{run.stdout}\nthe {hook} could not be built")
    return target / run.stdout.splitlines()[-1]


def build_both(source: Path, target: Path) -> tuple[Path, Path]:
    """Make the sdist of `source`, and of that alone the wheel; return both."""
    sdist = build("sdist", source, target)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        return sdist, build("wheel", unpacked, target)


def main() -> int:
    """Make both and try them; the exit status."""
    sdist, wheel = build_both(ROOT, ROOT / "dist")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        for command in (["pip", "install", "--quiet", str(wheel)], ["zbudfs", "--version"]):
            program = Path(folder, "bin", command[0])
            subprocess.run([program, *command[1:]], check=True, timeout=LIMIT_SECONDS)
    print(f"{sdist.relative_to(ROOT)} and {wheel.relative_to(ROOT)} are in order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
