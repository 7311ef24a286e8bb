# SPDX-License-Identifier: MIT
"""Build sdist, wheel and Debian packages twice, in different folders, and compare the bytes. `make reproducible` runs this.

reproducible.py [--suite trixie|bookworm|here ...]      a package for each suite; none without --suite
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import deb  # noqa: E402  after the path is known
from scripts.dist import build_both  # noqa: E402
from scripts.vm_image import sources  # noqa: E402
from zbudfs import __version__  # noqa: E402

FIRST_AND_SECOND: Final = ("first", "the second, with a longer name")


def build_all(folder: Path, suites: list[str]) -> dict[str, str]:
    """Build everything from a copy of the source in a folder, and return the checksum of each file by its name."""
    source, target = folder / "source", folder / "out"
    for name in sources():
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place)
    built = [*build_both(source, target), *(deb.build(suite, __version__, target / suite) for suite in suites)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built}


def main() -> int:
    """Build twice, compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--suite", action="append", default=[], choices=(deb.HERE, *deb.RELEASES), help="build a Debian package too"
    )
    options = parser.parse_args()
    found = []
    for name in FIRST_AND_SECOND:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, name.replace(" ", "-"))
            place.mkdir()
            found.append(build_all(place, options.suite))
        time.sleep(2)  # so that the time stamps of the two builds differ
    for name, digest in found[0].items():
        print(f"{'the same ' if found[1].get(name) == digest else 'DIFFERENT'}  {digest}  {name}")
    return 0 if found[0] == found[1] else 1


if __name__ == "__main__":
    sys.exit(main())
