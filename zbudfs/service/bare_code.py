# SPDX-License-Identifier: MIT
"""Keeps out of the daemon's memory what its work does not need: docstrings, annotations of functions, source text.

The daemon would lock them in RAM in each of three processes: 0.6 MiB of objects a process. Assertions stay, which Python's
option -OO removes together with the docstrings. Tracebacks still show source lines, which Python reads from the files again.

This module is the first that the daemon imports, and imports little: what is loaded before `install` keeps its docstrings.
"""

import sys
from importlib import machinery
from opcode import hasconst, opmap
from types import CodeType, FunctionType

_OPTIMIZED = 1
"""The flag of a function's code, as opposed to that of a module or a class."""

_LOAD = [number for number in hasconst if number < 256]
"""The instructions that load a constant. Larger numbers are those of the compiler."""

_BLANK = " "
"""The text that replaces a docstring. It is a true value: for a class without one, dataclasses would compose a signature."""


class _Loader(machinery.SourceFileLoader):
    """Loads modules as usual, from compiled files too, and removes their docstrings."""

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return code and without_docstrings(code)


def install() -> None:
    """Remove the docstrings of modules that are imported from now on."""
    loaders = (
        (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
        (_Loader, machinery.SOURCE_SUFFIXES),
        (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
    )
    sys.path_hooks.insert(0, machinery.FileFinder.path_hook(*loaders))
    sys.path_importer_cache.clear()


def drop() -> None:
    """Drop the annotations of all functions, the source text, and the lists of files that imports have read.

    Call this after the last import. While modules are imported attrs reads annotations of functions; nothing does later.
    """
    import gc
    import linecache

    gc.collect()
    linecache.clearcache()
    sys.path_importer_cache.clear()
    for each in gc.get_objects():
        if isinstance(each, FunctionType):
            del each.__annotations__


def without_docstrings(code: CodeType) -> CodeType:
    """Return code in which the docstrings of it, and of the functions and classes within it, are blank."""
    constants = [without_docstrings(each) if isinstance(each, CodeType) else each for each in code.co_consts]
    at = _docstring(code)
    if at is not None:
        constants[at] = _BLANK
    return code.replace(co_consts=tuple(constants))


def _docstring(code: CodeType) -> int | None:
    """Return the index of the docstring among the constants. Return None if the code has none, or uses it as a value too."""
    instructions = code.co_code
    if code.co_flags & _OPTIMIZED:
        at, loads = 0, 0  # Python takes it from the first place, and no instruction loads it
    elif "__doc__" in code.co_names[:256]:
        store = instructions.find(bytes((opmap["STORE_NAME"], code.co_names.index("__doc__"))))
        if store < 2 or store % 2 or instructions[store - 2] != opmap["LOAD_CONST"]:
            return None
        at, loads = instructions[store - 1], 1
    else:
        return None
    if not isinstance(next(iter(code.co_consts[at:]), None), str):
        return None
    return at if sum(instructions.count(bytes((each, at))) for each in _LOAD) == loads else None
