# SPDX-License-Identifier: MIT
"""A message that says how to install a library fits the way in which this copy of zbudfs was installed."""

import tomllib
from pathlib import Path

import pytest

from tests.support import ROOT
from zbudfs.cli.installation import DEBIAN_MODULES, DEFAULT_LIBRARY, LIBRARIES, Installation


def made(folder: Path) -> Path:
    """Make a folder look like one that `make install` has made."""
    (folder / "libexec").mkdir(parents=True)
    (folder / "libexec/stop-swap").touch()
    (folder / "installed").touch()
    return folder


def test_every_extra_is_known() -> None:
    """Each extra of pyproject.toml for users has its library here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name != "dev"}
    assert {name: wanted[0].partition(">=")[0] for name, wanted in extras.items()} == LIBRARIES


@pytest.mark.parametrize(
    ("extra", "debian", "wanted"),
    [
        ("top", "13", "apt-get install python3-textual"),
        ("top", "12", "Debian 12 has no textual 2.1; zbudfs status --watch shows the same"),
        ("exporter", "12", "apt-get install python3-prometheus-client"),
        ("plot", "12", "apt-get install python3-matplotlib"),
    ],
)
def test_the_package(extra: str, debian: str, wanted: str) -> None:
    """Debian's own libraries are named if they are new enough."""
    assert Installation(DEBIAN_MODULES, "/usr", "/usr/bin/python3", debian).command_for(extra) == wanted


def test_make_install(tmp_path: Path) -> None:
    """The message names the same target with the same place."""
    for place, words in (
        ("opt/lib/zbudfs", f"make install PREFIX={tmp_path}/opt"),
        ("z", f"make install LIBDIR={tmp_path}/z"),
    ):
        copy = Installation(f"{tmp_path}/{place}/lib/python3.11/site-packages", str(made(tmp_path / place)), "python")
        assert copy.command_for("top") == f"{words} EXTRAS=top, in the source folder of zbudfs"
        assert copy.command_again() == f"{words}, in the source folder of zbudfs"
    assert Installation("/x", DEFAULT_LIBRARY)._make() == "make install"


def test_units(tmp_path: Path) -> None:
    """Units come with the package or from make install, and never from pip."""
    package = Installation(DEBIAN_MODULES, "/usr")
    assert package.command_for_units() == package.command_again()
    assert "make" not in package.command_for_units()
    copy = Installation("/x", str(made(tmp_path / "opt/lib/zbudfs")))
    assert copy.command_for_units() == f"make install PREFIX={tmp_path}/opt, in the source folder of zbudfs"
    assert Installation("/x", str(tmp_path)).command_for_units() == "make install, in the source folder of zbudfs"


def test_pip_and_pipx(tmp_path: Path) -> None:
    """The message names the running interpreter, quoted for a shell."""
    python = f"{tmp_path}/my env/bin/python"
    copy = Installation(f"{tmp_path}/site-packages", str(tmp_path), python)
    assert copy.command_for("top") == f"'{python}' -m pip install 'textual>=2.1'"
    assert copy.command_for("exporter") == f"'{python}' -m pip install prometheus-client"
    (tmp_path / "pipx_metadata.json").touch()
    assert copy.command_for("top") == "pipx inject zbudfs textual"
