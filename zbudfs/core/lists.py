# SPDX-License-Identifier: MIT
"""Doubly linked lists of indices, intrusive and without a Python object per member.

`nodes` members (frame numbers, say) can each be on one of `lists` lists. A list is a ring through a
sentinel, node `nodes + list`, so that linking and unlinking have no special cases:

    sentinel -> oldest -> ... -> newest -> sentinel

Every operation is O(1). The columns lie in buffers of the caller, 4 bytes a node each.
"""

from collections.abc import Iterator

UINT32 = "I"


class IndexLists:
    """`lists` lists over `nodes` members.

    `nexts` and `prevs` are memoryviews of format "I" with `nodes + lists` entries. What stands at a
    member that is on no list means nothing: whoever owns the lists must know where a member is. With
    `attach` nothing is written, and nothing may be asked, before `clear`.
    """

    __slots__ = ("lists", "nexts", "nodes", "prevs")

    def __init__(self, nexts: memoryview, prevs: memoryview, nodes: int, lists: int, *, attach: bool = False) -> None:
        self.nexts = nexts
        self.prevs = prevs
        self.nodes = nodes
        self.lists = lists
        if not attach:
            self.clear()

    def clear(self) -> None:
        """Empty every list."""
        for sentinel in range(self.nodes, self.nodes + self.lists):
            self.nexts[sentinel] = self.prevs[sentinel] = sentinel

    def append(self, which: int, node: int) -> None:
        """Put `node` at the newest end of list `which`."""
        sentinel = self.nodes + which
        prevs = self.prevs
        last = prevs[sentinel]
        self.nexts[last] = node
        prevs[node] = last
        self.nexts[node] = sentinel
        prevs[sentinel] = node

    def prepend(self, which: int, node: int) -> None:
        """Put `node` at the oldest end of list `which`."""
        sentinel = self.nodes + which
        nexts = self.nexts
        first = nexts[sentinel]
        self.prevs[first] = node
        nexts[node] = first
        self.prevs[node] = sentinel
        nexts[sentinel] = node

    def remove(self, node: int) -> None:
        """Take `node` off the list it is on."""
        after = self.nexts[node]
        before = self.prevs[node]
        self.nexts[before] = after
        self.prevs[after] = before

    def oldest(self, which: int) -> int:
        """The oldest member of list `which`, or a number >= `nodes` if it is empty."""
        return self.nexts[self.nodes + which]

    def members(self, which: int) -> Iterator[int]:
        """From the oldest to the newest. The list must not change meanwhile, save for the member just given."""
        node = self.nexts[self.nodes + which]
        while node < self.nodes:
            after = self.nexts[node]
            yield node
            node = after

    def check(self, which: int) -> None:
        """AssertionError unless list `which` leads back the way it leads there."""
        node = sentinel = self.nodes + which
        while True:
            after = self.nexts[node]
            assert self.prevs[after] == node, f"list {which}: {after} follows {node}, not {self.prevs[after]}"
            node = after
            if node == sentinel:
                return
