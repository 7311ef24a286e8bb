# SPDX-License-Identifier: MIT
"""Loads the libfuse shim (shim.c tells what it is for) so that pyfuse3, imported later, calls it instead of libfuse.

The order is everything: the shim's names must be in the process's global scope before pyfuse3 is linked.
"""

import ctypes
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

FallocateHandler = Callable[[int, int, int, int, int], None]
"""Called with (request, inode, mode, offset, length); answers with `reply`, now or later."""

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ShimError(Exception):
    """The shim is missing, was loaded too late, or sits in front of another libfuse than pyfuse3's."""


def _load() -> ctypes.CDLL:
    if "pyfuse3" in sys.modules:
        raise ShimError("pyfuse3 was imported before zbudfs.fuse: the libfuse shim cannot take its place")
    here = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = here / f"_shim{suffix}"
        if path.exists():
            # PyDLL: its functions call back into Python, or touch what Python allocates; the GIL stays held.
            return ctypes.PyDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    raise ShimError(f"the libfuse shim is not built: no {here / '_shim'}.*.so; install the package, do not just copy it")


_shim: Final = _load()
_shim.zbudfs_set_fallocate.argtypes = [_CALLBACK]
_shim.zbudfs_set_max_background.argtypes = [ctypes.c_uint]
_shim.zbudfs_reply.argtypes = [ctypes.c_void_p, ctypes.c_int]
_shim.zbudfs_reply.restype = None
_shim.zbudfs_libfuse_version.restype = ctypes.c_char_p

_callback = None  # ctypes does not keep it alive


def set_fallocate(handler: FallocateHandler) -> None:
    """Have every fallocate request handled by `handler`."""
    global _callback
    _callback = _CALLBACK(handler)
    _shim.zbudfs_set_fallocate(_callback)


def reply(request: int, error: int) -> None:
    """Answer a fallocate request with an errno, 0 for success."""
    _shim.zbudfs_reply(request, error)


def set_max_background(requests: int) -> None:
    """Bound the requests that the kernel keeps in flight. Before FUSE_INIT."""
    _shim.zbudfs_set_max_background(requests)


def libfuse_version() -> str:
    """Of the libfuse behind the shim."""
    version: bytes = _shim.zbudfs_libfuse_version()
    return version.decode()


def arena_allocator() -> tuple[int, int]:
    """Addresses of the C functions that take Python's object arenas from malloc: (alloc, free)."""
    functions = (_shim.zbudfs_arena_alloc, _shim.zbudfs_arena_free)
    alloc, free = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return alloc, free


def verify(maps: str) -> None:
    """ShimError unless one libfuse is loaded, the shim's and pyfuse3's. `maps` is the text of /proc/self/maps."""
    loaded = {line.split(None, 5)[5] for line in maps.splitlines() if "/libfuse3.so" in line}
    if len(loaded) > 1:
        raise ShimError(f"pyfuse3 and the libfuse shim use different libraries ({', '.join(sorted(loaded))}): reinstall both")
