# SPDX-License-Identifier: MIT
"""The kind of installation of this copy of zbudfs, and the commands that add a library or units, or install it again.

    package   the Debian package: its modules are in Debian's folder     apt-get install python3-textual
    make      `make install`: its list of files is beside it             make install EXTRAS=top
    pipx      the environment has the metadata of pipx                   pipx inject zbudfs textual
    pip       all others                                                 PYTHON -m pip install textual

This module imports the standard library alone, since it is also used when zbudfs cannot start.
"""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import Final

DEBIAN_MODULES: Final = "/usr/lib/python3/dist-packages"
DEFAULT_LIBRARY: Final = "/usr/local/lib/zbudfs"

LIBRARIES: Final = {"top": "textual", "exporter": "prometheus-client", "plot": "matplotlib"}
"""The library of each extra of pyproject.toml, by its name on PyPI. The Debian package is "python3-" and that name."""
_OLDEST: Final = {"textual": "2.1"}
"""The oldest version that works, for a library of which an old Debian has an older one."""
_TOO_OLD: Final = frozenset({("top", "12")})
"""Pairs of an extra and the version of Debian whose library is too old for it."""


class Installation:
    """One copy of zbudfs. `modules` is the folder that holds the package, and `prefix` that of its Python environment."""

    def __init__(self, modules: str = "", prefix: str = "", python: str = "", debian: str | None = None) -> None:
        """Describe a copy; without arguments, the running copy. `debian` is the version of Debian, such as "13"."""
        self._modules = modules or str(Path(__file__).resolve().parents[2])
        self._prefix = prefix or sys.prefix
        self._python = python or sys.executable
        self._debian = debian

    def command_for(self, extra: str) -> str:
        """Return a shell command that installs the library of an extra, or a sentence if there is none."""
        library = LIBRARIES[extra]
        if self._is_package():
            if (extra, self._debian_version()) in _TOO_OLD:
                missing = f"Debian {self._debian_version()} has no {library} {_OLDEST[library]}"
                return f"{missing}; zbudfs status --watch shows the same"
            return f"apt-get install python3-{library}"
        if self._is_made():
            return f"{self._make()} EXTRAS={extra}, in the source folder of zbudfs"
        if Path(self._prefix, "pipx_metadata.json").exists():
            return f"pipx inject zbudfs {library}"
        wanted = f"{library}>={_OLDEST[library]}" if library in _OLDEST else library
        return f"{shlex.quote(self._python)} -m pip install {shlex.quote(wanted)}"

    def command_again(self) -> str:
        """Return the command that installs this copy again."""
        if self._is_package():
            return "apt-get install --reinstall zbudfs, or install the package for this version of Debian"
        if self._is_made():
            return f"{self._make()}, in the source folder of zbudfs"
        return f"{shlex.quote(self._python)} -m pip install --force-reinstall zbudfs, from the same source as before"

    def command_for_units(self) -> str:
        """Return the command that installs the units and the sleep hook, which pip does not install."""
        if self._is_package() or self._is_made():
            return self.command_again()
        return "make install, in the source folder of zbudfs"

    def _is_package(self) -> bool:
        return self._modules == DEBIAN_MODULES

    def _is_made(self) -> bool:
        return Path(self._prefix, "installed").exists() and Path(self._prefix, "libexec/stop-swap").exists()

    def _make(self) -> str:
        if self._prefix == DEFAULT_LIBRARY:
            return "make install"
        if self._prefix.endswith("/lib/zbudfs"):
            return f"make install PREFIX={shlex.quote(self._prefix.removesuffix('/lib/zbudfs'))}"
        return f"make install LIBDIR={shlex.quote(self._prefix)}"

    def _debian_version(self) -> str:
        if self._debian is None:
            try:
                self._debian = platform.freedesktop_os_release().get("VERSION_ID", "")
            except OSError:
                self._debian = ""
        return self._debian
