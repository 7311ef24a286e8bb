# SPDX-License-Identifier: MIT
"""Standard streams whose write errors are reported, and the characters that the terminal can show.

Python alone loses many of these errors. argparse ignores an error while it prints help. An error at the last flush comes
after the exit status is known. With a closed stream, `print` prints nothing, or prints to another file.
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
"""Values that Python itself gives LC_CTYPE if LANG is C."""


class OutputError(OSError):
    """A write to standard output failed."""

    def __str__(self) -> str:
        """Return a message that names standard output, which the text of the errno does not."""
        why = "it is closed" if self.errno == errno.EBADF else self.strerror
        return f"standard output cannot be written, so the output is lost: {why}"


class _Output(io.FileIO):
    """Standard output that keeps its first error in `failure`, since a caller such as argparse may ignore it."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write bytes. Raises BrokenPipeError and OutputError."""
        try:
            return super().write(data)
        except BrokenPipeError as error:
            self.failure = self.failure or error
            raise
        except OSError as error:
            self.failure = self.failure or OutputError(error.errno, error.strerror)
            raise self.failure from None


class _Errors(io.FileIO):
    """Standard error that ignores write errors: they cannot be reported, and must not end the command."""

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them on an error."""
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


def open_closed_streams() -> None:
    """Open /dev/null for each closed standard stream, so that no file of the command gets its number.

    A closed standard output is opened for reading: a write to it still fails.
    """
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
    """Check all writes to standard output. Raises OutputError or BrokenPipeError at the end if a write failed.

    Write errors of standard error are ignored. A stream that has been replaced, for example by a test, stays as it is.
    """
    before = sys.stdout, sys.stderr
    out = None
    if sys.stdout is sys.__stdout__:
        open_closed_streams()
        out = _Output(1, "wb", closefd=False)
        sys.stdout = _text(out, before[0])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold characters that the terminal cannot show
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
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python does not fail again at exit
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _text(raw: io.FileIO, like: Any) -> io.TextIOWrapper:
    """Return a text stream over `raw` that escapes characters which it cannot encode."""
    buffered = io.BufferedWriter(raw)
    lines = isinstance(raw, _Errors) or raw.isatty()
    return io.TextIOWrapper(buffered, getattr(like, "encoding", None), errors="backslashreplace", line_buffering=lines)


def shows_unicode(environment: Mapping[str, str] | None = None, encoding: str | None = None) -> bool:
    """Return whether both the user's locale and standard output use UTF-8."""
    environment = os.environ if environment is None else environment
    encoding = getattr(sys.stdout, "encoding", None) if encoding is None else encoding
    language = environment.get("LANG") or "C"
    kind = environment.get("LC_CTYPE") or language
    if kind in _COERCED:
        kind = language
    locale = environment.get("LC_ALL") or kind
    return all("utf8" in name.lower().replace("-", "") for name in (locale, encoding or ""))
