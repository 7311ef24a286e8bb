# SPDX-License-Identifier: MIT
"""systemd understands each line of the units, and no setting hides the mount from other processes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.support import LIMIT_SECONDS, ROOT

UNITS: Final = sorted((ROOT / "systemd").glob("*.service"))
COMMAND: Final = "/usr/local/bin/zbudfs"

NEWER: Final = {"RestartSteps": 254, "RestartMaxDelaySec": 254, "RestartMode": 254, "SurviveFinalKillSignal": 255}
"""Settings that older versions of systemd skip, and the first version that has them."""

HIDING: Final = re.compile(
    r"^(Private(Tmp|Devices|Mounts|Network|Users|IPC|PIDs)|Protect(System|Home|Proc|KernelTunables|KernelModules|KernelLogs"
    r"|ControlGroups|Hostname)|ProcSubset|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths|BindPaths|TemporaryFileSystem"
    r"|RootDirectory|MountFlags|DynamicUser)=",
    re.MULTILINE,
)
"""Settings that give a service its own mount namespace, in which other processes do not see a new mount."""


def analyze(*arguments: str | Path, units: Path) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze on the units in this folder and those of the system."""
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:", "LC_ALL": "C"}
    return subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return the installed units, with a command that exists."""
    command = tmp_path / "zbudfs"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    for unit in UNITS:
        text = unit.read_text()
        assert COMMAND in text or "/usr/local/lib/zbudfs/libexec/" in text
        (tmp_path / unit.name).write_text(text.replace(COMMAND, str(command)))
    return tmp_path


@pytest.mark.needs("systemd")
@pytest.mark.parametrize("name", [unit.name for unit in UNITS])
def test_systemd_understands_them(name: str, units: Path) -> None:
    """`systemd-analyze verify` reports only settings that this version does not know."""
    version = int(analyze("--version", units=units).stdout.split()[1])
    done = analyze("verify", "--man=no", units / name, units=units)
    said = [line for line in done.stderr.splitlines() if str(units) in line or "zbudfs" in line]
    too_new = {key for key, since in NEWER.items() if since > version}
    assert [line for line in said if not any(f"Unknown key '{key}'" in line for key in too_new)] == []
    assert done.returncode == 0


@pytest.mark.needs("systemd")
def test_verify_finds_what_is_wrong(units: Path) -> None:
    """A setting that does not exist is reported, so the check before can fail."""
    broken = units / "zbudfs@.service"
    broken.write_text(broken.read_text().replace("LimitCORE=", "LimitCROE=").replace("Type=notify", "Type=no"))
    said = analyze("verify", "--man=no", broken, units=units).stderr
    assert "LimitCROE" in said
    assert re.search("Failed to parse (service type|Type=no)", said)  # the words of systemd 252 and 257


@pytest.mark.needs("systemd")
@pytest.mark.parametrize("name", [unit.name for unit in UNITS])
def test_exposure(name: str, units: Path) -> None:
    """The exposure is the one in docs/understand/systemd.md. A mount that all processes see needs the rest."""
    done = analyze("security", "--offline=yes", "--no-pager", units / name, units=units)
    found = re.search(r"exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < 5.0


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_no_system_call_is_given_the_error_that_all_others_have(unit: Path) -> None:
    """systemd 252 does not start such a unit ("Failed to apply system call filters"): libseccomp refuses the rule."""
    text = unit.read_text()
    default = re.search(r"^SystemCallErrorNumber=(\w+)$", text, re.MULTILINE)
    assert default
    filters = re.findall(r"^SystemCallFilter=(.*)$", text, re.MULTILINE)
    assert filters
    assert [line for line in filters if f":{default[1]}" in line] == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_nothing_hides_the_mount(unit: Path) -> None:
    """No setting makes a mount namespace."""
    assert HIDING.search("[Service]\nProtectSystem=strict\n")
    assert not HIDING.search(unit.read_text())
