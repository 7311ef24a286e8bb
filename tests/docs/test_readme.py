# SPDX-License-Identifier: MIT
"""scripts/readme.py finds the commands of README.md, each runs or has a reason, and a failed one fails the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import readme
from tests.support import ROOT

SECTIONS = ("Install", "Swap by hand", "Try it without installing", "Look and tune", "Install from source")


def test_every_command_is_run_or_skipped_with_a_reason() -> None:
    """No section with commands is forgotten, and each skipped command is in README."""
    found = readme.commands((ROOT / "README.md").read_text())
    assert {each.section for each in found} - set(SECTIONS) <= {"Options"}  # a line of /etc/fstab
    assert all(each.skipped for each in found if each.section == "Options")
    assert [start for start in readme.SKIPPED if not any(each.line.startswith(start) for each in found)] == []
    assert sum(each.skipped is None for each in found) >= 15


def test_commands_in_blocks_and_sentences() -> None:
    """A comment, output and a picture are no part of a command."""
    text = "## A\n\n    zbudfs top          # live\n      RAM it was given 128 MiB\n    apt install x\n\nUse `zbudfs top`.\n"
    assert [(each.section, each.line) for each in readme.commands(text)] == [
        ("A", "zbudfs top"),
        ("A", "apt install x"),
    ]
    assert [each.line for each in readme.named("or build it in a clone of this repository")][-1] == "make deb"
    with pytest.raises(readme.ReadmeError, match="names no command"):
        readme.named("no such sentence")
    with pytest.raises(readme.ReadmeError, match="no commands in the section"):
        readme.of("No such section")


def test_a_failed_command_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that fails is shown with its output, the next one runs, and a problem of the doctor is no failure."""
    said = {
        "zbudfs status": (1, "no mount\n"),
        "zbudfs doctor": (1, "problem  kernel\n  -> a newer kernel\n"),
    }
    monkeypatch.setattr(readme.Machine, "call", lambda _self, line, _limit: said.get(line, (0, "")))
    machine = readme.Machine("bookworm", Path("/nonexistent"))
    lines = ["zbudfs status", "zbudfs doctor", "systemctl start x", "zbudfs config swap"]
    machine.follow(*(readme.Command("A", line) for line in lines))
    assert machine.failed == ["zbudfs status"]
    output = capsys.readouterr().out
    assert "| no mount" in output
    assert "needs a booted systemd" in output


def test_swap_that_is_left_behind() -> None:
    """Only loop devices of the folder's own zbudfs mounts are detached. The kernel shows the path outside the folder."""
    mounts = (
        "27 1 253:0 / / rw - ext4 /dev/vda rw\n"
        "44 27 0:41 / /mnt/zswap rw,nosuid - fuse.zbudfs zbudfs rw,user_id=0\n"
        "45 27 0:42 / /mnt/other rw,nosuid - fuse.zbudfs zbudfs rw,user_id=0\n"
    )
    loops = "/dev/loop0        0:41\n/dev/loop1        0:99\n/dev/loop2        0:42\n/dev/loop3\n"
    swaps = "Filename Type Size Used Priority\n/var/tmp/try/tree/dev/loop0 partition 524284 0 50\n/dev/loop1 partition 8 0 5\n"
    assert readme.left_behind(mounts, loops, swaps) == [
        ["swapoff", "/dev/loop0"],
        ["losetup", "--detach", "/dev/loop0"],
        ["losetup", "--detach", "/dev/loop2"],
    ]
