# SPDX-License-Identifier: MIT
"""Makes the zstd dictionary of zbudfs/core/dictionary.py: no content, only the tables of zstd's entropy coder.

    python -m scripts.dictionary [--also PID ...]

Programs are started and their memory is read, that of other processes as well (a virtual machine, say). zstd cuts each page
into sequences (literals, a match, how far back), and how often each code of a sequence occurs, counted in all programs
alike, becomes the three tables. What is printed is the constant of that module. Whoever changes it changes what zpages
mean: the layout number in zbudfs/store/board.py goes with it.

Format and numbers: RFC 8878, sections 3.1.1.3.2.1 (codes of sequences), 4.1.1 (tables of FSE) and 5 (dictionaries).
"""

from __future__ import annotations

import argparse
import ctypes
import random
import struct
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import zstandard

from bench import corpus, packing
from bench.kit import PAGE
from zbudfs.core.codec import HASH_LOG, MIN_MATCH

MAGIC: Final = 0xEC30A437
IDENTIFIER: Final = 1
REPEATED_OFFSETS: Final = (1, 4, 7)
"""What matches of a page's beginning may repeat. None reaches beyond the content of a dictionary: seven zeros are the most that
zstd forgets at once, so that compressing with this dictionary is no slower than without one."""
PAGES_OF_EACH: Final = 5000
LITERALS_FROM_PAGES: Final = 2000
FEWEST_SEQUENCES: Final = 20
"""Pages of fewer say nothing: their tables are zstd's own."""

_OFFSET_CODES: Final = 18
"""zstd takes the table as good for every page only if it has all codes up to those of 128 KiB."""
_MATCH_CODES: Final = 53
_LITERAL_CODES: Final = 36
_TABLE_LOGS: Final = (8, 9, 9)
"""Of the tables of offsets, match lengths and literal lengths: the largest that the format has."""
_MATCH_STEPS: Final = (32, 34, 36, 38, 40, 44, 48, 56, 64, 80, 96, 128)
_LITERAL_STEPS: Final = (16, 18, 20, 22, 24, 28, 32, 40, 48, 64)
_LEVEL, _WINDOW_LOG, _HASH_LOG, _MIN_MATCH = 100, 101, 102, 105
"""Of enum ZSTD_cParameter in zstd.h."""


def sequences(library: Any, context: Any, page: bytes) -> Iterable[tuple[int, int, int, int]]:
    """What zstd makes of a page: (distance, literals, match length, number of the repeated distance or 0) of each."""
    room = (ctypes.c_uint32 * (4 * PAGE))()
    count = library.ZSTD_generateSequences(context, room, PAGE, page, len(page))
    if library.ZSTD_isError(count):
        raise RuntimeError("zstd does not tell its sequences")
    numbers = room[: 4 * count]
    return zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True)


def code(number: int, steps: Sequence[int], first: int) -> int:
    """The code of a length: itself up to the first step, one more at each, then one more at each power of two."""
    if number < steps[0]:
        return number
    for place, (low, high) in enumerate(pairwise(steps)):
        if low <= number < high:
            return first + place
    return first + len(steps) - 1 + number.bit_length() - steps[-1].bit_length()


def count_codes(pages: Sequence[bytes]) -> list[Counter[int]]:
    """How often each code of offsets, match lengths and literal lengths occurs."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_createCCtx.restype = ctypes.c_void_p
    library.ZSTD_generateSequences.restype = ctypes.c_size_t
    library.ZSTD_generateSequences.argtypes = (ctypes.c_void_p, *(ctypes.c_void_p, ctypes.c_size_t) * 2)
    context = ctypes.c_void_p(library.ZSTD_createCCtx())
    for name, value in ((_LEVEL, -1), (_WINDOW_LOG, 12), (_HASH_LOG, HASH_LOG), (_MIN_MATCH, MIN_MATCH)):
        library.ZSTD_CCtx_setParameter(context, name, value)
    offsets, matches, literals = Counter[int](), Counter[int](), Counter[int]()
    for page in pages:
        found = [each for each in sequences(library, context, page) if each[2]]
        if len(found) < FEWEST_SEQUENCES:
            continue
        offsets.update((repeated or distance + 3).bit_length() - 1 for distance, _, _, repeated in found)
        matches.update(code(match - 3, _MATCH_STEPS, 32) for _, _, match, _ in found)
        literals.update(code(before, _LITERAL_STEPS, 16) for _, before, _, _ in found)
    library.ZSTD_freeCCtx(context)
    return [offsets, matches, literals]


def normalised(shares: Sequence[float], log: int) -> list[int]:
    """Whole numbers in these proportions, of which each is at least one and all make 2 to the `log`; -1 is a rare one."""
    size = 1 << log
    counts = [max(1, int(share * size / sum(shares))) for share in shares]
    while (excess := sum(counts) - size) != 0:  # what is given or taken changes the proportions least at the largest
        counts[counts.index(max(counts))] -= max(-1, min(1, excess))
    return [-1 if count == 1 else count for count in counts]


def described(counts: Sequence[int], log: int) -> bytes:
    """An FSE table as it stands in a dictionary. No count is 0."""
    stream, length = log - 5, 4
    remaining, threshold, bits = (1 << log) + 1, 1 << log, log + 1
    for count in counts:
        most = 2 * threshold - 1 - remaining
        remaining -= abs(count)
        value = count + 1
        if value >= threshold:
            value += most
        stream |= value << length
        length += bits - (value < most)
        while remaining < threshold:
            bits, threshold = bits - 1, threshold >> 1
    return stream.to_bytes((length + 7) // 8, "little")


def huffman_table(pages: Sequence[bytes]) -> bytes:
    """The table of all literals, from a dictionary that zstd makes. It must be there; levels below 0 code no literals."""
    trained = zstandard.train_dictionary(PAGE, list(pages)).as_bytes()[8:]  # behind magic number and identifier
    if trained[0] >= 128:
        raise RuntimeError("a table of literals in a form that older versions of zstd do not take")
    return trained[: 1 + trained[0]]


def dictionary(programs: Sequence[Sequence[bytes]]) -> bytes:
    """The dictionary for pages of these programs, each of which counts the same."""
    shares = [[0.0] * codes for codes in (_OFFSET_CODES, _MATCH_CODES, _LITERAL_CODES)]
    for pages in programs:
        for share, counted in zip(shares, count_codes(pages), strict=True):
            for number, times in counted.items():
                share[number] += times / len(pages)
    tables = [described(normalised(share, log), log) for share, log in zip(shares, _TABLE_LOGS, strict=True)]
    every = [page for pages in programs for page in pages]
    literals = huffman_table(random.Random(2).sample(every, min(len(every), LITERALS_FROM_PAGES)))
    head, distances = struct.pack("<II", MAGIC, IDENTIFIER), struct.pack("<III", *REPEATED_OFFSETS)
    return b"".join([head, literals, *tables, distances, bytes(max(REPEATED_OFFSETS))])


def collect(others: Sequence[int]) -> dict[str, list[bytes]]:
    """Pages by program; those of one repeated word are not among them."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in packing.PROGRAMS:
            found[name] = packing.snapshot(packing.command(name, 60_000, Path(folder)))
    mixed = corpus.sample().pages
    found["what is benchmarked"] = [mixed[at : at + PAGE] for at in range(0, len(mixed), PAGE)]
    found |= {f"process {pid}": corpus.memory_of(pid) for pid in others}
    chance = random.Random(1)
    return {name: chance.sample(pages, min(len(pages), PAGES_OF_EACH)) for name, pages in found.items() if pages}


def main() -> None:
    """Print the constant."""
    parser = argparse.ArgumentParser(prog="dictionary.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--also", type=int, nargs="+", default=[], metavar="PID", help="processes whose memory is read too"
    )
    programs = collect(parser.parse_args().also)
    print(", ".join(f"{len(pages)} pages of {name}" for name, pages in programs.items()), file=sys.stderr)
    for line in textwrap.wrap(dictionary([*programs.values()]).hex(), 100):
        print(f'    "{line}"')


if __name__ == "__main__":
    main()
