# SPDX-License-Identifier: MIT
"""A fault is logged when it begins and when it ends, however often it occurs, and a flickering one once a minute."""

from zbudfs.store.faults import LOG_AGAIN_SECONDS, Faults


def test_a_lasting_fault() -> None:
    """A lasting fault has two lines, and its last text while it lasts."""
    told: list[str] = []
    faults = Faults(told.append)
    faults.end("write", "well")
    for number in range(100):
        faults.begin("write", f"bad {number}", float(number), f"it is bad {number}")
    assert "write" in faults
    assert "grow" not in faults
    assert faults.text("write") == "bad 99"
    faults.end("write", "well")
    faults.end("write", "well")
    assert "write" not in faults
    assert told == ["it is bad 0", "well"]


def test_a_fault_that_flickers() -> None:
    """A flickering fault has one pair of lines in a minute, and kinds are separate."""
    told: list[str] = []
    faults = Faults(told.append)
    for second in range(int(2 * LOG_AGAIN_SECONDS)):
        faults.begin("full", "full", float(second))
        faults.end("full", "not full")
    assert told == ["full", "not full"] * 2
    faults.begin("grow", "stuck", 1.0)
    assert told[-1] == "stuck"
