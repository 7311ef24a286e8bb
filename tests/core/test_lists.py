# SPDX-License-Identifier: MIT
"""The intrusive lists are compared with Python's lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zbudfs.core.lists import IndexLists

NODES = 7
LISTS = 3


def make() -> IndexLists:
    """Return lists over a buffer with other content."""
    nexts, prevs = (memoryview(bytearray(b"\xff" * 4 * (NODES + LISTS))).cast("I") for _ in range(2))
    return IndexLists(nexts, prevs, NODES, LISTS)


def contents(lists: IndexLists) -> list[list[int]]:
    """Return the members of each list, oldest first."""
    return [list(lists.members(which)) for which in range(LISTS)]


def test_all_lists_are_empty_at_first() -> None:
    """A new list has no member, whatever the buffer contains, and its oldest member is no node."""
    lists = make()
    assert contents(lists) == [[]] * LISTS
    assert all(lists.oldest(which) >= NODES for which in range(LISTS))


@given(st.lists(st.tuples(st.integers(0, NODES - 1), st.integers(0, LISTS - 1), st.booleans())))
def test_any_sequence_agrees_with_a_list(moves: list[tuple[int, int, bool]]) -> None:
    """Each list has its members in order after any inserts at both ends and removals from the middle."""
    lists = make()
    model: list[list[int]] = [[] for _ in range(LISTS)]
    for node, which, newest in moves:
        home = next((members for members in model if node in members), None)
        if home is not None:
            lists.remove(node)
            home.remove(node)
            assert contents(lists) == model
        if newest:
            lists.append(which, node)
            model[which].append(node)
        else:
            lists.prepend(which, node)
            model[which].insert(0, node)
        assert contents(lists) == model
        assert [lists.oldest(number) for number in range(LISTS)] == [
            members[0] if members else NODES + number for number, members in enumerate(model)
        ]


@given(st.lists(st.integers(0, NODES - 1), unique=True, min_size=1))
def test_both_directions_agree(nodes: list[int]) -> None:
    """The links back from the newest end give the members in reverse."""
    lists = make()
    for node in nodes:
        lists.append(1, node)
    backwards = []
    node = lists.prevs[NODES + 1]
    while node < NODES:
        backwards.append(node)
        node = lists.prevs[node]
    assert backwards == nodes[::-1]


def test_the_member_just_given_may_go() -> None:
    """A walk continues when the member that it has just given is removed or moved to another list."""
    lists = make()
    for node in range(NODES):
        lists.append(0, node)
    for node in lists.members(0):
        lists.remove(node)
        if node % 2:
            lists.prepend(2, node)
    assert contents(lists) == [[], [], [5, 3, 1]]


def test_clear_empties_every_list() -> None:
    """Each member can be linked again after `clear`."""
    lists = make()
    for node in range(NODES):
        lists.append(node % LISTS, node)
    lists.clear()
    assert contents(lists) == [[]] * LISTS
    lists.append(0, 3)
    assert contents(lists)[0] == [3]
