# SPDX-License-Identifier: MIT
"""A model of the hand-over, explored completely: never do two processes serve or does a dead one write into a block.

The model has the keeper, the service manager, all workers and standbys, the lock of the roster, and one disk write of
each worker. Each rule has the name of the function that it stands for. A kill may come between any two rules.

A process is a pair: its work, and whether it has a write under way. A worker that is killed during a write is `ENDING`
until the disk answers: the kernel keeps the thread, and so the process and its lock.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import pytest

from zbudfs.service import daemon
from zbudfs.service.first_worker import FirstWorker
from zbudfs.service.handing_over import HandingOver
from zbudfs.service.restart import Restart
from zbudfs.service.roster import Roster
from zbudfs.service.standby_monitor import StandbyMonitor
from zbudfs.service.worker import Worker
from zbudfs.service.worker_monitor import WorkerMonitor

STANDBY: Final = "standby"
FIRST: Final = "first"
"""The first worker of a new keeper. It gets ready while another worker may serve, and dies with its keeper."""
WAITING: Final = "waiting"
"""A worker with the order to take over, which may not have the lock yet."""
SERVING: Final = "serving"
ENDING: Final = "ending"

MOST_FAULTS: Final = 6
MOST_PROCESSES: Final = 5

Process = tuple[str, bool]


@dataclass(frozen=True)
class State:
    """The state of the whole mount. `processes` is sorted, since the order of equal ones has no effect."""

    keeper: bool = True
    successor: bool = False
    """Whether a restart is under way: a second keeper with a `FIRST` worker."""
    processes: tuple[Process, ...] = ((SERVING, False),)
    faults: int = 0

    def count(self, *kinds: str) -> int:
        """Return the number of processes that do one of these things."""
        return sum(kind in kinds for kind, _ in self.processes)

    def having(self, old: Process | None, new: Process | None) -> State:
        """Return the state with one process changed, added or removed."""
        processes = list(self.processes)
        if old is not None:
            processes.remove(old)
        if new is not None:
            processes.append(new)
        return replace(self, processes=tuple(sorted(processes)))

    def killed(self, *kinds: str) -> State:
        """Return the state after SIGKILL to all processes that do one of these things."""
        state = self
        for process in self.processes:
            if process[0] in kinds:
                state = state.having(process, (ENDING, True) if process[1] else None)
        return state


@dataclass(frozen=True)
class Variant:
    """The decisions of the code. The defaults are those of the present code."""

    is_free: Callable[[State], bool] = lambda state: not state.count(SERVING, ENDING)
    """Whether a waiting worker may serve: the kernel's answer to `Roster.serve`."""
    is_seen: bool = True
    """Whether a new keeper sees the processes that its predecessor has left."""


Rule = Callable[[State, Variant], Iterator[State]]


def serve(state: State, variant: Variant) -> Iterator[State]:
    """A waiting worker takes the lock, rebuilds and serves."""
    if (WAITING, False) in state.processes and variant.is_free(state):
        yield state.having((WAITING, False), (SERVING, False))


def write(state: State, variant: Variant) -> Iterator[State]:
    """The worker begins a write, and the disk answers at any later time."""
    if (SERVING, False) in state.processes:
        yield state.having((SERVING, False), (SERVING, True))
    if (SERVING, True) in state.processes:
        yield state.having((SERVING, True), (SERVING, False))
    if (ENDING, True) in state.processes:
        yield state.having((ENDING, True), None)


def fork_standby(state: State, variant: Variant) -> Iterator[State]:
    """The keeper forks a standby while a worker serves."""
    if state.keeper and state.count(SERVING) and not state.count(STANDBY) and not state.successor:
        yield state.having(None, (STANDBY, False))


def take_over(state: State, variant: Variant) -> Iterator[State]:
    """The worker is gone with all its threads, and the keeper orders the standby or forks a worker."""
    if state.keeper and not state.successor and not state.count(SERVING, WAITING, ENDING, FIRST):
        old = (STANDBY, False) if state.count(STANDBY) else None
        yield state.having(old, (WAITING, False))


def outlive_keeper(state: State, variant: Variant) -> Iterator[State]:
    """The standby sees that its worker is gone and the keeper is gone or stopped, and orders itself."""
    if state.count(STANDBY) and not state.count(SERVING, ENDING):
        yield state.having((STANDBY, False), (WAITING, False))


def resume(state: State, variant: Variant) -> Iterator[State]:
    """The manager starts a keeper. Its first worker gets ready, or serves at once if no process is seen."""
    if not state.keeper and not state.successor:
        ready = variant.is_seen and state.count(STANDBY, WAITING, SERVING)
        yield replace(state.having(None, (FIRST if ready else WAITING, False)), keeper=True)


def end_others(state: State, variant: Variant) -> Iterator[State]:
    """A new keeper kills all other processes and orders its first worker."""
    if state.keeper and state.count(FIRST) and not state.successor:
        yield state.killed(STANDBY, WAITING, SERVING).having((FIRST, False), (WAITING, False))


def start_restart(state: State, variant: Variant) -> Iterator[State]:
    """A restart is ordered while the worker is well: another keeper starts, and its worker gets ready."""
    if state.keeper and not state.successor and state.count(SERVING) and not state.count(FIRST):
        yield replace(state.having(None, (FIRST, False)), successor=True)


def hand_over(state: State, variant: Variant) -> Iterator[State]:
    """The old keeper kills standby and worker, and ends. The new one orders its worker after that."""
    if state.successor and state.count(FIRST):
        ended = state.killed(STANDBY, WAITING, SERVING).having((FIRST, False), (WAITING, False))
        yield replace(ended, successor=False, keeper=True)


def abandon(state: State, variant: Variant) -> Iterator[State]:
    """A restart is given up: the worker or the new keeper is not well, or the old keeper has ended too early."""
    if state.successor and not (state.keeper and state.count(FIRST) and state.count(SERVING)):
        yield replace(state.killed(FIRST), successor=False)


RULES: Final[dict[Rule, tuple[object, ...]]] = {
    serve: (Roster.serve, Worker._become_server),
    write: (),
    fork_standby: (StandbyMonitor.look_after,),
    take_over: (WorkerMonitor.take_over,),
    outlive_keeper: (Worker._outlive_keeper,),
    resume: (daemon._resume, FirstWorker.start, FirstWorker.start_at_once),
    end_others: (FirstWorker.end_others, FirstWorker.order),
    start_restart: (Restart._begin,),
    hand_over: (HandingOver.end, HandingOver.advance),
    abandon: (HandingOver._fail, Restart.abandon),
}
"""Each rule and its function. The disk's rule has no function."""


def faults(state: State) -> Iterator[State]:
    """Yield each state after a kill of one process, or of keeper and all others at once."""
    if state.faults == MOST_FAULTS:
        return
    hurt = replace(state, faults=state.faults + 1)
    for process in set(state.processes):
        if process[0] != ENDING:
            yield hurt.having(process, (ENDING, True) if process[1] else None)
    if state.keeper:
        alone = replace(hurt, keeper=False)
        if not state.successor:
            alone = alone.killed(FIRST)  # PR_SET_PDEATHSIG; the worker of the successor lives with the successor
        yield alone
        yield replace(hurt, keeper=False, successor=False).killed(STANDBY, FIRST, WAITING, SERVING)
    if state.successor:
        yield replace(hurt, successor=False).killed(FIRST)


def steps(state: State, variant: Variant, left_out: Rule | None = None) -> Iterator[State]:
    """Yield each state that follows without a fault."""
    for rule in RULES:
        for following in () if rule is left_out else rule(state, variant):
            if len(following.processes) <= MOST_PROCESSES:
                yield following


def explore(variant: Variant) -> dict[State, list[State]]:
    """Return each reachable state with the states that follow without a fault."""
    start = State()
    found: dict[State, list[State]] = {}
    todo = deque([start])
    while todo:
        state = todo.popleft()
        if state in found:
            continue
        found[state] = list(steps(state, variant))
        todo += found[state]
        todo += faults(state)
    return found


def two_servers(found: dict[State, list[State]]) -> list[State]:
    """Return the states in which more than one process serves."""
    return [state for state in found if state.count(SERVING) > 1]


def dead_writes(found: dict[State, list[State]]) -> list[State]:
    """Return the states with a server in which a dead worker's write may land in a block that is given away."""
    return [state for state in found if state.count(SERVING) and state.count(ENDING)]


def without_a_server(found: dict[State, list[State]]) -> list[State]:
    """Return the states from which no state with a server can be reached without another fault."""
    before: dict[State, list[State]] = {state: [] for state in found}
    for state, following in found.items():
        for each in following:
            before[each].append(state)
    todo = [state for state in found if state.count(SERVING)]
    good = set(todo)
    while todo:
        for state in before[todo.pop()]:
            if state not in good:
                good.add(state)
                todo.append(state)
    return [state for state in found if state not in good]


def test_one_serves_and_nothing_is_lost() -> None:
    """No reachable state has two servers or a dead write, and from each a server comes, since a manager starts a keeper."""
    found = explore(Variant())
    assert len(found) > 200, "the model has lost most of its states"
    assert any(state.count(ENDING) for state in found), "no write is under way at a death"
    assert two_servers(found) == []
    assert dead_writes(found) == []
    assert without_a_server(found) == []


@pytest.mark.parametrize(
    ("variant", "fault"),
    [
        (Variant(is_free=lambda state: True, is_seen=False), two_servers),
        (Variant(is_free=lambda state: True), dead_writes),
        (Variant(is_free=lambda state: not state.count(SERVING)), dead_writes),
    ],
    ids=["no lock, and a keeper that cannot look", "no lock, and a write under way", "a zombie counts as gone"],
)
def test_the_model_finds_faults(variant: Variant, fault: Callable[[dict[State, list[State]]], list[State]]) -> None:
    """Without the lock, or with one that a zombie does not hold, the model finds the faults that real mounts had."""
    assert fault(explore(variant))


def test_a_keeper_that_cannot_look_does_no_harm() -> None:
    """The lock alone keeps a second worker from serving."""
    found = explore(Variant(is_seen=False))
    assert two_servers(found) == dead_writes(found) == []


def test_a_server_without_a_manager() -> None:
    """If a keeper or a standby is left, a server comes also without a manager."""
    found = explore(Variant())
    alone = {state: list(steps(state, Variant(), resume)) for state in found}
    stuck = [state for state in without_a_server(alone) if state.keeper or state.count(STANDBY, WAITING)]
    assert stuck == []


def test_the_worker_does_what_the_model_says() -> None:
    """The worker takes the lock before it reads a table or a request, and each rule but the disk's has its function."""
    source = inspect.getsource(Worker._take_over)
    order = [source.index(word) for word in ("_become_server()", "write_owners", "recover()", "resume(", "resend(")]
    assert order == sorted(order)
    assert "roster.serve()" in inspect.getsource(Worker._become_server)
    assert "LOCK_NB" in inspect.getsource(Roster._take)
    assert [rule for rule, functions in RULES.items() if not all(map(callable, functions)) or not functions] == [write]
