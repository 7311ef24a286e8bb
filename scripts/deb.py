# SPDX-License-Identifier: MIT
"""Build the Debian package, and try it. `make deb` runs this script.

    deb.py [--suite trixie|bookworm|here] [--version V] [--output dist] [--try]

    here               build with the tools of this machine, which needs the Build-Depends of debian/control
    trixie, bookworm   build in a folder with that Debian, which mmdebstrap makes once and which is kept; needs root

Without --suite, the package is for the Debian of this machine: `here` if the tools are complete, else in a folder. lintian
checks the package. --try installs it in a clean folder with a Debian, then upgrades, removes and purges it: no file may be
left.

The version of the package is that of the program, followed by "-1+deb13" or "-1+deb12". --version builds a package whose
program has another version. The time stamps are those of debian/changelog, so the same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.vm_image import CACHE, KEYRING, SUITES, VmError, archive, key, made, remove, run, sources  # noqa: E402
from zbudfs import __version__  # noqa: E402

HERE: Final = "here"
RELEASES: Final = {"trixie": "13", "bookworm": "12"}
CLEAN_PACKAGES: Final = ("ca-certificates",)
WORK: Final = "var/tmp/zbudfs"
"""Folder of the source and the package, inside a folder with a Debian."""

DEBIAN_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Search path of a build with the tools of this machine. Another Python in front of Debian's lacks the Build-Depends."""

NOT_COMPARED: Final = re.compile(
    r"^(var/(lib/(dpkg|apt|systemd)|log|cache|tmp)|tmp|run|proc|sys|dev|etc/ld\.so\.cache|root)(/|$)"
)
"""Paths that are not compared: the package manager itself changes them, or they are not part of the system."""

IN_TREE: Final = """
set -e
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount --rbind /sys "$0/sys"
mount --rbind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/run"
exec env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot "$0" "$@"
"""


def in_tree(tree: Path, *command: str, log: Path | None = None) -> str:
    """Run a command in a folder with a Debian, with its own mounts, and return its output. Raises VmError."""
    return run("unshare", "--mount", "--propagation", "private", "sh", "-c", IN_TREE, tree, *command, log=log)


# ---- the folders -----------------------------------------------------------------------------------------------------


def bootstrap(tree: Path, suite: str, variant: str, *options: str) -> None:
    """Make a folder with a Debian, of a suite and variant of mmdebstrap."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    source = tree.with_name(f"{suite}.list")
    source.write_text(f"deb [signed-by={KEYRING}] {archive()} {suite} main\n")
    words = ["mmdebstrap", "--quiet", "--mode=root", f"--variant={variant}", "--aptopt=APT::Install-Recommends false"]
    words += ["--aptopt=Acquire::Languages none", "--skip=cleanup/apt/lists", *options]
    run(*words, suite, tree, source, log=CACHE / "mmdebstrap.log")


def builder(suite: str) -> Path:
    """Return a folder with a Debian that has the Build-Depends of debian/control, and lintian."""
    control = ROOT / "debian/control"
    tree = CACHE / f"deb-{suite}-{key(control.read_text().partition('Standards')[0])}"
    if not tree.is_dir():
        with made(tree) as draft:
            bootstrap(
                draft,
                suite,
                "buildd",
                "--include=lintian",
                f'--customize-hook=mkdir -p "$1/{WORK}/debian" && cp {control} "$1/{WORK}/debian"',
                f'--customize-hook=chroot "$1" apt-get -q -y build-dep "/{WORK}"',
            )
    return tree


def clean(suite: str) -> Path:
    """Return a folder with a minimal Debian, to be copied before use."""
    tree = CACHE / f"clean-{suite}-{key(CLEAN_PACKAGES)}"
    if not tree.is_dir():
        with made(tree) as draft:
            bootstrap(draft, suite, "minbase", f"--include={','.join(CLEAN_PACKAGES)}")
    return tree


# ---- the package -----------------------------------------------------------------------------------------------------


def put_source(folder: Path, version: str, suite: str) -> None:
    """Put the source into a folder, with this version of the program and of the package."""
    for name in source_files():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place)
    init, changelog = folder / "zbudfs/__init__.py", folder / "debian/changelog"
    init.write_text(init.read_text().replace(f'"{__version__}"', f'"{version}"'))
    suffix = f"+deb{RELEASES[suite]}" if suite in RELEASES else ""
    changelog.write_text(re.sub(r"\(.*?\)", f"({version}-1{suffix})", changelog.read_text(), count=1))


def source_files() -> list[str]:
    """Return the files of the source: the files in git, or all files of a release."""
    if (ROOT / ".git").exists():
        return sources()
    made = {".venv", "build", "dist"}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [str(path) for path in found if path.parts[0] not in made and "__pycache__" not in path.parts]


def this_suite() -> str:
    """Return the name of this machine's Debian; empty if it is not supported."""
    found = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found and found[1] in SUITES else ""


def build(suite: str, version: str, output: Path) -> Path:
    """Build the package, and return its path. Raises VmError."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if suite == HERE:
            place = Path(folder) / "source"
            put_source(place, version, this_suite())
            script = 'cd "$0" && dpkg-buildpackage -b -us -uc 2>&1'
            run("sh", "-c", script, place, log=output / "deb.log", PATH=DEBIAN_PATH)
        else:
            tree = builder(suite)
            place = tree / WORK / "source"
            remove(tree / WORK)
            put_source(place, version, suite)
            script = f"cd /{WORK}/source && dpkg-buildpackage -b -us -uc 2>&1 && lintian --pedantic ../*.changes 2>&1"
            in_tree(tree, "sh", "-c", script, log=output / "deb.log")
            print_lintian(output / "deb.log")
        (package,) = place.parent.glob("zbudfs_*.deb")
        shutil.copy(package, output)
        if suite != HERE:
            remove(tree / WORK)
    return output / package.name


def print_lintian(log: Path) -> None:
    """Print the findings of lintian. There should be none."""
    found = [line for line in log.read_text().splitlines() if re.match(r"^[EWIP]: zbudfs", line)]
    print("\n".join(found) or "lintian: no findings", flush=True)


def download_needs(tree: Path, package: Path, folder: Path) -> None:
    """Download the packages that a package needs and that a Debian in a folder lacks."""
    folder.mkdir(parents=True)
    work = tree / WORK
    remove(work)
    work.mkdir(parents=True)
    shutil.copy(package, work)
    script = f"apt-get -q update && cd /{WORK} && apt-get -q -y --no-install-recommends --download-only install ./*.deb"
    in_tree(tree, "sh", "-c", f"{script} && mv /var/cache/apt/archives/*.deb /{WORK}")
    for path in work.glob("*.deb"):
        if path.name != package.name:
            shutil.copy(path, folder)
    remove(work)


# ---- trying it -------------------------------------------------------------------------------------------------------


@contextmanager
def copy_of(tree: Path) -> Iterator[Path]:
    """Make a copy of a folder for this context."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="try-") as folder:
        copy = Path(folder) / "tree"
        run("cp", "-a", "--reflink=auto", tree, copy)
        yield copy


def contents(tree: Path) -> dict[str, str]:
    """Return the files, folders and links of a tree by path, each with its mode and size, which show a change."""
    found = {}
    for path in tree.rglob("*"):
        name = str(path.relative_to(tree))
        if not NOT_COMPARED.match(name):
            found[name] = f"{path.lstat().st_mode:o} {path.lstat().st_size if path.is_file() else ''}"
    return found


def try_package(suite: str, package: Path, newer: Path) -> bool:
    """Install, upgrade, remove and purge a package in a clean Debian. Return whether it leaves no file."""
    with copy_of(clean(suite)) as tree:
        for each in (package, newer):
            shutil.copy(each, tree / "var/tmp")
        needs = run("dpkg-deb", "-f", package, "Depends").strip()
        in_tree(tree, "apt-get", "-q", "-y", "satisfy", needs)
        before = contents(tree)
        for step in (
            f"dpkg -i /var/tmp/{package.name}",
            "zbudfs --version",
            f"dpkg -i /var/tmp/{newer.name}",
            "zbudfs --version",
            "dpkg --remove zbudfs",
        ):
            print(f"$ {step}\n{in_tree(tree, 'sh', '-c', step)}", end="", flush=True)
        removed = contents(tree)
        kept = {name for name in removed if name not in before}
        print(f"left by the removal: {', '.join(sorted(kept)) or 'nothing'}")
        in_tree(tree, "dpkg", "--purge", "zbudfs")
        after = contents(tree)
    different = sorted({name for name in {*before, *after} if before.get(name) != after.get(name)})
    print(f"left by the purge: {', '.join(different) or 'nothing'}")
    return not different and all(name.startswith("etc/") for name in kept)


def main() -> int:
    """Build the package, try it if --try is given, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite", choices=(HERE, *RELEASES), help="Debian to build for (default: that of this machine)"
    )
    parser.add_argument("--version", default=__version__, help="version of the program (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "dist", metavar="DIR", help="folder for the package (default: dist)"
    )
    parser.add_argument(
        "--try", action="store_true", dest="tried", help="install, upgrade, remove and purge the package"
    )
    options = parser.parse_args()
    suite = options.suite or this_suite()
    if not options.suite:
        complete = subprocess.run(["dpkg-checkbuilddeps"], cwd=ROOT, capture_output=True, check=False).returncode == 0
        suite = HERE if complete else suite
    if suite != HERE and shutil.which("mmdebstrap") is None:
        print(
            "deb: build tools are missing: as root, run apt-get build-dep ./ (or, to build for any Debian, apt-get install"
            " mmdebstrap)",
            file=sys.stderr,
        )
        return 1
    if not suite:
        parser.error(f"this machine does not run Debian {' or '.join(RELEASES.values())}: name one with --suite")
    try:
        package = build(suite, options.version, options.output)
        print(package)
        if options.tried:
            with tempfile.TemporaryDirectory() as folder:
                newer = build(suite, f"{options.version}.1", Path(folder))
                return 0 if try_package(this_suite() if suite == HERE else suite, package, newer) else 1
    except (VmError, FileNotFoundError) as error:
        print(f"deb: {error}; see {options.output}/deb.log", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
