# SPDX-License-Identifier: MIT
"""Keeps OpenSSL out of the daemon: imported before trio, by the daemon only.

trio imports `ssl` and `hmac` for its TLS and DTLS streams, which the daemon has no use for. They cost about 2 MiB of
private memory in each of three processes, all of it locked in RAM, and map libssl and libcrypto. While trio is imported
empty modules stand in for them; afterwards these are taken away again, so that whoever asks for the real ones gets them.
"""

import sys
import types
from typing import Any

_NOT_NEEDED = ("ssl", "hmac")


class _Absent(types.ModuleType):
    """A module of which every name is an empty exception class: something to annotate with and to derive from."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


_stand_ins = [name for name in _NOT_NEEDED if name not in sys.modules]
for _name in _stand_ins:
    sys.modules[_name] = _Absent(_name)
try:
    import trio as trio
finally:
    for _name in _stand_ins:
        del sys.modules[_name]
