# SPDX-License-Identifier: MIT
"""Builds the libfuse shim (zbudfs/fuse/shim.c), the hot path (zbudfs/core/hot*.c) and the cipher (zbudfs/store/cipher.c).

Everything else is in pyproject.toml. Hot path and cipher are ordinary extensions. The shim is an extension module that is
linked to libfuse and loaded in front of it, so all that is wanted from setuptools is a compiler run with libfuse's flags, and
clear words where it cannot be.
"""

import shlex
import shutil
import subprocess
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SHIM = "zbudfs.fuse._shim"
REMEDY = "on Debian: apt-get install gcc pkg-config libfuse3-dev; on Fedora: dnf install gcc pkgconf fuse3-devel"


def _pkg_config(*wanted: str) -> list[str]:
    try:
        run = subprocess.run(["pkg-config", *wanted, "fuse3"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(f"zbudfs: cannot build the libfuse shim: no pkg-config ({REMEDY})") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = lines[0] if lines else "the headers of libfuse 3.10 or later are not there (fuse3)"
        raise SystemExit(f"zbudfs: cannot build the libfuse shim: {reason} ({REMEDY})") from None
    return shlex.split(run.stdout)


class BuildShim(build_ext):
    """Looks for what the shim needs when it is built, not when setup.py is merely read."""

    def build_extensions(self) -> None:
        _pkg_config("--atleast-version=3.10")
        if not shutil.which(self.compiler.compiler_so[0]):
            raise SystemExit(f"zbudfs: cannot build the libfuse shim: no {self.compiler.compiler_so[0]} ({REMEDY})")
        for extension in self.extensions:
            # Warnings are errors in development (scripts/setup.sh), but not those of Python's own headers.
            extension.extra_compile_args += ["-std=gnu11", "-Wall", "-Wextra", "-Wconversion"]
            extension.extra_compile_args += ["-isystem", sysconfig.get_path("include")]
            if extension.name == SHIM:
                extension.extra_compile_args += _pkg_config("--cflags")
                extension.extra_link_args += _pkg_config("--libs")
        super().build_extensions()


HOT = [f"zbudfs/core/{name}.c" for name in ("hot", "hot_disk", "hot_reads", "hot_zbud", "hot_dense")]

setup(
    ext_modules=[
        Extension(SHIM, ["zbudfs/fuse/shim.c"], depends=["zbudfs/core/latency.h"]),
        Extension("zbudfs.core._hot", HOT, depends=["zbudfs/core/hot.h", "zbudfs/core/latency.h"]),
        Extension("zbudfs.store._cipher", ["zbudfs/store/cipher.c"], libraries=["dl", "pthread"]),
        Extension("zbudfs.store._aio", ["zbudfs/store/aio.c"]),
    ],
    cmdclass={"build_ext": BuildShim},
)
