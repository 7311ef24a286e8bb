# SPDX-License-Identifier: MIT
"""The cgroup of the daemon: that of a login session, or its own.

A daemon that a shell starts is in the cgroup of the login session. It ends with the session. An out-of-memory kill in the
session may end it, and systemd freezes user.slice before the machine sleeps. So under systemd the daemon gets its own scope:

    systemd-run --scope --slice=system.slice --unit=zbudfs-NAME-PID.scope    registers itself and becomes the daemon

Children of the daemon are in the same cgroup. A service of the system, such as zbudfs@NAME, keeps its cgroup.
"""

import os
import re
from collections.abc import Sequence
from typing import Final

from zbudfs.store.files import below, read_bytes

SESSIONS: Final = re.compile(
    r"/(user|machine)\.slice(/|$)|\.scope$|/(getty|serial-getty|console-getty|sshd?|cron|atd)[@.]"
)
"""Pattern of the cgroup of a login session, or of a service whose processes are sessions."""

OWN: Final = re.compile(r"/zbudfs-[^/]*\.scope$")
"""Pattern of the cgroup of a daemon in its own scope."""

PROPERTIES: Final = (
    "DefaultDependencies=no",  # no stop at shutdown: swap may still be on
    "SurviveFinalKillSignal=yes",
    "OOMPolicy=continue",
    "ManagedOOMPreference=omit",
    "MemorySwapMax=0",
    "CPUWeight=1000",
    "IOWeight=1000",
)
NEW_PROPERTIES: Final = ("SurviveFinalKillSignal=yes", "OOMPolicy=continue")
"""The properties that systemd 252 refuses for a scope."""

_LONGEST_NAME: Final = 80


def cgroup_of(pid: int | str, root: str = "/") -> str:
    """Return the cgroup of a process for systemd, such as "/user.slice/x.scope"; empty if it cannot be read."""
    try:
        lines = read_bytes(f"proc/{pid}/cgroup", root).decode(errors="replace").splitlines()
    except OSError:
        return ""
    named = {
        controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1)
    }
    return named.get("name=systemd", named.get("", ""))


def ends_with_session(cgroup: str) -> bool:
    """Return whether a process in this cgroup ends with a login session, or is frozen with it."""
    return bool(SESSIONS.search(cgroup)) and not OWN.search(cgroup)


def session_warnings(root: str = "/") -> list[str]:
    """Return a sentence if this process is in the cgroup of a login session."""
    cgroup = cgroup_of("self", root)
    if not ends_with_session(cgroup):
        return []
    return [
        f"the daemon is in the cgroup {cgroup} of a login session: it may end, or be frozen, with that session, and swap"
        " with it; start it as a service: zbudfs@NAME"
    ]


def scope_command(name: str, *, every: bool = True, root: str = "/") -> list[str]:
    """Return the words before a command that give it its own scope; none if that is unnecessary or impossible.

    `name` is part of the scope's name. `every` False leaves out the properties that old versions of systemd refuse.
    """
    if not os.path.isdir(below(root, "run/systemd/system")) or not ends_with_session(cgroup_of("self", root)):
        return []
    import shutil  # imported here, since the daemon imports this module too

    program = shutil.which("systemd-run", path="/usr/bin:/bin")
    if program is None:
        return []
    unit = f"zbudfs-{name[:_LONGEST_NAME]}-{os.getpid()}.scope"
    properties = [text for text in PROPERTIES if every or text not in NEW_PROPERTIES]
    options: Sequence[str] = ["--scope", "--quiet", "--collect", "--slice=system.slice", f"--unit={unit}"]
    return [program, *options, *(f"--property={text}" for text in properties), "--"]
