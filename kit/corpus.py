# SPDX-License-Identifier: MIT
"""A corpus of pages of real process memory, like those that go to swap. They come from programs that are started for it.

    python   a heap of objects, and their text as JSON
    cc1      the compiler in the middle of a function of some thousand lines
    git      the objects of this repository on their way to a pack, if there is a repository

The program is stopped, its writable memory is read, and it is ended. Pages of one repeated word are left out. They would be
a third to a half of all pages and cost almost nothing, and the figures are for pages that must be compressed. The pages
differ from run to run, which does no harm: figures are compared within one run only.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kit.programs import MIB, PAGE, ROOT, KitError, find_program
from zbudfs.core.codec import Codec

SAMPLE_LIMIT_SECONDS: Final = 10.0
"""Time in which a program may become large enough. After that, its memory is taken as it is."""

_PYTHON: Final = """
import json, random, sys, time
r = random.Random(1)
words = [''.join(r.choice('abcdefghijklmnopqrstuvwxyz') for _ in range(r.randrange(3, 12))) for _ in range(5000)]
rows = [{'id': i, 'name': r.choice(words), 'path': '/'.join(r.sample(words, 3)), 'at': r.random(), 'tags': r.sample(words, 4)}
        for i in range(int(sys.argv[1]))]
text = json.dumps(rows)
index = {row['path']: row for row in rows}
print('ready', flush=True)
time.sleep(600)
"""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Pages, and the programs that they are from."""

    pages: bytes
    sources: dict[str, int]
    """Number of pages of each program, by its name."""

    @property
    def count(self) -> int:
        """The number of pages."""
        return len(self.pages) // PAGE

    def describe(self) -> str:
        """Return one sentence on the sources of the pages, and the mean size of their zpages."""
        encode = Codec().encode
        step = max(1, self.count // 2000)
        sizes = [len(encode(self.pages[at * PAGE : (at + 1) * PAGE])) for at in range(0, self.count, step)]
        parts = ", ".join(f"{count:,} of {name}" for name, count in self.sources.items())
        return (
            f"Pages: real process memory without same-filled pages ({parts}); a zpage has {sum(sizes) / len(sizes):.0f} bytes"
            " on average."
        )

    @contextlib.contextmanager
    def as_file(self) -> Iterator[int]:
        """Write the pages to a file in RAM, charged to this process, and yield its descriptor."""
        fd = os.memfd_create("corpus")
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(self.pages)
            yield fd
        finally:
            os.close(fd)


def sample(most_bytes: int = 64 * MIB) -> Corpus:
    """Take up to `most_bytes` of pages, about as many from each program. Raises KitError if there are none."""
    found: dict[str, list[bytes]] = {}
    share = most_bytes // PAGE // 2
    for name, pages in (
        ("python", _python(most_bytes)),
        ("cc1", _cc1(most_bytes // 2)),
        ("git", _git(most_bytes // 4)),
    ):
        if pages:
            found[name] = random.Random(1).sample(pages, min(share, len(pages)))
    together = [page for pages in found.values() for page in pages]
    if not together:
        raise KitError(
            "the memory of no process could be read: run this as root, since /proc/PID/mem needs ptrace rights"
        )
    random.Random(2).shuffle(together)
    return Corpus(b"".join(together[: most_bytes // PAGE]), {name: len(pages) for name, pages in found.items()})


def _python(most_bytes: int) -> list[bytes]:
    command = [sys.executable, "-I", "-c", _PYTHON, str(most_bytes // 700)]
    with _started(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # it is a pipe
        process.stdout.readline()
        return memory_of(process.pid)


def _cc1(most_bytes: int) -> list[bytes]:
    """Return pages of the compiler cc1 while it works on one large function."""
    gcc = find_program("gcc")
    if gcc is None:
        return []
    compiler = subprocess.run([gcc, "-print-prog-name=cc1"], capture_output=True, text=True, check=False).stdout.strip()
    lines = (
        f"  x ^= (y + {n}u) * {n * 2654435761 % 2**32}u; if (x & {n}) y += g[{n % 97}] >> (x & 7);" for n in range(9000)
    )
    source = "\n".join(["extern unsigned g[97];", "unsigned f(unsigned x, unsigned y) {", *lines, "  return x + y; }"])
    with _started([compiler, "-quiet", "-O2", "-o", os.devnull, "-"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None  # it is a pipe
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(source.encode())
            process.stdin.close()
        _wait_large(process, most_bytes)
        return memory_of(process.pid)


def _git(most_bytes: int) -> list[bytes]:
    git = find_program("git")
    if git is None or not (ROOT / ".git").exists():
        return []
    # No process reads the pack: git stops when the pipe is full, with all its memory.
    command = [git, "-C", str(ROOT), "pack-objects", "--all", "--stdout", "--no-reuse-object", "-q"]
    with _started(command, stdout=subprocess.PIPE) as process:
        _wait_large(process, most_bytes)
        return memory_of(process.pid)


@contextlib.contextmanager
def _started(
    command: list[str], stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _wait_large(process: subprocess.Popen[bytes], wanted_bytes: int) -> None:
    """Stop a program when it has `wanted_bytes` of memory, or when it has not grown for a second."""
    end = time.monotonic() + SAMPLE_LIMIT_SECONDS
    largest, grown_at = 0, time.monotonic()
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE
            if resident > largest:
                largest, grown_at = resident, time.monotonic()
            if resident >= wanted_bytes:
                break
        if time.monotonic() - grown_at > 1.0:
            break
        time.sleep(0.005)
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)


def memory_of(pid: int) -> list[bytes]:
    """Return the pages of a process's private writable memory that are not one repeated word; none if it has ended."""
    pages: list[bytes] = []
    with contextlib.suppress(OSError), Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *rest = line.split()
            if (
                not rights.startswith("rw")
                or not rights.endswith("p")
                or (len(rest) > 3 and rest[3] in ("[vvar]", "[vsyscall]"))
            ):
                continue
            start, end = (int(word, 16) for word in place.split("-"))
            for at in range(start, end, MIB):
                try:
                    memory.seek(at)
                    piece = memory.read(min(MIB, end - at))
                except OSError:
                    break
                for offset in range(0, len(piece) - PAGE + 1, PAGE):
                    page = piece[offset : offset + PAGE]
                    if page != page[:8] * (PAGE // 8):
                        pages.append(page)
    return pages
