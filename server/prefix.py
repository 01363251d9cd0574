"""Folded blocks that streams with the same beginning share: a radix tree over blocks of tokens.

A folded entry depends on the tokens before it alone and never changes, so it is kept once, and a
prompt that begins alike begins behind it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from server.rows import State
from server.runtime import Ints


@dataclass(eq=False)
class _Node:
    """A block behind the blocks of its parents."""

    parent: _Node | None = None
    key: bytes = b""
    state: State = field(default_factory=dict)
    children: dict[bytes, _Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return len(self.key) + sum(values.nbytes for values in self.state.values())


class PrefixCache:
    """What the blocks of `span` tokens left on the stacks, up to `limit` bytes of it."""

    def __init__(self, span: int, limit: int) -> None:
        self._span = span
        self._limit = limit
        self._root = _Node()
        # Oldest use first. A block is always used after those behind it, so the first is a leaf.
        self._by_use: OrderedDict[_Node, None] = OrderedDict()
        self.nbytes = 0

    def match(self, tokens: Ints) -> list[State]:
        """What the longest known run of blocks that `tokens[T]` begin with left, block by block."""
        path = self._walk(tokens)
        self._use(path)
        return [node.state for node in path]

    def insert(self, tokens: Ints, state: State) -> None:
        """Keep what the last block of `tokens[T]`, whole blocks, left.

        Does nothing when it is known, or when the blocks before it are not, or no longer.
        """
        *_, key = keys = self._keys(tokens)
        path = self._walk(tokens[: -self._span])
        if len(path) < len(keys) - 1:
            return
        parent = path[-1] if path else self._root
        if key not in parent.children:
            parent.children[key] = node = _Node(parent, key, state)
            self.nbytes += node.nbytes
        self._use([*path, parent.children[key]])
        while self.nbytes > self._limit:
            self._drop(next(iter(self._by_use)))

    def _keys(self, tokens: Ints) -> list[bytes]:
        whole = len(tokens) - len(tokens) % self._span
        return [tokens[at : at + self._span].tobytes() for at in range(0, whole, self._span)]

    def _walk(self, tokens: Ints) -> list[_Node]:
        path, node = [], self._root
        for key in self._keys(tokens):
            if key not in node.children:
                break
            node = node.children[key]
            path.append(node)
        return path

    def _use(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._by_use[node] = None
            self._by_use.move_to_end(node)

    def _drop(self, leaf: _Node) -> None:
        assert leaf.parent is not None and not leaf.children
        del leaf.parent.children[leaf.key], self._by_use[leaf]
        self.nbytes -= leaf.nbytes
