# SPDX-License-Identifier: MIT
"""A short kill campaign: workers are killed at random moments while programs use their swap."""

from __future__ import annotations

import json

import pytest

from scripts.campaign_kill import run, sound

pytestmark = pytest.mark.needs("root", "fuse", "loop", "swap", "cell")

KILLS = 6


@pytest.mark.parametrize(("packing", "pool"), [("zbud", "16M"), ("dense", "8M")])
def test_no_byte_is_wrong(packing: str, pool: str) -> None:
    """Each kill is followed by a takeover, every byte is right, nothing fails and no process hangs."""
    report = run(kills=KILLS, mib=96, limit=32, pool=pool, seed=2, packing=packing)
    assert sound(report), json.dumps(report)
    assert report["kills"] >= KILLS
    for name in ("storms", "probe_reads", "cumul_writeback_pages", "cumul_pagein_pages", "cumul_discarded_pages"):
        assert report[name] > 0, name


@pytest.mark.parametrize(
    "name", ["bad", "failed_storms", "lost_pages", "probe_errors", "kernel_errors", "recoveries", "kills"]
)
def test_unsound_results(name: str) -> None:
    """A wrong byte, a failed program, a lost page, an error, a missing takeover or no kill fails a campaign."""
    report = dict.fromkeys(("bad", "failed_storms", "lost_pages", "probe_errors", "kernel_errors"), 0)
    report |= {"recoveries": KILLS, "kills": KILLS}
    assert sound(report)
    report[name] = {"recoveries": KILLS - 1, "kills": 0}.get(name, 1)
    assert not sound(report)
