# SPDX-License-Identifier: MIT
"""Standard streams that tell when they cannot be written, and what characters they can show.

Python passes over much of this by itself: argparse ignores errors when it prints help, an error at the last flush comes
after the exit status is known, and with a closed stream `print` prints nothing, or prints to the other stream.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

_COERCED: Final = ("C.UTF-8", "C.utf8", "UTF-8")
"""What Python sets LC_CTYPE to by itself where LANG is C."""


class OutputError(OSError):
    """Standard output cannot be written."""

    def __str__(self) -> str:
        """Say what failed: the error's own words do not."""
        why = "it is closed" if self.errno == errno.EBADF else self.strerror
        return f"standard output cannot be written, so what was to be printed is lost: {why}"


class _Output(io.FileIO):
    """Standard output. `failure` keeps the first error, since not everybody who prints lets it through."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write. BrokenPipeError, OutputError."""
        try:
            return super().write(data)
        except BrokenPipeError as error:
            self.failure = self.failure or error
            raise
        except OSError as error:
            self.failure = self.failure or OutputError(error.errno, error.strerror)
            raise self.failure from None


class _Errors(io.FileIO):
    """Standard error. An error on it cannot be told to anybody, and must not end what the command does."""

    def write(self, data: Any, /) -> int:
        """Write, if it can be written."""
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


def open_closed_streams() -> None:
    """Give a closed standard stream its number back, so that no file of the command gets it. Standard output stays unusable."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


@contextmanager
def checked_output() -> Iterator[None]:
    """Have standard output and standard error checked. OutputError or BrokenPipeError at the end if not all was written.

    Streams that somebody has replaced already, such as a test, stay as they are.
    """
    before = sys.stdout, sys.stderr
    out = None
    if sys.stdout is sys.__stdout__:
        open_closed_streams()
        out = _Output(1, "wb", closefd=False)
        sys.stdout = _text(out, before[0])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Errors(2, "wb", closefd=False), before[1])
    try:
        yield
        with suppress(OSError):
            sys.stdout.flush()
        if out is not None and out.failure is not None:
            raise out.failure
    finally:
        if out is not None and out.failure is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python must not try again at exit
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _text(raw: io.FileIO, like: Any) -> io.TextIOWrapper:
    """Return a text stream over `raw`; what cannot be encoded is escaped."""
    buffered = io.BufferedWriter(raw)
    lines = isinstance(raw, _Errors) or raw.isatty()
    return io.TextIOWrapper(buffered, getattr(like, "encoding", None), errors="backslashreplace", line_buffering=lines)


def shows_unicode(environment: Mapping[str, str] | None = None, encoding: str | None = None) -> bool:
    """Return whether the user's locale is one of UTF-8, and standard output is written in it."""
    environment = os.environ if environment is None else environment
    encoding = getattr(sys.stdout, "encoding", None) if encoding is None else encoding
    language = environment.get("LANG") or "C"
    kind = environment.get("LC_CTYPE") or language
    if kind in _COERCED:
        kind = language
    locale = environment.get("LC_ALL") or kind
    return all("utf8" in name.lower().replace("-", "") for name in (locale, encoding or ""))
