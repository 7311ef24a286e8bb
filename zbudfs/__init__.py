# SPDX-License-Identifier: MIT
"""zbudfs: a FUSE filesystem that serves as a compressed backing store for swap.

The way of a page of memory, and the folders of the code:

    process memory -> kernel swap -> loop -> fuse/ -> store/page_store -> core/zbud -> store/backing
                                                      (page table)        (frames)     (blocks on disk)
"""

__version__ = "0.2.0"
"""The version of the package, the wheel, the manual pages and `--version`. It is written here alone."""
