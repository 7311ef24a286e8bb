# SPDX-License-Identifier: MIT
"""Make the zstd dictionary of zbudfs/core/dictionary.py. It has no content, only the tables of zstd's entropy coder.

    python -m scripts.dictionary [--also PID ...]

The script starts programs and reads their memory, and also that of given processes, such as a virtual machine. zstd cuts
each page into sequences (literals, a match, its distance). The frequency of each code of a sequence, with equal weight for
all programs, gives the three tables. The script prints the constant of that module. A change of the constant changes the
meaning of zpages: then change the layout number in zbudfs/store/status_area.py too.

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

from bench import packing
from kit import corpus
from kit.programs import PAGE
from zbudfs.core.codec import HASH_LOG, MIN_MATCH

MAGIC: Final = 0xEC30A437
IDENTIFIER: Final = 1
REPEATED_OFFSETS: Final = (1, 4, 7)
"""Distances that the first matches of a page may repeat. None reaches beyond the content of the dictionary: seven zeros.
zstd drops a content of at most seven bytes at once, so this dictionary does not slow the compression."""
PAGES_OF_EACH: Final = 5000
LITERALS_FROM_PAGES: Final = 2000
FEWEST_SEQUENCES: Final = 20
"""Least number of sequences of a counted page. For pages with fewer sequences, zstd uses its own tables."""

_OFFSET_CODES: Final = 18
"""Number of offset codes. zstd uses the table for every page only if it has all codes up to those of 128 KiB."""
_MATCH_CODES: Final = 53
_LITERAL_CODES: Final = 36
_TABLE_LOGS: Final = (8, 9, 9)
"""Logarithms of the sizes of the tables of offsets, match lengths and literal lengths: the largest of the format."""
_MATCH_STEPS: Final = (32, 34, 36, 38, 40, 44, 48, 56, 64, 80, 96, 128)
_LITERAL_STEPS: Final = (16, 18, 20, 22, 24, 28, 32, 40, 48, 64)
_LEVEL, _WINDOW_LOG, _HASH_LOG, _MIN_MATCH = 100, 101, 102, 105
"""Values of enum ZSTD_cParameter in zstd.h."""


def sequences(library: Any, context: Any, page: bytes) -> Iterable[tuple[int, int, int, int]]:
    """Return the sequences of a page: (distance, literals, match length, number of the repeated distance or 0) each."""
    room = (ctypes.c_uint32 * (4 * PAGE))()
    count = library.ZSTD_generateSequences(context, room, PAGE, page, len(page))
    if library.ZSTD_isError(count):
        raise RuntimeError("zstd cannot generate the sequences of a page")
    numbers = room[: 4 * count]
    return zip(numbers[::4], numbers[1::4], numbers[2::4], numbers[3::4], strict=True)


def code(number: int, steps: Sequence[int], first: int) -> int:
    """Return the code of a length: the length below the first step, then one more at each step and each power of two."""
    if number < steps[0]:
        return number
    for place, (low, high) in enumerate(pairwise(steps)):
        if low <= number < high:
            return first + place
    return first + len(steps) - 1 + number.bit_length() - steps[-1].bit_length()


def count_codes(pages: Sequence[bytes]) -> list[Counter[int]]:
    """Count the codes of offsets, match lengths and literal lengths."""
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
    """Return whole numbers in these proportions: each at least one, with the sum 2 to the `log`. A one is written as -1."""
    size = 1 << log
    counts = [max(1, int(share * size / sum(shares))) for share in shares]
    while (excess := sum(counts) - size) != 0:  # a change of the largest count changes the proportions least
        counts[counts.index(max(counts))] -= max(-1, min(1, excess))
    return [-1 if count == 1 else count for count in counts]


def described(counts: Sequence[int], log: int) -> bytes:
    """Return an FSE table in the format of a dictionary. No count is 0."""
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
    """Return the table of literals of a dictionary that zstd trains. The format requires one; levels below 0 do not use it."""
    trained = zstandard.train_dictionary(PAGE, list(pages)).as_bytes()[8:]  # after the magic number and the identifier
    if trained[0] >= 128:
        raise RuntimeError("the table of literals has a form that older versions of zstd cannot read")
    return trained[: 1 + trained[0]]


def dictionary(programs: Sequence[Sequence[bytes]]) -> bytes:
    """Return the dictionary for pages of these programs, each with the same weight."""
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
    """Return pages by program, without pages of one repeated word."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in packing.PROGRAMS:
            found[name] = packing.snapshot(packing.command(name, 60_000, Path(folder)))
    mixed = corpus.sample().pages
    found["the corpus of bench"] = [mixed[at : at + PAGE] for at in range(0, len(mixed), PAGE)]
    found |= {f"process {pid}": corpus.memory_of(pid) for pid in others}
    chance = random.Random(1)
    return {name: chance.sample(pages, min(len(pages), PAGES_OF_EACH)) for name, pages in found.items() if pages}


def main() -> None:
    """Print the constant of zbudfs/core/dictionary.py."""
    parser = argparse.ArgumentParser(prog="dictionary.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--also", type=int, nargs="+", default=[], metavar="PID", help="more processes whose memory is read"
    )
    programs = collect(parser.parse_args().also)
    print(", ".join(f"{len(pages)} pages of {name}" for name, pages in programs.items()), file=sys.stderr)
    for line in textwrap.wrap(dictionary([*programs.values()]).hex(), 100):
        print(f'    "{line}"')


if __name__ == "__main__":
    main()
