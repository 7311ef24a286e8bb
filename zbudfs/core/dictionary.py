# SPDX-License-Identifier: MIT
"""The zstd dictionary of every zpage: tables for the entropy coder, and nothing to be found again.

zstd codes lengths and distances of matches with tables (FSE). For a page of 4096 bytes it counts, makes, writes and reads
three of them, which takes a fifth of the time. From a dictionary that has all codes a fast level takes them as they are. The
memory of programs is much alike in this: heaps of Python, Node and Java, a compiler, git, and the whole RAM of a virtual
machine were cut into sequences by zstd, each of them counting the same (scripts/dictionary.py made it, and can do so again).

Its content is seven zeros, as many as its repeated distances need, and too few for zstd to look for matches in.

What zpages mean depends on every bit of this. It belongs to the layout that store/board.py numbers.
"""

from typing import Final

DICTIONARY: Final = bytes.fromhex(
    "37a430ec010000008010d30b10c691ac95ae000004c0018c27651d0b90068391193d06861980462180648061da0030000000"
    "e600000000e484179e466aa2c41c34000028053000000000000001000000040000000700000000000000000000"
)
