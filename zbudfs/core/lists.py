# SPDX-License-Identifier: MIT
"""Doubly linked lists of indices, intrusive and without a Python object per member.

Each of `nodes` members (frame numbers, for example) can be on one of `lists` lists. A list is a ring through a
sentinel, node `nodes + list`, so that linking and unlinking have no special cases:

    sentinel -> oldest -> ... -> newest -> sentinel

Every operation is O(1). The columns lie in buffers of the caller, 4 bytes a node each.
"""

from collections.abc import Iterator


class IndexLists:
    """`lists` lists over `nodes` members.

    `nexts` and `prevs` are memoryviews of format "I" with `nodes + lists` entries. The entries of a member that is on no
    list mean nothing: the owner of the lists must know which list a member is on. With `attach` the constructor writes
    nothing, and `clear` must come before any other call.
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
        """Return the oldest member of list `which`, or a number >= `nodes` if it is empty."""
        return self.nexts[self.nodes + which]

    def members(self, which: int) -> Iterator[int]:
        """Yield the members from the oldest to the newest. Meanwhile only the member just yielded may leave the list."""
        node = self.nexts[self.nodes + which]
        while node < self.nodes:
            after = self.nexts[node]
            yield node
            node = after

    def check(self, which: int) -> None:
        """Raise AssertionError unless the `prevs` of list `which` are the reverse of its `nexts`."""
        node = sentinel = self.nodes + which
        while True:
            after = self.nexts[node]
            assert self.prevs[after] == node, f"list {which}: {after} follows {node}, not {self.prevs[after]}"
            node = after
            if node == sentinel:
                return
