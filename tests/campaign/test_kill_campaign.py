# SPDX-License-Identifier: MIT
"""Workers are killed at random moments while programs live on the swap they serve: no byte may be wrong."""

from __future__ import annotations

import json

import pytest

from scripts.campaign_kill import run, sound

pytestmark = pytest.mark.needs("root", "fuse", "loop", "swap", "cell")

KILLS = 6


@pytest.mark.parametrize(("packing", "pool"), [("zbud", "16M"), ("dense", "8M")])
def test_no_byte_is_wrong(packing: str, pool: str) -> None:
    """A short campaign: every kill is followed by a takeover, every byte is right, nothing fails and nobody hangs."""
    report = run(kills=KILLS, mib=96, limit=32, pool=pool, seed=2, packing=packing)
    assert sound(report), json.dumps(report)
    assert report["kills"] >= KILLS
    for name in ("storms", "probe_reads", "cumul_writeback_pages", "cumul_pagein_pages", "cumul_discarded_pages"):
        assert report[name] > 0, name


@pytest.mark.parametrize(
    "name", ["bad", "failed_storms", "lost_pages", "probe_errors", "kernel_errors", "recoveries", "kills"]
)
def test_what_is_not_sound(name: str) -> None:
    """A single wrong byte, failed program, lost page or error condemns a campaign, as do a missing takeover and no kill."""
    report = dict.fromkeys(("bad", "failed_storms", "lost_pages", "probe_errors", "kernel_errors"), 0)
    report |= {"recoveries": KILLS, "kills": KILLS}
    assert sound(report)
    report[name] = {"recoveries": KILLS - 1, "kills": 0}.get(name, 1)
    assert not sound(report)
