# SPDX-License-Identifier: MIT
"""Loads the libfuse shim (shim.c tells what it is for) so that pyfuse3, imported later, calls it instead of libfuse.

The order is everything: the shim's names must be in the process's global scope before pyfuse3 is linked.
"""

import os
import sys


class ShimError(Exception):
    """The shim is missing, was loaded too late, or sits in front of another libfuse than pyfuse3's."""


if "pyfuse3" in sys.modules:
    raise ShimError("pyfuse3 was imported before zbudfs.fuse: the libfuse shim cannot take its place")

_flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    import zbudfs.fuse._shim as _shim  # the other form of import blames a circular one if there is no such file
except ImportError as error:
    raise ShimError(f"the libfuse shim cannot be loaded ({error}): install the package, do not just copy it") from None
finally:
    sys.setdlopenflags(_flags)

serve_file = _shim.serve_file
set_limits = _shim.set_limits
set_linger = _shim.set_linger
set_make_ready = _shim.set_make_ready
set_completions = _shim.set_completions
reply = _shim.reply
reply_data = _shim.reply_data
first_request = _shim.first_request
open_request = _shim.open_request
replay = _shim.replay
take_arenas_from_malloc = _shim.take_arenas_from_malloc
libfuse_version = _shim.libfuse_version
use_metrics = _shim.use_metrics
use_slots = _shim.use_slots
in_work = _shim.in_work
serve_reads = _shim.serve_reads


def verify(maps: str) -> None:
    """ShimError unless one libfuse is loaded, the shim's and pyfuse3's. `maps` is the text of /proc/self/maps."""
    loaded = {line.split(None, 5)[5] for line in maps.splitlines() if "/libfuse3.so" in line}
    if len(loaded) > 1:
        raise ShimError(
            f"pyfuse3 and the libfuse shim use different libraries ({', '.join(sorted(loaded))}): reinstall both"
        )
