# SPDX-License-Identifier: MIT
"""A program that needs more memory than it gets, and checks every byte of its memory.

    storm.py MIB [SEED]

It fills MIB of memory with pages like those of real programs, prints "filled", and waits for a line on stdin. Then it
compares every page with the written one in order. For the sake of swap, it compares and rewrites an eighth of the pages in
random order. At the end it compares all pages again. It prints one line of JSON: {"pages": N, "bad": M}.

Each page is generated from its number, generation and seed, so the program need not keep the content:

    3 of 8   one word repeated, as a third to a half of a real program's memory is
    4 of 8   text and pointers, about half of it random: compresses to some 1000 to 2000 bytes
    1 of 8   random bytes: does not compress

The exit status is 1 if a byte was wrong.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
from typing import Final

PAGE_BYTES: Final = 4096


def make_page(number: int, generation: int, seed: int) -> bytes:
    """Return the 4096 bytes of page `number` after its rewrite number `generation`."""
    # The seed is an integer, since a text or a tuple would be hashed for every page.
    source = random.Random((seed << 72) | (generation << 64) | number)
    kind = number % 8
    if kind < 3:
        return source.randbytes(8) * (PAGE_BYTES // 8) if kind else bytes(PAGE_BYTES)
    if kind == 7:
        return source.randbytes(PAGE_BYTES)
    noise = source.randbytes(800 + source.randrange(1000))
    text = b"page %d of generation %d; " % (number, generation)
    return (noise + text * (PAGE_BYTES // len(text) + 1))[:PAGE_BYTES]


def main(argv: list[str]) -> int:
    """Run the storm, and return the exit status."""
    pages = int(argv[1]) * (1 << 20) // PAGE_BYTES
    seed = int(argv[2]) if len(argv) > 2 else 1
    generations = bytearray(pages)
    memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    order = random.Random(seed)
    bad = 0

    def check(number: int) -> bool:
        start = number * PAGE_BYTES
        return view[start : start + PAGE_BYTES] == make_page(number, generations[number], seed)

    def fill(number: int) -> None:
        start = number * PAGE_BYTES
        view[start : start + PAGE_BYTES] = make_page(number, generations[number], seed)

    for number in range(pages):
        fill(number)
    print("filled", flush=True)
    sys.stdin.readline()
    bad += sum(not check(number) for number in range(pages))
    for _ in range(pages // 8):
        number = order.randrange(pages)
        bad += not check(number)
        generations[number] = (generations[number] + 1) % 256
        fill(number)
    bad += sum(not check(number) for number in range(pages))
    print(json.dumps({"pages": pages, "bad": bad}), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
