# SPDX-License-Identifier: MIT
"""The delay before the next attempt."""

import pytest

from zbudfs.core.delay import back_off_seconds


@pytest.mark.parametrize(("failures", "seconds"), [(-1, 0), (0, 0), (1, 10), (2, 20), (3, 40), (4, 60), (10_000, 60)])
def test_it_doubles_up_to_a_bound(failures: int, seconds: float) -> None:
    """A series of failures may last for days: the delay never overflows."""
    assert back_off_seconds(failures, 10.0, 60.0) == seconds
