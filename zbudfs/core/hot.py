# SPDX-License-Identifier: MIT
"""Whether the hot path in C (hot.c) was built. It does the common case of a page's write and read over the tables of a store.

The Python code is the reference: it does everything, it is what runs where the extension is not there, and it is what the
extension calls for whatever is not the common case. Each packing has its part of it (hot_zbud.c, hot_dense.c), which is found
by the layout of its frames (`Allocator.hot`); the page store asks for a hot path and knows nothing more.
"""

from typing import TYPE_CHECKING, Final

NOT_BUILT: Final = "the hot path in C is not there, and Python does its work: a page takes half as long again"
"""What to say where it is missing,"""
REMEDY: Final = "install zbudfs anew, do not just copy it"
"""and what would help."""

if TYPE_CHECKING:
    from zbudfs.core._hot import Hot as Hot
    from zbudfs.core._hot import Slow as Slow

    BUILT: bool
else:
    try:
        from zbudfs.core._hot import Hot

        BUILT: Final = True
    except ImportError:
        Hot = object  # which annotations can name; nobody makes one
        BUILT: Final = False
