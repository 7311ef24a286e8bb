# SPDX-License-Identifier: MIT
"""zbudfs: a FUSE filesystem that serves as a compressed backing store for swap.

Where a page of memory goes, and in which folder:

    process memory -> kernel swap -> loop -> fuse/ -> store/page_store -> core/zbud -> store/backing
                                                      (page table)        (frames)     (blocks on disk)
"""

__version__ = "0.1.0"
