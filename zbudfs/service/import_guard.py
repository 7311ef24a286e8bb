# SPDX-License-Identifier: MIT
"""Keeps modules out of the daemon that it never uses: imported before trio and pyfuse3, by the daemon only.

trio has streams, files and processes, for which it imports `ssl`, `idna` and `subprocess`. pyfuse3 imports
`importlib.metadata`, and with it `email` and `zipfile`, to find its own version. Each module costs private memory,
locked in RAM, in each of three processes: 3.5 MiB a process in all. While these packages are imported, empty modules stand
in for what the daemon does not use. Afterwards the guard removes these from `sys.modules`: a later import gets the real
module.
"""

import ctypes
import sys
import types
from typing import Any, Final

NOT_NEEDED: Final = (
    "ssl",
    "hmac",
    "subprocess",
    "ctypes.util",
    "ast",
    "idna",
    "importlib.metadata",
    "pickle",
    "urllib.parse",
    "trio._channel",
    "trio._core._mock_clock",
    "trio._dtls",
    "trio._file_io",
    "trio._highlevel_open_tcp_listeners",
    "trio._highlevel_open_tcp_stream",
    "trio._highlevel_open_unix_stream",
    "trio._highlevel_serve_listeners",
    "trio._highlevel_socket",
    "trio._highlevel_ssl_helpers",
    "trio._path",
    "trio._socket",
    "trio._ssl",
    "trio._subprocess",
    "trio._threads",
    "trio._unix_pipes",
    "trio.socket",
)


class _Absent(types.ModuleType):
    """A module in which every name is an empty exception class, for annotations and as a base class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def _module(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


_stand_ins: dict[str, types.ModuleType] = {name: _Absent(name) for name in NOT_NEEDED} | {
    "attr.validators": _module("attr.validators", instance_of=lambda kind: lambda *_: None),  # for outcome
    "sortedcontainers": _module("sortedcontainers", SortedDict=dict),  # for trio's wait_all_tasks_blocked
    "platform": _module("platform", python_implementation=lambda: "CPython"),  # for attrs and zstandard
}
_stand_ins = {name: module for name, module in _stand_ins.items() if name not in sys.modules}
sys.modules.update(_stand_ins)
vars(ctypes)["util"] = _module("ctypes.util", find_library=lambda name: None)  # for trio
try:
    import trio as trio

    from zbudfs.fuse import session as session  # with pyfuse3 and zstandard
finally:
    del vars(ctypes)["util"]
    for _name in _stand_ins:
        del sys.modules[_name]
