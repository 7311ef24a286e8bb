# SPDX-License-Identifier: MIT
"""The zstd dictionary of every zpage: tables for the entropy coder, without any content that a page could repeat.

zstd codes lengths and distances of matches with tables (FSE). For a page of 4096 bytes it counts, makes, writes and reads
three of them, which takes a fifth of the time. A fast level uses the tables of a dictionary unchanged, if the dictionary
has all codes. The memory of programs hardly differs in its counts of these codes. zstd cut heaps of Python, Node and Java, a
compiler, git, and the whole RAM of a virtual machine into sequences, and each sequence counted the same.
scripts/dictionary.py made the dictionary, and can make it again.

Its content is seven zeros: as many as its repeated distances need, and too few for zstd to look for matches there.

The meaning of zpages depends on every bit of the dictionary. It belongs to the layout that store/status_area.py numbers.
"""

from typing import Final

DICTIONARY: Final = bytes.fromhex(
    "37a430ec010000003810906963411925dd89814b646634f754d491524e29fa1bcd7df7b72b239955740e2c14e5cc3d313dbb"
    "85df32c566c4d39adb552b62243205e30b10c691584a57000004e0018b2a641d0b8fc562a11931068733008c420009000335"
    "00c01803300007000000000465d71e8662a063a0350600500100000000000001000000040000000700000000000000000000"
)
