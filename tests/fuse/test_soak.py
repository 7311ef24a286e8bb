# SPDX-License-Identifier: MIT
"""The short form of `make soak`, and a test that it notices errors."""

from __future__ import annotations

import pytest

from scripts import soak


@pytest.mark.needs("root", "fuse", "loop", "nbd")
def test_one_round(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Several processes make requests while the disk fails, the worker is killed and settings change."""
    monkeypatch.setattr(soak, "SEEDS_A_ROUND", 4)
    assert soak.main(["--minutes", "0.01", "--seed", "3"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "  rounds           1 in " in out
    assert "  wrong            0" in out


def test_growth_is_seen() -> None:
    """One more file or thread, or more memory than a heap may need, is found."""
    first = {"worker's memory": 20_000, "keeper's files": 30, "loop devices": 1}
    assert soak.grown(first, first) == []
    assert soak.grown(first, {**first, "worker's memory": 20_000 + soak.GROWTH_KIB}) == []
    assert soak.grown(
        first, {"worker's memory": 21_001 + soak.GROWTH_KIB, "keeper's files": 34, "loop devices": 0}
    ) == [
        f"worker's memory: 20000 to {21_001 + soak.GROWTH_KIB}",
        "keeper's files: 30 to 34",
    ]
