# SPDX-License-Identifier: MIT
"""sdist, wheel, `make install` and `make uninstall`, without a network: wheels are made of installed ones."""

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts.dist import build_both
from tests.support import LIMIT_SECONDS, ROOT, is_mounted, status_of
from zbudfs import __version__


def needed_by(name: str, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the names of the distributions that an installed one needs here, directly or through others."""
    for text in importlib.metadata.requires(name) or ():
        wanted = Requirement(text)
        if wanted.name not in known and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            known = needed_by(wanted.name, known | {wanted.name})
    return known


def wheel_of(name: str, target: Path) -> None:
    """Make a wheel of an installed distribution from the list of its files."""
    found = importlib.metadata.distribution(name)
    text = found.read_text("WHEEL")
    assert text is not None
    tags = email.message_from_string(text).get_all("Tag")
    assert tags
    with zipfile.ZipFile(target / f"{name}-{found.version}-{tags[-1]}.whl", "w") as archive:
        for file in found.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts and file.name != "INSTALLER":
                archive.write(str(file.locate()), str(file))


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist, the wheel made from it, and wheels of all that it and its manual pages need."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    build_both(ROOT, folder)
    for name in (*needed_by("zbudfs"), "docutils", "shtab"):
        wheel_of(name, folder)
    return folder


def test_the_sdist_is_complete(wheelhouse: Path) -> None:
    """The sdist has everything that one needs to build, install, test and read."""
    (sdist,) = wheelhouse.glob("zbudfs-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    wanted = {name for name in tracked if not name.startswith(".") and "/." not in name and (ROOT / name).is_file()}
    wanted |= {"Makefile", "setup.py", "zbudfs/fuse/shim.c", "scripts/install.sh", "docs/zbudfs.toml.example"}
    wanted |= {"docs/man/zbudfs.8", "docs/man/zbudfs.toml.5", "completion/zbudfs.bash", "completion/zbudfs.zsh"}
    assert wanted - names == set()
    assert [name for name in names if name.endswith((".pyc", ".so"))] == []


def test_the_wheel_holds_the_program_alone(wheelhouse: Path) -> None:
    """The wheel has the package with its compiled shim, and no other part of the project."""
    (wheel,) = wheelhouse.glob("zbudfs-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"zbudfs", f"zbudfs-{__version__}.dist-info"}
    assert [name for name in names if name.startswith("zbudfs/fuse/_shim.") and name.endswith(".so")]
    assert "zbudfs/fuse/shim.c" in names
    assert "zbudfs/py.typed" in names


SLEEP_HOOK = "usr/lib/systemd/system-sleep/zbudfs"


def make(target: str, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """Run make with variables."""
    words = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "--no-print-directory", target, f"PYTHON={sys.executable}", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * LIMIT_SECONDS, check=False)


def tree(folder: Path) -> dict[str, str]:
    """Return the content of a folder by path: contents of files, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = path.read_bytes().hex() if path.is_file() else ""
    return found


def places(prefix: Path) -> dict[str, Path]:
    """Return variables that keep an installation inside one folder."""
    return {"PREFIX": prefix, "SYSCONFDIR": prefix / "etc", "HELPERDIR": prefix / "sbin", "SLEEPDIR": prefix / "sleep"}


@pytest.fixture(scope="module")
def installed(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Install into a folder that is not empty. Return it and its earlier content, and remove all at the end."""
    prefix = tmp_path_factory.mktemp("prefix").resolve()
    (prefix / "bin").mkdir()
    (prefix / "bin/other").write_text("not ours")
    (prefix / "share/man/man8").mkdir(parents=True)
    before = tree(prefix)
    run = make("install", WHEELHOUSE=wheelhouse, **places(prefix))
    assert run.returncode == 0, run.stderr
    yield prefix, before
    run = make("uninstall", **places(prefix))
    assert run.returncode == 0, run.stderr


def test_the_installed_command_runs(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """The command works from any folder and with any setting of Python in the environment."""
    prefix, _ = installed
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "tests"), "PYTHONHOME": "/nonexistent"}
    run = subprocess.run(
        [prefix / "bin/zbudfs", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (run.stdout, run.stderr) == (f"zbudfs {__version__}\n", "")
    code = "import zbudfs, importlib.metadata; print(zbudfs.__file__)"
    run = subprocess.run(
        [prefix / "lib/zbudfs/bin/python", "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stdout.startswith(f"{prefix}/lib/zbudfs/lib/")


@pytest.mark.needs("root", "fuse")
def test_the_installed_command_mounts(installed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """The installed command makes a mount, and `make uninstall` refuses while the mount exists."""
    prefix, _ = installed
    options = ["--size", "4M", "--pool", "1M", "--backing", "none"]
    command = [str(prefix / "bin/zbudfs"), "mount", *options, str(tmp_path)]
    subprocess.run(command, check=True, timeout=LIMIT_SECONDS, capture_output=True)
    try:
        assert status_of(tmp_path)["size_bytes"] == 4 << 20
        run = make("uninstall", **places(prefix))
        assert run.returncode != 0
        assert f"still runs from {prefix}/lib/zbudfs" in run.stderr
        assert (prefix / "bin/zbudfs").exists()
    finally:
        subprocess.run([prefix / "bin/zbudfs", "umount", tmp_path], check=True, timeout=LIMIT_SECONDS)
    assert not is_mounted(tmp_path)


@pytest.mark.parametrize("broken", ["another version", "no interpreter"])
def test_a_program_that_cannot_start_says_what_to_do(
    broken: str, installed: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """The command ends with one line and status 127 after an upgrade of Python, or 1 if the store has descriptors."""
    prefix, _ = installed
    library = prefix / "lib/zbudfs"
    if broken == "another version":
        (python,) = library.glob("lib/python3.*")
        there, away = python, python.with_name("python3.0")
    else:
        there, away = library / "bin/python", library / "bin/away"
    there.rename(away)
    try:
        for command in (prefix / "bin/zbudfs", prefix / "sbin/mount.fuse.zbudfs"):
            for stored, status in (("", 127), ("0", 127), ("3", 1)):
                environment = {"PATH": "/usr/bin:/bin", "LISTEN_FDS": stored}
                run = subprocess.run(
                    [command, "status"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
                )
                assert (run.returncode, run.stdout) == (status, "")
                assert len(run.stderr.splitlines()) == 1, run.stderr
                assert "make install" in run.stderr
    finally:
        away.rename(there)


def test_installing_and_uninstalling_leaves_nothing(wheelhouse: Path, tmp_path: Path) -> None:
    """Two installations and an uninstallation leave exactly the earlier content, and an edited configuration."""
    prefix = tmp_path.resolve() / "prefix"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/other").write_text("not ours")
    before = tree(tmp_path)
    assert make("install", WHEELHOUSE=wheelhouse, **places(prefix)).returncode == 0
    first = set(tree(tmp_path))
    assert {"prefix/bin/zbudfs", "prefix/etc/zbudfs/swap.toml", "prefix/lib/zbudfs/installed"} <= first
    share = "prefix/share"
    assert {
        f"{share}/man/man8/zbudfs.8",
        f"{share}/man/man5/zbudfs.toml.5",
        f"{share}/zsh/site-functions/_zbudfs",
    } <= first
    assert make("install", WHEELHOUSE=wheelhouse, **places(prefix)).returncode == 0
    assert set(tree(tmp_path)) == first
    assert make("uninstall", **places(prefix)).returncode == 0
    assert tree(tmp_path) == before
    run = make("uninstall", **places(prefix))
    assert run.returncode != 0
    assert "set PREFIX, DESTDIR and LIBDIR as at the installation" in run.stderr


def test_without_the_tools_for_manual_pages(wheelhouse: Path, tmp_path: Path) -> None:
    """The installation works without these tools, and a note names the missing parts."""
    if not (ROOT / ".git").exists():
        pytest.skip("a release has the pages")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for wheel in wheelhouse.glob("*.whl"):
        if not wheel.name.startswith(("docutils", "shtab")):
            (wheels / wheel.name).symlink_to(wheel)
    run = make("install", WHEELHOUSE=wheels, **places(tmp_path / "prefix"))
    assert run.returncode == 0, run.stderr
    assert "pages: manual pages left out: No module named 'docutils'" in run.stderr
    assert (tmp_path / "prefix/etc/zbudfs/swap.toml").exists()
    assert not (tmp_path / "prefix/share/man").exists()
    assert make("uninstall", **places(tmp_path / "prefix")).returncode == 0


def test_below_a_destdir(wheelhouse: Path, tmp_path: Path) -> None:
    """`make install DESTDIR=` writes nothing outside, and no file names the folder, so it can be moved to its place."""
    destdir = tmp_path / "destdir"
    run = make("install", WHEELHOUSE=wheelhouse, DESTDIR=destdir, PREFIX="/opt/zbudfs-test")
    assert run.returncode == 0, run.stderr
    assert not Path("/opt/zbudfs-test").exists()
    files = [path for path in destdir.rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in files if os.fsencode(destdir) in path.read_bytes()] == []
    script = destdir / "opt/zbudfs-test/lib/zbudfs/bin/zbudfs"
    assert script.read_text().startswith("#!/opt/zbudfs-test/lib/zbudfs/bin/python -I\n")
    assert "/opt/zbudfs-test/lib/zbudfs/bin/zbudfs" in (destdir / "opt/zbudfs-test/bin/zbudfs").read_text()
    units = destdir / "opt/zbudfs-test/lib/systemd/system"
    text = "".join(path.read_text() for path in [*units.rglob("*"), destdir / SLEEP_HOOK] if path.is_file())
    assert "ExecStart=/opt/zbudfs-test/bin/zbudfs serve" in text
    assert "/usr/local/" not in text
    named = set(re.findall(r"/opt/zbudfs-test/lib/zbudfs/libexec/[\w-]+", text))
    assert len(named) >= 2
    assert [path for path in named if not (destdir / path[1:]).is_file()] == []
    assert (units / "sleep.target.d/zbudfs.conf").is_file()
    assert os.access(destdir / SLEEP_HOOK, os.X_OK)
    # The documents name the hook also for `run` and `post` by hand, since its place is that of the package too.
    helper = destdir / "opt/zbudfs-test/lib/zbudfs/libexec/sleep"
    assert (destdir / SLEEP_HOOK).read_bytes() == helper.read_bytes()
    (destdir / "etc/zbudfs/swap.toml").write_text("level = 3\n")
    run = make("uninstall", DESTDIR=destdir, PREFIX="/opt/zbudfs-test")
    assert "kept " in run.stdout
    assert set(tree(destdir)) == {"etc", "etc/zbudfs", "etc/zbudfs/swap.toml"}


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """One line names the missing program, and nothing is installed."""
    for variables, reason in (
        ({"PREFIX": "usr"}, "'usr' is not an absolute path"),
        ({"PREFIX": str(tmp_path), "WHEELHOUSE": "/none"}, "WHEELHOUSE=/none is not a folder"),
        ({"PREFIX": str(tmp_path), "EXTRAS": "top,tip"}, "the extra tip is unknown"),
    ):
        run = make("install", **variables)
        assert run.returncode != 0
        assert reason in run.stderr
    assert list(tmp_path.iterdir()) == []
