# SPDX-License-Identifier: MIT
"""Build the sdist and the wheel, and try them. `make dist` runs this script.

    source, generated pages -> dist/*.tar.gz -> dist/*.whl -> an empty virtual environment -> zbudfs --version

The wheel is built from the content of the sdist, so that an incomplete sdist fails here. The build needs the packages that
requirements-dev.txt pins. The empty environment gets its dependencies from the network, as on a user's machine.

The same source gives the same bytes in any folder (scripts/reproducible.py). The time stamps are the date of the version in
CHANGELOG.md, and no file contains the name of the folder.
"""

from __future__ import annotations

import calendar
import gzip
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
LIMIT_SECONDS: Final = 300.0


def release_time(source: Path) -> int:
    """Return the date of the newest version in the change log, in seconds since 1970."""
    found = re.search(r"^## \[.*\] - (\d{4}-\d\d-\d\d)$", (source / "CHANGELOG.md").read_text(), re.MULTILINE)
    if not found:
        raise SystemExit("CHANGELOG.md has no version with a date: write a line such as ## [1.2.3] - 2026-11-28")
    return calendar.timegm(time.strptime(found[1], "%Y-%m-%d"))


def normalise(sdist: Path, seconds: int) -> None:
    """Write an sdist again, with its members sorted, and without the times, user and permissions of the build."""
    plain = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = seconds, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=seconds) as packed:
        packed.write(plain.getvalue())


def build(hook: str, source: Path, target: Path) -> Path:
    """Call a hook of the build backend ("sdist" or "wheel") for the project in `source`, and return the path of its file."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{hook}(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=source,
        env={
            **os.environ,
            "SOURCE_DATE_EPOCH": str(release_time(source)),
            "CFLAGS": f"-g0 -ffile-prefix-map={source}=.",
        },
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
    """Build the sdist of `source`, and the wheel from the sdist alone. Return both paths."""
    subprocess.run(
        [sys.executable, "-m", "scripts.pages", source.resolve()], cwd=ROOT, check=True, timeout=LIMIT_SECONDS
    )
    sdist = build("sdist", source, target)
    normalise(sdist, release_time(source))
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        return sdist, build("wheel", unpacked, target)


def main() -> int:
    """Build both, try them, and return the exit status."""
    sdist, wheel = build_both(ROOT, ROOT / "dist")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        for command in (["pip", "install", "--quiet", str(wheel)], ["zbudfs", "--version"]):
            program = Path(folder, "bin", command[0])
            subprocess.run([program, *command[1:]], check=True, timeout=LIMIT_SECONDS)
    print(f"{sdist.relative_to(ROOT)} and {wheel.relative_to(ROOT)} are built and tried")
    return 0


if __name__ == "__main__":
    sys.exit(main())
