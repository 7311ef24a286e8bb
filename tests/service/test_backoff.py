# SPDX-License-Identifier: MIT
"""The delays with which a keeper replaces a worker that died."""

import pytest

from zbudfs.service import backoff
from zbudfs.service.backoff import MAX_FAILURES, SHORT_LIFE_SECONDS, StandbyBackOff, WorkerBackOff


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock of the back-off."""
    clock = Clock()
    monkeypatch.setattr(backoff, "time", clock)
    return clock


def delay(back_off: WorkerBackOff, clock: Clock) -> float:
    """Return how long the back-off lasts from now on, in seconds."""
    began = clock.now
    while back_off.lasts:
        clock.now += 0.05
    return clock.now - began


def test_short_lives_delay_a_worker_by_a_second_at_most(clock: Clock) -> None:
    """A cause outside, such as the OOM killer, may kill twenty workers in a row. Swap waits for a second each time."""
    back_off = WorkerBackOff()
    delays = []
    for _ in range(20):
        back_off.worker_serves()
        back_off.worker_died(SHORT_LIFE_SECONDS / 2)
        delays.append(delay(back_off, clock))
    assert delays[:2] == [0, 0]
    assert delays[2] > 0
    assert delays == sorted(delays)
    assert 0.9 < delays[-1] < 1.1


def test_a_worker_that_lived_ends_the_series(clock: Clock) -> None:
    """The worker after it is replaced at once again."""
    back_off = WorkerBackOff()
    for lived in (0.1, 0.1, 0.1, SHORT_LIFE_SECONDS, 0.1):
        back_off.worker_serves()
        back_off.worker_died(lived)
        waited = delay(back_off, clock)
    assert waited == 0


def test_workers_that_do_not_start_are_tried_ever_more_seldom(clock: Clock) -> None:
    """The keeper gives up when MAX_FAILURES workers in a row did not start."""
    back_off = WorkerBackOff()
    delays = []
    for _ in range(MAX_FAILURES):
        assert not back_off.gives_up
        back_off.worker_died(None)
        delays.append(delay(back_off, clock))
    assert back_off.gives_up
    assert delays == sorted(delays)
    assert delays[-1] > 9


def test_a_series_may_last_for_days(clock: Clock) -> None:
    """The exponent of a delay is bounded: 2.0**1024 is an OverflowError, which would end the keeper."""
    worker, standby = WorkerBackOff(), StandbyBackOff()
    for _ in range(2000):
        worker.worker_serves()
        worker.worker_died(0.0)
        worker.fork_failed()
        standby.failed()
    assert worker.lasts
    assert standby.lasts
