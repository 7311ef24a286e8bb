# SPDX-License-Identifier: MIT
"""Loads the libfuse shim so that pyfuse3, imported later, calls it instead of libfuse. shim.c explains its purpose.

The order matters: the shim's names must be in the process's global scope before pyfuse3 is linked.
"""

import os
import sys


class ShimError(Exception):
    """The shim is missing, was loaded too late, or uses another libfuse than pyfuse3."""


if "pyfuse3" in sys.modules:
    raise ShimError("pyfuse3 was imported before zbudfs.fuse: the libfuse shim cannot take its place")

_flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    import zbudfs.fuse._shim as _shim  # `from ... import` would report a circular import if the file is missing
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
    """Raise ShimError unless the shim and pyfuse3 use the same libfuse. `maps` is the text of /proc/self/maps."""
    loaded = {line.split(None, 5)[5] for line in maps.splitlines() if "/libfuse3.so" in line}
    if len(loaded) > 1:
        raise ShimError(
            f"pyfuse3 and the libfuse shim use different libraries ({', '.join(sorted(loaded))}): reinstall both"
        )
